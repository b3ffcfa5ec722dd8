"""What a config.json says of positions: `rope_scaling`, by which a model goes on to documents longer
than those that it was trained on at first, its rotations slowed down; and windows."""

import math
from dataclasses import dataclass

import torch

from common.files.config import read_fields


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
        return 1 - ((numbers - first) / max(last - first, 0.001)).clamp(0, 1)


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


def read_windows(config):
    """How many tokens a token of each layer sees, itself included, and None for all of them: a
    tuple. ValueError if config.json contradicts itself."""
    layers, window = config["num_hidden_layers"], config.get("sliding_window", 4096)
    if not config.get("use_sliding_window"):
        window = None
    elif window is not None and (type(window) is not int or window < 1):
        raise ValueError(f"sliding_window={window!r} is not a positive int")
    first = layers if window is None else config.get("max_window_layers", 28)
    if type(first) is not int:
        raise ValueError(f"max_window_layers={first!r} is not an int")
    kinds = config.get("layer_types") or [
        "full_attention" if i < first else "sliding_attention" for i in range(layers)]
    known = {"full_attention": None} if window is None else {
        "full_attention": None, "sliding_attention": window}
    if not isinstance(kinds, list) or len(kinds) != layers or not known.keys() >= set(kinds):
        raise ValueError(f"layer_types={kinds!r} is not {' or '.join(known)} for each layer")
    return tuple(known[kind] for kind in kinds)
