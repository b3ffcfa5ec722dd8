"""What can be adapted: the options of an adapter, and the layers that `--target-modules` names.

Whatever a method cannot do is refused here, before anything is trained.
"""

import math
import re
from difflib import get_close_matches

import torch
from torch import nn

from common.errors import UserError


def check_config(config, methods):
    """Raise UserError if no run could use this `lora.AdapterConfig`; `methods` is lora.METHODS."""
    if config.method not in methods:
        near = get_close_matches(str(config.method), methods, 1, 0.0)[0]
        raise UserError(f"--method {config.method!r} does not exist, did you mean {near!r}?"
                        f" There are: {', '.join(methods)}")
    numbers = {"rank": 1, "alpha": None, "dropout": 0, "lr_ratio": None, "delta_ratio": 0,
               "delta_start": 0}  # each with its least value; None is anything above 0
    for name, least in numbers.items():
        value, flag = getattr(config, name), "--" + name.replace("_", "-")
        if type(value) not in (int, float) or (name == "rank" and type(value) is not int):
            raise UserError(f"{flag} {value!r} is not a {'whole ' * (name == 'rank')}number")
        if not (value > 0 if least is None else value >= least) or value == math.inf or (
                name == "dropout" and value >= 1):
            raise UserError(f"{flag} {value!r} is out of range")
    if config.rank > 2**14:
        raise UserError(f"--rank {config.rank} is out of range")
    if type(config.seed) is not int or not 0 <= config.seed < 2**63:
        raise UserError(f"--seed {config.seed!r} is not a whole number from 0 to 2⁶³")
    targets = config.target_modules
    if not isinstance(targets, str) and not (isinstance(targets, (list, tuple)) and all(
            isinstance(name, str) for name in targets)):
        raise UserError(f"--target-modules {targets!r} is neither names nor a regular expression")
    reason = getattr(methods[config.method], "no_dropout", None)
    if config.dropout and reason:
        raise UserError(f"--dropout must be 0 with {config.method}: {reason}")


def dense_weight(base, config):
    """The weight of `base` (out, in), for PiSSA and Delta-LoRA, which write to it.

    Raises UserError where that cannot be: it is quantised, it has too few singular values for
    PiSSA's rank, or too few bits for Delta-LoRA's small steps.
    """
    weight, method = base.weight, config.method
    if not isinstance(weight, nn.Parameter):
        raise UserError(f"--method {method} changes the base weight, which cannot be done to a"
                        " quantised one: take another method, or a base that is not quantised")
    if method == "pissa" and config.rank > min(weight.shape):
        raise UserError(f"--rank {config.rank} is too large for pissa: a weight of shape"
                        f" {tuple(weight.shape)} has {min(weight.shape)} singular values")
    if method == "delta-lora" and weight.dtype in (torch.bfloat16, torch.float16):
        raise UserError(f"--method delta-lora needs a float32 base weight, not {weight.dtype}:"
                        " most of its small steps would be rounded away")
    return weight.detach()


def select_targets(model, target_modules):
    """The layers to adapt, as a dict from dotted name to module, in the model's order.

    `target_modules` is one of

        "all-linear"                      every linear layer of the decoder, not the output head
        "q_proj,v_proj", or a list        those whose dotted name is that or ends with ".q_proj"
        r".*layers\\.[01]\\..*(q|v)_proj"   a regular expression for the whole dotted name

    Raises UserError if the expression, or one of the names, matches nothing; for an embedding, or
    an output head that is tied to one; and if the model has adapters already.
    """
    linear = {name: module for name, module in model.named_modules()
              if hasattr(module, "in_features") and hasattr(module, "out_features")}
    if any(_last(name) == "base" for name in linear):
        raise UserError("the model has adapters already: merge them before adding others")
    if target_modules == "all-linear":
        return {name: module for name, module in linear.items() if _last(name) != "lm_head"}
    chosen = set()
    for pattern in _patterns(target_modules):
        _refuse_embeddings(model, pattern)
        matched = {name for name in linear if pattern.fullmatch(name)}
        if not matched:
            raise UserError(
                f"--target-modules {target_modules!r}: no linear layer has a name that fits; the"
                f" names are {', '.join(sorted({_last(name) for name in linear}))}, and a regular"
                " expression must fit the whole of, for example, "
                f"{next(iter(linear), 'nothing: there is no linear layer')}")
        chosen |= matched
    return {name: module for name, module in linear.items() if name in chosen}


def _last(name):
    return name.rpartition(".")[2]


def _patterns(target_modules):
    """Regular expressions for whole dotted names, one for each name that was given."""
    if isinstance(target_modules, str) and not re.fullmatch(r"[\w.,\s-]+", target_modules):
        try:
            return [re.compile(target_modules)]
        except re.error as error:
            raise UserError(f"--target-modules {target_modules!r} is neither names nor a regular"
                            f" expression: {error}") from error
    names = target_modules.split(",") if isinstance(target_modules, str) else target_modules
    return [re.compile(rf"(.*\.)?{re.escape(name.strip())}") for name in names]


def _refuse_embeddings(model, pattern):
    """Raise UserError if `pattern` names an embedding, or an output head that is one.

    A tied head is the embedding's own tensor (the models here then have `lm_head = None`). An
    adapter beside one of the two would, once merged, change both.
    """
    embeddings = {name: module for name, module in model.named_modules()
                  if isinstance(module, nn.Embedding)}
    head = getattr(model, "lm_head", None)
    tied = embeddings and (head is None or any(
        head.weight is embedding.weight for embedding in embeddings.values()))
    for name in ("lm_head", *embeddings):
        if tied and pattern.fullmatch(name):
            raise UserError(
                f"--target-modules: {name} cannot be adapted in this model: output head and"
                " embedding are one tensor (tie_word_embeddings), so merging an adapter into one"
                " would change the other; leave it out")
        if name in embeddings and pattern.fullmatch(name):
            raise UserError(f"--target-modules: {name} is an embedding, not a linear layer")
