"""The divergence from a teacher: against TRL's numbers, float64 autograd, limits and identities."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import GOLDENS, load
from live_memory import LivePeak
from safetensors.torch import load_file

distill = load("chapter-03/post_training/distill.py")
loss_file = load("chapter-03/loss.py")
chunked_divergence = distill.chunked_divergence

TRL = GOLDENS / "trl-rewards"
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
T, V, D, TEACHER_D = 23, 41, 12, 20


def plain(logits, taught, labels, share=1.0, beta=0.0, temperature=1.0):
    """(loss, sum of cross-entropy, sum of divergence) of whole logits, by the formulas."""
    live = labels >= 0
    log_q, log_p = ((x / temperature).log_softmax(-1)[live] for x in (logits, taught))
    p, q = log_p.exp(), log_q.exp()
    if beta == 0:
        terms = p * (log_p - log_q)
    elif beta == 1:
        terms = q * (log_q - log_p)
    else:
        log_m = (beta * p + (1 - beta) * q).log()
        terms = beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)
    entropy = F.cross_entropy(logits[live], labels[live], reduction="sum")
    total = (1 - share) * entropy + share * temperature**2 * terms.sum()
    return total, entropy, terms.sum()


def inputs(dtype=torch.float64, vocabulary=V, teacher_vocabulary=V):
    """A student's hidden states and head, a teacher's, and labels; a third is not trained."""
    torch.manual_seed(0)
    labels = torch.randint(0, min(vocabulary, teacher_vocabulary), (T,))
    labels[::3] = torch.tensor([-100, -1, -7]).repeat(3)[:len(labels[::3])]
    found = {"hidden": torch.randn(T, D), "weight": torch.randn(vocabulary, D),
             "teacher_hidden": torch.randn(T, TEACHER_D),
             "teacher_weight": 0.7 * torch.randn(teacher_vocabulary, TEACHER_D)}
    found = {name: one.to(dtype).requires_grad_("teacher" not in name)
             for name, one in found.items()}
    return {**found, "labels": labels}


def run(given, chunk=5, wrt=("hidden", "weight"), **how):
    """(loss, sums, *gradients)."""
    given = dict(given)
    first = [given.pop(name) for name in ("hidden", "weight", "labels")]
    loss, sums = chunked_divergence(*first, chunk, **given, **how)
    by_name = dict(zip(("hidden", "weight"), first))
    return loss.detach(), sums, *torch.autograd.grad(loss, [by_name[name] for name in wrt])


def truth(given, vocabulary=None, **how):
    hidden, weight, taught, teacher_weight = (given[name].detach().double() for name in (
        "hidden", "weight", "teacher_hidden", "teacher_weight"))
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    loss, *sums = plain(hidden @ weight[:vocabulary].t(), taught @ teacher_weight[:vocabulary].t(),
                        given["labels"], **how)
    return loss.detach(), torch.stack(sums).detach(), *torch.autograd.grad(loss, leaves)


def apart(found, expected):
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


# --- TRL ---

@pytest.fixture(scope="module")
def trl():
    return load_file(TRL / "distillation.safetensors"), json.loads(
        (TRL / "distillation.json").read_text())


@pytest.mark.parametrize("j", range(3))
@pytest.mark.parametrize("i", range(5))
def test_divergences_and_gradients_are_trls(i, j, trl):
    stored, answers = trl
    beta, temperature = answers["betas"][i], answers["temperatures"][j]
    given = {"hidden": stored["student_hidden"].requires_grad_(), "labels": stored["labels"],
             "weight": stored["student_head"].requires_grad_(),
             "teacher_hidden": stored["teacher_hidden"], "teacher_weight": stored["teacher_head"]}
    loss, sums, *grads = run(given, 2, beta=beta, temperature=temperature)
    for key in ("losses", "chunked_losses"):
        assert sums[1].item() == pytest.approx(stored[key][i, j].item(), rel=1e-5)
    assert sums[1].item() / answers["live"] == pytest.approx(answers["batchmean"][i][j], rel=1e-5)
    assert loss.item() == pytest.approx(temperature**2 * sums[1].item(), rel=1e-6)
    for found, key in zip(grads, ("hidden_gradients", "head_gradients")):
        # TRL does not multiply by τ². Its own gradients are up to 2e-5 off in float32.
        assert apart(found / temperature**2, stored[key][i, j]) <= 2e-5, key
        assert apart(found / temperature**2, truth_of(trl, i, j)[key]) <= 1e-5, key

    # Along the logits: with the identity as the head, they are the hidden states.
    logits = stored["student_logits"].clone().requires_grad_()
    found = run({**given, "hidden": logits, "weight": torch.eye(40).requires_grad_()}, 3,
                beta=beta, temperature=temperature)
    assert apart(found[2] / temperature**2, stored["logits_gradients"][i, j]) <= 2e-5


def truth_of(trl, i, j):
    stored, answers = trl
    given = {"hidden": stored["student_hidden"], "weight": stored["student_head"],
             "teacher_hidden": stored["teacher_hidden"], "teacher_weight": stored["teacher_head"],
             "labels": stored["labels"]}
    temperature = answers["temperatures"][j]
    *_, a, b = truth(given, beta=answers["betas"][i], temperature=temperature)
    return {"hidden_gradients": a / temperature**2, "head_gradients": b / temperature**2}


# --- the equations ---

@pytest.mark.parametrize("temperature", [1.0, 0.6, 3.0])
@pytest.mark.parametrize("share", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("beta", BETAS)
def test_every_divergence_is_its_equation(beta, share, temperature):
    given, how = inputs(), dict(beta=beta, share=share, temperature=temperature)
    for found, expected in zip(run(given, **how), truth(given, **how), strict=True):
        assert apart(found, expected) < 1e-12


@pytest.mark.parametrize("beta", BETAS)
def test_the_gradients_along_the_logits_are_the_closed_forms(beta):
    torch.manual_seed(1)
    log_p, log_q = torch.randn(2, 9, 31).double().log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    if beta == 0:
        value, expected = (p * (p / q).log()).sum(-1), q - p
    elif beta == 1:
        value = (q * (q / p).log()).sum(-1)
        expected = q * ((q / p).log() - value[:, None])
    else:
        m = beta * p + (1 - beta) * q
        of_student = (q * (q / m).log()).sum(-1)
        value = beta * (p * (p / m).log()).sum(-1) + (1 - beta) * of_student
        expected = (1 - beta) * q * ((q / m).log() - of_student[:, None])
    found, gradient = distill.divergence(log_p, log_q.clone(), beta)
    assert (found - value).abs().max() < 1e-12 and (gradient - expected).abs().max() < 1e-12
    assert gradient.sum(-1).abs().max() < 1e-12  # a softmax does not see a constant


@pytest.mark.parametrize("beta", BETAS)
def test_gradcheck(beta):
    given = inputs()
    first = given.pop("hidden"), given.pop("weight")
    assert torch.autograd.gradcheck(lambda h, w: chunked_divergence(
        h, w, given["labels"], 4, share=0.6, beta=beta, temperature=1.7, teacher_hidden=given[
            "teacher_hidden"], teacher_weight=given["teacher_weight"])[0], first, fast_mode=True)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("chunk", [1, 4, 15, 16, 1000])  # 15 tokens have a label
def test_chunks_make_no_difference(beta, chunk):
    given, how = inputs(torch.float32), dict(beta=beta, share=0.4, temperature=1.5)
    for found, expected in zip(run(given, chunk, **how), truth(given, **how), strict=True):
        assert apart(found, expected) < 3e-6


def test_pieces_of_a_chunk_make_no_difference():
    """More logits than are taken at a time: seven rows of 300,000."""
    torch.manual_seed(0)
    logits, taught = torch.randn(2, 7, 300_000)
    labels, kept = torch.randint(0, 300_000, (7,)), logits.clone()
    leaf = logits.double().requires_grad_()
    loss, *_ = plain(leaf, taught.double(), labels, 0.7, 0.5, 1.3)
    expected = [plain(kept[n:n + 1].double(), taught[n:n + 1].double(), labels[n:n + 1], beta=0.5,
                      temperature=1.3)[1:] for n in range(7)]
    found = distill.divergence_in_pieces_(logits, taught, labels, 0.7, 0.5, 1.3)
    gradient, = torch.autograd.grad(loss, leaf)
    assert apart(found, torch.tensor(expected).t()) < 1e-5
    assert apart(logits, gradient) < 1e-5 and not torch.equal(logits, kept)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_model_as_its_own_teacher_teaches_nothing(beta, temperature, dtype):
    given = inputs(dtype)
    same = {**given, "teacher_hidden": given["hidden"].detach(),
            "teacher_weight": given["weight"].detach()}
    for teacher_weight in (same["teacher_weight"], given["weight"]):  # the head itself
        loss, sums, *grads = run({**same, "teacher_weight": teacher_weight}, beta=beta,
                                 temperature=temperature)
        assert loss.abs() / 15 <= 1e-7 * temperature**2 and sums[1].abs() / 15 <= 1e-7
        assert sums[0] > 1
        for grad in grads:
            assert grad.abs().max() <= 1e-5
            assert beta not in (0, 1) or not grad.any()


def test_jsd_is_symmetric_and_bounded():
    torch.manual_seed(0)
    for spread in (0.1, 3.0, 40.0):
        log_p, log_q = (spread * torch.randn(2, 50, 33)).log_softmax(-1)
        one, other = (distill.divergence(*both, 0.5)[0]
                      for both in ((log_p, log_q), (log_q, log_p)))
        torch.testing.assert_close(one, other)
        for beta in (0.1, 0.5, 0.9):
            found = distill.divergence(log_p, log_q, beta)[0]
            bound = -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)
            assert found.min() > -1e-7 and found.max() <= bound + 1e-6 <= math.log(2) + 1e-6
            torch.testing.assert_close(found, distill.divergence(log_q, log_p, 1 - beta)[0])
    apart_ = torch.tensor([[0.0, -1e4], [-1e4, 0]]).log_softmax(-1)
    assert distill.divergence(*apart_[:, None], 0.5)[0].item() == pytest.approx(math.log(2))


def test_which_way_round():
    """A student at one of the teacher's two modes is near by the reverse KL, far by the forward."""
    both = torch.tensor([[0.499, 0.499, 0.002]], dtype=torch.float64).log()
    one = torch.tensor([[0.997, 0.001, 0.002]], dtype=torch.float64).log()
    forward, reverse = (distill.divergence(both, one, beta)[0].item() for beta in (0, 1))
    assert forward == pytest.approx(0.499 * math.log(0.499 / 0.997)
                                    + 0.499 * math.log(0.499 / 0.001))
    assert reverse == pytest.approx(0.997 * math.log(0.997 / 0.499)
                                    + 0.001 * math.log(0.001 / 0.499))
    assert forward > 2 > 1 > reverse > 0
    for near, end in ((1e-7, 0.0), (1 - 1e-7, 1.0)):  # the limits, of a JSD that goes to 0
        found = distill.divergence(both, one, near)[0].item() / (near if end == 0 else 1 - near)
        assert found == pytest.approx(distill.divergence(both, one, end)[0].item(), rel=1e-4)


