"""The chunked loss against the plain one: time, memory, error. Development only.

    python tests/bench/loss_bench.py --tokens 4096 --vocab 151936 --width 1024 --json loss.json

Prints a Markdown table; --json also writes the figures.
"""

import argparse
import functools
import json
import platform
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
from helpers import load
from live_memory import LivePeak

loss = load("chapter-03/loss.py")
chunked_cross_entropy = loss.chunked_cross_entropy


def plain_cross_entropy(hidden, weight, labels):
    """What the other chapters compute: all logits, in the dtype of hidden, then float32."""
    logits = hidden @ weight.to(hidden.dtype).t()
    return F.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum")


def step(function, hidden, weight, labels):
    """Loss and gradients of the mean, as in training; the gradients are dropped."""
    loss = function(hidden, weight, labels)
    (loss / len(labels)).backward()
    hidden.grad = weight.grad = None
    return loss.detach()


def peak_bytes(function, *inputs):
    """Peak of live bytes during a step, above those that were live before it."""
    if inputs[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(function, *inputs)
        return torch.cuda.max_memory_allocated() - before
    with LivePeak() as live:
        step(function, *inputs)
    return live.grown


def seconds(functions, inputs, repeats):
    """The fastest step of each contestant, taking turns, so that a busy moment hits all."""
    best = [float("inf")] * len(functions)
    for _ in range(repeats):
        for i, function in enumerate(functions):
            start = time.perf_counter()
            step(function, *inputs)
            if inputs[0].is_cuda:
                torch.cuda.synchronize()
            best[i] = min(best[i], time.perf_counter() - start)
    return best


def oracle(hidden, weight, labels, chunk):
    """The loss in float64; 16-bit logits are rounded first, as they are in both contestants."""
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    with torch.no_grad():
        for x, target in zip(hidden.split(chunk), labels.split(chunk)):
            if hidden.dtype == torch.float32:
                logits = x.double() @ weight.double().t()
            else:
                logits = (x @ weight.to(x.dtype).t()).double()
            total += F.cross_entropy(logits, target, ignore_index=-100, reduction="sum")
    return total


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=1024)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--masked", type=float, default=0.0, help="fraction of labels masked")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="also both under torch.compile")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="file for the figures")
    options = parser.parse_args()

    def chunked(hidden, weight, labels):
        return chunked_cross_entropy(hidden, weight, labels, options.chunk)

    contestants = {"plain": plain_cross_entropy, "chunked": chunked}
    if options.compile:  # of the chunked one its softmax is, as by train.py on a GPU
        softmax = functools.partial(loss.softmax_at_once_, compiled=torch.compile(loss.softmax_))
        contestants |= {
            "plain, compiled": torch.compile(plain_cross_entropy, fullgraph=True, dynamic=False),
            "chunked, compiled": lambda hidden, weight, labels: chunked_cross_entropy(
                hidden, weight, labels, options.chunk, softmax=softmax)}
    torch.manual_seed(0)
    figures = []
    for dtype in options.dtype:
        hidden = torch.randn(options.tokens, options.width, device=options.device)
        hidden = hidden.to(getattr(torch, dtype)).requires_grad_()
        weight = torch.randn(options.vocab, options.width, device=options.device) * 0.05
        weight.requires_grad_()
        labels = torch.randint(0, options.vocab, (options.tokens,), device=options.device)
        labels[: int(options.masked * options.tokens)] = -100
        inputs = hidden, weight, labels
        truth = oracle(*inputs, options.chunk).item()
        rows = [{"dtype": dtype, "loss": name,
                 "error": abs(step(function, *inputs).item() - truth) / truth,
                 "bytes": peak_bytes(function, *inputs) - hidden.nbytes - weight.nbytes}
                for name, function in contestants.items()]
        for row, fastest in zip(rows, seconds(contestants.values(), inputs, options.repeats)):
            row["seconds"] = fastest
        figures += rows

    print(f"T {options.tokens}, V {options.vocab}, D {options.width}, chunk {options.chunk},"
          f" {options.masked:.0%} masked; {platform.machine()}, {torch.get_num_threads()} threads,"
          f" torch {torch.__version__}\n")
    print("| dtype | loss | seconds | of plain | MB above inputs and gradients | of plain"
          " | relative error |\n|---|---|---|---|---|---|---|")
    for row in figures:
        plain = next(other for other in figures if other["dtype"] == row["dtype"])
        print(f"| {row['dtype']} | {row['loss']} | {row['seconds']:.2f}"
              f" | {row['seconds'] / plain['seconds']:.2f} | {row['bytes'] / 1e6:.0f}"
              f" | {row['bytes'] / plain['bytes']:.1%} | {row['error']:.1e} |")
    if options.json:
        Path(options.json).write_text(json.dumps(
            {"options": vars(options), "torch": torch.__version__, "figures": figures}, indent=1))


if __name__ == "__main__":
    main()
