"""The kill test: whenever a run is killed, the next start makes of it what it would have become.

    python tests/long/kill.py                               chapter 1, 200 random moments, all calls
    python tests/long/kill.py --chapter 02 --random 100 --every 4

A small run gets SIGKILL at random moments (up to three times in a row), and in a second sweep ends
at each call that changes the disk: every write, flush, rename, mkdir, unlink. Each time the next
start must go on from the newest checkpoint, which must be whole, and the finished run must equal
an undisturbed one bit for bit: weights, moments, random states, `final/`, logged numbers. Two more
sweeps have each of these calls fail, as on a full and on a broken disk.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]
os.environ["HF_HUB_OFFLINE"] = "1"

from faults import KILLED, broken_disk, disk_full, end_process

import small_runs


class Sweep:
    """The runs of one sweep: chapter, options, the undisturbed run and how long it took."""

    def __init__(self, folder, chapter="01", more=(), steps=small_runs.STEPS):
        self.chapter, self.steps = chapter, steps
        self.options = [*small_runs.write_inputs(folder, steps), *more]
        self.undisturbed, self.run = folder / "undisturbed", folder / "run"
        for _ in range(2):  # the second one finds its data in the cache, as all later ones do
            shutil.rmtree(self.undisturbed, ignore_errors=True)
            began = time.monotonic()
            code, text = small_runs.start([*self.options, "--out", self.undisturbed], chapter)
            assert code == 0, text
            self.seconds = time.monotonic() - began

    def fresh(self):
        shutil.rmtree(self.run, ignore_errors=True)

    def begin(self, **keywords):
        return small_runs.start([*self.options, "--out", self.run], self.chapter, **keywords)

    def go_on(self, where, **keywords):
        """Start again after a kill; gives (exit code, step that it began after)."""
        steps = small_runs.whole_steps(self.run)
        code, text, after = small_runs.go_on(
            self.options, self.run, chapter=self.chapter, **keywords)
        if code == 0:
            assert after == max(steps, default=0), (where, after, steps)
        elif code not in (-9, KILLED):
            raise AssertionError(f"{where}: the next start failed:\n{text}")
        return code, after

    def finish(self, where):
        """The next start, left alone, and the comparison; gives the step that it began after."""
        code, after = self.go_on(where)
        assert code == 0, where
        try:
            small_runs.assert_equal(self.run, self.undisturbed, self.steps)
        except AssertionError as error:
            raise AssertionError(f"{where}, gone on after step {after}: {error}") from error
        return after


def random_moments(sweep, count, seed=0):
    """`count` runs killed at random moments, some again as they go on; Counter of the steps that
    the last start began after."""
    rng, afters = random.Random(seed), Counter()
    for trial in range(count):
        sweep.fresh()
        moments = [rng.uniform(0.02, 1.1 * sweep.seconds) for _ in range(rng.choice((1, 1, 2, 3)))]
        where = f"trial {trial}, killed after {', '.join(f'{m:.3f}' for m in moments)} s"
        code, text = sweep.begin(kill_after=moments[0])
        assert code in (-9, 0), (where, text)
        for moment in moments[1:]:
            sweep.go_on(where, kill_after=moment)
        afters[sweep.finish(where)] += 1
    return afters


def every_change(sweep, choose=lambda calls: range(len(calls))):
    """Runs that end at a call that changes the disk, for each of those that `choose` gives;
    Counter of the steps that the next start began after."""
    sweep.fresh()
    calls = small_runs.changes_of_the_disk(
        [*sweep.options, "--out", sweep.run], sweep.chapter)
    afters = Counter()
    for at in choose(calls):
        sweep.fresh()
        where = f"ended at call {at} of {len(calls)} ({calls[at]})"
        code, text = sweep.begin(fault=end_process, at=at)
        assert code == KILLED, (where, text)
        afters[sweep.finish(where)] += 1
    return afters


def every_failure(sweep, fault, choose=lambda calls: range(len(calls))):
    """As `every_change`, but the call fails, as on a full or a broken disk: the run must end with
    one clear line, or go on where that is right; Counter of the exit codes."""
    sweep.fresh()
    calls = small_runs.changes_of_the_disk(
        [*sweep.options, "--out", sweep.run], sweep.chapter)
    codes = Counter()
    for at in choose(calls):
        sweep.fresh()
        where = f"{fault.__name__} at call {at} of {len(calls)} ({calls[at]})"
        code, text = sweep.begin(fault=fault, at=at)
        assert code in (0, 2) and "Traceback" not in text, (where, text)
        assert code == 0 or text.splitlines()[-1].startswith("error: "), (where, text)
        codes[code] += 1
        sweep.finish(where)
    return codes


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--chapter", default="01")
    parser.add_argument("--random", type=int, default=200, help="random moments (default: 200)")
    parser.add_argument("--every", type=int, default=1, help="each how-many-eth call (default: 1)")
    parser.add_argument("--steps", type=int, default=12, help="of a run (default: 12)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--more", nargs=argparse.REMAINDER, default=[], help="options of train.py")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        began = time.monotonic()
        sweep = Sweep(Path(folder), options.chapter, options.more, options.steps)
        afters = random_moments(sweep, options.random, options.seed)
        print(f"{afters.total()} runs of chapter {options.chapter} killed at random moments, each "
              f"equal afterwards; gone on after step: {dict(sorted(afters.items()))}", flush=True)
        afters = every_change(sweep, lambda calls: range(0, len(calls), options.every))
        print(f"{afters.total()} runs ended at a change of the disk, each equal afterwards; gone on "
              f"after step: {dict(sorted(afters.items()))}")
        for fault in (disk_full, broken_disk):
            codes = every_failure(sweep, fault, lambda calls: range(0, len(calls), options.every))
            print(f"{codes.total()} runs with {fault.__name__} at a change of the disk: "
                  f"{codes[2]} ended with one line, {codes[0]} went on; each equal afterwards")
        print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
