"""Rewards, which compare and never evaluate; and the questions that they are asked about."""

import json
from decimal import Decimal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checks import refused
from helpers import GOLDENS, ROOT, load

from common.data.chat import Chat, fixed_date
from common.data.encode import encode
from common.data.readers import parse_columns

rewards = load("chapter-03/post_training/rewards.py")
prompts_file = load("chapter-03/post_training/prompts.py")
rollout_file = load("chapter-03/post_training/rollout.py")
judge, load_reward, check_answers = rewards.judge, rewards.load_reward, rewards.check_answers
Problem, Problems, problems = prompts_file.Problem, prompts_file.Problems, prompts_file.problems
MARK = prompts_file.MARK


@pytest.fixture(scope="module")
def chat():
    return Chat.load(ROOT / "common/tiny")


def problem(expected="", where="data.jsonl:7", **record):
    return Problem([1], "", {**record, "expected": expected}, where)


def answer(chat, text, finished=True):
    ids = chat.tokenise([text])[0].ids
    return rollout_file.Answer(ids + [min(chat.stop_ids)] * finished, [], [], finished)


# --- built in ---

@pytest.mark.parametrize("text, expected, exact, letters", [
    ("42", "42", 1, 1), (" 42\n", "42", 1, 1), ("42", " 42 ", 1, 1), ("42.", "42", 0, 2 / 3),
    ("", "42", 0, 0), ("the answer is 42", "42", 0, 0), ("Cat", "cat", 0, 2 / 3),
    ("tac", "cat", 0, 1 / 3), ("cats", "cat", 0, 3 / 4), ("c", "cat", 0, 1 / 3),
    ("xcat", "cat", 0, 0), ("a b", "a  b", 0, 1 / 2),
])
def test_exact_and_letters(text, expected, exact, letters):
    record = {"expected": expected}
    assert rewards.REWARDS["exact"](record, text) == exact
    assert rewards.REWARDS["letters"](record, text) == pytest.approx(letters)


TRUTH = "She has 1,000 + 5 = <<1000+5=1005>>1,005 eggs.\n#### 1,005"


@pytest.mark.parametrize("text, strict, lenient, marked", [
    ("#### 1005", 1, 1, 1), ("1000 + 5 = 1005\n#### 1,005", 1, 1, 1), ("####1005", 1, 1, 1),
    ("####   $1,005", 1, 1, 1), ("#### 1005.00", 1, 1, 1), ("#### 1005.", 1, 1, 1),
    ("#### $1005.0 in all, I think", 1, 1, 1), ("####\n1005", 1, 1, 1),
    ("#### 7\n#### 1005", 1, 1, 1), ("#### 1005\n#### 7", 0, 0, 1),  # the last counts
    ("#### 1 #### 2 #### 1005 #### 3", 0, 0, 1),
    ("1005", 0, 1, 0), ("The answer is 1,005.", 0, 1, 0), ("1005 or 7", 0, 0, 0),
    ("#### -1005", 0, 0, 1), ("#### 1005.5", 0, 0, 1), ("#### 10050", 0, 0, 1),
    ("### 1005", 0, 1, 0), ("#### x = 1005", 0, 1, 0), ("#### ", 0, 0, 0), ("", 0, 0, 0),
    ("#### one thousand and five", 0, 0, 0), ("#### --1005", 0, 0, 0),
    ("#### 1000+5", 0, 0, 1), ("#### 2010/2", 0, 0, 1), ("#### 1005 #### 1005", 1, 1, 1),
    ("#### 1005 eggs, of 12 hens", 1, 0, 1),
])
def test_gsm8k(text, strict, lenient, marked):
    record = {"expected": TRUTH}
    reward, beside = load_reward("gsm8k")
    assert reward(record, text) == strict
    assert {name: one(record, text) for name, one in beside.items()} == {
        "last_number": lenient, "marked": marked}


def test_only_the_last_marker_counts_even_if_no_number_follows():
    assert rewards.gsm8k({"expected": TRUTH}, "#### 1005\n#### I do not know") == 0
    assert rewards.number("#### 5 #### none", "####") is None


