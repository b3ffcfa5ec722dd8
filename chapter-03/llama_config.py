# Copied from chapter-02/llama_config.py (whole file)
"""The config of chapter 2's decoder: what separates the families, and what is refused.

Five fields tell Llama, Qwen3 and Qwen2.5 apart: `qk_norm`, `qkv_bias`, `rope_scaling`, `head_dim`
and `tie_word_embeddings`. Other families are refused, and so is what these families can have and
this file does not compute (NOT_SUPPORTED). Keys that neither mentions are not looked at."""

from dataclasses import dataclass

from common.files.config import model_fields, read_fields

# The two fields that config.json does not contain, by its model_type. Mistral is Llama once its
# sliding window is off. (`attention_bias` is something else: it gives o_proj a bias too.)
FAMILIES = {
    "llama": {"qk_norm": False, "qkv_bias": False},
    "mistral": {"qk_norm": False, "qkv_bias": False},
    "qwen2": {"qk_norm": False, "qkv_bias": True},
    "qwen3": {"qk_norm": True, "qkv_bias": False},
}
# Fields of config.json that change the maths and that this file does not implement, each with
# the values that leave it out.
NOT_SUPPORTED = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0, None),
    "partial_rotary_factor": (1, None),
    "pretraining_tp": (1, None),
    "use_sliding_window": (False, None),
}


@dataclass(frozen=True)
class RopeScaling:
    """rope_scaling of rope_type "llama3"; `rotary_tables` says what it does."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    @classmethod
    def from_dict(cls, scaling):
        """Take the fields from config.json's `rope_scaling`; ValueError if it is another kind."""
        if scaling.get("rope_type") != "llama3":
            raise ValueError(f"rope_scaling={scaling!r} is not supported here: only llama3 is")
        values = read_fields(cls, scaling, "rope_scaling.")
        for name in scaling.keys() - values.keys() - {"rope_type"}:
            raise ValueError(f"rope_scaling.{name} is not supported here")
        if values["high_freq_factor"] <= values["low_freq_factor"]:
            raise ValueError("rope_scaling.high_freq_factor is not above low_freq_factor")
        return cls(**values)


# Changed from chapter-01: qk_norm, qkv_bias and rope_scaling, which are fixed in Qwen3.
@dataclass(frozen=True)
class LlamaConfig:
    """The fields of a config.json that this model uses; two of them follow from FAMILIES."""

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
    rope_scaling: RopeScaling | None = None
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
        # A Mistral config that does not mention the window means one of 4096 tokens.
        if family == "mistral" and config.get("sliding_window", 4096) is not None:
            raise ValueError("sliding_window is not supported here: only null is")
        values = model_fields(cls, {**config, **FAMILIES[family]}, NOT_SUPPORTED)
        scaling = config.get("rope_scaling")
        return cls(**values, rope_scaling=scaling and RopeScaling.from_dict(scaling))
