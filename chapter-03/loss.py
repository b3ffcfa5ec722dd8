"""Cross-entropy of the output head without the (T, V) logits: chunk after chunk of tokens.

The plain loss holds the logits in 16 bits and three float32 arrays of their size, 14 bytes for
each of T · V: 8.7 GB at T = 4096, V = 151,936. Here the softmax of a chunk of tokens is followed at once
by its share of both gradients, in the forward, so that nothing of size (T, V) ever exists and
nothing is computed twice. The backward only multiplies by the gradient of the loss.
"""

import torch

SCRATCH = 2**21  # float32 logits exponentiated at a time when eager: what a cache can hold


def chunked_cross_entropy(hidden, weight, labels, chunk=1024):
    """Sum over the tokens with label ≥ 0 of -log softmax(hidden weightᵀ)[label], float32.

    hidden (T, D), weight (V, D), labels (T,) int64, negative where not trained. Products run in
    the dtype of hidden; a float32 master weight is cast inside and its gradient is float32, added
    up over chunks in float32 whatever the dtypes. A frozen weight costs no gradient, evaluation
    none at all. With no label ≥ 0 the loss is 0 and so are the gradients.

    chunk: tokens at a time, which takes chunk · V · 2 bytes for 16-bit logits. Small ones leave
    the matrix products waiting for memory.
    """
    train = torch.is_grad_enabled()
    wanted = (train and hidden.requires_grad, train and weight.requires_grad)
    return _ChunkedCrossEntropy.apply(hidden, weight, labels, chunk, wanted)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, chunk, wanted):
        loss, *gradients = _forward(hidden, weight, labels, chunk, *wanted)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx, scale):
        grads = [None if g is None else g * scale.to(g.dtype) for g in ctx.saved_tensors]
        return *grads, None, None, None
