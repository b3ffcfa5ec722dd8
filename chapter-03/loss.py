"""Cross-entropy of the output head without the (T, V) logits: one chunk of tokens after another.

The plain loss holds the logits in 16 bits and three float32 arrays of their size: 14 bytes for
each of T · V, 8.7 GB at T = 4096 and V = 151,936. Here a chunk's softmax is followed at once, in
the forward, by its share of both gradients. So nothing of size (T, V) ever exists and nothing is
computed twice; the backward only multiplies by the gradient of the loss.
"""

import torch
from torch.autograd.function import once_differentiable



def chunked_cross_entropy(hidden, weight, labels, chunk=1024):
    """Sum over the tokens with label ≥ 0 of -log softmax(hidden weightᵀ)[label], in float32.

    hidden (T, D), weight (V, D), labels (T,) int64, negative where not trained. Products run in
    the dtype of hidden: a float32 master weight is cast inside, and gets a float32 gradient,
    summed over the chunks in float32 whatever the dtypes. A frozen weight costs no gradient, and
    evaluation costs none at all. If no label is ≥ 0, the loss and the gradients are 0.

    `chunk` is the most tokens taken at a time; their logits take chunk · V elements. Small chunks
    are slow: each reads the whole weight and adds up a whole gradient of it.
    """
    train = torch.is_grad_enabled()
    wanted = train and hidden.requires_grad, train and weight.requires_grad
    return _ChunkedCrossEntropy.apply(hidden, weight, labels, chunk, wanted)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, chunk, wanted):
        wide = torch.promote_types(hidden.dtype, torch.float32)  # float64 only in tests
        weight_dtype, weight = weight.dtype, weight.to(hidden.dtype)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if wanted[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if wanted[1] else None
        for rows in _chunks(labels, chunk):
            x = hidden[rows]  # (C, D)
            logits = x @ weight.t()  # (C, V)
            summed, grad = _cross_entropy(logits, labels[rows], wide, any(wanted))
            loss += summed
            if wanted[0]:
                grad_hidden[rows] = grad @ weight
            if wanted[1] and x.dtype == wide:
                grad_weight.addmm_(grad.t(), x)
            elif wanted[1] and torch.compiler.is_compiling():
                grad_weight += grad.t() @ x
            elif wanted[1]:  # in parts, as += makes a float32 copy of what it adds
                for part, total in zip(grad.split(2**13, dim=1), grad_weight.split(2**13)):
                    total += part.t() @ x
            del logits, grad  # before the next chunk's are made
        if wanted[1]:
            grad_weight = grad_weight.to(weight_dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, scale):
        grads = [None if grad is None else grad * scale for grad in ctx.saved_tensors]
        return *grads, None, None, None


def _chunks(labels, chunk):
    """What to index the pack with: at most `chunk` tokens at a time, equally many each time.

    On a CPU only the labelled ones: the others' logits are not needed. A GPU would have to stop
    and tell how many there are, and a compiled graph has one shape only.
    """
    rows, count = None, len(labels)
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        rows = (labels >= 0).nonzero()[:, 0]
        count = len(rows)
    parts = -(-count // chunk)
    slices = [slice(count * i // parts, count * (i + 1) // parts) for i in range(parts)]
    return slices if count == len(labels) else [rows[part] for part in slices]


def _cross_entropy(logits, labels, wide, gradient):
    """The sum of the losses, and d(sum)/d(logits): `logits` itself, overwritten, when eager."""
    masked, target = (labels < 0)[:, None], labels.clamp(min=0)[:, None]
    if torch.compiler.is_compiling():  # becomes one kernel
        log_p = torch.log_softmax(logits, dim=-1, dtype=wide)
        loss = -log_p.gather(1, target).masked_fill(masked, 0).sum()
        onehot = torch.arange(logits.shape[1], device=logits.device) == target
        return loss, (log_p.exp() - onehot.to(wide)).masked_fill(masked, 0).to(logits.dtype)
    loss = torch.zeros((), dtype=wide, device=logits.device)
    minus_one = target.new_full((), -1, dtype=wide)
    # A few rows at a time, whose float32 copy stays in a CPU's cache (on a GPU: 256 MB).
    size = max(1, (2**21 if logits.device.type == "cpu" else 2**26) // logits.shape[1])
    for rows, goal, out in zip(logits.split(size), target.split(size), masked.split(size)):
        p = torch.log_softmax(rows, dim=-1, dtype=wide)  # log p, so far
        loss -= p.gather(1, goal).masked_fill_(out, 0).sum()
        if gradient:
            p.exp_().scatter_add_(1, goal, minus_one.expand_as(goal))
            rows.copy_(p if logits.device.type == "cpu" else p.masked_fill_(out, 0))
        del p  # before the next rows' is made
    return loss, logits
