"""The chunked loss against float64, in value, gradients, memory and under torch.compile."""

import functools
import gc
import shutil

import pytest
import torch
import torch.nn.functional as F
from helpers import load
from live_memory import LivePeak
from torch._dynamo.utils import counters


loss_file = load("chapter-03/loss.py")
chunked_cross_entropy = loss_file.chunked_cross_entropy

T, V, D = 53, 101, 16
NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")


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
    original = loss_file.softmax_in_pieces_
    monkeypatch.setattr(loss_file, "softmax_in_pieces_",
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


def test_labelled_rows_may_come_with_the_labels():
    hidden, weight, labels = inputs()
    labelled = (labels >= 0).nonzero()[:, 0]
    expected = torch.autograd.grad(chunked_cross_entropy(hidden, weight, labels, 8),
                                   (hidden, weight))
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "nonzero", lambda *a: asked.append(a))
        found = torch.autograd.grad(chunked_cross_entropy(hidden, weight, labels, 8, labelled),
                                    (hidden, weight))
    assert not asked and all(map(torch.equal, found, expected))


# Small losses beside large logits: log(sum) and the largest logit must not be added up first.
@pytest.mark.parametrize("scale", [1, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_softmax_at_once_equals_float64(dtype, scale):
    torch.manual_seed(0)
    logits = (torch.randn(40, V) * scale).to(dtype)
    labels = torch.where(torch.arange(40) < 30, logits.argmax(1), torch.randint(0, V, (40,)))
    exact = logits.double().requires_grad_()
    losses = F.cross_entropy(exact, labels, reduction="none")
    gradient, = torch.autograd.grad(losses.sum(), exact)
    for rows in (slice(None), slice(0, 30)):
        for softmax in (loss_file.softmax_at_once_, loss_file.softmax_in_pieces_):
            untouched, overwritten = logits[rows].clone(), logits[rows].clone()
            assert relative(softmax(untouched, labels[rows], False), losses[rows]) < 1e-6
            assert torch.equal(untouched, logits[rows])
            assert relative(softmax(overwritten, labels[rows], True), losses[rows]) < 1e-6
            off = (overwritten.double() - gradient[rows]).norm() / gradient[rows].norm()
            assert off < (1e-6 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("dtype, backend", [
    (torch.float32, "aot_eager"),
    pytest.param(torch.float32, "inductor", marks=[NEEDS_COMPILER, pytest.mark.slow]),
    (torch.bfloat16, "aot_eager"), pytest.param(torch.bfloat16, "inductor", marks=NEEDS_COMPILER)])
def test_the_softmax_compiles_once_for_any_number_of_labels(dtype, backend):
    """Inductor too: PyTorch 2.11's wrote the gradient over logits that it had yet to read."""
    torch._dynamo.reset()
    counters.clear()
    compiled = functools.partial(loss_file.softmax_at_once_, compiled=torch.compile(
        loss_file.softmax_, backend=backend, fullgraph=True, dynamic=False))
    hidden, weight, labels = inputs(dtype, torch.float32)
    for number, masked in enumerate((slice(0, None, 3), slice(0, 20), slice(0, 0), slice(9, 50))):
        labels = inputs(dtype, masked=masked, seed=number)[2]
        found, expected = (
            (loss.detach(), *torch.autograd.grad(loss, (hidden, weight))) for loss in (
                chunked_cross_entropy(hidden, weight, labels, 30, None, softmax)
                for softmax in (compiled, None)))
        assert relative(found[0], expected[0].double()) < 1e-6
        for a, b in zip(found[1:], expected[1:]):
            assert relative(a, b.double()) < (1e-6 if dtype == torch.float32 else 5e-3)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    torch._dynamo.reset()
    gc.collect()
