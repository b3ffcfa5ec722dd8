"""metrics.jsonl, the lines on the screen, TensorBoard, and what a resume makes of them."""

import json
import os
import sys
import types

import pytest
from faults import Faults, disk_full, end_process, forked

from common import metrics
from common.errors import UserError
from common.memory import readable_bytes
from common.metrics import FIELDS, Metrics


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def log(report, *steps):
    for step in steps:
        report.log_step(step, 2.5 / step, 1e-3, 0.5, 1000, 0.5, 3 * 2**30, 0.41)


def test_fields_are_exactly_those(tmp_path):
    report = Metrics(tmp_path, 10)
    report.log_step(1, 2.0, 1e-3, 0.5, 1000, 0.25, 7)
    report.log_step(2, float("nan"), 1e-3, float("inf"), 1000, 0.0)
    report.log_eval(2, eval_loss=1.5, exact_match=0.25)
    report.close()
    report.close()
    first, second, evaluation = lines(tmp_path)
    assert tuple(first) == FIELDS == tuple(second) == (
        "step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "step_seconds",
        "peak_memory_bytes", "mfu")
    assert first["tokens_per_second"] == 4000 and first["mfu"] is None and first["loss"] == 2.0
    assert type(first["step"]) is int and type(first["tokens"]) is int
    assert second["loss"] is second["grad_norm"] is second["tokens_per_second"] is None
    assert evaluation == {"step": 2, "eval_loss": 1.5, "exact_match": 0.25}


def test_a_step_may_have_more_numbers(tmp_path):
    report = Metrics(tmp_path, 10)
    report.log_step(1, 2.0, 1e-3, 0.5, 1000, 0.25, norm_of_layer_3=0.125)
    report.close()
    line, = lines(tmp_path)
    assert tuple(line) == (*FIELDS, "norm_of_layer_3") and line["norm_of_layer_3"] == 0.125


def test_every_line_is_there_at_once(tmp_path):
    report = Metrics(tmp_path, 10)
    log(report, 1, 2)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]  # not closed, not flushed by us
    report.sync()
    report.close()


def test_the_screen_has_aligned_lines_and_the_columns_once(tmp_path, capsys, monkeypatch):
    clock = iter(range(0, 1000, 2))  # two seconds a step, evaluation and saving included
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: float(next(clock)))
    report = Metrics(tmp_path, 1000, log_every=10)
    log(report, *range(1, 31))
    report.log_eval(30, eval_loss=1.25, exact_match=0.5, unknown=None)
    report.log_step(1000, 1.0, 0.0, 0.1, 5, 1.0)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == "step loss lr grad norm tokens/s memory MFU time left".split()
    assert [line.split()[0] for line in printed[1:]] == [
        "1/1000", "10/1000", "20/1000", "30/1000", "30/1000", "1000/1000"]
    steps = printed[0:5] + printed[6:]
    assert len({len(line) for line in steps}) == 1
    assert printed[2].split() == [
        "10/1000", "0.2500", "1.00e-03", "0.500", "2,000", "3.0", "GiB", "41.0%", "33:00"]
    assert printed[5].split("  ")[-1] == "eval_loss 1.2500, exact_match 0.5000"
    assert printed[6].split()[-3:] == ["-", "-", "00:00"]


def test_quiet_ranks_write_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    report = Metrics(tmp_path, 10, tensorboard=True)
    log(report, 1, 2)
    report.log_eval(2, eval_loss=1.0)
    report.sync()
    report.close()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


# --- resume ---

def test_a_resume_leaves_no_gap_and_no_repeat(tmp_path, capsys):
    report = Metrics(tmp_path, 10)
    for step in range(1, 8):
        log(report, step)
        if step % 2 == 0:
            report.log_eval(step, eval_loss=1.0)
    report.close()
    report = Metrics(tmp_path, 10, start_step=4)
    log(report, *range(5, 11))
    report.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 2, 3, 4, 4, 5, 6, 7, 8, 9, 10]
    assert capsys.readouterr().err == ""
    Metrics(tmp_path, 10, start_step=0).close()
    assert lines(tmp_path) == []


