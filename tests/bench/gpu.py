"""A GPU in two runs of five minutes: is it right, does it reach the targets, what brought it there.

    python tests/bench/gpu.py --out gpu.json                      on a machine with a CUDA device
    python tests/bench/gpu.py --part peers ladder --out b.json    some of it
    python tests/bench/gpu.py --device cpu --size tiny            the same code anywhere: a minute

Nothing is downloaded: the models have their real shapes and random weights, the documents are
random tokens. The parts stand in the order of their worth. What fails is told with its error, and
the next measurement begins; after every row the figures so far are in --out. The targets are chapter
3's; on another GPU than a target is for, and on a CPU, the figure is printed and the target is "not
measured". Beside --out lie the timelines of profile_step.py. The exit code is 1 if a check of
correctness or a part failed, whatever the speed.
"""

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import gpu_families
import gpu_pieces
import gpu_runs
import gpu_targets
from gpu_checks import first_checks, other_checks
from helpers import ROOT
from report import conditions, importable, show_conditions, table, write

LARGEST_FILE = 16 * 2**20  # bytes of what is left beside --out
EXPANDABLE = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


def allocator(device):
    """A row: whether this machine can do what a run asks of PyTorch's allocator (`choose_device` in
    common/options.py); if so, it is asked for here too. To be called before CUDA starts."""
    program = "import torch; torch.ones(9, device='cuda').cpu()"
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, **EXPANDABLE},
                          capture_output=True, text=True)
    if done.returncode == 0:
        os.environ.update(EXPANDABLE)
    said = "work" if done.returncode == 0 else "; ".join(
        [f"exit code {done.returncode}", *done.stderr.strip().splitlines()[-1:]])
    return "expandable segments", said, "work", gpu_targets.verdict(done.returncode == 0)


def checks(chosen):
    """A part that makes rows of checks."""
    def rows(check):
        for name, error, limit in check:
            yield name, f"{error:.1e}", f"at most {limit:g}", "ok" if error <= limit else "WRONG"
    return lambda options, figures: map(rows, chosen(options.device, options.backend))


def single(rows):
    """A part of one measurement."""
    return lambda options, figures: [rows(options, figures)]


def reports(options):
    """Chapter 3's own reports on this device, as (name, script, arguments)."""
    device = ["--device", options.device.type]
    model = ["--model", "qwen3-0.6b", "--init", "random", "--data", "virtual", *device, "--compile",
             "--batch-tokens", "16384"]
    dense = ["--method", "full", "--quantize", "none"]
    yield "profile", "chapter-03/profiling/profile_step.py", [*model, *dense]
    yield "profile-lora", "chapter-03/profiling/profile_step.py", [*model, "--quantize", "none"]
    yield "profile-qlora", "chapter-03/profiling/profile_step.py", model
    yield "ladder", "chapter-03/profiling/ladder.py", ["--size", "0.6b", "--first", "packing",
                                                       "--steps", "2", *device]


def run_report(name):
    """A part that runs one of chapter 3's reports in a process of its own."""
    def rows(options, figures):
        if options.size != "full":
            return
        script, arguments = next(rest for found, *rest in reports(options) if found == name)
        with tempfile.TemporaryDirectory() as folder:
            text, code = Path(folder, "text"), "out of time"
            with open(text, "w") as file:
                try:
                    code = subprocess.run(
                        [sys.executable, ROOT / script, *arguments, "--out", f"{folder}/out"],
                        timeout=options.left(), stdout=file, stderr=subprocess.STDOUT).returncode
                except subprocess.TimeoutExpired:
                    pass
            print(text.read_text(), flush=True)
            figures[name] = {"text": text.read_text(), "files": {
                path.name: json.loads(path.read_text()) for path in
                sorted(Path(folder, "out").glob("*.json"))}}
            trace = Path(folder, "out", "trace.json.gz")
            if options.out and trace.exists() and trace.stat().st_size <= LARGEST_FILE:
                shutil.copy(trace, Path(options.out).with_name(f"{name}-trace.json.gz"))
        yield f"{script} {' '.join(arguments[:4])} ...", f"exit code {code}", "0", (
            gpu_targets.verdict(code == 0))
    return single(rows)


# Each gives its measurements, as generators of rows.
PARTS = {"attention": checks(first_checks), "speed": gpu_targets.speed,
         "chapter-1": single(gpu_targets.chapter_1), "peers": gpu_targets.peers,
         "8b": single(gpu_targets.eight_billion), "loss": single(gpu_targets.loss_cost),
         "loading": single(gpu_targets.loading), "shapes": single(gpu_targets.shapes),
         "checks": checks(other_checks), "families": gpu_families.families,
         "runs": gpu_runs.runs, "pieces": gpu_pieces.pieces,
         **{name: run_report(name) for name in (
             "profile", "profile-lora", "profile-qlora", "ladder")}}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
                        help=f"only these, of: {', '.join(PARTS)}")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each kind")
    parser.add_argument("--backend", default="inductor", help="torch.compile's; eager: none needed")
    parser.add_argument("--seconds", type=int, default=280, help="nothing new begins after these")
    parser.add_argument("--out", help="file for the figures, as JSON")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA device here; --device cpu --size tiny runs anywhere")
    options.device, started = torch.device(options.device), time.perf_counter()
    options.left = lambda: options.seconds - (time.perf_counter() - started)
    rows, figures = [], {}

    def told(part, *row):
        rows.append((part, *row))
        print("; ".join(row), flush=True)
        write(options.out, {**found, "seconds": time.perf_counter() - started, "rows": rows,
                            "figures": figures})

    first = [allocator(options.device)] if options.device.type == "cuda" else []
    found = conditions()
    show_conditions(found)
    for row in first:
        told("allocator", *row)
    for name in (name for name in PARTS if name in options.part):
        print(f"\n## {name}, after {time.perf_counter() - started:.0f} s\n", flush=True)
        for measurement in PARTS[name](options, figures):
            if options.left() <= 0:
                told(name, name, "out of time", "", "not measured")
                break
            try:
                with importable("chapter-03"):
                    for row in measurement:
                        told(name, *row)
            except Exception as error:  # the next measurement is worth having all the same
                traceback.print_exc()
                figures.setdefault("errors", []).append(traceback.format_exc())
                said = (str(error).splitlines() or [""])[0][:200]
                told(name, name, f"{type(error).__name__}: {said}", "", "FAILED")
            torch.compiler.reset()
            gc.collect()
            if options.device.type == "cuda":
                torch.cuda.empty_cache()

    show_conditions(found)
    table(["what", "measured", "target", ""], [row[1:] for row in rows])
    bad = [row for row in rows if row[-1] in ("WRONG", "FAILED")]
    print(f"\n{len(rows)} rows, {len(bad)} wrong or failed"
          + "".join(f"\n{row[-1]}: {row[1]}" for row in bad)
          + f"\n{time.perf_counter() - started:.0f} seconds")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
