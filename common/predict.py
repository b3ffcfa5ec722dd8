"""What a run will need, worked out before it starts: parameters, FLOPs (derived in chapter 1's
README.md, after PaLM, arXiv 2204.02311, appendix B), memory."""

import re
from math import prod

import numpy as np
import torch
from torch.distributed import ReduceOp

from common.errors import UserError
from common.memory import readable_bytes
from common.predict_memory import layer_costs, linear_cost, memory
from common.ranks import all_sum, say, world_size

PACKS = (16384, 8192, 4096, 2048)  # tokens, in the order in which `fit_batch` tries them
SHARE = 0.85  # of a GPU; the rest is for CUDA, scratch space of kernels, fragmentation
# The kind of a parameter, by a part of its name; all others belong to the blocks.
KINDS = {"lora_": "adapters", "vera_": "adapters", "embed_tokens": "embedding", "lm_head": "head",
         "norm": "norms"}
SHOWN = ("blocks", "embedding", "head", "norms", "adapters")  # all kinds
# Data sheets' dense TFLOP/s: in bfloat16 with float32 sums, in float32 without tensor cores.
PEAK_TFLOPS = {
    "A100": (312, 19.5), "A800": (312, 19.5), "A30": (165, 10.3), "A40": (149.7, 37.4),
    "A10": (125, 31.2), "A10G": (70, 35), "RTX A6000": (154.8, 38.7), "L4": (121, 30.3),
    "L40": (181, 90.5), "L40S": (362, 91.6), "H100 PCIe": (756, 51), "H100 NVL": (835, 60),
    "H100": (989, 67), "H800": (989, 67), "H200 NVL": (835, 60), "H200": (989, 67),
    "GH200": (989, 67), "H20": (148, 44), "B200": (2250, 75), "RTX 3090": (71, 35.6),
    "RTX 4090": (165.2, 82.6), "RTX 5090": (209.5, 104.8), "RTX 6000 Ada": (364, 91.1),
    "MI250X": (383, 47.9), "MI300X": (1307, 163.4)}


def parameters(model):
    """Numbers in the model: dict with total, trainable, embedding, head, blocks, norms, adapters. A
    tied matrix counts once, as the embedding; a quantised weight as the weight it stands for."""
    counts = dict.fromkeys(("total", "trainable", *SHOWN), 0)
    for name, parameter in model.named_parameters():
        kind = next((kind for part, kind in KINDS.items() if part in name), "blocks")
        counts[kind] += parameter.numel()
        counts["trainable"] += parameter.numel() * parameter.requires_grad
    counts["blocks"] += sum(prod(cost.shape) for layer in model.model.layers
                            for cost in layer_costs(layer) if cost.weight is None)
    counts["total"] = sum(counts[kind] for kind in SHOWN)
    return counts


def mean_attended(lengths, window=None):
    """Σl²/Σl: the mean length of a token's document, averaged over tokens; S in the formulas. Half
    of it is what a token sees in causal attention; with a `window` so many tokens at most."""
    lengths = np.asarray(lengths, dtype=np.float64)  # squares overflow int32 from 46,341 tokens on
    seen = lengths if window is None else np.minimum(lengths, window)
    return float((seen * (2 * lengths - seen)).sum() / lengths.sum())


def flops_per_token(model, lengths):
    """FLOPs of one token of a training step: dict with matrices, head, attention, total, full. Its
    documents have these `lengths`. In `total` a token looks at half of its document on average, as
    in causal attention; in `full`, as others count, at all of it. Recomputation is left out."""
    config = model.config
    matrices = sum(cost.flops() for layer in model.model.layers for cost in layer_costs(layer))
    head = linear_cost(model.lm_head or model.model.embed_tokens).flops()
    attended = sum(mean_attended(lengths, layer.self_attn.window) for layer in model.model.layers)
    attention = 6 * config.num_attention_heads * config.head_dim * attended
    total = matrices + head + attention
    return {"matrices": matrices, "head": head, "attention": attention, "total": total,
            "full": total + attention}


def peak_flops(device, dtype):
    """Most FLOP/s of a device (a torch.device, or its PyTorch name) in `dtype`; None if unknown."""
    if isinstance(device, torch.device):
        device = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    known = [name for name in PEAK_TFLOPS if re.search(rf"\b{name}\b", device)]
    if not known or dtype not in (torch.bfloat16, torch.float32) or "Laptop" in device:
        return None
    return PEAK_TFLOPS[max(known, key=len)][dtype == torch.float32] * 1e12  # not H100, if H100 PCIe