@pytest.mark.parametrize("text, number", [
    ("#### -3", "-3"), ("#### -$3.50", "-3.5"), ("#### $0.50", "0.5"), ("#### .5", "0.5"),
    ("#### -.5", "-0.5"), ("#### 0.1", "0.1"), ("#### 1,234,567.89", "1234567.89"),
    ("#### 007", "7"), ("#### 0", "-0"), ("#### 5%", "5"), ("#### 3.14.15", "3.14"),
    ("#### " + "9" * 3000, "9" * 3000), ("#### 1e5", "1"), ("#### ,5", None), ("#### $", None),
    ("#### -", None), ("#### NaN", None), ("#### Infinity", None),
])
def test_numbers(text, number):
    found = rewards.number(text, "####")
    assert found == (None if number is None else Decimal(number))
    if number is not None:  # not as floats: they would take neighbours for the same
        assert rewards.gsm8k({"expected": f"#### {number}"}, text) == 1
        assert rewards.gsm8k({"expected": f"#### {number}00000000000000001"}, text) == 0


def test_nothing_is_evaluated(tmp_path, monkeypatch):
    target = tmp_path / "made"
    text = f"#### __import__('pathlib').Path({str(target)!r}).touch() or 1005"
    for name in rewards.REWARDS:
        reward, beside = load_reward(name)
        assert reward({"expected": TRUTH}, text) < 0.2
        for one in beside.values():
            one({"expected": TRUTH}, text)
    assert not target.exists() and rewards.gsm8k({"expected": "#### 4"}, "#### 2*2") == 0


# --- one's own ---

