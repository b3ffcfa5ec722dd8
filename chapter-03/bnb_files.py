"""Model folders quantised by bitsandbytes to NF4: read into this chapter's layers, and written.

Under a weight's own name such a folder has the packed codes, and beside them

    .absmax           (blocks,) float32; uint8 codes when double quantised ("nested")
    .quant_map        (16,) float32, the levels
    .nested_absmax    (ceil(blocks / 256),) float32           } double quantised only
    .nested_quant_map (256,) float32, the levels of absmax    }
    .quant_state.bitsandbytes__nf4   a JSON text as bytes: shape, dtype, block sizes, offset

and "quantization_config" in config.json. This is what `QuantState.as_dict(packed=True)` of
bitsandbytes 0.50 gives; tests/goldens/bnb holds folders that it wrote."""

import json
from dataclasses import replace

import torch
from nf4 import BLOCK, DYNAMIC_MAP, LEVELS, NESTED_BLOCK, NF4Linear, quantize_nf4

from common.errors import UserError, located
from common.files.config import read_config, write_config
from common.files.tensors import iter_tensors, save_tensors

STATE = "quant_state.bitsandbytes__nf4"
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE)
# What "quantization_config" has to say, and what it means if it does not mention it.
NF4 = {"quant_method": ("bitsandbytes", "bitsandbytes"), "load_in_8bit": (False, False),
       "load_in_4bit": (True, False), "bnb_4bit_quant_type": ("nf4", "fp4"),
       "bnb_4bit_quant_storage": ("uint8", "uint8")}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def is_bnb(config):
    """Whether a config (from `read_config`) is of an NF4 folder; other quantisations: UserError."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return False
    found = quantization if isinstance(quantization, dict) else {"quant_method": "unknown"}
    for name, (wanted, default) in NF4.items():
        if (found.get(name) or default) != wanted:
            raise UserError(f"quantization_config says {name}={found.get(name, default)!r}, and"
                            " only bitsandbytes NF4 stored as uint8 is read here: start from the"
                            " 16-bit checkpoint")
    return True


def iter_bnb(path):
    """Every (name, tensor) of a folder; a quantised one is assembled into an `NF4Weight`, one at a
    time if its parts are adjacent, as when sorted. UserError for parts missing or unlike NF4's."""
    is_bnb(read_config(path))
    waiting = {}  # name of a weight -> its parts so far
    for name, tensor in iter_tensors(path):
        layer, dot, part = name.partition(".weight.")
        if not dot and tensor.dtype != torch.uint8:
            yield name, tensor
            continue
        if dot and part not in PARTS:
            raise UserError(f"{path}: {name} is not a part of an NF4 weight")
        weight = f"{layer}.weight" if dot else name
        parts = waiting.setdefault(weight, {})
        with located(f"{path}: {weight}"):
            parts[part or "packed"] = _read_state(tensor) if part == STATE else tensor
            if STATE in parts and len(parts) == len(_parts(parts[STATE])):
                yield weight, _assemble(waiting.pop(weight))
    for weight, parts in waiting.items():
        raise UserError(f"{path}: {weight} is not a whole NF4 weight: only {', '.join(parts)}")


def _parts(quantized):
    """{part: tensor} of what bitsandbytes stores for an `NF4Weight`."""
    state = {"quant_type": "nf4", "blocksize": BLOCK,
             "dtype": str(quantized.dtype).removeprefix("torch."), "shape": list(quantized.shape)}
    # Copies of the tables: a file may not hold the same tensor twice.
    parts = {"packed": quantized.packed, "absmax": quantized.absmax, "quant_map": LEVELS.clone()}
    if quantized.absmax2 is not None:
        parts |= {"nested_absmax": quantized.absmax2, "nested_quant_map": DYNAMIC_MAP.clone()}
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32",
                  "nested_offset": quantized.offset.item()}
    return parts | {STATE: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}


def _read_state(tensor):
    """The `NF4Weight` that the JSON text describes, on the meta device but for its offset."""
    try:
        state = json.loads(bytes(tensor.tolist()))
        sizes = state["blocksize"], state.get("nested_blocksize", NESTED_BLOCK)
        if sizes != (BLOCK, NESTED_BLOCK):
            raise ValueError(f"blocks of {sizes[0]} (nested {sizes[1]}), and only blocks of {BLOCK}"
                             f" (nested {NESTED_BLOCK}) are read here")
        weight = torch.empty(state["shape"], dtype=DTYPES[state["dtype"]], device="meta")
        if state.get("nested_offset") is None:
            return quantize_nf4(weight)
        offset = torch.tensor([float(state["nested_offset"])])
        if not offset.isfinite():
            raise ValueError("nested_offset is not finite")
        return replace(quantize_nf4(weight, double_quant=True), offset=offset)
    except (KeyError, RecursionError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"its quant_state cannot be read here: {error!r}") from error


def _assemble(parts):
    """The `NF4Weight` of all parts of a weight, after checking that they are such as we write."""
    quantized = parts.pop(STATE)
    wanted = _parts(quantized)
    del wanted[STATE]
    for part, like in wanted.items():
        if part not in parts or (parts[part].shape, parts[part].dtype) != (like.shape, like.dtype):
            raise ValueError(f"{part} should be {like.dtype} {tuple(like.shape)}")
        if not like.is_meta and not torch.equal(parts[part], like):
            raise ValueError(f"its {part} is not bitsandbytes' table")
        if parts[part].is_floating_point() and not parts[part].isfinite().all():
            raise ValueError(f"{part} has a value that is not finite")
    # Copies, since tensors that were read are still backed by the file.
    copies = {part: tensor.clone() for part, tensor in parts.items()}
    return replace(quantized, packed=copies["packed"], absmax=copies["absmax"],
                   absmax2=copies.get("nested_absmax"))


def save_bnb(model, config, path, dtype=None, metadata=None):
    """Write a model with `NF4Linear` layers for transformers + bitsandbytes, without the tokenizer.
    `config` is from `read_config`, `dtype` for what is not quantised (default: as it is)."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, NF4Linear)}
    if not layers:
        raise ValueError("the model has no NF4Linear to save")
    kept = dtype or model.get_parameter("model.embed_tokens.weight").dtype
    dense = {name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    quantization = {name: wanted for name, (wanted, _) in NF4.items()} | {
        "bnb_4bit_use_double_quant": all(layer.absmax2 is not None for layer in layers.values()),
        "bnb_4bit_compute_dtype": str(kept).removeprefix("torch."),
        "llm_int8_skip_modules": sorted(dense | {"lm_head"})}  # despite its name for 4 bits too

    def tensors():
        for name, parameter in model.named_parameters():
            yield name, parameter.to(kept)
        for name, layer in layers.items():
            for part, tensor in _parts(layer.quantized).items():
                yield f"{name}.weight.{part}".removesuffix(".packed"), tensor

    save_tensors(tensors(), path, metadata)
    write_config({**config, "quantization_config": quantization}, path, kept)
