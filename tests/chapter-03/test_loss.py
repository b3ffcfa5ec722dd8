"""The chunked loss against float64, in value, gradients, memory and under torch.compile."""

import gc
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import load

from common.memory import LivePeak

loss_file = load("chapter-03/loss.py")
chunked_cross_entropy = loss_file.chunked_cross_entropy

T, V, D = 53, 101, 16


def inputs(dtype=torch.float32, weight_dtype=None, masked=slice(0, None, 3), seed=0):
    """hidden, weight and labels, some labels masked; large logits, so that a softmax can fail."""
    torch.manual_seed(seed)
    hidden = (torch.randn(T, D) * 3).to(dtype).requires_grad_()
    weight = torch.randn(V, D).to(weight_dtype or dtype).requires_grad_()
    labels = torch.randint(0, V, (T,))
    labels[masked] = -100
    return hidden, weight, labels


def plain(hidden, weight, labels):
    logits = hidden @ weight.to(hidden.dtype).t()
    return F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)


def oracle(hidden, weight, labels):
    """Loss and gradients in float64; the logits of 16-bit inputs rounded as the kernel does."""
    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    logits = h @ w.t()
    if hidden.dtype == torch.bfloat16:
        rounded = hidden.detach() @ weight.detach().to(hidden.dtype).t()
        logits = logits + (rounded.double() - logits).detach()
    loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
    return loss.detach(), *torch.autograd.grad(loss, (h, w))


