"""Folders that appear at once and whole, and in which later damage is noticed.

    python -m common.files.checkpoint verify DIR      check a folder against its manifest
    python -m common.files.checkpoint seal DIR        write the manifest anew after an edit by hand

`commit` writes `name.bareloop-tmp/`, flushes every file, then manifest.json (the size and SHA-256
of each, and of itself), renames the folder to `name/` and flushes the parent. A folder that had the
name is `name.bareloop-old/` for a moment: if the machine stops then, `recover` puts it back."""

import argparse
import contextlib
import errno
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import torch

from common.errors import UserError, run_main, writing
from common.files.json_files import read_bytes, write_whole
from common.files.tensors import open_file
from common.memory import readable_bytes
from common.ranks import is_main, on_all_ranks, on_main, world_size

MANIFEST = "manifest.json"
MARK = {"format": "pt", "bareloop": MANIFEST}  # in safetensors, should the manifest be lost
TMP, OLD = ".bareloop-tmp", ".bareloop-old"  # nobody else's names: what has them may be deleted
LOADABLE = (".safetensors", ".json", ".jinja")  # loaders read these: none may appear unlisted
FULL = [os.strerror(number) for number in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)]
_known = {}  # (device, inode, size, time) of a file -> its fingerprint


class CheckpointError(UserError):
    """A folder that is damaged, incomplete, or does not fit the model."""


def commit(folder, write, extra=None, bytes_needed=0):
    """Make `folder` appear at once and whole, with the files that `write(temporary folder)` writes.
    `extra` (JSON) goes into the manifest. One of ours is replaced. UserError, and no change, if it
    is not ours, or space (`bytes_needed`) or permission is missing. All ranks call `write`."""
    folder = Path(os.path.abspath(folder))
    tmp = Path(f"{folder}{TMP}")
    try:
        with writing(folder):
            on_main(lambda: _prepare(folder, tmp, bytes_needed))
            on_all_ranks(lambda: write(tmp))
            on_main(lambda: _publish(folder, tmp, extra or {}))
    except UserError as error:
        # By its text, as safetensors' own error has no number.
        if not (is_main() and tmp.is_dir() and any(text in str(error) for text in FULL)):
            raise
        written = sum(path.stat().st_size for path in tmp.iterdir())
        raise UserError(
            f"{error}: {readable_bytes(written)} written of at least"
            f" {readable_bytes(max(bytes_needed, written))} needed,"
            f" {readable_bytes(shutil.disk_usage(tmp).free)} free; what was saved before is intact:"
            " free some space or lower --keep, then go on with --resume, or choose another --out"
        ) from error
    finally:
        if is_main():
            shutil.rmtree(tmp, ignore_errors=True)
            with contextlib.suppress(OSError):  # then `verify` does it
                recover(folder)


def _prepare(folder, tmp, bytes_needed):
    folder.parent.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.parent.iterdir()):
        # In a run's folder what any of its commits left goes, elsewhere only this folder's own.
        of_one_run = all(re.fullmatch(r"step-\d+|final", name) for name in (path.stem, folder.name))
        if path.suffix in (TMP, OLD) and (of_one_run or path.stem == folder.name):
            recover(path.with_suffix(""))
            if path.exists():
                print(f"{path}: half-written or replaced, and left over: deleted", file=sys.stderr)
                shutil.rmtree(path)
    if folder.exists() and any(folder.iterdir()) and not is_ours(folder):
        raise UserError(f"{folder}: is there and not ours to replace: choose another name")
    tmp.mkdir()
    if shutil.disk_usage(tmp).free < bytes_needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _publish(folder, tmp, extra):
    files = {path.name: fingerprint(path, flush=True) for path in sorted(tmp.iterdir())}
    about = {"world_size": world_size(), "versions": {"torch": str(torch.__version__)}}
    write_whole(tmp / MANIFEST, encoded(files, about | extra))
    _flush_names(tmp)
    if folder.exists():
        os.rename(folder, f"{folder}{OLD}")
    os.rename(tmp, folder)
    _flush_names(folder.parent)
    shutil.rmtree(f"{folder}{OLD}", ignore_errors=True)


def _flush_names(folder):
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def recover(folder):
    """Put `folder` back if a commit was interrupted between its two renames."""
    if os.path.exists(f"{folder}{OLD}") and not os.path.lexists(folder):
        os.rename(f"{folder}{OLD}", folder)
        print(f"{folder}: put back after a replacement that was cut short", file=sys.stderr)


def seal(folder):
    """Write the manifest of `folder` anew, after an edit by hand; gives the number of files.
    Refuses safetensors that cannot be opened. What the old manifest said besides files stays."""
    folder = Path(folder)
    for path in folder.glob("*.safetensors"):
        with open_file(path):
            pass
    with writing(folder / MANIFEST):
        files = {path.name: fingerprint(path) for path in folder.iterdir()
                 if path.is_file() and path.name not in (MANIFEST, MANIFEST + ".new")}
        before = read_manifest(folder) or {"extra": {}}
        write_whole(folder / MANIFEST, encoded(files, before["extra"]))
    return len(files)


def verify(folder):
    """Check `folder` against its manifest, and give that, or {} if we did not write the folder. A
    file missing, changed or added is a CheckpointError. First repairs a cut-off replacement."""
    folder = Path(folder)
    try:
        recover(folder)
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder")
        manifest = read_manifest(folder)
        if manifest is None and not is_ours(folder):
            return {}
        problem = _problem(folder, manifest)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error}") from error
    if problem:
        raise CheckpointError(
            f"{problem}; copy the folder again, or use another one; if you changed it yourself,"
            f" seal it: python -m common.files.checkpoint seal {folder}")
    return manifest


