"""UserError, the exception for what the user can put right, and how errors become one line."""

import difflib
import os
import re
import signal
import sys
from contextlib import contextmanager


class UserError(Exception):
    """Wrong input of any kind. Its text is one line that says where, what, and what to do; control
    characters are escaped, so text quoted from a hostile file cannot control the terminal."""

    def __str__(self):
        return printable(super().__str__(), 2000)


def printable(text, limit):
    """At most `limit` characters of a text, control characters escaped."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:limit])
    return shown if len(text) <= limit else shown + "…"


def one_line(error, limit=200):
    """An exception, or any value, as one printable line of at most `limit` characters."""
    return printable(" ".join(str(error).split()) or type(error).__name__, limit)


def nearest(word, candidates):
    """' (did you mean X?)' for the candidate that resembles `word`, or ''."""
    match = difflib.get_close_matches(word, list(candidates), 1)
    return f" (did you mean {match[0]}?)" if match else ""


def listed(words, most=8, separator=", "):
    """The first `most` of some words, and how many more there are."""
    words = [str(word) for word in words]
    return separator.join(words[:most] + [f"{len(words) - most} more"] * (len(words) > most))


@contextmanager
def writing(file):
    """Turn an OSError inside the block (a full disk, say) into a UserError about `file`."""
    try:
        yield
    except BrokenPipeError:  # of a print inside the block
        raise
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror or error}") from error


@contextmanager
def located(place, kind=ValueError):
    """Turn an error of this kind inside the block into a UserError that names the place."""
    try:
        yield
    except kind as error:
        raise UserError(f"{place}: {error}") from error


def out_of_memory(error):
    """True if `error` is how Python, PyTorch, CUDA or its libraries (cuBLAS, NCCL) report it."""
    words = "out of memory|_ALLOC_FAILED|can't allocate memory"  # the last one on a CPU
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and re.search(words, str(error)) is not None)


def run_main(main):
    """Run main(): a UserError is one line and exit code 2, Ctrl-C exit code 130, SIGTERM 143."""
    def terminated(signum, frame):
        print(f"\nstopped by {signal.Signals(signum).name}", file=sys.stderr)
        raise SystemExit(128 + signum)

    signal.signal(signal.SIGTERM, terminated)
    for stream in (sys.stdout, sys.stderr):  # escape what the terminal's encoding lacks
        stream.reconfigure(errors="backslashreplace")
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output (`| head`) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        if out_of_memory(error):
            error = f"out of memory: {one_line(error, 300)}"
        elif not isinstance(error, UserError):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
