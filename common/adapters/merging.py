"""What surrounds a merge: its flags, a prompt to compare on, what was lost, the folder written."""

import os
from pathlib import Path

import torch

from common import runs, weights
from common.adapters.peft import tokenizer_folders
from common.data.chat import Chat
from common.errors import UserError
from common.files.checkpoint import MARK, commit
from common.options import Parser

SAMPLE = "List three colours, the days of the week, and what 12 plus 30 is."
DTYPES = ("bfloat16", "float16", "float32")


def flags(doc, *more_dtypes):
    """A Parser with the flags of every chapter's merge.py, whose docstring is `doc`."""
    parser = Parser(description=doc.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--adapter", required=True, help="the adapter's folder, or a Hub id")
    parser.add_argument("--out", required=True, help="the folder to write; must not exist")
    parser.add_argument("--model", help="the base model (default: the one the adapter names)")
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPES, *more_dtypes),
                        help="what to store (default: as the base)")
    return parser


def check_new(out):
    """Raise UserError if there is anything at path `out`."""
    if os.path.lexists(out):
        raise UserError(f"{out} is there already, and is not overwritten: choose another name")


def stored_dtype(name, base):
    """The torch.dtype to store: `name`, or for "auto" that of the model in folder `base`."""
    if name == "auto":
        config = weights.read_config(base)
        name = config.get("dtype") or config.get("torch_dtype") or "float32"
    if name not in DTYPES:
        raise UserError(f"{base / 'config.json'}: dtype {name!r} is unknown here: give --dtype")
    return getattr(torch, name)


def sample(model, adapter, base):
    """A prompt as a pack, on which the model is compared before and after."""
    ids = Chat.load(tokenizer_folders(base, adapter)[-1]).encode_prompt(SAMPLE)
    ids = torch.tensor(ids[: model.config.max_position_embeddings])
    if ids.max() >= model.config.vocab_size:
        raise UserError(f"{base}: the tokenizer gives token {ids.max()}, but the model's vocabulary"
                        f" ends at {model.config.vocab_size - 1}")
    return {"input_ids": ids, "cu_seqlens": torch.tensor([0, len(ids)], dtype=torch.int32),
            "max_seqlen": len(ids), "position_ids": torch.arange(len(ids))}


@torch.no_grad()
def merge_into(model, dtype, lora):
    """Replace each adapter layer of `model` by its base with the merged weight, in place, and round
    every parameter to `dtype`, in float32 storage. Gives, by the layer's name, two squared norms:
    of ΔW, and of what the rounding adds to it."""
    norms = {}
    for name, module in list(lora.adapter_modules(model)):
        merged = module.merged()
        error = merged.to(dtype).float() - merged  # also the error of ΔW, as W itself is exact
        norms[name] = [x.double().square().sum().item() for x in (module.delta(), error)]
        module.base.weight.copy_(merged)
        model.set_submodule(name, module.base)
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
    return norms


def report(dtype, norms, before, after):
    """What a merge lost, from the `norms` of `merge_into` and the sample's logits (T, V) `before`,
    with the adapter, and `after`. Errors of the realised ΔW are relative to ΔW's norm, `delta`."""
    def relative(delta, error):
        return (error / delta) ** 0.5 if delta else 0.0

    delta, error = map(sum, zip(*norms.values()))
    return {"dtype": str(dtype).removeprefix("torch."),
            "layers": {name: relative(*pair) for name, pair in norms.items()},
            "total": relative(delta, error), "delta": delta ** 0.5,
            "logit_difference": (after - before).abs().max().item(),
            "largest_logit": before.abs().max().item(), "tokens": len(before),
            "tokens_changed": int((before.argmax(-1) != after.argmax(-1)).sum())}


def show(report, out, more=()):
    """Print what rounding lost, by decoder layer and in total, then the lines `more`."""
    print(f"error of the merged ΔW after rounding to {report['dtype']}, relative to ΔW\n"
          "(0: all of it survived, 1: as far off as without the adapter)")
    worst = {}
    for name, error in report["layers"].items():
        group = f"layer {name.split('.')[2]}" if name.startswith("model.layers.") else name
        worst[group] = max(worst.get(group, (0.0, "")), (error, name))
    for group, (error, name) in worst.items():
        print(f"  {group:<10} worst {error:9.2e}  {name}")
    print(f"  all layers       {report['total']:9.2e}")
    print(f"on a sample prompt of {report['tokens']} tokens: largest logit difference "
          f"{report['logit_difference']:.2e}\n(largest logit {report['largest_logit']:.1f}), "
          f"likeliest next token changed at {report['tokens_changed']}")
    print(*more, runs.wrote("model", out), sep="\n")


def save(model, dtype, out, adapter, base, write_model=weights.save_weights):
    """Commit folder `out`: the model in `dtype`, as `write_model` writes it, and its tokenizer."""
    def write(folder):
        write_model(model, weights.read_config(base), folder, dtype, MARK)
        for source in tokenizer_folders(base, adapter):
            weights.copy_tokenizer(source, folder)
        Chat.load(source).save(folder)

    size = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    size += sum(buffer.nbytes for buffer in model.buffers())
    commit(Path(out), write, extra={"merged_from": str(adapter)}, bytes_needed=size)