@pytest.mark.parametrize("beta, factor", [(0.0, 1.0), (1.0, 1.0), (0.5, 0.25)])
def test_at_a_high_temperature_the_gradient_is_that_of_matching_logits(beta, factor):
    """τ² V ∂L/∂z goes to z_s - z_t, of logits with mean 0 (1503.02531, section 2.1)."""
    torch.manual_seed(0)
    logits, taught = torch.randn(2, T, V).double()
    logits, taught = (one - one.mean(-1, keepdim=True) for one in (logits, taught))
    target, distances = factor * (logits - taught), []
    for temperature in (1.0, 10.0, 100.0, 1e4):
        eye = torch.eye(V).double()
        _, _, found = run({"hidden": logits.requires_grad_(), "weight": eye,
                           "teacher_hidden": taught, "teacher_weight": eye,
                           "labels": torch.zeros(T, dtype=torch.int64)}, 8, ("hidden",),
                          beta=beta, temperature=temperature)
        distances.append(((V * found - target).norm() / target.norm()).item())
    assert distances[0] > 0.2 and distances[1] < 0.3
    assert distances[2] < 0.03 and distances[3] < 1e-3


# --- what is left out ---

def test_tokens_without_a_label_are_left_out_whatever_they_hold():
    given = inputs(torch.float32)
    with torch.no_grad():
        for name in ("hidden", "teacher_hidden"):
            given[name][given["labels"] < 0] = torch.nan
    live = given["labels"] >= 0
    found = run(given, beta=0.5, share=0.5)
    some = {name: one[live] if len(one) == T else one for name, one in given.items()}
    some["hidden"] = some["hidden"].detach().requires_grad_()
    expected = run(some, beta=0.5, share=0.5)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert not found[2][~live].any() and torch.equal(found[2][live], expected[2])
    assert torch.equal(found[3], expected[3])


