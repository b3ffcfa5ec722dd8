"""Merge an adapter into its base model: a folder that needs neither adapter nor this project.

    python chapter-02/merge.py --adapter runs/chapter-02/001/final --out merged

The sum W + ΔW is formed in float32 and rounded once, to --dtype. bfloat16 keeps 8 significant bits
of it, and ΔW is small beside W, so much of ΔW can be lost; the report says how much. Needs 4 bytes
of main memory per parameter.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from common import hub
from common.adapters import merging
from common.adapters.peft import load_adapter
from common.errors import run_main
from generate import load_model
import lora
from lora import adapter_modules, delta_weight, merged_weight


@torch.no_grad()
def merge_into(model, dtype):
    """Replace each adapter layer of `model` by its base with the merged weight, in place.

    Every parameter is then rounded to `dtype`, in float32 storage. Returns, by the layer's dotted
    name, two squared Frobenius norms: of ΔW, and of what the rounding adds to it.
    """
    norms = {}
    for name, module in list(adapter_modules(model)):
        merged = merged_weight(module)
        error = merged.to(dtype).float() - merged  # also the error of ΔW, as W itself is exact
        norms[name] = [x.double().square().sum().item() for x in (delta_weight(module), error)]
        module.base.weight.copy_(merged)
        model.set_submodule(name, module.base)
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
    return norms


def merge(adapter, out, model=None, dtype="auto"):
    """Write folder `out`: the base model with the adapter of folder `adapter` merged into it.

    `model` is the base, if not the one that the adapter names; `dtype` is what to store (auto: the
    dtype in the base's config.json). Returns `merging.report`, which compares the merged model with
    the adapter in float32. Raises UserError if `out` exists or anything is wrong with a file.
    """
    merging.check_new(out)
    adapter = hub.resolve(adapter, "--adapter")
    network, base = load_model(model, "cpu", torch.float32, adapter)
    dtype = merging.stored_dtype(dtype, base)
    load_adapter(network, adapter, lora)
    pack = merging.sample(network, adapter, base)
    with torch.no_grad():
        before = network(**pack)
        norms = merge_into(network, dtype)
        report = merging.report(dtype, norms, before, network(**pack))
    merging.save(network, dtype, out, adapter, base)
    return report


def main(argv=None):
    options = merging.flags(__doc__).parse_args(argv)
    merging.show(merge(options.adapter, options.out, options.model, options.dtype), options.out)


if __name__ == "__main__":
    run_main(main)
