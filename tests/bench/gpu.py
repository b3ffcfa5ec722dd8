"""A GPU in ten minutes: is it right, does it reach the targets, what brought it there.

    python tests/bench/gpu.py --out gpu.json                    on a machine with a CUDA device
    python tests/bench/gpu.py --device cpu --size tiny          the same code anywhere, in seconds

Nothing is downloaded: the models have their real shapes and random weights, the documents are
random tokens. The targets are chapter 3's, compiled. On another GPU than a target is for, and on a
CPU, the figure is printed and the target is "not measured". Then chapter 3's profile of a step and
its ladder, while there is time. The short table at the end is the result; the exit code is 1 if a
check of correctness failed, whatever the speed.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import gpu_targets
from gpu_checks import all_checks
from helpers import ROOT
from report import conditions, importable, show_conditions, table, write


def reports(options):
    """Chapter 3's own reports on this device, as (script, arguments): where the time of a step of
    each kind goes, and what each improvement brings."""
    device = ["--device", options.device.type]
    model = ["--model", "qwen3-0.6b", "--init", "random", "--data", "virtual", *device]
    dense, lora = ["--method", "full", "--quantize", "none"], ["--quantize", "none"]
    for method in (dense, lora, []):  # the last: QLoRA
        yield "chapter-03/profile_step.py", model + method
    yield "chapter-03/ladder.py", ["--size", "0.6b", *device]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each kind")
    parser.add_argument("--backend", default="inductor", help="torch.compile's; eager: none needed")
    parser.add_argument("--seconds", type=int, default=540, help="nothing new begins after these")
    parser.add_argument("--out", help="file for the figures, as JSON")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA device here; --device cpu --size tiny runs anywhere")
    options.device = torch.device(options.device)
    found, figures, started = conditions(), {}, time.perf_counter()
    show_conditions(found)

    print("\n## Correctness\n")
    checks = []
    for name, error, limit in all_checks(options.device):
        checks.append({"name": name, "error": error, "limit": limit, "good": error <= limit})
        print(f"{'ok    ' if error <= limit else 'WRONG '} {error:8.1e} of {limit:g}: {name}",
              flush=True)

    print("\n## Targets\n")
    rows = []
    with importable("chapter-03"):
        for part in (gpu_targets.speed, gpu_targets.loss_cost, gpu_targets.shapes,
                     gpu_targets.loading, gpu_targets.eight_billion):
            if time.perf_counter() - started > options.seconds:
                rows.append((part.__name__, "out of time", "", "not measured"))
                continue
            for row in part(options, figures):
                rows.append(row)
                print("; ".join(row), flush=True)
    write(options.out, {**found, "checks": checks, "figures": figures, "rows": rows})
    for script, arguments in reports(options) if options.size == "full" else ():
        left = options.seconds - (time.perf_counter() - started)
        print(f"\n## {script} {' '.join(arguments)}\n", flush=True)
        try:  # its files lie beside --out
            done = subprocess.run([sys.executable, ROOT / script, *arguments], timeout=left,
                                  cwd=Path(options.out).parent if options.out else None)
            rows.append((script, f"exit code {done.returncode}", "0", "see above"))
        except subprocess.TimeoutExpired:
            rows.append((script, "out of time", "", "not measured"))

    wrong = [check["name"] for check in checks if not check["good"]]
    show_conditions(found)
    table(["what", "measured", "target", ""], rows)
    print(f"\ncorrectness: {len(checks) - len(wrong)} of {len(checks)} checks"
          + "".join(f"\nWRONG: {name}" for name in wrong)
          + f"\n{time.perf_counter() - started:.0f} seconds")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