def test_without_a_label_all_is_zero():
    given = inputs(torch.float32)
    given["labels"] = torch.full((T,), -100)
    assert not any(one.any() for one in run(given, beta=0.5, share=0.5))


def test_labelled_rows_may_come_with_the_labels(monkeypatch):
    given = inputs()
    labelled, asked = (given["labels"] >= 0).nonzero()[:, 0], []
    expected = run(given, beta=1.0)
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda *a: asked.append(a))
    found = run(given, beta=1.0, labelled=labelled)
    assert not asked and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("sizes", [(V + 7, V), (V, V + 3), (V + 7, V + 3)])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_padded_heads_are_cut_before_the_softmax(sizes, beta):
    given = inputs(torch.float64, *sizes)
    given["labels"] %= V
    how = dict(beta=beta, share=0.7, temperature=1.2, vocabulary=V)
    found, expected = run(given, **how), truth(given, **how)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape and apart(ours, theirs) < 1e-12
    assert not found[3][V:].any() and len(found[3]) == sizes[0]
    with torch.no_grad():  # whatever the rows beyond hold
        for name in ("weight", "teacher_weight"):
            given[name][V:] = 1e3
    again = run(given, **how)
    assert all(map(torch.equal, found, again))


def test_a_share_of_nothing_is_the_cross_entropy():
    given = inputs(torch.float32)
    loss, sums, *grads = run(given, share=0.0, beta=0.5)
    expected = loss_file.chunked_cross_entropy(given["hidden"], given["weight"], given["labels"])
    assert loss.item() == sums[0].item() == pytest.approx(expected.item(), rel=1e-6)
    for ours, theirs in zip(grads, torch.autograd.grad(
            expected, (given["hidden"], given["weight"]))):
        assert apart(ours, theirs) < 1e-5
    assert sums[1] > 0  # it is told all the same


