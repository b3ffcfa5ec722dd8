"""The terminal side of the chapters' generate.py: flags, prompts, answers, a conversation."""

import shutil
import sys
import textwrap
from itertools import zip_longest

from common import hub
from common.adapters.peft import load_adapter, tokenizer_folders
from common.asking.generation import generate
from common.data.chat import Chat
from common.errors import UserError
from common.options import Parser, choose_device, choose_dtype


def read_options(doc, argv, adapters=True):
    """What was typed, checked; `doc` is the script's docstring. Chapter 1 has no `adapters`."""
    parser = Parser(description=doc.split("\n\n")[0], allow_abbrev=False)
    add, longest = parser.add_argument, 256 if adapters else 128
    add("--model", required=not adapters, help="a model folder, tiny, or a Hub id" + adapters * (
        "; with --adapter, the adapter's base (default: the one it names)"))
    add("--prompt", required=not adapters, nargs="+",
        help="one or more prompts; all are answered together")
    add("--raw", action="store_true",
        help="continue the text itself, without the chat template around it")
    add("--no-thinking", action="store_true",
        help="let the chat template switch thinking off, if it can")
    add("--max-new-tokens", type=int, default=longest, help=f"longest answer (default: {longest})")
    add("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    add("--seed", type=int, default=0, help="for temperatures above 0")
    add("--dtype", default="auto", choices=("auto", "bfloat16", "float32"),
        help="to compute in; auto: bfloat16 where it is faster than float32")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"),
        help="auto: a GPU if there is one")
    parser.set_defaults(adapter=None, chat=False, compare=False, top_k=0, top_p=1.0)
    if adapters:
        add("--adapter", help="a PEFT adapter folder, ours or PEFT's own, or a Hub id")
        add("--chat", action="store_true", help="a conversation in the terminal")
        add("--compare", action="store_true", help="the base and the adapter, side by side")
        add("--top-k", type=int, help="draw from the k likeliest tokens; 0 (default): all")
        add("--top-p", type=float, help="draw from the likeliest tokens that together have this "
            "probability; 1 (default): all")
    options = parser.parse_args(argv)
    if not (options.model or options.adapter):
        raise UserError("give --model or --adapter")
    if bool(options.prompt) == options.chat:
        raise UserError("give --prompt or --chat (one of them, not both)")
    if "" in (options.prompt or ()):
        raise UserError("--prompt: a prompt is empty")
    if options.raw and options.no_thinking:
        raise UserError("--raw does without the chat template, so --no-thinking has no meaning")
    if options.compare and (options.chat or not options.adapter):
        raise UserError("--compare needs --adapter, to show it beside its base, and --prompt")
    for name, least, most in (("max_new_tokens", 1, 2**31), ("top_k", 0, 2**31), ("seed", 0, 2**63),
                              ("temperature", 0, 1e300), ("top_p", 5e-324, 1)):
        if not least <= getattr(options, name) <= most:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)} is out of range")
    if options.temperature == 0 and (options.top_k or options.top_p < 1):
        raise UserError("--top-k and --top-p are for drawing: give --temperature above 0")
    return options


def run(doc, argv, load_model, lora):
    """A generate.py's main; `lora` is its lora.py, and `load_model` gives (model, its folder)."""
    options = read_options(doc, argv)
    device = choose_device(options.device)
    adapter = hub.resolve(options.adapter, "--adapter") if options.adapter else None
    model, base = load_model(options.model, device, choose_dtype(options.dtype, device), adapter)
    chat = Chat.load(tokenizer_folders(base, adapter)[-1])
    settings = {"stop_ids": chat.stop_ids} | {name: getattr(options, name) for name in (
        "max_new_tokens", "temperature", "seed", "top_k", "top_p")}
    prompts = encode(chat, options)
    before = generate(model, prompts, **settings) if options.compare else []
    if adapter:
        load_adapter(model, adapter, lora)
    if options.chat:
        converse(model, chat, settings, chat.no_thinking() if options.no_thinking else {})
    elif len(prompts) == 1 and not before:
        print(f"> {options.prompt[0]}")
        stream(model, chat, prompts[0], settings)
    else:
        show(chat, options.prompt, generate(model, prompts, **settings), before)


def encode(chat, options):
    """The ids of each prompt, in the chat template unless there is none or --raw is given."""
    variables = chat.no_thinking() if options.no_thinking else {}
    return [chat.encode_prompt(text if options.raw else [{"role": "user", "content": text}],
                               **variables) for text in options.prompt or ()]


def show(chat, prompts, answers, before=()):
    """Print prompts (texts) and answers (ids), beside those of `before` if there are any."""
    width = shutil.get_terminal_size().columns
    for prompt, answer, old in zip_longest(prompts, answers, before):
        shown = chat.decode(answer)
        if before:
            shown = side_by_side(f"BASE\n{chat.decode(old)}", f"ADAPTER\n{shown}", width)
        print(f"> {prompt}\n{shown}\n")


def side_by_side(left, right, width):
    """Two texts as two columns that together are `width` wide."""
    column = max(10, (width - 3) // 2)
    sides = [[piece for line in text.splitlines() or [""]
              for piece in textwrap.wrap(line, column) or [""]] for text in (left, right)]
    return "\n".join(f"{a:<{column}} | {b}".rstrip() for a, b in zip_longest(*sides, fillvalue=""))


def stream(model, chat, prompt, settings):
    """Answer one prompt (ids) on the terminal, word by word as it comes; gives the text."""
    ids, shown = [], ""

    def show(document, token):
        nonlocal shown
        ids.append(token)
        text = chat.decode(ids)
        if not text.endswith("\ufffd"):  # a character of which only some bytes have come
            print(text[len(shown):], end="", flush=True)
            shown = text

    answer = chat.decode(generate(model, [prompt], on_token=show, **settings)[0])
    print(answer[len(shown):], flush=True)
    return answer


def converse(model, chat, settings, variables):
    """A conversation in the terminal, until Ctrl-D; `variables` are for the chat template."""
    if chat.template is None:
        raise UserError("--chat needs a chat template, and this model has none: use --prompt")
    messages = []
    print("Ctrl-D ends the conversation.")
    while True:
        try:
            messages.append({"role": "user", "content": input("\n> ")})
            answer = stream(model, chat, chat.encode_prompt(messages, **variables), settings)
            messages.append({"role": "assistant", "content": answer})
        except EOFError:
            print()
            return
        except UserError as error:  # say, the conversation has become too long
            print(f"error: {error}", file=sys.stderr)
            messages.pop()
