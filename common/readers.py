"""Data files to the values in them, one at a time, with the place of each.

A reader of READERS takes a path and yields (where, value, bytes read so far). Any bytes in a file
give values or a UserError that names the file and the line.
"""

import contextlib
import difflib
import itertools
import json
import os
import re
import stat

from common.errors import UserError
from common.template import one_line

LONGEST_LINE = 2**28  # bytes


def check(path):
    """The size of a data file, or a UserError that says why it is none."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        readable = path.parent.is_dir() and os.access(path.parent, os.R_OK)
        names = os.listdir(path.parent) if readable else []
        raise UserError(f"{path}: no such file{nearest(path.name, names)}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"{one_line(path)}: cannot be read ({one_line(error)})") from None
    if not stat.S_ISREG(status.st_mode):
        what = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise UserError(f"{path}: {what}; give files that end in {', '.join(READERS)}")
    if path.suffix.lower() not in READERS:
        raise UserError(f"{path}: its name must end in {', '.join(READERS)}; convert other "
                        "kinds to .jsonl, one JSON object a line")
    return status.st_size


def nearest(name, names):
    """"; did you mean ...?" if one of the names is close, else nothing."""
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]}?" if close else ""


@contextlib.contextmanager
def _opened(path):
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def plain_text(path):
    """The file whole, its line ends made \\n."""
    with _opened(path) as file:
        raw = file.read()
    text = _decode(raw, path).replace("\r\n", "\n").replace("\r", "\n")
    if text.strip():
        yield str(path), {"text": text}, len(raw)


def lines(path):
    """The JSON value of each line that is not blank."""
    with _opened(path) as file:
        done = 0
        for number in itertools.count(1):
            line = file.readline(LONGEST_LINE)
            if not line:
                return
            if len(line) == LONGEST_LINE:
                raise UserError(f"{path}:{number}: a line of more than {LONGEST_LINE >> 20} MiB; "
                                "write one JSON object a line")
            done += len(line)
            text = _decode(line, path, number).rstrip()  # or its end would count as another line
            if text:
                yield f"{path}:{number}", parse(json.loads, path, number, text), done


def json_file(path):
    """A list, {"data": [...]}, or, as many .json files are in truth, JSON lines."""
    with _opened(path) as file:
        raw = file.read()
    text, size = _decode(raw, path), len(raw)
    del raw
    at = _space(text, 0)
    if at == len(text):
        return
    if text[at] != "[":
        value, end = parse(_DECODER.raw_decode, path, 1, text, at)
        if _space(text, end) < len(text):
            yield from lines(path)
        elif isinstance(value, dict) and isinstance(value.get("data"), list):
            for number, item in enumerate(value["data"], 1):
                yield f"{path}: example {number}", item, size
        else:
            yield str(path), value, size
        return
    number = 0  # a list is decoded item by item, so that it is never held whole
    while text[at] == "[" or text[at] == ",":
        at = _space(text, at + 1)
        if number == 0 and text[at:at + 1] == "]":
            break
        number += 1
        value, at = parse(_DECODER.raw_decode, path, 1, text, at)
        yield f"{path}: example {number}", value, size * at // len(text)
        at = _space(text, at)
        if text[at:at + 1] not in (",", "]"):
            line = text.count("\n", 0, at) + 1
            raise UserError(f"{path}:{line}: not valid JSON (Expecting ',' or ']')")
    if _space(text, at + 1) < len(text):
        line = text.count("\n", 0, at) + 1
        raise UserError(f"{path}:{line}: not valid JSON (Extra data after the list)")


READERS = {".jsonl": lines, ".json": json_file, ".txt": plain_text}
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\r\n]*")


def _space(text, at):
    return _SPACE.match(text, at).end()


def _decode(raw, path, number=1):
    """UTF-8 bytes as text, without a byte order mark; `number` is the line that they begin with."""
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = number + raw.count(b"\n", 0, error.start)
        raise UserError(f"{path}:{line}: not UTF-8 text (byte 0x{raw[error.start]:02x}); save the "
                        "file as UTF-8") from None


def parse(function, path, line, text, *at):
    """`function(text, *at)`, a parser of JSON, its errors placed; `text` begins at `line`."""
    try:
        return function(text, *at)
    except json.JSONDecodeError as error:
        why, line = f"{error.msg} at column {error.colno}", line + error.lineno - 1
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's limits
        why, line = one_line(error), line + text.count("\n", 0, *at or (0,))
    raise UserError(f"{path}:{line}: not valid JSON ({why})")
