"""`--compile`: each decoder layer as one graph, compiled once for all layers and all packs."""

import functools

import torch
from lora import adapter_modules
from loss import softmax_, softmax_at_once_
from modeling_llama import run
from nf4 import NF4Linear
from products import add_low_rank, plus_low_rank

from common.errors import UserError


def compile_model(model, backend="inductor"):
    """Compile the model's layers, in place; gives the model.

    One graph, made at the first step and used by every layer, but for the first one above a frozen
    embedding, which has its own; another for evaluation. They fit packs of the same T, N and
    max_seqlen (`packing.StaticShape`). Within them attention is an operator that the compiler does
    not look into. On CUDA the softmax of the loss is compiled too, for any number of tokens (and
    once more where a single one has a label). Embedding and generation stay as they are. Call it
    last, when weights, adapters and checkpointing are in place. Raises UserError where nothing can
    be compiled, as without a C++ compiler.
    """
    device = next(model.parameters()).device
    try:
        torch.compile(torch.exp, backend=backend)(torch.ones(8, device=device))
    except Exception as error:  # of many kinds, all of them meaning the same to the user
        inner = getattr(error, "inner_exception", error)  # the one that the compiler wraps
        lines = str(inner).split("\n")
        reason = next((line.strip() for line in lines if line.strip()), type(inner).__name__)
        raise UserError(f"--compile: PyTorch cannot compile here ({reason}): install a C++"
                        " compiler, such as g++, or leave --compile out") from error
    settings = {"backend": backend, "fullgraph": True, "dynamic": False}
    compiled = torch.compile(run, **settings)
    for layer in model.model.layers:
        layer.run = compiled
    if not model.model.embed_tokens.weight.requires_grad:
        model.model.layers[0].run = torch.compile(run_first, **settings)
    for layer in model.model.layers:
        again = layer.checkpointing == "full"
        for _, adapter in adapter_modules(layer):
            adapter.add = plus_low_rank if again else add_low_rank
        for module in layer.modules():
            if isinstance(module, NF4Linear):
                module.recomputed = again
    if device.type == "cuda":
        compiled = torch.compile(softmax_, **settings)
        model.softmax = functools.partial(softmax_at_once_, compiled=compiled)
    return model


def run_first(layer, *inputs):
    """`run`, compiled apart: what goes in has no gradient, so the others' graph is no use."""
    return run(layer, *inputs)

