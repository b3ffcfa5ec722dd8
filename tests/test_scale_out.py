"""One process, two ranks and three ranks (gloo) do the same work: losses, norms, weights, order."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from helpers import ROOT
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Documents with very different shares of labelled tokens: 1 of 60, or 60 of 61."""
    file = tmp_path_factory.mktemp("data") / "data.jsonl"
    with open(file, "w") as out:
        for i in range(40):
            long, short = "ab " * (15 + i % 7), "cd"
            prompt, completion = (long, short) if i % 2 else (short, long)
            out.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
    return file


def start(ranks, script, *arguments, cwd):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-addr",
                "127.0.0.1", "--master-port", str(port)] if ranks > 1 else []
    process = subprocess.run(
        [sys.executable, *launcher, str(ROOT / script), *arguments], cwd=cwd, text=True,
        capture_output=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "BARELOOP_TIMEOUT_SECONDS": "120"})
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    return process.stdout


def arguments(data, *more):
    return ["--model", "tiny", "--data", str(data), "--device", "cpu", "--dtype", "float32",
            "--batch-tokens", "160", "--lr", "1e-3", "--warmup", "0", "--steps", "4",
            "--save-every", "2", "--keep", "9", "--eval-every", "4", *more]


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("script, more", [
    ("chapter-01/train.py", ("--init", "pretrained")),
    ("chapter-02/train.py", ("--method", "lora", "--rank", "4")),
])
def test_incidents_3_4_14_17_ranks_equal_one_process(tmp_path, data, script, more):
    """6 packs a step as 1 x 6, 2 x 3 and 3 x 2; then 3 ranks go on where 1 process stopped."""
    for ranks in (1, 2, 3):
        start(ranks, script, *arguments(data, *more, "--grad-accum", str(6 // ranks),
                                        "--out", f"ranks{ranks}"), cwd=tmp_path)
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
    printed = start(3, script, "--resume", "ranks1", "--grad-accum", "2", cwd=tmp_path)
    assert "after step 2" in printed and "ranks 1 -> 3" in printed
    resumed, undisturbed = (load_file(tmp_path / run / "final" / weights)
                            for run in ("ranks1", "ranks3"))
    for name in undisturbed:
        torch.testing.assert_close(resumed[name], undisturbed[name], rtol=1e-4, atol=1e-5)


def test_another_number_of_packs_a_step_is_refused(tmp_path, data):
    start(1, "chapter-01/train.py", *arguments(data, "--out", "run"), cwd=tmp_path)
    with pytest.raises(AssertionError, match="packs per step"):
        start(2, "chapter-01/train.py", "--resume", "run", cwd=tmp_path)
