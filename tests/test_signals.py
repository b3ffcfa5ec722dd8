"""SIGTERM and Ctrl-C in each phase of a run: what is saved, what is said, the exit code, and that
the run, when it goes on, becomes what it would have been."""

import contextlib
import os
import re
import signal
import subprocess
import sys

import pytest
import small_runs
from faults import forked
from helpers import ROOT, load, ranks_of, start_script

from common import prepare, weights
from common.data import encode
from common.data.chat import Chat
from common.errors import run_main
from common.files import checkpoint, state
from common.files.checkpoint import verify

SIGNALS = [("SIGTERM", 143), ("SIGINT", 130)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(options, the run that was left alone)"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        options = small_runs.write_inputs(tmp_path_factory.mktemp("inputs"))
        run = tmp_path_factory.mktemp("undisturbed") / "run"
        code, text = small_runs.start([*options, "--out", run])
        assert code == 0, text
        yield options, run


def disturbed(arguments, module, name, signals, call=1):
    """Run train.py as a script does, in a fork, sending itself `signals` as it enters function
    `name` of `module` for the `call`-th time; gives (exit code, what it printed)."""
    real, calls = getattr(module, name), [0]

    def send(*given, **options):
        calls[0] += 1
        if calls[0] == call:
            for sent in signals:
                os.kill(os.getpid(), getattr(signal, sent))
        return real(*given, **options)

    def action():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        setattr(module, name, send)
        run_main(lambda: small_runs.train(arguments))

    small_runs.start(["--stepz"])  # imports what is needed, in this process
    return forked(action)


def chapter():
    return load("chapter-01/train.py")


@pytest.mark.parametrize("name, code", SIGNALS)
@pytest.mark.parametrize("phase, where, call, step", [
    ("first step", lambda: (chapter(), "loss_sum"), 1, 1),
    ("a later step", lambda: (chapter(), "learning_rate"), 3, 3),
    ("evaluation", lambda: (chapter(), "evaluate"), 1, 2),
    ("checkpointing", lambda: (state, "save_tensors"), 2, 3),  # of step 2: it stops after the next
    ("last step", lambda: (chapter(), "learning_rate"), 6, 6),
])
def test_it_saves_at_the_next_step_boundary(
        tmp_path, undisturbed, name, code, phase, where, call, step):
    options, whole = undisturbed
    run = tmp_path / "run"
    got, text = disturbed([*options, "--out", run], *where(), [name], call)
    assert got == code, text
    assert f"stopped by {name} after step {step}, which is saved" in text
    assert f"--resume {run}" in text and "Traceback" not in text
    assert checkpoint.latest(run) == checkpoint.step_folder(run, step)
    assert not (run / "final").exists()
    command = re.search(r"python (\S+) --resume (\S+)\n", text)
    assert command[1] == "chapter-01/train.py"
    got, text = small_runs.start(["--resume", command[2]])
    assert got == 0 and f"after step {step}" in text, text
    small_runs.assert_equal(run, whole)


@pytest.mark.parametrize("name, code", SIGNALS)
@pytest.mark.parametrize("phase, where, call", [
    ("data preparation", lambda: (encode, "encode"), 1),
    ("data preparation", lambda: (Chat, "finish"), 5),  # in the midst of the documents
    ("data preparation", lambda: (encode.os, "replace"), 1),  # as they are kept
    ("before the first step", lambda: (prepare, "ask"), 1),
    ("saving final/", lambda: (weights, "save_weights"), 1),
    ("after the last step", lambda: (prepare, "ask"), 2),
])
def test_outside_of_the_steps_it_stops_and_nothing_is_lost(
        tmp_path, undisturbed, monkeypatch, name, code, phase, where, call):
    options, whole = undisturbed
    if phase == "data preparation":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = tmp_path / "run"
    got, text = disturbed([*options, "--out", run], *where(), [name], call)
    assert got == code, text
    assert ("interrupted" if name == "SIGINT" else "stopped by SIGTERM") in text or (
        f"stopped by {name} after step" in text)
    assert "Traceback" not in text
    if phase == "data preparation":
        assert not run.exists() and {path.suffix for path in (tmp_path / "cache").rglob("*.*")} <= {
            ".lock"}
        end = "interrupted" if name == "SIGINT" else f"stopped by {name}"
        assert text.splitlines()[-1] == end and text.count("\n\n") == 1, text
    if "last" in phase or "final" in phase:
        verify(run / "final")
    got, text, after = small_runs.go_on(options, run)
    assert got == 0 and after == (small_runs.STEPS if (run / "final").exists() and (
        "last" in phase or "final" in phase) else 0), text
    small_runs.assert_equal(run, whole)


@pytest.mark.parametrize("where, call, step", [
    (lambda: (chapter(), "learning_rate"), 3, 2),
    (lambda: (state, "save_tensors"), 5, 2),  # in the midst of step 4's checkpoint
])
def test_a_second_ctrl_c_stops_at_once_and_leaves_the_last_whole_checkpoint(
        tmp_path, undisturbed, where, call, step):
    options, whole = undisturbed
    run = tmp_path / "run"
    code, text = disturbed([*options, "--out", run], *where(), ["SIGINT", "SIGINT"], call)
    assert code == 130 and text.count("once more to stop at once") == 1, text
    assert "interrupted" in text and "Traceback" not in text
    assert checkpoint.latest(run) == checkpoint.step_folder(run, step)
    assert not list(run.glob("*.bareloop-tmp"))
    assert small_runs.start(["--resume", run])[0] == 0
    small_runs.assert_equal(run, whole)


# --- from outside ---

def environment(tmp_path):
    return {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache"),
            "NO_COLOR": "1", "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}


def test_a_signal_from_outside_to_a_script(tmp_path, undisturbed):
    """`kill` of a real process as it trains; its own advice, typed in, goes on with the run."""
    options, _ = undisturbed
    process = subprocess.Popen(
        [sys.executable, "chapter-01/train.py", *options, "--steps", "100000", "--save-every", "0",
         "--eval-every", "0", "--log-every", "1", "--out", str(tmp_path / "run")], cwd=ROOT,
        env=environment(tmp_path), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    with contextlib.closing(process.stdout):
        while not re.match(r" *3/100000 ", process.stdout.readline()):
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        text = process.stdout.read()
    assert process.wait(timeout=60) == 143 and "Traceback" not in text, text
    step = int(re.search(r"stopped by SIGTERM after step (\d+), which is saved", text)[1])
    assert checkpoint.latest(tmp_path / "run") == checkpoint.step_folder(tmp_path / "run", step)
    script, folder = re.search(r"python (\S+) --resume (\S+)\n", text).groups()
    code, text = small_runs.start(["--resume", folder, "--steps", str(step + 2),
                                   "--allow-changes"])
    assert code == 0 and f"after step {step}" in text, text


TWO_RANKS = """
import os, signal, sys
from common.errors import run_main
from helpers import load
train = load("chapter-01/train.py")
real, calls = train.learning_rate, []

def learning_rate(*given):
    calls.append(given)
    if os.environ["RANK"] == "1" and len(calls) == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return real(*given)

train.learning_rate = learning_rate
sys.argv[0] = "chapter-01/train.py"
run_main(train.main)
"""


@pytest.mark.parametrize("torchrun", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_under_torchrun_all_ranks_agree_on_the_step_and_one_process_goes_on(
        tmp_path, undisturbed, torchrun):
    """Rank 1 alone gets the signal. One rank with twice the packs takes up the same documents."""
    options, _ = undisturbed
    options = [*options, "--save-every", "0", "--eval-every", "0"]
    (tmp_path / "script.py").write_text(TWO_RANKS)
    run, alone = tmp_path / "run", tmp_path / "alone"
    arguments = [tmp_path / "script.py", *options, "--out", run]
    if torchrun:
        process = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
             "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *arguments], cwd=tmp_path,
            env=environment(tmp_path), timeout=120, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT)
        codes, text = [process.returncode], process.stdout
    else:
        ranks = ranks_of(2, lambda: start_script(*arguments, cwd=tmp_path))
        codes, texts = zip(*[rank.finish() for rank in ranks])
        text = "".join(texts)
    assert all(codes) and text.count("after step 3, which is saved") == 1, text
    assert text.count("Traceback (most recent call last)") <= text.count("torch/distributed/run"), text
    saved = checkpoint.latest(run)
    assert saved == checkpoint.step_folder(run, 3)
    assert verify(saved)["extra"]["world_size"] == 2
    code, text = small_runs.start(["--resume", run])
    assert code == 2 and "packs per step 2 -> 1" in text and "--allow-changes" in text, text
    code, text = small_runs.start(["--resume", run, "--grad-accum", "2"])
    assert code == 0 and "after step 3" in text, text
    code, text = small_runs.start([*options, "--grad-accum", "2", "--out", alone])
    assert code == 0, text
    ours, theirs = small_runs.metrics(run), small_runs.metrics(alone)
    assert [line["tokens"] for line in ours] == [line["tokens"] for line in theirs]
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], 1e-5)
