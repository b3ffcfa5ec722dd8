"""Merge an adapter into a model folder: into the base it was trained on, or into the original.

    python chapter-03/merge.py --adapter runs/chapter-03/001/final --out merged
    python chapter-03/merge.py --adapter runs/chapter-03/001/final --out merged --original

An adapter of a base of four bits has learned beside that base's errors. Merged into the
dequantised base it is the model that was trained; merged into the original weights it is another
one, and the report says how far off each is. The sum W + ΔW is formed in float32 and rounded once,
to --dtype. Needs 4 bytes of main memory per parameter.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

from common import hub, runs, weights
from common.data.chat import Chat
from common.errors import UserError, run_main
from common.files.commit import commit
from common.files.manifest import MARK
from common.options import Parser
from base_model import BASES, load_model
from bnb_files import is_bnb, save_bnb
from lora import adapter_modules, delta_weight, merged_weight
from merge_report import compared, show, summary
from modeling_llama import Linear
from nf4 import NF4Linear, dequantize_nf4, quantize_nf4
from packing import packed_sequence_collate_fn
from peft_files import load_adapter

SAMPLE = "List three colours, the days of the week, and what 12 plus 30 is."


# Copied from chapter-02/merge.py
@torch.no_grad()
def merge_into(model, dtype):
    """Replace each adapter layer of `model` by its base with the merged weight, in place.

    Every parameter is then rounded to `dtype`, in float32 storage. Returns, by the layer's dotted
    name, two squared Frobenius norms: of ΔW, and of what the rounding adds to it.
    """
    norms = {}
    for name, module in list(adapter_modules(model)):
        merged = merged_weight(module)
        error = merged.to(dtype).float() - merged  # also that of ΔW: the old W is what it was
        norms[name] = [x.double().square().sum().item() for x in (delta_weight(module), error)]
        module.base.weight.copy_(merged)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, module.base)
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
    return norms


def dequantize(network):
    """Put a float32 layer in the place of each `NF4Linear`, with the weight that it stands for."""
    for name, layer in list(network.named_modules()):
        if isinstance(layer, NF4Linear):
            dense = Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            dense.weight = nn.Parameter(layer.weight.float(), requires_grad=False)
            dense.bias = layer.bias
            network.set_submodule(name, dense)


@torch.no_grad()
def requantize(network, dtype, double_quant):
    """Merge within the layers and quantise the sums anew, from `dtype` if the base is not NF4.

    Gives norms as `merge_into` does, and by the layer's name the part of ‖ΔW‖² that is left: the
    product of ΔW and what has become of it.
    """
    norms, left = {}, {}
    for name, module in list(adapter_modules(network)):
        if not name.startswith("model.layers."):
            continue  # a head is kept dense
        base, delta = module.base, delta_weight(module)
        if not isinstance(base, NF4Linear):
            base = NF4Linear(quantize_nf4(base.weight.to(dtype), double_quant), base.bias)
        quantized = quantize_nf4(merged_weight(module).to(base.dtype), double_quant)
        change = dequantize_nf4(quantized).float() - base.weight.float()
        norms[name] = [x.double().square().sum().item() for x in (delta, change - delta)]
        left[name] = (change * delta).double().sum().item()
        network.set_submodule(name, NF4Linear(quantized, base.bias))
    for name, layer in list(network.model.layers.named_modules(prefix="model.layers")):
        if isinstance(layer, Linear):
            quantized = quantize_nf4(layer.weight.to(dtype), double_quant)
            network.set_submodule(name, NF4Linear(quantized, layer.bias))
    return norms, left


# Changed from chapter-02: two bases to choose from, and quantising anew.
def merge(adapter, out, model=None, dtype="auto", original=False, trained_on="auto",
          requantizing=False):
    """Write folder `out`: the base model with the adapter of folder `adapter` merged into it.

    `model` is the base, if not the one that the adapter names; `dtype` is what to store (auto: as
    config.json says of the base; "nf4": quantised anew, which needs `requantizing`). Merges into
    the base as it was in training, dequantised, or into the `original` weights. `trained_on`:
    "none", "nf4", "nf4-double", or "auto", what the adapter's file says.

    Returns chapter 2's report, where the adapter as it was trained is what the merged model is
    compared with, and `choices`: the largest logit difference by the base that is merged into,
    the one not chosen too. With "nf4" also `left`, the share of ΔW that quantising leaves: its
    projection on ΔW. Raises UserError if `out` exists or a file has anything wrong.
    """
    check_new(out)
    adapter = hub.resolve(adapter, "--adapter")

    def load(original):
        network, base = load_model(model, "cpu", torch.float32, adapter,
                                   "none" if original else trained_on)
        load_adapter(network, adapter)
        return network, base

    network, base = load(False)
    quantised = [layer for layer in network.modules() if isinstance(layer, NF4Linear)]
    double_quant = any(layer.absmax2 is not None for layer in quantised)
    only = is_bnb(weights.read_config(base))
    if only and original:
        raise UserError(f"{base} is quantised, the original weights are not in it: give them with"
                        " --model, and say --trained-on nf4 or nf4-double")
    kept = getattr(torch, stored_dtype("auto" if dtype == "nf4" else dtype, base))
    pack = sample(network, adapter, base)
    report = {"dtype": "nf4" if dtype == "nf4" else str(kept).removeprefix("torch."), "choices": {}}
    with torch.no_grad():
        before = network(**pack)
        for choice in [original] if only or not quantised else [not original, original]:
            network = quantised = None  # one at a time
            network, _ = load(choice)
            norms = {}
            if dtype == "nf4" and choice == original:
                norms, left = requantize(network, kept, double_quant)
                report["left"] = sum(left.values()) / (sum(d for d, _ in norms.values()) or 1)
            else:
                dequantize(network)
            norms |= merge_into(network, kept)
            report |= {**summary(norms), **compared(before, network(**pack))}
            name = "original weights" if choice else "base it was trained on"
            report["choices"][name] = report["logit_difference"]
    if dtype == "nf4" and not requantizing:
        raise UserError(f"--dtype nf4: of what the adapter has learned {report['left']:.1%} would"
                        " survive quantising anew. Keep it beside its base, or merge to bfloat16;"
                        " if that is meant, say --requantize")
    save(network, kept, out, adapter, base)
    return report


# Copied from chapter-02/merge.py
def check_new(out):
    """Raise UserError if there is anything at path `out`."""
    if os.path.lexists(out):
        raise UserError(f"{out} is there already, and nothing is written over: choose another")


# Copied from chapter-02/merge.py
def stored_dtype(dtype, base):
    """The name of the dtype to store: `dtype`, or for "auto" that of the model in folder `base`."""
    if dtype == "auto":
        config = weights.read_config(base)
        dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    if dtype not in ("bfloat16", "float16", "float32"):
        raise UserError(f"{base / 'config.json'}: dtype {dtype!r} is unknown here: give --dtype")
    return dtype


# Copied from chapter-02/merge.py
def tokenizer_folders(adapter, base):
    """The folders with tokenizer files; the adapter may know more tokens, or another template."""
    return [base, adapter] if (adapter / "tokenizer.json").is_file() else [base]


# Copied from chapter-02/merge.py
def sample(network, adapter, base):
    """A prompt as a pack, on which the model is compared before and after."""
    ids = Chat.load(tokenizer_folders(adapter, base)[-1]).encode_prompt(SAMPLE)
    ids = torch.tensor(ids[: network.config.max_position_embeddings])
    if ids.max() >= network.config.vocab_size:
        raise UserError(f"{base}: the tokenizer gives token {ids.max()}, but the model's vocabulary"
                        f" ends at {network.config.vocab_size - 1}")
    pack = packed_sequence_collate_fn([(ids, ids)])
    del pack["labels"]
    return pack


# Changed from chapter-02: NF4.
def save(network, dtype, out, adapter, base):
    """Commit folder `out`: the model in `dtype`, and the tokenizer's files."""
    def write(folder):
        quantised = any(isinstance(layer, NF4Linear) for layer in network.modules())
        write_model = save_bnb if quantised else weights.save_weights
        write_model(network, weights.read_config(base), folder, dtype, MARK)
        for source in tokenizer_folders(adapter, base):  # the second over the first
            weights.copy_tokenizer(source, folder)
        Chat.load(source).save(folder)

    size = sum(p.numel() for p in network.parameters()) * dtype.itemsize
    size += sum(buffer.nbytes for buffer in network.buffers())
    commit(Path(out), write, extra={"merged_from": str(adapter)}, bytes_needed=size)