def test_shares_mix():
    given, how = inputs(), dict(beta=0.5, temperature=2.0)
    (taught, *a), (own, *b), (mixed, *c) = (run(given, share=share, **how)
                                            for share in (1.0, 0.0, 0.25))
    assert mixed.item() == pytest.approx((0.75 * own + 0.25 * taught).item(), rel=1e-12)
    for one, other, both in zip(a[1:], b[1:], c[1:]):
        assert apart(both, 0.75 * other + 0.25 * one) < 1e-12
    assert torch.equal(a[0], c[0])  # the sums are of each by itself


# --- dtypes and gradients ---

@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_bfloat16_gives_float32_and_keeps_each_dtype(beta, weight_dtype):
    """The teacher in the other dtype: both are cast up before anything is subtracted."""
    given = {name: one if name == "labels" else one.detach().bfloat16().float()
             for name, one in inputs().items()}
    given["hidden"] = given["hidden"].bfloat16().requires_grad_()
    given["weight"] = given["weight"].to(weight_dtype).requires_grad_()
    loss, sums, grad_hidden, grad_weight = run(given, beta=beta, share=0.8)
    assert (loss.dtype, sums.dtype, grad_hidden.dtype, grad_weight.dtype) == (
        torch.float32, torch.float32, torch.bfloat16, weight_dtype)
    expected = truth(given, beta=beta, share=0.8)
    for ours, theirs in zip((loss, sums, grad_hidden, grad_weight), expected):
        assert apart(ours, theirs) < 0.02