SOURCE = """
def plain(record, answer):
    return len(answer) / record["most"]

def fails(record, answer):
    return record["nothing"]

def gives(record, answer):
    return VALUES[answer]

VALUES = {"none": None, "nan": float("nan"), "inf": -float("inf"), "bool": True, "int": 3,
          "list": [1], "word": "good"}
number = 5
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The folder of own.py; another one is the working directory."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/own.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "mine"


def test_a_function_of_ones_own(own, chat):
    for name in ("mine/own.py:plain", f"{own}/own.py:plain", "./mine/../mine/own.py:plain"):
        reward, beside = load_reward(name)
        assert judge(reward, problem(most=10), answer(chat, "abc"), chat) == 0.3 and beside == {}


def test_it_sees_the_text_without_the_stop_token_and_the_record_as_it_is(chat):
    seen = []

    def reward(record, text):
        seen.append((dict(record), text))
        record.clear()
        return 1
    one = problem("x", most=3, tags=["a"])
    for _ in range(2):
        assert judge(reward, one, answer(chat, " two words"), chat) == 1.0
    assert seen == [({"most": 3, "tags": ["a"], "expected": "x"}, " two words")] * 2


@pytest.mark.parametrize("name, parts", [
    ("mine/none.py:plain", ["FILE.py:function of a file that is there"]),
    ("own.py:plain", ["a file that is there"]), ("mine/own.py:plian", ["'plian'"]),
    ("mine/own.py:", ["attribute ''"]),
    ("mine/own.py", ["neither exact, letters, gsm8k nor FILE.py:function"]),
    ("gsm8", ["neither exact", "did you mean gsm8k?"]), ("mine/own.txt:plain", ["neither"]),
    ("mine:plain", ["neither"]), ("", ["neither"]),
])
def test_what_is_no_reward_is_one_line(own, name, parts):
    with refused(f"--reward {name}", *parts):
        load_reward(name)


@pytest.mark.parametrize("source, parts", [
    ("1 / 0", ["ZeroDivisionError", "division by zero"]), ("def f(:", ["SyntaxError"]),
    ("import no_such_module", ["ModuleNotFoundError", "no_such_module"]),
    ("raise ValueError('a\\nb')", ["ValueError", "a b"]), ("f = undefined", ["NameError"]),
    ("\0", ["Error"]),
])
def test_a_file_that_fails_is_one_line(own, source, parts):
    (own / "bad.py").write_text(source)
    with refused("--reward mine/bad.py", *parts):
        load_reward("mine/bad.py:f")


def test_a_file_may_have_a_dataclass(own):
    (own / "data.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass A:\n    x: int = 2\n"
        "def reward(record, answer):\n    return A().x\n")
    assert load_reward("mine/data.py:reward")[0]({}, "") == 2


@pytest.mark.parametrize("text, parts", [
    ("none", ["NoneType"]), ("nan", ["finite number, not nan"]), ("inf", ["number, not -inf"]),
    ("list", ["failed: TypeError"]), ("word", ["failed: ValueError"]),
    ("else", ["failed: KeyError: 'else'"]),
])
def test_what_is_no_number_names_the_problem(own, chat, text, parts):
    reward, _ = load_reward("mine/own.py:gives")
    with refused("data.jsonl:7: the reward", *parts):
        judge(reward, problem(), answer(chat, text), chat)


def test_an_exception_names_the_problem(own, chat):
    reward, _ = load_reward("mine/own.py:fails")
    with refused("data.jsonl:7: the reward function failed: KeyError: 'nothing'"):
        judge(reward, problem(), answer(chat, "a"), chat)


def test_whatever_is_a_number_is_one(own, chat):
    reward, _ = load_reward("mine/own.py:gives")
    for text, expected in (("bool", 1.0), ("int", 3.0)):
        found = judge(reward, problem(), answer(chat, text), chat)
        assert found == expected and type(found) is float
    for value in (np.float32(0.5), torch.tensor(0.5), Decimal("0.5"), np.bool_(False), -2):
        assert judge(lambda *_: value, problem(), answer(chat, "a"), chat) == float(value)


def test_an_unfinished_answer_gets_nothing_unasked(chat):
    def fail(*_):
        raise AssertionError("asked")
    assert judge(fail, problem("42"), answer(chat, "42", finished=False), chat) == 0.0
    assert judge(rewards.exact, problem("42"), answer(chat, "42"), chat) == 1.0
    assert judge(rewards.exact, problem("42"), answer(chat, "42", finished=False), chat) == 0.0


@pytest.mark.parametrize("name, expected, parts", [
    ("exact", "", ["--reward exact needs an expected answer", "it is ''"]),
    ("letters", " \n", ["--reward letters needs"]), ("gsm8k", "", ['"####" and a number']),
    ("gsm8k", "It is 42.", ['"####" and a number', "It is 42."]),
    ("gsm8k", "#### none", ["#### none"]),
])
def test_a_built_in_reward_needs_something_to_compare_with(name, expected, parts):
    fine = problem("#### 4", "data.jsonl:1")
    check_answers(name, [fine])
    with refused("data.jsonl:7", "one of your own needs none", *parts):
        check_answers(name, [fine, problem(expected), problem("", "data.jsonl:9")])
    check_answers("mine/own.py:plain", [fine, problem(expected)])


# --- questions ---

U, A = "Which?", "This."
ASK, RIGHT = {"role": "user", "content": U}, {"role": "assistant", "content": A}
SYSTEM = {"role": "system", "content": "Be brief."}
EARLIER = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}

# name: (an example, what precedes the answer, the answer)
SHAPES = {
    "openai": ({"messages": [ASK, RIGHT]}, [ASK], A),
    "sharegpt": ({"conversations": [{"from": "human", "value": U}, {"from": "gpt", "value": A}]},
                 [ASK], A),
    "alpaca": ({"instruction": U, "input": "", "output": A}, [ASK], A),
    "prompt and completion": ({"prompt": U, "completion": A}, [ASK], A),
    "prompt and completion, messages": ({"prompt": [SYSTEM, ASK], "completion": [RIGHT]},
                                        [SYSTEM, ASK], A),
    "prompt alone": ({"prompt": U}, [ASK], ""),
    "prompt alone, messages": ({"prompt": [SYSTEM, ASK]}, [SYSTEM, ASK], ""),
    "messages that end with the user": ({"messages": [*EARLIER, ASK]}, [*EARLIER, ASK], ""),
    "question and answer": ({"question": U, "answer": A}, [ASK], A),
    "question alone": ({"question": U}, [ASK], ""),
    "gsm8k": ({"question": U, "answer": TRUTH}, [{**ASK, "content": U + MARK}], TRUTH),
    "several turns": ({"messages": [SYSTEM, *EARLIER, ASK, RIGHT]}, [SYSTEM, *EARLIER, ASK], A),
    "history": ({"instruction": U, "output": A, "history": [["Hi", "Hello."]]},
                [*EARLIER, ASK], A),
    "system beside": ({"system": "Be brief.", "prompt": U}, [SYSTEM, ASK], ""),
    "keys of its own": ({"prompt": U, "solution": "7", "level": 3}, [ASK], ""),
    "a question beside messages": ({"messages": [ASK, RIGHT], "question": "?", "answer": "!"},
                                   [ASK], A),
    "a prompt beside a question": ({"question": U, "answer": A, "prompt": "?"}, [ASK], A),
}


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def asked(path, chat, limit=500, records=None, **variables):
    records = Problems(path) if records is None else records
    return problems(chat, encode(records, chat, 500), records, limit, **variables)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("which", ["tiny", "qwen3"])
def test_every_format_gives_the_question_as_generate_would_ask_it(name, which, tmp_path):
    folder = ROOT / "common/tiny" if which == "tiny" else GOLDENS / "chat/qwen3"
    chat, (example, before, expected) = Chat.load(folder), SHAPES[name]
    one, again = asked(write(tmp_path / "a.jsonl", [example, example]), chat)
    assert one.prompt == again.prompt == chat.encode_prompt(before, strftime_now=fixed_date)
    assert chat.decode(one.prompt, False).count("assistant\n") >= 1
    assert one.record == {**example, "expected": expected}
    assert one.text == before[-1]["content"]
    assert [one.where, again.where] == [f"{tmp_path}/a.jsonl:{n}" for n in (1, 2)]


def test_only_the_last_turn_is_the_answer(tmp_path):
    """What was answered before is part of the prompt, and nothing is trained there."""
    chat = Chat.load(GOLDENS / "chat/qwen3")
    records = Problems(write(tmp_path / "a.jsonl", [SHAPES["several turns"][0]]))
    record, = records
    assert [one.get("train") for one in record["messages"]] == [None, None, False, None, None]
    (ids, labels), = encode(records, chat, 500)
    trained = chat.decode(ids[labels >= 0], False)
    assert A in trained and "Hello" not in trained
    one, = asked(None, chat, records=records)
    assert "Hello" in chat.decode(one.prompt) and A not in chat.decode(one.prompt)
    assert one.prompt == ids[:len(one.prompt)].tolist() or "<think>" in chat.decode(ids, False)


def test_tools_are_in_the_prompt(tmp_path):
    chat = Chat.load(GOLDENS / "chat/qwen3")
    call = {"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "function": {"name": "weather", "arguments": {"town": "Rome"}}}]}
    result = {"role": "tool", "content": "21"}
    rows = [{"prompt": U, "tools": [TOOL]}, {"messages": [ASK, call], "tools": [TOOL]},
            {"messages": [ASK, call, result], "tools": [TOOL]},
            {"messages": [ASK, call, result, RIGHT], "tools": json.dumps([TOOL])}]
    found = asked(write(tmp_path / "a.jsonl", rows), chat)
    before = [[ASK], [ASK], [ASK, call, result], [ASK, call, result]]
    for one, row, turns in zip(found, rows, before, strict=True):
        assert one.prompt == chat.encode_prompt(turns, tools=[TOOL], strftime_now=fixed_date)
        assert "weather" in chat.decode(one.prompt) and one.record["tools"] == row["tools"]
    assert [one.record["expected"] for one in found] == ["", "", "", A]
    assert [one.text for one in found] == [U, U, "21", "21"]


def test_thinking_can_be_switched_off(tmp_path):
    chat = Chat.load(GOLDENS / "chat/qwen3")
    path = write(tmp_path / "a.jsonl", [SHAPES["gsm8k"][0]])
    on, off = (asked(path, chat, **more)[0] for more in ({}, chat.no_thinking()))
    assert off.prompt == chat.encode_prompt(SHAPES["gsm8k"][1], enable_thinking=False)
    assert off.prompt[:len(on.prompt)] == on.prompt != off.prompt
    assert chat.decode(off.prompt, False).endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize("example, parts", [
    ({"text": "Once upon a time"}, ["a text has no question"]),
    ({"text": "x", "other": 1}, ["a text has no question"]),
    ({"instruction": U}, ["fit no known format"]), ({"question": 5, "answer": "6"}, ["no known"]),
    ({"prompt": 5}, ["'prompt' must be text"]), ({"completion": A}, ["fit no known format"]),
    ({}, ["fit no known format"]), ([1], ["a JSON object"]), ("x", ["a JSON object"]),
    ({"prompt": U, "completion": A, "label": True}, ["KTO"]),
    ({"prompt": U, "chosen": A, "rejected": A, "messages": 5}, ["'messages' must be a list"]),
])
def test_what_is_no_question_is_one_line(example, parts, tmp_path):
    with refused("a.jsonl:2", *parts):
        list(Problems(write(tmp_path / "a.jsonl", [{"prompt": U}, example])))


def test_rendered_texts_are_refused(tmp_path):
    with refused("a.jsonl:1", "a text has no question"):
        list(Problems(write(tmp_path / "a.jsonl", [{"text": "x"}]), rendered=True))


@pytest.mark.parametrize("example", [
    {"prompt": U, "completion": None}, {"prompt": U, "text": None},
    {"prompt": U, "messages": None}, {"question": U, "answer": A, "messages": None},
    {"question": U, "answer": A, "prompt": None, "completion": None},
    {"question": U, "answer": float("nan")}])
def test_null_is_absent(example):
    """As tables have it, where each row has every column."""
    record = Problems.convert(example, "f:1", {})
    assert record["messages"][0] == ASK


def test_a_dash_may_be_the_answer(tmp_path, chat):
    one, = asked(write(tmp_path / "a.jsonl", [{"prompt": U, "completion": "-"}]), chat)
    assert one.record["expected"] == "-"


def test_a_table_and_columns(tmp_path):
    (tmp_path / "a.csv").write_text('frage,loesung,level\n"Which?","7",3\n')
    columns = parse_columns("question=frage,answer=loesung", Problems.formats)
    chat = Chat.load(ROOT / "common/tiny")
    one, = asked(None, chat, records=Problems(tmp_path / "a.csv", columns))
    assert one.record == {"question": U, "answer": "7", "expected": "7"}
    assert parse_columns("prompt=frage", Problems.formats) == {"prompt": "frage"}
    with refused("must name all keys of one format"):
        parse_columns("answer=loesung", Problems.formats)
    with refused("is not NAME=COLUMN"):
        parse_columns("text=frage", Problems.formats[:4])


def test_what_is_too_long_or_refused_is_left_out_and_counted(tmp_path, chat, capsys):
    rows = [{"prompt": U}, {"prompt": "long " * 40}, {"prompt": f"{U} {U}"},
            {"messages": [RIGHT]}, {"messages": [SYSTEM]}, {"prompt": "a <|im_end|> b"},
            {"prompt": U, "completion": A, "weight": 0}]
    path = write(tmp_path / "a.jsonl", rows)
    lengths = [len(chat.encode_prompt([{**ASK, "content": text}])) for text in (U, f"{U} {U}")]
    assert lengths[0] < lengths[1] < 40
    found = asked(path, chat, lengths[1])
    assert [one.record["prompt"] for one in found] == [U, f"{U} {U}"]
    said = capsys.readouterr().out
    assert "left out: 2 without a prompt" in said  # the others `encode` has counted
    found = asked(path, chat, lengths[1] - 1)
    assert [one.record["prompt"] for one in found] == [U]
    with refused("no prompt is left"):
        asked(path, chat, lengths[0] - 1)


def test_problems_are_those_of_the_documents_they_are_given(tmp_path, chat):
    """Of held-out documents others than of those that are trained on."""
    rows = [{"prompt": f"Say {n}", "n": n} for n in range(9)]
    records = Problems(write(tmp_path / "a.jsonl", rows))
    encoded = encode(records, chat, 500)
    some = type(encoded)(encoded.tokens, encoded.documents[[1, 4, 8]])
    assert [one.record["n"] for one in problems(chat, some, records, 500)] == [1, 4, 8]
    assert not records.ignored  # a reward may read every key


def test_the_tiny_problems(chat):
    train, asked_about = prompts_file.tiny_problems(3, chat)
    assert [*asked_about] == ["add", "base"] and len(train) == 2000
    assert (len(asked_about["add"]), len(asked_about["base"])) == (200, 200)
    assert prompts_file.tiny_problems(3, chat)[0] == train != prompts_file.tiny_problems(4, chat)[0]
    texts = [{one["messages"][0]["content"] for one in records}
             for records in (train, asked_about["add"])]
    assert not texts[0] & texts[1]
    found = problems(chat, encode(train, chat, 500), train, 500)
    assert len(found) == 2000
    for one, record in zip(found, train):
        words = [int(word.strip("?.")) for word in one.text.split() if word.strip("?.").isdigit()]
        assert one.record["expected"] == str(sum(words)) and one.record["skill"] == "add"
        assert one.prompt == chat.encode_prompt(record["messages"][:1])
    check_answers("exact", found)
    assert judge(rewards.exact, found[0], answer(chat, found[0].record["expected"]), chat) == 1
