"""Cross-entropy of the output head without the (T, V) logits: one chunk of tokens after another.

The plain loss holds three float32 arrays of the logits' size at a time: 12 bytes for each of T · V,
7.5 GB at T = 4096 and V = 151,936. Here a chunk's softmax is followed at once, in the forward, by
its share of both gradients. So nothing of size (T, V) ever exists and nothing is
computed twice; the backward only multiplies by the gradient of the loss. Tokens without a label
are left out, which for instructions with short answers saves most of the head's work."""

import torch
from torch.autograd.function import once_differentiable

CHUNK = 1024  # tokens whose logits exist at a time, on a CPU


def chunk_for(vocabulary, gpu_memory=None):
    """How many tokens to take at a time; with more, the weight is read, and its gradient written,
    fewer times. On a CPU: CHUNK. On a GPU with `gpu_memory` bytes: the power of two whose 16-bit
    logits take at most 1/128 of them (2,048 with 80 GB, V = 151,936)."""
    if gpu_memory is None:
        return CHUNK
    return 2 ** max((gpu_memory // 128 // (2 * vocabulary)).bit_length() - 1, 7)


def chunked_cross_entropy(hidden, weight, labels, chunk=CHUNK, labelled=None, softmax=None):
    """Sum over the tokens with label ≥ 0 of -log softmax(hidden weightᵀ)[label], in float32.

    hidden (T, D), weight (V, D), labels (T,) int64, negative where not trained. Products run in the
    dtype of hidden: a float32 master weight is cast inside, and gets a float32 gradient, summed
    over the chunks in float32 whatever the dtypes. What is frozen costs no gradient. If no label is
    ≥ 0, the loss and the gradients are 0.

    At most `chunk` tokens are taken at a time. `labelled` (L,) int64 says where the labels ≥ 0 are.
    A pack has it (packing.py); otherwise it is computed, and a GPU has to be waited for. `softmax`
    is `softmax_in_pieces_` or, if it is to be compiled, `softmax_at_once_`."""
    if labelled is None:
        labelled = (labels >= 0).nonzero()[:, 0]
    train = torch.is_grad_enabled()
    wanted = train and hidden.requires_grad, train and weight.requires_grad
    return _ChunkedCrossEntropy.apply(
        hidden, weight, labels, labelled, chunk, wanted, softmax or softmax_in_pieces_)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, labelled, chunk, wanted, softmax):
        sum_dtype = torch.promote_types(hidden.dtype, torch.float32)  # float64 only in tests
        weight_dtype, weight = weight.dtype, weight.to(hidden.dtype)
        loss = torch.zeros((), dtype=sum_dtype, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if wanted[0] else None
        grad_weight = torch.zeros_like(weight, dtype=sum_dtype) if wanted[1] else None
        count, parts = len(labelled), -(-len(labelled) // chunk)  # equally many tokens each time
        for i in range(parts):
            rows = labelled[count * i // parts:count * (i + 1) // parts]
            x = hidden[rows]  # (C, D)
            logits = x @ weight.t()  # (C, V)
            loss += softmax(logits, labels[rows], any(wanted)).sum()
            gradient = logits  # `softmax` has overwritten them
            if wanted[0]:
                grad_hidden[rows] = gradient @ weight
            if wanted[1]:
                addmm_(grad_weight, gradient.t(), x)
            del logits, gradient  # before the next chunk's are made
        if wanted[1]:
            grad_weight = grad_weight.to(weight_dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, scale):
        grads = [None if grad is None else grad * scale for grad in ctx.saved_tensors]
        return *grads, *[None] * 5


def softmax_in_pieces_(logits, labels, gradient):
    """-log softmax(logits)[label], (C,), of logits (C, V) and labels (C,), in float32. With
    `gradient` the logits are overwritten by its gradient: softmax(logits), less 1 at the label. A
    few rows at a time, so that what is float32 stays in the cache, a CPU's or a GPU's."""
    sum_dtype = torch.promote_types(logits.dtype, torch.float32)
    losses = torch.empty(len(labels), 1, dtype=sum_dtype, device=logits.device)
    minus_one = torch.full((), -1, dtype=sum_dtype, device=logits.device)
    size = max(1, (2**21 if logits.device.type == "cpu" else 2**23) // logits.shape[1])
    for rows, goal, loss in zip(*(x.split(size) for x in (logits, labels[:, None], losses))):
        p = torch.log_softmax(rows, dim=-1, dtype=sum_dtype)  # log p, so far
        torch.neg(p.gather(1, goal), out=loss)
        if gradient:
            rows.copy_(p.exp_().scatter_add_(1, goal, minus_one.expand_as(goal)))
        del p  # before the next rows' is made
    return losses[:, 0]


def softmax_at_once_(logits, labels, gradient, compiled=None):
    """The same by `softmax_` or its compiled form, for any number of tokens."""
    # Read before they are overwritten: compiled code, as of PyTorch 2.11, may do it afterwards.
    at_label = logits.gather(1, labels[:, None])
    for tensor in (logits, at_label, labels):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return (compiled or softmax_)(logits, at_label, labels, gradient)


def softmax_(logits, at_label, labels, gradient):
    """`softmax_in_pieces_` in plain operations, which a compiler fuses into one kernel that reads
    the logits twice; at_label (C, 1) are the logits at the labels."""
    sum_dtype = torch.promote_types(logits.dtype, torch.float32)
    x = logits.to(sum_dtype)
    largest = x.amax(dim=1, keepdim=True)
    log_sum = (x - largest).exp().sum(dim=1, keepdim=True).log()
    losses = (log_sum - (at_label.to(sum_dtype) - largest))[:, 0]
    if gradient:
        is_label = torch.arange(logits.shape[1], device=logits.device) == labels[:, None]
        logits.copy_((x - largest - log_sum).exp() - is_label.to(sum_dtype))
    return losses


@torch.library.custom_op("bareloop::addmm_", mutates_args=("total",))
def addmm_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a b, in place and in the dtype of total; (m, n) += (m, k) (k, n). `a` and `b` have
    the same dtype: that of total, or 16 bits if total is float32. The compiler sees one operator
    that changes `total`; with PyTorch's own it would copy `total` first."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # in parts, as += makes a float32 copy of what it adds
        for part, rows in zip(a.split(2**13), total.split(2**13)):
            rows += part @ b


@addmm_.register_fake
def _(total, a, b):
    return None
