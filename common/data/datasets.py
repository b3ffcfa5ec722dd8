"""Data files as records: the examples of all of them, one at a time, in one form.

What files are read is in `readers.py`, what an example may look like in `formats.py`. Whatever the
format, a record comes out as {"messages": [...]} or {"text": ...}, with the place that it came
from, {"where": "my.jsonl:7"}; and an example that cannot be used as {"refused": why}.
"""

import os
from pathlib import Path

from common.data.formats import FORMATS, KNOWN, MEANT, NAMES, OPTIONAL, columns_to_read, convert
from common.data.readers import check, nearest, read, suffix
from common.data.template import Refused
from common.errors import UserError, one_line


def parse_columns(text):
    """--columns prompt=question,completion=answer as {"prompt": "question", ...}."""
    columns = {}
    for part in text.split(","):
        name, equals, column = (piece.strip() for piece in part.partition("="))
        if not (name and column):
            raise UserError(f"--columns {text}: {part.strip()!r} is not NAME=COLUMN, as in "
                            "--columns prompt=question,completion=answer")
        if name not in NAMES:
            hint = f"; did you mean {column}={name}?" if column in NAMES else nearest(name, NAMES)
            raise UserError(f"--columns {text}: {name!r} is none of {', '.join(NAMES)}{hint}")
        if name in columns:
            raise UserError(f"--columns {text}: {name!r} is given twice")
        columns[name] = column
    if not any(set(keys) <= set(columns) for keys in FORMATS.values()):
        raise UserError(f"--columns {text}: it must name all keys of one format: {KNOWN}")
    return columns


def read_records(paths, columns=None, rendered=False):
    """The `Records` of data files; a path may stand alone."""
    return Records([paths] if isinstance(paths, (str, os.PathLike)) else paths, columns, rendered)


class Records:
    """The records of data files, in order, one at a time.

    `columns` renames keys: {"prompt": "question"} reads "question" as the prompt. `rendered` says
    that a "text" is a whole conversation, control tokens included. Paths are checked at once,
    contents as they are read; what is wrong is a UserError with file and line. `size` and `done`
    (bytes) tell how far it is; `ignored` which keys had no part in it, and where the first was.
    """

    def __init__(self, paths, columns=None, rendered=False):
        self.paths, self.columns, self.rendered = [Path(path) for path in paths], columns, rendered
        self._sizes = [check(path) for path in self.paths]
        self.size, self.done, self.ignored = sum(self._sizes), 0, {}
        self._met = set()  # columns of `columns` that an example had
        self._records = self._read()

    def __iter__(self):
        return self

    def __next__(self):
        return next(self._records)

    def _read(self):
        for path, size in zip(self.paths, self._sizes):
            before, nothing = self.done, True
            for where, value, done in read(path, lambda names: self._wanted(names, str(path))):
                nothing, self.done = False, before + done
                try:
                    if self.columns and suffix(path) != ".txt":
                        value = self._renamed(value, where)
                    record = convert(value, where, self.ignored, self.rendered)
                except Refused as error:
                    record = {"refused": str(error)}
                yield {**record, "where": where}
            if nothing:
                raise UserError(f"{path}: empty, no example in it")
            self.done = before + size
        for column in {*(self.columns or {}).values()} - self._met:
            self.ignored.setdefault(f"{one_line(repr(column))} of --columns, which no example has",
                                    str(self.paths[-1]))

    def _wanted(self, names, path):
        """The columns to read of those that a file has; the others are noted."""
        wanted, missing = columns_to_read(names), []
        if self.columns:
            wanted = [name for name in names if name in {*self.columns.values(), *MEANT}]
            missing = [name for name in self.columns.values() if name not in names]
        whole = self.columns or any({*keys} <= {*names} for keys in FORMATS.values())
        if missing or not whole:
            return names  # the error about the first row names them
        for name in names:
            if name not in wanted:
                self.ignored.setdefault(one_line(repr(name), 40), path)
        return wanted

    def _renamed(self, value, where):
        if not isinstance(value, dict):
            return value
        for name, column in self.columns.items():
            if value.get(column) is None and name not in OPTIONAL:
                what = f"{one_line(repr(column))} is null" if column in value else (
                    f"no key {one_line(repr(column))}")
                keys = ", ".join(one_line(repr(key), 40) for key in list(value)[:8])
                raise UserError(f"{where}: {what} (--columns {name}={one_line(column)}); its keys "
                                f"are {keys or '(none)'}{', …' * (len(value) > 8)}")
        self._met.update(value.keys() & {*self.columns.values()})
        renamed = {name: value[column] for name, column in self.columns.items() if column in value}
        for key in value.keys() - {*self.columns.values()}:
            if key in MEANT and key not in renamed:
                renamed[key] = value[key]
            else:
                self.ignored.setdefault(one_line(repr(key), 40), where)
        return renamed
