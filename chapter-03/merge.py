"""Merge an adapter into the base it was trained on, or into the original model.

    python chapter-03/merge.py --adapter runs/chapter-03/001/final --out merged
    python chapter-03/merge.py --adapter runs/chapter-03/001/final --out merged --original

An adapter trained on a four-bit base fits its rounding errors too: merged into that base,
dequantised, it gives the trained model; into the original weights, another (see the report)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from common import hub, weights
from common.adapters import merging
from common.adapters.peft import load_adapter
from common.errors import UserError, run_main
from bnb_files import is_bnb, save_bnb
import lora
from modeling_llama import Linear
from nf4 import NF4Linear, dequantize_nf4, quantize_nf4
from quantized_model import BASES, load_model


def dequantize(network):
    """Replace each `NF4Linear` by a float32 layer with its dequantised weight."""
    for name, layer in list(network.named_modules()):
        if isinstance(layer, NF4Linear):
            dense = Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            dense.weight = torch.nn.Parameter(layer.weight.float(), requires_grad=False)
            dense.bias = layer.bias
            network.set_submodule(name, dense)


def quantize_anew(network, dtype, double_quant):
    """Merge within the decoder and quantise anew, what is not NF4 from `dtype`. Gives norms as
    `merging.merge_into` does, and the share of ΔW that is left: the change projected on ΔW."""
    norms, left = {}, 0.0
    for name, module in list(lora.adapter_modules(network.model)):  # not the head: it stays dense
        base, delta = module.base, module.delta()
        if not isinstance(base, NF4Linear):
            base = NF4Linear(quantize_nf4(base.weight.to(dtype), double_quant), base.bias)
        quantized = quantize_nf4(module.merged().to(base.dtype), double_quant)
        change = dequantize_nf4(quantized).float() - base.weight.float()
        norms[f"model.{name}"] = [x.double().square().sum().item() for x in (delta, change - delta)]
        left += (change * delta).double().sum().item()
        network.model.set_submodule(name, NF4Linear(quantized, base.bias))
    for name, layer in list(network.model.named_modules()):
        if isinstance(layer, Linear):
            quantized = quantize_nf4(layer.weight.to(dtype), double_quant)
            network.model.set_submodule(name, NF4Linear(quantized, layer.bias))
    return norms, left / (sum(squared for squared, _ in norms.values()) or 1)


# Changed from chapter-02: two bases to choose from, and quantising anew.
@torch.no_grad()
def merge(adapter, out, model=None, dtype="auto", original=False, trained_on="auto",
          requantize=False):
    """Write folder `out`: the base model with the adapter of folder `adapter` merged into it.

    As chapter 2's, but into the base as it was in training, dequantised, or the `original` weights;
    the rest as the flags. Adds to `merging.report` the `choices`, the largest logit difference by
    base, and `left`, the share of ΔW after quantising, or None."""
    merging.check_new(out)
    adapter = hub.resolve(adapter, "--adapter")

    def load(kind):
        network, base = load_model(model, "cpu", torch.float32, adapter, kind)
        load_adapter(network, adapter, lora)
        return network, base

    network, base = load(trained_on)
    quantised = [layer for layer in network.modules() if isinstance(layer, NF4Linear)]
    double_quant = any(layer.absmax2 is not None for layer in quantised)
    only = is_bnb(weights.read_config(base))
    if only and original:
        raise UserError(f"{base} is quantised and does not hold the original weights: give them"
                        " with --model, and say --trained-on nf4 or nf4-double")
    anew = dtype == "nf4"
    kept = merging.stored_dtype("auto" if anew else dtype, base)
    pack = merging.sample(network, adapter, base)
    before, choices, left = network(**pack), {}, None
    for choice in [original] if only or not quantised else [not original, original]:
        network = quantised = None  # one at a time
        network, _ = load("none" if choice else trained_on)
        norms = {}
        if anew and choice == original:
            norms, left = quantize_anew(network, kept, double_quant)
        else:
            dequantize(network)
        norms |= merging.merge_into(network, kept, lora)
        report = merging.report(dtype if anew else kept, norms, before, network(**pack))
        name = "original weights" if choice else "base it was trained on"
        choices[name] = report["logit_difference"]
    if anew and not requantize:
        raise UserError(f"--dtype nf4: of what the adapter has learned {left:.1%} would survive"
                        " quantising anew. Keep it beside its base, or merge to bfloat16; if you"
                        " want it all the same, say --requantize")
    merging.save(network, kept, out, adapter, base, save_bnb if anew else weights.save_weights)
    return report | {"choices": choices, "left": left}


# Changed from chapter-02: the base that is merged into.
def main(argv=None):
    parser = merging.flags(__doc__, "nf4")
    add = parser.add_argument
    add("--original", action="store_true", help="merge into the model's own weights, not into the "
        "quantised ones that the adapter was trained on")
    add("--trained-on", default="auto", choices=("auto", *BASES), help="how the base was kept when "
        "the adapter was trained (default: as its file says)")
    add("--requantize", action="store_true", help="needed with --dtype nf4: quantise the merged "
        "weights anew, though most of a small change is lost")
    options = parser.parse_args(argv)
    if options.requantize and options.dtype != "nf4":
        raise UserError("--requantize is for --dtype nf4")
    report = merge(**vars(options))
    more = [f"  merged into the {name:<22} {error:9.2e}"
            for name, error in report["choices"].items()]
    if options.requantize:
        more.append(f"{report['left']:.1%} of ΔW survived quantising anew")
    merging.show(report, options.out, more)


if __name__ == "__main__":
    run_main(main)
