"""Pairs of answers: from every shape that data sets have, to pairs of documents; nothing is left
out without being counted, and whatever a file holds, there is an answer or one line."""

import copy
import csv
import json
import math
import random
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checks import refused
from helpers import GOLDENS, ROOT, load

from common import prepare
from common.data import encode
from common.data.chat import Chat
from common.data.readers import parse_columns
from common.data.template import Refused
from common.errors import UserError
from common.files.config import read_config

train_dpo = load("chapter-03/post_training/train_dpo.py")
pairs = load("chapter-03/post_training/pairs.py")
packing = load("chapter-03/packing.py")
preference = load("chapter-03/post_training/preference.py")

U, W, L = "Which?", "This.", "That one."  # what is asked, the chosen and the rejected answer
ASK, RIGHT, WRONG = ({"role": role, "content": text} for role, text in (
    ("user", U), ("assistant", W), ("assistant", L)))
SYSTEM = {"role": "system", "content": "Be brief."}
HUMAN, GPT = ({"from": who, "value": text} for who, text in (("human", U), ("gpt", W)))
BAD_GPT = {"from": "gpt", "value": L}
EARLIER = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def of(value, ignored=None):
    return pairs.members(value, "f:1", {} if ignored is None else ignored)


def expected(*before):
    """The two records of the answers RIGHT and WRONG to ASK."""
    before = [{**one, "train": False} if one["role"] == "assistant" else one for one in before]
    return [{"messages": [*before, ASK, answer]} for answer in (RIGHT, WRONG)]


def human(*texts):
    return "".join(f"\n\n{who}: {text}" for who, text in zip(("Human", "Assistant") * 9, texts))


