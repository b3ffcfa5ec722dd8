"""Ask a trained model something: one or more prompts at once, in one pack.

    python chapter-01/generate.py --model runs/chapter-01/001/final --prompt "Reverse: cat"

There is no cache here, which chapter 2 adds: every new token costs a run on the whole pack."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from common import hub, weights
from common.asking import terminal
from common.data.chat import Chat
from common.errors import located, run_main
from common.options import choose_device, choose_dtype
from modeling_qwen3 import Qwen3Config, Qwen3ForCausalLM
from packing import packed_sequence_collate_fn


@torch.no_grad()
def generate(model, prompts, max_new_tokens, stop_ids=(), temperature=0.0, seed=0):
    """Continue each prompt until a stop token or `max_new_tokens`.

    `prompts` is a list of lists of token ids. Returns the new tokens of each, without the stop
    token. Temperature 0, or one too small for float32, takes the likeliest token; otherwise tokens
    are drawn from softmax(logits / temperature), fixed by `seed`. All prompts share one pack per
    step; a document that is finished leaves it."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    answers = [[] for _ in prompts]
    growing = [n for n, prompt in enumerate(prompts) if prompt]
    for _ in range(max_new_tokens):
        if not growing:
            break
        tokens = [torch.tensor([*prompts[n], *answers[n]]) for n in growing]
        pack = packed_sequence_collate_fn([(ids, ids) for ids in tokens])
        pack.pop("labels")
        last = pack["cu_seqlens"][1:].long() - 1  # position of each document's last token
        pack = {k: v.to(device) if torch.is_tensor(v) else v for k, v in pack.items()}
        logits = model(**pack)[last.to(device)].float().cpu()  # (growing documents, V)
        if temperature >= torch.finfo(torch.float32).tiny:
            logits = logits - logits.amax(-1, keepdim=True)  # 0 at most: no overflow below
            chances = torch.softmax(logits / temperature, dim=-1)
            chosen = torch.multinomial(chances, 1, generator=generator)[:, 0]
        else:
            chosen = logits.argmax(dim=-1)
        chosen = dict(zip(growing, chosen.tolist()))
        growing = [n for n in growing if chosen[n] not in stop_ids]
        for n in growing:
            answers[n].append(chosen[n])
    return answers


def main(argv=None):
    options = terminal.read_options(__doc__, argv, adapters=False)
    folder = hub.resolve(options.model)
    chat = Chat.load(folder)
    device = choose_device(options.device)
    with located(folder / "config.json"):
        config = Qwen3Config.from_dict(weights.read_config(folder))
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    model.to_empty(device=device)
    weights.load_weights(model, folder)
    model.compute_dtype = choose_dtype(options.dtype, device)
    answers = generate(model, terminal.encode(chat, options), options.max_new_tokens,
                       chat.stop_ids, options.temperature, options.seed)
    terminal.show(chat, options.prompt, answers)


if __name__ == "__main__":
    run_main(main)
