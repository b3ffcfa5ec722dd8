"""The options of a run: flags, a --config file, presets and --resume put together.

One dataclass, from which come the flags, the JSON file and the checks.

An option has the same name everywhere: `--batch-tokens` on the command line, `batch_tokens` in
code, in a `--config` file and in a run's `train_config.json`. What a person typed wins over the
file, the file over the run that is resumed, and that over the preset.
"""

import argparse
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch

from common import hub
from common.errors import UserError, nearest, writing
from common.files.json_files import read_json
from common.ranks import is_main, say, world_size

GPU_MODEL, GPU_DATA = "Qwen/Qwen3-0.6B", "yahma/alpaca-cleaned"
GPU_MEMORY = 16e9  # bytes of GPU memory from which `auto` chooses the real model


def option(default, text, kind=str, choices=None, least=None, many=False, result=True):
    """A dataclass field that is also a flag.

    `default=None` leaves the value to the preset; `least` is the smallest legal number; `many`
    takes several values; `result=False` marks what may change on --resume without changing the
    weights that come out.
    """
    keys = {"text": text, "kind": kind, "choices": choices, "least": least, "many": many}
    return field(default=default, metadata={**keys, "result": result})


@dataclass
class TrainOptions:
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


def parse(options_class, chapter, description, tiny, real, argv=None):
    """The options of this run: an `options_class` in which nothing is left open, but for
    --batch-tokens on a GPU (see `predict.fit_batch`).

    `chapter` is "01", "02" or "03". `tiny` and `real` are that chapter's presets, dicts of option
    values: for the embedded model (`init` and `steps` only on the embedded data), and for every
    other; a value that depends on --method is itself a dict, with a "default". Prints what `auto`
    chose. Raises
    UserError on anything wrong, before any file of the model is touched.
    """
    typed = read_flags(options_class, description, argv)
    given = {}
    if "config" in typed:
        values = read_json(typed["config"])
        given = read_options_file(options_class, typed["config"], values)
    given.update(typed)
    if "resume" in given:
        return _resumed(options_class, chapter, _with_whole_names(given))
    options = options_class(**given)
    device = choose_device(options.device)
    preset = _choose_model_and_data(options, device, tiny, real)
    for name, value in preset.items():
        if isinstance(value, dict):
            value = value.get(options.method, value["default"])
        if getattr(options, name) is None or (name not in given and name not in ("model", "data")):
            setattr(options, name, value)
    if options.steps is None and options.epochs is None:
        options.epochs = 1
    for name in ("eval_every", "save_every"):
        if getattr(options, name) is None:
            setattr(options, name, 200)
    options.data = list(options.data)
    options.device = device.type
    options.dtype = str(choose_dtype(options.dtype, device)).removeprefix("torch.")
    if options.lr < options.min_lr:
        raise UserError(f"--min-lr {options.min_lr:g} is above --lr {options.lr:g}")
    say(_summary(options))
    vars(options).update(_with_whole_names(vars(options)))
    return options


def _with_whole_names(values):
    """The options with absolute paths: a run may be resumed from another folder."""
    found = dict(values)
    for name in ("model", "eval_data", "chat_template"):
        if found.get(name) is not None:
            found[name] = hub.whole_name(found[name])
    if "data" in found:
        found["data"] = [hub.whole_name(one) for one in found["data"]]
    return found


def _summary(options):
    """What was resolved: a line, or with --dry-run every option."""
    if options.dry_run:
        shown = asdict(options)
        if options.batch_tokens is None:
            shown["batch_tokens"] = "what the GPU has room for, with more --grad-accum: see below"
        return "\n".join(f"{name:<22} {value}" for name, value in shown.items())
    count, unit = (options.steps, "step") if options.steps else (options.epochs, "epoch")
    steps = f"{count} {unit}{'s' * (count > 1)}"
    packs = (f"up to {options.grad_accum} x {options.batch_tokens} tokens"
             if options.batch_tokens else "packs as large as the GPU has room for")
    return (f"{options.model} ({options.init} weights) on {' '.join(options.data)}, "
            f"{options.dtype} on {options.device}:\n{steps} of {packs}, lr {options.lr:g}")


