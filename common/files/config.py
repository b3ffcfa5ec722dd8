"""A model folder's config.json, read from either dialect of transformers, written in both: 4 keeps
`rope_theta` and `rope_scaling` at the top level, 5 keeps both in `rope_parameters`; a version 4
that reads only the latter silently takes a theta of 10000."""

import json
import math
from dataclasses import fields
from pathlib import Path

from common.errors import UserError, one_line
from common.files.json_files import read_json

# What an absent key means by model_type, as in transformers. Without an entry there are as many
# key/value heads as heads, and head_dim is hidden_size / num_attention_heads.
_FAMILIES = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128}}


def read_config(path):
    """The config.json of folder `path` as a dict in one dialect: always with `rope_theta` (float)
    and `rope_scaling` (None, or a dict with `rope_type`, without theta), never `rope_parameters`;
    `head_dim`, `num_key_value_heads` (null: all heads), `max_position_embeddings` by the family's
    rule if absent; other keys as in the file, unchecked. UserError if it is missing or broken."""
    file = Path(path) / "config.json"
    if not file.exists():
        adapter = file.with_name("adapter_config.json").exists()
        raise UserError(f"{path}: " + (
            "an adapter, not a model: it goes with --adapter, or merge it first (merge.py)"
            if adapter else "no config.json here, so this is not a model folder"))
    config = read_json(file)
    layers, width, heads = (config.get(key) for key in (
        "num_hidden_layers", "hidden_size", "num_attention_heads"))
    if type(layers) is int and layers > 1000:  # more would take for ever to make
        raise UserError(f"{file}: num_hidden_layers must be at most 1000")
    if not isinstance(config.get("model_type", ""), str):
        raise UserError(f"{file}: model_type={config['model_type']!r} is not text")
    config["rope_theta"], config["rope_scaling"] = _rope(config, file)
    family = _FAMILIES.get(config.get("model_type"), {})
    for key in family.keys() - {"num_key_value_heads", "head_dim"}:
        config.setdefault(key, family[key])
    if type(width) is type(heads) is int and heads > 0:
        groups = config.setdefault(
            "num_key_value_heads", min(heads, family.get("num_key_value_heads", heads)))
        config["num_key_value_heads"] = heads if groups is None else groups
        if config.get("head_dim") is None:
            if "head_dim" not in family and width % heads:
                raise UserError(f"{file}: no head_dim, and hidden_size {width} is not a multiple of"
                                f" num_attention_heads {heads}")
            config["head_dim"] = family.get("head_dim", width // heads)
    return config


def _rope(config, file):
    """(theta, scaling) from either dialect; takes `rope_parameters` out of `config`."""
    thetas, scalings = [config.get("rope_theta")], []
    for rope in (config.pop("rope_parameters", None), config.get("rope_scaling")):
        if not rope:
            continue
        if not isinstance(rope, dict):
            raise UserError(f"{file}: rope_scaling must be null or an object, not {rope!r}")
        scaling = {"rope_type": rope.get("type", "default"), **rope}
        again = {**config, "rope_type": rope.get("type")}  # where a file may say it once more
        for key in scaling.keys() & {"rope_type", "original_max_position_embeddings"}:
            if again.get(key) not in (None, scaling[key]):
                scalings.append({**scaling, key: again[key]})
        thetas.append(scaling.pop("rope_theta", None))
        scaling.pop("type", None)
        if scaling.get("partial_rotary_factor") == 1:
            del scaling["partial_rotary_factor"]
        scalings.append(None if scaling == {"rope_type": "default"} else scaling)
    thetas = [theta for theta in thetas if theta is not None] or [10000.0]
    scalings = scalings or [None]
    for name, values in (("rope_theta", thetas), ("RoPE scaling", scalings)):
        if any(value != values[0] for value in values):  # edited in one dialect only
            raise UserError(
                f"{file}: two different values of {name}: {values[0]} and {values[-1]};"
                " rope_parameters, rope_scaling and rope_theta must agree")
    whole = type(thetas[0]) is int and abs(thetas[0]) < 1e300
    return float(thetas[0]) if whole else thetas[0], scalings[0]


def write_config(config, path, dtype):
    """Write `config`, as `read_config` gave it, into folder `path`, so that transformers 4 and 5
    read it correctly. `dtype` (a torch.dtype or its name) is what the weights are stored in."""
    file = Path(path) / "config.json"
    name = str(dtype).removeprefix("torch.")
    rope = {"rope_type": "default", **(config.get("rope_scaling") or {}),
            "rope_theta": config["rope_theta"]}
    config = {**config, "rope_parameters": rope, "dtype": name, "torch_dtype": name}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_fields(cls, config, where=""):
    """Those fields of dataclass `cls` that are numbers or flags, from the dict `config`. Raises
    ValueError, with `where` before its name, for one that is missing or of a wrong type."""
    values = {}
    for field in fields(cls):
        if field.type not in (int, float, bool):
            continue
        value = config.get(field.name, cls.__dict__.get(field.name))
        if value is None:
            raise ValueError(f"{where}{field.name} is missing")
        if field.type is float and type(value) is int and abs(value) < 1e300:
            value = float(value)
        limit = 2**31 if field.type is int else math.inf  # PyTorch counts products of two sizes
        if type(value) is not field.type or not (field.type is bool or 0 < value < limit):
            raise ValueError(f"{where}{field.name}={one_line(repr(value))} is not a positive "
                             f"{field.type.__name__} below {limit}")
        values[field.name] = value
    return values


def model_fields(cls, config, not_supported):
    """`read_fields` of a decoder's config, after refusing what its file does not compute:
    quantised weights, and each field of `not_supported` that has another value than the neutral
    ones given there. Raises ValueError with the field's name."""
    if config.get("quantization_config") is not None:
        raise ValueError("quantization_config is there, so the weights are quantised: give the"
                         " original model, or, if this is bitsandbytes NF4 (4 bits), train it"
                         " with chapter-03/train.py and ask it with chapter-03/generate.py")
    for name, neutral in {**not_supported, "is_causal": (True,)}.items():
        if config.get(name, neutral[0]) not in neutral:
            raise ValueError(f"{name}={config[name]!r} is not supported here"
                             + "; chapters 2 and 3 know more of them" * (name == "model_type"))
    values = read_fields(cls, config)
    if values["num_attention_heads"] % values["num_key_value_heads"]:
        raise ValueError("num_attention_heads is not a multiple of num_key_value_heads")
    if values["head_dim"] % 2:
        raise ValueError("head_dim is odd, and rotary embedding turns pairs")
    return values


def read_windows(config):
    """How many tokens a token of each layer sees, itself included, and None for all of them: a
    tuple. ValueError if config.json contradicts itself."""
    layers, window = config["num_hidden_layers"], config.get("sliding_window", 4096)
    window, first = (window if config.get("use_sliding_window") else None), layers
    if window is not None:
        first = config.get("max_window_layers", 28)
        if type(window) is not int or type(first) is not int or window < 1:
            raise ValueError(f"sliding_window={window!r}, max_window_layers={first!r}: not numbers")
    kinds = config.get("layer_types") or [
        "full_attention" if i < first else "sliding_attention" for i in range(layers)]
    known = ["full_attention", "sliding_attention"][:1 if window is None else 2]
    if not isinstance(kinds, list) or len(kinds) != layers or any(k not in known for k in kinds):
        raise ValueError(f"layer_types={kinds!r} is not {' or '.join(known)} for each layer")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
