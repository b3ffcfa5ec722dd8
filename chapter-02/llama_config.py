"""The config of chapter 2's decoder: what separates the families, and what is refused.

Llama, Mistral, Qwen3 and Qwen2.5 differ in `qk_norm`, in biases, in `windows`, `rope_scaling`,
`head_dim` and `tie_word_embeddings`. Other families are refused, and so is what these can have and
this file does not compute (NOT_SUPPORTED). Keys that neither mentions are not looked at."""

from dataclasses import dataclass

from common.files.config import model_fields
from common.files.positions import read_scaling, read_windows

# What a family fixes, by its model_type: config.json need not say it, and must not deny it.
# (`attention_bias` is more than `qkv_bias`: it gives o_proj a bias too.)
FAMILIES = {
    "llama": {"qk_norm": False, "use_sliding_window": False},
    "mistral": {"qk_norm": False, "attention_bias": False, "mlp_bias": False,
                "use_sliding_window": True, "max_window_layers": 0, "layer_types": None},
    "qwen2": {"qk_norm": False, "qkv_bias": True, "attention_bias": False, "mlp_bias": False},
    "qwen3": {"qk_norm": True, "mlp_bias": False},
}
# Fields of config.json that change the maths and that this file does not implement, each with
# the values that leave it out.
NOT_SUPPORTED = {
    "hidden_act": ("silu",),
    "attention_dropout": (0, None),
    "partial_rotary_factor": (1, None),
    "pretraining_tp": (1, None),
}


# Changed from chapter-01: norms, biases, windows and scaling, which are fixed in Qwen3.
@dataclass(frozen=True)
class LlamaConfig:
    """The fields of a config.json that this model uses, and what follows from FAMILIES."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    qk_norm: bool
    qkv_bias: bool
    rope_theta: float
    windows: tuple  # how many tokens a token of each layer sees; None: all of them
    rope_scaling: object = None  # one of `SCALINGS`, see common/files/positions.py
    attention_bias: bool = False
    mlp_bias: bool = False
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    @classmethod
    def from_dict(cls, config):
        """Take the fields from `config`, as `common.weights.read_config` gives it. ValueError names
        a field that is missing, has a wrong type, or asks for what this file does not compute."""
        family = config.get("model_type")
        if family not in FAMILIES:
            raise ValueError(f"model_type={family!r} is none of {', '.join(FAMILIES)}")
        for name, value in FAMILIES[family].items():
            if config.get(name) not in (value, None):
                raise ValueError(f"{name}={config[name]!r} is not supported here in a {family}")
        bias = config.get("attention_bias") or False
        config = {**config, "attention_bias": bias, "qkv_bias": bool(bias),
                  "mlp_bias": config.get("mlp_bias") or False, **FAMILIES[family]}
        values = model_fields(cls, config, NOT_SUPPORTED)
        return cls(**values, rope_scaling=read_scaling(config.get("rope_scaling")),
                   windows=read_windows(config))
