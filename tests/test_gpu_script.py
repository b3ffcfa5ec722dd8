"""The script for a GPU runs on a CPU at tiny sizes, so it is not dead code."""

import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import load, start_script

from common.options import read_flags


TINY = ["--device", "cpu", "--size", "tiny", "--backend", "eager", "--steps", "2"]


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr("sys.argv", ["gpu.py"])
    return load("tests/bench/gpu.py")


@pytest.mark.slow
def test_the_gpu_script_runs_on_a_cpu(tmp_path, capsys, gpu):
    out = tmp_path / "gpu.json"
    code = gpu.main([*TINY, "--out", str(out)])
    printed = capsys.readouterr().out
    found = json.loads(out.read_text())
    wrong = [row for row in found["rows"] if row[-1] in ("WRONG", "FAILED")]
    assert code == 0 and not wrong, wrong
    assert sum(row[-1] == "ok" for row in found["rows"]) > 25
    # What a GPU is needed for is "not measured"; what a CPU can tell is told.
    verdicts = {what: verdict for _, what, _, _, verdict in found["rows"]}
    assert verdicts["QLoRA step / LoRA step"] == "not measured"
    assert verdicts["graph breaks, recompilations over 50 packs"] == "met"
    assert verdicts["compiled loss / eager loss"] == "met"
    for what in verdicts:
        assert what in printed
    for kind in ("dense", "lora", "qlora", "chapter 1"):
        assert found["figures"][kind]["tokens_per_second"] > 0
    assert list(tmp_path.iterdir()) == [out]


def test_a_measurement_that_fails_costs_no_other(tmp_path, monkeypatch, gpu):
    def fails():
        yield "first", "1", "1", "met"
        raise torch.OutOfMemoryError("no memory\nin a long message")

    monkeypatch.setitem(gpu.PARTS, "loss", lambda options, figures: [
        fails(), iter([("second", "2", "2", "met")])])
    out = tmp_path / "gpu.json"
    assert gpu.main([*TINY, "--part", "loss", "attention", "--out", str(out)]) == 1
    found = json.loads(out.read_text())
    assert [row[:2] for row in found["rows"][-3:]] == [
        ["loss", "first"], ["loss", "loss"], ["loss", "second"]]
    assert found["rows"][-2][2:] == ["OutOfMemoryError: no memory", "", "FAILED"]
    assert "in a long message" in found["figures"]["errors"][0]
    assert found["rows"][0][0] == "attention" and found["rows"][0][-1] == "ok"  # in its own order


def test_killed_half_way_it_leaves_the_rows_so_far(tmp_path):
    out = tmp_path / "gpu.json"
    run = start_script("tests/bench/gpu.py", *TINY, "--out", out)
    try:
        deadline = time.monotonic() + 120
        while not out.exists() or len(json.loads(out.read_text())["rows"]) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        run.kill()
        code, text = run.finish()
    assert code == -9, text
    found = json.loads(out.read_text())
    assert len(found["rows"]) >= 3 and found["command"] and found["versions"]["torch"]


@pytest.fixture
def options(tmp_path):
    return SimpleNamespace(device=torch.device("cpu"), size="full", left=lambda: 60,
                           out=str(tmp_path / "gpu.json"))


def test_reports_take_these_arguments(gpu, options):
    """A GPU's minutes are dear: a misspelt option would be found only there."""
    commands = list(gpu.reports(options))
    assert [name for name, *_ in commands] == [
        "profile", "profile-lora", "profile-qlora", "ladder"]
    # What is profiled is what the targets are for, and the naive rung would take the time of all.
    assert all("--compile" in arguments for _, script, arguments in commands[:3])
    assert commands[3][2][2:4] == ["--first", "packing"]
    for _, script, arguments in commands:
        module = load(script)
        kind = module.LadderOptions if "ladder" in script else module.Options
        kind(**read_flags(kind, "", arguments))


