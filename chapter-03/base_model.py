"""Loading a model that is to be asked or merged: by its name, or as the base of an adapter.

An adapter that was trained on a base of four bits has learned beside that base's errors, so it is
put on the same four bits here. Its file says on which (`mark`).
"""

import torch
from bnb_files import DTYPES, is_bnb
from modeling_llama import LlamaConfig, LlamaForCausalLM
from peft_files import base_model_name
from quantized_model import quantized_model

from common import hub, weights
from common.errors import UserError, located
from common.files.manifest import MARK, verify
from common.files.tensors import open_file

BASES = ("none", "nf4", "nf4-double")


# Changed from chapter-02: quantised bases.
def load_model(name, device, dtype, adapter=None, trained_on="auto"):
    """(model, its folder), the weights in `dtype`, ready to be asked.

    Without a `name` it is the model that the adapter in folder `adapter` was trained on. For
    `trained_on` "nf4" or "nf4-double" its layers are quantised, from the dtype in which the run
    had them; "auto" is what the adapter's file says, else "none". The folder of a model that is
    quantised already is taken as it is.
    """
    folder = hub.resolve(name or base_of(adapter))
    verify(folder)
    config_json = weights.read_config(folder)
    said = read_mark(adapter) if adapter else {}
    if trained_on == "auto":
        trained_on = said.get("trained_on", "none")
    if trained_on not in BASES:
        raise UserError(f"{adapter}: trained on {trained_on!r}, which is not known here")
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


# Copied from chapter-02/base_model.py
def base_of(adapter):
    """The name of the model that the adapter in folder `adapter` was trained on."""
    name = base_model_name(adapter)
    if not isinstance(name, str) or not name:
        raise UserError(f"{adapter / 'adapter_config.json'}: names no base model: give --model")
    return name


def mark(options):
    """What the header of an adapter's file says: the manifest, and the base it was trained on."""
    return {**MARK, "trained_on": options.quantize + "-double" * options.double_quant,
            "dtype": options.dtype}


# Copied from chapter-02/base_model.py
def read_mark(adapter):
    """The header's metadata of the adapter in folder `adapter`; {} if it has none."""
    for file in sorted(adapter.glob("adapter_model*.safetensors")):
        with open_file(file) as tensors:
            return tensors.metadata() or {}
    return {}
