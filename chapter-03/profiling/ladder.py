"""From a naive loop to the fast one, a rung at a time: speed, memory, and the predicted gain.

    python chapter-03/profiling/ladder.py --size tiny    half a minute; without, the mid-size model
    python chapter-03/profiling/ladder.py --size 0.6b    Qwen3-0.6B's shapes, for a GPU

Every rung trains on the same documents. Only their own tokens count, so padding shows as lost
speed. A rung keeps what the rungs before it have changed, and writes a file when it is done: after
an interruption, run it again, and it goes on. Writes ladder.md, ladder.json and, with matplotlib,
ladder.svg.
"""

import gc
import json
import os
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = map(str, Path(__file__).resolve().parents[1:3])

import torch
import torch.nn.functional as F

import anatomy
import operators
from buckets import seconds_of
from common import hub, predict, weights
from common.data import encode
from common.errors import UserError, run_main
from common.files.json_files import read_json
from common.memory import readable_bytes
from common.options import choose_device, option, read_flags
from compiling import compile_model
from lora import AdapterConfig
from modeling_llama import LlamaConfig
from packing import IGNORE, StaticShape, packed_sequence_collate_fn
from profile_step import model_and_optimizer, step_of
from train import Options, to_device

HERE = Path(__file__).resolve().parent
SIZES = {  # folder or name of the config, tokens of documents per step, longest document
    "tiny": ("tiny", 256, 64), "mid": (HERE / "mid", 2048, 512), "0.6b": ("qwen3-0.6b", 8192, 2048)}
RUNGS = {  # what each changes; the first describes the naive loop
    "naive": {"packed": False, "dtype": "float32", "chunked": False, "blocks": False,
              "compile": False, "fused": False, "activation_checkpointing": "none",
              "method": "full", "quantize": "none"},
    "packing": {"packed": True},
    "bfloat16": {"dtype": "bfloat16"},
    "chunked loss": {"chunked": True},
    "attention in one operator": {"blocks": True},
    "compile": {"compile": True},
    "fused optimizer": {"fused": True},
    "checkpointing": {"activation_checkpointing": "full"},
    "LoRA": {"method": "lora"},
    "QLoRA": {"quantize": "nf4"},
}


@dataclass
class LadderOptions:
    """The ladder's own options."""

    size: str = option("mid", "which model", choices=tuple(SIZES))
    steps: int = option(3, "timed steps of each rung", least=1)
    first: str = option("naive", "the rung to begin with", choices=tuple(RUNGS))
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda",
                                                                       "mps"))
    compile: bool = option(True, "climb the rung that compiles")
    seed: int = option(0, "fixes documents and weights", least=0)
    out: str = option(None, "the folder of the results (default: runs/chapter-03-ladder/SIZE)")


