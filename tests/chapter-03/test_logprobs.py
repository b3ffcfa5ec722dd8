"""Log p of each token, and its sums: against float64 in value, gradients and memory."""

import pytest
import torch
import torch.nn.functional as F
from helpers import load
from live_memory import LivePeak

logprobs = load("chapter-03/post_training/logprobs.py")
loss_file = load("chapter-03/loss.py")
chunked_log_probs, per_document = logprobs.chunked_log_probs, logprobs.per_document

T, V, D = 53, 101, 16


def inputs(dtype=torch.float32, weight_dtype=None, masked=slice(0, None, 3)):
    """hidden, weight and labels, some labels masked; and `upstream` (T,), what log p's gradient is:
    another one for each token, of either sign, so that a factor at the wrong token shows."""
    torch.manual_seed(0)
    hidden = (torch.randn(T, D) * 3).to(dtype).requires_grad_()
    weight = torch.randn(V, D).to(weight_dtype or dtype).requires_grad_()
    labels = torch.randint(0, V, (T,))
    labels[masked] = -100
    return hidden, weight, labels, torch.randn(T)


def plain(hidden, weight, labels):
    logits = (hidden @ weight.to(hidden.dtype).t()).float()
    found = logits.log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return found.where(labels >= 0, 0)


def oracle(hidden, weight, labels, upstream):
    """Log p and both gradients in float64; the logits of 16-bit inputs rounded as the product of
    16-bit numbers is."""
    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    logits = h @ w.t()
    if hidden.dtype == torch.bfloat16:
        rounded = hidden.detach() @ weight.detach().to(hidden.dtype).t()
        logits = logits + (rounded.double() - logits).detach()
    rows = (labels >= 0).nonzero()[:, 0]
    found = torch.zeros(len(labels), dtype=torch.float64)
    found[rows] = F.log_softmax(logits, -1)[rows, labels[rows]]
    return found.detach(), *torch.autograd.grad(found, (h, w), upstream.double())


def relative(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("chunk", [1, 7, 35, 53, 1000])  # 35 tokens have a label: 7 divides, 53 not
def test_float32_equals_the_oracle(chunk):
    hidden, weight, labels, upstream = inputs()
    found = chunked_log_probs(hidden, weight, labels, chunk)
    grads = torch.autograd.grad(found, (hidden, weight), upstream)
    assert found.shape == (T,) and found.dtype == torch.float32
    expected = oracle(hidden, weight, labels, upstream)
    assert (found.detach() - expected[0]).abs().max() < 2e-5  # of 50
    assert not found[labels < 0].any()
    for ours, theirs in zip((found.detach(), *grads), expected):
        assert relative(ours, theirs) < 1e-6


def test_gradcheck_in_float64():
    hidden, weight, labels, _ = inputs(torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: chunked_log_probs(h, w, labels, 8), (hidden, weight), fast_mode=True)
    assert torch.autograd.gradcheck(  # each entry of the Jacobian, of a few tokens
        lambda h, w: chunked_log_probs(h, w, labels[:5], 2), (hidden[:5], weight[:, :]))


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_gives_float32_and_keeps_each_dtype(weight_dtype):
    hidden, weight, labels, upstream = inputs(torch.bfloat16, weight_dtype)
    found = chunked_log_probs(hidden, weight, labels, 8)
    grad_hidden, grad_weight = torch.autograd.grad(found, (hidden, weight), upstream)
    assert (found.dtype, grad_hidden.dtype, grad_weight.dtype) == (
        torch.float32, torch.bfloat16, weight_dtype)
    truth = oracle(hidden, weight.detach().bfloat16(), labels, upstream)
    assert relative(found.detach(), truth[0]) < 1e-6
    assert relative(grad_hidden, truth[1]) < 5e-3  # one rounding is 2e-3
    assert relative(grad_weight, truth[2]) < 5e-3


def test_many_chunks_lose_nothing_in_bfloat16():
    torch.manual_seed(0)
    hidden = torch.randn(4096, 64).bfloat16().requires_grad_()
    weight = torch.randn(1000, 64).requires_grad_()
    labels, upstream = torch.randint(0, 1000, (4096,)), torch.randn(4096)
    found = chunked_log_probs(hidden, weight, labels, 16)
    grad, = torch.autograd.grad(found, weight, upstream)
    truth = oracle(hidden, weight.detach().bfloat16(), labels, upstream)
    assert relative(found.detach(), truth[0]) < 1e-6
    assert relative(grad, truth[2]) < 5e-3  # more, if the chunks were added up in bfloat16


def test_the_sum_is_the_loss():
    hidden, weight, labels, _ = inputs()
    expected = loss_file.chunked_cross_entropy(hidden, weight, labels, 8)
    found = -chunked_log_probs(hidden, weight, labels, 8).sum()
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(torch.autograd.grad(found, (hidden, weight)),
                            torch.autograd.grad(expected, (hidden, weight))):
        torch.testing.assert_close(ours, theirs)


def test_without_a_label_all_is_zero():
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, labels, upstream = inputs(dtype, masked=slice(None))
        found = chunked_log_probs(hidden, weight, labels, 8)
        found.backward(upstream)
        assert found.shape == (T,) and not found.any()
        assert not hidden.grad.any() and not weight.grad.any()


def test_any_negative_label_is_left_out_even_if_the_token_is_not_finite():
    hidden, weight, labels, upstream = inputs()
    labels[:3] = torch.tensor([-1, -100, -7])
    with torch.no_grad():
        hidden[:3] = float("inf")
    chunked_log_probs(hidden, weight, labels, 8).backward(upstream)
    truth = oracle(hidden[3:], weight, labels[3:], upstream[3:])
    assert not hidden.grad[labels < 0].any()
    assert relative(hidden.grad[3:], truth[1]) < 1e-6 and relative(weight.grad, truth[2]) < 1e-6


def test_frozen_parts_get_no_gradient_and_none_is_formed(monkeypatch):
    hidden, weight, labels, upstream = inputs()
    found = chunked_log_probs(hidden, weight, labels, 8)
    full = torch.autograd.grad(found, (hidden, weight), upstream)
    asked = []
    original = logprobs.softmax_in_pieces_
    monkeypatch.setattr(logprobs, "softmax_in_pieces_",
                        lambda *a: (asked.append(a[-1]), original(*a))[1])

    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        frozen_head = chunked_log_probs(hidden, weight.detach(), labels, 8)
    assert [tensor.shape for tensor in saved] == [hidden.shape]  # its slopes, and no more
    forward = len(asked)
    frozen_head = chunked_log_probs(hidden, weight.detach(), labels, 8)
    assert torch.equal(torch.autograd.grad(frozen_head, hidden, upstream)[0], full[0])
    assert len(asked) == 2 * forward and all(asked)  # none was computed again in the backward

    head_alone = chunked_log_probs(hidden.detach(), weight, labels, 8)
    assert torch.equal(torch.autograd.grad(head_alone, weight, upstream)[0], full[1])
    asked.clear()
    with torch.no_grad():
        evaluated = chunked_log_probs(hidden, weight, labels, 8)
    assert asked and not any(asked) and not evaluated.requires_grad
    assert torch.equal(evaluated, found.detach())


def test_tied_embedding_gets_the_sum_of_both_gradients():
    _, weight, labels, upstream = inputs()
    ids = torch.arange(T)
    found, = torch.autograd.grad(
        chunked_log_probs(F.embedding(ids, weight).tanh(), weight, labels, 8), weight, upstream)
    w = weight.detach().double().requires_grad_()
    logits = F.embedding(ids, w).tanh() @ w.t()
    log_p = logits.log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    expected, = torch.autograd.grad(log_p.where(labels >= 0, 0), w, upstream.double())
    assert relative(found, expected) < 1e-6


def test_labelled_rows_may_come_with_the_labels(monkeypatch):
    hidden, weight, labels, upstream = inputs()
    labelled = (labels >= 0).nonzero()[:, 0]
    expected = chunked_log_probs(hidden, weight, labels, 8)
    asked = []
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda *a: asked.append(a))
    found = chunked_log_probs(hidden, weight, labels, 8, labelled)
    found.backward(upstream)  # a GPU would have to be waited for, if they were looked for
    assert not asked and torch.equal(found, expected)


