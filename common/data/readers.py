"""Data files to records (see formats.py) with their places; any bytes give some or a UserError."""

import csv
import gzip
import importlib.util
import json
import os
import re
import zlib
from pathlib import Path

from common.data.formats import FORMATS, MEANT, OPTIONAL, convert, quoted
from common.data.template import Refused
from common.errors import UserError, listed, nearest, one_line

LONGEST = 2**30  # bytes
ROWS = 256  # of a Parquet file that are in memory at a time


def parse_columns(text, formats=FORMATS):
    """--columns prompt=question,completion=answer as {"prompt": "question", ...}."""
    names, columns = dict.fromkeys(sum(formats, ()) + OPTIONAL), {}
    for part in text.split(","):
        name, _, column = (piece.strip() for piece in part.partition("="))
        if not column or name not in names:
            hint = f" (did you mean {column}={name}?)" if column in names else nearest(name, names)
            raise UserError(f"--columns {text}: {part.strip()!r} is not NAME=COLUMN, a NAME being "
                            f"one of {', '.join(names)}{hint}")
        if name in columns:
            raise UserError(f"--columns {text}: {name!r} is given twice")
        columns[name] = column
    if not any(columns.keys() >= {*keys} for keys in formats):
        raise UserError(f"--columns {text}: it must name all keys of one format: "
                        + "; ".join(map(" + ".join, formats)))
    return columns


class Records:
    """The records of data files, one at a time, as often as they are iterated over. `columns`
    is from `parse_columns`. Paths are checked at once, contents as they are read. `size` and `done`
    (bytes) tell the progress, `ignored` the unused keys and where first."""

    formats, convert = FORMATS, staticmethod(convert)  # other records have other ones
    code = __file__  # what is kept of the records depends on it (encode.cached)

    def __init__(self, paths, columns=None, rendered=False):
        paths = [paths] if isinstance(paths, (str, os.PathLike)) else paths
        self.paths, self.columns, self.rendered = [*map(Path, paths)], columns or {}, rendered
        for path in self.paths:
            if not (os.path.isfile(path) and os.access(path, os.R_OK)):
                raise UserError(f"{path}: not a file, or not to be read here; {KINDS}")
            check_kind(path)
        self.size = sum(path.stat().st_size for path in self.paths)
        self.done, self.ignored = 0, {}

    def __iter__(self):
        unmet = {*self.columns.values()}
        self.done, wanted = 0, unmet.union(*self.formats, OPTIONAL, MEANT)
        for path in self.paths:
            before, kind, where = self.done, suffix(path), None
            for where, value, done in READERS[kind](path, wanted):
                self.done = before + done
                try:
                    if self.columns and kind != ".txt" and isinstance(value, dict):
                        unmet -= value.keys()
                        value = self._renamed(value, where)
                    record = self.convert(value, where, self.ignored, self.rendered)
                except Refused as error:
                    record = {"refused": str(error)}
                yield {**record, "where": where}
            if where is None:
                raise UserError(f"{path}: empty, no example in it")
            self.done = before + path.stat().st_size
        for column in unmet:
            self.ignored.setdefault(f"{quoted(column)} of --columns, which no example has",
                                    str(self.paths[-1]))

    def _renamed(self, value, where):
        for name, column in self.columns.items():
            if value.get(column) is None and name not in OPTIONAL:
                raise UserError(f"{where}: {quoted(column)} is not there, or null (--columns "
                                f"{name}={one_line(column)}); its keys are "
                                f"{listed(map(quoted, value)) or '(none)'}")
        renamed = {name: value[column] for name, column in self.columns.items() if column in value}
        for key in value:
            if key not in self.columns.values():
                if key in MEANT and key not in renamed:
                    renamed[key] = value[key]
                else:
                    self.ignored.setdefault(quoted(key), where)
        return renamed


def suffix(path):
    """The kind of a data file by its name, a key of READERS (without .gz), or None."""
    name = Path(path).name.lower()
    kind = Path(name.removesuffix(".gz")).suffix
    return kind if kind in READERS and not name.endswith(".parquet.gz") else None


def check_kind(path):
    """The suffix of a path, which need not exist; UserError if that kind cannot be read here."""
    kind = suffix(path)
    if kind is None:
        raise UserError(f"{path}: not a kind of file that is read; {KINDS}")
    if kind == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"{path}: Parquet needs pyarrow: pip install pyarrow")
    return kind


def _lines(path, whole=False):
    """The number of each line of a file, its text with its end, and the bytes done; or all as one.
    A small .gz file can unpack to a lot: so what is read at once has a limit."""
    try:
        with open(path, "rb") as file:
            unpacked = gzip.GzipFile(fileobj=file) if path.name.lower().endswith(".gz") else file
            limit = -1 if whole and unpacked is file else LONGEST
            read = unpacked.read if whole else unpacked.readline
            for number, line in enumerate(iter(lambda: read(limit), b""), 1):
                if len(line) == limit:
                    raise UserError(f"{path}:{number}: more than {LONGEST >> 20} MiB at once; give "
                                    ".jsonl, one JSON object a line")
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8"), file.tell()
    except UnicodeDecodeError as error:
        raw, at = error.object, error.start
        number += raw.count(b"\n", 0, at)
        raise UserError(f"{path}:{number}: not UTF-8 text (byte 0x{raw[at]:02x})") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: not a whole gzip file ({one_line(error)}): copy or download it "
                        "again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _text(path):
    return next((text for _, text, _ in _lines(path, whole=True)), "")