def test_many_chunks_lose_nothing_in_bfloat16():
    torch.manual_seed(0)
    hidden, weight, taught, teacher_weight = (
        torch.randn(*size).bfloat16() for size in ((2048, 32), (300, 32)) * 2)
    given = {"hidden": hidden.requires_grad_(), "weight": weight.float().requires_grad_(),
             "teacher_hidden": taught, "teacher_weight": teacher_weight,
             "labels": torch.randint(0, 300, (2048,))}
    logits = (hidden @ weight.t()).detach().double().requires_grad_()  # rounded, as products are
    loss, *_ = plain(logits, (taught @ teacher_weight.t()).double(), given["labels"], beta=0.5)
    expected = torch.autograd.grad(loss, logits)[0].t() @ hidden.detach().double()
    found = run(given, 8, beta=0.5)
    assert found[0].item() == pytest.approx(loss.item(), rel=1e-5)
    error = (found[3].double() - expected).norm() / expected.norm()
    assert error < 4e-3  # more, if the chunks were added up in bfloat16


def test_frozen_parts_get_no_gradient_and_none_is_formed(monkeypatch):
    given = inputs(torch.float32)
    full = run(given, beta=0.5)
    frozen = {**given, "weight": given["weight"].detach()}
    formed = []
    monkeypatch.setattr(loss_file, "addmm_", lambda *a: formed.append(a))
    found = run(frozen, wrt=("hidden",), beta=0.5)
    assert not formed and torch.equal(found[2], full[2])
    monkeypatch.undo()
    head_alone = run({**given, "hidden": given["hidden"].detach()}, wrt=("weight",), beta=0.5)
    assert torch.equal(head_alone[2], full[3])

    given["teacher_weight"].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
            lambda one: saved.append(one.shape) or one, lambda one: one):
        loss, sums = chunked_divergence(beta=0.5, **given)
    assert {*saved} <= {(T, D), (V, D)} and not sums.requires_grad  # its two gradients, no more
    loss.backward()
    assert given["teacher_weight"].grad is None
    with torch.no_grad():
        loss, sums = chunked_divergence(beta=0.5, **given)
    assert not loss.requires_grad and torch.equal(loss, full[0]) and torch.equal(sums, full[1])


def test_the_students_head_gets_nothing_for_being_the_teachers():
    """With one head for both, only the student's logits pull at it."""
    given = inputs()
    given["teacher_hidden"] = torch.randn(T, D).double()
    found = run({**given, "teacher_weight": given["weight"]}, beta=0.0)
    expected = truth({**given, "teacher_weight": given["weight"].detach()}, beta=0.0)
    assert apart(found[3], expected[3]) < 1e-12


def test_the_backward_multiplies_by_what_comes_from_above():
    given = inputs()
    expected = run(given, beta=0.5)
    loss, _ = chunked_divergence(beta=0.5, **given)
    (-0.3 * loss).backward()
    for name, theirs in zip(("hidden", "weight"), expected[2:]):
        torch.testing.assert_close(given[name].grad, -0.3 * theirs)


# --- memory ---

def grown(function, given):
    """Bytes that a forward and a backward need beside their inputs, gradients included."""
    with LivePeak() as live:
        function(given).backward()
    given["hidden"].grad = given["weight"].grad = None
    return live.grown


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_logits_of_the_whole_pack_are_alive(dtype, beta, trained):
    """An eighth of the tokens at a time. A single (T, V) more would show, in 16 bits too; the plain
    form begins with two."""
    tokens, vocabulary = 512, 32768
    torch.manual_seed(0)
    given = {"hidden": torch.randn(tokens, 16).to(dtype).requires_grad_(),
             "weight": torch.randn(vocabulary, 16, requires_grad=trained),
             "teacher_hidden": torch.randn(tokens, 24).to(dtype),
             "teacher_weight": torch.randn(vocabulary, 24).to(dtype),
             "labels": torch.randint(0, vocabulary, (tokens,))}
    whole = tokens * vocabulary * 4
    ours = grown(lambda one: chunked_divergence(
        chunk=64, beta=beta, share=0.5, **one)[0], given)
    assert ours < whole


@pytest.mark.slow
def test_the_plain_form_needs_many_times_as_much():
    tokens, vocabulary = 512, 32768
    torch.manual_seed(0)
    given = {"hidden": torch.randn(tokens, 16).requires_grad_(),
             "weight": torch.randn(vocabulary, 16).requires_grad_(),
             "labels": torch.randint(0, vocabulary, (tokens,))}
    taught = torch.randn(tokens, vocabulary)
    assert grown(lambda one: plain(one["hidden"] @ one["weight"].t(), taught, one["labels"], 0.5,
                                   0.5)[0], given) > 8 * tokens * vocabulary * 4
