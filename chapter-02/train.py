"""Fine-tune Llama, Qwen3 or Qwen2.5: one of the LoRA family, or every weight (--method full).

    python chapter-02/train.py                                  the embedded tiny model, new skills
    python chapter-02/train.py --model Qwen/Qwen3-0.6B --data my.jsonl --method dora --rank 8
    torchrun --nproc-per-node 8 chapter-02/train.py ...         the same on eight GPUs

The loop is chapter 1's. What a method adds lies in lora.py and is called at four places here:
`apply_adapter`, `optimizer_groups`, `before_step`, `after_step`.
"""

import math
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

from common import checkpoint, cli, distributed, guard, hub, predict, prepare, presets, runs, weights
from common.errors import named
from common.metrics import Metrics
from generate import generate
from lora import (METHODS, AdapterConfig, after_step, apply_adapter, before_step, optimizer_groups,
                  state_names)
from modeling_llama import LlamaConfig, LlamaForCausalLM
from packing import IGNORE, PackSampler, packed_sequence_collate_fn
from peft_files import save_result

CHAPTER = "02"
# What `auto` sets for the embedded model and data; and for everything else. A learning rate
# depends on the method: VeRA's two vectors per layer want a far higher one than whole matrices.
TINY = {"lr": {"full": 1e-3, "vera": 3e-2, "default": 5e-3}, "warmup": 20, "steps": 300,
        "batch_tokens": 2048, "rank": 8, "alpha": 16.0, "eval_every": 100, "save_every": 100}
REAL = {"lr": {"full": 1e-5, "vera": 2e-3, "default": 2e-4}, "warmup": 20, "rank": 16,
        "alpha": 32.0}


@dataclass
class Options(cli.Options):
    """Chapter 1's options, and those of the adapters: the fields of `lora.AdapterConfig`."""

    method: str = cli.option("lora", "what is trained", choices=tuple(METHODS))
    rank: int = cli.option(None, "r, the rank of an adapter", int, least=1)
    alpha: float = cli.option(None, "α; the adapter's product is scaled by α/r, rsLoRA's by α/√r",
                              float, least=0)
    dropout: float = cli.option(0.0, "share of the adapter's input that is dropped", float, least=0)
    target_modules: str = cli.option("all-linear", "which linear layers are adapted: all-linear, "
                                     "names such as q_proj,v_proj, or a regular expression")
    lr_ratio: float = cli.option(16.0, "lora+: B's learning rate over A's", float, least=0)
    project_gradient: bool = cli.option(True, "lora-fa: B's gradient as the second version of the "
                                        "paper has it", bool)
    delta_ratio: float = cli.option(1.0, "delta-lora: λ, the share of the product's change that "
                                    "goes into W", float, least=0)
    delta_start: int = cli.option(100, "delta-lora: steps before W begins to move", int, least=0)
    vera_d: float = cli.option(0.1, "vera: first value of the vector d", float)


# Copied from chapter-01/train.py
def learning_rate(step, total, options):
    """The learning rate of step 1 … total: a linear warm-up, then --schedule, down to --min-lr."""
    if step <= options.warmup:
        return options.lr * step / options.warmup
    done = (step - options.warmup) / max(1, total - options.warmup)  # (0, 1]
    share = {
        "constant": 1.0,
        "linear": 1 - done,
        "cosine": (1 + math.cos(math.pi * done)) / 2,
        "wsd": min(1.0, (1 - done) / 0.2),
    }[options.schedule]
    return options.min_lr + share * (options.lr - options.min_lr)


# Copied from chapter-01/train.py
def loss_sum(model, pack):
    """Sum of the cross-entropies of a pack's labelled tokens, float32; 0 if it has none."""
    inputs = {name: value for name, value in pack.items() if name != "labels"}
    logits = model(**inputs).float()  # (T, V): a softmax over V classes needs float32
    return F.cross_entropy(logits, pack["labels"], ignore_index=IGNORE, reduction="sum")


# Copied from chapter-01/train.py
def to_device(pack, device):
    """The same pack with its tensors on `device`."""
    return {name: value.to(device, non_blocking=True) if torch.is_tensor(value) else value
            for name, value in pack.items()}


# Copied from chapter-01/train.py
@torch.no_grad()
def evaluate(model, dataset, options):
    """Mean loss per labelled token of `dataset`. Every rank computes the whole of it."""
    sampler = PackSampler(dataset.lengths, options.batch_tokens, seed=None)
    total, targets = 0.0, 0
    for index in range(sampler.packs_in(1)):
        pack = packed_sequence_collate_fn([dataset[i] for i in sampler.pack(index)])
        targets += int((pack["labels"] != IGNORE).sum())
        total += loss_sum(model, to_device(pack, options.device)).item()
    return total / max(1, targets)
