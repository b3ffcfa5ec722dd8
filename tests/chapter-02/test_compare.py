"""compare.py: every method at its own best rate, none of them at the end of what was tried."""

import json
import math

import pytest

from helpers import load
from common.errors import UserError

compare = load("chapter-02/compare.py")
BEST = {"lora": 5e-3, "full": 9e-2, "vera": 3e-4}  # the usual rate, one far above, one far below


@pytest.fixture
def runs(monkeypatch):
    """Runs that take no time: [(method, rate, seed)], with a loss that is least at BEST."""
    done = []

    def run_one(folder, method, rate, seed, extra):
        if (folder / "final").is_dir():
            return
        (folder / "final").mkdir(parents=True)
        done.append((method, rate, seed))
        loss = abs(math.log(rate / BEST[method])) + 0.1 * seed
        (folder / "loss").write_text(json.dumps(loss))

    monkeypatch.setattr(compare, "run_one", run_one)
    monkeypatch.setattr(compare, "read_run", lambda folder: {
        "loss": json.loads((folder / "loss").read_text()), "curve": [(1, 2.0)], "trainable": 1234,
        "memory": 2**20, "speed": 99.0})
    return done


def test_the_best_rate_is_never_the_last_that_was_tried(runs, tmp_path, capsys):
    compare.main(["--methods", *BEST, "--seeds", "2", "--out", str(tmp_path / "out")])
    rows = json.loads((tmp_path / "out/results.json").read_text())
    tried = {row["method"]: sorted(map(float, row["loss_by_rate"])) for row in rows}
    assert tried["lora"] == [1.7e-3, 5e-3, 1.5e-2]
    assert tried["full"] == [3.3e-4, 1e-3, 3e-3, 9e-3, 2.7e-2, 8.1e-2, 0.24]
    assert tried["vera"] == [1.2e-4, 3.7e-4, 1.1e-3, 3.3e-3, 1e-2, 3e-2, 9e-2]
    for row in rows:
        lowest, *_, highest = tried[row["method"]]
        assert lowest < row["rate"] < highest
        assert row["loss"] == pytest.approx(min(row["loss_by_rate"].values()))
        assert row["loss_spread"] == pytest.approx(0.05)
    assert len(runs) == 2 * sum(map(len, tried.values())) == len(set(runs))
    out = capsys.readouterr().out
    assert "| lora | 0.005 | 1,234 | 1.0 MiB | 99 | 0.050 ± 0.050 |" in out
    assert "skills" not in out  # nothing was scored


def test_what_is_finished_is_not_run_again(runs, tmp_path):
    arguments = ["--methods", "lora", "--seeds", "1", "--out", str(tmp_path / "out")]
    compare.main(arguments)
    compare.main(arguments)
    assert len(runs) == 3
    compare.main([*arguments[:-3], "2", *arguments[-2:]])
    assert len(runs) == 6
    with pytest.raises(UserError, match="a comparison with other options after `--`"):
        compare.main([*arguments, "--", "--steps", "4"])


def test_one_rate_is_taken_as_it_is(runs, tmp_path):
    compare.main(["--methods", "full", "--seeds", "1", "--factors", "1", "--out",
                  str(tmp_path / "out")])
    assert runs == [("full", 1e-3, 0)]


def test_the_rates_are_multiples_of_those_of_train_py(runs, tmp_path, monkeypatch):
    config = {**compare.read_config(compare.hub.resolve("tiny")), "hidden_size": 1024}
    monkeypatch.setattr(compare, "read_config", lambda folder: config)
    compare.main(["--methods", "lora", "--seeds", "1", "--factors", "1", "--out",
                  str(tmp_path / "a"), "--", "--model", str(compare.hub.resolve("tiny")), "--data",
                  "my.jsonl"])
    assert runs == [("lora", 8e-4, 0)]  # 2e-4 at a width of 4096
    with pytest.raises(UserError, match=r"--stepps is not an option \(did you mean --steps"):
        compare.main(["--out", str(tmp_path / "b"), "--", "--stepps", "4"])
    for words in (["--dry-run"], ["--resume", "begun"], ["--resume=begun"]):
        with pytest.raises(UserError, match="after `--`: compare.py needs whole runs"):
            compare.main(["--out", str(tmp_path / "b"), "--", *words])
    assert not (tmp_path / "b").exists()  # the right options would be refused there


def test_a_run_gets_the_rate_of_the_sweep_last(tmp_path, monkeypatch):
    """argparse takes the last of two: an --lr after the `--` must not win."""
    seen = []

    class Done:
        returncode = 0

    monkeypatch.setattr(compare.subprocess, "run", lambda words, **_: seen.append(words) or Done)
    compare.run_one(tmp_path / "run", "lora", 0.02, 3, ["--lr", "1", "--seed", "0"])
    words = [str(word) for word in seen[0]]
    assert words.index("--lr", words.index("--lr") + 1) > words.index("--seed")
    assert words[-4:] == ["--lr", "0.02", "--seed", "3"]
