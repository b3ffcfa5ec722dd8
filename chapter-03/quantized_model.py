"""The model of a run: from a checkpoint, from random numbers, or shapes alone.

An NF4 base, whatever it comes from, is built without storage and then filled tensor by tensor, so
that the 16-bit model is never there as a whole.
"""

import torch
from bnb_files import DTYPES, is_bnb, load_bnb
from lora import apply_adapter
from loss import chunk_for
from modeling_llama import LlamaConfig, LlamaForCausalLM, initialise
from nf4 import BLOCK, NESTED_BLOCK, NF4Linear, NF4Weight
from nf4_load import load_nf4

from common import hub, weights
from common.adapters import peft
from common.errors import UserError, located
from common.files.manifest import MARK, verify

BASES = ("none", "nf4", "nf4-double")  # what an adapter can have been trained on

# What these methods do to the base weights cannot be done to four-bit ones.
DENSE_ONLY = {
    "full": "it trains every weight, in steps far smaller than from one of 16 levels to the next",
    "pissa": "it takes a part out of every weight, and the rest would have to be rounded anew",
    "delta-lora": "it moves every weight by far less than from one of 16 levels to the next",
}


def check_options(options):
    """Raise UserError if --quantize and another option exclude one another."""
    if options.quantize == "nf4" and options.method in DENSE_ONLY:
        raise UserError(f"--method {options.method} needs --quantize none:"
                        f" {DENSE_ONLY[options.method]}")
    if options.quantize == "none" and options.double_quant:
        raise UserError("--double-quant needs --quantize nf4: without it there are no scales")


def check_base(config, options):
    """A base model's config without its quantization, if any; UserError if it must not have one."""
    if is_bnb(config) and options.quantize == "none":
        raise UserError("the folder is quantised already: say --quantize nf4, or give the original")
    return {**config, "quantization_config": None}


# Changed from chapter-02: the NF4 base, streamed in; checkpointing; the loss's chunk.
def build(config, options, adapter, device="meta", source=None, draw_on="cpu"):
    """The model with its adapters, its weights from folder `source` or random; on "meta" shapes
    alone. A base that stays as it is has four bits or the dtype of the run; what is trained is
    float32. Random weights are drawn on the CPU, where a seed means the same numbers on every
    machine; `draw_on` a GPU billions of them take a moment.
    """
    dtype = getattr(torch, options.dtype)
    fresh = options.init == "random" and device != "meta"
    if options.quantize == "nf4":
        init = "shapes" if device == "meta" else options.init
        with torch.device(draw_on if fresh else "cpu"):
            model = quantized_model(config, source, dtype, device, options.double_quant, init)
    else:
        with torch.device(draw_on if fresh else "meta"):
            model = LlamaForCausalLM(config)
        model.compute_dtype = dtype
        if options.method not in DENSE_ONLY:
            model.to(dtype)
        if fresh:
            model.to(device)
        elif device != "meta":
            model.to_empty(device=device)
            weights.load_weights(model, source)
    gpu_memory = (torch.cuda.get_device_properties(options.device).total_memory
                  if torch.device(options.device).type == "cuda" else None)
    model.chunk = chunk_for(config.vocab_size, gpu_memory)
    for layer in model.model.layers:
        layer.checkpointing = options.activation_checkpointing
    return apply_adapter(model, adapter)


def quantized_model(config, source, dtype, device="cpu", double_quant=False, init="pretrained"):
    """A `LlamaForCausalLM`, frozen: NF4 in its layers' matrices, `dtype` in all the rest.

    `config` is the LlamaConfig, `source` the folder of the weights, 16-bit or bitsandbytes NF4
    (then as it is: `double_quant` changes nothing). `init` "random" draws them anew, as a fresh
    model's, and "shapes" gives a model on the meta device, from which memory can be predicted.
    Raises UserError for weights that do not fit.
    """
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    if init == "shapes":
        _shapes(model.to(dtype), double_quant)
    elif init == "random":
        load_nf4(model, _random_tensors(model), double_quant, dtype, device)
    elif is_bnb(weights.read_config(source)):
        load_bnb(model, source, dtype, device)
    else:
        load_nf4(model, weights.iter_tensors(source), double_quant, dtype, device)
    model.compute_dtype = dtype
    return model


def _random_tensors(model):
    """Every (name, first value) of a fresh model, one at a time."""
    for name, parameter in list(model.named_parameters()):
        yield name, initialise(name, torch.empty(parameter.shape), model.config)


def _shapes(model, double_quant):
    """Put an `NF4Linear` without values in the place of each linear layer within the layers."""
    def empty(count, dtype):
        return torch.empty(count, dtype=dtype, device="meta")

    model.requires_grad_(False)
    for name, layer in list(model.model.layers.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            shape = layer.weight.shape
            blocks = -(-shape.numel() // BLOCK)
            second = (empty(-(-blocks // NESTED_BLOCK), torch.float32), empty(1, torch.float32))
            weight = NF4Weight(
                empty(-(-shape.numel() // 2), torch.uint8)[:, None],
                empty(blocks, torch.uint8 if double_quant else torch.float32),
                *(second if double_quant else (None, None)), shape, layer.weight.dtype)
            model.model.layers.set_submodule(name, NF4Linear(weight, layer.bias))


# Changed from chapter-02: quantised bases.
def load_model(name, device, dtype, adapter=None, trained_on="auto"):
    """(model, its folder), the weights in `dtype`, ready to be asked.

    Without a `name` it is the model that the adapter in folder `adapter` was trained on. For
    `trained_on` "nf4" or "nf4-double" its layers are quantised, from the dtype in which the run
    had them; "auto" is what the adapter's file says, else "none". The folder of a model that is
    quantised already is taken as it is.
    """
    folder = hub.resolve(name or peft.base_model_name(adapter))
    verify(folder)
    said = peft.metadata(adapter) if adapter else {}
    if trained_on == "auto":
        trained_on = said.get("trained_on", "none")
    if trained_on not in BASES:
        raise UserError(f"{adapter}: trained on {trained_on!r}, which is not known here")
    config_json = weights.read_config(folder)
    with located(folder / "config.json"):
        quantised = is_bnb(config_json)
        config = LlamaConfig.from_dict({**config_json, "quantization_config": None})
    if quantised or trained_on != "none":
        kept = DTYPES.get(said.get("dtype"))  # None: as in the checkpoint
        model = quantized_model(config, folder, kept, device, trained_on == "nf4-double").to(dtype)
    else:
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        model.to(dtype).to_empty(device=device)
        weights.load_weights(model, folder)
    model.compute_dtype = dtype
    return model.eval(), folder


def mark(options):
    """What the header of an adapter's file says: the manifest, and the base it was trained on."""
    return {**MARK, "trained_on": options.quantize + "-double" * options.double_quant,
            "dtype": options.dtype}
