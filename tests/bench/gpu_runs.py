"""The chapters' scripts as a user calls them, on a GPU: a run, its resume, an answer. For gpu.py.

Rows are (what, measured, "exit code 0", verdict); what was printed by a script that failed is in
`figures["runs"]`. The embedded model shows that everything goes through; Qwen3-0.6B with random
weights on documents of varied length, how fast `train.py` itself is.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]
from helpers import ROOT

# (name, folder of generate.py, training script) of what the embedded model goes through.
SMALL = [*((f"chapter {n}", f"chapter-0{n}", "train.py") for n in "123"),
         *((name, "chapter-03", f"post_training/train_{name}.py")
           for name in ("dpo", "grpo", "distill"))]
# (chapter, options) of runs at full size.
LARGE = (("1", ()), ("2", ()), ("3", ("--compile",)),
         ("3", ("--compile", "--method", "full", "--quantize", "none")))


def runs(options, figures):
    """A list of generators of rows, of which one may fail without the others."""
    large = [through(*one, options, figures) for one in LARGE if options.size == "full"]
    return [*(run_resume_ask(*one, options, figures) for one in SMALL), *large]


def call(what, script, arguments, options, figures):
    """A row for a call of a script."""
    device = ["--device", options.device.type]
    done = subprocess.run([sys.executable, ROOT / script, *map(str, arguments), *device], text=True,
                          timeout=max(options.left(), 1), capture_output=True)
    good = done.returncode == 0
    if not good:
        figures.setdefault("runs", {})[what] = done.stdout[-3000:] + done.stderr[-3000:]
    return what, f"exit code {done.returncode}", "exit code 0", "ok" if good else "WRONG"


def run_resume_ask(name, folder, script, options, figures):
    """The embedded model: two steps and two checkpoints, a step more, an answer."""
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch, "run")
        yield call(f"{name}, embedded model: {script}", f"{folder}/{script}", [
            "--model", "tiny", "--out", run, "--steps", 2, "--schedule", "constant",
            "--save-every", 1, "--eval-every", 1], options, figures)
        yield call(f"{name}, embedded model: {script} --resume", f"{folder}/{script}",
                   ["--resume", run, "--steps", 3], options, figures)
        trained = "--model" if folder == "chapter-01" else "--adapter"
        yield call(f"{name}, embedded model: generate.py", f"{folder}/generate.py",
                   [trained, run / "final", "--prompt", "What is 2 + 7?"], options, figures)


def through(chapter, more, options, figures):
    """Ten steps of Qwen3-0.6B in packs as large as the card has room for; the speed of the last."""
    name = " ".join(("Qwen3-0.6B, chapter", chapter, *more))
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch, "run")
        row = call(f"{name}: train.py", f"chapter-0{chapter}/train.py", [
            "--model", "qwen3-0.6b", "--init", "random", "--data", "virtual", "--steps", 10,
            "--save-every", 0, "--eval-every", 0, "--out", run, *more], options, figures)
        yield row
        if row[-1] == "WRONG":
            return
        lines = map(json.loads, Path(run, "metrics.jsonl").read_text().splitlines())
        last = [line for line in lines if "tokens_per_second" in line][-1]
        figures.setdefault("runs", {})[name] = last
        yield (f"{name}: its tenth step", f"{last['tokens_per_second']:,.0f} tokens/s, "
               f"peak {last['peak_memory_bytes'] / 1e9:.3g} GB", "none", "measured")
