"""Adapters on disk, as PEFT has them: adapter_config.json and adapter_model.safetensors.

What is written here loads with `peft.PeftModel.from_pretrained` and gives the same logits; what
PEFT wrote loads here. PEFT itself only warns of tensors that are missing, and is silent on those
that are too many. Here both are errors, as is every option that would change the result and is
not implemented.

A tensor's name is `base_model.model.`, the layer's name in the model, and ours of the parameter.
"""

import json
import math
import sys
from pathlib import Path

import torch

from common.errors import UserError
from common.files.json_files import read_json
from common.files.manifest import verify
from common.files.tensors import iter_tensors, listing, save_tensors, tensor_headers
from common.ranks import copy_into, full_tensor, is_main
from lora import AdapterConfig, adapter_modules, apply_adapter

CONFIG, STEM = "adapter_config.json", "adapter_model"
PREFIX = "base_model.model."
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
PROJECTIONS = {"base_model.vera_A": "vera_A", "base_model.vera_B": "vera_B"}

# PEFT's options that change what an adapter computes and are not implemented, so must be unset;
# `bias` must be "none".
REFUSED = (
    "alora_invocation_tokens", "alpha_pattern", "arrow_config", "exclude_modules", "fan_in_fan_out",
    "kasa_config", "layer_replication", "layers_to_transform", "lora_bias", "megatron_config",
    "modules_to_save", "monteclora_config", "rank_pattern", "target_parameters",
    "trainable_token_indices", "use_bdlora", "use_qalora")
# Those that are used below, or that matter in training or to PEFT only.
KNOWN = (
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "d_initial",
    "ensure_weight_tying", "eva_config", "inference_mode", "init_lora_weights", "init_weights",
    "layers_pattern", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config",
    "megatron_core", "peft_type", "peft_version", "projection_prng_key", "qalora_group_size", "r",
    "revision", "runtime_config", "save_projection", "target_modules", "task_type", "use_dora",
    "use_rslora", "velora_config", "vera_dropout")
WAY_OUT = ("merge it in PEFT (merge_and_unload), save the whole model and its tokenizer, and give"
           " that folder as --model")
# First values of A and B that leave the base weight alone; others would subtract from it.
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


# --- out ---

