"""Adapters on disk, as PEFT has them: adapter_config.json and adapter_model.safetensors. What we
write loads in PEFT with the same logits, and vice versa. `lora` is the chapter's lora.py."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import torch

from common.adapters.targets import linear_layers
from common.errors import UserError, located
from common.files.checkpoint import verify
from common.files.json_files import read_json
from common.files.tensors import (
    iter_tensors, open_file, save_tensors, tensor_headers, tensor_problems)
from common.ranks import copy_into, full_tensor, is_main

CONFIG, STEM = "adapter_config.json", "adapter_model"
PREFIX = "base_model.model."

# Options that change what an adapter computes and must be unset; `bias` may also be "none".
REFUSED = (
    "alora_invocation_tokens", "alpha_pattern", "arrow_config", "bias", "exclude_modules",
    "fan_in_fan_out", "kasa_config", "layer_replication", "layers_to_transform", "lora_bias",
    "megatron_config", "modules_to_save", "monteclora_config", "rank_pattern", "target_parameters",
    "trainable_token_indices", "use_bdlora", "use_qalora")
# Options that are used below, or matter only in training or to PEFT, which may set them unasked.
KNOWN = (
    "auto_mapping", "base_model_name_or_path", "d_initial", "eva_config", "inference_mode",
    "init_lora_weights", "init_weights", "lora_alpha", "lora_dropout", "megatron_core", "peft_type",
    "peft_version", "projection_prng_key", "qalora_group_size", "r", "revision", "runtime_config",
    "save_projection", "target_modules", "task_type", "use_dora", "use_rslora", "vera_dropout")
WAY_OUT = ("merge it in PEFT (merge_and_unload), save the whole model and its tokenizer, and give"
           " that folder as --model")
# What PEFT calls the numbers of an AdapterConfig, and its defaults.
NUMBERS = {
    "LORA": {"r": ("rank", 8), "lora_alpha": ("alpha", 8), "lora_dropout": ("dropout", 0.0)},
    "VERA": {"r": ("rank", 256), "vera_dropout": ("dropout", 0.0),
             "projection_prng_key": ("seed", 0)}}
# Initialisations of A and B that leave the base weight alone, and the one other that we have.
STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "pissa")


def save_adapter(model, config, path, base_model_name, lora, metadata=None):
    """Write the model's adapters into folder `path`, with the folder or Hub id of the model without
    them, and `metadata` in the tensor file's header. PiSSA is written as the LoRA adapter of twice
    the rank that fits the *original* weights. Collective; rank 0 writes. Raises UserError."""
    if config.method in ("full", "delta-lora"):
        raise UserError(f"--method {config.method} changes the base weights, so what it learns is"
                        " not in an adapter: save the whole model, merged")
    adapters = dict(lora.adapter_modules(model))
    save_tensors(_tensors(adapters, config), path, metadata, stem=STEM)
    if is_main():
        last = {name.rpartition(".")[2] for name in adapters}  # "q_proj"…, if that is unambiguous
        others = {name.rpartition(".")[2] for name in linear_layers(model)}
        options = _peft_options(config) | {
            "base_model_name_or_path": str(base_model_name),
            "target_modules": list(adapters) if last & others else sorted(last)}
        text = json.dumps(options, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        (Path(path) / CONFIG).write_text(text, encoding="utf-8")


def _tensors(adapters, config):
    for key, (module, parameter) in _by_key(adapters, config.method == "vera").items():
        tensor = full_tensor(parameter)
        # W + s (B A - B₀ A₀) = W + s [B, -B₀] [A; A₀], W being the weight before PiSSA.
        if config.method == "pissa" and key.endswith("lora_A.weight"):
            tensor = torch.cat((tensor, module.initial_A), 0)
        elif config.method == "pissa":
            tensor = torch.cat((tensor, -module.initial_B), 1)
        yield key, tensor


def _by_key(adapters, projections):
    """{PEFT's name: (adapter layer, parameter)}; with `projections` also VeRA's random matrices."""
    found = {}
    for name, module in adapters.items():
        for attribute, parameter in module.named_parameters(recurse=False):
            suffix = ".weight" * (attribute in ("lora_A", "lora_B"))
            found[f"{PREFIX}{name}.{attribute}{suffix}"] = module, parameter
    if projections:  # one pair for all layers
        found |= {f"base_model.{name}": (module, m) for name, m in module.shared.named_buffers()}
    return found


def _peft_options(config):
    kind = "VERA" if config.method == "vera" else "LORA"
    options = {name: getattr(config, ours) for name, (ours, _) in NUMBERS[kind].items()} | {
        "peft_type": kind, "task_type": "CAUSAL_LM", "inference_mode": True, "bias": "none",
        "fan_in_fan_out": False, "modules_to_save": None}
    if kind == "VERA":
        return options | {"d_initial": config.vera_d, "save_projection": True}
    twice = 2 if config.method == "pissa" else 1
    alpha = twice * config.alpha
    return options | {
        "r": twice * config.rank, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "init_lora_weights": True, "use_dora": config.method == "dora",
        "use_rslora": config.method == "rslora"}


def base_model_name(path):
    """The folder or Hub id of the model that the adapter in folder `path` was trained on."""
    name = _read_options(path).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError(f"{path / CONFIG}: names no base model: give --model")
    return name


def metadata(path):
    """The header's metadata of the adapter in folder `path`; {} if it has none."""
    for file in Path(path).glob(f"{STEM}*.safetensors"):
        with open_file(file) as tensors:
            return tensors.metadata() or {}
    return {}


def tokenizer_folders(base, adapter=None):
    """The folders with tokenizer files: an adapter's, if it has any, come last and override."""
    return [base, adapter] if adapter and (adapter / "tokenizer.json").is_file() else [base]


def load_adapter(model, path, lora):
    """Put the adapters of folder `path` into the model, as `apply_adapter` does; gives the config.
    Strict: tensors that do not fit, copies of the base's embedding and head that are not its own,
    and the options of REFUSED are UserErrors, after which the model must not be used."""
    options, headers, file = _read_options(path), tensor_headers(path, STEM), path / CONFIG
    with located(file, UserError):
        config = _adapter_config(options, model, lora)
        lora.apply_adapter(model, config)
    for name in sorted(options.keys() - {*REFUSED, *KNOWN}):
        if options[name]:
            print(f"warning: {file}: {name}={options[name]!r} is unknown here and ignored",
                  file=sys.stderr)

    projections = config.method == "vera" and options.get("save_projection", True)
    by_key = _by_key(dict(lora.adapter_modules(model)), projections)
    wanted = {key: parameter for key, (_, parameter) in by_key.items()}
    copies = _copies(model, headers)
    shapes = {key: tuple(tensor.shape) for key, tensor in (wanted | copies).items()}
    if problems := tensor_problems(headers, shapes):
        if any(headers[key][0] != shapes[key] for key in copies):
            problems += f": the vocabulary of its base was resized, for new tokens; {WAY_OUT}"
        raise UserError(f"{path}: the tensors do not fit {CONFIG} and the model: {problems}")
    for key, tensor in iter_tensors(path, STEM):
        if key in wanted:
            copy_into(wanted[key], tensor)
            continue
        base = full_tensor(copies[key]).to("cpu")  # one of the two may be the other, rounded
        if not (torch.equal(tensor.to(base.dtype), base)
                or torch.equal(base.to(tensor.dtype), tensor)):
            raise UserError(f"{path}: {key} is not the base model's: it was trained too, or on"
                            " another base, or both were rounded (--dtype float32 tells); if this"
                            f" is the base, {WAY_OUT}")
    last = "vera_lambda_b" if config.method == "vera" else "lora_B"  # what starts at zero
    if not any(tensor.any() for key, tensor in wanted.items() if last in key):
        print(f"warning: {path}: every {last} is zero: this adapter was never trained, or not saved"
              " rightly", file=sys.stderr)
    return config


def _copies(model, headers):
    """{key: the model's parameter} of the copies of embedding and head that PEFT may add."""
    own = dict(model.named_parameters())
    embedding = own["model.embed_tokens.weight"]
    head = own.get("lm_head.weight", own.get("lm_head.base.weight", embedding))
    both = {"model.embed_tokens": embedding, "lm_head": head}
    return {key: base for name, base in both.items() for part in ("", ".base_layer")
            if (key := f"{PREFIX}{name}{part}.weight") in headers}


def _read_options(path):
    """adapter_config.json as a dict, after checking the folder against its manifest."""
    verify(path)  # otherwise a flipped bit could load another model
    if not (path / CONFIG).exists():
        hint = f": did you mean {path / 'final'}?" if (path / "final" / CONFIG).exists() else ""
        raise UserError(f"{path}: no {CONFIG} here, so no adapter{hint}")
    return read_json(path / CONFIG)


def _adapter_config(options, model, lora):
    for name in REFUSED:
        if options.get(name) and (name, options[name]) != ("bias", "none"):
            raise UserError(f"{name}={options[name]!r} is not implemented, and without it the"
                            f" adapter would compute something else: {WAY_OUT}")
    kind = str(options.get("peft_type")).upper()
    if kind not in ("LORA", "VERA"):
        raise UserError(f"peft_type={options.get('peft_type')!r} is not LORA or VERA")
    # PEFT's default; for our families it adapts q_proj and v_proj.
    targets = options.get("target_modules") or ["q_proj", "v_proj"]
    if isinstance(targets, list):  # it may name layers that only other families have
        names = [name for name, _ in model.named_modules()]
        targets = tuple(target for target in targets if target == "lm_head" or any(
            f".{name}".endswith(f".{target}") for name in names)) or tuple(targets)
    values = {ours: options.get(name, default) for name, (ours, default) in NUMBERS[kind].items()}
    values["target_modules"] = targets
    if kind == "VERA":
        return lora.AdapterConfig("vera", **values)
    start, dora, root = map(options.get, ("init_lora_weights", "use_dora", "use_rslora"))
    if start not in STARTS:
        raise UserError(f"init_lora_weights={start!r} changes the base weights: export the adapter"
                        " against the original ones (PEFT: path_initial_model_for_weight"
                        "_conversion)")
    if dora and start == "pissa":
        raise UserError("use_dora with init_lora_weights='pissa' is not implemented")
    method = "dora" if dora else "pissa" if start == "pissa" else "rslora" if root else "lora"
    config = lora.AdapterConfig(method, **values)
    folded = root and method != "rslora"  # s = α/√r
    return replace(config, alpha=config.alpha * math.sqrt(config.rank)) if folded else config
