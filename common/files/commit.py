"""Writing a folder so that it appears at once and whole, even if the machine stops meanwhile.

`commit` writes `name.tmp/`, flushes every file, writes manifest.json last, flushes the folder,
renames it to `name/` and flushes the parent. A folder that had the name is `name.replaced/` for a
moment: if the machine stops just then, `recover` puts it back. Whatever else an interrupted commit
leaves behind, the next one removes.
"""

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
from common.files.json_files import write_whole
from common.files.manifest import MANIFEST, encoded, fingerprint, is_ours, recover, sibling
from common.memory import readable_bytes
from common.ranks import is_main, on_all_ranks, on_main, world_size

FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


def commit(folder, write, extra=None, bytes_needed=0):
    """Make `folder` appear at once and whole, with the files that `write(temporary folder)` writes.

    `extra` (JSON, say the step) goes into the manifest. An existing `folder` is replaced; after an
    interruption the old or the new one is there. Raises UserError if space (`bytes_needed`) or
    permission is missing, or if what is there is not ours: then nothing half-written stays, and
    what was there before does. All ranks call `write`, which may gather tensors; rank 0's files
    count.
    """
    folder = Path(os.path.abspath(folder))
    tmp = sibling(folder, ".tmp")
    try:
        on_main(lambda: _prepare(folder, tmp, bytes_needed))
        on_all_ranks(lambda: write(tmp))
        on_main(lambda: _publish(folder, tmp, extra or {}))
    except BaseException as error:
        if not is_main():
            raise
        message = _in_plain_words(error, folder, tmp, bytes_needed)
        try:
            if _may_go(tmp):
                remove(tmp)
            recover(folder)
        except OSError as second:
            print(f"{tmp}: could not be cleaned up: {second}", file=sys.stderr)
        if message:
            raise UserError(message) from error
        raise


def _free(path):
    """Free bytes on the disk of `path`, which need not exist."""
    return shutil.disk_usage(next(one for one in (path, *path.parents) if one.exists())).free


def _prepare(folder, tmp, bytes_needed):
    folder.parent.mkdir(parents=True, exist_ok=True)
    recover(folder)
    for path in sorted(folder.parent.iterdir()):
        same = path.stem == folder.name or in_run(path.name) and in_run(folder.name)
        if same and path.suffix in (".tmp", ".replaced") and path.is_dir():
            if not _may_go(path):
                raise UserError(f"{path}: is in the way, and not ours to delete: move it away")
            print(f"{path}: half-written or replaced, and left over: deleted", file=sys.stderr)
            remove(path)
    if folder.exists() and not _may_go(folder):
        raise UserError(f"{folder}: is there and not ours to replace: choose another name")
    if _free(folder) < bytes_needed:
        raise UserError(
            f"{folder.parent}: not enough disk space: {readable_bytes(bytes_needed)} needed,"
            f" {readable_bytes(_free(folder))} free; free some, lower --keep, or choose another"
            " --out")
    tmp.mkdir()
    (tmp / MANIFEST).touch()  # empty: marks the folder as ours, and half-written


def _publish(folder, tmp, extra):
    paths = sorted(path for path in tmp.iterdir() if path.name != MANIFEST)
    versions = {"python": platform.python_version(), "torch": str(torch.__version__),
                "safetensors": safetensors.__version__}
    files = {path.name: fingerprint(path, flush=True) for path in paths}
    extra = {"world_size": world_size(), "versions": versions, **extra}
    write_whole(tmp / MANIFEST, encoded(files, extra))
    flush_names(tmp)
    old = sibling(folder, ".replaced")
    if folder.exists():
        os.rename(folder, old)
    os.rename(tmp, folder)
    flush_names(folder.parent)
    if old.exists():
        remove(old)


def _may_go(folder):
    """True if `folder` may be deleted: it is empty, or we wrote it."""
    return folder.is_dir() and (not any(folder.iterdir()) or is_ours(folder))


def in_run(name):
    """True for the names that a run gives its folders: step-000200, final, and their leftovers."""
    return re.fullmatch(r"(step-\d{6,}|final)(\.tmp|\.replaced)?", name) is not None


def remove(folder):
    """Delete a folder, the manifest last: until then the folder can be recognised as ours."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    folder.rmdir()


def flush_names(folder):
    """Flush the names of the files in `folder` to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _in_plain_words(error, folder, tmp, bytes_needed):
    """The message for a write that failed; "" if `error` is of another kind."""
    # By its text, as safetensors' own error has no errno.
    full = next((os.strerror(one) for one in FULL if os.strerror(one) in str(error)), None)
    if full:
        written = sum(path.stat().st_size for path in tmp.iterdir()) if tmp.is_dir() else 0
        needed = readable_bytes(max(bytes_needed, written))
        return (f"{folder}: {full}: {readable_bytes(written)} written of"
                f" {needed if bytes_needed else f'at least {needed}'} needed,"
                f" {readable_bytes(_free(folder))} free; what was saved before is intact: free"
                " some space or lower --keep, then go on with --resume")
    if isinstance(error, OSError):
        return f"{folder}: not written: {error.strerror}: {error.filename or tmp}"
    return ""
