"""manifest.json: the size and SHA-256 of every file of a folder that we wrote.

Neither safetensors nor JSON notices a flipped byte inside a number. A folder written by
`common.files.commit` therefore has a manifest, which holds a hash of its own content too. The
headers of its safetensors say so (`MARK`), so that a lost manifest is noticed as well. A folder
from elsewhere has neither, and passes.
"""

import contextlib
import functools
import hashlib
import json
import os
import sys
import time
from pathlib import Path

from common.errors import UserError, writing
from common.files.json_files import write_whole
from common.files.tensors import open_file

MANIFEST = "manifest.json"
MARK = {"format": "pt", "bareloop": MANIFEST}  # metadata for save_tensors(..., metadata=MARK)
LOADABLE = (".safetensors", ".json", ".jinja")  # loaders read these: none may appear unlisted
LARGEST = 16 * 2**20  # no manifest of ours comes near; a larger file is not read into memory
_known = {}  # (device, inode, size, time) of a file -> its fingerprint


class CheckpointError(UserError):
    """A folder that is damaged, incomplete, or does not fit the model."""


# --- checked ---

def verify(folder):
    """The manifest of `folder`, after checking every file against it.

    It is a dict: `files` (name -> size and sha256) and `extra` (world_size, versions and what else
    the commit was given). A folder that we did not write gives {}. Raises CheckpointError, naming
    the file, for anything missing, changed or added. An interrupted replacement is repaired first.
    """
    folder = Path(folder)
    recover(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    try:
        manifest = read_manifest(folder)
        if manifest is None and not is_ours(folder):
            return {}
        problem = _problem(folder, manifest)
        if problem:
            raise CheckpointError(
                f"{problem}; copy the folder again, or use another one; if you changed it yourself,"
                f" seal it: python -m common.files.checkpoint seal {folder}")
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error}") from error
    return manifest


def _problem(folder, manifest):
    """The first file of `folder` that is not as `manifest` says, and why; "" if all are."""
    if manifest is None:
        lost = not (folder / MANIFEST).exists()
        return f"{folder / MANIFEST}: {'missing' if lost else 'damaged'}"
    for name, expected in manifest["files"].items():
        if Path(name).name != name or not (folder / name).is_file():
            return f"{folder / name}: missing"
        if fingerprint(folder / name) != expected:
            return f"{folder / name}: its content has changed"
    for path in sorted(folder.iterdir()):
        if path.suffix in LOADABLE and path.name not in (MANIFEST, *manifest["files"]):
            return f"{path}: was not there when the folder was written"
    return ""


def recover(folder):
    """Put `folder` back if a commit was interrupted between its two renames."""
    folder = Path(os.path.abspath(folder))
    old = sibling(folder, ".replaced")
    if not folder.exists() and is_ours(old):
        os.rename(old, folder)
        print(f"{folder}: put back after a replacement that was cut short", file=sys.stderr)


def sibling(folder, suffix):
    """`runs/x/final` and ".tmp" give `runs/x/final.tmp`."""
    return folder.with_name(folder.name + suffix)


def is_ours(folder):
    """True if a manifest.json of ours, whole, damaged or still empty, or a mark in the header of a
    safetensors file says that we wrote this folder."""
    text = _text(folder)
    if text is not None and (not text or b'"bareloop"' in text):
        return True
    for path in folder.glob("*.safetensors"):
        with contextlib.suppress(UserError):  # loading such a file will report what is wrong
            with open_file(path) as tensors:
                if "bareloop" in (tensors.metadata() or {}):
                    return True
    return False


# --- read and written ---

def read_manifest(folder):
    """The manifest of `folder` if it is undamaged, else None. The other files are not looked at."""
    text = _text(folder)
    try:
        manifest = json.loads(text)
        whole = encoded(manifest["files"], manifest["extra"]) == text
    except (ValueError, RecursionError, KeyError, TypeError):
        return None
    return manifest if whole and isinstance(manifest["files"], dict) else None


def _text(folder):
    path = folder / MANIFEST
    return path.read_bytes() if path.is_file() and path.stat().st_size <= LARGEST else None


def encoded(files, extra):
    """The bytes of a manifest, in the only form that is accepted: `files` is {name: its
    `fingerprint`}, `extra` is JSON."""
    dumps = functools.partial(json.dumps, indent=1, sort_keys=True, allow_nan=False)
    body = {"bareloop": 1, "files": files, "extra": extra}
    body["sha256"] = hashlib.sha256(dumps(body).encode()).hexdigest()
    return dumps(body).encode() + b"\n"


def fingerprint(path, flush=False):
    """{"size", "sha256"} of a file; with `flush` it is on the disk afterwards.

    A process does not read a file again that has not changed since.
    """
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
    if time.time() - stat.st_mtime > 2:  # a file just written may change with its time unchanged
        _known[key] = found
    return found


def seal(folder):
    """Write the manifest of `folder` anew, after an edit by hand; gives the number of files.

    Refuses safetensors that cannot be opened. What the old manifest said besides the files stays.
    """
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