def save_adapter(model, config, path, base_model_name, fold_rslora=False, save_projections=True,
                 metadata=None):
    """Write the model's adapters into folder `path`, made if it is not there.

    `config` is the AdapterConfig that they were made with, `base_model_name` the folder or Hub id
    of the model without them. LoRA+ and LoRA-FA are written as the LoRA adapters that they are,
    PiSSA as the LoRA adapter of twice the rank that fits the *original* weights.

    `fold_rslora` writes rsLoRA's scale as LoRA's (α√r), for programs that know only that (exactly
    the same adapter). Without `save_projections` VeRA's random matrices are left to the seed.
    `metadata` is for the header of the tensor file. Collective under FSDP2; rank 0 writes. Raises
    UserError for Delta-LoRA, which has changed the base weights and is no adapter.
    """
    if config.method in ("full", "delta-lora"):
        raise UserError(f"--method {config.method} changes the base weights, so what it learns is"
                        " not in an adapter: save the whole model, merged")
    save_tensors(_tensors(model, config, save_projections), path, metadata, stem=STEM)
    if is_main():
        options = _peft_options(model, config, fold_rslora, save_projections)
        options["base_model_name_or_path"] = str(base_model_name)
        text = json.dumps(options, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        (Path(path) / CONFIG).write_text(text, encoding="utf-8")


def _tensors(model, config, save_projections):
    """Iterate over (PEFT's name, tensor)."""
    for name, module in adapter_modules(model):
        for attribute, parameter in module.named_parameters(recurse=False):
            tensor = full_tensor(parameter)
            # W + s (B A - B₀ A₀) = W + s [B, -B₀] [A; A₀], W being the weight before PiSSA.
            if config.method == "pissa" and attribute == "lora_A":
                tensor = torch.cat((tensor, module.initial_A), 0)
            elif config.method == "pissa" and attribute == "lora_B":
                tensor = torch.cat((tensor, -module.initial_B), 1)
            yield _key(name, attribute), tensor
    if config.method == "vera" and save_projections:
        for key, attribute in PROJECTIONS.items():
            yield key, getattr(module.shared, attribute)


def _key(name, attribute):
    return PREFIX + name + "." + attribute + ".weight" * (attribute in ("lora_A", "lora_B"))


def _peft_options(model, config, fold_rslora, save_projections):
    """adapter_config.json as a dict."""
    options = {
        "task_type": "CAUSAL_LM", "inference_mode": True, "bias": "none", "fan_in_fan_out": False,
        "modules_to_save": None, "r": config.rank, "target_modules": _target_names(model)}
    if config.method == "vera":
        return options | {
            "peft_type": "VERA", "projection_prng_key": config.seed, "d_initial": config.vera_d,
            "save_projection": save_projections, "vera_dropout": config.dropout}
    alpha, fold = config.alpha, config.method == "rslora" and fold_rslora
    if fold:
        alpha *= math.sqrt(config.rank)
    if config.method == "pissa":
        alpha, options["r"] = 2 * alpha, 2 * config.rank
    return options | {
        "peft_type": "LORA", "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": config.dropout, "init_lora_weights": True,
        "use_dora": config.method == "dora", "use_rslora": config.method == "rslora" and not fold}


def _target_names(model):
    """The shortest list that names exactly the adapted layers: "q_proj"…, or their whole names."""
    adapted = [name for name, _ in adapter_modules(model)]
    last = {name.rpartition(".")[2] for name in adapted}
    others = (name for name, module in model.named_modules() if hasattr(module, "in_features"))
    if any(name.rpartition(".")[2] in last for name in others):
        return adapted
    return sorted(last)


# --- in ---

def base_model_name(path):
    """The folder or Hub id of the model that the adapter in folder `path` belongs to, or None."""
    verify(path)  # or else a flipped bit would have another model loaded
    return _read_options(Path(path)).get("base_model_name_or_path")


def load_adapter(model, path):
    """Put the adapters of folder `path` into the model, as `apply_adapter` does; gives the config.

    Strict: raises UserError that names tensors that are missing, unexpected or mis-shaped, and
    options that are not implemented. Copies of the base's embedding and head, which PEFT may add,
    must be what the model has. Warns on stderr of an adapter that changes nothing. After an error
    the model is not to be used.
    """
    path = Path(path)
    verify(path)
    options = _read_options(path)
    headers = tensor_headers(path, STEM)
    config = _adapter_config(options, path / CONFIG, model)
    try:
        apply_adapter(model, config)
    except UserError as error:
        raise UserError(f"{path / CONFIG}: {error}") from error

    copies = _copies(model, headers, path)
    wanted = {_key(name, attribute): parameter for name, module in adapter_modules(model)
              for attribute, parameter in module.named_parameters(recurse=False)}
    if config.method == "vera" and (options.get("save_projection", True) or
                                    PROJECTIONS.keys() & headers.keys()):
        shared = next(adapter_modules(model))[1].shared
        wanted |= {key: getattr(shared, name) for key, name in PROJECTIONS.items()}
    problems = [f"{how} {listing(names)}" for how, names in (
        ("missing", wanted.keys() - headers.keys()),
        ("unexpected", headers.keys() - wanted.keys() - copies.keys())) if names]
    for key in sorted(wanted.keys() & headers.keys()):
        shape, dtype, _ = headers[key]
        if shape != tuple(wanted[key].shape):
            problems.append(f"{key} has shape {shape}, not {tuple(wanted[key].shape)}")
        elif dtype not in ("F64", "F32", "F16", "BF16"):
            problems.append(f"{key} is {dtype}, not floating point")
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise UserError(f"{path}: the tensors do not fit {CONFIG} and the model:"
                        f" {'; '.join(problems[:4])}{more}")

    zero = True
    for key, tensor in iter_tensors(path, STEM):
        if key in copies:
            _check_copy(tensor, copies[key], f"{path}: {key}")
            continue
        copy_into(wanted[key], tensor)
        if key.endswith(("lora_B.weight", "vera_lambda_b")):
            zero = zero and not tensor.any()
    if zero:
        _warn(f"{path}: every {'vera_lambda_b' if config.method == 'vera' else 'lora_B'} is zero:"
              " this adapter was never trained, or not saved rightly")
    return config


def _copies(model, headers, path):
    """{key: the model's parameter} of PEFT's copies of the base's embedding and head.

    PEFT saves them where the head has an adapter, where the embedding was resized, and if asked.
    Raises UserError for one of another size.
    """
    own = dict(model.named_parameters())
    found = {}
    for name in (EMBEDDING, HEAD):
        base = own.get(f"{name}.weight", own.get(f"{name}.base.weight", own[f"{EMBEDDING}.weight"]))
        for key in (f"{PREFIX}{name}.weight", f"{PREFIX}{name}.base_layer.weight"):
            if key in headers:
                found[key] = base
                shape = headers[key][0]
                if shape != tuple(base.shape):
                    raise UserError(f"{path}: {key} has shape {shape}, the model's"
                                    f" {tuple(base.shape)}: its vocabulary was resized, say for"
                                    f" tokens that were added; {WAY_OUT}")
    return found


def _check_copy(tensor, base, where):
    """Raise UserError unless a copy is the parameter `base`, but for what one of them is rounded.

    The base may have been loaded in 16 bits there and in 32 here, or the other way round.
    """
    base = full_tensor(base).to("cpu")
    if not tensor.is_floating_point() or not (
            torch.equal(tensor.to(base.dtype), base) or torch.equal(base.to(tensor.dtype), tensor)):
        raise UserError(f"{where} is not the base model's: it was trained too, or on another base,"
                        " or both were rounded (--dtype float32 tells); if this is the base,"
                        f" {WAY_OUT}")


def _read_options(path):
    if not (path / CONFIG).exists():
        what = "no such folder" if not path.is_dir() else f"no {CONFIG} here, so no adapter"
        hint = f": did you mean {path / 'final'}?" if (path / "final" / CONFIG).exists() else ""
        raise UserError(f"{path}: {what}{hint}")
    return read_json(path / CONFIG)


def _adapter_config(options, file, model):
    """PEFT's options as an AdapterConfig; UserError for those that are not implemented."""
    for name in REFUSED:
        if options.get(name):
            raise UserError(f"{file}: {name}={options[name]!r} is not implemented, and without it"
                            f" the adapter would compute something else: {WAY_OUT}")
    if options.get("bias", "none") != "none":
        raise UserError(f"{file}: bias={options['bias']!r}: trained biases are not implemented:"
                        f" {WAY_OUT}")
    for name in options.keys() - {*REFUSED, *KNOWN}:
        if options[name]:
            _warn(f"{file}: {name}={options[name]!r} is unknown here and ignored")
    kind = str(options.get("peft_type")).upper()
    if kind not in ("LORA", "VERA"):
        raise UserError(f"{file}: peft_type={options.get('peft_type')!r} is not LORA or VERA")

    # What is not said is PEFT's default; for our families that adapts q_proj and v_proj.
    values = {"target_modules": options.get("target_modules") or ["q_proj", "v_proj"],
              "rank": options.get("r", 256 if kind == "VERA" else 8)}
    if isinstance(values["target_modules"], list):
        names = [name for name, _ in model.named_modules()]
        found = tuple(target for target in values["target_modules"] if target == HEAD or any(
            name == target or name.endswith(f".{target}") for name in names))
        values["target_modules"] = found or tuple(values["target_modules"])
    if kind == "VERA":
        values |= {"method": "vera", "dropout": options.get("vera_dropout", 0.0),
                   "seed": options.get("projection_prng_key", 0)}
        return _checked(values, file)

    start = options.get("init_lora_weights")
    if start not in (*PLAIN_STARTS, "pissa"):
        raise UserError(f"{file}: init_lora_weights={start!r} changes the base weights: export the"
                        " adapter against the original ones (PEFT: path_initial_model_for_weight"
                        "_conversion)")
    values |= {"alpha": options.get("lora_alpha", 8), "dropout": options.get("lora_dropout", 0.0)}
    rslora, dora = options.get("use_rslora"), options.get("use_dora")
    if dora and start == "pissa":
        raise UserError(f"{file}: use_dora with init_lora_weights='pissa' is not implemented")
    values["method"] = "dora" if dora else "pissa" if start == "pissa" else "lora"
    if rslora and values["method"] == "lora":
        values["method"] = "rslora"
    config = _checked(values, file)
    if rslora and config.method != "rslora":  # DoRA or PiSSA with rsLoRA's scale: fold it into α
        config = _checked({**values, "alpha": config.alpha * math.sqrt(config.rank)}, file)
    return config


def _checked(values, file):
    try:
        return AdapterConfig(**values)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def _warn(text):
    if is_main():
        print(f"warning: {text}", file=sys.stderr)
