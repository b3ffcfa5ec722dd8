"""Ours and the others on the same work, side by side: time, memory, losses. Development only.

    pip install transformers peft bitsandbytes trl datasets      (the peers; each may be missing)
    python tests/bench/peers.py --size mid --kind all --out peers.json
    python tests/bench/peers.py --size tiny --dtype float32      (are the losses the same?)
    python tests/bench/peers.py --model DIR --data FILE --columns prompt=question,completion=answer

With --model the weights are real ones, and with --data the documents: of these only the answers
are trained on. A row of padded batches stands beside the packed one.

All rows begin with the same weights and see the same documents in the same order, and have the
same optimizer (fused AdamW; dense: on float32 masters), clipping and threads. They take turns step
by step, another one first each time, so that a busy moment of the machine hits all. Only the
documents' tokens count: padding, ours or theirs, is no work done. Prints Markdown; --out is JSON.
With --dtype float32 the exit code is 1 if losses differ by more than 1e-3, relative.
"""

import argparse
import ctypes
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1]),
                str(Path(__file__).parents[2])]
from contestants import SIZES, WARM, config_of, ours, peer, trl_row
from helpers import load
from live_memory import LivePeak
from report import (adamw, conditions, held_bytes, importable, largest, resident,
                    show_conditions, table, write)

from common import predict_memory, weights
from common.data.chat import Chat
from common.data.encode import encode, virtual
from common.data.readers import Records, parse_columns

TOLERANCE = 1e-3  # relative, of the losses in float32


# --- measuring ---

def memory(row, documents):
    """Peak bytes of one step of a row, its model and optimizer included, those of the other rows
    not: live tensors, and resident (on Linux, where the high-water mark can be reset)."""
    held = held_bytes(row.model, row.optimizer)
    row.figures["resident_bytes"] = None
    if Path("/proc/self/clear_refs").exists():
        ctypes.CDLL(None).malloc_trim(0)  # else it would use what another row has left behind
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        row.step(documents)
        row.figures["resident_bytes"] = held + resident("VmHWM") - before
    with LivePeak() as live:
        row.step(documents)
    row.figures["live_bytes"] = held + live.grown


def measure(rows, packs, options):
    """Train all rows on `packs`, taking turns, and fill in their figures."""
    for row in rows:
        row.optimizer = adamw(row.model, options.lr)
    for number, documents in enumerate(packs):
        for turn in range(len(rows)):
            row = rows[(number + turn) % len(rows)]
            started = time.perf_counter()
            row.losses.append(row.step(documents))
            row.seconds.append(time.perf_counter() - started)
    tokens = [sum(len(ids) for ids, _ in documents) for documents in packs]
    for row in rows:
        # Median seconds per token of each repeat, so that the repeats can be compared.
        costs = [seconds / count for seconds, count in zip(row.seconds, tokens)][WARM:]
        repeats = [1 / statistics.median(costs[i:i + options.steps])
                   for i in range(0, len(costs), options.steps)]
        middle = statistics.median(repeats)
        row.figures |= {"tokens_per_second": middle, "repeats": repeats, "losses": row.losses,
                        "step_seconds": row.seconds,
                        "spread": (max(repeats) - min(repeats)) / middle}
        memory(row, packs[-1])
        if row.ours:
            compiled = "compiled" in row.name
            row.figures["predicted_bytes"] = sum(predict_memory.memory(
                row.model, options.batch_tokens if compiled else tokens[-1],
                getattr(torch, options.dtype), chunk=getattr(row.model, "chunk", None),
                compiled=compiled, checkpointing=row.recompute).values())


# --- reporting ---

def report(kind, rows):
    """Print every row, with its tokens/s and memory over those of each peer."""
    peers = [row for row in rows if not row.ours and row.losses]
    lines = []
    for row in rows:
        f = row.figures
        if not row.losses:
            rate = f"{f['tokens_per_second']:.0f}" if f else row.missing
            lines.append([row.name, rate, *[""] * (3 + 2 * len(peers))])
            continue
        f["over"] = {p.name: {
            "tokens_per_second": statistics.median(
                a / b for a, b in zip(f["repeats"], p.figures["repeats"])),
            "live_bytes": f["live_bytes"] / p.figures["live_bytes"]} for p in peers}
        rss = f["resident_bytes"]
        lines.append([
            row.name, f"{f['tokens_per_second']:.0f}", f"{f['spread']:.0%}",
            f"{f['live_bytes'] / 1e6:.0f}", "unknown" if rss is None else f"{rss / 1e6:.0f}",
            *(f"{o[key]:.2f}x" for o in f["over"].values()
              for key in ("tokens_per_second", "live_bytes"))])
    print(f"\n### {kind}")
    table(["row", "tokens/s", "spread", "peak live MB", "peak resident MB",
           *(f"{what} / {p.name}" for p in peers for what in ("tokens/s", "live"))], lines)


def compare_losses(rows):
    """Print the losses of steps 1 to 20 side by side; gives the largest relative difference of
    one of ours from a peer's, infinite if one is NaN; None without a peer."""
    rows = [row for row in rows if row.losses]
    table(["step", *(row.name for row in rows)],
          [[i + 1, *(f"{row.losses[i]:.5f}" for row in rows)]
           for i in range(min(20, len(rows[0].losses)))])
    gaps = [abs(a / b - 1) for mine in rows if mine.ours and mine.same
            for peer in rows if not peer.ours and peer.same
            for a, b in zip(mine.losses[:20], peer.losses[:20])]
    worst = largest(gaps)
    if worst is not None:
        print(f"\nlargest relative difference of ours from a peer's, 20 steps: {worst:.1e}")
    return worst


