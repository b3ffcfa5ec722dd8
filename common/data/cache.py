"""Tokenised data, kept for the next run: one safetensors file for each hash of what it came from.

It lies under $XDG_CACHE_HOME or ~/.cache, in bareloop/encoded, and may be deleted at any time. It
is mapped, not read; its SHA-256 is checked before, so a damaged file is made again, and never used.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import mmap
import os
import sys
import tempfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from common.errors import UserError

VERSION = 3  # of the encoding: part of the hash, so that a change of the code finds no old files
# The widest first: so all are aligned.
ARRAYS = (("offsets", "I64"), ("records", "I64"), ("digests", "I64"), ("tokens", "I32"),
          ("trained", "U8"))
BLOCK = 2**22  # bytes that are hashed or copied at once


def folder():
    """Where the files lie."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "bareloop" / "encoded"


def scratch():
    """A nameless file for data in the making: in `folder` if that can be written, else in TMP."""
    try:
        folder().mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=folder())
    except OSError:  # the note about it comes when the result is to be kept
        return tempfile.TemporaryFile()


@contextlib.contextmanager
def no_space():
    """A full disk as a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        raise UserError(f"{folder()}: {error.strerror} for the tokenised data; make room, or set "
                        "XDG_CACHE_HOME to a folder on a larger disk") from None


def cached(make, key, files, wrap):
    """(what `make()` gives, or an earlier call with the same `key` and `files` made; if earlier).

    make   function that gives an object with the arrays of ARRAYS and a list of strings `notes`
    key    anything that JSON can write; of the files, the content counts
    wrap   function (tokens, trained, offsets, records, digests, notes=) that makes such an object

    A damaged file is made again, loudly; a cache that cannot be written is only said. Of several
    processes, one makes the data and the others wait for it.
    """
    path = folder() / f"{_digest(key, files)}.safetensors"
    with _alone(path):
        found = _read(path, wrap)
        if found is not None:
            return found, True
        made = make()
        try:
            _write(path, made)
        except OSError as error:
            if os.environ.get("RANK", "0") == "0":
                print(f"note: the tokenised data cannot be kept in {path.parent}: "
                      f"{error.strerror}", file=sys.stderr)
            return made, False
    del made  # the mapped file takes its place
    found = _read(path, wrap)
    return (make() if found is None else found), False


def _digest(key, files):
    total = hashlib.sha256(json.dumps([VERSION, key], sort_keys=True).encode())
    for file in files:
        try:
            with open(file, "rb") as content:
                one = hashlib.sha256(Path(file).suffix.encode("utf-8", "surrogateescape"))
                while block := content.read(BLOCK):
                    one.update(block)
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror})") from None
        total.update(one.digest())
    return total.hexdigest()


@contextlib.contextmanager
def _alone(path):
    """Hold the lock of `path`, where locks can be had; released with the file, even by a kill."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path.with_suffix(".lock"), "w")
    except OSError:
        yield
        return
    with lock:
        with contextlib.suppress(OSError):  # a file system without locks: the work is done twice
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _blocks(array):
    """The bytes of an array, piece by piece; those of a mapped file leave the memory again."""
    view = memoryview(array).cast("B")
    for start in range(0, len(view), BLOCK):
        yield view[start:start + BLOCK]
        if isinstance(array.base, mmap.mmap):
            array.base.madvise(mmap.MADV_DONTNEED)


def _write(path, made):
    """Write beside the place, flush, rename: a file under its final name is whole."""
    arrays = [getattr(made, name) for name, _ in ARRAYS]
    notes = json.dumps(made.notes)
    digest = hashlib.sha256(notes.encode())
    for array in arrays:
        for block in _blocks(array):
            digest.update(block)
    header, at = {"__metadata__": {"notes": notes, "sha256": digest.hexdigest()}}, 0
    for (name, kind), array in zip(ARRAYS, arrays):
        header[name] = {"dtype": kind, "shape": [len(array)],
                        "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with open(handle, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for array in arrays:
                for block in _blocks(array):
                    file.write(block)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # Ctrl-C too leaves no half file behind
        os.unlink(temporary)
        raise


def _read(path, wrap):
    """The arrays of a cache file, mapped, in `wrap`; None if there is none, or none to be used."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            arrays = [file.get_tensor(name).numpy() for name, _ in ARRAYS]
            metadata = file.metadata()
        digest = hashlib.sha256(metadata["notes"].encode())
        with open(path, "rb") as file:  # read, not mapped, so that it does not stay in memory
            file.seek(-sum(array.nbytes for array in arrays), os.SEEK_END)
            while block := file.read(BLOCK):
                digest.update(block)
        if metadata["sha256"] != digest.hexdigest():
            raise ValueError("its checksum is wrong")
        offsets, records, digests, tokens, trained = arrays
        return wrap(tokens, trained.view(bool), offsets, records, digests,
                    notes=json.loads(metadata["notes"]))
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        print(f"{path}: damaged ({error}); the data are tokenised again", file=sys.stderr)
        return None
