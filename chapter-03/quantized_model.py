"""The model of a run: from a checkpoint, from random numbers, or just its shapes. It is built
without storage and filled tensor by tensor: the 16-bit model of an NF4 base never exists whole."""

import torch

from common import hub, weights
from common.adapters import peft
from common.errors import UserError, located
from common.files.checkpoint import MARK
from common.files.tensors import iter_tensors, tensor_problems
from bnb_files import DTYPES, is_bnb, iter_bnb
from lora import apply_adapter
from loss import chunk_for
from modeling_llama import LlamaConfig, LlamaForCausalLM, initialise
from nf4 import NF4Linear, NF4Weight, quantize_nf4

BASES = ("none", "nf4", "nf4-double")  # what an adapter can have been trained on
# These methods change the base weights, which is not possible with four-bit ones.
DENSE_ONLY = {
    "full": "it trains every weight, in steps far smaller than from one of 16 levels to the next",
    "pissa": "it takes a part out of every weight, and the rest would have to be rounded anew",
    "delta-lora": "it moves every weight by far less than from one of 16 levels to the next"}


def check_options(options):
    """Raise UserError if --quantize and another option exclude each other."""
    if options.quantize == "nf4" and options.method in DENSE_ONLY:
        raise UserError(f"--method {options.method} needs --quantize none:"
                        f" {DENSE_ONLY[options.method]}")
    if options.quantize == "none" and options.double_quant:
        raise UserError("--double-quant needs --quantize nf4: without it there are no scales")


def base_kind(options):
    """How the run keeps its base: one of BASES."""
    return f"{options.quantize}-double" if options.double_quant else options.quantize


def check_base(config, options):
    """A base model's config without its quantization; UserError if --quantize none forbids one."""
    if is_bnb(config) and options.quantize == "none":
        raise UserError("the folder is quantised already: say --quantize nf4, or give the original")
    return {**config, "quantization_config": None}


# Changed from chapter-02: the NF4 base, streamed in; checkpointing; the loss's chunk.
def build(config, options, adapter, device="meta", source=None, draw_on="cpu"):
    """The model with its adapters, its weights from folder `source` or random; on "meta" shapes
    alone. A base that does not change has four bits or the run's dtype; what is trained is float32.
    Random weights are drawn on the CPU, for the same numbers everywhere, or `draw_on` a GPU."""
    dtype = getattr(torch, options.dtype)
    storage = torch.float32 if options.method in DENSE_ONLY else dtype  # small steps need it
    init = "shapes" if device == "meta" else options.init
    with torch.device(draw_on if init == "random" else "cpu"):
        model = base_model(config, source, storage, device, base_kind(options), init)
    model.compute_dtype = dtype
    model.requires_grad_(options.method == "full")
    gpu_memory = (torch.cuda.get_device_properties(options.device).total_memory
                  if torch.device(options.device).type == "cuda" else None)
    model.chunk = chunk_for(config.vocab_size, gpu_memory)
    for layer in model.model.layers:
        layer.checkpointing = options.activation_checkpointing
    return apply_adapter(model, adapter)


def base_model(config, source, dtype, device="cpu", base="nf4", init="pretrained"):
    """A `LlamaForCausalLM`, frozen, in `dtype`; with an NF4 `base` its layers' matrices in NF4.
    `config` is the LlamaConfig, `source` the weights' folder, 16-bit or bitsandbytes NF4 (taken as
    it is). `dtype` None leaves each tensor in its own; the caller then sets `compute_dtype`. `init`
    "random" draws weights, "shapes" is for the meta device. UserError if weights do not fit."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    parameters, quantize = list(model.named_parameters()), base != "none"
    if init == "shapes":
        tensors, device = parameters, "meta"
    elif init == "random" and quantize:  # never the whole model in 16 bits
        tensors = ((name, initialise(name, torch.empty(parameter.shape), config))
                   for name, parameter in parameters)
    elif init == "random":  # the same numbers as in chapters 1 and 2
        tensors = LlamaForCausalLM(config).requires_grad_(False).named_parameters()
    elif is_bnb(weights.read_config(source)):
        tensors, quantize = iter_bnb(source), False
    else:
        tensors = iter_tensors(source)
    if init == "pretrained":
        tensors = weights.own_tensors(tensors, config.tie_word_embeddings)
    with located(source or "the model's shapes"):
        load_base(model, tensors, base == "nf4-double", dtype, device, quantize)
    model.compute_dtype = dtype
    return model


def load_base(model, tensors, double_quant=False, dtype=None, device="cpu", quantize=True):
    """Fill a model built on the meta device from a stream of (name, tensor), and freeze it. Each
    tensor is cast to `dtype` (default: its own) as it comes. With `quantize`, a linear layer inside
    `layers` then becomes an `NF4Linear`, as it does in any case from an `NF4Weight`: the peak is
    the quantised model and a tensor or two. ValueError names what does not fit or is not finite."""
    awaited = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, tensor in tensors:
        header = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), None
        _check({name: header}, {name: awaited.pop(name)} if name in awaited else {})
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        linear = isinstance(module, torch.nn.Linear) and leaf == "weight" and ".layers." in name
        if linear and quantize and not isinstance(tensor, NF4Weight):
            try:
                tensor = quantize_nf4(tensor.to(device, dtype), double_quant)
            except ValueError as error:
                raise ValueError(f"{name} cannot be quantised: {error}") from error
        if not isinstance(tensor, NF4Weight):
            tensor = tensor.to(device, dtype, copy=True)  # the one read is backed by its file
            setattr(module, leaf, torch.nn.Parameter(tensor, requires_grad=False))
        elif linear:
            layer = NF4Linear(tensor).to(device)
            layer.bias = module.bias  # whose values may come later
            model.set_submodule(owner, layer)
        else:
            raise ValueError(f"{name} is quantised: only linear layers inside `layers` can be")
    _check({}, awaited)


def _check(found, wanted):
    """Raise ValueError if the tensors `found` (headers) are not the `wanted` ones (shapes)."""
    if problems := tensor_problems(found, wanted, ("float64", "float32", "float16", "bfloat16")):
        raise ValueError(f"the tensors do not fit config.json: {problems}")


# Changed from chapter-02: quantised bases.
def load_model(name, device, dtype, adapter=None, base="auto"):
    """(model, its folder), the weights in `dtype`, ready to be asked. Without a `name` it is the
    model that the adapter in folder `adapter` was trained on. With `base` "nf4" or "nf4-double" its
    layers are quantised, if they are not yet; "auto" is what the adapter's file says, or "none"."""
    folder = hub.resolve(name or peft.base_model_name(adapter))
    metadata = peft.metadata(adapter) if adapter else {}
    base = metadata.get("trained_on", "none") if base == "auto" else base
    if base not in BASES:
        raise UserError(f"{adapter}: trained on {base!r}, which is not known here")
    config_json = weights.read_config(folder)
    with located(folder / "config.json"):
        config = LlamaConfig.from_dict({**config_json, "quantization_config": None})
    # As in training, what is quantised is rounded to the run's dtype first (None: its own).
    quantised = base != "none" or is_bnb(config_json)
    storage = DTYPES.get(metadata.get("dtype")) if quantised else dtype
    model = base_model(config, folder, storage, device, base).to(dtype)
    model.compute_dtype = dtype
    return model.eval(), folder


def mark(options):
    """Metadata for an adapter's file: that it has a manifest, and the base it was trained on."""
    return {**MARK, "trained_on": base_kind(options), "dtype": options.dtype}
