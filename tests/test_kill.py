"""A short part of `tests/long/kill.py`: runs that are killed equal undisturbed ones afterwards."""

import os
import random
import shutil
import sys

import pytest
import torch
from faults import forked
from helpers import ROOT

sys.path.append(str(ROOT / "tests" / "long"))
import kill
import small_runs
import soak

from common.files.checkpoint import seal

DROPOUT = ("--dropout", "0.2", "--rank", "2")
SCORED = ("--data", "tiny", "--eval-every", "6")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("chapter, more, moments, changes", [
    ("01", (), 2, 4), ("01", SCORED, 0, 1), ("02", DROPOUT, 1, 1), *(
        pytest.param(*case, marks=pytest.mark.slow) for case in (
            ("01", (), 8, 16), ("01", SCORED, 0, 6), ("02", DROPOUT, 3, 6)))])
def test_incident_18_a_killed_run_becomes_what_it_would_have_been(
        tmp_path, chapter, more, moments, changes):
    """At random moments, and at some of the calls that change the disk; dropout, scores too."""
    sweep = kill.Sweep(tmp_path, chapter, more)
    afters = kill.random_moments(sweep, moments, seed=1)
    afters += kill.every_change(sweep, lambda calls: random.Random(2).sample(
        range(len(calls)), changes))
    assert afters.total() == moments + changes


@pytest.mark.parametrize("chapter", ["01", pytest.param("02", marks=pytest.mark.slow), "03"])
def test_a_run_killed_after_its_last_checkpoint_logs_what_it_would_have(tmp_path, chapter):
    """Its last line has the evaluation's loss and the scores, its first one those before."""
    sweep = kill.Sweep(tmp_path, chapter, SCORED)
    calls = small_runs.changes_of_the_disk([*sweep.options, "--out", sweep.run], chapter)
    first = calls.index("write", calls.index("replace"))  # behind train_config.json
    for at, after in ((len(calls) - 1, small_runs.STEPS), (first, 0))[:2 if chapter == "01" else 1]:
        sweep.fresh()
        sweep.begin(fault=kill.end_process, at=at)
        assert sweep.finish(f"call {at}") == after


def test_a_run_is_resumed_from_another_folder(tmp_path, monkeypatch):
    """Its files were named from where it began; also when they are named anew on the resume."""
    options = [str(word).replace(f"{tmp_path}/", "") for word in small_runs.write_inputs(tmp_path)]
    held_out = ["--eval-data", "data.jsonl"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    code, text = small_runs.start([*options, *held_out, "--out", "run"])
    assert code == 0 and f"on {tmp_path}/data.jsonl, float32 on cpu:\n6 steps" in text, text
    for place, again in ((tmp_path / "elsewhere", []), (tmp_path, [*options[:2], *held_out])):
        shutil.move(tmp_path / "run/final", place / "before")
        monkeypatch.chdir(place)
        code, text = small_runs.start(["--resume", os.path.relpath(tmp_path / "run"), *again])
        assert code == 0 and "changed since" not in text, text
        assert small_runs.files(tmp_path / "run/final") == small_runs.files(place / "before")


def test_the_comparison_sees_one_bit(tmp_path):
    """What the tests above rely on: a run that differs in a moment, or in a logged loss, fails."""
    sweep = kill.Sweep(tmp_path)
    sweep.begin()
    small_runs.assert_equal(sweep.run, sweep.undisturbed)
    path = sweep.run / "metrics.jsonl"
    text = path.read_text()
    path.write_text(text.replace('"loss": ', '"loss": 1', 1))
    with pytest.raises(AssertionError):
        small_runs.assert_equal(sweep.run, sweep.undisturbed)
    path.write_text(text)
    state = sweep.run / f"step-{small_runs.STEPS:06d}"
    data = bytearray((state / "optimizer.safetensors").read_bytes())
    data[-1] ^= 1
    (state / "optimizer.safetensors").write_bytes(data)
    seal(state)
    with pytest.raises(AssertionError, match="optimizer.safetensors differs"):
        small_runs.assert_equal(sweep.run, sweep.undisturbed)


def test_a_short_soak_leaves_nothing_behind(tmp_path):
    """`tests/long/soak.py` for 24 steps in 12 starts, one of them ended as by a kill."""
    code, text = forked(lambda: soak_briefly(tmp_path))
    assert code == 0, text


def soak_briefly(folder):
    torch.set_num_threads(1)
    measured = soak.soak(folder, 24, every=2, model=())
    before, last = measured[3], measured[11]  # at the same pack of the list
    assert last["left"] == before["left"] and last["live"] == before["live"] > 0
    assert last["files"] <= before["files"] and last["threads"] <= before["threads"]