def _problem(folder, manifest):
    """What is not as `manifest` says, or ""."""
    if manifest is None:
        return f"{folder / MANIFEST}: missing or damaged"
    listed, there = manifest["files"], {path.name for path in folder.iterdir() if path.is_file()}
    for name in sorted({*listed, *there} - {MANIFEST}):
        if name not in there:
            return f"{folder / name}: missing"
        if name in listed and fingerprint(folder / name) != listed[name]:
            return f"{folder / name}: its content has changed"
        if name not in listed and name.endswith(LOADABLE):
            return f"{folder / name}: was not there when the folder was written"
    return ""


def is_ours(folder):
    """True if we wrote this folder, as a whole manifest or the mark in a header says."""
    for path in folder.glob("*.safetensors"):
        with contextlib.suppress(UserError), open_file(path) as tensors:
            if "bareloop" in (tensors.metadata() or {}):
                return True
    return read_manifest(folder) is not None


def read_manifest(folder):
    """The manifest of `folder` if it is undamaged, else None. The other files are not looked at."""
    try:
        text = read_bytes(folder / MANIFEST)
        manifest = json.loads(text)
        whole = encoded(manifest["files"], manifest["extra"]) == text
    except (UserError, ValueError, RecursionError, KeyError, TypeError):
        return None
    return manifest if whole and isinstance(manifest["files"], dict) else None


def encoded(files, extra):
    """A manifest's bytes, in the only form accepted; `files` is {name: its `fingerprint`}."""
    dumps = functools.partial(json.dumps, indent=1, sort_keys=True, allow_nan=False)
    body = {"bareloop": 1, "files": files, "extra": extra}
    body["sha256"] = hashlib.sha256(dumps(body).encode()).hexdigest()
    return dumps(body).encode() + b"\n"


def fingerprint(path, flush=False):
    """{"size", "sha256"} of a file, not read again if unchanged; `flush` puts it on the disk."""
    with open(path, "rb") as file:
        if flush:
            os.fsync(file.fileno())
        stat = os.fstat(file.fileno())
        key = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if key in _known:
            return _known[key]
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    found = {"size": stat.st_size, "sha256": digest.hexdigest()}
    if time.time() - stat.st_mtime > 2:  # within the clock's resolution a change would not show
        _known[key] = found
    return found


# --- the folder of a run: all ranks call these, rank 0 alone touches the disk ---

def new_run_folder(chapter, out=None):
    """Make and give a new run's folder, `out` or a number in runs/<chapter>. UserError if taken."""
    folder = Path(out or f"runs/{chapter}")

    def make():
        with writing(f"{folder} (--out chooses another place)"):
            folder.mkdir(parents=True, exist_ok=True)
            names = os.listdir(folder)
            taken = [int(name) for name in names if name.isdecimal()]
            free = itertools.count(max(taken, default=0) + 1) if out is None else ()
            for number in free:
                with contextlib.suppress(FileExistsError):  # another run was faster
                    (folder / f"{number:03d}").mkdir()
                    return number
        of_a_run = r"(train_config|profile|trace)\.json.*|metrics\.jsonl|(step-\d{6,}|final)(\..*)?"
        if any(re.fullmatch(of_a_run, name) for name in names):
            raise UserError(f"{out}: a run is there already: go on with it by --resume {out}, or"
                            " choose another --out")

    number = on_main(make)
    return folder / f"{number:03d}" if number else folder


def step_folder(run, step):
    """Where a run keeps the checkpoint of this step."""
    return Path(run) / f"step-{step:06d}"


def _steps(run):
    """The N of every step-N/ of the run, whole or not, newest first."""
    found = (re.fullmatch("step-([0-9]{6,12})", name) for name in os.listdir(run))
    return sorted((int(name[1]) for name in found if name), reverse=True)


def _is_whole(folder):
    """Whether a run can go on from this step; says on stderr if not."""
    try:
        if not verify(folder):
            raise CheckpointError(f"{folder}: no {MANIFEST}")
    except CheckpointError as error:
        print(f"skipped a damaged checkpoint: {error}", file=sys.stderr)
        return False
    return True


def latest(run):
    """The newest whole step-N/ of a run folder, or None; reports on stderr which it had to skip."""
    def find():
        for old in Path(run).glob(f"*{OLD}"):
            recover(old.with_suffix(""))
        steps = _steps(run)
        newest = next((step for step in steps if _is_whole(step_folder(run, step))), -1)
        if steps and newest < 0:
            print(f"{run}: no whole checkpoint is left: from the beginning", file=sys.stderr)
        return newest

    step = on_main(find)
    return None if step < 0 else step_folder(run, step)


def prune(run, keep, best=None):
    """Delete steps older than the newest `keep` (at least 1) whole ones, but never step `best`."""
    def delete():
        whole = 0
        for step in _steps(run):
            folder = step_folder(run, step)
            if whole < max(keep, 1):
                whole += _is_whole(folder)
            elif step != best:
                try:
                    os.rename(folder, f"{folder}{TMP}")  # in case the deletion is interrupted
                    shutil.rmtree(f"{folder}{TMP}")
                except OSError as error:  # not a reason to end a run
                    print(f"{folder}: old, but cannot be deleted: {error}", file=sys.stderr)

    on_main(delete)


def main():
    parser = argparse.ArgumentParser(prog="python -m common.files.checkpoint")
    parser.add_argument("action", choices=("verify", "seal"))
    parser.add_argument("folder")
    chosen = parser.parse_args()
    if chosen.action == "seal":
        said = f"{seal(chosen.folder)} files sealed"
    elif found := verify(chosen.folder):
        said = f"{len(found['files'])} files, all as written"
    else:
        said = "no manifest: not written by bareloop"
    print(f"{chosen.folder}: {said}")


if __name__ == "__main__":
    run_main(main)
