"""Loading a model that is to be asked or merged: by its name, or as the base of an adapter."""

import sys

import torch
from modeling_llama import LlamaConfig, LlamaForCausalLM
from peft_files import base_model_name

from common import hub, weights
from common.errors import UserError, located
from common.files.manifest import verify
from common.files.tensors import open_file


def load_model(name, device, dtype, adapter=None):
    """(model, its folder), the weights in `dtype`, ready to be asked.

    Without a `name` it is the model that the adapter in folder `adapter` was trained on.
    """
    folder = hub.resolve(name or base_of(adapter))
    verify(folder)
    if adapter and "nf4" in read_mark(adapter).get("trained_on", ""):
        print(f"warning: {adapter} has learned beside the errors of a base of four bits, which this"
              " base does not have: python chapter-03/generate.py asks it as it was trained",
              file=sys.stderr)
    with located(folder / "config.json"):
        config = LlamaConfig.from_dict(weights.read_config(folder))
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to(dtype).to_empty(device=device)
    weights.load_weights(model, folder)
    model.compute_dtype = dtype
    return model.eval(), folder


def base_of(adapter):
    """The name of the model that the adapter in folder `adapter` was trained on."""
    name = base_model_name(adapter)
    if not isinstance(name, str) or not name:
        raise UserError(f"{adapter / 'adapter_config.json'}: names no base model: give --model")
    return name


def read_mark(adapter):
    """The header's metadata of the adapter in folder `adapter`; {} if it has none."""
    for file in sorted(adapter.glob("adapter_model*.safetensors")):
        with open_file(file) as tensors:
            return tensors.metadata() or {}
    return {}
