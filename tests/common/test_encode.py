"""common/data/encode.py: documents, what is left out, and what is kept."""

import json
import os
import shutil
import sys
import threading
import time

import numpy as np
import pytest
import torch
from checks import refused
from helpers import GOLDENS, encode_text

from common.data import encode
from common.data.chat import Chat
from common.data.encode import cached, show_example, split, virtual
from common.data.readers import Records
from common.errors import UserError


@pytest.fixture(scope="module")
def chat():
    return Chat.load(GOLDENS / "chat" / "qwen3")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bareloop" / "encoded"


def talk(question, answer, **more):
    return {"messages": [{"role": "user", "content": question},
                         {"role": "assistant", "content": answer}], **more}


def lists(encoded):
    return [[part.tolist() for part in encoded[i]] for i in range(len(encoded))]


# --- documents ---

def test_documents_are_ids_and_unshifted_labels(chat):
    records = [talk("a", "b"), {"text": "some text"}, talk("c", "d")]
    encoded = encode.encode(iter(records), chat, 100)
    assert len(encoded) == 3 and encoded.lengths.dtype == np.int64
    for i, record in enumerate(records):
        ids, trained = (encode_text(chat, record["text"]) if "text" in record
                        else chat.encode_messages(record["messages"]))
        input_ids, labels = encoded[i]
        assert input_ids.dtype == labels.dtype == torch.int64
        assert input_ids.tolist() == ids and encoded.lengths[i] == len(ids)
        assert labels.tolist() == [t if on else -100 for t, on in zip(ids, trained)]
    assert encoded[-1][0].tolist() == encoded[2][0].tolist()
    with pytest.raises(IndexError):
        encoded[3]


def test_what_cannot_be_used_is_skipped_counted_and_named(chat, capsys):
    records = [talk("a", "b"), {"text": " \n", "where": "f:1"}, talk("q", "", where="f:2"),
               talk("q <|im_end|>", "a", where="f:3"), talk("q", "a <|im_end|>", where="f:4"),
               {"messages": [], "where": "f:5"}, talk("q " * 50, "a", where="f:6"),
               talk("q", "a " * 50, where="f:7"), talk("", " ", where="f:8")]
    encoded = encode.encode(records, chat, 40)
    assert len(encoded) == 2 and encoded.lengths.tolist()[1] == 40
    said = capsys.readouterr().out
    assert encoded.notes == [
        "2 skipped, empty (first: f:1)",
        "2 skipped, its text spells the control token <|im_end|> (first: f:3)",
        "2 skipped, nothing in it to train on (first: f:2)",
        "2 cut, longer than 40 tokens (first: f:6)",
        "1 skipped, nothing in it to train on within 40 tokens (first: f:6)"]
    assert all(note in said for note in encoded.notes) and "data: 2 documents" in said


