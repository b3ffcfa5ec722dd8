"""Learning from a teacher: at each token the student's distribution is to be the teacher's.

With p the teacher's distribution over the vocabulary and q the student's, both softmax(logits / τ):

    forward KL   β = 0      Σ p (log p - log q)            q covers all that p does
    reverse KL   β = 1      Σ q (log q - log p)            q stays within what p does (2306.08543)
    JSD_β        otherwise  β KL(p‖m) + (1-β) KL(q‖m),     m = β p + (1-β) q
                                                           (GKD, 2306.13649, equation 1)

A loss is (1-λ) of the label's cross-entropy and λ τ² of this; τ² keeps the gradient's size (Hinton
et al., 1503.02531, section 2). It takes the place of the softmax in loss.py, a chunk at a time."""

import math

import torch

from loss import CHUNK, chunked_cross_entropy


def chunked_divergence(hidden, weight, labels, chunk=CHUNK, labelled=None, *, teacher_hidden,
                       teacher_weight, vocabulary=None, share=1.0, beta=0.0, temperature=1.0):
    """(the sum of the losses over the tokens with label ≥ 0; (2,): the sums of cross-entropy and of
    divergence alone, without gradient), all float32.

    hidden (T, D), weight (V, D), labels (T,), `chunk` and `labelled` are as for
    `loss.chunked_cross_entropy`; teacher_hidden (T, D') and teacher_weight (V', D') are the
    teacher's, which gets no gradient. If V and V' differ, as checkpoints pad them differently,
    `vocabulary` is what both are cut to. `share` is λ, `temperature` τ."""
    if labelled is None:
        labelled = (labels >= 0).nonzero()[:, 0]
    head = teacher_weight[:vocabulary].detach().to(teacher_hidden.dtype)
    sums = torch.zeros(2, dtype=torch.promote_types(hidden.dtype, torch.float32),
                       device=hidden.device)  # float64 only in tests

    def losses_(logits, rows, gradient):
        """In place of a softmax: it gets rows for labels, as those are what it needs to know."""
        both = divergence_in_pieces_(logits, teacher_hidden[rows] @ head.t(), labels[rows], share,
                                     beta, temperature)
        sums.add_(both.sum(1))
        return (1 - share) * both[0] + share * temperature**2 * both[1]

    rows = torch.arange(len(labels), device=labels.device)
    return chunked_cross_entropy(
        hidden, weight[:vocabulary], rows, chunk, labelled, losses_), sums


def divergence_in_pieces_(logits, taught, labels, share, beta, temperature):
    """(2, C): cross-entropy and divergence of each row of logits (C, V), the student's, and of
    `taught`, the teacher's; the logits are overwritten by the loss's gradient. A few at a time."""
    sum_dtype = torch.promote_types(logits.dtype, torch.float32)
    found = torch.empty(2, len(labels), dtype=sum_dtype, device=logits.device)
    size = max(1, (2**20 if logits.device.type == "cpu" else 2**22) // logits.shape[1])
    for rows, others, goal, both in zip(*(x.split(size) for x in (
            logits, taught, labels[:, None])), found.split(size, 1)):
        z = rows.to(sum_dtype)
        log_p = (others.to(sum_dtype) / temperature).log_softmax(-1)
        both[1], gradient = divergence(log_p, (z / temperature).log_softmax(-1), beta)
        gradient *= share * temperature  # τ², and 1/τ for the softmax's argument
        log_q = z.log_softmax(-1)
        both[0] = -log_q.gather(1, goal)[:, 0]
        if share < 1:
            minus_one = torch.full_like(goal, -1, dtype=sum_dtype)
            gradient += (1 - share) * log_q.exp_().scatter_add_(1, goal, minus_one)
        rows.copy_(gradient)
    return found


def divergence(log_p, log_q, beta):
    """The divergence of each row (C,), and its gradient along q's logits (C, V), from the teacher's
    log p and the student's log q, (C, V)."""
    q = log_q.exp()
    if beta == 0:
        p = log_p.exp()
        return (p * (log_p - log_q)).sum(-1), q - p
    log_m = log_p if beta == 1 else torch.logaddexp(
        log_p + math.log(beta), log_q + math.log1p(-beta))
    ratio = log_q - log_m
    found = (q * ratio).sum(-1, keepdim=True)  # KL(q‖m)
    gradient = q * (ratio - found)
    if beta == 1:
        return found[:, 0], gradient
    of_teacher = (log_p.exp() * (log_p - log_m)).sum(-1)
    return beta * of_teacher + (1 - beta) * found[:, 0], (1 - beta) * gradient
