"""One process, two ranks and three ranks (gloo) do the same work: losses, norms, weights, order."""

import json

import pytest
import small_runs
import torch
from faults import Forked
from helpers import load, ranks_of
from safetensors.torch import load_file

from common.weights import save_weights


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Of a run on documents with very different shares of labelled tokens: 1 of 60, or 60 of 61;
    and of a small model with weights."""
    folder = tmp_path_factory.mktemp("scale-out")
    options = small_runs.write_inputs(folder)
    rows = []
    for i in range(40):
        texts = "ab " * (12 + i % 7), "cd"
        rows.append(dict(zip(("prompt", "completion"), texts if i % 2 else texts[::-1])))
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [*options, "--warmup", "0", "--steps", "4", "--save-every", "2",
            "--keep", "9", "--eval-every", "4"]


def start(ranks, chapter, *arguments):
    """Train as so many ranks; gives what they printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BARELOOP_TIMEOUT_SECONDS", "120")
        processes = ranks_of(ranks, lambda: Forked(lambda: small_runs.train(arguments, chapter)))
    ended = [process.finish() for process in processes]
    printed = "".join(text for _, text in ended)
    assert not any(code for code, _ in ended), printed[-6000:]
    return printed


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("chapter, more", [
    ("01", ()), pytest.param("02", ("--method", "lora", "--rank", "4"), marks=pytest.mark.slow)])
def test_incidents_3_4_14_17_ranks_equal_one_process(tmp_path, options, chapter, more):
    """6 packs a step as 1 x 6, 2 x 3 and 3 x 2; then 3 ranks go on where 1 process stopped."""
    for ranks in (1, 2, 3):
        start(ranks, chapter, *options, *more, "--grad-accum", 6 // ranks, "--out",
              tmp_path / f"ranks{ranks}")
    one = tmp_path / "ranks1"
    weights = next((one / "final").glob("*model.safetensors")).name
    for ranks in (2, 3):
        other = tmp_path / f"ranks{ranks}"
        assert len(lines(one)) == len(lines(other)) > 4
        for a, b in zip(lines(one), lines(other)):
            assert a["step"] == b["step"] and a.get("tokens") == b.get("tokens")
            for name in ("loss", "grad_norm", "eval_loss"):
                if a.get(name) is not None:
                    assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-7), (ranks, name)
        first, second = (load_file(run / "final" / weights) for run in (one, other))
        for name in first:
            gap = (first[name].float() - second[name].float()).norm()
            assert gap <= 1e-4 * first[name].float().norm(), (ranks, name)

    # Another number of ranks takes over: the same packs a step are no change of the result.
    for folder in ("step-000004", "final"):
        for file in (one / folder).iterdir():
            file.unlink()
        (one / folder).rmdir()
    printed = start(3, chapter, "--resume", one, "--grad-accum", 2)
    assert "after step 2" in printed and "ranks 1 -> 3" in printed
    resumed, undisturbed = (load_file(tmp_path / run / "final" / weights)
                            for run in ("ranks1", "ranks3"))
    for name in undisturbed:
        torch.testing.assert_close(resumed[name], undisturbed[name], rtol=1e-4, atol=1e-5)


def test_another_number_of_packs_a_step_is_refused(tmp_path, options):
    start(1, "01", *options, "--out", tmp_path / "run")
    with pytest.raises(AssertionError, match="packs per step"):
        start(2, "01", "--resume", tmp_path / "run")