def test_runs_take_these_arguments_and_tell_the_last_speed(gpu, options, monkeypatch):
    """At full size they run on a GPU only; here nothing is started, but every word is read."""
    runs = load("tests/bench/gpu_runs.py")

    def start(words, **how):
        _, script, *words = words
        if script.name.startswith("train"):
            train = load(script.relative_to(runs.ROOT))
            kind = train.TrainOptions if "chapter-01" in str(script) else train.Options
            run = Path(kind(**read_flags(kind, "", words)).out or "nowhere")
            if run != Path("nowhere"):
                run.mkdir()
                lines = [{"step": 9, "tokens_per_second": 5, "peak_memory_bytes": 1},
                         {"step": 10, "tokens_per_second": 80_000.4, "peak_memory_bytes": 3e10},
                         {"step": 10, "eval_loss": None}]
                (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return SimpleNamespace(returncode="generate" in script.name, stdout="out", stderr="why")

    monkeypatch.setattr(runs.subprocess, "run", start)
    figures = {}
    rows = [row for measurement in runs.runs(options, figures) for row in measurement]
    assert [row[-1] for row in rows[:18]] == ["ok", "ok", "WRONG"] * 6
    assert figures["runs"]["chapter 2, embedded model: generate.py"] == "outwhy"
    assert rows[-1] == ("Qwen3-0.6B, chapter 3 --compile --method full --quantize none: its tenth "
                        "step", "80,000 tokens/s, peak 30 GB", "none", "measured")


@pytest.mark.slow
def test_reports_leave_few_small_files(tmp_path, monkeypatch, gpu, options):
    """What lies deep or is large does not come back from a GPU."""
    monkeypatch.setattr(gpu, "reports", lambda options: [
        ("profile", "chapter-03/profiling/profile_step.py", [
            "--model", "tiny", "--data", "virtual", "--device", "cpu", "--batch-tokens", "128"]),
        ("ladder", "chapter-03/profiling/ladder.py", [
            "--size", "tiny", "--first", "LoRA", "--steps", "1", "--device", "cpu",
            "--no-compile"])])
    figures, rows = {}, []
    for name in ("profile", "ladder"):
        for measurement in gpu.PARTS[name](options, figures):
            rows += measurement
    assert [row[-1] for row in rows] == ["met", "met"], figures
    assert "explained" in figures["profile"]["text"] and "| QLoRA |" in figures["ladder"]["text"]
    assert figures["profile"]["files"]["profile.json"]["tokens"] > 0
    assert figures["ladder"]["files"]["ladder.json"][-1]["name"] == "QLoRA"
    assert [file.name for file in tmp_path.iterdir()] == ["profile-trace.json.gz"]


@pytest.mark.parametrize("card, goals", [
    ("NVIDIA A100-SXM4-80GB", (40e3, 54e3, 30e3)), ("NVIDIA H200", (104e3, 140e3, 60e3)),
    ("NVIDIA H100 80GB HBM3", (104e3, 140e3, 60e3)),
    *((card, (None, None, None)) for card in (
        "NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB", "NVIDIA A100 80GB PCIe",
        "NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA H200 NVL", "NVIDIA GH200 480GB",
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb", "NVIDIA L4"))])
def test_each_card_has_its_targets(card, goals, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
    options = SimpleNamespace(device=torch.device("cuda"), size="full")
    assert load("tests/bench/gpu_targets.py").goals(options) == goals


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        load("tests/bench/gpu.py").main([])
    assert end.value.code == 2 and "--device cpu --size tiny" in capsys.readouterr().err


def test_a_wrong_gradient_is_seen(monkeypatch):
    """The checks compare with documents alone: a pack whose documents see one another fails."""
    checks = load("tests/bench/gpu_checks.py")
    attention = checks.modeling.Attention
    real = attention.attend

    def one_document(q, k, v, cu_seqlens, max_seqlen, window):
        return real(q, k, v, torch.tensor([0, len(q)], dtype=torch.int32), len(q), window)

    monkeypatch.setattr(attention, "attend", staticmethod(one_document))
    (_, error, limit), *_ = checks.models(torch.device("cpu"), torch.float32)
    # Alone, documents are packs of one, which this leaves right.
    assert error > 10 * limit


def test_a_window_off_by_one_is_seen(monkeypatch):
    """Or one that a kernel left out: a layer of the checks' model has a window."""
    checks = load("tests/bench/gpu_checks.py")
    attention = checks.modeling.Attention
    real, calls = attention.attend, []

    def wider(q, k, v, cu_seqlens, max_seqlen, window):
        calls.append(window)  # of a pack alone, as the reference is: left as it is
        wrong = window is not None and len(cu_seqlens) > 2
        return real(q, k, v, cu_seqlens, max_seqlen, window + 1 if wrong else window)

    monkeypatch.setattr(attention, "attend", staticmethod(wider))
    (_, error, limit), *_ = checks.models(torch.device("cpu"), torch.float32)
    assert error > 10 * limit and set(calls) == {None, 40}


def test_a_nan_in_a_later_pack_is_seen(monkeypatch):
    checks = load("tests/bench/gpu_checks.py")
    distances = iter([0.0] * 5 + [math.nan])  # `max` of these is 0
    monkeypatch.setattr(checks, "distance", lambda a, b: next(distances, 0.0))
    found = {what.split(",")[0]: error for what, error, _ in
             checks.models(torch.device("cpu"), torch.float32)}
    assert found == {"float32 logits": 0.0, "float32 gradients": math.inf}
