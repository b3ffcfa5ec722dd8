"""Three bugs that leave the results right and only make the step slow. Find them by profiling.

    python chapter-03/profiling/bugs.py             a healthy step
    python chapter-03/profiling/bugs.py --bug-1     and so on: what has changed, and why?

Each prints step times, the slowest operators and where the trace is: read those, not this file."""

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = map(str, Path(__file__).resolve().parents[1:3])

import torch
from torch.profiler import profile

from buckets import seconds_of
from common.errors import run_main
from common.files.checkpoint import new_run_folder
from common.options import choose_device, option, read_flags
from profile_step import first_packs, set_up, step_of
from train import CHAPTER, Options


@dataclass
class BugOptions:
    """Which bug to plant, and how to run."""
    bug_1: bool = option(False, "the first bug")
    bug_2: bool = option(False, "the second bug")
    bug_3: bool = option(False, "the third bug")
    steps: int = option(6, "steps, of which the last is profiled", least=2)
    batch_tokens: int = option(1024, "tokens of a step", least=64)
    backend: str = option("aot_eager", "torch.compile's backend: aot_eager needs no compiler, "
                              "inductor is what training uses", choices=("aot_eager", "inductor"))
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    out: str = option(None, "the folder of the timeline")


def check_finite(layer, inputs, output):
    """A hook that checks whether a layer's output is still finite."""
    if not output.abs().max().item() < 1e6:
        raise FloatingPointError("a layer gives values that are not finite")


def main(argv=None):
    options = BugOptions(**read_flags(BugOptions, __doc__.split("\n\n")[0], argv))
    device = choose_device(options.device)
    training = Options(
        model="tiny", init="random", data=["virtual"], batch_tokens=options.batch_tokens,
        max_seq_len=options.batch_tokens // 4, method="full", quantize="none", rank=16, alpha=32.0,
        lr=1e-4, dtype="float32", device=device.type, compile=not options.bug_2)
    model, optimizer, adapter, data = set_up(training)
    model.chunk = 16 if options.bug_3 else 1024
    for layer in model.model.layers:
        layer.mlp.compile(backend=options.backend, dynamic=False)
        if options.bug_1:
            layer.register_forward_hook(check_finite)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch._dynamo.config.recompile_limit = max(8, 2 * options.steps)

    lists, pack_of = first_packs(training, data, options.steps)
    for number, examples in enumerate(lists, 1):
        pack = pack_of(examples[number - 1:] if options.bug_2 else examples)
        with profile() if number == options.steps else contextlib.nullcontext() as profiler:
            seconds = seconds_of(step_of(model, optimizer, pack, adapter, 1.0), device)
        print(f"step {number}: {1e3 * seconds:8.1f} ms, {len(pack['labels'])} tokens, compiled so "
              f"far: {torch._dynamo.utils.counters['stats']['unique_graphs']}")

    rows = {row.key: row for row in profiler.key_averages()}
    time_of = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(f"\n{'operators of the last step':<52}{'ms':>10}{'calls':>10}")
    for row in sorted(rows.values(), key=lambda row: -getattr(row, time_of))[:12]:
        print(f"{row.key[:50]:<52}{getattr(row, time_of) / 1e3:>10.2f}{row.count:>10}")
    # If an operator itself asks for a number, it is not Python that waits.
    waits = sum(event.name == "aten::item" and "::" not in getattr(event.cpu_parent, "name", "")
                for event in profiler.events())
    print(f"\nmatrix products {rows['aten::mm'].count}, numbers that Python has waited for {waits}")
    out = new_run_folder(f"chapter-{CHAPTER}-bugs", options.out)
    profiler.export_chrome_trace(str(out / "trace.json.gz"))
    print(f"\n{out / 'trace.json.gz'}: the timeline; open it at https://ui.perfetto.dev")
    return 0


if __name__ == "__main__":
    run_main(main)
