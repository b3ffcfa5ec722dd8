"""Folders that are whole or not there: how every checkpoint and result is written and found.

A commit writes `step-000200.tmp/`, flushes every file, writes manifest.json with the size and
SHA-256 of each last, flushes the folder, renames it to `step-000200/` and flushes its parent.
Only then may an older one go. So whenever the machine stops, the last whole folder is still
there, and neither safetensors nor JSON would notice a flipped byte: the manifest does.

    python -m common.checkpoint verify DIR      check a folder against its manifest
    python -m common.checkpoint seal DIR        write the manifest anew after an edit by hand

Every function here may be called by all ranks of a torchrun run: rank 0 alone touches the disk,
all get its answer, and all raise if it failed. The training state inside is `common/state.py`.
"""

import argparse
import ctypes
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import sys
from pathlib import Path

import safetensors
import torch

from common.distributed import all_sum, any_rank
from common.errors import UserError
from common.metrics import readable_bytes

MANIFEST = "manifest.json"
MARK = {"format": "pt", "bareloop": MANIFEST}  # header of our safetensors: a manifest belongs here
CHECKED = (".safetensors", ".json", ".jinja")  # loaders read these: none may appear unlisted
FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)

_hashed = {}  # folder -> what `_looks` gave when this process last hashed all of it


class CheckpointError(UserError):
    """A folder that is damaged, incomplete or does not fit the model."""


# --- ranks ---