SHAPES = {
    "explicit": {"prompt": U, "chosen": W, "rejected": L},
    "messages": {"prompt": [ASK], "chosen": [RIGHT], "rejected": [WRONG]},
    "mixed": {"prompt": U, "chosen": [RIGHT], "rejected": L},
    "one message": {"prompt": U, "chosen": RIGHT, "rejected": WRONG},
    "implicit": {"chosen": [ASK, RIGHT], "rejected": [ASK, WRONG]},
    "prompt null": {"prompt": None, "messages": None, "chosen": [ASK, RIGHT],
                    "rejected": [ASK, WRONG]},
    "repeated": {"prompt": [ASK], "chosen": [ASK, RIGHT], "rejected": [ASK, WRONG]},
    "messages beside": {"messages": [ASK], "chosen": W, "rejected": WRONG},
    "hh": {"chosen": human(U, W), "rejected": human(U, L)},
    "hh, no line ends before": {"chosen": human(U, W)[2:], "rejected": human(U, L)},
    "sharegpt": {"conversations": [HUMAN], "chosen": GPT, "rejected": BAD_GPT},
    "sharegpt, lists": {"conversations": [HUMAN], "chosen": [GPT], "rejected": [BAD_GPT]},
    "sharegpt, texts": {"conversations": [HUMAN], "chosen": W, "rejected": L},
    "sharegpt, implicit": {"chosen": [HUMAN, GPT], "rejected": [HUMAN, BAD_GPT]},
    "llama-factory": {"instruction": U, "input": "", "chosen": W, "rejected": L},
    "alpaca": {"instruction": U, "output": [W, L]},
    "instruction null": {"instruction": None, "prompt": U, "chosen": W, "rejected": L},
}
MORE = {  # (value, what came before ASK, the keys that are noted)
    "ultrafeedback": ({"prompt": U, "prompt_id": "p", "chosen": [ASK, RIGHT],
                       "rejected": [ASK, WRONG], "messages": [ASK, RIGHT], "score_chosen": 8.5,
                       "score_rejected": 2.0},
                      [], ["messages", "prompt", "prompt_id", "score_chosen", "score_rejected"]),
    "the prompt once more, with a blank": ({"prompt": f"{U} ", "chosen": [ASK, RIGHT],
                                            "rejected": [ASK, WRONG]}, [], ["prompt"]),
    "system": ({"system": "Be brief.", "prompt": U, "chosen": W, "rejected": L}, [SYSTEM], []),
    "system, sharegpt": ({"conversations": [HUMAN], "system": "Be brief.", "chosen": GPT,
                          "rejected": BAD_GPT}, [SYSTEM], []),
    "system in all": ({"prompt": [SYSTEM, ASK], "chosen": [SYSTEM, ASK, RIGHT],
                       "rejected": [SYSTEM, ASK, WRONG]}, [SYSTEM], []),
    "history": ({"instruction": U, "history": [["Hi", "Hello."]], "chosen": W, "rejected": L},
                EARLIER, []),
    "turns": ({"prompt": [*EARLIER, ASK], "chosen": [RIGHT], "rejected": [WRONG]}, EARLIER, []),
    "turns, implicit": ({"chosen": [*EARLIER, ASK, RIGHT], "rejected": [*EARLIER, ASK, WRONG]},
                        EARLIER, []),
    "turns, hh": ({"chosen": human("Hi", "Hello.", U, W), "rejected": human("Hi", "Hello.", U, L)},
                  EARLIER, []),
    "hh prompt": ({"prompt": human("Hi", "Hello.", U) + "\n\nAssistant:", "chosen": W,
                   "rejected": L}, EARLIER, []),
    "whole conversation beside": (
        {"conversations": [HUMAN, GPT], "chosen": [HUMAN, GPT], "rejected": [HUMAN, BAD_GPT]},
        [], ["conversations"]),
    "another format beside": (
        {"prompt": U, "chosen": W, "rejected": L, "instruction": "x", "text": "t", "output": "y",
         "conversations": [HUMAN, GPT], "completion": "z"},
        [], ["conversations", "instruction", "completion", "text"]),
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_gives_the_same_pair(name):
    ignored, value = {}, copy.deepcopy(SHAPES[name])
    assert of(value, ignored) == expected() and ignored == {}
    assert value == SHAPES[name]  # the reader's value is left as it was


def test_null_and_what_pandas_writes_for_it_are_absent():
    for nothing in (None, math.nan):
        absent = dict.fromkeys(("prompt", "conversations", "instruction", "system", "x"), nothing)
        assert of({**absent, **SHAPES["implicit"]}) == expected()


@pytest.mark.parametrize("name", MORE)
def test_what_stands_beside_a_pair_is_read_or_noted(name):
    value, before, noted = MORE[name]
    ignored = {}
    assert of(value, ignored) == expected(*before)
    assert {key.strip("'") for key in ignored} == {*noted} and {*ignored.values()} <= {"f:1"}


def test_an_answer_of_several_turns_keeps_the_prompt_beside_it():
    turns = [{"role": "assistant", "content": "Let me see."}, {"role": "tool", "content": "21"}]
    for record in of({"messages": [ASK], "chosen": [*turns, RIGHT], "rejected": [*turns, WRONG]}):
        assert record["messages"][:3] == [ASK, {**turns[0], "train": False}, turns[1]]


def test_tools_and_calls():
    call = {"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "function": {"name": "weather", "arguments": {"town": "Rome"}}}]}
    for tools in ([TOOL], json.dumps([TOOL])):
        records = of({"prompt": U, "chosen": [call], "rejected": L, "tools": tools})
        assert records == [{"messages": [ASK, call], "tools": [TOOL]},
                           {"messages": [ASK, WRONG], "tools": [TOOL]}]


@pytest.mark.parametrize("name", ["messages", "mixed", "one message", "implicit", "sharegpt",
                                  "repeated", "messages beside"])
def test_lists_may_be_json_in_a_text(name):
    """As tables have them, and Arrow files of columns that were no lists once."""
    value = {key: one if isinstance(one, str) else json.dumps(one, indent=1)
             for key, one in SHAPES[name].items()}
    assert of(value) == expected()


@pytest.mark.parametrize("text", ['[{"name": "f"}]', '{"town": "Rome"}', "[1, 2]", "[]", "{", "[{]",
                                  "[" * 100_000, '["role"]'])
def test_an_answer_that_only_looks_like_turns_is_a_text(text):
    records = of({"prompt": text, "chosen": text, "rejected": L})
    assert [one["content"] for one in records[0]["messages"]] == [text, text]


@pytest.mark.parametrize("value, why", [
    ({"chosen": W, "rejected": L}, "neither a prompt nor turns"),
    ({"chosen": [RIGHT], "rejected": [WRONG]}, "without a prompt"),
    ({"chosen": [], "rejected": []}, "without a prompt"),
    ({"chosen": [ASK, RIGHT], "rejected": [ASK, WRONG, ASK]}, "last turn is not the assistant's"),
    ({"chosen": [RIGHT, ASK], "rejected": [WRONG, ASK]}, "last turn is not the assistant's"),
    ({"chosen": human(U, W), "rejected": human("Who?", L)}, "prompts differ"),
    ({"chosen": human(U, W), "rejected": human(U, L, "And?", L)}, "several turns"),
    ({"prompt": U, "chosen": [RIGHT, ASK, RIGHT], "rejected": [WRONG, ASK, RIGHT]}, "several"),
    ({"prompt": U, "chosen": [RIGHT, ASK], "rejected": L}, "last turn is not the assistant's"),
    ({"conversations": [HUMAN, GPT], "chosen": W, "rejected": L}, "ends with a turn of the ass"),
    ({"prompt": U, "chosen": [RIGHT, RIGHT], "rejected": L}, "ends with a turn of the assistant"),
    ({"prompt": U, "chosen": W, "rejected": L, "weight": 0}, "its weight is 0"),
    ({"prompt": [SYSTEM, ASK], "system": "Other.", "chosen": W, "rejected": L}, "system texts"),
    ({"chosen": f"Hm. {human(U, W)}", "rejected": human(U, L)}, "neither a prompt nor turns"),
])
def test_what_is_no_use_is_one_pair_less(value, why):
    with pytest.raises(Refused, match=why):
        of(value)


@pytest.mark.parametrize("value, parts", [
    ({"prompt": U, "completion": W, "label": True}, ["KTO", "'chosen' and 'rejected'"]),
    ({"prompt": U, "completion": W}, ["'prompt', 'completion'", "--columns"]),
    ({"messages": [ASK, RIGHT]}, ["'messages'", "--columns"]),
    ({"prompt": U, "chosen": W, "rejected": None}, ["no pair"]),
    ({"prompt": U, "chosen": math.nan, "rejected": L}, ["no pair"]),
    ({"prompt": U, "chosen": math.nan, "rejected": math.nan, "text": "x"}, ["no pair"]),
    ({"prompt": U, "chosen": 5, "rejected": 6}, ["a text or messages, not int"]),
    ({"instruction": U, "output": [W, L, L]}, ["no pair", "'output'"]),
    ({"instruction": U, "output": [W, None]}, ["no pair"]),
    ({"instruction": U, "output": W}, ["no pair"]),
    ({"prompt": U, "chosen": {"text": W}, "rejected": L}, ["role None"]),
    ({"prompt": U, "chosen": [W], "rejected": [L]}, ["a turn must be a JSON object"]),
    ({"prompt": 5, "chosen": W, "rejected": L}, ["'prompt' must be text"]),
    ({"prompt": U, "chosen": W, "rejected": L, "label": True}, ["KTO"]),
    ({}, ["no keys"]), ([W, L], ["no keys"]), (None, ["no keys"]), ("x", ["no keys"]),
])
def test_what_is_no_pair_is_one_line(value, parts):
    with refused("f:1", *parts):
        of(value)


# --- files ---

def write(path, rows):
    kind = path.suffix
    if kind == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif kind == ".json":
        path.write_text(json.dumps(rows))
    elif kind == ".csv":
        with open(path, "w", newline="") as file:
            table = csv.DictWriter(file, [*rows[0]])
            table.writeheader()
            table.writerows({key: "" if one is None else one if isinstance(one, str) else
                             json.dumps(one) for key, one in row.items()} for row in rows)
    else:
        pytest.importorskip("pyarrow", reason="Parquet is read where pyarrow is installed")
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".parquet", ".csv"])
def test_every_shape_is_the_same_from_every_kind_of_file(tmp_path, kind):
    for number, (name, value) in enumerate(SHAPES.items()):
        if kind == ".parquet" and name == "mixed" or kind == ".csv" and (
                name == "alpaca" or "null" in name):  # a column has one type; a cell is no null
            continue
        path = write(tmp_path / f"{number}{kind}", [value, value])
        records = pairs.PairRecords(path)
        for _ in range(2):  # as often as one likes
            found = list(records)
            assert [one.pop("where").startswith(str(path)) for one in found] == [True] * 4
            assert found == expected() * 2, (name, found)
        assert records.ignored == {}, name
    value, before, noted = MORE["ultrafeedback"]
    records = pairs.PairRecords(write(tmp_path / f"u{kind}", [value]))
    assert [{"messages": one["messages"]} for one in records] == expected()
    assert [*records.ignored] == [f"'{key}'" for key in noted]


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".parquet"])
def test_columns_of_stack_exchange(tmp_path, kind):
    row = {"qid": 1, "question": U, "date": "d", "response_j": W, "response_k": L}
    columns = parse_columns("prompt=question,chosen=response_j,rejected=response_k",
                            pairs.PairRecords.formats)
    records = pairs.PairRecords(write(tmp_path / f"a{kind}", [row, row]), columns)
    assert [{"messages": one["messages"]} for one in records] == expected() * 2
    assert [*records.ignored] == ["'qid'", "'date'"]
    with refused("a.jsonl:2", "'response_k' is not there"):
        list(pairs.PairRecords(write(tmp_path / "a.jsonl", [row, {**row, "response_k": None}]),
                               columns))
    with refused("did you mean rejected=response_k?"):
        parse_columns("prompt=question,chosen=response_j,response_k=rejected",
                      pairs.PairRecords.formats)
    with refused("all keys of one format", "prompt + chosen + rejected"):
        parse_columns("prompt=question,chosen=response_j", pairs.PairRecords.formats)