# --- the work ---

def contestants(kind, folder, dtype, shape, documents, options):
    """The rows of one kind."""
    adapters = {}  # first values of A, drawn by ours
    compiled = [] if shape is None else [ours(3, kind, folder, dtype, shape)]
    if options.model and kind != "qlora":  # the plain loop, the fastest one, the peer's two ways
        who, needs = (("transformers", ["transformers"]) if kind == "dense" else
                      ("PEFT", ["transformers", "peft"]))
        again = ("selective", "full") if options.recompute and kind == "lora" and compiled else ()
        rows = [ours(2, kind, folder, dtype, adapters=adapters), *compiled,
                *(ours(3, kind, folder, dtype, shape, recompute=each) for each in again),
                *(peer(f"{who}, {how}", kind, folder, dtype, adapters, padded=how == "padded",
                       needs=needs) for how in ("packed", "padded"))]
    elif kind == "dense":
        rows = [ours(1, kind, folder, dtype), ours(3, kind, folder, dtype), *compiled,
                peer("transformers, packed", kind, folder, dtype, adapters),
                peer("transformers, padded", kind, folder, dtype, adapters, padded=True)]
        if dtype != torch.float32:  # less exact, and less work, than any of ours
            rows.append(peer("transformers, packed, without masters", kind, folder, dtype, adapters,
                             pure=True))
    elif kind == "lora":
        full = ours(2, "dense", folder, dtype)  # all weights trained: what an adapter saves
        full.name, full.same = "full, " + full.name, False
        rows = [ours(2, kind, folder, dtype, adapters=adapters), *compiled, full,
                peer("PEFT, packed", kind, folder, dtype, adapters,
                     needs=("transformers", "peft"))]
    else:
        beside = ours(3, "lora", folder, dtype, shape)  # the same without NF4: what that costs
        beside.name, beside.same = "LoRA, " + beside.name, False
        rows = [ours(3, kind, folder, dtype, adapters=adapters), *compiled, beside,
                peer("bitsandbytes and PEFT, packed", kind, folder, dtype, adapters,
                     needs=("transformers", "peft", "bitsandbytes", "accelerate"))]
    with importable("chapter-03"):
        measure([row for row in rows if not row.missing], documents, options)
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="mid")
    parser.add_argument("--model", help="a folder with real weights, instead of a --size")
    parser.add_argument("--data", help="its data file, as train.py's (default: random tokens)")
    parser.add_argument("--columns", help="as train.py's")
    parser.add_argument("--batch-tokens", type=int, help="of a step (default: 1024, or the size's)")
    parser.add_argument("--kind", choices=("dense", "lora", "qlora", "all"), default="all")
    parser.add_argument("--steps", type=int, default=20, help="steps of each repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled rows out")
    parser.add_argument("--recompute", action="store_true",
                        help="with --model, LoRA: rows that compute activations again, too")
    parser.add_argument("--out", help="file for the figures, as JSON")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    options.batch_tokens = options.batch_tokens or (1024 if options.model else
                                                    SIZES[options.size][0])
    dtype, budget = getattr(torch, options.dtype), options.batch_tokens
    packing, modeling = (load(f"chapter-03/{name}.py") for name in ("packing", "modeling_llama"))
    config, found = config_of(options.size), conditions()
    if options.model:
        config = weights.read_config(options.model)

    if options.data:
        columns = parse_columns(options.columns) if options.columns else None
        documents = encode(Records(options.data, columns), Chat.load(Path(options.model)), budget,
                           "drop")
    else:  # half of them are shorter than a sixteenth of a pack, the longest is a quarter
        documents = virtual(4000, config["vocab_size"], budget // 4, seed=0)
    sampler = packing.PackSampler(documents.lengths, budget, seed=0)
    count = WARM + options.steps * options.repeats
    packs = [[documents[i] for i in sampler.pack(n)] for n in range(count)]
    shape = packing.StaticShape.of((sampler, count))
    show_conditions(found)
    padded = sum(len(pack) * max(len(ids) for ids, _ in pack) for pack in packs)
    real = sum(len(ids) for pack in packs for ids, _ in pack)
    labelled = sum(int((labels[1:] >= 0).sum()) for pack in packs for _, labels in pack)
    print(f"\n{options.model or options.size}: {options.dtype}, packs of at most {budget} tokens in "
          f"{sum(map(len, packs)) / count:.0f} documents, {labelled / real:.0%} of them labelled, "
          f"{padded / real:.1f} times as many when padded; median of {options.repeats} repeats of "
          f"{options.steps} steps")

    figures, worst = {}, 0
    with tempfile.TemporaryDirectory() as scratch:
        if options.model:
            scratch = options.model
        else:
            torch.manual_seed(0)
            model = modeling.LlamaForCausalLM(modeling.LlamaConfig.from_dict(config))
            weights.save_weights(model, config, scratch)
            del model
        for kind in ("dense", "lora", "qlora") if options.kind == "all" else (options.kind,):
            rows = contestants(kind, scratch, dtype, None if options.no_compile else shape, packs,
                               options)
            if kind == "dense" and not options.model:
                rows.append(trl_row(scratch, documents, options, options.lr))
            report(kind, rows)
            worst = max(worst, compare_losses(rows) or 0)
            figures[kind] = {row.name: row.figures or row.missing for row in rows}
    shares = {"labelled": labelled / real, "padded": padded / real}
    write(options.out, {**found, "options": vars(options), **shares, "figures": figures})
    if options.dtype == "float32" and worst > TOLERANCE:
        print(f"not the same work: {worst:.1e} is more than {TOLERANCE:g}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
