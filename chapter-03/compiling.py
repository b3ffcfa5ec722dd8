"""`--compile`: each decoder layer as one graph, made for all packs; see `compile_model`."""

import functools

import torch
import torch.nn.functional as F
from lora import adapter_modules
from loss import addmm_, chunked_cross_entropy, softmax_, softmax_at_once_
from modeling_llama import forward_checkpointed
from nf4 import NF4Linear

from common.errors import UserError, one_line


def compile_model(model, backend="inductor"):
    """Compile the model's layers, in place; gives the model. Call it last: after weights, adapters,
    checkpointing. Raises UserError if nothing can be compiled, as without a C++ compiler.

    One graph, made at the first step, serves all layers with the same window, except that the first
    layer above a frozen embedding has its own; evaluation has another. They fit packs of the same
    T, N and max_seqlen (`packing.StaticShape`). On CUDA the softmax of the loss is compiled too,
    for any number of tokens (and once more for a single one); embedding and generation are not."""
    device = next(model.parameters()).device
    try:
        torch.compile(torch.exp, backend=backend)(torch.ones(8, device=device))
    except Exception as error:  # of many kinds, which all mean the same to the user
        reason = one_line(getattr(error, "inner_exception", error))  # the compiler wraps it
        raise UserError(f"--compile: PyTorch cannot compile here ({reason}): install a C++"
                        " compiler, such as g++, or leave --compile out") from error
    settings = {"backend": backend, "fullgraph": True, "dynamic": False}
    compiled = torch.compile(forward_checkpointed, **settings)
    for layer in model.model.layers:
        layer.forward_packed = compiled
        again = layer.checkpointing == "full"
        for _, adapter in adapter_modules(layer):
            adapter.add = plus_low_rank if again else add_low_rank
        for module in layer.modules():
            if isinstance(module, NF4Linear):
                module.recomputed = again
    if not model.model.embed_tokens.weight.requires_grad:
        model.model.layers[0].forward_packed = torch.compile(forward_first, **settings)
    if device.type == "cuda":
        softmax = functools.partial(softmax_at_once_, compiled=torch.compile(softmax_, **settings))
        model.loss = functools.partial(chunked_cross_entropy, softmax=softmax)
    return model


def forward_first(layer, *inputs):
    """Compiled apart for the first layer: its input needs no gradient, so no other graph fits."""
    return forward_checkpointed(layer, *inputs)


class _AddProduct(torch.autograd.Function):
    """y += u Bᵀ, in place: `addmm_` with gradients."""

    @staticmethod
    def forward(ctx, y, u, B):
        ctx.save_for_backward(u, B)
        ctx.mark_dirty(y)
        addmm_(y, u, B.t())
        return y

    @staticmethod
    def backward(ctx, gradient):
        u, B = ctx.saved_tensors
        return gradient, gradient @ B, gradient.t() @ u


def add_low_rank(y, x, A, B):
    """`lora.add_low_rank` for compiled layers: y += x Aᵀ Bᵀ, really in place."""
    u, B = F.linear(x, A.to(x.dtype)), B.to(x.dtype)
    if torch.is_grad_enabled():  # otherwise the compiler does not know `mark_dirty`
        return _AddProduct.apply(y, u, B)
    addmm_(y, u, B.t())
    return y


def plus_low_rank(y, x, A, B):
    """The same as a new tensor, for layers that are computed again in the backward: PyTorch 2.11's
    compiler would nevertheless keep what they change in place."""
    return torch.addmm(y, F.linear(x, A.to(x.dtype)), B.to(x.dtype).t())
