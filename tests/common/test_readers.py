"""common/data/readers.py: the same values from every kind of file, and one line for a bad one."""

import bz2
import datetime
import decimal
import gzip
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from checks import refused
from faults import forked
from helpers import ROOT

from common.data import readers
from common.errors import UserError

ROWS = [{"prompt": "q, with a comma", "completion": 'a "quoted"\nanswer'},
        {"prompt": "été", "completion": ""}, {"prompt": " x\r\ny ", "completion": "\ttab"}]
NESTED = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None}],
           "tags": ["a", "b"], "score": 0.5, "n": 3, "ok": True, "meta": {"a": {"b": [1, None]}}},
          {"messages": [], "tags": None, "score": None, "n": -1, "ok": None, "meta": None}]


@pytest.fixture
def arrow():
    """pyarrow, which the project does without: its tests are skipped there."""
    pytest.importorskip("pyarrow", reason="Parquet is read where pyarrow is installed")
    import pyarrow.parquet
    return pyarrow


def write(path, content):
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.name.lower().endswith(".gz") else content)
    return path


def write_parquet(arrow, path, rows, **options):
    arrow.parquet.write_table(arrow.Table.from_pylist(rows), path, **options)
    return path


class Every:
    """The names of all columns."""

    def __contains__(self, name):
        return True


def read(path, wanted=Every()):
    path = Path(path)
    return readers.READERS[readers.check_kind(path)](path, wanted)


def values(path, wanted=Every()):
    return [value for _, value, _ in read(path, wanted)]


def places(path):
    return [where.removeprefix(str(path)) for where, _, _ in read(path)]


def csv_text(rows, delimiter=","):
    cells = [list(rows[0]), *(row.values() for row in rows)]
    return "".join(delimiter.join('"' + cell.replace('"', '""') + '"' for cell in row) + "\r\n"
                   for row in cells)


CONTENTS = {".jsonl": "\n".join(map(json.dumps, ROWS)), ".json": json.dumps(ROWS),
            ".csv": csv_text(ROWS), ".tsv": csv_text(ROWS, "\t")}


# --- the same values ---

@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("kind", CONTENTS)
def test_every_text_kind_gives_the_same_values(tmp_path, kind, gz):
    for name, mark in (("a" + kind + gz, ""), (("b" + kind + gz).upper(), "\ufeff")):
        path = write(tmp_path / name, mark + CONTENTS[kind])
        assert values(path) == ROWS
        assert values(str(path)) == ROWS
        done = [done for _, _, done in read(path)]
        size = readers.Records(path).size
        assert size == path.stat().st_size
        assert done == sorted(done) and 0.97 * size <= done[-1] <= size  # a list's end comes after


def test_a_text_file_compressed(tmp_path):
    assert values(write(tmp_path / "a.txt.gz", b"\xef\xbb\xbfa\r\nb\n")) == [{"text": "a\nb\n"}]


@pytest.mark.parametrize("rows", [ROWS, NESTED])
@pytest.mark.parametrize("options", [{}, {"row_group_size": 1}, {"compression": "zstd"},
                                     {"use_dictionary": False, "data_page_version": "2.0"}])