def _choose_model_and_data(options, device, tiny, real):
    """Fill in `auto` for the model and the data, say so, and give the preset's other values."""
    on_gpu = device.type == "cuda"
    big = on_gpu and torch.cuda.get_device_properties(device).total_memory >= GPU_MEMORY
    auto_model, auto_data = options.model == "auto", list(options.data) == ["auto"]
    if auto_data and not auto_model and options.model != "tiny":
        raise UserError(f"--model {options.model} needs --data: your own file, or --data virtual "
                        "for random tokens")
    if auto_model and not auto_data and list(options.data) != ["tiny"] and not big:
        raise UserError(f"--data {' '.join(options.data)} needs --model: tiny, a folder or a Hub "
                        f"id such as {GPU_MODEL}")
    use_gpu_default = big and list(options.data) != ["tiny"] and options.model != "tiny"
    if auto_model:
        options.model = GPU_MODEL if use_gpu_default else "tiny"
    if auto_data:
        options.data = [GPU_DATA] if use_gpu_default else ["tiny"]
    if auto_model and auto_data:
        why = "a GPU is here" if big else "no GPU of 16 GB or more is here"
        other = ("for the small one add --model tiny" if big else
                 f"for the real thing add --model {GPU_MODEL} --data my.jsonl")
        say(f"auto: {why}, so --model {options.model} --data {options.data[0]};\n      {other}")
    preset = dict(tiny if options.model == "tiny" else real)
    if list(options.data) != ["tiny"]:  # the embedded model on other data: trained on, an epoch
        preset.pop("steps", None)
        preset.pop("init", None)
    preset.setdefault("init", "pretrained")
    if options.model != "tiny" or list(options.data) != ["tiny"]:
        if not on_gpu:  # there `predict.fit_batch` chooses, once the model's shapes are known
            preset.setdefault("batch_tokens", 2048)
        if list(options.data) == ["virtual"] and options.epochs is None:
            preset.setdefault("steps", 20)
    if options.epochs is not None:
        preset.pop("steps", None)
    return preset


def save_options(options, chapter, run, data):
    """Write `train_config.json`: the resolved options, the versions, the number of ranks, and a
    hash of the documents that `data`, a `prepare.Data`, trains on. The main rank's work."""
    if not is_main():
        return
    record = {"chapter": chapter, "options": asdict(options), "world_size": world_size(),
              "data": data.digest(),
              "versions": {"torch": torch.__version__, "python": sys.version.split()[0]}}
    temporary = run / "train_config.json.tmp"
    with writing(run / "train_config.json"):
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, run / "train_config.json")


def _resumed(options_class, chapter, given):
    """The options of the run in --resume DIR, with what was typed now laid over them.

    Every changed option is reported. One that alters the weights that come out needs
    --allow-changes; more --steps under --schedule constant does not alter the steps before.
    """
    run = Path(given["resume"])
    path = run / "train_config.json"
    if not os.path.isfile(path):
        raise UserError(f"{run}: no train_config.json, so this is not the folder of a run")
    record = read_json(path)
    if record.get("chapter") != chapter:
        raise UserError(f"{path}: a run of chapter {record.get('chapter')!r}, not of {chapter!r}; "
                        "go on with it there")
    saved, ranks = record.get("options"), record.get("world_size")
    if not isinstance(saved, dict) or type(ranks) is not int or ranks < 1:
        raise UserError(f"{path}: options or world_size is missing")
    values = read_options_file(options_class, path, saved)
    for name in ("lr", "warmup", "batch_tokens", "init", "eval_every", "save_every"):
        if values.get(name) is None:
            raise UserError(f"{path}: {name} is missing")
    old = options_class(**values)
    options = options_class(**{**values, "dry_run": False, "allow_changes": False, **given})
    altering = []
    for f in fields(options_class):
        before, after = getattr(old, f.name), getattr(options, f.name)
        if f.name in ("resume", "allow_changes", "config") or before == after:
            continue
        longer = (f.name == "steps" and options.schedule == "constant" and before is not None
                  and after is not None and after > before)
        say(f"changed since the run began: {f.name} {before!r} -> {after!r}")
        if f.metadata["result"] and f.name != "grad_accum" and not longer:
            altering.append(f.name)
    packs_before, packs_now = old.grad_accum * ranks, options.grad_accum * world_size()
    if ranks != world_size():
        say(f"ranks {ranks} -> {world_size()}")
    if packs_before != packs_now:
        say(f"packs per step {packs_before} -> {packs_now} (ranks x --grad-accum)")
        altering.append("packs per step")
    if altering and not options.allow_changes:
        raise UserError(f"--resume {run}: changing {', '.join(altering)} alters the result: leave"
                        " it as it was, or say --allow-changes if that is meant")
    options.device = choose_device(options.device).type
    options.out = None
    return options
