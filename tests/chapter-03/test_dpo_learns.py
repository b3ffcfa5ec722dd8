"""The lesson of post_training/README.md is true: what plain DPO wins, what it loses, what helps."""

import json

import pytest
from helpers import run_script

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("nll, gains", [("0", range(-100, 0)), ("1", range(12, 101))])
def test_plain_dpo_wins_pairs_and_unlearns_the_task_and_nll_helps(nll, gains, tmp_path):
    done = run_script("chapter-03/post_training/train_dpo.py", "--model", "tiny", "--data", "tiny",
                      "--device", "cpu", "--eval-every", "40", "--nll", nll, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    file = tmp_path / "runs/chapter-03-dpo/001/metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    steps = [line for line in lines if "grad_norm" in line]
    held_out = [line for line in lines if "pair_accuracy" in line and "grad_norm" not in line]
    before, after = (line["exact_match_add"] for line in lines if "exact_match_add" in line)
    assert round(100 * (after - before)) in gains
    assert sum(line["pair_accuracy"] for line in steps[-10:]) / 10 > 0.85
    assert held_out[0]["pair_accuracy"] == 0.5 and held_out[-1]["pair_accuracy"] > 0.75
    assert (held_out[-1]["logp_chosen"] > held_out[0]["logp_chosen"]) == (nll == "1")
    assert ("a larger --nll holds them up" in done.stdout) == (nll == "0")
