"""JSON and other small files: read within bounds, written at once and whole."""

import json
import os
from pathlib import Path

from common.errors import UserError

LARGEST = 2**25  # bytes of a JSON file; the index of a model of 700 billion parameters has 9 MB


def read_bytes(file, largest=LARGEST):
    """The content of a regular file of at most `largest` bytes; of any other a UserError."""
    file = Path(file)
    try:
        if file.exists() and not file.is_file():  # say, a link to a device
            raise UserError(f"{file}: not a regular file")
        if file.stat().st_size > largest:
            raise UserError(f"{file}: larger than {largest >> 20} MiB; is it the right file?")
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from error


def read_json(file):
    """The JSON object in `file`, with or without a byte-order mark; else a UserError says where."""
    try:
        value = json.loads(read_bytes(file).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # its text says on which line
        raise UserError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: must hold a JSON object, not {type(value).__name__}")
    return value


def write_whole(file, data):
    """Write these bytes to `file`, on the disk; a reader sees the old content or the new, whole."""
    new = Path(f"{file}.new")
    with open(new, "wb") as opened:
        opened.write(data)
        opened.flush()
        os.fsync(opened.fileno())
    os.replace(new, file)