class Prediction(dict):
    """What `costs` predicts for each rank: bytes by category at the fullest moment of a step; also
    `parameters`, `flops` of a token, `peak_flops` of all ranks (or None), `tokens` in a pack."""

    def __init__(self, categories, **known):
        super().__init__(categories)
        self.__dict__.update(known)

    @property
    def peak(self):
        return sum(self.values())

    def mfu(self, tokens_per_second, full=False):
        """Model FLOPs utilisation, 0 to 1, if known; `full` counts attention as if not causal."""
        needed = self.flops["full" if full else "total"] * tokens_per_second
        return None if self.peak_flops is None else needed / self.peak_flops

    def report(self):
        counts, flops = self.parameters, self.flops
        share = 100 * counts["trainable"] / counts["total"]
        kinds = ", ".join(f"{kind} {_short(counts[kind])}" for kind in SHOWN if counts[kind])
        return "\n".join((
            f"parameters  {_short(counts['total'])}, of which {_short(counts['trainable'])} are "
            f"trained ({share:.3g} %):\n            {kinds}",
            f"a token     {_short(flops['total'])}FLOP: layers {_short(flops['matrices'])}, head "
            f"{_short(flops['head'])}, attention {_short(flops['attention'])}",
            f"            (counted as if not causal: {_short(flops['full'])}FLOP)",
            f"memory      predicted peak {readable_bytes(self.peak)} with {self.tokens} tokens in "
            "a pack:",
            *(f"            {readable_bytes(size):>10}  {name}"
              for name, size in sorted(self.items(), key=lambda item: -item[1]) if size)))


def costs(model, lengths, options, chunk=None):
    """The `Prediction` for a step of `model` on documents of these lengths, `options` being the
    run's. For `model` and `chunk` see `memory`."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    compiled = getattr(options, "compile", False)  # packs are then padded to batch_tokens
    tokens = options.batch_tokens if compiled else int(min(options.batch_tokens, np.sum(lengths)))
    sizes = memory(
        model, tokens, dtype, grad_accum=options.grad_accum, chunk=chunk, ranks=world_size(),
        checkpointing=getattr(options, "activation_checkpointing", "none"), compiled=compiled,
        varlen_kernel=device.type == "cuda" and dtype != torch.float32)
    peak = peak_flops(device, dtype)
    return Prediction(sizes, parameters=parameters(model), tokens=tokens,
                      flops=flops_per_token(model, lengths),
                      peak_flops=None if peak is None else peak * world_size())


def fit_batch(options, model, chunk=None, beside=0, documents=1):
    """Choose --batch-tokens on a GPU if it was not given, and say so: the largest of PACKS whose
    predicted peak and `beside` bytes take at most SHARE of its memory. --grad-accum keeps a step's
    tokens. UserError if not even `documents` of the longest fit."""
    if options.batch_tokens is not None:
        return
    total = torch.cuda.get_device_properties(options.device).total_memory
    has = all_sum(torch.tensor(total), ReduceOp.MIN).item()  # of the smallest GPU
    most = min(documents * min(options.max_seq_len, model.config.max_position_embeddings), PACKS[0])
    packs_of_most = options.grad_accum
    for tokens in PACKS:
        options.batch_tokens, options.grad_accum = tokens, packs_of_most * PACKS[0] // tokens
        peak = costs(model, [tokens], options, chunk).peak + beside
        if peak <= SHARE * has or tokens // 2 < max(most, PACKS[-1]):
            break
    if peak > SHARE * has:
        raise UserError(
            f"packs of {tokens} tokens need {readable_bytes(peak)}, over {SHARE:.0%} of the GPU's"
            f" {readable_bytes(has)}: chapter 3 needs less, with --method lora on its base of four"
            " bits, or with --activation-checkpointing full; or take a smaller --model or"
            " --max-seq-len, or set --batch-tokens yourself")
    say(f"--batch-tokens {tokens} --grad-accum {options.grad_accum}: predicted peak "
        f"{readable_bytes(peak)} of the GPU's {readable_bytes(has)}")


def _short(number):
    """1234567 -> 1.23 M."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:.4g} "
