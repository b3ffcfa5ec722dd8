"""The one exception that means: the user can mend this; and how others say that memory is out."""

import re
from contextlib import contextmanager

import torch

LONGEST = 2000  # characters of a message


class UserError(Exception):
    """Wrong input of any kind. Its text is one line that says where, what, and what to do.

    Scripts print it as `error: ...` and end with exit code 2 (see `common.cli.run`). Whatever of a
    hostile file is quoted in it, it stays one line that cannot command a terminal.
    """

    def __str__(self):
        return printable(super().__str__(), LONGEST)


def printable(text, limit):
    """At most `limit` characters of a text, control characters spelled out."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:limit])
    return shown if len(text) <= limit else shown + "…"


@contextmanager
def writing(file):
    """Give an OSError from inside the block (a full disk, say) as a UserError about `file`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror or error}") from error


@contextmanager
def named(place):
    """Give a ValueError from inside the block the place that it speaks of, as a UserError.

    A model file knows nothing of files or users; it raises ValueError by field name.
    """
    try:
        yield
    except ValueError as error:
        raise UserError(f"{place}: {error}") from error


def out_of_memory(error):
    """True if this exception is one of those by which Python, PyTorch, CUDA and its libraries
    (cuBLAS for its workspace, NCCL) say so."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    words = "out of memory|_ALLOC_FAILED|can't allocate memory"  # the last one on a CPU
    return isinstance(error, RuntimeError) and bool(re.search(words, str(error)))
