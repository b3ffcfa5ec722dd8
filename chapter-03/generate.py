# Copied from chapter-02/generate.py (whole file)
"""Ask a model, an adapter or a merged model something: several prompts at once, or a conversation.

    python chapter-02/generate.py --model runs/chapter-02/001/final --prompt "Reverse: cat"
    python chapter-02/generate.py --adapter runs/chapter-02/001/final --compare --prompt "..." "..."
    python chapter-02/generate.py --model meta-llama/Llama-3.2-1B-Instruct --chat

Greedy unless --temperature is given. What is new since chapter 1 is the cache of keys and values:
the prompts are computed once, in one pack, and then every step computes one token per document.
"""

import shutil
import sys
import textwrap
from itertools import accumulate, zip_longest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from common import hub
from common.data.chat import Chat
from common.errors import UserError, run_main
from common.options import Parser, choose_device, choose_dtype
from base_model import load_model
from kv_cache import KVCache
from peft_files import load_adapter


def choose_tokens(logits, temperature, top_k, top_p, draws):
    """The next token of each document, (N,) int64, from logits (N, V).

    Temperature 0, or one too small for float32, takes the likeliest. Otherwise a token is drawn
    from softmax(logits / temperature), of which `top_k` (0: no limit) and then `top_p` (1: no
    limit) leave only the likeliest: k tokens, and the fewest that together have probability p
    ("The Curious Case of Neural Text Degeneration", 1904.09751, section 3.1). `draws` (N,),
    uniform in [0, 1), decide: the token is where the running sum of the probabilities passes it.
    """
    if temperature < torch.finfo(torch.float32).tiny:
        return logits.argmax(dim=-1)
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # 0 at most: no overflow
    logits, tokens = logits.sort(dim=-1, descending=True)
    chances = logits[:, : top_k or None].softmax(-1)
    sums = chances.cumsum(-1)
    left = (sums - chances < top_p).sum(-1, keepdim=True)  # the tokens before it have less than p
    left = left.clamp(min=1)  # a p that float32 rounds to 0 leaves the likeliest too
    drawn = draws[:, None] * sums.gather(-1, left - 1)
    # A running sum that a GPU forms in parallel may fall by a rounding: stay within what is left.
    index = (sums <= drawn).sum(-1, keepdim=True).minimum(left - 1)
    return tokens.gather(-1, index)[:, 0]


@torch.no_grad()
def generate(model, prompts, max_new_tokens, stop_ids=(), temperature=0.0, seed=0, top_k=0,
             top_p=1.0, on_token=None):
    """Continue each prompt until a stop token, `max_new_tokens`, or the model's last position.

    `prompts` is a list of lists of token ids. Returns the new tokens of each, without the stop
    token. For the sampling see `choose_tokens`; a document's draws depend on `seed` and its place
    in the list only, not on the others. `on_token(document, token)` is called for each new token
    as it comes. Raises UserError for a prompt that does not fit the model.
    """
    longest, vocabulary = model.config.max_position_embeddings, model.config.vocab_size
    for n, prompt in enumerate(prompts):
        if len(prompt) >= longest:
            raise UserError(f"prompt {n + 1} has {len(prompt)} tokens: the model takes {longest}")
        if max(prompt, default=0) >= vocabulary:
            raise UserError(f"prompt {n + 1} has token {max(prompt)}, but the model's vocabulary "
                            f"ends at {vocabulary - 1}: is this its tokenizer?")
    device = next(model.parameters()).device
    limits = [min(max_new_tokens, longest - len(prompt)) for prompt in prompts]
    random = [np.random.default_rng((seed, n)) for n in range(len(prompts))]
    answers = [[] for _ in prompts]
    growing = [n for n, prompt in enumerate(prompts) if prompt and limits[n] > 0]
    new = [list(prompts[n]) for n in growing]  # each document's tokens that the cache lacks
    cache = KVCache(len(growing), max((len(prompts[n]) + limits[n] for n in growing), default=0))
    was_training = model.training
    model.eval()
    while growing:
        ends = [len(prompts[n]) + len(answers[n]) for n in growing]
        positions = [range(end - len(ids), end) for end, ids in zip(ends, new)]
        logits = model(
            input_ids=torch.tensor([token for ids in new for token in ids], device=device),
            cu_seqlens=torch.tensor([0, *accumulate(map(len, new))]).int().to(device),
            max_seqlen=max(map(len, new)),
            position_ids=torch.tensor([p for each in positions for p in each], device=device),
            cache=cache,
        )  # (N, V)
        if not logits.isfinite().all():
            raise UserError("the model's logits are not finite numbers: its weights are damaged, "
                            "or --dtype float32 is needed")
        draws = torch.tensor([random[n].random(dtype=np.float32) for n in growing], device=device)
        chosen = choose_tokens(logits, temperature, top_k, top_p, draws).tolist()
        rows = []  # of the documents that go on
        for row, (n, token) in enumerate(zip(growing, chosen)):
            if token in stop_ids:
                continue
            answers[n].append(token)
            if on_token is not None:
                on_token(n, token)
            if len(answers[n]) < limits[n]:
                rows.append(row)
        if 0 < len(rows) < len(growing):
            cache.keep(rows)  # what is finished costs nothing any more
        growing = [growing[row] for row in rows]
        new = [[answers[n][-1]] for n in growing]
    model.train(was_training)
    return answers