def relative(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("chunk", [1, 8, 52, 53, 1000])
def test_float32_equals_the_oracle(chunk):
    hidden, weight, labels = inputs()
    loss = chunked_cross_entropy(hidden, weight, labels, chunk)
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert loss.dtype == torch.float32 and loss.shape == ()
    for found, expected in zip((loss, *grads), oracle(hidden, weight, labels)):
        assert relative(found.detach(), expected) < 1e-6


def test_gradcheck_in_float64():
    hidden, weight, labels = inputs(torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: chunked_cross_entropy(h, w, labels, 8) * 0.3, (hidden, weight),
        fast_mode=True)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_has_a_float32_loss_and_keeps_each_dtype(weight_dtype):
    hidden, weight, labels = inputs(torch.bfloat16, weight_dtype)
    loss = chunked_cross_entropy(hidden, weight, labels, 8)
    grad_hidden, grad_weight = torch.autograd.grad(loss, (hidden, weight))
    assert (loss.dtype, grad_hidden.dtype, grad_weight.dtype) == (
        torch.float32, torch.bfloat16, weight_dtype)
    truth = oracle(hidden, weight.detach().bfloat16(), labels)
    assert relative(loss.detach(), truth[0]) < 1e-6
    assert relative(grad_hidden, truth[1]) < 5e-3  # one rounding is 2e-3
    assert relative(grad_weight, truth[2]) < 5e-3


def test_many_chunks_lose_nothing_in_bfloat16():
    """PyTorch's own chunked loss adds up in bfloat16 and is off by 5 % here."""
    torch.manual_seed(0)
    hidden = torch.randn(4096, 64).bfloat16().requires_grad_()
    weight = torch.randn(1000, 64).requires_grad_()
    labels = torch.randint(0, 1000, (4096,))
    loss = chunked_cross_entropy(hidden, weight, labels, 16)
    grad, = torch.autograd.grad(loss, weight)
    truth = oracle(hidden, weight.detach().bfloat16(), labels)
    assert relative(loss.detach(), truth[0]) < 1e-6
    assert relative(grad, truth[2]) < 5e-3  # 2.3e-2 if the chunks were added up in bfloat16


def test_all_masked_is_zero_and_not_nan():
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, labels = inputs(dtype, masked=slice(None))
        loss = chunked_cross_entropy(hidden, weight, labels, 8)
        loss.backward()
        assert loss.item() == 0 and not hidden.grad.any() and not weight.grad.any()


def test_masked_tokens_do_not_count_even_if_they_are_not_finite():
    hidden, weight, labels = inputs()
    with torch.no_grad():
        hidden[0] = float("inf")
    loss = chunked_cross_entropy(hidden, weight, labels, 8)
    loss.backward()
    rest = plain(hidden[1:], weight, labels[1:])
    torch.testing.assert_close(loss, rest)
    assert not hidden.grad[labels < 0].any() and weight.grad.isfinite().all()


def test_frozen_parts_get_no_gradient_and_none_is_formed(monkeypatch):
    hidden, weight, labels = inputs()
    full = torch.autograd.grad(chunked_cross_entropy(hidden, weight, labels, 8), (hidden, weight))
    for i, pair in enumerate([(hidden, weight.detach()), (hidden.detach(), weight)]):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
            chunked_cross_entropy(*pair, labels, 8)
        assert [tensor.shape for tensor in saved] == [pair[i].shape]
        loss = chunked_cross_entropy(*pair, labels, 8)
        assert torch.equal(torch.autograd.grad(loss, pair[i])[0], full[i])

    asked = []
    original = loss_file._cross_entropy
    monkeypatch.setattr(loss_file, "_cross_entropy",
                        lambda *a: (asked.append(a[-1]), original(*a))[1])
    with torch.no_grad():
        evaluated = chunked_cross_entropy(hidden, weight, labels, 8)
    assert not any(asked) and asked and not evaluated.requires_grad
    assert torch.equal(evaluated, loss.detach())


def test_tied_embedding_gets_the_sum_of_both_gradients():
    _, weight, labels = inputs()
    ids = torch.arange(T)
    found, = torch.autograd.grad(
        chunked_cross_entropy(F.embedding(ids, weight).tanh(), weight, labels, 8), weight)
    w = weight.detach().double().requires_grad_()
    expected, = torch.autograd.grad(plain(F.embedding(ids, w).tanh(), w, labels), w)
    assert relative(found, expected) < 1e-6


def test_accumulated_halves_equal_the_whole():
    hidden, weight, labels = inputs()
    tokens = (labels >= 0).sum()
    whole = torch.autograd.grad(
        chunked_cross_entropy(hidden, weight, labels, 16) / tokens, (hidden, weight))
    for rows in (slice(0, 11), slice(11, None)):
        (chunked_cross_entropy(hidden[rows], weight, labels[rows], 16) / tokens).backward()
    for found, expected in zip((hidden.grad, weight.grad), whole):
        torch.testing.assert_close(found, expected)


def test_no_logits_of_the_whole_pack_are_alive():
    torch.manual_seed(0)
    hidden = torch.randn(512, 32, requires_grad=True)
    weight = torch.randn(4096, 32, requires_grad=True)
    labels = torch.randint(0, 4096, (512,))
    gradients = hidden.nbytes + weight.nbytes

    def above(function):
        function(hidden, weight, labels).backward()  # warm up
        hidden.grad = weight.grad = None
        with LivePeak() as live:
            function(hidden, weight, labels).backward()
        hidden.grad = weight.grad = None
        return live.grown - gradients

    chunked = above(lambda *args: chunked_cross_entropy(*args, chunk=32))
    # The logits of 32 tokens and their float32 softmax, or both gradients times the scale.
    assert chunked < 1.1 * max(2 * 32 * 4096 * 4, gradients)
    assert chunked < 0.15 * above(plain)


@pytest.fixture
def compiler(monkeypatch):
    """What torch.compile needs, and what it leaves behind removed."""
    monkeypatch.setitem(sys.modules, "loss", loss_file)  # it looks for a function's globals there
    yield
    torch._dynamo.reset()
    gc.collect()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_without_a_graph_break(dtype, compiler):
    def function(hidden, weight, labels):
        return chunked_cross_entropy(hidden.tanh(), weight, labels, 30) / 7

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    hidden, weight, labels = inputs(dtype, torch.float32)
    for trained in (True, False):
        weight.requires_grad_(trained)
        leaves = [hidden, weight] if trained else [hidden]
        loss, expected = compiled(hidden, weight, labels), function(hidden, weight, labels)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        for found, other in zip(torch.autograd.grad(loss, leaves),
                                torch.autograd.grad(expected, leaves)):
            assert relative(found, other.double()) < (1e-6 if dtype == torch.float32 else 5e-3)
    with torch.no_grad():
        torch.testing.assert_close(compiled(hidden, weight, labels), expected.detach())
    labels.fill_(-100)
    loss = compiled(hidden, weight, labels)
    assert loss.item() == 0 and not torch.autograd.grad(loss, hidden)[0].any()
