"""common/data/readers.py: records of every format from files, and every kind of bad file."""

import json
import os

import numpy as np
import pytest

from common.data import readers
from common.data.readers import Records, parse_columns
from common.errors import UserError


def write(path, content):
    """`content`: bytes, text, or values for JSON lines."""
    if isinstance(content, list):
        content = "\n".join(json.dumps(value) for value in content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path, content, columns=None):
    """The records of one file, without their places."""
    records = list(Records([write(path, content)], columns))
    return [{key: value for key, value in record.items() if key != "where"} for record in records]


def turns(*pairs):
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


QA = turns(("user", "q"), ("assistant", "a"))
FORMATS = [
    ({"text": "t"}, {"text": "t"}),
    ({"prompt": "q", "completion": "a", "id": 7}, QA),
    ({"instruction": "q", "input": "", "output": "a"}, QA),
    ({"instruction": "q", "output": "a", "text": "both"}, QA),
    ({"instruction": "q", "input": None, "output": "a", "system": "s"},
     turns(("system", "s"), ("user", "q"), ("assistant", "a"))),
    ({"instruction": "q", "input": "x", "output": "a"}, turns(("user", "q\n\nx"),
                                                            ("assistant", "a"))),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, QA),
    ({"conversations": [{"from": "system", "value": "s"}, {"from": "Human", "value": "q"},
                        {"from": "gpt", "value": "a"}, {"from": "function", "value": "f"}]},
     turns(("system", "s"), ("user", "q"), ("assistant", "a"), ("tool", "f"))),
    ({"conversations": [{"role": "user", "content": "q"}, {"role": "assistant",
                                                           "content": "a"}]}, QA),
    ({"messages": QA["messages"], "prompt": "ignored"}, QA),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]},
                   {"role": "assistant", "content": "a"}]}, QA),
    ({"messages": [{"role": "assistant", "content": None, "reasoning_content": "r",
                    "tool_calls": [{"name": "f"}]}], "tools": '[{"name": "f"}]'},
     {"messages": [{"role": "assistant", "content": "", "reasoning_content": "r", "tool_calls": [
         {"type": "function", "function": {"name": "f", "arguments": {}}}]}],
      "tools": [{"type": "function", "function": {"name": "f"}}]}),
]


@pytest.mark.parametrize("value, record", FORMATS)
def test_formats_are_told_by_their_keys(tmp_path, value, record):
    assert read(tmp_path / "a.jsonl", [value]) == [record]
    assert read(tmp_path / "a.json", json.dumps([value, value], indent=1)) == [record] * 2
    assert read(tmp_path / "b.json", json.dumps({"data": [value]})) == [record]
    assert read(tmp_path / "c.json", json.dumps(value)) == [record]


def test_a_json_file_of_json_lines(tmp_path):
    assert read(tmp_path / "a.json", [{"text": "a"}, {"text": "b"}]) == [{"text": "a"},
                                                                        {"text": "b"}]


def test_columns(tmp_path):
    columns = parse_columns(" prompt = question,completion=answer")
    assert columns == {"prompt": "question", "completion": "answer"}
    row = {"question": "q", "answer": "a", "text": "not this"}
    assert read(tmp_path / "a.jsonl", [row], columns) == [QA]
    records = Records(write(tmp_path / "b.jsonl", [
        {**row, "system": "s", "id": 1, "input": "x"}]), columns)
    assert [one["messages"][0] for one in records] == [{"role": "system", "content": "s"}]
    assert sorted(records.ignored) == ["'id'", "'input'", "'text'"]
    for more in ({"weight": 0}, {"train": False}):
        assert read(tmp_path / "a.jsonl", [{**row, **more}], columns) == [
            {"refused": "its weight is 0"}]
    with pytest.raises(UserError, match="KTO"):
        read(tmp_path / "a.jsonl", [{**row, "label": False}], columns)
    with pytest.raises(UserError, match=r"a.jsonl:1: 'answer' is not there, or null \(--col"):
        read(tmp_path / "a.jsonl", [{"question": "q", "answer": None}], columns)
    with pytest.raises(UserError, match=r"a.jsonl:2: 'answer' is not .* keys are 'question'"):
        read(tmp_path / "a.jsonl", [row, {"question": "q"}], columns)
    columns = parse_columns("instruction=q,input=more,output=a")
    assert read(tmp_path / "a.jsonl", [{"q": "q", "a": "a"}], columns) == [QA]  # input is optional
    assert read(tmp_path / "a.txt", "text", columns) == [{"text": "text"}]


