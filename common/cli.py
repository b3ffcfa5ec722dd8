"""The command line: one dataclass, from which come the flags, the JSON file and the checks.

An option has the same name everywhere: `--batch-tokens` on the command line, `batch_tokens` in
code, in a `--config` file and in a run's `train_config.json`. What a person typed wins over the
file, the file over the run that is resumed, and that over the preset.
"""

import argparse
import difflib
import os
import shutil
import signal
import sys
from dataclasses import dataclass, field, fields

import torch

from common.errors import UserError, out_of_memory, printable


def option(default, text, kind=str, choices=None, least=None, many=False, result=True):
    """A dataclass field that is also a flag.

    `default=None` leaves the value to the preset; `least` is the smallest legal number; `many`
    takes several values; `result=False` marks what may change on --resume without changing the
    weights that come out.
    """
    keys = {"text": text, "kind": kind, "choices": choices, "least": least, "many": many}
    return field(default=default, metadata={**keys, "result": result})


@dataclass
class Options:
    """The options of every chapter's train.py. After `parse`, none that a run needs is None,
    but `batch_tokens` on a GPU (`predict.fit_batch`)."""

    # --- what ---
    model: str = option("auto", "auto, tiny, a built-in architecture, a folder, or a Hub id")
    init: str = option(None, "weights to start from",
                       choices=("pretrained", "random"))
    data: list = option(("auto",), "auto, tiny, virtual (random tokens, for throughput), files, "
                        "folders, or a Hub dataset as owner/name[:split or file]", many=True)
    columns: str = option(None, "rename a dataset's keys, e.g. prompt=question,completion=answer")
    eval_data: str = option(None, "held-out data, written as --data is (default: 2 %% of the data, "
                            "1 to 200 examples)", result=False)
    chat_template: str = option(None, "a file with a chat template, in the place of the model's; "
                                "it is copied into what the run leaves")
    strict_template: bool = option(False, "stop where the chat template leaves out something that "
                                   "an example says, rather than count it", bool)
    rendered: bool = option(False, "each \"text\" of the data is a conversation as a chat template "
                            "has rendered it, control tokens and all", bool)
    # --- where ---
    out: str = option(None, "the run's folder (default: runs/chapter-0N/ and the next number)",
                      result=False)
    resume: str = option(None, "go on with the run in this folder", result=False)
    config: str = option(None, "a JSON file with any of these options, as {\"lr\": 1e-4}",
                         result=False)
    dry_run: bool = option(False, "print the resolved options, the parameter counts and the "
                           "predicted memory, then stop", bool, result=False)
    # --- how long, how much ---
    steps: int = option(None, "optimizer steps", int, least=1)
    epochs: int = option(None, "passes over the data, when --steps is not given", int, least=1)
    batch_tokens: int = option(None, "token budget of one pack, per micro-batch and rank (default "
                               "on a GPU: what its memory has room for, up to 16384)", int, least=2)
    grad_accum: int = option(1, "packs per optimizer step and rank", int, least=1)
    max_seq_len: int = option(2048, "longest document in tokens; also bounded by --batch-tokens "
                              "and the model's max_position_embeddings", int, least=2)
    too_long: str = option("truncate", "what to do with a longer document",
                           choices=("truncate", "drop", "error"))
    # --- optimization ---
    lr: float = option(None, "highest learning rate", float, least=0)
    min_lr: float = option(0.0, "learning rate at the end of the schedule", float, least=0)
    warmup: int = option(None, "steps over which the learning rate rises linearly", int, least=0)
    schedule: str = option("cosine", "how it goes on after the warm-up; wsd stays constant, then "
                           "falls linearly over the last fifth",
                           choices=("cosine", "linear", "constant", "wsd"))
    weight_decay: float = option(0.1, "AdamW's, on matrices only", float, least=0)
    clip: float = option(1.0, "largest gradient norm; 0 switches clipping off", float, least=0)
    # --- machine ---
    dtype: str = option("auto", "of the computation (weights that are trained stay float32); "
                        "auto takes bfloat16 where the hardware has it",
                        choices=("auto", "bfloat16", "float32"))
    device: str = option("auto", "where to compute; auto takes a GPU if there is one",
                        choices=("auto", "cpu", "cuda", "mps"))
    seed: int = option(0, "fixes the initial weights, the order of the data and dropout", int,
                       least=0)
    # --- reports and checkpoints ---
    eval_every: int = option(None, "steps between evaluations; 0 for none", int, least=0,
                             result=False)
    save_every: int = option(None, "steps between checkpoints; 0 for none", int, least=0,
                             result=False)
    keep: int = option(2, "how many checkpoints to keep", int, least=1, result=False)
    keep_best: bool = option(False, "also keep the checkpoint of the lowest evaluation loss", bool,
                             result=False)
    log_every: int = option(10, "steps between lines on the screen", int, least=1, result=False)
    tensorboard: bool = option(False, "write TensorBoard files too", bool, result=False)
    allow_changes: bool = option(False, "on --resume, accept options that change the result", bool,
                                 result=False)


