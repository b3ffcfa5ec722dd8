"""Each planted bug leaves the symptom that the profiler is to show, and the others do not."""

import re

import pytest
import torch
from helpers import load

bugs = load("chapter-03/profiling/bugs.py")
STEPS = 3


@pytest.fixture(scope="module")
def symptoms(tmp_path_factory):
    """{flag or "": (compilations, matrix products, numbers read back)} of a run with each bug."""
    found = {}
    patch = pytest.MonkeyPatch()
    for flag in ("", "--bug-1", "--bug-2", "--bug-3"):
        text = []
        patch.setattr("builtins.print", lambda *words, **_: text.append(" ".join(map(str, words))))
        out = tmp_path_factory.mktemp("bug") / "out"
        bugs.main([*flag.split(), "--steps", str(STEPS), "--batch-tokens", "256", "--device", "cpu",
                   "--out", str(out)])
        patch.undo()
        text = "\n".join(text)
        assert (out / "trace.json.gz").stat().st_size > 1000
        found[flag] = tuple(int(re.findall(rf"{words}\D*(\d+)", text)[-1]) for words in (
            "compiled so far:", "matrix products", "numbers that Python has waited for"))
    torch._dynamo.reset()
    return found


def test_healthy_step_compiles_once(symptoms):
    assert symptoms[""][0] == 1


def test_bug_1_waits_for_the_device_in_every_layer(symptoms):
    healthy, ill = symptoms[""], symptoms["--bug-1"]
    assert healthy[2] == 0
    assert ill[2] - healthy[2] == 4 and ill[:2] == healthy[:2]  # tiny has four layers


def test_bug_2_compiles_at_every_step(symptoms):
    assert symptoms["--bug-2"][0] == STEPS


def test_bug_3_multiplies_many_small_matrices(symptoms):
    healthy, ill = symptoms[""], symptoms["--bug-3"]
    # 16 chunks instead of one, each with a product for the logits and one for each gradient.
    assert ill[1] - healthy[1] >= 2 * 14 and ill[0] == 1