def test_parquet_gives_what_json_gives(tmp_path, arrow, rows, options):
    path = write_parquet(arrow, tmp_path / "a.parquet", rows, **options)
    assert values(path) == values(write(tmp_path / "a.json", json.dumps(rows))) == rows
    assert places(path) == [f": row {n + 1}" for n in range(len(rows))]
    assert [done for _, _, done in read(path)] == [
        readers.Records(path).size * (n + 1) // len(rows) for n in range(len(rows))]


def test_parquet_of_several_batches(tmp_path, arrow):
    rows = [{"a": str(n)} for n in range(2 * readers.ROWS + 5)]
    path = write_parquet(arrow, tmp_path / "a.parquet", rows, row_group_size=readers.ROWS + 1)
    assert values(path) == rows
    assert places(path)[-1] == f": row {len(rows)}"


def test_what_json_has_no_word_for_is_text(tmp_path, arrow):
    row = {"day": datetime.date(2024, 5, 6), "time": datetime.datetime(2024, 5, 6, 7, 8),
           "price": decimal.Decimal("1.50"), "raw": b"\xc3\xa9", "in": [{"day": [datetime.date(
               2024, 5, 7)]}]}
    path = write_parquet(arrow, tmp_path / "a.parquet", [row])
    assert values(path) == [{"day": "2024-05-06", "time": "2024-05-06 07:08:00", "price": "1.50",
                             "raw": "é", "in": [{"day": ["2024-05-07"]}]}]
    with refused("b.parquet", "not readable", "decode byte 0xff"):  # a picture, say
        values(write_parquet(arrow, tmp_path / "b.parquet", [{"raw": b"\xff\xd8"}]))
    column = arrow.array([2**62], arrow.timestamp("ms"))  # a year that Python cannot count to
    arrow.parquet.write_table(arrow.table({"time": column}), tmp_path / "c.parquet")
    with refused("c.parquet: not readable as Parquet, damaged? ("):
        values(tmp_path / "c.parquet")
    assert values(tmp_path / "a.parquet", ["day"])[0]["day"] == "2024-05-06"


# --- columns ---

def test_of_other_columns_of_parquet_only_the_names_are_read(tmp_path, arrow):
    rows = [{"a": "1", "b": b"\xff", "a.b": "3"}, {"a": "4", "b": b"\xff", "a.b": "6"}]
    path = write_parquet(arrow, tmp_path / "a.parquet", rows)
    for wanted in (["a"], ["a.b", "more"], ["a.b", "a"], []):
        assert values(path, wanted) == [{name: row[name] if name in wanted else "(not read)"
                                         for name in ("a", "b", "a.b")} for row in rows]


def test_a_damaged_column_that_is_not_chosen_is_not_read(tmp_path, arrow):
    rows = [{"good": "g" * 50, "bad": "b" * 50} for _ in range(5)]
    path = write_parquet(arrow, tmp_path / "a.parquet", rows, compression="none",
                         use_dictionary=False, write_page_checksum=True, write_statistics=False)
    path.write_bytes(path.read_bytes().replace(b"bbbb", b"bbbc", 1))
    assert len(values(path, ["good"])) == 5
    with refused("a.parquet", "not readable as Parquet, damaged?"):
        values(path)


# --- CSV ---

def test_places_in_csv_are_where_a_row_begins(tmp_path):
    path = write(tmp_path / "a.csv", '\n\na,b\n1,"x\ny"\n\n2,z\r\n"3","\r"\n4,w')
    assert values(path) == [{"a": "1", "b": "x\ny"}, {"a": "2", "b": "z"},
                            {"a": "3", "b": "\r"}, {"a": "4", "b": "w"}]
    assert places(path)[:3] == [":4", ":7", ":8"]


def test_a_long_cell(tmp_path):
    long = "word " * 100_000  # beyond the csv module's own limit of 131,072 characters
    assert values(write(tmp_path / "a.csv", f'a\n"{long}"\n')) == [{"a": long}]


@pytest.mark.parametrize("name, content, message", [
    ("a.csv", "a,b\n1,2\n3\n", ":3: 1 cells, and 2 columns; is a cell with ','"),
    ("a.csv", 'a,b\n"1\n\n",2\n3,4,5\n', ":5: 3 cells, and 2 columns"),
    ("a.tsv", "a\tb\n1,2\n", ":2: 1 cells, and 2 columns; is a cell with '\\t'"),
    ("a.csv", 'a,b\n1,2\n3,"4\n5,6\n', ":3: not valid CSV (unexpected end of data); is a quot"),
    ("a.csv", 'a\n"x"y\n', ":2: not valid CSV"),
    ("a.csv", b"a\nb\n\xff\n", ":3: not UTF-8 text (byte 0xff)"),
    ("a.csv", b"\xff", ":1: not UTF-8"),
    ("a.csv", "a,b\r1,2\r", ":1: not valid CSV (new-line character"),  # of an old Mac
])
@pytest.mark.parametrize("gz", ["", ".gz"])
def test_bad_csv_is_one_line_with_its_place(tmp_path, name, content, message, gz):
    with refused(f"{name}{gz}{message}"):
        values(write(tmp_path / (name + gz), content))


@pytest.mark.parametrize("content", ["", "\n\n", "a,b\n", "a,b\n\n"])
def test_csv_without_rows(tmp_path, content):
    assert values(write(tmp_path / "a.csv", content)) == []


def test_a_line_or_a_cell_beyond_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST", 40)
    with refused("a.csv:2: more than 0 MiB at once"):
        values(write(tmp_path / "a.csv", "a\n" + "b" * 50))
    with refused("a.csv:2: not valid CSV (field larger than field limit"):
        values(write(tmp_path / "a.csv", 'a\n"' + "b\n" * 50))


# --- what cannot be read ---

def test_kinds_by_their_names():
    for name, kind in (
            ("a.jsonl", ".jsonl"), ("x/A.JSON", ".json"), ("a.b.csv.gz", ".csv"),
            ("a.TSV.GZ", ".tsv"), ("a.txt", ".txt"), ("a.parquet", ".parquet"),
            ("a.parquet.gz", None), ("a.gz", None), ("a.arrow", None), ("jsonl", None),
            (".jsonl", None), ("a.jsonl.bz2", None), ("", None)):
        assert readers.suffix(name) == kind, name


def test_names_that_are_refused(tmp_path):
    for name, part in (("a.md", "give files that end in .jsonl, .json, .csv, .tsv, .parquet, .txt"),
                       ("a.parquet.gz", "give files that end in"),
                       ("a.arrow", "Arrow files: ds.to_json")):
        path = write(tmp_path / name, "x")
        for function in (readers.Records, readers.check_kind, values):
            with refused(path, part):
                function(path)
    with refused('ds.to_json("x.jsonl") or ds.to_parquet("x.parquet")'):
        readers.Records(tmp_path / "a.arrow")
    with refused("not a file, or not to be read here; give files that end in .jsonl"):
        readers.Records(tmp_path)
    with refused("a.jsonl: not a file"):
        readers.Records(tmp_path / "a.jsonl")
    for kind in readers.READERS:
        if kind != ".parquet":
            with refused(f"b{kind}: cannot be read (No such file or directory)"):
                values(tmp_path / f"b{kind}")


def test_without_pyarrow(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", "PAR1")
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    for function in (readers.Records, readers.check_kind, values):
        with pytest.raises(UserError) as caught:
            function(path)
        assert str(caught.value) == f"{path}: Parquet needs pyarrow: pip install pyarrow"
    assert values(write(tmp_path / "a.csv", "a\n1\n")) == [{"a": "1"}]


@pytest.mark.parametrize("kind", [*CONTENTS, ".txt"])
def test_damaged_gzip(tmp_path, kind):
    path = tmp_path / f"a{kind}.gz"
    rng = np.random.default_rng(0)  # text that does not compress to nothing
    cells = ["".join(chr(97 + n) for n in rng.integers(0, 26, 300)) for _ in range(50)]
    content = {".json": json.dumps([{"a": cell} for cell in cells]),
               ".jsonl": "\n".join(json.dumps({"a": cell}) for cell in cells)}
    packed = gzip.compress(content.get(kind, "\n".join(["a", *cells])).encode())
    flipped = bytearray(packed)
    flipped[-6] ^= 1  # in the checksum
    broken = packed[:300] + b"\xff" * 30 + packed[330:]
    for raw in (packed[:-100], packed[:20], packed[:5], bytes(flipped), b"not gzip at all",
                bz2.compress(packed), packed + b"junk"):
        path.write_bytes(raw)
        with refused(f"{path}", "not a whole gzip file", "download it again"):
            values(path)
    path.write_bytes(broken)
    with refused(path):  # what it is unpacked to may be noticed before the damage itself
        values(path)
    path.write_bytes(b"")
    assert values(path) == []
    path.write_bytes(packed)
    count = len(values(path))
    assert count == (1 if kind == ".txt" else 50)
    if kind == ".jsonl":  # two compressed files in one, as `cat` makes them
        path.write_bytes(gzip.compress(b"[1]\n") + packed)
        assert len(values(path)) == count + 1


def test_a_small_gzip_file_that_holds_too_much(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST", 2**20)
    for kind in (".json", ".txt", ".jsonl", ".csv"):
        with refused(f"a{kind}.gz:1: more than 1 MiB at once; give .jsonl"):
            values(write(tmp_path / f"a{kind}.gz", b" " * (2**20 + 1)))
    with refused("a.txt.gz:1: more than 1 MiB at once"):
        values(write(tmp_path / "a.txt.gz", b"a\n" * 2**20))


def test_many_short_lines_cost_little_time_or_memory(tmp_path):
    started = time.perf_counter()
    assert len(values(write(tmp_path / "a.txt", "a\n" * 2**20))) == 1
    assert values(write(tmp_path / "a.json", '{"text": "a"}' + "\n" * 50_000)) == [{"text": "a"}]
    assert time.perf_counter() - started < 2
    with refused("b.txt:3: not UTF-8 text (byte 0xff)"):
        values(write(tmp_path / "b.txt", b"a\nb\n\xff\n"))


def test_damaged_parquet(tmp_path, arrow):
    rows = [{"text": f"row {n} " * 5, "parts": [{"a": n}]} for n in range(400)]
    good = write_parquet(arrow, tmp_path / "good.parquet", rows).read_bytes()
    path = tmp_path / "a.parquet"
    for raw in (b"", b"PAR1", b"not parquet", good[:-9], good[200:], b"PAR1" + b"\0" * 50 + b"PAR1",
                good[:9] + b"\xff" * 200 + good[209:], json.dumps(rows).encode()):
        path.write_bytes(raw)
        with refused("a.parquet: ", "not readable as Parquet, damaged? ("):
            values(path)
    path.unlink()
    with refused("a.parquet: ", "No such file"):
        values(path)


def test_damaged_parquet_says_how_far_it_was_read(tmp_path, arrow):
    rows = [{"text": f"{n} " * 50} for n in range(600)]
    path = write_parquet(arrow, tmp_path / "a.parquet", rows, row_group_size=256,
                         use_dictionary=False, compression="none", write_page_checksum=True)
    raw = path.read_bytes()
    at = raw.rindex(b"560 560")
    path.write_bytes(raw[:at] + b"000" + raw[at + 3:])
    seen = []
    with refused("a.parquet: row 513 or after: not readable"):
        for item in read(path):
            seen.append(item)
    assert len(seen) == 512


def test_parquet_without_rows_and_with_two_columns_of_one_name(tmp_path, arrow):
    table = arrow.table({"a": arrow.array([], arrow.string())})
    arrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert values(tmp_path / "a.parquet") == []
    arrow.parquet.write_table(arrow.table([["x"], ["y"]], names=["a", "a"]), tmp_path / "b.parquet")
    with refused("b.parquet: two columns of the same name: 'a', 'a'"):
        list(readers.Records(tmp_path / "b.parquet"))
    with refused("c.csv: two columns of the same name: 'a', 'b', 'a'"):
        list(readers.Records(write(tmp_path / "c.csv", "a,b,a\n1,2,3\n")))


@pytest.mark.parametrize("kind", [".csv", ".tsv", ".csv.gz", ".jsonl.gz", ".parquet"])
def test_arbitrary_bytes_give_values_or_one_line(tmp_path, kind, request):
    path, rng = tmp_path / f"a{kind}", np.random.default_rng(0)
    if kind == ".parquet":
        seeds = [write_parquet(request.getfixturevalue("arrow"), path, rows).read_bytes()
                 for rows in (ROWS * 20, NESTED * 20)]
    else:
        seeds = [write(path, CONTENTS[kind.removesuffix(".gz")]).read_bytes()]
    pool = b'",\t\n\r\x00\xff\xc3\xef\xbb\xbfa1'
    refusals = 0
    for turn in range(300):
        raw = bytearray(seeds[turn % len(seeds)])
        for place in rng.integers(0, len(raw), rng.integers(1, 5)):
            raw[place] = pool[rng.integers(len(pool))] if turn % 2 else rng.integers(256)
        del raw[rng.integers(1, len(raw)) if turn % 3 == 0 else len(raw):]
        path.write_bytes(raw)
        try:
            for where, value, done in read(path):
                assert where.startswith(str(path)) and 0 <= done <= len(raw)
                json.dumps(value)
        except UserError as error:
            refusals += 1
            assert "\n" not in str(error) and path.name in str(error)
    assert 30 < refusals < 300


@pytest.mark.parametrize("text", [
    "prompt;completion\na;b, c\n", "prompt\tcompletion\na\tb, c\n",
    "sep=|\nprompt|completion\na|b, c\n",
    " prompt,completion ,,\na,\"b, c\",,\n"])
def test_tables_as_spreadsheets_write_them(tmp_path, text):
    path = write(tmp_path / "a.csv", b"\xef\xbb\xbf" + text.encode())
    places = [(where, value) for where, value, _ in read(path)]
    line = 3 if text.startswith("sep") else 2
    assert places == [(f"{path}:{line}", {"prompt": "a", "completion": "b, c"})]


# --- memory ---

READ = r"""
import re, sys
from pathlib import Path
from common.data import readers
peak = lambda: int(re.search("VmHWM:\s*(\d+)", open("/proc/self/status").read())[1]) // 1024
import pyarrow.parquet
before = peak()
rows = sum(1 for _ in readers.parquet(Path(sys.argv[1]), ["prompt", "answer"]))
print(rows, peak(), before)
"""
MANY = 250_000


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
def test_the_memory_of_parquet_is_bounded(tmp_path, arrow):
    """One row group of all rows, as pyarrow writes up to 1,048,576 of them."""
    path = tmp_path / "a.parquet"

    def write_many():
        text = "word " * 50
        columns = {name: [f"{name} {n} {text}" for n in range(MANY)]
                   for name in ("prompt", "answer")}
        arrow.parquet.write_table(arrow.table(columns), path, compression="none")

    assert forked(write_many) == (0, "")  # or this process would keep the memory
    assert arrow.parquet.ParquetFile(path).num_row_groups == 1
    result = subprocess.run([sys.executable, "-c", READ, path], cwd=ROOT, text=True,
                            capture_output=True, check=True)
    rows, peak, before = map(int, result.stdout.split())
    whole = path.stat().st_size >> 20
    assert rows == MANY and whole > 120
    assert peak - before < 100 + whole // 10, (peak, before, whole)
    assert peak < 2048