def test_a_refused_pair_counts_as_two_records_of_one_place(tmp_path):
    path = write(tmp_path / "a.jsonl", [
        SHAPES["explicit"], {"chosen": W, "rejected": L}, SHAPES["hh"]])
    found = list(pairs.PairRecords(path))
    assert [("refused" in one, one["where"].rpartition(":")[2]) for one in found] == [
        (False, "1")] * 2 + [(True, "2")] * 2 + [(False, "3")] * 2
    with refused("--rendered", "give messages"):
        list(pairs.PairRecords(path, rendered=True))


# --- any value ---

def odd(rng, depth=3):
    """A JSON value of the words that mean something in pairs, and of others."""
    kind = rng.randrange(12 if depth else 8)
    if kind < 8:
        return rng.choice([
            None, True, 0, 1, -3, 0.5, math.nan, 10**30, "", " ", U, W, L, "\ud800", "user", "gpt",
            "system", human(U, W), human(U), "Assistant:", "\n\nHuman:", json.dumps([ASK, RIGHT]),
            '{"role": "user"}', "[", "[[]]", "<|im_end|>", "nan", "\U00100000"])
    if kind < 10:
        return [odd(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {rng.choice(KEYS): odd(rng, depth - 1) for _ in range(rng.randrange(6))}


KEYS = ("prompt", "chosen", "rejected", "conversations", "messages", "instruction", "output",
        "input", "system", "tools", "functions", "history", "role", "content", "from", "value",
        "train", "weight", "loss", "label", "text", "completion", "tool_calls", "function_call",
        "name", "x")


def changed(value, rng):
    """A copy of `value` in which one place is another value, or gone, or twice there."""
    value, at = copy.deepcopy(value), []
    todo = [value]
    while todo:
        one = todo.pop()
        keys = one if isinstance(one, dict) else range(len(one))
        at += [(one, key) for key in keys]
        todo += [one[key] for key in keys if isinstance(one[key], (dict, list))]
    if not at:
        return odd(rng)
    one, key = rng.choice(at)
    what = rng.randrange(5)
    if what == 0:
        del one[key]
    elif what == 1 and isinstance(one, list):
        one.insert(key, copy.deepcopy(one[key]))
    elif what == 2 and isinstance(one, dict):
        one[rng.choice(KEYS)] = one.pop(key)
    elif what == 3:
        one[key] = json.dumps(one[key])
    else:
        one[key] = odd(rng)
    return value


def assert_answers(value, chat=None):
    """Records, Refused or a UserError, and what is given is a pair; gives which."""
    try:
        found = pairs.members(value, "f:1", {})
    except (Refused, UserError) as error:
        assert "\n" not in str(error) and len(str(error)) < 3000
        return type(error).__name__
    chosen, rejected = (record["messages"] for record in found)
    assert chosen[:-1] == rejected[:-1] and chosen[:-1]
    for one in (chosen[-1], rejected[-1]):
        assert one["role"] == "assistant"
    assert all(one.get("train") is (False if one["role"] == "assistant" else None)
               for one in chosen[:-1])
    for record in found:  # and the next to read them can
        try:
            ids, trained = chat.encode_messages(record["messages"],
                                                **{k: v for k, v in record.items() if k == "tools"})
            assert len(ids) == len(trained)
        except Refused:
            pass
    return "pair"


@pytest.mark.parametrize("count", [3000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_any_value_gives_a_pair_or_one_line(count):
    rng, chat = random.Random(1), Chat.load(ROOT / "common/tiny")
    values = [*SHAPES.values(), *(value for value, *_ in MORE.values())]
    ends = {"pair": 0, "Refused": 0, "UserError": 0}
    for number in range(count):
        value = odd(rng) if number % 10 == 0 else rng.choice(values)
        for _ in range(rng.randrange(4)):
            value = changed(value, rng) if isinstance(value, (dict, list)) else odd(rng)
        try:
            ends[assert_answers(value, chat)] += 1
        except Exception as error:
            raise AssertionError(f"number {number}: {value!r}") from error
    assert min(ends.values()) > count / 50, ends  # all ways are tried


# --- tokens ---

@pytest.fixture(scope="module", params=["tiny", "qwen3", "llama3"])
def chat(request):
    return Chat.load(ROOT / "common/tiny" if request.param == "tiny" else
                     GOLDENS / "chat" / request.param)


def encoded(records, chat, limit=400, too_long="drop", title="data"):
    return encode.encode(records, chat, limit, too_long, None, title)


def trained(document):
    ids, labels = document
    return ids[labels >= 0].tolist()


def test_only_the_last_turn_is_trained_from_the_header_to_its_end(chat):
    records = [one for name in ("turns", "turns, hh", "system") for one in of(MORE[name][0])]
    made = pairs.Pairs.of(encoded(records, chat), 2000)
    assert len(made) == 3
    for i in range(3):
        for document, record in zip(made.pair(i), records[2 * i:2 * i + 2]):
            messages, ids = record["messages"], document[0].tolist()
            plain = [{key: one[key] for key in ("role", "content")} for one in messages]
            text = chat.render(plain)
            assert ids == chat.tokenise([text])[0].ids  # prompt and answer as one text
            prompt = chat.encode_prompt(plain[:-1])
            (places,) = (document[1] >= 0).nonzero().t()
            assert places.tolist() == list(range(len(prompt), places[-1] + 1))  # in one piece
            assert ids[:len(prompt)] == prompt  # begins where generation does
            assert ids[places[-1]] in chat.stop_ids
            words = chat.decode(trained(document), skip_special=False)
            end = chat.decode([ids[places[-1]]], skip_special=False)
            assert words.removeprefix("<think>\n\n</think>\n\n") == messages[-1]["content"] + end


def test_an_answer_has_the_tokens_that_it_has_behind_its_prompt():
    chat = Chat.load(ROOT / "common/tiny")
    values = [{"prompt": "Say it.", "chosen": "akopet", "rejected": "one two"}]
    made = pairs.Pairs.of(encoded([one for value in values for one in of(value)], chat), 400)
    for document, text in zip(made.pair(0), ("akopet", "one two")):
        alone, (end,) = chat.tokenise([text])[0].ids, chat.tokenise(["<|im_end|>"])[0].ids
        assert trained(document) != [*alone, end]
        assert chat.decode(trained(document)) == text


def test_a_pack_lays_the_answers_side_by_side():
    chat = Chat.load(ROOT / "common/tiny")
    values = [{"prompt": f"Say {i}.", "chosen": "12" * (i + 1), "rejected": "a"} for i in range(3)]
    made = pairs.Pairs.of(encoded([one for value in values for one in of(value)], chat), 400)
    pack = preference.collate_pairs([made.pair(i) for i in (2, 0)])
    lengths = pack["cu_seqlens"].diff().tolist()
    assert lengths == [len(ids) for i in (2, 0) for ids, _ in made.pair(i)]
    answers = [chat.decode(labels[labels >= 0]) for labels in pack["labels"].split(lengths)]
    assert answers == ["121212", "a", "12", "a"]
    assert made.lengths.tolist() == [sum(len(ids) for ids, _ in made.pair(i)) for i in range(3)]


# --- Pairs.of ---

def by_hand(*documents):
    """An `Encoded` of (ids, where its trained tokens begin, the number of its record)."""
    tokens = np.concatenate([np.array([(one, n >= begin) for n, one in enumerate(ids)],
                                      encode.TOKEN) for ids, begin, _ in documents])
    rows, start = [], 0
    for ids, begin, number in documents:
        rows.append((start, len(ids), len(ids) - begin, number, hash(tuple(ids))))
        start += len(ids)
    return encode.Encoded(tokens, np.array(rows, encode.DOCUMENT))


def test_what_is_no_pair_of_documents_is_counted():
    made = pairs.Pairs.of(by_hand(
        ([1, 2, 3], 2, 0), ([1, 2, 4, 5], 2, 1),  # good
        ([1, 2, 3], 2, 2), ([1, 2, 3], 2, 3),  # the same
        ([1, 2, 3], 2, 4), ([1, 9, 4], 2, 5),  # another prompt
        ([1, 2, 3], 2, 6), ([1, 2, 3], 1, 7),  # the same tokens, another border: the same still
        ([1, 2, 3], 2, 8), ([1, 5], 1, 9),  # a shorter prompt
        ([1, 2, *range(20)], 2, 10), ([1, 2, 4, 5], 2, 11),  # too long together
        ([1, 2, 3], 2, 12),  # its rejected answer is missing
        ([1, 2, 3], 2, 15),  # its chosen answer is missing; next to a rejected one
        ([1, 2, 3], 2, 17), ([1, 2, 7], 2, 18),  # rejected, chosen: of two pairs
        ([1, 2, 8], 2, 22), ([1, 2, 7, 7], 2, 23)), 20)  # good
    assert len(made) == 2 and made.lengths.tolist() == [7, 7]
    assert made.documents["record"].tolist() == [0, 22]
    assert [trained(one) for i in range(2) for one in made.pair(i)] == [[3], [4, 5], [8], [7, 7]]
    assert made.documents["trained"].tolist() == [3, 3]
    assert made.notes == [
        "skipped, 2 whose answers are the same (first: example 2)",
        "skipped, 2 whose prompts are not the same tokens (first: example 3)",
        "skipped, 1 longer together than --batch-tokens 20 (first: example 6)",
        "skipped, 4 of which only one answer can be used"]


def test_a_pair_exchanged_is_another_pair():
    one, other = ([1, 2, 3], 2), ([1, 2, 4], 2)
    a, b, again = (pairs.Pairs.of(by_hand((*first, 0), (*second, 1)), 20).documents["digest"][0]
                   for first, second in ((one, other), (other, one), (one, other)))
    assert a == again != b


LONG = "ab " * 60  # more than 128 tokens
KINDS = [  # of pairs that are left out: (keys but for the prompt, the reasons that are given)
    (dict(chosen=W, rejected=W), {"whose answers are the same"}),
    (dict(chosen=LONG, rejected=L), {"dropped, longer than 128 tokens", "lone"}),
    (dict(chosen=W, rejected=LONG), {"dropped, longer than 128 tokens", "lone"}),
    (dict(chosen=LONG, rejected=LONG[1:]), {"dropped, longer than 128 tokens"}),
    (dict(chosen="ab " * 40, rejected="ba " * 40), {"longer together than --batch-tokens 160"}),
    (dict(chosen="", rejected=L), {"nothing in it to train on", "lone"}),
    (dict(chosen=W, rejected=""), {"nothing in it to train on", "lone"}),
    (dict(chosen=W, rejected="a<|im_end|>"), {"control token", "lone"}),
    (dict(chosen=W, rejected=L, system="<|im_end|>"), {"control token"}),
    (dict(chosen=W, rejected=L, weight="0"), {"its weight is 0"})]
REASONS = {reason: reason for _, reasons in KINDS for reason in reasons} | {
    "lone": "only one answer can be used"}


@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_left_out_in_silence(tmp_path, capsys, seed):
    """Every pair of the file is trained on, or is counted, as one, with the place of the first.
    """
    rng, chat = random.Random(seed), Chat.load(ROOT / "common/tiny")
    drawn = [None, *(rng.choice([None, None, *KINDS]) for _ in range(60))]
    rows = [{"prompt": f"{U} {i}", **(one[0] if one else {"chosen": W, "rejected": L})}
            for i, one in enumerate(drawn)]
    path = write(tmp_path / "a.jsonl", rows)
    whole = encoded(pairs.PairRecords(path), chat, 128)
    made = pairs.Pairs.of(whole, 160)
    assert len(made) == drawn.count(None)
    printed = capsys.readouterr().out
    for reason, words in REASONS.items():
        those = [i for i, one in enumerate(drawn) if one and reason in one[1]]
        notes = [note for note in whole.notes + made.notes if words in note]
        assert len(notes) == bool(those), (reason, notes)
        for note in notes:
            assert f"{note}\n" in printed
            assert note.removeprefix("skipped, ").split()[0] == str(len(those)), note
            place = note.partition("(first: ")[2].rstrip(")")
            assert place in (f"{path}:{those[0] + 1}", f"example {those[0] + 1}",
                             "" if reason == "lone" else None), note


def test_an_answer_that_is_too_long(tmp_path):
    chat = Chat.load(ROOT / "common/tiny")
    rows = [{"prompt": U, "chosen": "12" * 60, "rejected": L},
            {"prompt": U, "chosen": W, "rejected": L},
            {"prompt": U * 60, "chosen": W, "rejected": L}]
    records = pairs.PairRecords(write(tmp_path / "a.jsonl", rows))
    assert len(pairs.Pairs.of(encoded(records, chat, 50), 400)) == 1
    with refused("a.jsonl:1", "the limit is 50"):
        encoded(records, chat, 50, "error")
    cut = pairs.Pairs.of(encoded(records, chat, 50, "truncate"), 400)
    assert len(cut) == 2  # a prompt that fills the limit leaves nothing to learn
    (ids, labels), _ = cut.pair(0)
    assert len(ids) == 50 and labels[-1] >= 0 and ids[-1] not in chat.stop_ids
    with refused("no pair can be trained on", "2 longer together than --batch-tokens 20"):
        pairs.Pairs.of(encoded(records, chat, 50, "truncate"), 20)
    same = pairs.PairRecords(write(tmp_path / "b.jsonl", [{"prompt": U, "chosen": "1" * 60,
                                                           "rejected": "1" * 70}]))
    with refused("whose answers are the same"):  # within the limit
        pairs.Pairs.of(encoded(same, chat, 50, "truncate"), 400)


# --- prepare.load: the cache, what is held out ---

def loaded(path, batch_tokens=400, **more):
    options = train_dpo.Options(data=[str(path)], batch_tokens=batch_tokens, **more)
    source = ROOT / "common/tiny"
    config = load("chapter-03/modeling_llama.py").LlamaConfig.from_dict(read_config(source))
    return prepare.load(options, source, config, None, pairs.PairRecords,
                        partial(pairs.Pairs.of, batch_tokens=batch_tokens))


@pytest.fixture
def encodings(monkeypatch, tmp_path):
    """A cache of its own, and how often something was tokenised."""
    calls, real = [], encode.encode
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(encode, "encode", lambda *given: calls.append(1) or real(*given))
    return calls


def content(dataset):
    return [[one.tolist() for document in dataset.pair(i) for one in document]
            for i in range(len(dataset))]


def rows_of(count, words=("yes", "no")):
    return [{"prompt": f"Say {i}.", "chosen": f"{words[0]} {i}", "rejected": f"{words[1]} {i}"}
            for i in range(count)]


def test_it_is_tokenised_once_until_the_file_or_our_code_changes(
        tmp_path, encodings, monkeypatch, capsys):
    path = write(tmp_path / "a.jsonl", [*rows_of(12), {"prompt": U, "chosen": W, "rejected": W}])
    first = loaded(path)
    said = [line for line in capsys.readouterr().out.splitlines() if "answers are the same" in line]
    assert len(said) == 1 and len(encodings) == 1
    again = loaded(path)
    assert len(encodings) == 1 and again.digest() == first.digest()
    assert "answers are the same" in capsys.readouterr().out  # said each time
    assert content(again.train) == content(first.train)
    assert content(again.held_out) == content(first.held_out)
    loaded(path, batch_tokens=500)  # the limit is another, so answers may be cut elsewhere
    assert len(encodings) == 2
    changed = tmp_path / "pairs.py"
    shutil.copyfile(pairs.__file__, changed)
    monkeypatch.setattr(pairs.PairRecords, "code", str(changed))
    loaded(path)
    assert len(encodings) == 2  # the same code elsewhere
    changed.write_text(changed.read_text() + "\n# other\n")
    loaded(path)
    assert len(encodings) == 3
    write(path, rows_of(12, ("yes", "nay")))
    assert loaded(path).digest() != first.digest() and len(encodings) == 4


def test_a_split_keeps_pairs_whole(tmp_path):
    rows = rows_of(60) + rows_of(1)  # one is there twice
    data = loaded(write(tmp_path / "a.jsonl", rows), seed=3)
    assert len(data.held_out) == 1 and len(data.train) == 60
    both = content(data.train) + content(data.held_out)
    everything = content(loaded(tmp_path / "a.jsonl", seed=4).train)
    assert len({json.dumps(one) for one in both}) == 60 > len({*map(json.dumps, everything)}) == 59
    for chosen, _, rejected, _ in both:
        decoded = [data.chat.decode(one) for one in (chosen, rejected)]
        assert "yes" in decoded[0] and decoded[0].replace("yes", "no") == decoded[1]
    assert data.quizzes["held-out"] and data.train.unit == "pairs"


def test_other_data_are_held_out(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", rows_of(10))
    other = write(tmp_path / "b.jsonl", rows_of(3, ("yea", "nay")) + rows_of(1))
    data = loaded(path, eval_data=str(other))
    assert len(data.train) == 10 and len(data.held_out) == 4
    assert "held out: 1 of these pairs are in the training data too" in capsys.readouterr().out
    assert [data.chat.decode(one.expected) for one in data.quizzes["held-out"]] == [
        "yea 0", "yea 1", "yea 2", "yes 0"]  # the chosen answers


@pytest.mark.parametrize("rows, parts", [
    ([{"prompt": U, "chosen": W, "rejected": W}], ["no pair can be trained on", "are the same"]),
    ([{"prompt": U, "chosen": "", "rejected": W}], ["no pair can be trained on", "only one"]),
    ([{"prompt": U, "chosen": "", "rejected": ""}], ["no example can be trained on"]),
    ([{"chosen": W, "rejected": L}], ["no example can be trained on", "neither a prompt nor"]),
    ([SHAPES["explicit"]], ["nothing can be held out", "it is only one"]),
])
def test_nothing_to_learn_from(tmp_path, rows, parts):
    with refused(*parts):
        loaded(write(tmp_path / "a.jsonl", rows))


def test_two_pairs_are_enough(tmp_path):
    data = loaded(write(tmp_path / "a.jsonl", rows_of(2)))
    assert (len(data.train), len(data.held_out)) == (1, 1)


# --- the model's own mistakes ---

@pytest.fixture(scope="module")
def mistakes():
    """{split: records} of the tiny model's mistakes in adding, and how to make them again."""
    model, _ = pairs.load_model("tiny", torch.device("cpu"), torch.float32)
    chat = Chat.load(ROOT / "common/tiny")

    def make(split, seed=0):
        return pairs.own_mistakes(model, chat, "add", split, 40, seed)
    return {split: make(split) for split in ("train", "eval")}, make


def test_own_mistakes_are_right_and_wrong_answers_to_one_prompt(mistakes):
    made, make = mistakes
    for split, records in made.items():
        prompts = [one["messages"][0]["content"] for one in records]
        assert prompts[::2] == prompts[1::2] and len({*prompts}) == len(records) // 2 > 5
        for chosen, rejected in zip(records[::2], records[1::2]):
            ask, right = chosen["messages"]
            a, b = (int(word.strip("?.")) for word in ask["content"].split()
                    if word.strip("?.").isdigit())
            assert right == {"role": "assistant", "content": str(a + b)}
            wrong = rejected["messages"][1]
            assert wrong["role"] == "assistant" and wrong["content"] != right["content"]
            digest = pairs.skills.hashlib.sha256(ask["content"].encode()).digest()
            assert (digest[0] < 32) == (split == "eval")
    train, held_out = ({one["messages"][0]["content"] for one in made[split]} for split in made)
    assert not train & held_out
    assert make("train") == made["train"]  # the same again
    assert make("train", seed=1) != made["train"]
    assert len(pairs.Pairs.of(encoded(made["train"], Chat.load(ROOT / "common/tiny")), 400)) == (
        len(made["train"]) // 2)


def test_the_example_shows_both_answers_and_the_lengths_are_the_documents(chat):
    data = pairs.Pairs.of(encoded(of({"prompt": U, "chosen": W, "rejected": L}), chat), 400)
    chosen, rejected = data.pair(0)
    assert data.document_lengths().tolist() == [len(chosen[0]), len(rejected[0])]
    before, _, after = data.example(chat).partition("its rejected answer:\n")
    assert W in before and L not in before and L in after and U not in after


def test_a_text_that_only_looks_like_turns_stays_a_text():
    flights = '[{"from": "Rome", "to": "Paris"}]'
    (chosen, rejected) = of({"prompt": U, "chosen": flights, "rejected": L})
    assert chosen["messages"][-1] == {"role": "assistant", "content": flights}


def test_ranks_with_other_answers_are_an_error(monkeypatch):
    """Else each would have other data, and another number of steps, and wait for the others."""
    options = SimpleNamespace(model="tiny", init="pretrained", seed=0, quantize="none",
                              double_quant=False)
    monkeypatch.setattr(pairs, "PROMPTS", 4)
    monkeypatch.setattr(pairs, "all_sum", lambda tensor, how: tensor + (
        how == torch.distributed.ReduceOp.MAX))
    with pytest.raises(UserError, match="answers differently on different ranks"):
        pairs.tiny_pairs(options, torch.device("cpu"), torch.float32, Chat.load(ROOT / "common/tiny"))