# Each reader yields (where, value, bytes of the file done so far) for each value of a file.

def plain_text(path, wanted):
    """The whole file, with \\n as line ends."""
    text = _text(path).replace("\r\n", "\n").replace("\r", "\n")
    if text.strip():
        yield str(path), {"text": text}, path.stat().st_size


def lines(path, wanted):
    """The JSON value of each line that is not blank."""
    for number, line, done in _lines(path):
        if text := line.rstrip():  # with its end it would count as two
            yield f"{path}:{number}", _parse(text, path, number), done


def json_file(path, wanted):
    """A list, {"data": [...]}, one example, or JSON lines, which many .json files really are."""
    text, size = _text(path), path.stat().st_size
    if re.match(r"\s*{.*}[^\S\n]*\n\s*{", text):  # two lines, each an object: not JSON as a whole
        yield from lines(path, wanted)
    elif text.strip():
        values = _parse(text, path)
        data = values.get("data") if isinstance(values, dict) else values
        values = data if isinstance(data, list) else [values]
        for number, value in enumerate(values, 1):
            yield f"{path}: example {number}", value, size * number // len(values)


def table(path, wanted):
    """The rows of a CSV or TSV file as {column: text}; its first row names the columns."""
    header = next((line for _, line, _ in _lines(path) if line.strip()), "")
    said = re.match("sep=(.)\\s*$", header)  # a first line that Excel writes
    comma = ";" if ";" in header and "," not in header else ","  # Excel's, where 0,5 is a half
    tabs = suffix(path) == ".tsv" or "\t" in header and comma not in header
    separator = said[1] if said else "\t" if tabs else comma

    def text():
        nonlocal done
        for _, line, done in _lines(path):
            yield "" if said and line == header else line

    csv.field_size_limit(LONGEST)
    rows = csv.reader(text(), delimiter=separator, strict=True)
    columns, line, done = None, 1, 0
    try:
        for row in rows:
            if row and columns is None:
                columns = [name.strip() for name in row]
                while columns and not columns[-1]:  # empty columns of a spreadsheet
                    columns.pop()
                _check_names(columns, path)
            elif row:
                if len(row) < len(columns) or any(row[len(columns):]):
                    raise UserError(f"{path}:{line}: {len(row)} cells, and {len(columns)} columns; "
                                    f"is a cell with {separator!r} in it not in double quotes?")
                yield f"{path}:{line}", dict(zip(columns, row)), done
            line = rows.line_num + 1  # a row may go on to further lines
    except csv.Error as error:
        raise UserError(f"{path}:{line}: not valid CSV ({one_line(error)}); is a quotation mark "
                        "left open, or one within a cell not doubled?") from None


def parquet(path, wanted):
    """The rows, as JSON has them; of columns not `wanted`, perhaps pictures, only the names."""
    import pyarrow.parquet

    number = 0
    try:
        size = path.stat().st_size
        # Read in pieces, by this thread alone, so that a whole row group is never in memory.
        with pyarrow.parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False,
                                         page_checksum_verification=True) as file:
            rows, names = max(1, file.metadata.num_rows), file.schema_arrow.names
            _check_names(names, path)
            read = [name for name in names if name in wanted]
            for batch in file.iter_batches(ROWS, columns=read, use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    row = {name: row.get(name, "(not read)") for name in names}
                    # What JSON cannot express (dates, decimals, bytes) becomes text.
                    row = json.loads(json.dumps(row, ensure_ascii=False, default=lambda one: (
                        one.decode() if isinstance(one, bytes) else str(one))))
                    yield f"{path}: row {number}", row, min(size, size * number // rows)
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:
        place = f"{path}: row {number + 1} or after" if number else path
        raise UserError(f"{place}: not readable as Parquet, damaged? ({one_line(error)})") from None


# By suffix; if the same data is there with several, the first counts.
READERS = {".jsonl": lines, ".json": json_file, ".csv": table, ".tsv": table, ".parquet": parquet,
           ".txt": plain_text}
KINDS = (f"give files that end in {', '.join(READERS)} (any but Parquet also with .gz); convert "
         "others to .jsonl, one JSON object a line (a spreadsheet: save it as CSV UTF-8; a data "
         'set in Arrow files: ds.to_json("x.jsonl") or ds.to_parquet("x.parquet"))')


def _check_names(names, path):
    if len({*names}) < len(names):
        raise UserError(f"{path}: two columns of the same name: {listed(map(quoted, names))}")


def _parse(text, path, line=1):
    """The value of a JSON text that begins at a line of a file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        why, line = f"{error.msg} at column {error.colno}", line + error.lineno - 1
    except (ValueError, RecursionError) as error:  # a number or nesting beyond Python's limits
        why = one_line(error)
    raise UserError(f"{path}:{line}: not valid JSON ({why})")
