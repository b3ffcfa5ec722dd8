"""The flip test: any single flipped byte, truncation or missing file in what we wrote is noticed.

    python tests/long/flip.py               2,500 seeded trials over checkpoints, models, adapters

The folders are those of real small runs: a checkpoint (and an older one before it), the `final/`
of chapter 1, the adapter of chapter 2, and the two merged by merge.py. Each trial damages one file
and gives the folder to everything that loads it: each must end with a UserError of one line, or,
for a checkpoint, go on from the one before.
"""

import argparse
import contextlib
import io
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

from faults import damaged
from helpers import load

import small_runs
from common.errors import UserError
from common.files import checkpoint

RESUMED = 60  # of so many damaged checkpoints, one is also resumed from, to the end of the run


class Folders:
    """Everything that there is to damage, made once in `place`."""

    def __init__(self, place):
        self.options = small_runs.write_inputs(place)
        self.undisturbed, self.run = place / "undisturbed", place / "run"
        self.lora, self.merged = place / "lora", place / "merged"
        for run, chapter, more in ((self.undisturbed, "01", ()), (self.run, "01", ()),
                                   (self.lora, "02", self.base())):
            code, text = small_runs.start([*self.options, *more, "--out", run], chapter)
            assert code == 0, text
        quietly(load("chapter-02/merge.py").main, "--adapter", self.lora / "final",
                "--out", self.merged)
        self.model, self.adapter = self.undisturbed / "final", self.lora / "final"
        self.newest, self.before = (checkpoint.step_folder(self.run, small_runs.STEPS - n)
                                    for n in (0, small_runs.EVERY))

    def base(self):
        return ["--model", self.undisturbed / "final", "--init", "pretrained", "--rank", "2"]

    def loaders(self, folder):
        """[(words, script, arguments)] of all that loads this model or adapter."""
        ask = ("--prompt", "Repeat 1.", "--max-new-tokens", "2", "--device", "cpu")
        out = folder.parent / "out"
        if folder == self.adapter:
            return [("generate --adapter", "chapter-02/generate.py", ("--adapter", folder, *ask)),
                    ("merge --adapter", "chapter-02/merge.py",
                     ("--adapter", folder, "--out", out))]
        found = [(f"generate {chapter}", f"chapter-{chapter}/generate.py",
                  ("--model", folder, *ask)) for chapter in ("01", "02")]
        return [*found,
                ("train", "chapter-01/train.py",
                 [*self.options, "--model", folder, "--init", "pretrained", "--out", out]),
                ("merge --model", "chapter-02/merge.py",
                 ("--adapter", self.adapter, "--model", folder, "--out", out))]


def quietly(action, *arguments):
    """`action`'s main with these arguments; what it prints is given back."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        action(list(map(str, arguments)))
    return said.getvalue()


def try_folder(folders, folder, rng):
    """One trial on a model or adapter folder: every loader refuses it; gives the file's name."""
    with damaged(folder, rng) as what:
        for words, script, arguments in folders.loaders(folder):
            try:
                quietly(load(script).main, *arguments)
            except UserError as error:
                assert "\n" not in str(error) and str(folder) in str(error), (what, words, error)
            else:
                raise AssertionError(f"{words}: not noticed in {folder}: {what}")
            assert not (folder.parent / "out").exists(), (what, words)
    return what.split()[0]


def try_checkpoint(folders, rng, resume):
    """One trial on the newest checkpoint: the one before is found, and said; gives the file's
    name. With `resume` the run is also finished from there, and equals the undisturbed one."""
    folder = folders.newest
    kept = folders.run.with_name("kept")
    shutil.copytree(folder, kept)
    with damaged(folder, rng) as what:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            assert checkpoint.latest(folders.run) == folders.before, what
        assert said.getvalue().count("\n") == 1 and str(folder) in said.getvalue(), what
        if resume:
            code, text, after = small_runs.go_on(folders.options, folders.run)
            assert code == 0 and after == small_runs.STEPS - small_runs.EVERY, (what, text)
            small_runs.assert_equal(folders.run, folders.undisturbed)
    shutil.rmtree(folder)
    kept.rename(folder)
    return what.split()[0]


def trials(folders, count, seed=0, resumed=RESUMED):
    """`count` seeded trials over all folders in turn; Counter of "folder/file" damaged."""
    rng, found = random.Random(seed), Counter()
    kinds = [("checkpoint", folders.newest), ("model", folders.model),
             ("adapter", folders.adapter), ("merged", folders.merged)]
    for trial in range(count):
        kind, folder = kinds[trial % len(kinds)]
        if kind == "checkpoint":
            name = try_checkpoint(folders, rng, trial // len(kinds) % resumed == resumed - 1)
        else:
            name = try_folder(folders, folder, rng)
        found[f"{kind}/{name}"] += 1
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--trials", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        os.environ["XDG_CACHE_HOME"] = f"{place}/cache"
        found = trials(Folders(Path(place)), options.trials, options.seed)
    for name, count in sorted(found.items()):
        print(f"{count:6} {name}")
    print(f"{found.total():6} damaged folders, every one noticed by all that load it; "
          f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