def test_a_trained_first_token_is_nothing_to_train_on(tmp_path):
    """Nothing predicts it: the loss of such a document would be an empty sum."""
    shutil.copytree(GOLDENS / "chat" / "qwen3", tmp_path / "t")
    (tmp_path / "t" / "chat_template.jinja").unlink()
    chat = Chat.load(tmp_path / "t")
    turns = [{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]
    assert chat.encode_messages(turns)[1] == [True, False]
    with pytest.raises(UserError, match="1 skipped, nothing in it to train on"):
        encode.encode([{"messages": turns}], chat, 100)


@pytest.mark.parametrize("records", [
    [talk("a", "")], [{"text": ""}], [talk("<|im_end|>", "a")], [],
    [{"messages": [{"role": "user", "content": "a"}]}]])
def test_no_usable_example_is_an_error(chat, records):
    with pytest.raises(UserError, match="no example can be trained on: "):
        encode.encode(records, chat, 100)


def test_too_long(chat, capsys):
    records = [talk("a", "b " * 40, where="f:1"), talk("a", "b")]
    ids = chat.encode_messages(records[0]["messages"])[0]
    encoded = encode.encode(records, chat, 30, "truncate")
    assert encoded[0][0].tolist() == ids[:30] and len(encoded) == 2
    encoded = encode.encode(records, chat, 30, "drop")
    assert len(encoded) == 1 and encoded.notes == ["1 dropped, longer than 30 tokens (first: f:1)"]
    with pytest.raises(UserError, match=f"f:1: {len(ids)} tokens, the limit is 30"):
        encode.encode(records, chat, 30, "error")
    with pytest.raises(UserError, match="2 at least"):
        encode.encode(records, chat, 1)


@pytest.mark.parametrize("length", [2, 3, 7, 100])
def test_of_a_long_text_every_token_is_predicted_once(chat, length):
    text = "It is what it is: the sky, the grass.\n" * 9
    ids = encode_text(chat, text)[0]
    encoded = encode.encode([{"text": text}], chat, length)
    assert encoded.lengths.max() <= length and encoded.notes == []
    assert sum((one.tolist()[1:] for _, one in map(encoded.__getitem__, range(len(encoded)))),
               []) == ids[1:]
    assert [one[0].item() for one, _ in map(encoded.__getitem__, range(len(encoded)))] == [
        ids[i] for i in range(0, len(ids) - 1, length - 1)]


@pytest.mark.parametrize("name", ["qwen3", "llama3"])
def test_a_long_text_in_pieces_has_the_tokens_of_the_whole(name, monkeypatch):
    chat = Chat.load(GOLDENS / "chat" / name)
    rng = np.random.default_rng(0)
    words = ["the", "sky", "  ", "\n", "\n\n", "\n \n", "42", "Zürich", "👍🏽", ".", "\t", "\nIt"]
    text = " ".join(words[i] for i in rng.integers(0, len(words), 3000))
    whole = encode_text(chat, text)[0]
    calls = []
    tokenise = chat.tokenise
    monkeypatch.setattr(chat, "tokenise", lambda *a: calls.append(len(a[0])) or tokenise(*a))
    for piece in (50, 1000):
        monkeypatch.setattr(encode, "PIECE", piece)
        calls.clear()
        encoded = encode.encode([{"text": text}], chat, 10**6)
        assert encoded[0][0].tolist() == whole and sum(calls) > 10


def test_a_tokenizer_that_looks_across_line_ends_gets_the_text_whole(tmp_path, monkeypatch):
    from tokenizers import Tokenizer, pre_tokenizers

    shutil.copytree(GOLDENS / "chat" / "qwen3", tmp_path / "t")
    tokenizer = Tokenizer.from_file(str(tmp_path / "t" / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    tokenizer.save(str(tmp_path / "t" / "tokenizer.json"))
    chat = Chat.load(tmp_path / "t")
    text = "the sky\nis what\n" * 50
    monkeypatch.setattr(encode, "PIECE", 40)
    assert encode.encode([{"text": text}], chat, 10**6)[0][0].tolist() == encode_text(chat, text)[0]


def test_a_token_beyond_the_vocabulary_is_an_error_with_its_place(chat):
    top = max(chat.encode_messages(talk("a", "b")["messages"])[0])
    encode.encode([talk("a", "b")], chat, 100, vocab_size=top + 1)
    with pytest.raises(UserError, match=rf"f:9: token \d+ is not below .* vocab_size {top}"):
        encode.encode([talk("a", "b", where="f:9")], chat, 100, vocab_size=top)


def test_many_chunks_keep_their_order(chat, monkeypatch):
    monkeypatch.setattr(encode, "BATCH", 7)
    records = [talk(str(i), str(i)) if i % 3 else {"text": str(i)} for i in range(50)]
    encoded = encode.encode(records, chat, 100)
    texts = [chat.decode(encoded[i][0]) for i in range(50)]
    assert all(str(i) in text for i, text in enumerate(texts))


# --- the cache ---

def make_from(path, chat, calls, length=100):
    def make(file):
        calls.append(path)
        return encode.encode(Records([path]), chat, length, file=file)
    return cached(make, ["key", length], [path])


def test_a_second_run_maps_what_the_first_made(tmp_path, chat, home, capsys):
    path, calls = tmp_path / "a.jsonl", []
    path.write_text(json.dumps(talk("a", "b")) + "\n" + json.dumps({"text": ""}))
    first = make_from(path, chat, calls)
    said = capsys.readouterr().out
    again = make_from(path, chat, calls)
    assert len(calls) == 1 and lists(first) == lists(again) and again.notes == first.notes
    assert capsys.readouterr().out == said  # what was skipped is said again
    assert sorted(p.suffix for p in home.iterdir()) == ["", ".lock"]
    assert isinstance(again.tokens, np.memmap)
    make_from(path, chat, calls, 50)
    path.write_text(json.dumps(talk("a", "c")))
    assert len(make_from(path, chat, calls)) == 1 and len(calls) == 3


def test_any_damage_to_a_cache_file_is_found_said_and_mended(tmp_path, chat, home, capsys):
    path, calls = tmp_path / "a.jsonl", []
    path.write_text("\n".join(json.dumps(talk(f"question {i}", "b")) for i in range(5)))
    good, rng = lists(make_from(path, chat, calls)), np.random.default_rng(0)
    for turn in range(90):
        file = next(home.glob(f"*/{('tokens', 'documents', 'manifest.json')[turn % 3]}"))
        whole = file.read_bytes()
        broken = bytearray(whole)
        if turn % 4:
            broken[rng.integers(len(broken))] ^= 1 << rng.integers(8)
        else:
            broken = broken[:rng.integers(len(broken))]
        file.write_bytes(broken)
        if turn % 30 == 0:
            file.unlink()
        capsys.readouterr()
        assert lists(make_from(path, chat, calls)) == good
        assert len(calls) == 2 and file.read_bytes() == whole
        assert "damaged; the data are tokenised again" in capsys.readouterr().err
        calls[:] = [path]


def test_a_cache_that_cannot_be_written_is_only_said(tmp_path, chat, monkeypatch, capsys):
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where a folder must be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    path, calls = tmp_path / "a.jsonl", []
    path.write_text(json.dumps(talk("a", "b")))
    assert len(make_from(path, chat, calls)) == 1
    assert "note: the tokenised data cannot be kept" in capsys.readouterr().out


@pytest.mark.parametrize("when", ["tokens", "manifest"])
def test_a_full_disk_is_one_line_and_leaves_no_file(tmp_path, chat, home, monkeypatch, when):
    def fail(*arguments, **more):
        raise OSError(28, "No space left on device")

    path, calls = tmp_path / "a.jsonl", []
    path.write_text(json.dumps(talk("a", "b")))
    monkeypatch.setattr(*((encode, "encode") if when == "tokens" else (os, "fsync")), fail)
    with refused("the tokenised data in", "XDG_CACHE_HOME", "No space left on device"):
        make_from(path, chat, calls)
    assert [p.suffix for p in home.iterdir()] == [".lock"]


def test_what_a_killed_process_has_left_is_removed(tmp_path, chat, home):
    path, calls = tmp_path / "a.jsonl", []
    path.write_text(json.dumps(talk("a", "b")))
    old, live = home / "new-x1y2", home / "new-z3"
    for folder in (old, live):
        folder.mkdir(parents=True)
        (folder / "tokens").write_text("half of it")
    os.utime(old, (0, 0))
    make_from(path, chat, calls)
    assert not old.exists() and live.exists() and len(calls) == 1


def test_of_several_at_once_one_does_the_work(tmp_path, chat):
    """As the processes of one run do (here threads: the lock is the open file's)."""
    path, calls, results = tmp_path / "a.jsonl", [], []
    path.write_text("\n".join(json.dumps(talk(f"question {i}", "b " * i)) for i in range(60)))

    def make(file):
        calls.append(1)
        time.sleep(0.3)
        return encode.encode(Records([path]), chat, 100, file=file)

    threads = [threading.Thread(target=lambda: results.append(cached(make, 1, [path])))
               for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and len(results) == 3
    assert len({int(encoded.tokens["id"].sum()) for encoded in results}) == 1


def test_preparation_streams(tmp_path, chat, home):
    """The arrays lie in files from the start, not in memory."""
    encoded = encode.encode((talk(str(i), "the sky") for i in range(2500)), chat, 1000)
    assert len(encoded) == 2500 and isinstance(encoded.tokens, np.memmap)
    assert not home.exists()  # a nameless file


# --- virtual data, held-out data, the example ---

def test_virtual_data_are_random_of_varied_length_and_repeatable():
    data, again, other = (virtual(500, 1000, 64, seed) for seed in (1, 1, 2))
    assert (data.tokens == again.tokens).all() and len(data.tokens) != len(other.tokens)
    ids = data.tokens["id"]
    assert 2 <= data.lengths.min() < 16 < data.lengths.max() == 64 and len(data) == 500
    assert ids.min() >= 0 and 900 < ids.max() < 1000
    assert data.lengths.sum() == len(data.tokens) and data.tokens["trained"].all()


@pytest.mark.parametrize("count, held", [(2, 1), (49, 1), (100, 2), (5000, 100), (50_000, 200)])
def test_two_percent_are_held_out_within_bounds(count, held):
    data = virtual(count, 100, 4, 0)
    train, kept = split(data, 3)
    assert (len(train), len(kept)) == (count - held, held)
    chosen = kept.documents["record"]
    assert sorted([*train.documents["record"], *chosen]) == list(range(count))
    assert (split(data, 3)[1].documents == kept.documents).all()
    i = int(chosen[0])
    assert kept[0][0].tolist() == data[i][0].tolist() and kept.lengths[0] == data.lengths[i]
    if count > 40:
        assert {*split(data, 4)[1].documents["record"]} != {*chosen}


def test_one_example_cannot_be_split():
    with pytest.raises(UserError, match="--eval-data"):
        split(virtual(1, 100, 4, 0), 0)


def test_the_example_shows_what_is_trained(chat, monkeypatch):
    encoded = encode.encode([talk("What\x1b[2J?", "It is so.")], chat, 100)
    shown = show_example(encoded, chat)
    assert "in [brackets]:" in shown.splitlines()[0]
    assert shown.endswith("<|im_start|>assistant\n[<think>\n\n</think>\n\nIt is so.<|im_end|>]")
    assert r"What\x1b[2J?" in shown and "\x1b" not in shown
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert show_example(encoded, chat).endswith("\n\nIt is so.<|im_end|>\x1b[0m")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in show_example(encoded, chat)


def test_a_long_example_is_shown_by_its_ends(chat):
    encoded = encode.encode([talk("start " + "x " * 3000, "y " * 3000 + "end")], chat, 10**5)
    shown = show_example(encoded, chat, limit=40)
    assert len(shown) < 600 and "start" in shown and shown.endswith("end<|im_end|>]")
    assert "tokens ..." in shown
