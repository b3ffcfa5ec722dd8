"""A model folder's config.json, read from either dialect of transformers, written in both.

transformers 4 keeps `rope_theta` and `rope_scaling` at the top level, transformers 5 keeps both
in `rope_parameters`. A version 4 that reads version 5's file falls back to a theta of 10000
without a word, and every logit is a little wrong; so what is written here holds both.
"""

import json
from pathlib import Path

from common.errors import UserError, writing
from common.files.json_files import read_json

# Checked here, where the file and key can be named; what a model needs, its own config checks.
_WHOLE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings")
_REAL = ("rms_norm_eps", "initializer_range")
_FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")
_TEXTS = ("model_type", "hidden_act")
MOST_LAYERS = 1000
# What an absent key means by model_type, as in transformers.
_POSITIONS = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}
_KEY_VALUE_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}  # at most all; Llama: all
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")

def read_config(path):
    """The config.json of folder `path` as a dict, in one dialect whichever it was written in.

    It always has `rope_theta` (float) and `rope_scaling` (None, or a dict with `rope_type` and
    without theta), never `rope_parameters`. Where they are absent, `head_dim`,
    `num_key_value_heads` (null: all heads) and `max_position_embeddings` are by the family's rule:
    say, Qwen3's head_dim is 128, of the others hidden_size / num_attention_heads. Every other key
    is as in the file. Raises UserError for a file that is missing or broken, and for values of a
    wrong type.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder")
    if not (path / "config.json").exists():
        adapter = (path / "adapter_config.json").exists()
        why = "an adapter, not a model: it goes with --adapter, or merge it first" if adapter else (
            "no config.json here, so this is not a model folder")
        raise UserError(f"{path}: {why}")
    return _normalise(read_json(path / "config.json"), path / "config.json")


def write_config(config, path, dtype):
    """Write config.json into folder `path` so that transformers 4 and 5 both read it rightly.

    `config` is what `read_config` gave, `dtype` (a torch.dtype or its name) what the weights are
    stored in.
    """
    file = Path(path) / "config.json"
    config = _normalise(config, file)
    name = str(dtype).removeprefix("torch.")
    scaling = config["rope_scaling"]
    rope = {"rope_type": "default", **(scaling or {}), "rope_theta": config["rope_theta"]}
    config |= {"rope_parameters": rope, "dtype": name, "torch_dtype": name}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    with writing(file):
        file.write_text(text, encoding="utf-8")


def _normalise(config, file):
    """Check the types of `config` and bring it into the one form that `read_config` promises."""
    config = dict(config)
    for key in _WHOLE:
        _check(config, key, file, "a positive whole number", _is_whole)
    for key in _REAL:
        _check(config, key, file, "a positive number", _is_real)
    for key in _FLAGS:
        _check(config, key, file, "true or false", lambda value: isinstance(value, bool))
    for key in _TEXTS:
        _check(config, key, file, "text", lambda value: isinstance(value, str))

    if (config.get("num_hidden_layers") or 0) > MOST_LAYERS:  # it would take for ever to make them
        raise UserError(f"{file}: num_hidden_layers must be at most {MOST_LAYERS}")
    ropes = [config.pop("rope_parameters", None), config.get("rope_scaling")]
    for rope in ropes:
        if rope is not None and not isinstance(rope, dict):
            raise UserError(f"{file}: rope_scaling must be null or an object, not {rope!r}")
    if any(isinstance(value, dict) for rope in ropes for value in (rope or {}).values()):
        raise UserError(f"{file}: rope_parameters that differ between layers are not supported")
    thetas = [rope["rope_theta"] for rope in (*ropes, config)
              if rope and rope.get("rope_theta") is not None]
    scalings = [_scaling(rope, file) for rope in ropes if rope]
    for name, values in (("rope_theta", thetas), ("RoPE scaling", scalings)):
        if any(value != values[0] for value in values):  # edited in one dialect only
            raise UserError(
                f"{file}: two different values of {name}: {values[0]} and {values[-1]};"
                " rope_parameters, rope_scaling and rope_theta must agree")
    config["rope_theta"] = thetas[0] if thetas else 10000.0
    _check(config, "rope_theta", file, "a positive number", _is_real)
    config["rope_theta"] = float(config["rope_theta"])
    config["rope_scaling"] = scalings[0] if scalings else None

    family = config.get("model_type")
    if family in _POSITIONS:
        config.setdefault("max_position_embeddings", _POSITIONS[family])
    width, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if heads and config.get("num_key_value_heads") is None:
        null = "num_key_value_heads" in config
        config["num_key_value_heads"] = heads if null else min(
            heads, _KEY_VALUE_HEADS.get(family, heads))
    if config.get("head_dim") is None and width and heads:
        if family == "qwen3":
            config["head_dim"] = 128
        elif width % heads == 0:
            config["head_dim"] = width // heads
        else:
            raise UserError(
                f"{file}: no head_dim, and hidden_size {width} is not a multiple of"
                f" num_attention_heads {heads}")
    return config


def _scaling(rope, file):
    """One RoPE entry of either dialect without its theta; None if it changes nothing."""
    rest = {key: value for key, value in rope.items() if key not in ("rope_theta", "type")}
    rest["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    if rest.get("partial_rotary_factor") == 1:
        del rest["partial_rotary_factor"]
    if rest["rope_type"] == "llama3":
        for key in _LLAMA3:
            rest.setdefault(key, None)  # so that a missing one is refused too
            if rest[key] is None or not _is_real(rest[key]):
                raise UserError(
                    f"{file}: RoPE type llama3 needs a positive number {key}, not {rest[key]!r}")
    return None if rest == {"rope_type": "default"} else rest


def _check(config, key, file, kind, accepts):
    if config.get(key) is not None and not accepts(config[key]):
        raise UserError(f"{file}: {key} must be {kind}, not {config[key]!r}")


def _is_whole(value):
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def _is_real(value):
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 < value < float("inf")
