"""What fits on one GPU: dense training, LoRA and QLoRA, by model. Development only.

    python tests/bench/what_fits.py

From the predictor of `--dry-run` (common/predict_memory.py), on the meta device: nothing is loaded.
A pack of 2,048 tokens, bfloat16, LoRA of rank 16 on every linear layer, NF4 with double
quantisation, AdamW in float32. Each cell is the predicted peak in GiB, and in brackets the smallest
GPU that has it to spare beside CONTEXT GiB for CUDA itself; where none has, the peak on the
largest. (A larger GPU takes more tokens at a time through the loss.) Prints two Markdown tables,
without and with full activation checkpointing. A cell that was measured on a GPU is marked by its
entry in MEASURED.
"""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "chapter-03"), str(ROOT)]
from lora import AdapterConfig, apply_adapter  # noqa: E402
from loss import chunk_for  # noqa: E402
from modeling_llama import LlamaConfig, LlamaForCausalLM  # noqa: E402
from quantized_model import base_model  # noqa: E402

from common.predict import parameters  # noqa: E402
from common.predict_memory import memory  # noqa: E402
from common.weights import read_config  # noqa: E402

GPUS, CONTEXT, TOKENS = (24, 40, 80), 2, 2048
# The built-in architectures, and larger ones by what differs.
MODELS = {
    "Qwen3-0.6B": ("qwen3-0.6b", {}),
    "Llama-3.2-1B": ("llama-3.2-1b", {}),
    "Qwen3-4B": ("qwen3-8b", dict(hidden_size=2560, intermediate_size=9728,
                                  tie_word_embeddings=True)),
    "Llama-3.1-8B": ("llama-3.1-8b", {}),
    "Qwen3-8B": ("qwen3-8b", {}),
    "Qwen3-14B": ("qwen3-8b", dict(hidden_size=5120, intermediate_size=17408,
                                   num_hidden_layers=40, num_attention_heads=40)),
    "Qwen3-32B": ("qwen3-8b", dict(hidden_size=5120, intermediate_size=25600,
                                   num_hidden_layers=64, num_attention_heads=64)),
    "Llama-3.1-70B": ("llama-3.1-8b", dict(hidden_size=8192, intermediate_size=28672, head_dim=128,
                                           num_hidden_layers=80, num_attention_heads=64)),
}
KINDS = ("dense", "LoRA", "QLoRA")
# (model, kind, checkpointing): GiB that torch.cuda.max_memory_allocated gave; on an H100.
MEASURED = {("Qwen3-8B", "QLoRA", "full"): 7.49}


def build(name, kind):
    """The model on the meta device, as train.py would have it."""
    architecture, changes = MODELS[name]
    raw = {**read_config(ROOT / "common/architectures" / architecture), **changes}
    config = LlamaConfig.from_dict(raw)
    if kind == "QLoRA":
        model = base_model(config, None, torch.bfloat16, "meta", "nf4-double", "shapes")
    else:
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
    if kind != "dense":
        model = apply_adapter(model.to(torch.bfloat16), AdapterConfig(rank=16))
    return model


def cell(name, kind, checkpointing):
    """(parameters, GiB, the smallest GPU for it) of a model trained in this way."""
    model = build(name, kind)
    for gpu in GPUS:
        chunk = chunk_for(model.config.vocab_size, gpu * 2**30)
        size = sum(memory(model, TOKENS, torch.bfloat16, checkpointing=checkpointing, chunk=chunk,
                          varlen_kernel=True).values()) / 2**30
        if size + CONTEXT <= gpu:
            break
    return parameters(model)["total"], size, f"{gpu} GB" if size + CONTEXT <= gpu else "none"


def main():
    for checkpointing in ("none", "full"):
        print(f"\n--activation-checkpointing {checkpointing}\n\n| model | parameters | "
              f"{' | '.join(KINDS)} |\n|---|---|{'---|' * len(KINDS)}")
        for name in MODELS:
            cells = []
            for kind in KINDS:
                count, size, fits = cell(name, kind, checkpointing)
                measured = MEASURED.get((name, kind, checkpointing))
                mark = "" if measured is None else f", measured {measured:.1f}"
                cells.append(f"{size:.1f} ({fits}{mark})")
                base = count if kind == "dense" else base
            print(f"| {name} | {base / 1e9:.2f} B | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
