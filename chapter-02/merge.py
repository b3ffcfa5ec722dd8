"""Merge an adapter into its base model: a folder that needs neither adapter nor this project.

    python chapter-02/merge.py --adapter runs/chapter-02/001/final --out merged

The sum W + ΔW is formed in float32 and rounded once, to --dtype. bfloat16 keeps 8 bits of it, and
ΔW is small beside W, so that much of ΔW can be lost; the report says how much. Needs 4 bytes of
main memory per parameter.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from common import hub, runs, weights
from common.data.chat import Chat
from common.errors import UserError, run_main
from common.files.commit import commit
from common.files.manifest import MARK
from common.options import Parser
from base_model import load_model
from lora import adapter_modules, delta_weight, merged_weight
from merge_report import compared, show, summary
from packing import packed_sequence_collate_fn
from peft_files import load_adapter

SAMPLE = "List three colours, the days of the week, and what 12 plus 30 is."


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


def merge(adapter, out, model=None, dtype="auto"):
    """Write folder `out`: the base model with the adapter of folder `adapter` merged into it.

    `model` is the base, if not the one that the adapter names; `dtype` is what to store (auto: as
    config.json says of the base). Returns a report: `dtype`; `layers`, the error of the realised
    ΔW relative to ΔW (0: all of it survived the rounding; 1: as far off as no adapter at all) by
    layer name; `total`, the same over all layers; `delta`, the Frobenius norm of all ΔW; and on
    a sample prompt `logit_difference`, the largest between the adapter in float32 and the merged
    model, beside `largest_logit`, and at how many of its `tokens` the likeliest next token is
    another, `tokens_changed`. Raises UserError if `out` exists or a file has anything wrong.
    """
    check_new(out)
    adapter = hub.resolve(adapter, "--adapter")
    network, base = load_model(model, "cpu", torch.float32, adapter)
    dtype = stored_dtype(dtype, base)
    load_adapter(network, adapter)
    pack = sample(network, adapter, base)
    with torch.no_grad():
        before = network(**pack)
        norms = merge_into(network, getattr(torch, dtype))
        after = network(**pack)
    save(network, getattr(torch, dtype), out, adapter, base)
    return {"dtype": dtype, **summary(norms), **compared(before, after)}


def check_new(out):
    """Raise UserError if there is anything at path `out`."""
    if os.path.lexists(out):
        raise UserError(f"{out} is there already, and nothing is written over: choose another")


def stored_dtype(dtype, base):
    """The name of the dtype to store: `dtype`, or for "auto" that of the model in folder `base`."""
    if dtype == "auto":
        config = weights.read_config(base)
        dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    if dtype not in ("bfloat16", "float16", "float32"):
        raise UserError(f"{base / 'config.json'}: dtype {dtype!r} is unknown here: give --dtype")
    return dtype


def tokenizer_folders(adapter, base):
    """The folders with tokenizer files; the adapter may know more tokens, or another template."""
    return [base, adapter] if (adapter / "tokenizer.json").is_file() else [base]


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


def save(network, dtype, out, adapter, base):
    """Commit folder `out`: the model in `dtype`, and the tokenizer's files."""
    def write(folder):
        weights.save_weights(network, weights.read_config(base), folder, dtype, MARK)
        for source in tokenizer_folders(adapter, base):  # the second over the first
            weights.copy_tokenizer(source, folder)
        Chat.load(source).save(folder)

    size = sum(p.numel() for p in network.parameters()) * dtype.itemsize
    commit(Path(out), write, extra={"merged_from": str(adapter)}, bytes_needed=size)


def main(argv=None):
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--adapter", required=True, help="the adapter's folder, or a Hub id")
    parser.add_argument("--out", required=True, help="the folder to write; must not exist")
    parser.add_argument("--model", help="the base model (default: the one the adapter names)")
    parser.add_argument("--dtype", default="auto", help="what to store (default: as the base)",
                        choices=("auto", "bfloat16", "float16", "float32"))
    options = parser.parse_args(argv)
    show(merge(options.adapter, options.out, options.model, options.dtype))
    print(f"wrote {options.out}: a Hugging Face model folder\n"
          + runs.how_to_ask("model", options.out))


if __name__ == "__main__":
    run_main(main)
