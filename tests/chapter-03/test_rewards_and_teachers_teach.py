"""The lessons of post_training/README.md are true: what a reward teaches and what it cannot, and
what a teacher guards."""

import pytest
from helpers import run_script
from rollout_runs import bytes_of, lines, weights_of, write

from common.tiny import skills

pytestmark = pytest.mark.slow
TINY = "--model", "tiny", "--device", "cpu"


def run(script, folder, *more):
    done = run_script(f"chapter-03/post_training/train_{script}.py", *TINY, *more, "--out",
                      folder / "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def scores(folder, name):
    """Exact match before and after, in points."""
    key = f"exact_match_{name}"
    return [round(100 * line[key]) for line in lines(folder, key)]


def test_a_reward_teaches_what_happens_sometimes(tmp_path):
    """To add, as the defaults of train_grpo.py have it; no other skill is lost."""
    folder = run("grpo", tmp_path, "--data", "tiny")
    before, after = scores(folder, "add")
    base, kept = scores(folder, "base")
    assert after >= before + 15 and kept >= base - 3
    steps = lines(folder)
    assert len(steps) == 80
    first, last = (sum(line["reward"] for line in some) / 10 for some in (steps[:10], steps[-10:]))
    assert last > first + 0.15
    entropies = [sum(line["entropy"] for line in some) for some in (steps[:10], steps[-10:])]
    assert entropies[1] < entropies[0]  # it has become surer
    assert max(line["sampler_gap"] for line in steps) <= 1e-4
    greedy = [line["eval_reward"] for line in lines(folder, "eval_reward")]
    assert greedy[-1] > greedy[0] + 0.15


def test_a_reward_cannot_teach_what_never_happens(tmp_path):
    """Skills that the model has never seen: no answer is right, so that nothing moves."""
    data = write(tmp_path / "new.jsonl", *({
        "prompt": one["messages"][0]["content"], "completion": one["messages"][1]["content"]}
        for one in skills.records("new", "train", 200, 0)))
    folder = run("grpo", tmp_path, "--data", data, "--steps", 3, "--save-every", 1, "--keep", 9,
                 "--eval-every", 0)
    for line in lines(folder):
        assert (line["reward"], line["grad_norm"], line["loss"]) == (0, 0, 0)
        assert (line["degenerate"], line["all_wrong"]) == (1, 1)
    assert bytes_of(folder, 1)[0] == bytes_of(folder, 3)[0]
    tensors = weights_of(folder).items()
    assert all(tensor.count_nonzero() == 0 for name, tensor in tensors if "lora_B" in name)


@pytest.mark.parametrize("share, steps", [("0.3", 200), ("0", 100)])
def test_a_teacher_guards_the_old_skills(tmp_path, share, steps):
    """New ones are learned either way."""
    folder = run("distill", tmp_path, "--data", "tiny", "--on-policy", share, "--steps", steps)
    (_, new), (base, kept) = scores(folder, "new"), scores(folder, "base")
    assert new >= 60 and base >= 90
    assert kept >= 80 if share == "0.3" else kept < 50
