"""From a naive loop to the fast one, a rung at a time: speed, memory, and the predicted gain.

    python chapter-03/profiling/ladder.py --size tiny    half a minute; without, the mid-size model
    python chapter-03/profiling/ladder.py --size 0.6b    Qwen3-0.6B's shapes, for a GPU

Every rung trains on the same documents, whose own tokens count, not padding, and keeps what the
rungs before it have changed. Writes ladder.md and ladder.json; run it again, and it goes on."""

import gc
import json
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
from common import predict
from common.errors import UserError, one_line, run_main
from common.files.json_files import write_whole
from common.memory import readable_bytes
from common.options import choose_device, option, read_flags
from compiling import compile_model
from packing import IGNORE
from profile_step import first_packs, set_up, step_of
from train import Options

SIZES = {  # folder or name of the config, tokens of documents per step, longest document
    "tiny": ("tiny", 256, 64), "mid": (Path(__file__).with_name("mid"), 2048, 512),
    "0.6b": ("qwen3-0.6b", 8192, 2048)}
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
    "QLoRA": {"quantize": "nf4"}}


@dataclass
class LadderOptions:
    """The ladder's own options."""
    size: str = option("mid", "which model", choices=tuple(SIZES))
    steps: int = option(3, "timed steps of each rung", least=1)
    first: str = option("naive", "the rung to begin with", choices=tuple(RUNGS))
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    compile: bool = option(True, "climb the rung that compiles")
    seed: int = option(0, "fixes documents and weights", least=0)
    out: str = option(None, "the folder of the results (default: runs/chapter-03-ladder/SIZE)")


def padded(examples):
    """The documents as in a padded batch: all as long as the longest."""
    longest = max(len(ids) for ids, _ in examples)
    return [(F.pad(ids, (0, longest - len(ids))),
             F.pad(labels, (0, longest - len(ids)), value=IGNORE)) for ids, labels in examples]


def sliced_attention(q, k, v, cu_seqlens, max_seqlen, window=None):
    """Attention document by document, on slices: each backward fills a whole pack with zeros."""
    if q.is_cuda and q.dtype == torch.float32:  # see `varlen_attention` of chapter 1
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    ends = cu_seqlens.tolist()
    outputs = []
    for start, end in zip(ends, ends[1:]):
        q_n, k_n, v_n = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
        output = F.scaled_dot_product_attention(q_n, k_n, v_n, is_causal=True, enable_gqa=True)
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


def climb(rung, options, device):
    """Measure one rung, the settings of RUNGS so far: what goes into its row of the table."""
    model, tokens, longest = SIZES[options.size]
    packed, chunked, blocks, fused = map(rung.pop, ("packed", "chunked", "blocks", "fused"))
    training = Options(model=str(model), init="random", data=["virtual"], batch_tokens=tokens,
                       max_seq_len=longest, lr=1e-4, rank=16, alpha=32.0, seed=options.seed,
                       device=device.type, **rung)
    model, optimizer, adapter, data = set_up(training, fused)
    if not blocks:
        for layer in model.model.layers:
            layer.self_attn.attend = sliced_attention
    if not chunked:
        model.chunk = None
    lists, pack_of = first_packs(training, data, options.steps + 1)
    tokens = [sum(len(ids) for ids, _ in examples) for examples in lists]
    packs = [pack_of(examples if packed else padded(examples)) for examples in lists]

    foreseen = operators.predict(model, packs[-1], training.compile, fused)
    if training.compile:
        compile_model(model)
    first, *steps = (step_of(model, optimizer, pack, adapter, 1.0) for pack in packs)
    first()  # makes the optimizer's moments, and compiles
    seconds = [seconds_of(step, device) for step in steps]
    memory = anatomy.measured(first, model, optimizer, device)
    speed = statistics.median(count / time for count, time in zip(tokens[1:], seconds))
    prediction = predict.costs(model, data.lengths, training, model.chunk)
    predicted = sum(alone for _, alone in foreseen.values())
    return {"tokens_per_second": speed, "peak_memory_bytes": sum(memory.values()),
            "flops_per_second": speed * prediction.flops["total"], "mfu": prediction.mfu(speed),
            "predicted_tokens_per_second": tokens[-1] / predicted, "seconds": seconds}


def markdown(rows):
    """The rows as a table: gains are over the last rung before it that was measured."""
    lines = ["| rung | tokens/s | gain | predicted gain | peak memory | GFLOP/s |",
             "|---|---|---|---|---|---|"]
    before = None
    for row in rows:
        if "missing" in row:
            lines.append(f"| {row['name']} | {row['missing']} | | | | |")
            continue
        gains = " | ".join("" if before is None else f"{row[key] / before[key]:.2f}" for key in
                           ("tokens_per_second", "predicted_tokens_per_second"))
        mfu = "" if row["mfu"] is None else f" (MFU {row['mfu']:.1%})"
        lines.append(f"| {row['name']} | {row['tokens_per_second']:,.0f} | {gains} | "
                     f"{readable_bytes(row['peak_memory_bytes'])} | "
                     f"{row['flops_per_second'] / 1e9:,.0f}{mfu} |")
        before = row
    return "\n".join(lines)


def main(argv=None):
    options = LadderOptions(**read_flags(LadderOptions, __doc__.split("\n\n")[0], argv))
    device = choose_device(options.device)
    folder = Path(options.out or f"runs/chapter-03-ladder/{options.size}")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "ladder.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    results = {row["name"]: row for row in before}
    print(markdown([]), flush=True)
    rung, rows = {}, []
    for number, (name, changes) in enumerate(RUNGS.items()):
        if name == "compile" and not options.compile:
            continue
        rung |= changes
        if number < list(RUNGS).index(options.first):
            continue
        row = {
            "name": name, "rung": dict(rung), "size": options.size, "steps": options.steps,
            "seed": options.seed, "threads": torch.get_num_threads(), "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type}
        if not row.items() <= results.get(name, {}).items():  # not measured like this before
            try:
                row |= climb(dict(rung), options, device)
            except (torch.OutOfMemoryError, UserError) as error:  # or nothing can be compiled here
                row["missing"] = one_line(error)
            results[name] = row
            gc.collect()
            torch._dynamo.reset()
        rows.append(results[name])
        if name == "compile" and "missing" in rows[-1]:
            rung["compile"] = False
        print(markdown(rows).splitlines()[-1], flush=True)
        write_whole(folder / "ladder.md", f"{markdown(rows)}\n".encode())
        everything = [results[one] for one in RUNGS if one in results]
        write_whole(file, f"{json.dumps(everything, indent=1)}\n".encode())
    print(f"\n{folder}: ladder.md, ladder.json")
    return 0


if __name__ == "__main__":
    run_main(main)
