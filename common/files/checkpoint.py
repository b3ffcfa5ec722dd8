"""A run's folder and the checkpoints in it: made, found again, pruned.

    python -m common.files.checkpoint verify DIR      check a folder against its manifest
    python -m common.files.checkpoint seal DIR        write the manifest anew after an edit by hand

All ranks call the functions: rank 0 alone touches the disk, all get its answer, or all raise.
"""

import argparse
import contextlib
import itertools
import os
import re
import shutil
import sys
from pathlib import Path

from common.errors import UserError, run_main, writing
from common.files.manifest import (
    CheckpointError, MANIFEST, OLD, TMP, recover, seal, sibling, verify)
from common.ranks import on_main

OF_A_RUN = r"train_config\.json|metrics\.jsonl|(step-\d{6,}|final)(\..*)?"  # names in its folder


def new_run_folder(chapter, out=None):
    """Make the folder of a new run and give its path: `runs/<chapter>/001` (`chapter` is say
    "chapter-01") under the current directory, or the next number after those there, or just `out`.
    Raises UserError if a run is in `out` already, or if it cannot be written."""
    folder = Path(out or f"runs/{chapter}")

    def make():
        with writing(f"{folder} (--out chooses another place)"):
            folder.mkdir(parents=True, exist_ok=True)
            names = os.listdir(folder)
            taken = [int(name) for name in names if name.isdecimal()]
            for number in itertools.count(max(taken, default=0) + 1) if out is None else ():
                with contextlib.suppress(FileExistsError):  # another run was faster
                    (folder / f"{number:03d}").mkdir()
                    return number
        if any(re.fullmatch(OF_A_RUN, name) for name in names):
            raise UserError(f"{out}: a run is there already: go on with it by --resume {out}, or"
                            " choose another --out")

    number = on_main(make)
    return folder / f"{number:03d}" if number else folder


def step_folder(run, step):
    """Where a run keeps the checkpoint of this step."""
    return Path(run) / f"step-{step:06d}"


def _steps(run):
    """The N of every step-N/ of the run, whole or not, newest first."""
    names = [name for name in os.listdir(run) if re.fullmatch("step-[0-9]{6,12}", name)]
    return sorted((int(name[5:]) for name in names), reverse=True)


def _whole_steps(run):
    """The same of the whole ones; reports on stderr which it had to skip."""
    for step in _steps(run):
        folder = step_folder(run, step)
        try:
            if not verify(folder):
                raise CheckpointError(f"{folder}: no {MANIFEST}")
            yield step
        except CheckpointError as error:
            print(f"skipped a damaged checkpoint: {error}", file=sys.stderr)


def latest(run):
    """The newest whole step-N/ of a run folder, or None; reports on stderr which it had to skip."""
    def find():
        for old in Path(run).glob(f"*{OLD}"):
            recover(old.with_suffix(""))
        step = next(_whole_steps(run), -1)
        if step < 0 and _steps(run):
            print(f"{run}: no whole checkpoint is left: from the beginning", file=sys.stderr)
        return step

    step = on_main(find)
    return None if step < 0 else step_folder(run, step)


def prune(run, keep, best=None):
    """Delete the steps older than the newest `keep` (at least 1) whole ones, except step `best`.
    Damaged ones do not count. Call it after a commit."""
    def delete():
        oldest = next(itertools.islice(_whole_steps(run), max(keep, 1) - 1, None), 0)
        for step in _steps(run):
            if step < oldest and step != best:
                folder = step_folder(run, step)
                leftover = sibling(folder, TMP)  # in case the deletion is interrupted
                try:
                    os.rename(folder, leftover)
                    shutil.rmtree(leftover)
                except OSError as error:  # not a reason to end a run
                    print(f"{folder}: old, but cannot be deleted: {error}", file=sys.stderr)

    on_main(delete)


def main():
    parser = argparse.ArgumentParser(prog="python -m common.files.checkpoint")
    parser.add_argument("action", choices=("verify", "seal"))
    parser.add_argument("folder")
    chosen = parser.parse_args()
    if chosen.action == "seal":
        print(f"{chosen.folder}: {seal(chosen.folder)} files sealed")
    elif found := verify(chosen.folder):
        print(f"{chosen.folder}: {len(found['files'])} files, all as written")
    else:
        print(f"{chosen.folder}: no manifest: not written by bareloop")


if __name__ == "__main__":
    run_main(main)