def test_the_evaluation_after_the_last_checkpoint_is_not_written_twice(tmp_path):
    """Killed after the last line and before final/: the next start only evaluates and saves."""
    for start_step in (0, 3, 3):
        report = Metrics(tmp_path, 3, start_step=start_step)
        log(report, *range(start_step + 1, 4))
        if start_step == 0:
            report.log_eval(3, eval_loss=1.5)
        report.log_eval(3, eval_loss=1.5, exact_match=0.5)
        report.close()
    assert [sorted(line)[0] for line in lines(tmp_path)] == [
        "grad_norm", "grad_norm", "grad_norm", "eval_loss", "eval_loss"]
    assert ["exact_match" in line for line in lines(tmp_path)] == [False] * 4 + [True]


@pytest.mark.parametrize("torn", [
    b'{"step": 3, "lo', b'{"step": 3}', b"\xff\xfe\n", b"\0" * 4096, b"[1]\n", b"3\n", b"\n",
    b'{"step": "3"}\n', b"[" * 100_000 + b"\n", b'{"loss": 1.0}\n'])
def test_a_torn_line_is_dropped_and_said(tmp_path, capsys, torn):
    report = Metrics(tmp_path, 10)
    log(report, 1, 2)
    report.close()
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(torn)
    report = Metrics(tmp_path, 10, start_step=3)
    log(report, 4)
    report.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 4]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "metrics.jsonl:3: not a whole line" in said


def test_cutting_is_atomic(tmp_path):
    """Killed at any call in it, metrics.jsonl is as before or as after."""
    report = Metrics(tmp_path, 10)
    log(report, 1, 2, 3, 4)
    report.close()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with Faults() as counted:
        Metrics(tmp_path, 10, start_step=2).close()
    after = (tmp_path / "metrics.jsonl").read_bytes()
    assert len(lines(tmp_path)) == 2 and "replace" in counted.calls and "fsync" in counted.calls
    for at in range(len(counted.calls)):
        (tmp_path / "metrics.jsonl").write_bytes(before)

        def action():
            with Faults(at, end_process):
                Metrics(tmp_path, 10, start_step=2).close()

        forked(action)
        assert (tmp_path / "metrics.jsonl").read_bytes() in (before, after), counted.calls[at]


def test_a_full_disk_is_one_clear_line(tmp_path):
    with Faults() as counted:
        Metrics(tmp_path, 10).close()
    (tmp_path / "metrics.jsonl").unlink()
    with Faults(len(counted.calls), disk_full):
        report = Metrics(tmp_path, 10)
        with pytest.raises(UserError, match="metrics.jsonl: cannot be written: No space"):
            log(report, 1)
    with pytest.raises(UserError, match="metrics.jsonl: cannot be written"):
        Metrics(tmp_path / "nowhere", 10)


# --- TensorBoard ---

def test_tensorboard_asked_for_and_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(UserError, match="pip install tensorboard"):
        Metrics(tmp_path, 10, tensorboard=True)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_every_number(tmp_path, monkeypatch):
    calls = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            calls.append((os.path.basename(folder), purge_step))

        def add_scalar(self, name, value, step):
            calls.append((name, value, step))

        def close(self):
            calls.append("closed")

    module = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    report = Metrics(tmp_path, 10, tensorboard=True, start_step=4)
    report.log_step(5, 2.0, 1e-3, 0.5, 1000, 0.5)
    report.log_eval(5, eval_loss=1.5)
    report.close()
    assert calls[0] == ("tensorboard", 5) and calls[-1] == "closed"
    assert ("train/loss", 2.0, 5) in calls and ("eval/eval_loss", 1.5, 5) in calls
    assert len(calls) == 2 + 6 + 1  # memory and MFU are not known, step is no number to draw


# --- words for numbers ---

def test_readable():
    assert [readable_bytes(n) for n in (0, 1023, 1536, 3 * 2**30, 2**50)] == [
        "0 bytes", "1023 bytes", "1.5 KiB", "3.0 GiB", "1024.0 TiB"]
