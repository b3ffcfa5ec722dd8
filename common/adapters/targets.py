"""What can be adapted: the options of an adapter, and the layers that `--target-modules` names."""

import re

from torch import nn

from common.errors import UserError, nearest

# For each number its least value, and a bound that it must stay below.
NUMBERS = {"rank": (1, 2**14 + 1), "alpha": (5e-324, 1e300), "dropout": (0, 1),  # 5e-324: above 0
           "lr_ratio": (5e-324, 1e300), "delta_ratio": (0, 1e300), "delta_start": (0, 1e300),
           "seed": (0, 2**63)}


class QuantizedLinear(nn.Module):
    """What a quantised layer derives from to be adapted like an nn.Linear: it has `in_features`,
    `out_features`, `bias`, and `weight` (out, in), dequantised anew at each use."""


def check_config(config, methods):
    """Raise UserError if no run could use this `lora.AdapterConfig`; `methods` is lora.METHODS."""
    if config.method not in methods:
        raise UserError(f"--method {config.method!r} does not exist"
                        f"{nearest(str(config.method), methods)}; there are {', '.join(methods)}")
    for name, (least, below) in NUMBERS.items():
        value, flag = getattr(config, name), "--" + name.replace("_", "-")
        whole = name in ("rank", "seed")
        if type(value) is not int and (whole or type(value) is not float):
            raise UserError(f"{flag} {value!r} is not a {'whole ' * whole}number")
        if not least <= value < below:
            raise UserError(f"{flag} {value!r} is out of range")
    targets = config.target_modules
    if not (isinstance(targets, (str, list, tuple)) and all(isinstance(n, str) for n in targets)):
        raise UserError(f"--target-modules {targets!r} is neither names nor a regular expression")
    layer = methods[config.method]
    if config.dropout and layer and layer.no_dropout:
        raise UserError(f"--dropout must be 0 with {config.method}: {layer.no_dropout}")


def dense_weight(base, config):
    """The weight (out, in) that PiSSA and Delta-LoRA write to; UserError if that is impossible."""
    weight, method = base.weight, f"--method {config.method}"
    if isinstance(base, QuantizedLinear):
        raise UserError(f"{method} changes the base weight, which cannot be done to a quantised"
                        " one: take another method, or a base that is not quantised")
    if config.method == "pissa" and config.rank > min(weight.shape):
        raise UserError(f"--rank {config.rank} is too large for pissa: a weight of shape"
                        f" {tuple(weight.shape)} has {min(weight.shape)} singular values")
    if config.method == "delta-lora" and weight.dtype.itemsize == 2:
        raise UserError(f"{method} needs a float32 base weight, not {weight.dtype}: most of its"
                        " small steps would be rounded away")
    return weight.detach()


def linear_layers(model):
    """{dotted name: module} of all linear layers, dense or quantised, with or without adapters."""
    return {name: module for name, module in model.named_modules()
            if isinstance(module, (nn.Linear, QuantizedLinear))}


def select_targets(model, target_modules):
    """The layers to adapt, {dotted name: module}, or UserError. `target_modules` is one of

        "all-linear"                      every linear layer of the decoder, not the output head
        "q_proj,v_proj", or a list        those whose dotted name is that or ends with ".q_proj"
        r".*layers\\.[01]\\..*(q|v)_proj"   a regular expression for the whole dotted name"""
    linear = linear_layers(model)
    last = {name: name.rpartition(".")[2] for name in linear}
    if "base" in last.values():
        raise UserError("the model has adapters already: merge them before adding others")
    if target_modules == "all-linear":
        return {name: module for name, module in linear.items() if last[name] != "lm_head"}
    embeddings = {n for n, module in model.named_modules() if isinstance(module, nn.Embedding)}
    tied = embeddings and "lm_head" not in linear  # the head is the embedding
    chosen = set()
    for pattern in _patterns(target_modules):
        matched = set(filter(pattern.fullmatch, (*linear, *embeddings, "lm_head")))
        for name in sorted(matched & (embeddings | {"lm_head"})):
            if tied:
                raise UserError(
                    f"--target-modules: {name} cannot be adapted in this model: output head and"
                    " embedding are one tensor (tie_word_embeddings), so merging an adapter into"
                    " one would change the other; leave it out")
            if name in embeddings:
                raise UserError(f"--target-modules: {name} is an embedding, not a linear layer")
        if not matched & linear.keys():
            raise UserError(
                f"--target-modules {target_modules!r}: no linear layer has a name that fits; the"
                f" names are {', '.join(sorted(set(last.values())))}, and a regular expression must"
                f" fit the whole of, for example, {next(iter(linear), 'nothing: there is none')}")
        chosen |= matched
    return {name: module for name, module in linear.items() if name in chosen}


def _patterns(target_modules):
    if isinstance(target_modules, str) and not re.fullmatch(r"[\w.,\s-]+", target_modules):
        try:
            return [re.compile(target_modules)]
        except re.error as error:
            raise UserError(f"--target-modules {target_modules!r} is neither names nor a regular"
                            f" expression: {error}") from error
    names = target_modules.split(",") if isinstance(target_modules, str) else target_modules
    return [re.compile(rf"(.*\.)?{re.escape(name.strip())}") for name in names]
