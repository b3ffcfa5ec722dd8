"""Data files as records: the examples of all of them, one at a time, in one form.

What files are read is in `readers.py`, what an example may look like in `formats.py`. Whatever the
format, a record comes out as {"messages": [...]} or {"text": ...}, with the place that it came
from, {"where": "my.jsonl:7"}; and an example that cannot be used as {"refused": why}.
"""

import os
from pathlib import Path

from common.data import readers
from common.data.formats import FORMATS, KNOWN, MEANT, NAMES, OPTIONAL, convert, quoted
from common.data.template import Refused
from common.errors import UserError, listed, nearest, one_line


def parse_columns(text):
    """--columns prompt=question,completion=answer as {"prompt": "question", ...}."""
    columns = {}
    for part in text.split(","):
        name, equals, column = (piece.strip() for piece in part.partition("="))
        if not (name and column):
            raise UserError(f"--columns {text}: {part.strip()!r} is not NAME=COLUMN, as in "
                            "--columns prompt=question,completion=answer")
        if name not in NAMES:
            hint = f" (did you mean {column}={name}?)" if column in NAMES else nearest(name, NAMES)
            raise UserError(f"--columns {text}: {name!r} is none of {', '.join(NAMES)}{hint}")
        if name in columns:
            raise UserError(f"--columns {text}: {name!r} is given twice")
        columns[name] = column
    if not any(columns.keys() >= {*keys} for keys in FORMATS):
        raise UserError(f"--columns {text}: it must name all keys of one format: {KNOWN}")
    return columns


class Records:
    """The records of data files, in order, one at a time, as often as they are iterated over.

    `paths` are the files, or a single one. `columns` renames keys: {"prompt": "question"} reads
    "question" as the prompt. `rendered` says that a "text" is a whole conversation, control tokens
    included. Paths are checked at once, contents as they are read; what is wrong is a UserError
    with file and line. `size` and `done` (bytes) tell how far it is; `ignored` which keys had no
    part in it, and where the first was.
    """

    def __init__(self, paths, columns=None, rendered=False):
        paths = [paths] if isinstance(paths, (str, os.PathLike)) else paths
        self.paths, self.columns, self.rendered = [*map(Path, paths)], columns or {}, rendered
        self.sizes = [*map(readers.check, self.paths)]
        self.size, self.done, self.ignored = sum(self.sizes), 0, {}

    def __iter__(self):
        before, met = 0, set()  # bytes of earlier files; keys that an example had
        for path, size in zip(self.paths, self.sizes):
            nothing = True
            for where, value, done in readers.read(path, lambda names: self._wanted(names, path)):
                nothing, self.done = False, before + done
                try:
                    if self.columns and readers.suffix(path) != ".txt" and isinstance(value, dict):
                        met |= value.keys()
                        value = self._renamed(value, where)
                    record = convert(value, where, self.ignored, self.rendered)
                except Refused as error:
                    record = {"refused": str(error)}
                yield {**record, "where": where}
            if nothing:
                raise UserError(f"{path}: empty, no example in it")
            self.done = before = before + size
        for column in {*self.columns.values()} - met:
            self.ignored.setdefault(f"{quoted(column)} of --columns, which no example has",
                                    str(self.paths[-1]))

    def _wanted(self, names, path):
        """The columns to read of those that a file has; the others are noted."""
        wanted = {*self.columns.values(), *MEANT} if self.columns else {*NAMES, *MEANT}
        formats = [self.columns.values()] if self.columns else FORMATS
        if not any({*names} >= {*keys} for keys in formats):
            return names  # the error about the first row names them
        for name in names:
            if name not in wanted:
                self.ignored.setdefault(quoted(name), str(path))
        return [name for name in names if name in wanted]

    def _renamed(self, value, where):
        for name, column in self.columns.items():
            if value.get(column) is None and name not in OPTIONAL:
                raise UserError(f"{where}: {quoted(column)} is not there, or null (--columns "
                                f"{name}={one_line(column)}); its keys are "
                                f"{listed(map(quoted, value)) or '(none)'}")
        mapped = {*self.columns.values()}
        renamed = {name: value[column] for name, column in self.columns.items() if column in value}
        for key in value:
            if key in MEANT and key not in renamed and key not in mapped:
                renamed[key] = value[key]
            elif key not in mapped:
                self.ignored.setdefault(quoted(key), where)
        return renamed