def nearest(word, candidates):
    """' (did you mean X?)' for the candidate that resembles `word`, or nothing."""
    match = difflib.get_close_matches(word, list(candidates), 1)
    return f" (did you mean {match[0]}?)" if match else ""


NAMES = {int: "N", float: "X"}  # what --help calls a value


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ours: one line, exit code 2."""

    def error(self, message):
        raise UserError(f"{message}; --help explains every option")


def check(options_class, name, value, source):
    """`value` of option `name` as its type, or a UserError that names `source`."""
    field = {f.name: f for f in fields(options_class)}[name]
    meta = field.metadata
    typed = source == "command line"
    where = f"--{name.replace('_', '-')} {value}" if typed else f"{source}: {name}={value!r}"
    if value is None:
        if field.default is not None:
            raise UserError(f"{source}: {name} may not be null")
        return None
    if meta["many"]:
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, (list, tuple)) or not values:
            raise UserError(f"{where} is not a list of words")
        if not all(isinstance(v, str) for v in values):
            raise UserError(f"{where} is not a list of words")
        return list(values)
    kind = meta["kind"]
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise UserError(f"{where} is not {'true or false' if kind is bool else kind.__name__}")
    if meta["choices"] and value not in meta["choices"]:
        known = ", ".join(meta["choices"])
        raise UserError(f"{where} is none of {known}{nearest(str(value), meta['choices'])}")
    if meta["least"] is not None and not (meta["least"] <= value < float("inf")):
        raise UserError(f"{where}: the least is {meta['least']}, and it must be a finite number")
    return value


def help_formatter(prog):
    """Help in two columns, no wider than a person reads easily."""
    width = min(100, shutil.get_terminal_size().columns)
    return argparse.HelpFormatter(prog, max_help_position=26, width=width)


def read_flags(options_class, description, argv):
    """What was typed, as a dict; options that were not typed are absent."""
    follows = "Where no default stands, it follows from model and data: --dry-run prints it."
    runs = any(f.name == "dry_run" for f in fields(options_class))
    parser = Parser(description=description, allow_abbrev=False, usage="%(prog)s [options]",
                    epilog=follows if runs else None, argument_default=argparse.SUPPRESS,
                    formatter_class=help_formatter)
    for f in fields(options_class):
        meta, flag = f.metadata, "--" + f.name.replace("_", "-")
        text = meta["text"]
        if meta["choices"]:
            text += f" [{' | '.join(meta['choices'])}]"
        if f.default not in (None, False) and "default" not in text:
            default = " ".join(f.default) if meta["many"] else f.default
            text += f" (default: {default})"
        if meta["kind"] is bool:
            action = argparse.BooleanOptionalAction if f.default else "store_true"
            parser.add_argument(flag, action=action, help=text)
        else:
            parser.add_argument(flag, type=meta["kind"], nargs="+" if meta["many"] else None,
                                metavar=NAMES.get(meta["kind"], "TEXT"), help=text)
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [name for name in parser._option_string_actions if name.startswith("--")]
        raise UserError(f"{unknown[0]} is not an option{nearest(unknown[0], flags)}; --help lists "
                        "them all")
    return {name: check(options_class, name, value, "command line")
            for name, value in vars(known).items()}


def read_options_file(options_class, path, values):
    """Options from JSON, each checked; an unknown key is an error, with the nearest real one."""
    names = [f.name for f in fields(options_class)]
    for name in values:
        if name not in names:
            raise UserError(f"{path}: unknown option {name!r}{nearest(name, names)}")
    return {name: check(options_class, name, value, path) for name, value in values.items()}


def choose_device(name):
    """The torch.device for --device: auto takes CUDA, then Apple's MPS, then the CPU."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(),
                 "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
    if not available[name]:
        raise UserError(f"--device {name}: PyTorch sees no such device here; use --device cpu")
    names = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"  # read when the first memory is taken
    if name == "cuda" and not any(map(os.environ.get, names)):
        os.environ[names[0]] = "expandable_segments:True"  # packs of many sizes leave fewer gaps
    return torch.device(name)


def choose_dtype(name, device):
    """The torch.dtype for --dtype: auto takes bfloat16 where the hardware multiplies it."""
    if name == "auto":
        cpu = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        fast_cpu = cpu.get("amx_bf16") or cpu.get("avx512_bf16")
        fast = device.type == "cuda" or (device.type == "cpu" and fast_cpu)
        name = "bfloat16" if fast else "float32"
    return getattr(torch, name)


def show_any_text():
    """Have print spell out what the terminal's encoding lacks, rather than fail in mid-run."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def run(main):
    """Run a script's main(): a UserError becomes one line and exit code 2, Ctrl-C exit code 130.

    So does SIGTERM, with 143; while a run trains, `common.guard.Signals` saves first.
    """
    def terminated(signum, frame):
        print(f"\nstopped by {signal.Signals(signum).name}", file=sys.stderr)
        raise SystemExit(128 + signum)

    signal.signal(signal.SIGTERM, terminated)
    show_any_text()
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        print(f"error: out of memory: {printable(str(error), 300)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output (`| head`) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
