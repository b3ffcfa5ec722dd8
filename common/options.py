"""A run's options: what was typed wins over --config, that over --resume, that over presets."""

import argparse
import json
import math
import os
import re
import sys
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

import torch

from common import hub
from common.errors import UserError, located, nearest, writing
from common.files.json_files import read_json, write_whole
from common.ranks import is_main, say, world_size

GPU_MODEL, GPU_DATA = "Qwen/Qwen3-0.6B", "yahma/alpaca-cleaned"
# Options that do not alter the resulting weights. (Ranks times --grad-accum does: `_resumed`.)
HARMLESS = ("eval_data", "out", "dry_run", "eval_every", "save_every", "keep", "keep_best",
            "log_every", "tensorboard", "ranks", "grad_accum")
# What another option has decided; if that one changes on --resume, it decides again.
DECIDED = {"epochs": ("steps",), "loss": ("beta", "label_smoothing", "gamma"),
           "epsilon": ("epsilon_high",)}


def option(default, text, choices=None, least=None):
    """A dataclass field that is also a flag, of the field's type (`list`: one or more words).
    `default=None` leaves the value to the preset; `least` is the smallest legal number."""
    return field(default=default, metadata={"text": text, "choices": choices, "least": least})


@dataclass
class TrainOptions:
    """The options of every chapter's train.py; `parse` gives each that a run needs a value."""

    # Not options: the data that auto takes on a GPU (None: tiny, as elsewhere); for `settle`;
    # which options may name files.
    gpu_data, method, lr_at_4096 = GPU_DATA, "full", None
    files = ("model", "data", "eval_data", "chat_template")
    model: str = option("auto", "auto, tiny, a built-in architecture, a folder, or a Hub id")
    init: str = option(None, "weights to start from", choices=("pretrained", "random"))
    data: list = option(("auto",), "auto, tiny, virtual (random tokens, for throughput), files, "
                        "folders, or a Hub dataset as owner/name[:split or file] (default: auto)")
    columns: str = option(None, "rename a dataset's keys, e.g. prompt=question,completion=answer")
    eval_data: str = option(None, "held-out data, written as --data is (default: 2 %% of the data, "
                            "1 to 200 examples)")
    chat_template: str = option(None, "a file with a chat template to use instead of the model's; "
                                "it is copied into the result")
    strict_template: bool = option(False, "stop if the chat template leaves out something that an "
                                   "example says, instead of counting it")
    rendered: bool = option(False, "each \"text\" of the data is a conversation that a chat "
                            "template has already rendered, control tokens included")
    out: str = option(None, "the run's folder (default: the next number in runs/chapter-…/)")
    resume: str = option(None, "go on with the run in this folder")
    config: str = option(None, "a JSON file with any of these options, as {\"lr\": 1e-4}")
    dry_run: bool = option(False, "print the resolved options, the parameter counts and the "
                           "predicted memory, then stop")
    steps: int = option(None, "optimizer steps", least=1)
    epochs: int = option(None, "passes over the data, when --steps is not given", least=1)
    batch_tokens: int = option(None, "token budget of one pack, per micro-batch and rank (default "
                               "on a GPU: what its memory has room for, up to 16384)", least=2)
    grad_accum: int = option(1, "packs per optimizer step and rank", least=1)
    max_seq_len: int = option(2048, "longest document in tokens; also bounded by --batch-tokens "
                              "and the model's max_position_embeddings", least=2)
    too_long: str = option("truncate", "what to do with a longer document",
                           choices=("truncate", "drop", "error"))
    lr: float = option(None, "highest learning rate (default: by the model's width)", least=0)
    min_lr: float = option(0.0, "learning rate at the schedule's end (default: 0)", least=0)
    warmup: int = option(None, "steps over which the learning rate rises linearly", least=0)
    schedule: str = option("cosine", "learning rate after the warm-up; wsd stays constant, then "
                           "falls linearly over the last fifth",
                           choices=("cosine", "linear", "constant", "wsd"))
    weight_decay: float = option(0.1, "AdamW's weight decay, on matrices only", least=0)
    clip: float = option(1.0, "largest gradient norm; 0 switches clipping off", least=0)
    dtype: str = option("auto", "of the computation (weights that are trained stay float32); "
                        "auto takes bfloat16 where it is faster than float32",
                        choices=("auto", "bfloat16", "float32"))
    device: str = option("auto", "where to compute; auto takes a GPU if there is one",
                        choices=("auto", "cpu", "cuda", "mps"))
    seed: int = option(0, "fixes the initial weights, the order of the data and dropout", least=0)
    eval_every: int = option(None, "steps between evaluations; 0 for none", least=0)
    save_every: int = option(None, "steps between checkpoints; 0 for none", least=0)
    keep: int = option(2, "how many checkpoints to keep", least=1)
    keep_best: bool = option(False, "also keep the checkpoint of the lowest evaluation loss")
    log_every: int = option(10, "steps between lines on the screen", least=1)
    tensorboard: bool = option(False, "write TensorBoard files too")
    allow_changes: bool = option(False, "on --resume, accept options that change the result")


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors and exit code 2; suggests the nearest flag."""

    def error(self, message):
        if flag := re.match(r"unrecognized arguments: (\S+)", message):
            message = f"{flag[1]} is not an option{nearest(flag[1], self._option_string_actions)}"
        elif choice := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            message += nearest(choice[1], re.findall(r"[^', ]+", choice[2]))
        raise UserError(f"{message.removeprefix('argument ')}; --help explains every option")


def read_flags(options_class, description, argv):
    """What was typed, as a dict; options that were not typed are absent."""
    follows = "Where no default is given, it depends on model and data: --dry-run prints it."
    parser = Parser(description=description, allow_abbrev=False, usage="%(prog)s [options]",
                    epilog=follows if issubclass(options_class, TrainOptions) else None,
                    argument_default=argparse.SUPPRESS,
                    formatter_class=partial(argparse.HelpFormatter, max_help_position=26))
    for one in fields(options_class):
        text, choices = one.metadata["text"], one.metadata["choices"]
        if choices:
            text += f" [{' | '.join(choices)}]"
        if str(one.default) not in ("None", "False") and "default" not in text:
            text += f" (default: {one.default})"
        if one.type is bool:
            how = {"action": argparse.BooleanOptionalAction if one.default else "store_true"}
        elif one.type is list:
            how = {"nargs": "+", "metavar": "TEXT"}
        else:
            how = {"type": one.type, "choices": choices,
                   "metavar": {int: "N", float: "X", str: "TEXT"}[one.type]}
        parser.add_argument(_flag(one.name), help=text, **how)
    typed = vars(parser.parse_args(argv))
    for one in fields(options_class):
        least, value = one.metadata["least"], typed.get(one.name)
        low, said = (-2**63, "") if least is None else (least, f"the least is {least}, and ")
        if isinstance(value, (int, float)) and not low <= value < 2**63:
            parser.error(f"{_flag(one.name)}: {value}: {said}it must be a finite number below 2^63")
    return typed


def _flag(name):
    return "--" + name.replace("_", "-")


def _read_values(options_class, path, values):
    """Like `read_flags`, for the values of a JSON file: read as if they had been typed."""
    options, words = {one.name: one for one in fields(options_class)}, []
    for name, value in values.items():
        if name not in options:
            raise UserError(f"{path}: unknown option {name!r}{nearest(name, options)}")
        one = options[name]
        if one.type is bool and type(value) is bool:
            if value or one.default:
                words.append(_flag(name if value else f"no_{name}"))
        elif one.type is list and isinstance(value, list) and set(map(type, value)) == {str}:
            words += [_flag(name), *value]
        elif type(value) in (str, int, float):
            words.append(f"{_flag(name)}={value}")
        elif value is not None or one.default is not None:
            raise UserError(f"{path}: {name} may not be {json.dumps(value)}")
    with located(path, UserError):
        return read_flags(options_class, None, words)


def choose_device(name):
    """The torch.device for --device: auto takes CUDA, then Apple's MPS, then the CPU. For CUDA it
    also sets how PyTorch allocates memory: so call it before the first allocation."""
    kinds = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    if name == "auto":
        name = next(kind for kind in kinds if kinds[kind])
    if not kinds[name]:
        raise UserError(f"--device {name}: PyTorch sees no such device here; use --device cpu")
    names = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
    if name == "cuda" and not any(map(os.environ.get, names)):
        os.environ[names[0]] = "expandable_segments:True"  # less fragmentation by uneven packs
    return torch.device(name)


def choose_dtype(name, device):
    """The torch.dtype for --dtype: auto takes bfloat16 where it multiplies faster than float32.
    Processors with avx512_fp16 are made for AMX; where that is hidden, they take twice as long."""
    if name == "auto":
        able = torch.cpu.get_capabilities().get
        fast = {"cuda": True, "cpu": able("amx_bf16") or (
            able("avx512_bf16") and not able("avx512_fp16"))}
        name = "bfloat16" if fast.get(device.type) else "float32"
    return getattr(torch, name)


def parse(options_class, chapter, description, tiny, real, argv=None):
    """The options of this run, an `options_class`; `chapter` is "01", say. The presets `tiny`, for
    the embedded model (`init` and `steps` only on its data), and `real`, for others, are dicts;
    what depends on --method is a dict with a "default". UserError before the model is read."""
    given = read_flags(options_class, description, argv)
    if (path := given.get("config")) is not None:
        given = _read_values(options_class, path, read_json(path)) | given
    # Absolute paths: a run may be resumed from another folder.
    for name in given.keys() & {*options_class.files}:
        given[name] = ([*map(hub.whole_name, given[name])] if name == "data" else
                       hub.whole_name(given[name]))
    if "resume" in given:
        return _resumed(options_class, chapter, given)
    options = options_class(**given)
    device = choose_device(options.device)
    options.device = device.type
    for name, value in _choose_model_and_data(options, device, tiny, real).items():
        if isinstance(value, dict):
            value = value.get(options.method, value["default"])
        if name not in given:
            setattr(options, name, value)
    if options.steps is None and options.epochs is None:
        options.epochs = 1
    options.dtype = str(choose_dtype(options.dtype, device)).removeprefix("torch.")
    _check(options)
    say(_summary(options))
    return options


def settle(options, config, total_steps):
    """Fill in what was not chosen and depends on the model's `config` or on the number of steps.
    AdamW's best rate falls with the width (2203.03466, table 3): a preset has that of 4096."""
    if options.lr is None:
        options.lr = float(f"{options.lr_at_4096 * 4096 / config.hidden_size:.2g}")
        say(f"lr {options.lr:g}, for a width of {config.hidden_size}; --lr sets it")
        _check(options)
    if options.warmup is None:
        options.warmup = min(20, total_steps // 5)
    if total_steps < options.warmup:
        say(f"note: only {total_steps} of the {options.warmup} warm-up steps will happen; see "
            "--epochs, --steps, --warmup")
    if options.method == "delta-lora" and total_steps <= options.delta_start:
        say(f"note: W does not move in the first {options.delta_start} steps; see --delta-start")


def _check(options):
    """Raise UserError for options that contradict each other."""
    if options.lr is not None and options.lr < options.min_lr:
        raise UserError(f"--min-lr {options.min_lr:g} is above --lr {options.lr:g}")
    if options.keep_best and options.eval_every == 0:
        raise UserError("--keep-best needs evaluations: --eval-every must not be 0")
    if options.init == "random" and options.method not in ("full", "delta-lora") and (
            options.data != ["virtual"] and not options.dry_run):
        raise UserError(f"--init random: only the adapter of --method {options.method} would be "
                        "saved, and not the random weights that it fits; say --method full")


def _summary(options):
    """What was resolved: a line, or with --dry-run every option."""
    if options.dry_run:
        late = {"batch_tokens": "what the GPU has room for, with more --grad-accum: see below",
                "lr": "by the model's width: see below", "warmup": "a fifth of the steps, up to 20"}
        return "\n".join(f"{name:<22} {late.get(name) if value is None else value}"
                         for name, value in asdict(options).items())
    count, unit = (options.steps, "step") if options.steps else (options.epochs, "epoch")
    packs = (f"up to {options.grad_accum} x {options.batch_tokens} tokens"
             if options.batch_tokens else "packs as large as the GPU has room for")
    return (f"{options.model} ({options.init} weights) on {' '.join(options.data)}, "
            f"{options.dtype} on {options.device}:\n{count} {unit}{'s' * (count > 1)} of {packs}"
            + ("" if options.lr is None else f", lr {options.lr:g}"))


def _choose_model_and_data(options, device, tiny, real):
    """Fill in `auto` for the model and the data, say so, and give the preset's other values."""
    on_gpu = device.type == "cuda"
    big = on_gpu and torch.cuda.get_device_properties(device).total_memory >= 16e9  # bytes
    model, data = options.model, " ".join(options.data)
    if data == "auto" and model not in ("auto", "tiny"):
        raise UserError(f"--model {model}{nearest(model, ['tiny'])} needs --data: your own, or "
                        "virtual for random tokens")
    if model == "auto" and data not in ("auto", "tiny") and not big:
        raise UserError(f"--data {data} needs --model: tiny, a folder or a Hub id ({GPU_MODEL})")
    small = not big or "tiny" in (model, data) or data == "auto" and options.gpu_data is None
    if model == "auto":
        options.model = "tiny" if small else GPU_MODEL
    if data == "auto":
        options.data = ["tiny" if small else options.gpu_data]
    if model == data == "auto":
        other = ("the small one add --model tiny" if not small else
                 f"the real thing add --model {GPU_MODEL} --data my.jsonl")
        say(f"auto: --model {options.model} --data {options.data[0]};\n      for {other}")
    # On a GPU `predict.fit_batch` chooses --batch-tokens, once the model's shapes are known.
    preset = {"init": "pretrained", "eval_every": 200, "save_every": 200,
              "batch_tokens": None if on_gpu else 2048,
              **(tiny if options.model == "tiny" else real)}
    if options.data != ["tiny"]:  # a preset's init and steps are for the embedded data
        preset |= {"init": "pretrained", "steps": 20 if options.data == ["virtual"] else None}
    return preset | ({} if options.epochs is None else {"steps": None})


def save_options(options, chapter, run, data):
    """Write `train_config.json`, on the main rank; `data` is a `prepare.Data`."""
    if not is_main():
        return
    record = {"chapter": chapter, "options": asdict(options), "world_size": world_size(),
              "data": data.digest(),
              "versions": {"torch": torch.__version__, "python": sys.version.split()[0]}}
    file = run / "train_config.json"
    with writing(file):
        write_whole(file, f"{json.dumps(record, indent=2)}\n".encode())


def _resumed(options_class, chapter, given):
    """The options of the run in --resume DIR, overridden by what was typed now. What affects the
    resulting weights needs --allow-changes; more --steps under --schedule constant do not."""
    run, out = Path(given["resume"]), given.pop("out", given["resume"])
    path = run / "train_config.json"
    if os.path.abspath(out) != os.path.abspath(run):
        raise UserError(f"--resume {run} goes on in that folder: leave out --out {out}")
    if not os.path.isfile(path):
        raise UserError(f"{run}: no train_config.json, so this is not the folder of a run")
    record = read_json(path)
    saved, ranks = record.get("options"), record.get("world_size")
    if record.get("chapter") != chapter:
        raise UserError(f"{path}: a run of chapter {record.get('chapter')!r}, not of {chapter!r}; "
                        "go on with it there")
    if not isinstance(saved, dict) or type(ranks) is not int:
        raise UserError(f"{path}: options or world_size is missing")
    saved = _read_values(options_class, path, saved)
    old = options_class(**saved)
    for name in DECIDED.keys() & given.keys():
        if given[name] != saved.get(name):
            saved |= dict.fromkeys(DECIDED[name])
    options = options_class(**{**saved, "dry_run": False, "allow_changes": False, **given})

    def compared(one, its_ranks):
        return {**asdict(one), "ranks": its_ranks, "packs per step": its_ranks * one.grad_accum,
                "resume": None, "allow_changes": None, "config": None}

    before, after = compared(old, ranks), compared(options, world_size())
    changed = [name for name in before if before[name] != after[name]]
    for name in changed:
        say(f"changed since the run began: {name} {before[name]!r} -> {after[name]!r}")
    altering = [name for name in changed if name not in HARMLESS]
    if options.schedule == "constant" and old.steps and (options.steps or 0) > old.steps:
        altering.remove("steps")
    if altering and not options.allow_changes:
        raise UserError(f"--resume {run}: changing {', '.join(altering)} alters the result: leave"
                        " it as it was, or say --allow-changes if that is intended")
    _check(options)
    options.device = choose_device(options.device).type
    return options