def is_main():
    """True on the one rank that touches the disk; always in a single process."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def together(action):
    """`action()` on every rank; where it fails on one, all raise, so that none waits for ever."""
    answer = failure = None
    try:
        answer = action()
    except Exception as error:
        failure = error
    if any_rank(failure is not None):
        raise failure or UserError("another rank failed: its own message says why")
    return answer


def _from_main(action):
    """The whole number that `action()` gives on rank 0, on every rank."""
    number = together(lambda: action() if is_main() else 0)
    return int(all_sum(torch.tensor([number], dtype=torch.int64)).item())


# --- run folders ---

def new_run_folder(chapter, out=None):
    """Make the folder of a new run and give its path.

    It is `runs/<chapter>/001` (say chapter "chapter-01") under the current directory, or the next
    number after those there; `out` names it exactly. Raises UserError if a run is in `out`
    already, or if it cannot be written.
    """
    runs = Path("runs") / chapter

    def make():
        if out is not None and _is_run(Path(out)):
            raise UserError(
                f"{out}: a run is there already; go on with it by --resume {out}, or choose"
                " another --out")
        folder = Path(out or runs)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            if out is not None:
                return 0
            number = max((int(f.name) for f in runs.iterdir() if f.name.isdecimal()), default=0)
            while True:  # two runs that start at the same moment get two numbers
                number += 1
                try:
                    (runs / f"{number:03d}").mkdir()
                    return number
                except FileExistsError:
                    continue
        except OSError as error:
            raise UserError(
                f"{folder}: no run folder can be made here: {error.strerror}; choose another"
                " place with --out") from error

    number = _from_main(make)
    return Path(out) if out is not None else runs / f"{number:03d}"


def _is_run(folder):
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return bool(names & {"train_config.json", "metrics.jsonl"} or any(map(_in_run, names)))


def _in_run(name):
    """True for the folder names that a run itself makes: step-000200, final, and their leavings."""
    return bool(re.fullmatch(r"(step-\d+|final)(\.tmp|\.old)?", name))


def _steps(run):
    """(step, folder) of every step-N/ in the run, newest first; whether they are whole is open."""
    try:
        names = [path.name for path in Path(run).iterdir()]
    except OSError as error:
        raise UserError(f"{run}: no run folder: {error.strerror}") from error
    steps = [int(name[5:]) for name in names if re.fullmatch(r"step-\d+", name)]
    return [(step, _step_folder(run, step)) for step in sorted(steps, reverse=True)]


def _step_folder(run, step):
    return Path(run) / f"step-{step:06d}"


def latest(run):
    """The newest whole step-N/ of a run folder, or None; says on stderr which it had to skip."""
    def find():
        for old in Path(run).glob("*.old") if Path(run).is_dir() else ():
            recover(old.with_suffix(""))
        for step, folder in _steps(run):
            if _is_whole(folder):
                return step
        return -1

    step = _from_main(find)
    return None if step < 0 else _step_folder(run, step)


def prune(run, keep, best=None):
    """Delete the step folders older than the newest `keep` (at least 1) whole ones.

    `best`, a step folder, always stays. A damaged folder does not count as one of the whole ones.
    Call it after the commit of a new one.
    """
    def delete():
        whole = 0
        for _, folder in _steps(run):
            if whole >= max(keep, 1):
                if best is None or folder.name != Path(best).name:
                    os.rename(folder, _beside(folder, ".tmp"))  # if we are stopped: a leftover
                    _remove(_beside(folder, ".tmp"))
            elif _hashed.get(str(folder)) == _looks(folder) or _is_whole(folder):
                whole += 1

    together(lambda: is_main() and delete())


def _is_whole(folder):
    try:
        if verify(folder):
            return True
        print(f"skipped {folder}: it has no {MANIFEST}", file=sys.stderr)
    except CheckpointError as error:
        print(f"skipped a damaged checkpoint: {error}", file=sys.stderr)
    return False


# --- commit ---

def commit(folder, write, extra=None, bytes_needed=0):
    """Make `folder` appear at once and whole, with the files that `write(temporary folder)` writes.

    `extra` (JSON; say step and config hash) goes into the manifest, with the versions and the
    world size. An existing `folder` is replaced: readers see the old or the new one. Raises
    UserError where disk space (`bytes_needed`) or permission lacks, or where what is there is not
    ours to replace; nothing half-written is left, and what was there before still is. Every rank
    calls `write`, which may gather tensors; only rank 0's files count.
    """
    folder = Path(os.path.abspath(folder))
    tmp = _beside(folder, ".tmp")
    try:
        together(lambda: is_main() and _prepare(folder, tmp, bytes_needed))
        together(lambda: write(tmp))
        together(lambda: is_main() and _publish(folder, tmp, extra or {}))
    except BaseException as error:
        if not is_main():
            raise
        message = _in_plain_words(error, folder, tmp, bytes_needed)
        try:
            if tmp.is_dir() and _is_ours(tmp):
                _remove(tmp)
            recover(folder)
        except OSError as second:
            print(f"{tmp}: could not be cleaned up: {second}", file=sys.stderr)
        if message is None:
            raise
        raise UserError(message) from error


def check_space(path, bytes_needed):
    """Raise UserError unless the disk of `path` (which need not exist yet) has so many bytes free."""
    place = Path(os.path.abspath(path))
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < bytes_needed:
        raise UserError(
            f"{path}: not enough disk space: {readable_bytes(bytes_needed)} needed,"
            f" {readable_bytes(free)} free; free some, lower --keep, or choose another --out")


def recover(folder):
    """Put `folder` back where a replacement was cut short between its two renames."""
    old = _beside(Path(folder), ".old")
    if old.is_dir() and _is_ours(old) and not Path(folder).exists():
        os.rename(old, folder)
        print(f"{folder}: put back after a replacement that was cut short", file=sys.stderr)


def _prepare(folder, tmp, bytes_needed):
    folder.parent.mkdir(parents=True, exist_ok=True)
    recover(folder)
    leftovers = {tmp, _beside(folder, ".old")}
    if _in_run(folder.name):
        leftovers |= {p for p in folder.parent.iterdir() if _in_run(p.name) and p.suffix}
    for path in sorted(path for path in leftovers if path.is_dir()):
        if not _is_ours(path):
            raise UserError(f"{path}: this folder is in the way and not ours: move it away")
        if not _read_manifest(path):
            print(f"{path}: half-written and left over, now deleted", file=sys.stderr)
        _remove(path)
    if folder.exists() and not (folder.is_dir() and _is_ours(folder)):
        raise UserError(f"{folder}: exists and is not ours to replace: choose another name")
    check_space(folder.parent, bytes_needed)
    tmp.mkdir()
    (tmp / MANIFEST).touch()  # empty: what marks the folder as ours, and as half-written


def _publish(folder, tmp, extra):
    paths = sorted(path for path in tmp.iterdir() if path.name != MANIFEST)
    for path in paths:
        if path.is_symlink() or not path.is_file():
            raise ValueError(f"{path}: only plain files can be committed")
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    versions = {"python": platform.python_version(), "torch": str(torch.__version__),
                "safetensors": safetensors.__version__}
    files = {path.name: _fingerprint(path, flush=True) for path in paths}
    extra = {"world_size": world, "versions": versions, **extra}
    _write(tmp / MANIFEST, _sealed(files, extra))
    _flush_folder(tmp)
    if not folder.exists():
        os.rename(tmp, folder)
    elif not _exchange(tmp, folder):  # after an exchange, tmp is the old one
        os.rename(folder, _beside(folder, ".old"))
        os.rename(tmp, folder)
        _flush_folder(folder.parent)
        os.rename(_beside(folder, ".old"), tmp)
    _flush_folder(folder.parent)
    _hashed[str(folder)] = _looks(folder)
    if tmp.exists():
        _remove(tmp)


def _exchange(first, second):
    """Swap two folders in one step; False where the system or file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and 0 == rename(
        here, os.fsencode(first), here, os.fsencode(second), swap)


def _is_ours(folder):
    """True if we may delete `folder`: empty, with a manifest, or a part of a run."""
    return (not any(folder.iterdir()) or (folder / MANIFEST).exists()
            or _in_run(folder.name) and _is_run(folder.parent))
