"""The reference model: what the policy was before training, with no second model in memory."""

import contextlib
import copy
from math import prod

import torch

from common.predict_memory import layer_costs, linear_cost
from common.ranks import say, shard, world_size
from lora import PiSSALinear, adapter_modules
from preference import PairLogProbs, preference_loss

MOVES_W = ("full", "delta-lora")  # methods that leave nothing of the original


@contextlib.contextmanager
def adapters_off(model):
    """Within it the model computes what it did before it was adapted: each adapted layer is its
    base, which may have four bits. The adapters are on again afterwards, also after an error."""
    layers = [layer for _, layer in adapter_modules(model)]
    for layer in layers:
        layer.forward = unadapted(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own is seen again


def unadapted(layer):
    """The function that an adapted layer was before: x (T, in) to x Wᵀ + bias (T, out). PiSSA's
    base is W - s B₀ A₀; adding x (s B₀ A₀)ᵀ is what it computes itself before the first step."""
    if isinstance(layer, PiSSALinear):
        return lambda x: layer.add(layer.base(x), x, layer.initial_A, layer.scale * layer.initial_B)
    return lambda x: layer.base(x)


def frozen_copy(model, options, device):
    """The model as it is now, in --dtype, for a method that moves W; else None. Its activations
    are in that dtype in any case: so the copy gives the same numbers to the last bit."""
    if not needs_copy(options):
        return None
    dtype = getattr(torch, options.dtype)
    reference = copy.deepcopy(model).to(dtype).requires_grad_(False).eval()
    shard(reference, device, None)
    return reference.to(device)


def needs_copy(options):
    return options.method in MOVES_W and options.needs_reference


def copy_bytes(model, options):
    """What `frozen_copy` will take of each rank's memory; `model` needs only shapes."""
    numbers = sum(parameter.numel() for parameter in model.parameters())
    return needs_copy(options) * numbers * getattr(torch, options.dtype).itemsize // world_size()


def add_reference(predicted, model, options):
    """A `predict.Prediction` for a step with a reference pass, from the one without it; and what
    the reference is, in a line. The pass is one more forward, 2 FLOPs for each number of a matrix;
    it keeps nothing, so that its memory is never the most."""
    if not options.needs_reference:
        return predicted
    flops = predicted.flops
    flops["matrices"] += sum(2 * prod(cost.shape) for layer in model.model.layers
                             for cost in layer_costs(layer))
    flops["head"] += 2 * prod(linear_cost(model.lm_head or model.model.embed_tokens).shape)
    flops["attention"] *= 4 / 3
    flops["total"] = flops["matrices"] + flops["head"] + flops["attention"]
    flops["full"] = flops["total"] + flops["attention"]
    what = "the model itself, its adapters switched off"
    if needs_copy(options):
        what = "a frozen copy of the model, as this method changes W"
        predicted["reference model"] = copy_bytes(model, options)
    say(f"reference   {what}: one more forward, counted below")
    return predicted


@torch.no_grad()
def reference_log_probs(model, pack, reference=None):
    """log ρ of each token of `pack`, (T,), by the frozen copy or else by `model`, adapters off."""
    if reference is not None:
        return reference(**pack)
    with adapters_off(model):
        return model(**pack)


def scored(model, reference, pack, options):
    """`preference_loss` of a pack from `collate_pairs`."""
    frozen = reference_log_probs(model, pack, reference) if options.needs_reference else None
    return preference_loss(PairLogProbs.of(pack, model(**pack), frozen), options)