# Changed from chapter-02: the base that is merged into.
def main(argv=None):
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--adapter", required=True, help="the adapter's folder, or a Hub id")
    add("--out", required=True, help="the folder to write; must not exist")
    add("--model", help="the base model (default: the one the adapter names)")
    add("--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32", "nf4"),
        help="what to store (default: as the base); nf4 needs --requantize")
    add("--original", action="store_true", help="merge into the model's own weights, not into the "
        "quantised ones that the adapter was trained on")
    add("--trained-on", default="auto", choices=("auto", *BASES), help="how the base was kept when "
        "the adapter was trained (default: as its file says)")
    add("--requantize", action="store_true", help="quantise the merged weights anew, though most "
        "of a small change is lost")
    options = parser.parse_args(argv)
    if options.requantize and options.dtype != "nf4":
        raise UserError("--requantize is for --dtype nf4")
    report = merge(options.adapter, options.out, options.model, options.dtype, options.original,
                   options.trained_on, options.requantize)
    show(report)
    for name, error in report["choices"].items():
        print(f"  merged into the {name:<22} {error:9.2e}")
    if options.requantize:
        print(f"{report['left']:.1%} of ΔW has survived quantising anew")
    print(f"wrote {options.out}: a Hugging Face model folder\n"
          + runs.how_to_ask("model", options.out))


if __name__ == "__main__":
    run_main(main)
