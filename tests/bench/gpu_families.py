"""Is a family right on a device, its change applied to a copy of this tree? For gpu.py.

    python tests/bench/gpu_families.py qwen3_moe_tied cuda      a check a line, in such a copy

A random model of that family, with its windows, experts and recurrences: packed documents on the
device against each alone on the CPU in float32.
"""

import copy
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[n]) for n in range(3)]
import family_runs
from diffs import apply_diff
from helpers import ROOT


def families(options, figures):
    """A list of generators of rows, of which one may fail without the others."""
    return [family(name, options, figures) for name in family_runs.NAMES]


def family(name, options, figures):
    """The checks of one worked change."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "copy")
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(
            "__pycache__", ".*", "runs", "long"))
        apply_diff((family_runs.EXTENSIONS / f"{name}.diff").read_text(encoding="utf-8"), folder)
        done = subprocess.run(
            [sys.executable, folder / "tests/bench/gpu_families.py", f"{name}_tied",
             options.device.type],
            timeout=max(options.left(), 1), text=True, capture_output=True)
    if done.returncode:
        figures.setdefault("families", {})[name] = done.stdout[-3000:] + done.stderr[-3000:]
        yield name, f"exit code {done.returncode}", "exit code 0", "WRONG"
    for line in done.stdout.splitlines():
        what, error, limit = json.loads(line)
        yield (f"{name}, {what}", f"{error:.1e}", f"at most {limit:g}",
               "ok" if error <= limit else "WRONG")


def checks(name, device):
    """(name, error, limit) of logits and gradients, in both dtypes. In 16 bits a router chooses
    another expert here and there, so that limit only tells a wrong gradient from a rounded one."""
    import family_checks
    from gpu_checks import alone, distance, logits_and_gradients

    torch.backends.cuda.matmul.allow_tf32 = False
    model = family_checks.large(name, initializer_range=0.05).eval()
    random = torch.Generator().manual_seed(0)
    examples = [(ids, ids) for ids in (
        torch.randint(256, (n,), generator=random) for n in family_checks.LENGTHS)]
    wanted = alone(model, examples)
    rounded = (0.2, 0.5) if "moe" in name else (3e-2, 0.1)
    for dtype, limits in ((torch.float32, (1e-5, 1e-4)), (torch.bfloat16, rounded)):
        there = copy.deepcopy(model).to(device)
        there.compute_dtype = dtype
        found = logits_and_gradients(there, examples, device)
        for what, a, b, limit in zip(("logits", "gradients"), found, wanted, limits):
            yield f"{str(dtype)[6:]} {what}", distance(a, b), limit


if __name__ == "__main__":
    for check in checks(*sys.argv[1:]):
        print(json.dumps(check), flush=True)