@pytest.mark.parametrize("text, message", [
    ("prompt", "is not NAME=COLUMN"), ("prompt=,text=b", "is not NAME=COLUMN"), ("", "NAME=COLUMN"),
    ("promt=a,completion=b", "did you mean prompt"), ("question=prompt", "prompt=question"),
    ("text=a,text=b", "given twice"), ("prompt=a", "all keys of one format"),
])
def test_wrong_columns(text, message):
    with pytest.raises(UserError, match=message):
        parse_columns(text)


def test_places_of_records(tmp_path):
    lines = write(tmp_path / "a.jsonl", '\n{"text": "a"}\n\n \n{"text": "b"}')
    listed = write(tmp_path / "b.json", '[{"text": "c"},\n {"text": "d"}]')
    whole = write(tmp_path / "c.TXT", "e")
    records = Records([lines, str(listed), whole])
    assert [(record["text"], record["where"]) for record in records] == [
        ("a", f"{lines}:2"), ("b", f"{lines}:5"), ("c", f"{listed}: example 1"),
        ("d", f"{listed}: example 2"), ("e", str(whole))]
    assert records.done == records.size == sum(os.path.getsize(p) for p in (lines, listed, whole))


def test_text_files_keep_everything_but_the_kind_of_line_end(tmp_path):
    for raw in (b"\xef\xbb\xbfa\r\n\r\nb\rc\n", b"a\n\nb\nc\n"):
        assert read(tmp_path / "a.txt", raw) == [{"text": "a\n\nb\nc\n"}]
    assert read(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "a\\r\\n"}\r\n') == [{"text": "a\r\n"}]
    assert read(tmp_path / "a.json", b'\xef\xbb\xbf[{"text": "a"}]') == [{"text": "a"}]


BAD = [
    ("a.jsonl", '{"text": "a"}\n' * 6 + '{"text": "a"', r"a.jsonl:7: not valid JSON \(.*column 13"),
    ("a.jsonl", '{"text": "a"\n', r"a.jsonl:1: not valid JSON \(.*column 13"),
    ("a.jsonl", "[1]", "a.jsonl:1: an example must be a JSON object, not list"),
    ("a.jsonl", "1" * 5000, "a.jsonl:1: not valid JSON"),
    ("a.jsonl", "[" * 100_000, "a.jsonl:1: not valid JSON"),
    ("a.jsonl", b'{"text": "a"}\n\xff', r"a.jsonl:2: not UTF-8 text \(byte 0xff\)"),
    ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "a.jsonl:1: not UTF-8"),
    ("a.jsonl", b"\x00" * 10, "a.jsonl:1: not valid JSON"),
    ("a.jsonl", "", "a.jsonl: empty"), ("a.jsonl", "\n \n", "empty"), ("a.json", " ", "empty"),
    ("a.json", "[]", "empty"), ("a.json", "[ ]\n", "empty"), ("a.txt", "", "empty"),
    ("a.txt", " \n", "empty"), ("a.txt", b"a\nb\n\xe9", "a.txt:3: not UTF-8"),
    ("a.json", '[{"text": "a"},\n{"text": "a"}', r"a.json:2: not valid JSON \(Expecting ','"),
    ("a.json", '[{"text": "a"}\n{"text": "a"}]', r"a.json:2: not valid JSON"),
    ("a.json", '[{"text": "a"},]', "a.json:1: not valid JSON"), ("a.json", "[", "not valid JSON"),
    ("a.json", '[{"text": "a"}] x', "a.json:1: not valid JSON .*Extra data"),
    ("a.json", '[\n\n{"text" "a"}]', "a.json:3: not valid JSON .*column 9"),
    ("a.json", '"text"', "a.json: example 1: an example must be a JSON object, not str"),
    ("a.json", "{" * 100_000, "not valid JSON"), ("a.json", '[{"a":' * 50_000, "not valid JSON"),
    ("a.json", b"\xff[]", "a.json:1: not UTF-8"),
    ("a.jsonl", [{"question": "q", "answer": "a"}], "a.jsonl:1: the keys 'question', 'answer' fit "
     "no known format .*--columns prompt=question"),
    ("a.jsonl", [{}], r"the keys \(none\) fit"),
    ("a.jsonl", [{f"k{i}": i for i in range(99)}], "'k7', 91 more fit no"),
    ("a.jsonl", [{"prompt": "p", "chosen": "c", "rejected": "r"}], "completion=chosen"),
    ("a.jsonl", [{"text": 5}], "a.jsonl:1: 'text' must be text, not int"),
    ("a.jsonl", [{"prompt": ["q"], "completion": "a"}], "a turn must be a JSON object, not str"),
    ("a.jsonl", [{"messages": "hi"}], "messages is text, and that is not valid"),
    ("a.jsonl", [{"messages": [1]}], "a turn must be a JSON object, not int"),
    ("a.jsonl", [{"messages": [{"content": "a"}]}], "role None is none of human"),
    ("a.jsonl", [{"conversations": [{"from": "narrator", "value": "a"}]}], "role 'narrator' is"),
    ("a.jsonl", [{"messages": [{"role": "user", "content": {"a": 1}}]}], "must be text, not dict"),
    ("a.jsonl", [{"messages": [{"role": "user", "content": [{"type": "image"}]}]}], "type .*image"),
    ("a.jsonl", [{"messages": QA["messages"], "tools": "["}], "a.jsonl:1.*not valid JSON"),
]


