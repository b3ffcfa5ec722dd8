"""Ask a model, an adapter or a merged model something: one or more prompts, or a conversation.

    python chapter-02/generate.py --model runs/chapter-02/001/final --prompt "Reverse: cat"
    python chapter-02/generate.py --adapter runs/chapter-02/001/final --compare --prompt "..." "..."
    python chapter-02/generate.py --model meta-llama/Llama-3.2-1B-Instruct --chat

What is new since chapter 1 is the cache of keys and values (common/asking/kv_cache.py): the prompts
are computed once, in one pack; after that every step computes one token per document."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from common import hub, weights
from common.adapters import peft
from common.asking import terminal
from common.errors import located, run_main
import lora
from modeling_llama import LlamaConfig, LlamaForCausalLM


def load_model(name, device, dtype, adapter=None):
    """(model, its folder), the weights in `dtype`, ready to be asked. Without a `name` it is the
    model that the adapter in folder `adapter` was trained on."""
    folder = hub.resolve(name or peft.base_model_name(adapter))
    if adapter and "nf4" in peft.metadata(adapter).get("trained_on", ""):
        print(f"warning: {adapter} was fitted to a four-bit base, rounding errors included, and"
              " this base does not have them: python chapter-03/generate.py asks it as it was"
              " trained", file=sys.stderr)
    with located(folder / "config.json"):
        config = LlamaConfig.from_dict(weights.read_config(folder))
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to(dtype).to_empty(device=device)
    weights.load_weights(model, folder)
    model.compute_dtype = dtype
    return model.eval(), folder


def main(argv=None):
    terminal.run(__doc__, argv, load_model, lora)


if __name__ == "__main__":
    run_main(main)
