"""Folders that are whole or not there: how checkpoints and results are written, found, deleted.

A commit writes `step-000200.tmp/`, flushes every file, writes manifest.json with the size and
SHA-256 of each last, flushes the folder, renames it to `step-000200/` and flushes the parent.
Only then may an older one go. So whenever the machine stops, the last whole folder is there.

    python -m common.checkpoint verify DIR      check a folder against its manifest
    python -m common.checkpoint seal DIR        write the manifest anew after an edit by hand

Under torchrun all ranks call these functions: rank 0 alone touches the disk, all get its answer,
and where it fails all raise. What is inside a step folder: `common/state.py`.
"""

import argparse
import ctypes
import errno
import os
import platform
import re
import shutil
import sys
from pathlib import Path

import safetensors
import torch

from common import manifest
from common.distributed import all_sum, any_rank
from common.errors import UserError
from common.manifest import MANIFEST, MARK, CheckpointError, read_manifest, seal
from common.metrics import readable_bytes
from common.tensor_files import is_writer

__all__ = ["MARK", "CheckpointError", "check_space", "commit", "latest", "new_run_folder",
           "prune", "recover", "seal", "step_folder", "together", "verify"]
FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
_hashed = {}  # folder -> what `_looks` gave when this process last knew it to be whole


def _on_main(action):
    """The whole number that `action()` gives on rank 0, on every rank."""
    number = together(lambda: action() if is_writer() else 0)
    return int(all_sum(torch.tensor([number or 0], dtype=torch.int64)).item())


# --- run folders ---

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
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return any(name in ("train_config.json", "metrics.jsonl") or _in_run(name) for name in names)


def _in_run(name):
    """True for the folders that a run makes, whole or left over: step-000200, final, *.tmp, *.old."""
    return re.fullmatch(r"(step-\d{6,}|final)(\.tmp|\.old)?", name) is not None


def _steps(run):
    """Every step-N/ of the run, newest first; whether they are whole is open."""
    try:
        names = [path.name for path in Path(run).iterdir()]
    except OSError as error:
        raise UserError(f"{run}: not a run folder: {error.strerror}") from error
    steps = sorted((int(name[5:]) for name in names if re.fullmatch(r"step-\d{6,}", name)))
    return [step_folder(run, step) for step in reversed(steps)]


def latest(run):
    """The newest whole step-N/ of a run folder, or None; says on stderr which it had to skip."""
    def find():
        for old in Path(run).glob("*.old"):
            if _in_run(old.name):
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
                    os.rename(folder, _beside(folder, ".tmp"))  # stopped midway: a leftover
                    _remove(_beside(folder, ".tmp"))
            elif _hashed.get(str(folder.absolute())) == _looks(folder) or _is_whole(folder):
                whole += 1

    together(lambda: delete() if is_writer() else None)


def verify(folder):
    """`common.manifest.verify`, after putting right a replacement that was cut short."""
    recover(folder)
    return manifest.verify(folder)


def _is_whole(folder):
    try:
        if verify(folder):
            _hashed[str(folder.absolute())] = _looks(folder)
            return True
        print(f"skipped {folder}: it has no {MANIFEST}", file=sys.stderr)
    except CheckpointError as error:
        print(f"skipped a damaged checkpoint: {error}", file=sys.stderr)
    return False


def _looks(folder):
    """Name, inode, size and time of each file: equal while nobody has touched them."""
    stats = [(path.name, path.stat()) for path in sorted(folder.iterdir())]
    return [(name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


if __name__ == "__main__":
    from common.cli import run

    def main():
        parser = argparse.ArgumentParser(prog="python -m common.checkpoint")
        parser.add_argument("action", choices=("verify", "seal"))
        parser.add_argument("folder", type=Path)
        arguments = parser.parse_args()
        if arguments.action == "seal":
            print(f"{arguments.folder}: {seal(arguments.folder)} files sealed")
        else:
            found = manifest.verify(arguments.folder)
            print(f"{arguments.folder}: " + (f"{len(found['files'])} files, all as written" if found
                                             else "no manifest: not written by bareloop"))

    run(main)