def stream(model, chat, prompt, settings):
    """Answer one prompt (ids) on the terminal, word by word as it comes; gives the text."""
    ids, shown = [], ""

    def show(document, token):
        nonlocal shown
        ids.append(token)
        text = chat.decode(ids)
        if not text.endswith("\ufffd"):  # else: a character of which only some bytes are here
            print(text[len(shown):], end="", flush=True)
            shown = text

    answer = chat.decode(generate(model, [prompt], on_token=show, **settings)[0])
    print(answer[len(shown):], flush=True)
    return answer


def converse(model, chat, settings, variables):
    """A conversation in the terminal, until the end of the input (Ctrl-D) or Ctrl-C. `variables`
    are for the chat template."""
    if chat.template is None:
        raise UserError("--chat needs a chat template, and this model has none: use --prompt")
    messages = []
    print("Ctrl-D ends the conversation.")
    while True:
        try:
            said = input("\n> ")
        except EOFError:
            print()
            return
        try:
            messages.append({"role": "user", "content": said})
            answer = stream(model, chat, chat.encode_prompt(messages, **variables), settings)
            messages.append({"role": "assistant", "content": answer})
        except UserError as error:  # say, the conversation has become too long
            print(f"error: {error}", file=sys.stderr)
            messages.pop()


def side_by_side(left, right, width):
    """Two texts as two columns that together are `width` wide."""
    column = max(10, (width - 3) // 2)
    sides = [[piece for line in text.splitlines() or [""]
              for piece in textwrap.wrap(line, column) or [""]] for text in (left, right)]
    return "\n".join(f"{a:<{column}} | {b}".rstrip() for a, b in zip_longest(*sides, fillvalue=""))


def read_options(argv):
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--model", help="a model folder, tiny, or a Hub id; with --adapter, the adapter's base "
        "(default: the one it names)")
    add("--adapter", help="a PEFT adapter folder, ours or PEFT's own, or a Hub id")
    add("--prompt", nargs="+", help="one or more prompts; all are answered together")
    add("--raw", action="store_true",
        help="continue the text itself, without the chat template around it")
    add("--no-thinking", action="store_true",
        help="have the chat template switch thinking off, where it can")
    add("--chat", action="store_true", help="a conversation in the terminal")
    add("--compare", action="store_true", help="the base and the adapter, side by side")
    add("--max-new-tokens", type=int, default=256, help="longest answer (default: 256)")
    add("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    add("--top-k", type=int, default=0, help="draw from the k likeliest tokens; 0 (default): all")
    add("--top-p", type=float, default=1.0, help="draw from the likeliest tokens that together "
        "have this probability; 1 (default): all")
    add("--seed", type=int, default=0, help="for temperatures above 0")
    add("--dtype", default="auto", choices=("auto", "bfloat16", "float32"),
        help="of the weights; auto: bfloat16 where the hardware has it")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"),
        help="auto: a GPU if there is one")
    options = parser.parse_args(argv)
    if not (options.model or options.adapter):
        raise UserError("give --model or --adapter")
    if bool(options.prompt) == options.chat:
        raise UserError("give --prompt or --chat (one of them, not both)")
    if options.raw and options.no_thinking:
        raise UserError("--raw does without the chat template, so --no-thinking has no meaning")
    if options.compare and (options.chat or not options.adapter):
        raise UserError("--compare needs --adapter, whose base it shows beside it, and --prompt")
    for name, fits in (
            ("max_new_tokens", options.max_new_tokens >= 1), ("top_k", options.top_k >= 0),
            ("temperature", 0 <= options.temperature < float("inf")), ("seed", options.seed >= 0),
            ("top_p", 0 < options.top_p <= 1)):
        if not fits:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)} is out of range")
    return options


def main(argv=None):
    options = read_options(argv)
    device = choose_device(options.device)
    adapter = hub.resolve(options.adapter, "--adapter") if options.adapter else None
    dtype = choose_dtype(options.dtype, device)
    model, base = load_model(options.model, device, dtype, adapter)
    own_tokenizer = adapter and (adapter / "tokenizer.json").is_file()
    chat = Chat.load(adapter if own_tokenizer else base)
    settings = {name: getattr(options, name) for name in
                ("max_new_tokens", "temperature", "seed", "top_k", "top_p")}
    settings["stop_ids"] = chat.stop_ids
    variables = chat.no_thinking() if options.no_thinking else {}
    as_text = options.raw or chat.template is None
    prompts = [chat.encode_prompt(text) if as_text else
               chat.encode_prompt([{"role": "user", "content": text}], **variables)
               for text in options.prompt or ()]
    before = generate(model, prompts, **settings) if options.compare else None
    if adapter:
        load_adapter(model, adapter)
    if options.chat:
        return converse(model, chat, settings, variables)
    if len(prompts) == 1 and not options.compare:
        print(f"> {options.prompt[0]}")
        stream(model, chat, prompts[0], settings)
        return
    answers = generate(model, prompts, **settings)
    width = shutil.get_terminal_size().columns
    for n, (text, answer) in enumerate(zip(options.prompt, answers)):
        shown = chat.decode(answer)
        if options.compare:
            shown = side_by_side(f"BASE\n{chat.decode(before[n])}", f"ADAPTER\n{shown}", width)
        print(f"> {text}\n{shown}\n")


if __name__ == "__main__":
    run_main(main)
