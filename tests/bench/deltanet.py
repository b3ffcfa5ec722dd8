"""The gated delta rule in chunks, ours and transformers' PyTorch path: forward and backward.

    pip install transformers                    (it may be missing: then ours alone is timed)
    OMP_NUM_THREADS=1 python tests/bench/deltanet.py --out deltanet.json
    python tests/bench/deltanet.py --tokens 1024 --heads 4 4

Ours is modeling_qwen3_5.py of a copy of the tree with qwen3_5.diff applied. Inputs are float32 and
the same for all, keys of unit length. Two packs: one document, and many. Ours takes a pack as it
is; transformers' path knows no documents, so it takes them one after another, or all side by side,
padded to the longest. Each takes its turn in every round, another one first each time; what counts
are the ratios of a round, of which the median is shown with the lowest and highest. Before that,
outputs and gradients are compared. Memory is the peak of live bytes that a step adds.
"""

import argparse
import importlib.util
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1]),
                str(Path(__file__).parents[2])]
from diffs import apply_diff
from helpers import ROOT, load
from live_memory import LivePeak
from report import conditions, show_conditions, table, write

TOLERANCE = 1e-5  # relative, of the norms of differences


def delta_attention():
    """Of modeling_qwen3_5.py, loaded from a changed copy of the tree."""
    with tempfile.TemporaryDirectory() as folder:
        for part in ("chapter-03", "common"):
            shutil.copytree(ROOT / part, Path(folder) / part,
                            ignore=shutil.ignore_patterns("__pycache__", "*.svg", "runs"))
        diff = ROOT / "tests" / "extensions" / "qwen3_5.diff"
        apply_diff(diff.read_text(encoding="utf-8"), Path(folder))
        return load(Path(folder) / "chapter-03" / "modeling_qwen3_5.py").delta_attention


def random_inputs(lengths, heads, size):
    """(q, k, v, g, beta) as (T, heads, size) and (T, heads), the gradient of the output, and g with
    its -∞ at the documents' beginnings."""
    generator = torch.Generator().manual_seed(0)
    (K, H), T = heads, sum(lengths)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    q, k = (F.normalize(normal(T, K, size), dim=-1) for _ in "qk")
    g = -F.softplus(normal(T, H)) * torch.rand(H, generator=generator)
    inputs = [q * size**-0.5, k, normal(T, H, size), g, normal(T, H).sigmoid()]
    begun = g.clone()
    begun[torch.tensor([0, *lengths[:-1]]).cumsum(0)] = -torch.inf
    return [x.requires_grad_() for x in inputs], normal(T, H, size), begun.requires_grad_()


def ours(function, begun):
    return lambda q, k, v, g, beta: function(q, k, v, begun, beta)


def theirs(function, lengths, padded):
    """transformers' on one document after another, or on all, padded, as a batch."""
    def run(*inputs):
        scale = inputs[0].shape[-1] ** 0.5  # it divides the queries itself
        documents = list(zip(*(x.split(lengths) for x in inputs)))
        if not padded:
            return torch.cat([function(q[None] * scale, *(x[None] for x in rest))[0][0]
                              for q, *rest in documents])
        q, *rest = (torch.nn.utils.rnn.pad_sequence(list(x), batch_first=True)
                    for x in zip(*documents))
        outputs, _ = function(q * scale, *rest)
        return torch.cat([output[:n] for output, n in zip(outputs, lengths)])
    return run


def step(run, inputs, gradient, wanted):
    """(o, its gradients of `wanted`)."""
    o = run(*inputs)
    return [o.detach(), *torch.autograd.grad(o, wanted, gradient)]


def measure(name, lengths, mine, peer, options):
    """Rows of figures: seconds of each contestant, and its bytes; the worst difference from ours."""
    inputs, gradient, begun = random_inputs(lengths, options.heads, options.size)
    rows = {"ours": ours(mine, begun)}
    if peer is not None:
        rows["transformers, one by one"] = theirs(peer, lengths, False)
        if len(lengths) > 1:
            rows["transformers, padded"] = theirs(peer, lengths, True)
    wanted = {row: [*inputs[:3], begun if row == "ours" else inputs[3], inputs[4]] for row in rows}
    results = {row: step(run, inputs, gradient, wanted[row]) for row, run in rows.items()}
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    worst = 0.0
    for result in results.values():
        result[4][starts] = 0  # without influence, up to rounding
        worst = max([worst, *((a - b).norm().item() / b.norm().item()
                              for a, b in zip(results["ours"], result))])
    seconds = {row: [] for row in rows}
    for turn in range(options.rounds):
        for row in [*rows][turn % len(rows):] + [*rows][:turn % len(rows)]:
            started = time.perf_counter()
            step(rows[row], inputs, gradient, wanted[row])
            seconds[row].append(time.perf_counter() - started)
    figures = {"pack": name, "documents": len(lengths), "tokens": sum(lengths),
               "worst_difference": worst, "rows": {}}
    for row in rows:
        with LivePeak() as live:
            step(rows[row], inputs, gradient, wanted[row])
        ratios = [a / b for a, b in zip(seconds[row], seconds["ours"])]
        figures["rows"][row] = {
            "seconds": seconds[row], "median": statistics.median(seconds[row]),
            "over_ours": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios),
            "live_bytes": live.grown}
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--heads", type=int, nargs=2, default=(16, 32), help="of keys, of values")
    parser.add_argument("--size", type=int, default=128, help="of a head")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", help="JSON")
    options = parser.parse_args()
    found = conditions()
    show_conditions(found)
    peer = None
    if importlib.util.find_spec("transformers"):
        from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule
        peer = torch_chunk_gated_delta_rule
    lengths, generator = [], torch.Generator().manual_seed(0)
    while sum(lengths) < options.tokens:  # most are short, some are long
        length = int(20 * 50 ** torch.rand((), generator=generator).item())
        lengths.append(min(length, options.tokens - sum(lengths)))
    packs = {"one document": [options.tokens], "many documents": lengths}
    mine = delta_attention()
    results = [measure(name, each, mine, peer, options) for name, each in packs.items()]
    print(f"\n{options.heads[0]} key heads, {options.heads[1]} value heads of {options.size}, float32,"
          f" {options.tokens} tokens; worst relative difference "
          f"{max(each['worst_difference'] for each in results):.1e}\n")
    table(["pack", "row", "seconds", "of ours", "lowest", "highest", "peak live MB"], [
        [f"{each['pack']} ({each['documents']})", row, f"{f['median']:.2f}",
         f"{f['over_ours']:.2f}x", f"{f['lowest']:.2f}x", f"{f['highest']:.2f}x",
         f"{f['live_bytes'] / 1e6:.0f}"]
        for each in results for row, f in each["rows"].items()])
    if options.out:
        write(options.out, {"conditions": found, "options": vars(options), "results": results})
    return int(max(each["worst_difference"] for each in results) > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