def documents(size, vocabulary, count, seed):
    """`count` lists of (ids, labels), each of exactly the size's tokens in documents of varied
    length."""
    _, tokens, longest = SIZES[size]
    pool = iter(encode.virtual(8 * count * tokens // longest + 8, vocabulary, longest, seed))
    lists = []
    for _ in range(count):
        chosen, room = [], tokens
        while room:
            ids, labels = next(pool)
            chosen.append((ids[:room], labels[:room]))
            room -= len(chosen[-1][0])
        lists.append(chosen)
    return lists


def padded(examples):
    """The documents as in a padded batch: all as long as the longest."""
    longest = max(len(ids) for ids, _ in examples)
    return [(F.pad(ids, (0, longest - len(ids))),
             F.pad(labels, (0, longest - len(ids)), value=IGNORE)) for ids, labels in examples]


def sliced_attention(q, k, v, cu_seqlens, max_seqlen):
    """Attention document by document, on slices. The backward of a slice fills a gradient as large
    as the whole pack with zeros, for every document."""
    if q.is_cuda and q.dtype == torch.float32:  # see `varlen_attention` of chapter 1
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    ends = cu_seqlens.tolist()
    outputs = []
    for start, end in zip(ends, ends[1:]):
        q_n, k_n, v_n = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
        output = F.scaled_dot_product_attention(q_n, k_n, v_n, is_causal=True, enable_gqa=True)
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


def whole_loss(logits, labels):
    """The sum of the losses from all logits at once, in float32."""
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="sum")


def climb(rung, options, device):
    """Measure one rung, the settings of RUNGS so far: what goes into its row of the table."""
    name, tokens, longest = SIZES[options.size]
    source = hub.resolve(name)
    config = LlamaConfig.from_dict(weights.read_config(source))
    of_rung = {key: rung[key] for key in (
        "dtype", "method", "quantize", "activation_checkpointing")}
    training = Options(model=str(name), init="random", lr=1e-4, seed=options.seed,
                       device=device.type, **of_rung)
    adapter = AdapterConfig(method=rung["method"], seed=options.seed)
    model, optimizer = model_and_optimizer(
        training, adapter, source, config, device, rung["fused"])
    if not rung["blocks"]:
        operators.set_attention(model, sliced_attention)
    finish = None if rung["chunked"] else whole_loss
    lists = documents(options.size, config.vocab_size, options.steps + 1, options.seed)
    mean = predict.mean_attended([len(ids) for ids, _ in lists[0]])
    shape = StaticShape(tokens, max(map(len, lists)), longest) if rung["compile"] else None
    lists = lists if rung["packed"] else map(padded, lists)
    packs = [to_device(packed_sequence_collate_fn(x, shape), device) for x in lists]

    ops = operators.record(model, packs[-1], finish, rung["compile"])
    foreseen = operators.predict(model, packs[-1], ops, device, rung["fused"])
    if rung["compile"]:
        compile_model(model)
    first, *steps = (step_of(model, optimizer, pack, adapter, 1.0, finish) for pack in packs)
    first()  # makes the optimizer's moments, and compiles
    seconds = [seconds_of(step, device) for step in steps]
    memory = anatomy.measured(first, model, optimizer, device)
    speed = tokens / statistics.median(seconds)
    rate = speed * predict.flops_per_token(model, mean)["total"]
    peak = predict.peak_flops(device, model.compute_dtype)
    return {"tokens_per_second": speed, "peak_memory_bytes": sum(memory.values()),
            "flops_per_second": rate, "mfu": None if peak is None else rate / peak,
            "predicted_tokens_per_second": tokens / sum(alone for _, alone in foreseen.values()),
            "seconds": seconds}


def ladder(options, folder, device):
    """Every rung's row, from its file or measured now."""
    rung, rows = {}, []
    for number, (name, changes) in enumerate(RUNGS.items(), 1):
        rung.update(changes)
        rung["compile"] = rung["compile"] and options.compile
        skipped = name == "compile" and not options.compile
        if skipped or number <= list(RUNGS).index(options.first):
            continue
        conditions = {
            "name": name, "rung": dict(rung), "size": options.size, "steps": options.steps,
            "seed": options.seed, "threads": torch.get_num_threads(), "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type}
        file = folder / f"{number:02d}-{name.replace(' ', '-')}.json"
        row = read_json(file) if file.is_file() else {}
        if not conditions.items() <= row.items():  # it belongs to another run, or there is none
            try:
                row = conditions | climb(rung, options, device)
            except torch.OutOfMemoryError:
                row = conditions | {"missing": "out of memory"}
            except UserError as error:
                if name != "compile":
                    raise
                row = conditions | {"missing": str(error)}
            gc.collect()
            torch._dynamo.reset()
            temporary = file.with_suffix(".tmp")
            temporary.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, file)
        if name == "compile" and "missing" in row:
            options.compile = False
        rows.append(row)
        print(markdown(rows).splitlines()[-1], flush=True)
    return rows


def markdown(rows):
    """The rows as a table: gains are over the last rung before it that was measured."""
    known = any(row.get("mfu") is not None for row in rows)
    lines = ["| rung | tokens/s | gain | predicted gain | peak memory | "
             + ("MFU |" if known else "GFLOP/s |"), "|---|---|---|---|---|---|"]
    before = None
    for row in rows:
        if "missing" in row:
            lines.append(f"| {row['name']} | {row['missing']} | | | | |")
            continue
        gains = ["" if before is None else f"{row[key] / before[key]:.2f}" for key in
                 ("tokens_per_second", "predicted_tokens_per_second")]
        work = f"{row['mfu']:.1%}" if known else f"{row['flops_per_second'] / 1e9:,.0f}"
        lines.append(f"| {row['name']} | {row['tokens_per_second']:,.0f} | {gains[0]} | {gains[1]} "
                     f"| {readable_bytes(row['peak_memory_bytes'])} | {work} |")
        before = row
    return "\n".join(lines)


def picture(rows, path):
    """Draw the rungs' speed and memory as bars. Gives False if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rows = [row for row in rows if "missing" not in row][::-1]
    figure = Figure(figsize=(10, 0.4 * len(rows) + 1), layout="constrained")
    for axes, key, unit, title in zip(
            figure.subplots(1, 2, sharey=True), ("tokens_per_second", "peak_memory_bytes"),
            (1, 2**20), ("tokens per second", "peak memory, MiB")):
        bars = axes.barh([row["name"] for row in rows], [row[key] / unit for row in rows])
        axes.bar_label(bars, fmt="{:,.0f}", padding=3)
        axes.set(title=title, xmargin=0.2)
    figure.savefig(path)
    return True


def main(argv=None):
    options = LadderOptions(**read_flags(LadderOptions, __doc__.split("\n\n")[0], argv))
    device = choose_device(options.device)
    folder = Path(options.out or Path("runs", "chapter-03-ladder", options.size))
    folder.mkdir(parents=True, exist_ok=True)
    print(markdown([]), flush=True)
    rows = ladder(options, folder, device)
    (folder / "ladder.md").write_text(markdown(rows) + "\n", encoding="utf-8")
    (folder / "ladder.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    drawn = picture(rows, folder / "ladder.svg")
    print(f"\n{folder}: ladder.md, ladder.json" + (", ladder.svg" if drawn else "; for the picture "
                                                   "ladder.svg: pip install matplotlib"))
    return 0


if __name__ == "__main__":
    run_main(main)
