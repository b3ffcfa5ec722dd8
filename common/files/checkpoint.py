"""A run's folder and the checkpoints in it: made, found again, pruned. Never a half-written one.

Writing is `commit` (common/files/commit.py), which makes a folder appear at once and whole; checking is
`verify` (common/files/manifest.py), which notices any changed byte; what is inside a step folder is
`save_state` and `load_state` (common/files/state.py). All of them can be imported from here.

    python -m common.files.checkpoint verify DIR      check a folder against its manifest
    python -m common.files.checkpoint seal DIR        write the manifest anew after an edit by hand

Under torchrun all ranks call `new_run_folder`, `commit`, `latest` and `prune`: rank 0 alone
touches the disk, all get its answer, and where it fails all raise.
"""

import argparse
import errno
import os
import re
import sys
from pathlib import Path

import torch

from common.errors import UserError
from common.files import manifest
from common.files.commit import (
    check_space, commit, in_run, is_verified, mark_verified, recover, remove, sibling)
from common.files.manifest import CheckpointError, MANIFEST, MARK, seal
from common.files.state import load_state, save_state, state_bytes
from common.ranks import all_sum, is_main, on_all_ranks

__all__ = ["MARK", "CheckpointError", "check_space", "commit", "latest", "load_state",
           "new_run_folder", "prune", "recover", "save_state", "seal", "state_bytes",
           "step_folder", "verify"]


def _on_main(action):
    """The whole number that `action()` gives on rank 0, on every rank."""
    number = on_all_ranks(lambda: action() if is_main() else 0)
    return int(all_sum(torch.tensor([number or 0], dtype=torch.int64)).item())


def new_run_folder(chapter, out=None):
    """Make the folder of a new run and give its path.

    It is `runs/<chapter>/001` (`chapter` is say "chapter-01") under the current directory, or the
    next number after those there; `out` names it exactly. Raises UserError if a run is in `out`
    already, or if it cannot be written.
    """
    runs = Path("runs") / chapter

    def make():
        folder = Path(out or runs)
        if out is not None and _is_run(folder):
            raise UserError(f"{out}: a run is there already: go on with it by --resume {out}, or"
                            " choose another --out")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            number = 0
            while out is None:
                taken = [int(path.name) for path in runs.iterdir() if path.name.isdecimal()]
                number = max(taken, default=0) + 1
                try:
                    (runs / f"{number:03d}").mkdir()
                    break
                except FileExistsError:  # a run that started at the same moment has it
                    continue
        except OSError as error:
            raise UserError(f"{folder}: cannot be written: {error.strerror}; choose another place"
                            " with --out") from error
        return number

    number = _on_main(make)
    return Path(out) if out is not None else runs / f"{number:03d}"


def step_folder(run, step):
    """Where a run keeps the checkpoint of this step."""
    return Path(run) / f"step-{step:06d}"


def _is_run(folder):
    names = [path.name for path in folder.iterdir()] if os.path.isdir(folder) else []
    return any(name in ("train_config.json", "metrics.jsonl") or in_run(name) for name in names)


def _steps(run):
    """Every step-N/ of the run, newest first; whether they are whole is open."""
    try:
        names = [path.name for path in Path(run).iterdir()]
    except OSError as error:
        raise UserError(f"{run}: not a run folder: {error.strerror}") from error
    steps = [int(name[5:]) for name in names if re.fullmatch(r"step-[0-9]{6,12}", name)]
    return [step_folder(run, step) for step in sorted(steps, reverse=True)]


def latest(run):
    """The newest whole step-N/ of a run folder, or None; says on stderr which it had to skip."""
    def find():
        for old in Path(run).glob("*.replaced"):
            if in_run(old.name):
                recover(old.with_suffix(""))
        return next((int(folder.name[5:]) for folder in _steps(run) if _is_whole(folder)), -1)

    step = _on_main(find)
    return None if step < 0 else step_folder(run, step)


def prune(run, keep, best=None):
    """Delete the step folders older than the newest `keep` (at least 1) whole ones.

    The folder `best` always stays. Damaged ones do not count. Call it after a commit.
    """
    def delete():
        whole = 0
        for folder in _steps(run):
            if whole >= max(keep, 1):
                if best is None or folder.name != Path(best).name:
                    _delete(folder)
            elif is_verified(folder) or _is_whole(folder):
                whole += 1

    on_all_ranks(lambda: delete() if is_main() else None)


def _delete(folder):
    try:
        os.rename(folder, sibling(folder, ".tmp"))  # stopped midway, it is a leftover
        remove(sibling(folder, ".tmp"))
    except OSError as error:  # no reason to end a run
        print(f"{folder}: an old checkpoint that cannot be deleted: {error}", file=sys.stderr)


def verify(folder):
    """`common.files.manifest.verify`, after putting right a replacement that was cut short."""
    recover(folder)
    found = manifest.verify(folder)
    if found:
        mark_verified(folder)
    return found


def _is_whole(folder):
    try:
        if verify(folder):
            return True
        print(f"skipped {folder}: it has no {MANIFEST}", file=sys.stderr)
    except CheckpointError as error:
        print(f"skipped a damaged checkpoint: {error}", file=sys.stderr)
    return False


if __name__ == "__main__":
    from common.options import run

    def main():
        parser = argparse.ArgumentParser(prog="python -m common.files.checkpoint")
        parser.add_argument("action", choices=("verify", "seal"))
        parser.add_argument("folder", type=Path)
        arguments = parser.parse_args()
        if arguments.action == "seal":
            print(f"{arguments.folder}: {seal(arguments.folder)} files sealed")
        else:
            found = verify(arguments.folder)
            print(f"{arguments.folder}: " + (f"{len(found['files'])} files, all as written" if found
                                             else "no manifest: not written by bareloop"))

    run(main)
