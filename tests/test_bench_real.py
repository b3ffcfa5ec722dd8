"""tests/bench/real.py: what it measures on a real model, tried on the tiny one."""

import json
import statistics

import pytest
import torch
from helpers import ROOT, load

real = load("tests/bench/real.py")
TINY = ROOT / "common" / "tiny"


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Ten problems, split; few questions and short answers, so that it takes seconds."""
    monkeypatch.setattr(real, "ASIDE", 6)
    monkeypatch.setattr(real, "HELD_OUT", 4)
    monkeypatch.setattr(real, "FEW", 2)
    monkeypatch.setattr(real, "LONGEST", 8)
    monkeypatch.setattr(real, "GENERAL", real.GENERAL[:3])
    source = tmp_path / "all.jsonl"
    source.write_text("".join(json.dumps(
        {"question": f"What is {n} plus 1,000?", "answer": f"{n} + 1000\n#### 1,00{n}"}) + "\n"
        for n in range(10)))
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 40)
    real.main(["data", str(source), str(tmp_path / "data")])
    return tmp_path / "data"


def test_no_held_out_problem_is_trained_on(data):
    train, held_out, few = ((data / f"{name}.jsonl").read_text().splitlines()
                            for name in ("train", "held-out", "few"))
    assert (len(train), len(held_out)) == (4, 4) and not {*train} & {*held_out}
    assert few == held_out[:2]
    plain = (data / "plain.jsonl").read_text().splitlines()
    assert [json.loads(one)["text"].split("\n") for one in plain] == [
        [each["question"], *each["answer"].split("\n")] for each in map(json.loads, train)]


def test_a_row_for_the_base_and_none_is_measured_twice(data, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    command = ["zoo", str(TINY), str(data), "--runs", str(tmp_path / "runs"), "--text",
               str(tmp_path / "text.txt"), "--out", str(tmp_path / "zoo.json")]
    real.main(command)
    row = json.loads((tmp_path / "zoo.json").read_text())["rows"]["base"]
    assert set(row) == {"loss", "format", "right"} and row["right"] == 0
    assert set(row["loss"]) == {"held_out", "general", "text"}
    assert row["loss"]["general"] < row["loss"]["text"]  # its own answers, greedily
    monkeypatch.setattr(real.Work, "score", None)  # would fail
    real.main(command)
    assert "| base |" in capsys.readouterr().out


def test_only_a_line_of_its_own_counts(monkeypatch):
    work = object.__new__(real.Work)
    work.records = [{"question": "", "answer": "…\n#### 1,234"}] * 5
    given = ["so\n#### 1234", "so\n#### 1,234.", "it is 1234", "so\n#### 12", "the #### 1234 is"]
    monkeypatch.setattr(real.Work, "answers", lambda *_: given)
    assert work.score(None) == {"format": 0.6, "right": 0.4}


def test_pace_times_the_last_steps_of_each_method(data, tmp_path, monkeypatch):
    monkeypatch.setattr(load("chapter-02/lora.py"), "METHODS", {"full": None, "delta-lora": None})
    real.main(["pace", str(TINY), str(data), "--out", str(tmp_path / "pace.json")])
    rows = json.loads((tmp_path / "pace.json").read_text())["rows"]
    assert [*rows] == ["full", "delta-lora"]
    for row in rows.values():
        assert len(row["steps"]) == 6
        assert row["tokens_per_second"] == statistics.median(row["steps"][2:])


def test_the_loss_is_the_mean_over_labelled_tokens():
    model, generator = real.model_of(TINY), torch.Generator().manual_seed(0)
    documents = []
    for length in (600, 500, 30):  # two packs
        ids = torch.randint(0, 400, (length,), generator=generator)
        documents.append((ids, ids.masked_fill(torch.arange(length) < length // 3, -100)))
    total = count = 0
    for ids, labels in documents:
        logits = model(ids, torch.tensor([0, len(ids)], dtype=torch.int32), len(ids),
                       torch.arange(len(ids))).double()
        wanted = labels[1:] >= 0
        chances = logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        total, count = total - chances[wanted].sum().item(), count + int(wanted.sum())
    assert real.loss(model, documents) == pytest.approx(total / count, rel=1e-5)
