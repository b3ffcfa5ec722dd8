"""Signals, steps that are not finite, and the advice when memory runs out."""

import os
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
from helpers import ROOT

from common.errors import UserError, out_of_memory
from common.guard import NonFinite, caught_signals, memory_advice


def send(name):
    os.kill(os.getpid(), getattr(signal, name))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_only_sets_a_flag(name):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with caught_signals() as signals:
        assert signals.requested is None
        send(name)
        assert signals.requested == name
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


def test_a_second_ctrl_c_stops_at_once_and_a_second_sigterm_does_not(capfd):
    with caught_signals() as signals:
        send("SIGTERM")
        send("SIGTERM")
        send("SIGINT")
        assert signals.requested == "SIGTERM"  # the first one stays
        with pytest.raises(KeyboardInterrupt):
            send("SIGINT")
    assert capfd.readouterr().err.count("saving at the next step") == 1


def test_handlers_come_back_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), caught_signals():
        1 / 0
    assert signal.getsignal(signal.SIGTERM) is before


def test_torchrun_sends_every_ctrl_c_twice(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with caught_signals() as signals:
        send("SIGINT")
        send("SIGINT")  # the launcher's echo
        assert signals.requested == "SIGINT"
        signals.interrupted -= 2  # two seconds later
        with pytest.raises(KeyboardInterrupt):
            send("SIGINT")


def test_signals_in_the_middle_of_printing(tmp_path):
    """A thousand signals at a process that prints all the time: no reentrant call, no loss."""
    script = """
from common.guard import caught_signals
with caught_signals() as signals:
    print("ready", flush=True)
    lines = 0
    while signals.requested is None or lines < 20000:
        print("x" * 50)
        lines += 1
print(signals.requested)
"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "ready\n"
    for _ in range(100):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.0005)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and out.splitlines()[-1] == "SIGTERM" and err == ""


# --- steps that are not finite ---

def test_steps_that_are_not_finite_are_skipped_and_counted(capsys):
    guard, nan, inf = NonFinite(limit=3), float("nan"), float("inf")
    assert guard.check(1.0, 2.0, 1, [[0]]) is True
    assert guard.check(nan, 1.0, 2, [[17], [4]]) is False
    assert guard.check(1.0, torch.tensor(inf), 3, [range(15), range(15, 20)]) is False
    assert guard.check(1.0, 1.0, 4, [[5]]) is True
    assert (guard.skipped, guard.in_a_row) == (2, 0)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "step 2: loss nan" in lines[0] and "17, 4: skipped" in lines[0]
    assert "0, 1, 2, 3, 4, 5, 6, 7, 12 more:" in lines[1] and "2 in a row" in lines[1]


def test_after_a_few_in_a_row_it_stops_and_names_the_last_good_checkpoint():
    guard = NonFinite(limit=3)
    for step in (1, 2):
        assert guard.check(float("nan"), 1.0, step, [[step]], "runs/x/step-000100") is False
    with pytest.raises(UserError, match="3 steps in a row.*documents: 3.*runs/x/step-000100"):
        guard.check(1.0, float("-inf"), 3, [[3]], "runs/x/step-000100")
    with pytest.raises(UserError, match="good checkpoint: none"):
        NonFinite(limit=1).check(float("nan"), 1.0, 1, [])


# --- memory ---

OOM = ("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of"
       " which 1.2 GiB is free. Including non-PyTorch memory ...")


def advice(error, options, predicted):
    with pytest.raises(UserError) as caught, memory_advice(options, predicted):
        raise error
    return str(caught.value)


def options(batch_tokens=16384, grad_accum=2, max_seq_len=2048):
    return types.SimpleNamespace(
        batch_tokens=batch_tokens, grad_accum=grad_accum, max_seq_len=max_seq_len)


@pytest.mark.parametrize("error, is_it", [
    (torch.OutOfMemoryError(OOM), True),
    (torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be ...", 2), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
    (RuntimeError("NCCL error: unhandled cuda error, Cuda failure 2 'out of memory'"), True),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."), True),
    (MemoryError(), True),
    (torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700), False),
    (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), False),
    (ValueError("out of memory"), False)])
def test_whatever_says_that_memory_is_out(error, is_it):
    assert out_of_memory(error) is is_it


def test_advice_keeps_the_tokens_of_a_step():
    text = advice(torch.OutOfMemoryError(OOM), options(), {
        "weights": 2 * 2**30, "activations": 60 * 2**30, "logits": 9 * 2**30, "gradients": 0})
    assert "--batch-tokens 8192 --grad-accum 4" in text and "\n" not in text
    assert "71.0 GiB (activations 60.0 GiB, logits 9.0 GiB, weights 2.0 GiB)" in text
    assert "Tried to allocate 2.00 GiB;" in text and "cut" not in text


def test_advice_says_when_documents_will_be_cut_or_nothing_smaller_is_left():
    assert "documents over 1024 tokens" in advice(
        MemoryError(), options(2048, 1), {"weights": 5 * 2**30})
    text = advice(MemoryError(), options(200, 1), {"weights": 5 * 2**30})
    assert "out of memory: MemoryError" in text and "--quantize nf4" in text
