"""Model folders quantised by bitsandbytes to NF4: read into this chapter's layers, and written.

Under a weight's own name such a folder has the packed codes, and beside them

    .absmax           (blocks,) float32; uint8 codes when double quantised ("nested")
    .quant_map        (16,) float32, the levels
    .nested_absmax    (ceil(blocks / 256),) float32           } double quantised only
    .nested_quant_map (256,) float32, the levels of absmax    }
    .quant_state.bitsandbytes__nf4   a JSON text as bytes: shape, dtype, block sizes, offset

and "quantization_config" in config.json. This is what `QuantState.as_dict(packed=True)` of
bitsandbytes 0.50 gives; tests/goldens/bnb holds folders that it wrote.
"""

import json
from pathlib import Path

import torch
from nf4 import BLOCK, DYNAMIC_MAP, LEVELS, NESTED_BLOCK, NF4Linear, NF4Weight

from common.errors import UserError
from common.weights import iter_tensors, read_config, save_tensors, write_config

STATE = "quant_state.bitsandbytes__nf4"
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def is_bnb(config):
    """Whether a config (from `read_config`) belongs to an NF4 folder that `iter_bnb` can read.

    False if it is not quantised at all. Raises UserError that names any other quantisation.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        return False
    get = quantization.get if isinstance(quantization, dict) else {}.get
    kind = get("quant_method", "bitsandbytes" if get("load_in_4bit") else "unknown")
    if kind == "bitsandbytes" and get("load_in_8bit"):
        kind = "bitsandbytes int8 (LLM.int8)"
    elif kind == "bitsandbytes" and get("bnb_4bit_quant_type", "fp4") != "nf4":  # bnb's default
        kind = f"bitsandbytes {get('bnb_4bit_quant_type', 'fp4')}"
    elif kind == "bitsandbytes" and get("bnb_4bit_quant_storage", "uint8") != "uint8":
        kind = f"bitsandbytes NF4 stored as {get('bnb_4bit_quant_storage')}"
    elif kind == "bitsandbytes" and get("load_in_4bit"):
        return True
    raise UserError(f"quantization_config says {kind}, and only bitsandbytes NF4 stored as uint8"
                    " is read here: start from the 16-bit checkpoint")


def iter_bnb(path):
    """Every (name, tensor) of a folder; a quantised one is assembled into an `NF4Weight`.

    Holds one weight in memory at a time if its parts are adjacent, as in files sorted by name.
    Raises UserError for parts that are missing or are not what NF4 needs.
    """
    is_bnb(read_config(path))
    waiting = {}  # name of a weight -> its parts so far
    for name, tensor in iter_tensors(path):
        weight, dot, part = name.partition(".weight.")
        if not dot and tensor.dtype != torch.uint8:
            yield name, tensor
            continue
        if dot and part not in PARTS:
            raise UserError(f"{path}: {name} is not a part of an NF4 weight")
        weight += dot.removesuffix(".")
        parts = waiting.setdefault(weight, {})
        parts[part or "packed"] = _read_state(weight, tensor) if part == STATE else tensor
        if STATE in parts and len(parts) == (4 if parts[STATE][2] is None else 6):
            yield weight, _assemble(weight, waiting.pop(weight))
    for weight, parts in waiting.items():
        raise UserError(f"{path}: {weight} is not a whole NF4 weight: only {', '.join(parts)}")


def _read_state(weight, tensor):
    """(shape, dtype, offset or None) from the JSON text that says how a weight is quantised."""
    try:
        state = json.loads(bytes(tensor.tolist()))
        shape, dtype = torch.Size(state["shape"]), DTYPES[state["dtype"]]
        sizes = state["blocksize"], state.get("nested_blocksize", NESTED_BLOCK)
        offset = state.get("nested_offset")
        offset = None if offset is None else torch.tensor([float(offset)])
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f"{weight}: its quant_state is malformed: {error!r}") from error
    if offset is not None and not offset.isfinite():
        raise UserError(f"{weight}: its nested_offset is not finite")
    if sizes != (BLOCK, NESTED_BLOCK):
        raise UserError(f"{weight} has blocks of {sizes[0]} (nested {sizes[1]}), and only blocks"
                        f" of {BLOCK} (nested {NESTED_BLOCK}) are read here")
    return shape, dtype, offset


def _assemble(weight, parts):
    """The `NF4Weight` of the four or six tensors of a weight, after checking all of them."""
    shape, dtype, offset = parts[STATE]
    blocks = -(-shape.numel() // BLOCK)
    wanted = {"packed": ((-(-shape.numel() // 2), 1), torch.uint8),
              "absmax": ((blocks,), torch.float32 if offset is None else torch.uint8),
              "quant_map": ((16,), torch.float32)}
    if offset is not None:
        wanted["nested_absmax"] = ((-(-blocks // NESTED_BLOCK),), torch.float32)
        wanted["nested_quant_map"] = ((256,), torch.float32)
    for part, expected in wanted.items():
        found = part in parts and (tuple(parts[part].shape), parts[part].dtype)
        if found != expected:
            raise UserError(f"{weight}: {part} should be {expected}, not {found or 'missing'}")
        if expected[1].is_floating_point and not parts[part].isfinite().all():
            raise UserError(f"{weight}: {part} has a value that is not finite")
    for part, levels in (("quant_map", LEVELS), ("nested_quant_map", DYNAMIC_MAP)):
        if part in parts and not torch.equal(parts[part], levels):
            raise UserError(f"{weight}: its {part} is not bitsandbytes' table")
    absmax2 = None if offset is None else parts["nested_absmax"].clone()
    # Copies, since tensors that were read are still backed by the file.
    return NF4Weight(
        parts["packed"].clone(), parts["absmax"].clone(), absmax2, offset, shape, dtype)


def save_bnb(model, config, path, dtype=None, metadata=None):
    """Write a model with `NF4Linear` layers as a folder that transformers + bitsandbytes loads.

    `config` is what `read_config` gave; `dtype` is for what is not quantised (default: as it is).
    The tokenizer's files are not written (`weights.copy_tokenizer` does that).
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, NF4Linear)}
    if not layers:
        raise ValueError("the model has no NF4Linear to save")
    double = {layer.absmax2 is not None for layer in layers.values()}
    kept = dtype or model.get_parameter("model.embed_tokens.weight").dtype
    dense = {name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    quantization = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double == {True},
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_compute_dtype": str(kept).removeprefix("torch."),
        "llm_int8_skip_modules": sorted(dense | {"lm_head"}),  # despite its name for 4 bits too
    }

    def tensors():
        for name, parameter in model.named_parameters():
            yield name, parameter.to(kept)
        for name, layer in layers.items():
            yield from _disassemble(f"{name}.weight", layer.quantized)

    path = Path(path)
    save_tensors(tensors(), path, metadata)
    write_config({**config, "quantization_config": quantization}, path, kept)


def _disassemble(weight, quantized):
    """(name, tensor) of each part that bitsandbytes stores for a weight."""
    state = {"quant_type": "nf4", "blocksize": BLOCK,
             "dtype": str(quantized.dtype).removeprefix("torch."), "shape": list(quantized.shape)}
    yield weight, quantized.packed
    yield f"{weight}.absmax", quantized.absmax
    yield f"{weight}.quant_map", LEVELS.clone()  # a file may not hold the same tensor twice
    if quantized.absmax2 is not None:
        yield f"{weight}.nested_absmax", quantized.absmax2
        yield f"{weight}.nested_quant_map", DYNAMIC_MAP.clone()
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32",
                  "nested_offset": quantized.offset.item()}
    text = json.dumps(state).encode()
    yield f"{weight}.{STATE}", torch.tensor(list(text), dtype=torch.uint8)
