"""Merge an adapter into its base model: a folder that needs neither adapter nor this project.

    python chapter-02/merge.py --adapter runs/chapter-02/001/final --out merged

W + ΔW is formed in float32, 4 bytes of memory per parameter, and rounded once, to --dtype. bfloat16
keeps 8 significant bits, and ΔW is small beside W: much of it can be lost, as the report says."""

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


@torch.no_grad()
def merge(adapter, out, model=None, dtype="auto"):
    """Write folder `out`: the base model with the adapter of folder `adapter` merged into it.

    `model` and `dtype` are as the flags. Returns `merging.report`, which compares the merged model
    with the adapter in float32. UserError if `out` exists or anything is wrong with a file."""
    merging.check_new(out)
    adapter = hub.resolve(adapter, "--adapter")
    network, base = load_model(model, "cpu", torch.float32, adapter)
    dtype = merging.stored_dtype(dtype, base)
    load_adapter(network, adapter, lora)
    pack = merging.sample(network, adapter, base)
    before = network(**pack)
    norms = merging.merge_into(network, dtype, lora)
    report = merging.report(dtype, norms, before, network(**pack))
    merging.save(network, dtype, out, adapter, base)
    return report


def main(argv=None):
    options = merging.flags(__doc__).parse_args(argv)
    merging.show(merge(**vars(options)), options.out)


if __name__ == "__main__":
    run_main(main)
