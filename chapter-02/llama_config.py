"""The config of chapter 2's decoder: what separates the families, and what is refused.

Llama, Mistral, Qwen3 and Qwen2.5 differ in `qk_norm`, in biases, in `windows`, `rope_scaling`,
`head_dim` and `tie_word_embeddings`. Other families are refused, and so is what these can have and
this file does not compute (NOT_SUPPORTED). Keys that neither mentions are not looked at."""

import math
from dataclasses import dataclass

import torch

from common.files.config import model_fields, read_fields, read_windows

# Why other families are refused, by model_type or by a field of their config.json.
REASONS = {
    **dict.fromkeys(("smollm3", "gemma3_text", "phi3", "qwen3_moe", "qwen3_5", "qwen3_5_text"),
                    "; a change in tests/extensions/ adds it (README.md, Extending)"),
    "vision_config": "; its vision tower (vision_config) sees images, and text is trained here",
    "attn_logit_softcapping": "; PyTorch's attention has no attn_logit_softcapping"}
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


# --- rope_scaling: a model goes on to longer documents, its rotations slowed down by `factor` ---

@dataclass(frozen=True)
class LinearScaling:
    """All pairs are slowed down (position interpolation, arXiv 2306.15595)."""

    factor: float
    attention_factor = 1.0  # of cos and sin

    def kept(self, periods, theta):
        """How much of its speed each pair keeps, 1 to 0, from `periods` (d/2,), tokens per radian,
        and rope_theta. What is not kept is divided by `factor`."""
        return 0.0


@dataclass(frozen=True)
class Llama3Scaling:
    """Pairs that make many turns within the original length tell near positions apart and keep
    their speed, those that make few do not, and in between it is blended (Llama 3.1)."""

    factor: float
    low_freq_factor: float  # turns
    high_freq_factor: float
    original_max_position_embeddings: int
    attention_factor = 1.0

    def kept(self, periods, theta):
        turns = self.original_max_position_embeddings / (2 * math.pi * periods)
        low, high = self.low_freq_factor, self.high_freq_factor
        return ((turns - low) / (high - low)).clamp(0, 1)


@dataclass(frozen=True)
class YarnScaling:
    """The same, but blended by a pair's number, not by its turns, from one whole number to another.
    And attention is sharper: cos and sin are multiplied by 0.1 ln(factor) + 1, if config.json does
    not say by what (YaRN, arXiv 2309.00071, section 3)."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0  # turns
    beta_slow: float = 1.0
    attention_factor: float = 1.0

    def kept(self, periods, theta):
        pairs, length = len(periods), self.original_max_position_embeddings / (2 * math.pi)
        first = max(math.floor(pairs * math.log(length / self.beta_fast, theta)), 0)
        last = min(math.ceil(pairs * math.log(length / self.beta_slow, theta)), 2 * pairs - 1)
        numbers = torch.arange(pairs, device=periods.device)
        return 1 - ((numbers - first) / (last - first or 0.001)).clamp(0, 1)


SCALINGS = {"linear": LinearScaling, "llama3": Llama3Scaling, "yarn": YarnScaling}


def read_scaling(scaling):
    """What config.json's `rope_scaling` (or null) asks for; ValueError names what is wrong."""
    if scaling is None:
        return None
    kind = SCALINGS.get(scaling.get("rope_type"))
    if kind is None:
        raise ValueError(f"rope_scaling={scaling!r} is not supported here: only"
                         f" {', '.join(SCALINGS)} are")
    values = read_fields(kind, scaling, "rope_scaling.")
    for name in scaling.keys() - values.keys() - {"rope_type"}:
        raise ValueError(f"rope_scaling.{name} is not supported here")
    for low, high in ("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast"):
        if low in values and values[high] <= values[low]:
            raise ValueError(f"rope_scaling.{high} is not above {low}")
    if kind is YarnScaling and "attention_factor" not in scaling:
        values["attention_factor"] = 0.1 * math.log(max(values["factor"], 1)) + 1
    return kind(**values)


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
    rope_scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None
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
            why = [REASONS[key] for key in REASONS if key == family or config.get(key)][:1]
            known = ", ".join(FAMILIES)
            raise ValueError(f"model_type={family!r} is none of {known}{''.join(why)}")
        for name, value in FAMILIES[family].items():
            if config.get(name) not in (value, None):
                raise ValueError(f"{name}={config[name]!r} is not supported here in a {family}")
        bias = config.get("attention_bias") or False
        config = {**config, "attention_bias": bias, "qkv_bias": bool(bias),
                  "mlp_bias": config.get("mlp_bias") or False, **FAMILIES[family]}
        values = model_fields(cls, config, NOT_SUPPORTED)
        return cls(**values, rope_scaling=read_scaling(config.get("rope_scaling")),
                   windows=read_windows(config))
