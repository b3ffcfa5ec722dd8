"""From what was typed to the options of the run: files, presets and --resume put together."""

import json
import os
import sys
from dataclasses import asdict, fields
from pathlib import Path

import torch

from common import cli, hub
from common.errors import UserError, writing
from common.model_config import read_json

GPU_MODEL, GPU_DATA = "Qwen/Qwen3-0.6B", "yahma/alpaca-cleaned"
GPU_MEMORY = 16e9  # bytes of GPU memory from which `auto` chooses the real model


def parse(options_class, chapter, description, tiny, real, argv=None):
    """The options of this run: an `options_class` in which nothing is left open, but for
    --batch-tokens on a GPU (see `predict.fit_batch`).

    `chapter` is "01", "02" or "03". `tiny` and `real` are that chapter's presets, dicts of option
    values: for the embedded model (`init` and `steps` only on the embedded data), and for every
    other; a value that depends on --method is itself a dict, with a "default". Prints what `auto`
    chose. Raises
    UserError on anything wrong, before any file of the model is touched.
    """
    typed = cli.read_flags(options_class, description, argv)
    given = {}
    if "config" in typed:
        values = read_json(typed["config"])
        given = cli.read_options_file(options_class, typed["config"], values)
    given.update(typed)
    if "resume" in given:
        return _resumed(options_class, chapter, _with_whole_names(given))
    options = options_class(**given)
    device = cli.choose_device(options.device)
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
    options.dtype = str(cli.choose_dtype(options.dtype, device)).removeprefix("torch.")
    if options.lr < options.min_lr:
        raise UserError(f"--min-lr {options.min_lr:g} is above --lr {options.lr:g}")
    _say(_summary(options))
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
        _say(f"auto: {why}, so --model {options.model} --data {options.data[0]};\n      {other}")
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


def world_size():
    """How many processes `torchrun` started for this run (1 without it)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _say(text):
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def save(options, chapter, run, data):
    """Write `train_config.json`: the resolved options, the versions, the number of ranks, and a
    hash of the documents that `data`, a `prepare.Data`, trains on."""
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
    values = cli.read_options_file(options_class, path, saved)
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
        _say(f"changed since the run began: {f.name} {before!r} -> {after!r}")
        if f.metadata["result"] and f.name != "grad_accum" and not longer:
            altering.append(f.name)
    packs_before, packs_now = old.grad_accum * ranks, options.grad_accum * world_size()
    if ranks != world_size():
        _say(f"ranks {ranks} -> {world_size()}")
    if packs_before != packs_now:
        _say(f"packs per step {packs_before} -> {packs_now} (ranks x --grad-accum)")
        altering.append("packs per step")
    if altering and not options.allow_changes:
        raise UserError(f"--resume {run}: changing {', '.join(altering)} alters the result: leave"
                        " it as it was, or say --allow-changes if that is meant")
    options.device = cli.choose_device(options.device).type
    options.out = None
    return options
