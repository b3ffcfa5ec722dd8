"""The CUDA branch on fake tensors: what tests/fake_cuda.py says of each case (see there)."""

import json
import re

import fake_cuda
import pytest
import torch
from helpers import ROOT, load
from torch.nn import functional as F

LORA_FA = {"aten._to_copy.default", "aten.div.Tensor", "aten.linalg_pinv.atol_rtol_tensor",
           "aten.mm.default"}  # (A Aᵀ)⁻¹, once in a run, in float64


@pytest.fixture(scope="module")
def found(fake_cuda_runs):
    """{case: what was seen}."""
    if not fake_cuda_runs:
        pytest.skip("the stand-in for CUDA has to be compiled, and no g++ is here")
    lines = {}
    for process in fake_cuda_runs:
        printed, errors = process.communicate(timeout=800)
        assert process.returncode == 0, errors[-2000:]
        lines |= {line.pop("case"): line for line in map(json.loads, printed.splitlines())}
    return lines


def others_slow(cases, *telling):
    """The cases as parameters: all but the `telling` ones are slow."""
    return [pytest.param(case, marks=() if case in telling else pytest.mark.slow)
            for case in cases]


POST_TRAINING = *fake_cuda.PAIRS, *fake_cuda.REWARDS, *fake_cuda.TEACHERS


@pytest.mark.parametrize("case", [*fake_cuda.STEPS, *POST_TRAINING, *others_slow(
    fake_cuda.COMPILED, "chapter 3, dense, none, compiled", "chapter 3, lora-fa, compiled",
    "chapter 3, lora on nf4, full, compiled", "chapter 3, lora on double, selective, compiled")])
def test_step(case, found):
    """No error (as of two devices, or dtypes that do not go together), every gradient there, of its
    parameter's dtype and device, nothing computed elsewhere; compiled, one graph for a layer, one
    for the first layer above a frozen embedding, one for the loss with any number of labels."""
    step = found[case]
    assert "error" not in step, step["error"]
    assert step["wrong"] == []
    assert set(step["elsewhere"]) == (LORA_FA if "lora-fa" in case else set())
    dense = case in ("chapter 1", "chapter 2, full") or "dense" in case
    assert step["breaks"] == 0
    # Adapters are added in place, but where a layer is computed again as a whole (compiling.py).
    assert (step["copies"] > 0) == ("full, compiled" in case and not dense)
    assert step["graphs"] == ((2 if dense else 3) if case in fake_cuda.COMPILED else 0)
    if case not in fake_cuda.TEACHERS:
        assert step["predicted"] == pytest.approx(step["peak"], rel=0.02)


@pytest.mark.parametrize("case", fake_cuda.TEACHERS)
def test_memory_with_a_teacher(case, found):
    """Its logits stand beside the student's, and float32 pieces of both."""
    assert found[case]["predicted"] == pytest.approx(found[case]["peak"], rel=0.03)


@pytest.mark.parametrize("case", fake_cuda.KINDS["drawn"])
def test_rollout(case, found):
    """No error from the prompts' pass to the last token, nothing computed elsewhere. Every second
    document ends with each token that is drawn, so that the cache is cut again and again."""
    rollout = found[case]
    assert "error" not in rollout, rollout["error"]
    assert rollout["elsewhere"] == []
    assert sorted(rollout["drawn"]) == [1] * 6 + [2] * 3 + [3] * 2 + [4]


@pytest.mark.parametrize("case", others_slow(
    (case for case in fake_cuda.KINDS["memory"] if case != "loss"), "chapter 1, 2048 tokens",
    "chapter 2, LoRA, 2048 tokens", "chapter 3, QLoRA, 2048 tokens",
    "chapter 3, dense, compiled, 2048 tokens"))
def test_memory_of_the_whole_model_is_the_predicted_one(case, found):
    """Within 1 %; and chapter 3's README has these figures."""
    readme = (ROOT / "chapter-03" / "README.md").read_text(encoding="utf-8")
    name, tokens = re.fullmatch(r"(.*), (\d+) tokens", case).groups()
    cells = re.search(rf"^\| {re.escape(name)} \|(.*)\|$", readme, re.MULTILINE)[1].split("|")
    memory = found[case]
    assert "error" not in memory, memory["error"]
    assert memory["predicted"] == pytest.approx(memory["peak"], rel=0.01)
    shown = [float(number) for number in re.findall(r"[\d.]+", cells[tokens != "2048"])]
    assert shown == pytest.approx([memory["predicted"] / 1e9, memory["peak"] / 1e9], abs=0.006)


@pytest.mark.parametrize("case", ["loss"])
def test_memory_of_the_loss(case, found):
    """Above inputs and gradients: the target of 15 % of the plain loss's."""
    loss = found[case]
    assert loss["compiled"] < loss["chunked"] <= 0.15 * loss["plain"]


@pytest.mark.parametrize("file, name", [
    ("chapter-01/modeling_qwen3.py", "varlen_attention"),
    ("chapter-02/modeling_llama.py", "varlen_attention"),
    ("chapter-03/profiling/ladder.py", "sliced_attention")])
def test_float32_attention_on_cuda_gets_as_many_key_heads_as_query_heads(file, name, monkeypatch):
    """With fewer, PyTorch takes the kernel that keeps all of S² in memory."""
    class OnCuda(torch.Tensor):
        is_cuda = True

    attention = getattr(load(file), name)
    q, k, v = (torch.randn(30, heads, 8) for heads in (6, 2, 2))
    rest = torch.tensor([0, 11, 30], dtype=torch.int32), 19
    expected, kernel, seen = attention(q, k, v, *rest), F.scaled_dot_product_attention, []

    def watched(q, k, v, **options):
        seen.append((q.shape, k.shape, v.shape))
        return kernel(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    found = attention(*(x.as_subclass(OnCuda) for x in (q, k, v)), *rest)
    assert len(seen) == 2 and all(q == k == v for q, k, v in seen)
    torch.testing.assert_close(found.as_subclass(torch.Tensor), expected)
