"""manifest.json: the size and SHA-256 of every file of a folder that we wrote.

Neither safetensors nor JSON notices a flipped byte inside a number. A folder written by
`common.files.checkpoint.commit` therefore carries a manifest, and the headers of its safetensors say so
(`MARK`), so that a lost manifest shows as well. A folder from elsewhere has neither and passes.

The manifest guards itself: it holds a hash of its own content, in the one form of JSON text that
we write. Whatever byte of it changes, the text no longer equals what its content gives.
"""

import hashlib
import json
import os
from pathlib import Path

from common.errors import UserError
from common.files.tensors import open_file

MANIFEST = "manifest.json"
NEW = MANIFEST + ".new"  # while it is being written
MARK = {"format": "pt", "bareloop": MANIFEST}  # metadata for save_tensors(..., metadata=MARK)
LOADABLE = (".safetensors", ".json", ".jinja")  # loaders read these: none may appear unlisted
LARGEST = 16 * 2**20  # no manifest of ours comes near; a larger file is not read into memory


class CheckpointError(UserError):
    """A folder that is damaged, incomplete, or does not fit the model."""


def verify(folder):
    """The manifest of `folder`, after checking every file against it.

    It is a dict: `files` (name -> size and sha256) and `extra` (step, config_hash, world_size,
    versions and what else the commit was given). A folder that we did not write gives {}. Raises
    CheckpointError, naming the file, for anything missing, resized, changed or added.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    try:
        manifest = read_manifest(folder)
        if manifest is None:
            if not _was_ours(folder):
                return {}
            state = "damaged" if (folder / MANIFEST).exists() else "missing"
            raise CheckpointError(f"{folder / MANIFEST}: {state}; {_advice(folder)}")
        for name, expected in manifest["files"].items():
            _check(folder, name, expected)
        for path in sorted(folder.iterdir()):
            known = path.name == MANIFEST or path.name in manifest["files"]
            if path.suffix in LOADABLE and not known:
                raise CheckpointError(
                    f"{path}: was not there when the folder was written; {_advice(folder)}")
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error}") from error
    return manifest


def seal(folder):
    """Write the manifest of `folder` anew, after an edit by hand; gives the number of files.

    Refuses safetensors that cannot be opened. What the old manifest said besides the files stays.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    try:
        extra = json.loads((folder / MANIFEST).read_bytes())["extra"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        extra = {}  # it was lost or damaged: perhaps the very reason for sealing
    paths = [path for path in sorted(folder.iterdir())
             if path.is_file() and path.name not in (MANIFEST, NEW)]
    for path in paths:
        if path.suffix == ".safetensors":
            with open_file(path):
                pass
    try:
        write_manifest(folder, {path.name: fingerprint(path) for path in paths}, extra)
    except OSError as error:
        raise UserError(f"{folder}: cannot be sealed: {error}") from error
    return len(paths)


def read_manifest(folder):
    """The manifest of `folder` if it is undamaged, else None. The other files are not looked at."""
    path = Path(folder) / MANIFEST
    if not path.is_file() or path.stat().st_size > LARGEST:
        return None
    data = path.read_bytes()
    try:
        manifest = json.loads(data)
        whole = encoded(manifest["files"], manifest["extra"]) == data
    except (ValueError, RecursionError, KeyError, TypeError):
        return None
    return manifest if whole and isinstance(manifest["files"], dict) else None


def write_manifest(folder, files, extra):
    """Write manifest.json into `folder`, flushed; one that is there is replaced in one step."""
    new = Path(folder) / NEW
    with open(new, "wb") as file:
        file.write(encoded(files, extra))
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, Path(folder) / MANIFEST)


def encoded(files, extra):
    """The bytes of the manifest that says this: the only form in which it is accepted."""
    body = {"bareloop": 1, "files": files, "extra": extra}
    body["sha256"] = hashlib.sha256(_text(body)).hexdigest()
    return _text(body) + b"\n"


def _text(body):
    return json.dumps(body, indent=1, sort_keys=True, allow_nan=False).encode("ascii")


def fingerprint(path, flush=False):
    """{"size", "sha256"} of a file; with `flush` it is on the disk afterwards."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        if flush:
            os.fsync(file.fileno())
        while block := file.read(2**20):
            digest.update(block)
            size += len(block)
    return {"size": size, "sha256": digest.hexdigest()}


def _check(folder, name, expected):
    """Raise CheckpointError unless the file `name` is what the manifest says."""
    path = folder / name
    if Path(name).name != name or not path.is_file():
        raise CheckpointError(f"{path}: missing; {_advice(folder)}")
    size = path.stat().st_size
    if not isinstance(expected, dict) or size != expected.get("size"):
        raise CheckpointError(
            f"{path}: has {size} bytes, not those that were written; {_advice(folder)}")
    if fingerprint(path) != expected:
        raise CheckpointError(f"{path}: its content has changed; {_advice(folder)}")


def claims(folder):
    """True if there is a manifest.json that looks like ours: whole, damaged, or still empty."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        text = file.read(LARGEST)
    return not text or b'"bareloop"' in text


def _was_ours(folder):
    """True if what is left of `folder` says that it had a manifest of ours."""
    if claims(folder):
        return True
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with open_file(path) as tensors:
                if (tensors.metadata() or {}).get("bareloop"):
                    return True
        except UserError:  # no header to read a mark in; whoever loads the file says what is wrong
            continue
    return False


def _advice(folder):
    return ("copy the folder again, or use another one; if you changed it yourself, seal it:"
            f" python -m common.files.checkpoint seal {folder}")
