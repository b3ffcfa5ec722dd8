"""tests/bench/summary.py: what peers.py measured becomes the table of the READMEs; and its losses."""

import json
import math
from types import SimpleNamespace

import pytest
from helpers import load

summary = load("tests/bench/summary.py")


def run_of(tmp_path, name, rate, machine="a CPU"):
    """A file as peers.py writes it: one row of ours, one of a peer."""
    ours = {"tokens_per_second": rate, "live_bytes": 5e8, "spread": 0.043, "over": {
        "PEFT, packed": {"tokens_per_second": 2.7361, "live_bytes": 0.4441}}}
    path = tmp_path / name
    path.write_text(json.dumps({
        "machine": machine, "versions": {"torch": "2.13.0"}, "date": "2026-11-21 17:00",
        "command": f"python tests/bench/peers.py --kind lora --out {name}",
        "figures": {"lora": {"chapter 3, compiled": ours, "full, chapter 2, eager": ours,
                             "PEFT, packed": {"tokens_per_second": 480}}}}))
    return str(path)


def test_runs_become_one_row_with_a_value_for_each(tmp_path):
    out = tmp_path / "results.json"
    files = [run_of(tmp_path, "a.json", 1349.4), run_of(tmp_path, "b.json", 1304.2)]
    assert summary.main([*files, "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["rows"] == [{
        "row": "LoRA, chapter 3, compiled", "peer": "PEFT, packed",
        "tokens_per_second": [1349, 1304], "speed": [2.736] * 2, "memory": [0.444] * 2,
        "live_MB": [500] * 2, "spread": [4] * 2}]
    assert found["runs"] == ["2026-11-21 17:00  python tests/bench/peers.py --kind lora"] * 2


def test_runs_of_two_machines_do_not_share_a_table(tmp_path):
    files = [run_of(tmp_path, "a.json", 1), run_of(tmp_path, "b.json", 1, "another CPU")]
    with pytest.raises(SystemExit):
        summary.main([*files, "--out", str(tmp_path / "results.json")])
    assert not (tmp_path / "results.json").exists()


def test_runs_on_a_gpu_become_rows_too(tmp_path):
    """Each run has other parts. Of a peer that had less room, memory is not compared."""
    one = {"tokens": 16384, "tokens_per_second": 80_000, "mfu": [0.3621, 0.4218],
           "peak_bytes": 30e9, "predicted_bytes": 29.8e9, "losses": [1.0]}
    peer = {"tokens": 16384, "tokens_per_second": 40_000, "peak_bytes": 60e9}
    profile = {"seconds": 0.17766, "explained": 0.8921, "predicted": {"loss": [0.001, 0.002]},
               "measured": {"loss": 0.003}}
    runs = [{"dense": one, "transformers, a batch of equal documents (sdpa)": peer,
             "transformers, packed (sdpa)": peer | {"tokens": 8192},
             "PEFT, packed (sdpa)": peer, "profile-lora": {"text": "out of time", "files": {}}},
            {"qlora": one | {"mfu": None}, "profile": {"files": {"profile.json": profile}},
             "shapes": {"graph_breaks": 0}}]
    paths = [tmp_path / f"{number}.json" for number in range(2)]
    for path, figures in zip(paths, runs):
        path.write_text(json.dumps({"machine": "a GPU", "versions": {}, "date": "today",
                                    "command": "gpu.py", "figures": figures}))
    out = tmp_path / "gpu.json"
    assert summary.main(["--gpu", *map(str, paths), "--out", str(out)]) == 0
    dense, qlora, times, *rest = json.loads(out.read_text())["rows"]
    beside = {"peer": "transformers", "tokens_per_second": 40_000, "speed": 2.0}
    figures = {"tokens_per_second": 80_000, "peak_bytes": 30e9, "predicted_bytes": 29.8e9}
    assert dense == {"row": "dense, chapter 3, compiled", "mfu": [0.3621, 0.4218], **figures,
                     "a batch of equal documents (sdpa)": {**beside, "tokens": 16384, "memory": 0.5},
                     "packed (sdpa)": {**beside, "tokens": 8192}}
    assert qlora == {"row": "QLoRA, chapter 3, compiled", "mfu": [], **figures}
    assert times == {"row": "profile", "seconds": 0.1777, "explained": 0.892, "loss": [1, 2, 3]}
    assert {"row": "shapes", "graph_breaks": 0} in rest


def test_nan_is_never_the_same_loss():
    """A NaN differs from everything, yet no comparison with it is true: `max` would drop it."""
    peers = load("tests/bench/peers.py")

    def row(ours, *losses):
        return SimpleNamespace(name=str(ours), ours=ours, same=True, losses=[*losses])

    assert peers.compare_losses([row(True, 2.0, 1.0), row(False, 2.0, 1.0)]) == 0
    for losses in ((2.0, math.nan), (math.nan, 1.0)):
        assert peers.compare_losses([row(True, *losses), row(False, 2.0, 1.0)]) == math.inf
    assert peers.compare_losses([row(True, 2.0, 1.0)]) is None
