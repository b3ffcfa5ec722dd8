"""Learning from a teacher: at each token the student's distribution is to be the teacher's.

With p the teacher's distribution over the vocabulary and q the student's, both softmax(logits / τ):

    forward KL   β = 0      Σ p (log p - log q)            q covers all that p does
    reverse KL   β = 1      Σ q (log q - log p)            q stays within what p does (2306.08543)
    JSD_β        otherwise  β KL(p‖m) + (1-β) KL(q‖m),     m = β p + (1-β) q
                                                           (GKD, 2306.13649, equation 1)

A loss is (1-λ) of the label's cross-entropy and λ τ² of this; τ² keeps the gradient's size (Hinton
et al., 1503.02531, section 2). Both gradients along the logits are known at once, so the chunks of
loss.py serve here too: two (C, V) tensors exist, never two (T, V).
"""

import math

import torch
from torch.autograd.function import once_differentiable

from loss import CHUNK, addmm_


def chunked_divergence(hidden, weight, labels, chunk=CHUNK, labelled=None, *, teacher_hidden,
                       teacher_weight, vocabulary=None, share=1.0, beta=0.0, temperature=1.0):
    """(the sum of the losses over the tokens with label ≥ 0; (2,): the sums of cross-entropy and of
    divergence alone, without gradient), all float32.

    hidden (T, D), weight (V, D), labels (T,), `chunk` and `labelled` are as for
    `loss.chunked_cross_entropy`; teacher_hidden (T, D') and teacher_weight (V', D') are the
    teacher's, which gets no gradient. If V and V' differ, as checkpoints pad
    them differently, `vocabulary` is what both are cut to. `share` is λ, `temperature` τ.
    """
    if labelled is None:
        labelled = (labels >= 0).nonzero()[:, 0]
    train = torch.is_grad_enabled()
    wanted = train and hidden.requires_grad, train and weight.requires_grad
    return _ChunkedDivergence.apply(
        hidden, weight[:vocabulary], teacher_hidden, teacher_weight[:vocabulary].detach(), labels,
        labelled, chunk, wanted, (share, beta, temperature))


class _ChunkedDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, teacher_hidden, teacher_weight, labels, labelled, chunk,
                wanted, how):
        sum_dtype = torch.promote_types(hidden.dtype, torch.float32)  # float64 only in tests
        weight_dtype, weight = weight.dtype, weight.to(hidden.dtype)
        teacher_weight = teacher_weight.to(teacher_hidden.dtype)
        sums = torch.zeros(2, dtype=sum_dtype, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if wanted[0] else None
        grad_weight = torch.zeros_like(weight, dtype=sum_dtype) if wanted[1] else None
        count, parts = len(labelled), -(-len(labelled) // chunk)  # equally many tokens each time
        for i in range(parts):
            rows = labelled[count * i // parts:count * (i + 1) // parts]
            x = hidden[rows]  # (C, D)
            logits = x @ weight.t()  # (C, V)
            taught = teacher_hidden[rows] @ teacher_weight.t()  # (C, V)
            sums += divergence_in_pieces_(logits, taught, labels[rows], *how)
            if wanted[0]:
                grad_hidden[rows] = logits @ weight  # they have become the loss's gradient
            if wanted[1]:
                addmm_(grad_weight, logits.t(), x)
            del logits, taught  # before the next chunk's are made
        if wanted[1]:
            grad_weight = grad_weight.to(weight_dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(sums)
        share, _, temperature = how
        return (1 - share) * sums[0] + share * temperature**2 * sums[1], sums

    @staticmethod
    @once_differentiable
    def backward(ctx, scale, _):
        grads = [None if grad is None else grad * scale for grad in ctx.saved_tensors]
        return *grads, *[None] * 7


def divergence_in_pieces_(logits, taught, labels, share, beta, temperature):
    """(2,): the sums of cross-entropy and divergence over rows of logits (C, V), the student's, and
    `taught`, the teacher's. The logits are overwritten by the loss's gradient. A few rows at a
    time, so that what is float32 stays in the cache."""
    sum_dtype = torch.promote_types(logits.dtype, torch.float32)
    sums = torch.zeros(2, dtype=sum_dtype, device=logits.device)
    size = max(1, (2**20 if logits.device.type == "cpu" else 2**22) // logits.shape[1])
    for rows, others, goal in zip(*(x.split(size) for x in (logits, taught, labels[:, None]))):
        z = rows.to(sum_dtype)
        log_p = (others.to(sum_dtype) / temperature).log_softmax(-1)
        found, gradient = divergence(log_p, (z / temperature).log_softmax(-1), beta)
        gradient *= share * temperature  # τ², and 1/τ for the softmax's argument
        log_q = z.log_softmax(-1)
        sums += torch.stack((-log_q.gather(1, goal).sum(), found.sum()))
        if share < 1:
            gradient += (1 - share) * log_q.exp_().scatter_add_(
                1, goal, torch.full_like(goal, -1, dtype=sum_dtype))
        rows.copy_(gradient)
    return sums


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
    if beta == 1:
        return found[:, 0], q * (ratio - found)
    of_teacher = (log_p.exp() * (log_p - log_m)).sum(-1)
    return beta * of_teacher + (1 - beta) * found[:, 0], (1 - beta) * q * (ratio - found)
