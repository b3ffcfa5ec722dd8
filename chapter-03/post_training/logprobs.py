"""log p of each token that the model was to write: what preferences, rewards and teachers are
made of. On a pack it is a vector (T,), and what an answer is worth is the sum over its document.

With `model.loss = chunked_log_probs` a model gives that vector where it gave the sum of losses."""

import torch
from torch.autograd.function import once_differentiable

from loss import CHUNK, addmm_, softmax_in_pieces_


def chunked_log_probs(hidden, weight, labels, chunk=CHUNK, labelled=None):
    """log softmax(hidden weightᵀ)[label] of each token, (T,) float32; 0 where the label is below 0.

    hidden (T, D), weight (V, D), labels (T,) int64; `chunk` and `labelled` as for
    `loss.chunked_cross_entropy`, which gives the sum of these with the opposite sign. No (T, V)
    tensor ever exists. A token's log p depends on its own hidden state alone, so its slope
    along that, (D,), is found in the forward, whatever is made of log p afterwards; and the
    backward multiplies. Only the gradient of a trained `weight` needs the logits a second time."""
    if labelled is None:
        labelled = (labels >= 0).nonzero()[:, 0]
    train = torch.is_grad_enabled()
    wanted = train and hidden.requires_grad, train and weight.requires_grad
    return _ChunkedLogProbs.apply(hidden, weight, labels, labelled, chunk, wanted)


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, labelled, chunk, wanted):
        sum_dtype = torch.promote_types(hidden.dtype, torch.float32)  # float64 only in tests
        cast = weight.to(hidden.dtype)
        losses = torch.zeros(len(hidden), dtype=sum_dtype, device=hidden.device)
        slopes = torch.zeros_like(hidden) if wanted[0] else None
        for rows in labelled.split(chunk):
            logits = hidden[rows] @ cast.t()  # (C, V)
            losses[rows] = softmax_in_pieces_(logits, labels[rows], wanted[0])
            if wanted[0]:
                slopes[rows] = logits @ cast  # they have become the loss's gradient
            del logits  # before the next chunk's are made
        ctx.chunk = chunk
        again = (hidden, weight, labels, labelled) if wanted[1] else (None,) * 4
        ctx.save_for_backward(slopes, *again)
        return -losses

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        slopes, hidden, weight, labels, labelled = ctx.saved_tensors
        grad_hidden = grad_weight = None
        if slopes is not None:  # multiplied in float32, rounded once
            grad_hidden = torch.mul(slopes, -gradient[:, None], out=torch.empty_like(slopes))
        if weight is not None:
            cast = weight.to(hidden.dtype)
            grad_weight = torch.zeros_like(weight, dtype=gradient.dtype)
            for rows in labelled.split(ctx.chunk):
                x = hidden[rows]
                logits = x @ cast.t()
                softmax_in_pieces_(logits, labels[rows], True)
                x = (x * -gradient[rows, None]).to(x.dtype)  # (C, D), not the logits, (C, V)
                addmm_(grad_weight, logits.t(), x)
                del logits
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None


def per_document(values, cu_seqlens):
    """The sum of `values` (T,) over each document, (N,); an empty document's is 0. Documents are
    summed one by one, so that the same values give the same bits, which atomic additions would not;
    and in float64, as answers can be long."""
    home = values.device
    device = "cpu" if home.type == "mps" else home  # Apple's has neither the sum nor float64
    sums = torch.segment_reduce(values.to(device).double(), "sum",
                                offsets=cu_seqlens.to(device).long(), initial=0, unsafe=True)
    return sums.to(values.dtype).to(home)
