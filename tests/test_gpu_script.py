"""The script for a GPU runs on a CPU at tiny sizes, so it is not dead code."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers import load


def test_the_gpu_script_runs_on_a_cpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["gpu.py"])
    out = tmp_path / "gpu.json"
    code = load("tests/bench/gpu.py").main([
        "--device", "cpu", "--size", "tiny", "--backend", "eager", "--steps", "2",
        "--out", str(out)])
    printed = capsys.readouterr().out
    found = json.loads(out.read_text())
    wrong = [check for check in found["checks"] if not check["good"]]
    assert code == 0 and not wrong, wrong
    assert len(found["checks"]) > 20
    # What a GPU is needed for is "not measured"; what a CPU can tell is told.
    verdicts = {what: verdict for what, _, _, verdict in found["rows"]}
    assert verdicts["QLoRA step / LoRA step"] == "not measured"
    assert verdicts["graph breaks, recompilations over 50 packs"] == "met"
    for what in verdicts:
        assert what in printed


def test_the_reports_that_follow_take_these_arguments(monkeypatch):
    """A GPU's minutes are dear: a misspelt option would be found only there."""
    monkeypatch.setattr("sys.argv", ["gpu.py"])
    options = SimpleNamespace(device=torch.device("cpu"))
    commands = list(load("tests/bench/gpu.py").reports(options))
    assert len(commands) == 4
    for script, arguments in commands:
        module = load(script)
        kind = module.LadderOptions if "ladder" in script else module.Options
        kind(**module.cli.read_flags(kind, "", arguments))


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        load("tests/bench/gpu.py").main([])
    assert end.value.code == 2 and "--device cpu --size tiny" in capsys.readouterr().err


def test_a_wrong_gradient_is_seen(monkeypatch):
    """The checks compare with documents alone: a pack whose documents see one another fails."""
    checks = load("tests/bench/gpu_checks.py")
    real = checks.modeling.varlen_attention

    def one_document(q, k, v, cu_seqlens, max_seqlen):
        return real(q, k, v, torch.tensor([0, len(q)], dtype=torch.int32), len(q))

    monkeypatch.setattr(checks.modeling, "varlen_attention", one_document)
    (_, error, limit), *_ = checks.models(torch.device("cpu"), torch.float32)
    # Alone, documents are packs of one, which this leaves right.
    assert error > 10 * limit