@pytest.mark.parametrize("name, content, message", BAD, ids=range(len(BAD)))
def test_bad_contents_are_one_line_with_file_and_place(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path / name, content)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 800


def test_bad_paths_are_said_before_anything_is_read(tmp_path):
    good = write(tmp_path / "train.jsonl", [{"text": "a"}])
    for path, message in (
            (tmp_path / "trian.jsonl", "trian.jsonl: not a file"),
            (tmp_path / "none" / "a.jsonl", "not a file"), (good / "a.jsonl", "not a file"),
            (tmp_path, "not a file, .* end in .jsonl, .json"),
            (write(tmp_path / "a.xlsx", "x"), "end in .jsonl, .json, .csv"),
            ("a\0b.jsonl", "not a file"), ("/dev/zero", "not a file")):
        with pytest.raises(UserError, match=message):
            Records([good, path])


def test_an_unreadable_file_is_one_line(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [{"text": "a"}])
    records = Records([path])
    path.unlink()
    with pytest.raises(UserError, match="a.jsonl: cannot be read"):
        next(iter(records))
    monkeypatch.setattr(readers, "LONGEST", 10)
    with pytest.raises(UserError, match="a.jsonl:1: more than 0 MiB at once"):
        read(path, [{"text": "a long line"}])


def test_arbitrary_bytes_give_records_or_one_line(tmp_path):
    rng = np.random.default_rng(0)
    seeds = [json.dumps([value for value, _ in FORMATS]).encode(),
             "\n".join(json.dumps(value) for value, _ in FORMATS).encode()]
    pool = b'[]{}",:\\ \n\r0123-.eEtruefalsn\xef\xbb\xbf\xff\x00'
    for turn in range(300):
        raw = bytearray(seeds[turn % 2][:rng.integers(1, 900)])
        for place in rng.integers(0, len(raw), rng.integers(0, 5)):
            raw[place] = pool[rng.integers(len(pool))]
        path = write(tmp_path / ("a.json", "a.jsonl", "a.txt")[turn % 3], bytes(raw))
        try:
            for record in Records([path]):
                assert set(record) - {"tools"} in ({"text", "where"}, {"messages", "where"})
        except UserError as error:
            assert "\n" not in str(error) and path.name in str(error)


