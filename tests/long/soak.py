"""The soak test: thousands of steps, saved, killed and resumed all the time, in one process.

    python tests/long/soak.py                      2,000 steps
    python tests/long/soak.py --steps 10000

Chapter 1's own loop trains the tiny model on a fixed list of packs, in legs of a few steps. Most
legs end by SIGTERM to itself, so that the run saves and stops, every tenth by an exception in the
middle of a step, as a kill would; the next leg resumes. Live tensor bytes (in a step, and what is
left between two legs), open files, threads and step time must not grow, and the resident set of
the last quarter must be within 2 % of the third's.
(A second process would begin anew each time: what leaks would never be seen.)
"""

import argparse
import contextlib
import gc
import io
import json
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from helpers import load
from live_memory import live_tensor_bytes

import small_runs


PACKS = 8  # the fixed list


class Killed(BaseException):
    """In place of SIGKILL, which would end the measurement too."""


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def leg(train, arguments, last_step, killed):
    """Train up to `last_step` and stop there by a signal; or, if `killed`, die in the step behind
    it. Gives the live tensor bytes in the last step's midst."""
    rate, pack, live = train.learning_rate, train.PackSampler.pack, []

    def watch(step, total, options):
        if step == last_step:
            gc.collect()  # (what only waits for the collector is not alive, and comes and goes)
            live.append(live_tensor_bytes())
        if step == last_step and not killed:
            os.kill(os.getpid(), signal.SIGTERM)
        elif step > last_step:
            raise Killed
        return rate(step, total, options)

    said = io.StringIO()
    with mock.patch.object(train, "learning_rate", watch), mock.patch.object(
            train.PackSampler, "pack", lambda sampler, index: pack(sampler, index % PACKS)), (
            contextlib.redirect_stdout(said)), contextlib.suppress(Killed):
        code = train.main(list(map(str, arguments)))
        assert code == 143, said.getvalue()
    return live[-1]


def soak(folder, steps, every=5, model=("--model", "tiny")):
    """Train `steps` steps in legs of `every`; gives a list of measurements, one for each leg."""
    train = load("chapter-01/train.py")
    options = small_runs.write_inputs(folder)
    run = folder / "run"
    begin = [*options, "--steps", steps + 1, "--save-every", every, "--eval-every", 0,
             "--schedule", "constant", "--keep", 2, "--out", run, *model]
    measured, step = [], 0
    while step < steps:
        step = min(step + every, steps)
        live = leg(train, ["--resume", run] if measured else begin, step,
                   killed=len(measured) % 10 == 9)
        gc.collect()
        with open(run / "metrics.jsonl") as file:
            lines = [json.loads(line) for line in file]
        done = [line["step"] for line in lines if "grad_norm" in line]
        assert done[:step] == list(range(1, step + 1)), "a gap or a repeat"
        measured.append({
            "step": step, "seconds": statistics.median(
                line["step_seconds"] for line in lines[-every:]),
            "resident": resident(), "live": live, "left": live_tensor_bytes(),
            "files": len(os.listdir("/proc/self/fd")), "threads": threading.active_count()})
    return measured


def quarters(measured, name):
    """The medians of a measurement over the four quarters of the run."""
    size = len(measured) // 4
    return [statistics.median(one[name] for one in measured[i * size:(i + 1) * size])
            for i in range(4)]


def judge(measured):
    """Raise AssertionError if anything grew; gives the medians by quarter."""
    found = {name: quarters(measured, name)
             for name in ("resident", "live", "left", "files", "threads", "seconds")}
    for name in ("live", "left", "files", "threads"):  # (packs differ by some hundred bytes)
        assert found[name][3] <= 1.0001 * found[name][1], (name, found)
    assert found["resident"][3] <= 1.02 * found["resident"][2], found
    assert found["seconds"][3] <= 1.25 * min(found["seconds"][:3]), found
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=5, help="steps in a leg (default: 5)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        measured = soak(Path(folder), options.steps, options.every)
    for name, values in {name: quarters(measured, name) for name in measured[0]}.items():
        print(f"{name:9} by quarter: " + "  ".join(f"{value:,.6g}" for value in values))
    judge(measured)
    print(f"{options.steps:,} steps in {len(measured):,} starts, every tenth ended by a kill; "
          f"nothing grew; {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
