"""How a folder appears at once and whole, whenever the machine may stop.

`commit` writes `name.tmp/`, flushes every file, writes manifest.json last, flushes the folder,
renames it to `name/` and flushes the parent. A folder of that name is swapped with the new one in
one step where the system can; elsewhere it is `name.replaced/` for a moment, and `recover` puts it
back. What a stopped commit leaves behind, the next one removes.
"""

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

from common.errors import UserError
from common.files import manifest
from common.memory import readable_bytes
from common.ranks import is_main, on_all_ranks, world_size

FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
LEFTOVER = (".tmp", ".replaced")
_hashed = {}  # folder -> what `_looks` gave when this process knew it to be whole


def commit(folder, write, extra=None, bytes_needed=0):
    """Make `folder` appear at once and whole, with the files that `write(temporary folder)` writes.

    `extra` (JSON; say step and config_hash) goes into the manifest, beside world_size and versions.
    A `folder` that is there is replaced: readers see the old one or the new one. Raises UserError
    where space (`bytes_needed`) or permission lacks, or where what is there is not ours: then
    nothing half-written stays, and what was there before does. All ranks call `write`, which may
    gather tensors; rank 0's files count.
    """
    folder = Path(os.path.abspath(folder))
    tmp = sibling(folder, ".tmp")
    writer = is_main()
    try:
        on_all_ranks(lambda: _prepare(folder, tmp, bytes_needed) if writer else None)
        on_all_ranks(lambda: write(tmp))
        on_all_ranks(lambda: _publish(folder, tmp, extra or {}) if writer else None)
    except BaseException as error:
        if not writer:
            raise
        message = _plain_words(error, folder, tmp, bytes_needed)
        try:
            if tmp.is_dir() and _is_ours(tmp):
                remove(tmp)
            recover(folder)
        except OSError as second:
            print(f"{tmp}: could not be cleaned up: {second}", file=sys.stderr)
        if message is None:
            raise
        raise UserError(message) from error


def check_space(path, bytes_needed):
    """Raise UserError unless the disk of `path`, which need not exist, has that many bytes free."""
    if _free(path) < bytes_needed:
        raise UserError(
            f"{path}: not enough disk space: {readable_bytes(bytes_needed)} needed,"
            f" {readable_bytes(_free(path))} free; free some, lower --keep, or choose another"
            " --out")


def _free(path):
    place = Path(os.path.abspath(path))
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def recover(folder):
    """Put `folder` back where a replacement was cut short between its two renames."""
    folder = Path(os.path.abspath(folder))
    old = sibling(folder, ".replaced")
    if old.is_dir() and _is_ours(old) and not folder.exists():
        os.rename(old, folder)
        print(f"{folder}: put back after a replacement that was cut short", file=sys.stderr)


def _prepare(folder, tmp, bytes_needed):
    folder.parent.mkdir(parents=True, exist_ok=True)
    recover(folder)
    leftovers = {tmp, sibling(folder, ".replaced")}
    if in_run(folder.name):
        leftovers |= {path for path in folder.parent.iterdir()
                      if path.suffix in LEFTOVER and in_run(path.name)}
    for path in sorted(path for path in leftovers if path.is_dir()):
        if not _is_ours(path):
            raise UserError(f"{path}: is in the way, and not ours to delete: move it away")
        if manifest.read_manifest(path) is None:
            print(f"{path}: half-written and left over: deleted", file=sys.stderr)
        remove(path)
    if folder.exists() and not (folder.is_dir() and _is_ours(folder)):
        raise UserError(f"{folder}: is there and not ours to replace: choose another name")
    check_space(folder.parent, bytes_needed)
    tmp.mkdir()
    (tmp / manifest.MANIFEST).touch()  # empty: says that the folder is ours, and half-written


def _publish(folder, tmp, extra):
    paths = sorted(path for path in tmp.iterdir() if path.name != manifest.MANIFEST)
    for path in paths:
        if path.is_symlink() or not path.is_file():
            raise ValueError(f"{path}: only plain files can be committed")
    world = world_size()
    versions = {"python": platform.python_version(), "torch": str(torch.__version__),
                "safetensors": safetensors.__version__}
    extra = {"world_size": world, "versions": versions, **extra}
    files = {path.name: manifest.fingerprint(path, flush=True) for path in paths}
    manifest.write_manifest(tmp, files, extra)
    flush_names(tmp)
    if not folder.exists():
        os.rename(tmp, folder)
    elif not _exchange(tmp, folder):
        os.rename(folder, sibling(folder, ".replaced"))
        os.rename(tmp, folder)
        flush_names(folder.parent)
        os.rename(sibling(folder, ".replaced"), tmp)
    flush_names(folder.parent)
    mark_verified(folder)
    if tmp.exists():  # what `folder` was before
        remove(tmp)


def _exchange(first, second):
    """Swap two folders in one step; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(
        here, os.fsencode(first), here, os.fsencode(second), swap) == 0


def _is_ours(folder):
    """True if we may delete `folder`: it is empty, has a manifest, or is a part of a run."""
    run = folder.name.startswith("step-") or (folder.parent / "train_config.json").exists()
    return (not any(folder.iterdir()) or manifest.claims(folder) or run and in_run(folder.name))


def in_run(name):
    """True for the names that a run gives its folders: step-000200, final, and their leftovers."""
    return re.fullmatch(r"(step-\d{6,}|final)(\.tmp|\.replaced)?", name) is not None


def mark_verified(folder):
    """Note that `folder` is whole as it is now."""
    _hashed[os.path.abspath(folder)] = _looks(folder)


def is_verified(folder):
    """True if `folder` was whole once in this process and nobody has touched it since."""
    known = _hashed.get(os.path.abspath(folder))
    return known is not None and Path(folder).is_dir() and known == _looks(folder)


def _looks(folder):
    """Name, inode, size and time of each file: equal while nobody has touched them."""
    stats = [(path.name, path.stat()) for path in sorted(Path(folder).iterdir())]
    return [(name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def remove(folder):
    """Delete a folder, the manifest last: until then it can be told as ours."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == manifest.MANIFEST):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    folder.rmdir()


def sibling(folder, suffix):
    """`runs/x/final` and ".tmp" give `runs/x/final.tmp`."""
    return folder.with_name(folder.name + suffix)


def flush_names(folder):
    """Have the names in `folder` on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _plain_words(error, folder, tmp, bytes_needed):
    """The message for a write that failed, or None where `error` is of another kind."""
    number, cause = None, error
    while cause is not None and number is None:  # safetensors' errors carry it as text
        text = re.search(r"os error (\d+)", str(cause))
        number = getattr(cause, "errno", None) or (int(text[1]) if text else None)
        cause = cause.__cause__
    if number in FULL:
        written = sum(path.stat().st_size for path in tmp.iterdir()) if tmp.is_dir() else 0
        needed = readable_bytes(max(bytes_needed, written))
        return (f"{folder}: {os.strerror(number)}: {readable_bytes(written)} written of"
                f" {needed if bytes_needed else f'at least {needed}'} needed,"
                f" {readable_bytes(_free(folder))} free; what was saved before is intact: free"
                " some space or lower --keep, then go on with --resume")
    if isinstance(error, OSError):
        return f"{folder}: not written: {error.strerror}: {error.filename or tmp}"
    return None