def grown(function, hidden, weight, labels, *more):
    """Bytes that a forward and a backward need beside their inputs, gradients included."""
    with LivePeak() as live:
        function(hidden, weight, labels, *more).backward(torch.ones(len(labels)))
    hidden.grad = weight.grad = None
    return live.grown


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_logits_of_the_whole_pack_are_alive(trained, dtype):
    """A quarter of the tokens at a time, as below: a few rows' float32 copies are small beside it,
    those of a whole chunk would show."""
    torch.manual_seed(0)
    hidden = torch.randn(512, 16).to(dtype).requires_grad_()
    weight = torch.randn(65536, 16, requires_grad=trained)
    labels = torch.randint(0, 65536, (512,))
    whole = grown(plain, hidden, weight, labels)
    assert whole > 3 * 512 * 65536 * 4  # what test_a_real_vocabulary takes for granted
    assert grown(chunked_log_probs, hidden, weight, labels, 128) < 0.15 * whole


@pytest.mark.slow
@pytest.mark.parametrize("trained", [False, True])
def test_a_real_vocabulary(trained):
    """T 4096, V 151,936, in chunks of 1024. The plain form has three float32 arrays of (T, V) at
    once, 7.5 GB: log p, the gradient along it and the one along the logits."""
    torch.manual_seed(0)
    hidden = torch.randn(4096, 64).bfloat16().requires_grad_()
    weight = torch.randn(151936, 64, requires_grad=trained)
    labels = torch.randint(0, 151936, (4096,))
    assert grown(chunked_log_probs, hidden, weight, labels) < 0.15 * 3 * 4096 * 151936 * 4


def test_documents_are_summed_one_by_one():
    values = torch.tensor([-1.0, 0, 0, -0.5, -2, 0])
    assert per_document(values, torch.tensor([0, 2, 3, 6]).int()).tolist() == [-1, 0, -2.5]

    lengths = torch.tensor([3, 0, 17, 1, 0, 0, 32, 0])  # empty ones: first, within, last
    torch.manual_seed(0)
    values = torch.randn(int(lengths.sum()), dtype=torch.float64, requires_grad=True)
    borders = F.pad(lengths.cumsum(0), (1, 0)).int()
    found = per_document(values, borders)
    upstream = torch.randn(len(lengths), dtype=torch.float64)
    found.backward(upstream)
    for n, (start, end) in enumerate(zip(borders[:-1], borders[1:])):
        torch.testing.assert_close(found[n], values[start:end].sum())
        assert (values.grad[start:end] == upstream[n]).all()
    empty = per_document(values, torch.tensor([0, 0, 53]).int())
    assert empty[0] == 0 and torch.equal(per_document(values.detach(), borders), found.detach())
    assert torch.autograd.gradcheck(lambda v: per_document(v, borders), (values,))


def test_long_documents_are_summed_to_the_last_digit():
    """Added up in float32, 4,096 tokens are off by 1e-2 in a sum of 10,000."""
    torch.manual_seed(0)
    values = -torch.rand(4096) * 5
    found = per_document(values, torch.tensor([0, 4096]).int())
    assert found.dtype == torch.float32 and found == values.double().sum().float()
