"""Ask a trained model something: several prompts at once, in one pack.

    python chapter-01/generate.py --model runs/chapter-01/001/final --prompt "Reverse: cat"

There is no cache here: every new token runs the whole pack again, which needs no code beyond the
model itself. Chapter 2 adds the cache.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from common import hub, weights
from common.data.chat import Chat
from common.errors import UserError, located, run_main
from common.files.manifest import verify
from common.options import Parser, choose_device, choose_dtype
from modeling_qwen3 import Qwen3Config, Qwen3ForCausalLM
from packing import packed_sequence_collate_fn


@torch.no_grad()
def generate(model, prompts, max_new_tokens, stop_ids=(), temperature=0.0, seed=0):
    """Continue each prompt until a stop token or `max_new_tokens`.

    `prompts` is a list of lists of token ids. Returns the new tokens of each, without the stop
    token. Temperature 0, or one too small for float32, takes the likeliest token; above it,
    tokens are drawn from softmax(logits / temperature), fixed by `seed`. All prompts share one
    pack per step; a document that is finished leaves it.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    documents = [list(prompt) for prompt in prompts]
    growing = [n for n, prompt in enumerate(prompts) if prompt]
    for _ in range(max_new_tokens):
        if not growing:
            break
        tokens = [torch.tensor(documents[n]) for n in growing]
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
        for n, token in zip(growing, chosen.tolist()):
            documents[n].append(token)
        growing = [n for n in growing if documents[n][-1] not in stop_ids]
    answers = [document[len(prompt):] for document, prompt in zip(documents, prompts)]
    return [answer[:-1] if answer and answer[-1] in stop_ids else answer for answer in answers]


def main(argv=None):
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--model", required=True, help="a model folder, tiny, or a Hub id")
    parser.add_argument("--prompt", required=True, nargs="+", help="one or more prompts")
    parser.add_argument("--raw", action="store_true",
                        help="continue the text itself, without the chat template around it")
    parser.add_argument("--no-thinking", action="store_true",
                        help="have the chat template switch thinking off, where it can")
    parser.add_argument("--max-new-tokens", type=int, default=128,
                        help="longest answer (default: 128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    parser.add_argument("--seed", type=int, default=0, help="for temperatures above 0")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"),
                        help="of the weights; auto: bfloat16 where the hardware has it")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"),
                        help="auto: a GPU if there is one")
    options = parser.parse_args(argv)
    if options.max_new_tokens < 1 or not 0 <= options.temperature < float("inf"):
        raise UserError("--max-new-tokens must be 1 or more, and --temperature 0 or more")
    if options.raw and options.no_thinking:
        raise UserError("--raw does without the chat template, so --no-thinking has no meaning")

    folder = hub.resolve(options.model)
    verify(folder)
    chat = Chat.load(folder)
    device = choose_device(options.device)
    with located(folder / "config.json"):
        config = Qwen3Config.from_dict(weights.read_config(folder))
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    model.to_empty(device=device)
    weights.load_weights(model, folder)
    model.compute_dtype = choose_dtype(options.dtype, device)

    variables = chat.no_thinking() if options.no_thinking else {}
    if options.raw or chat.template is None:
        prompts = [chat.encode_prompt(text) for text in options.prompt]
    else:
        prompts = [chat.encode_prompt([{"role": "user", "content": text}], **variables)
                   for text in options.prompt]
    answers = generate(model, prompts, options.max_new_tokens, chat.stop_ids, options.temperature,
                       options.seed)
    for text, answer in zip(options.prompt, answers):
        print(f"> {text}\n{chat.decode(answer)}\n")


if __name__ == "__main__":
    run_main(main)
