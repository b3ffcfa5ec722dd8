"""A checkpoint into a model with an NF4 base, one tensor at a time."""

import torch
from nf4 import NF4Linear, NF4Weight, quantize_nf4
from torch import nn

from common.errors import UserError
from common.files.tensors import listing

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def load_nf4(model, tensors, double_quant=False, dtype=None, device="cpu", quantize=True):
    """Fill a model built on the meta device from a stream of (name, tensor), and freeze it.

    The weights of the linear layers inside `layers` are quantised as they come, each layer
    becoming an `NF4Linear`; embedding, norms, biases and head are kept in `dtype` (default: the
    checkpoint's), which is also what a weight is cast to before it is quantised. So the peak is
    the quantised model and one or two tensors. A tensor may also be an `NF4Weight`, taken as it
    is; with `quantize=False` the others are all kept. Raises UserError that names what is
    missing, unexpected, mis-shaped or not finite.
    """
    missing = {name: parameter.shape for name, parameter in model.named_parameters()}
    tied = HEAD not in missing
    duplicate = None  # a tied model's checkpoint may hold its embedding twice
    for name, tensor in tensors:
        if name == HEAD and tied:
            duplicate = tensor
        elif not name.endswith("rotary_emb.inv_freq"):  # old versions wrote it; we compute it
            _fill(model, missing, name, tensor, double_quant, dtype, device, quantize)
    if duplicate is not None:
        if EMBEDDING in missing:
            _fill(model, missing, EMBEDDING, duplicate, double_quant, dtype, device, quantize)
        elif not torch.equal(model.get_parameter(EMBEDDING), duplicate.to(device, dtype)):
            raise UserError(f"{HEAD} differs from {EMBEDDING}, yet config.json ties them")
    if missing:
        raise UserError(f"the checkpoint does not fit config.json: missing {listing(missing)}")


def _fill(model, missing, name, tensor, double_quant, dtype, device, quantize):
    """Put one tensor where it belongs in the model, and strike it off the missing ones."""
    if name not in missing:
        raise UserError(f"the checkpoint does not fit config.json: unexpected or repeated {name}")
    shape = missing.pop(name)
    if tensor.shape != shape:
        raise UserError(f"{name} has shape {tuple(tensor.shape)}, the model {tuple(shape)}")
    if not tensor.dtype.is_floating_point:
        raise UserError(f"{name} is {tensor.dtype}: quantised in a way that is not read here")
    owner, leaf = name.rpartition(".")[::2]
    module = model.get_submodule(owner)
    linear = isinstance(module, nn.Linear) and leaf == "weight" and ".layers." in name
    dtype = dtype or tensor.dtype
    if linear and quantize and not isinstance(tensor, NF4Weight):
        try:
            tensor = quantize_nf4(tensor.to(device, dtype), double_quant)
        except ValueError as error:
            raise UserError(f"{name} cannot be quantised: {error}") from error
    if not isinstance(tensor, NF4Weight):
        tensor = tensor.to(device, dtype, copy=True)  # what was read is still backed by the file
        setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))
    elif linear:
        layer = NF4Linear(tensor).to(device)
        layer.bias = module.bias  # which may still be to come
        model.set_submodule(owner, layer)
    else:
        raise UserError(f"{name} is quantised, and only linear layers inside `layers` can be")
