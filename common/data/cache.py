"""Tokenised data, kept for the next run, each in a folder named by a hash of what it was made from.

The folders are in bareloop/encoded below $XDG_CACHE_HOME or ~/.cache, and may be deleted at any
time. Each holds the tokens, which are memory-mapped, the documents, and a manifest with the notes.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

from common.data.encode import DOCUMENT, Encoded, TOKEN
from common.errors import UserError, writing
from common.files import manifest
from common.files.json_files import write_whole
from common.ranks import say

CODE = sorted(Path(__file__).parent.glob("*.py"))  # on which tokens and masks depend


def cached(make, key, files=(), title="data"):
    """The `Encoded` that `make(file)` gives, or gave with the same `key` and `files` earlier.

    `make` writes the tokens to the file that it is given, as `encode` does. `key` is anything that
    JSON can write; of `files` and of our own code, the content counts. A damaged entry is made
    again, with a warning. Of several processes, one makes the data and the others wait for it.
    """
    contents = [(Path(file).suffix, manifest.fingerprint(file)) for file in [*CODE, *files]]
    name = hashlib.sha256(json.dumps([key, contents], sort_keys=True).encode()).hexdigest()
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    path = home / "bareloop" / "encoded" / name
    with contextlib.ExitStack() as stack:
        stack.enter_context(writing(f"the tokenised data in {path.parent} (XDG_CACHE_HOME)"))
        with contextlib.suppress(OSError):  # if nothing can be locked, each makes its own
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(path.with_suffix(".lock"), "w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
            for left_over in path.parent.glob(f"{name}-*"):  # by a process that was killed
                shutil.rmtree(left_over)
        found = _read(path)
        if found is not None:
            return found.announce(title)
        try:
            folder = tempfile.TemporaryDirectory(prefix=f"{name}-", dir=path.parent)
            folder = Path(stack.enter_context(folder))
        except OSError as error:
            say(f"note: the tokenised data cannot be kept in {path.parent}: {error.strerror}")
            return make(tempfile.TemporaryFile())
        with open(folder / "tokens", "w+b") as file:
            made = make(file)
        made.documents.tofile(folder / "documents")
        prints = {path.name: manifest.fingerprint(path) for path in folder.iterdir()}
        write_whole(folder / manifest.MANIFEST, manifest.encoded(prints, {"notes": made.notes}))
        shutil.rmtree(path, ignore_errors=True)  # what was damaged
        with contextlib.suppress(OSError):  # another process was faster
            os.replace(folder, path)
        return made


def _read(path):
    """The `Encoded` that is kept there, its tokens mapped; None if there is no usable one."""
    if not path.is_dir():
        return None
    try:
        notes = manifest.verify(path)["extra"]["notes"]
        tokens = np.memmap(path / "tokens", TOKEN, "r")
        return Encoded(tokens, np.fromfile(path / "documents", DOCUMENT), notes)
    except (UserError, LookupError):
        print(f"{path}: damaged; the data are tokenised again", file=sys.stderr)
        return None