def test_parquet_gives_the_records_of_the_json_that_it_was_made_of(tmp_path):
    """Arrow gives all rows the keys of each: what it fills in must not become a part of them."""
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    import pyarrow.parquet

    def call(name, **arguments):
        tool = {"type": "function", "function": {"name": name, "parameters": {
            "type": "object", "properties": {key: {"type": "string"} for key in arguments}}}}
        turn = {"role": "assistant", "tool_calls": [
            {"function": {"name": name, "arguments": arguments}}]}
        return {"messages": [QA["messages"][0], turn, {"role": "tool", "content": "21"}],
                "tools": [tool], "id": name}

    rows = [call("weather", town="Rome", days="2"), call("convert", amount="3", currency="EUR"),
            QA, {"messages": [*QA["messages"], {"role": "user", "content": "more", "name": "Ann"},
                              {"role": "assistant", "content": "b", "weight": 0}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    raw = pyarrow.parquet.read_table(tmp_path / "a.parquet").to_pylist()
    assert raw[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]["amount"] is None
    write(tmp_path / "a.jsonl", rows)
    records = [Records(tmp_path / name) for name in ("a.jsonl", "a.parquet")]
    made = [[{key: value for key, value in one.items() if key != "where"} for one in part]
            for part in records]
    assert made[0] == made[1] and len(made[0]) == 4
    assert [list(part.ignored) for part in records] == [["'id'"], ["'id'"]]
    assert records[1].done == records[1].size == (tmp_path / "a.parquet").stat().st_size


def test_a_table_of_texts_gives_the_records_of_json(tmp_path):
    rows = [{"instruction": "a, b", "input": "", "output": 'say "c"\nd', "history": '[["e", "f"]]'},
            {"instruction": "g", "input": "h", "output": "i", "history": ""}]
    text = ('id,instruction,input,output,history\n1,"a, b",,"say ""c""\nd","[[""e"", ""f""]]"\n'
            "2,g,h,i,\n")
    (tmp_path / "a.csv").write_text(text)
    records = Records(tmp_path / "a.csv")
    made = [{key: value for key, value in one.items() if key != "where"} for one in records]
    assert made == read(tmp_path / "a.jsonl", rows) and list(records.ignored) == ["'id'"]
    columns = parse_columns("prompt=instruction,completion=output")
    answers = [one["messages"][-1]["content"] for one in Records(tmp_path / "a.csv", columns)]
    assert answers == ['say "c"\nd', "i"]


def test_an_example_that_is_refused_is_told_from_a_file_that_is_wrong(tmp_path):
    rows = [{"text": "t", "weight": 0}, {"text": "t"}]
    assert read(tmp_path / "a.jsonl", rows) == [{"refused": "its weight is 0"}, {"text": "t"}]
    assert read(tmp_path / "a.csv", "text,weight\nt,1\n") == [{"text": "t"}]


@pytest.mark.parametrize("text, columns, message", [
    ("instruction,input,response\na,b,c\n", None, "keys 'instruction', 'input', 'response' fit"),
    ("Instruction,Output,system\na,b,c\n", None,
     "--columns instruction=Instruction,output=Output"),
    ("question,answer\na,b\n", "prompt=qestion,completion=answer",
     "'qestion' is not there.* its keys are 'question', 'answer'"),
])
def test_an_error_about_a_table_names_all_of_its_columns(tmp_path, text, columns, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a.csv", text, columns and parse_columns(columns))


def test_of_a_table_only_what_an_example_can_be_made_of_is_used(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    import pyarrow.parquet
    for columns, unused in ((None, ["'id'", "'chosen'", "'score'"]),
                            ({"text": "chosen"}, ["'id'", "'prompt'", "'completion'", "'score'"])):
        row = {"id": b"\xff", "prompt": "p", "completion": "c", "chosen": "d", "score": "2"}
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
        write(tmp_path / "a.csv", "id,prompt,completion,chosen,score\n1,p,c,d,2\n")
        for name in ("a.csv", "a.parquet"):
            records = Records(tmp_path / name, columns)
            assert len(list(records)) == 1 and list(records.ignored) == unused
    row = {"id": b"\xff", "prompt": "p", "chosen": "c", "rejected": "d"}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    write(tmp_path / "a.csv", "id,prompt,chosen,rejected\n1,p,c,d\n")
    for name in ("a.csv", "a.parquet"):
        with pytest.raises(UserError, match="--columns prompt=prompt,completion=chosen"):
            list(Records(tmp_path / name))


def test_a_column_that_no_example_has_is_named(tmp_path):
    columns = parse_columns("prompt=q,completion=a,system=sytem")
    records = Records(write(tmp_path / "a.jsonl", [{"q": "q", "a": "a"}] * 2), columns)
    assert len(list(records)) == 2
    assert list(records.ignored) == ["'sytem' of --columns, which no example has"]


def test_labels_of_many_classes_are_no_preferences(tmp_path):
    rows = [{"prompt": "q", "completion": "a", "label": label} for label in (3, 1, 0)]
    assert read(tmp_path / "a.jsonl", rows) == [QA] * 3
    with pytest.raises(UserError, match="KTO"):
        read(tmp_path / "a.jsonl", rows[1:])
