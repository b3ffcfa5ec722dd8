"""Attention over packed documents where there is no FlashAttention: in blocks of queries.

A document at a time, as in chapters 1 and 2, is slow on a CPU: PyTorch's kernel for it works in
tiles that are too small for the matrix unit, and its backward is worse. Here the pack is cut into
blocks of BLOCK queries, whatever documents they belong to. A block looks at the keys from the
beginning of its first document to its own end, and a mask leaves to each query its own document's,
up to itself:

                     keys  a a a a a b b b b c
    block of queries  a a  1
                           1 1                      (a block of 2 queries; the first two blocks
                      a a  1 1 1                     see only document a, the third the end of a
                           1 1 1 1                   and the beginning of b)
                      a b  1 1 1 1 1
                                     1

So most of what no query may see is never computed, the matrix products are large, and there are
T / BLOCK of them, be the documents few and long or many and short. As in FlashAttention (arXiv
2205.14135) the probabilities are not kept for the backward, but computed again.
"""

import torch

BLOCK = 128


def _blocks(cu_seqlens, dtype):
    """(first, end, begin of the keys, mask (queries, keys) of 0 and -inf) of each block."""
    starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff())  # (T,) where one's document is
    begins, positions = (starts[::BLOCK] // BLOCK * BLOCK).tolist(), torch.arange(len(starts), device=starts.device)
    for number, begin in enumerate(begins):
        first = number * BLOCK
        end = min(first + BLOCK, len(starts))
        keys, queries = positions[begin:end], slice(first, end)
        hidden = (keys < starts[queries, None]) | (keys > positions[queries, None])
        yield first, end, begin, torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, -torch.inf)


def _probabilities(q, k, mask, scale):
    """softmax(scale q kᵀ + mask), (K, B·G, keys), from q (K, B·G, d) and k (K, keys, d)."""
    scores = torch.bmm(q, k.transpose(1, 2))
    grouped = scores.unflatten(1, (len(mask), -1))  # (K, B, G, keys)
    torch.add(mask[:, None], grouped, alpha=scale, out=grouped)
    return scores.softmax(-1)


def _heads_first(x, heads):
    """(T, H, d) -> (K, T·G, d), G = H / K: the query heads of a key/value head are its rows."""
    return x.unflatten(1, (heads, -1)).transpose(0, 1).flatten(1, 2).contiguous()


def _tokens_first(x, like):
    """(K, T·G, d) -> (T, H, d)."""
    return x.unflatten(1, (len(like), -1)).transpose(0, 1).flatten(1, 2).contiguous()


@torch.library.custom_op("bareloop::block_attention", mutates_args=())
def block_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                    cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Causal softmax(q kᵀ / √d) v within each document, as `varlen_attention` describes it.

    One operator to autograd, to the compiler and to selective checkpointing; none looks inside.
    """
    (_, K, d), G, like = k.shape, q.shape[1] // k.shape[1], q
    q, k, v = (_heads_first(x, K) for x in (q, k, v))
    output = torch.empty_like(q)
    for first, end, begin, mask in _blocks(cu_seqlens, q.dtype):
        rows = slice(first * G, end * G)
        p = _probabilities(q[:, rows], k[:, begin:end], mask, d**-0.5)
        output[:, rows] = torch.bmm(p, v[:, begin:end])
    return _tokens_first(output, like)


@torch.library.custom_op("bareloop::block_attention_backward", mutates_args=())
def block_attention_backward(
        gradient: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        cu_seqlens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v."""
    (_, K, d), G, like_q, like_k = k.shape, q.shape[1] // k.shape[1], q, k
    gradient, q, k, v = (_heads_first(x, K) for x in (gradient, q, k, v))
    grad_q = torch.empty_like(q)
    grad_k, grad_v = (torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
                      for x in (k, v))  # the sum of several blocks'
    for first, end, begin, mask in _blocks(cu_seqlens, q.dtype):
        rows, keys = slice(first * G, end * G), slice(begin, end)
        p = _probabilities(q[:, rows], k[:, keys], mask, d**-0.5)
        grad_v[:, keys] += torch.bmm(p.transpose(1, 2), gradient[:, rows])
        grad_p = torch.bmm(gradient[:, rows], v[:, keys].transpose(1, 2))
        grad_s = torch._softmax_backward_data(grad_p, p, -1, p.dtype).mul_(d**-0.5)
        grad_q[:, rows] = torch.bmm(grad_s, k[:, keys])
        grad_k[:, keys] += torch.bmm(grad_s.transpose(1, 2), q[:, rows])
    return (_tokens_first(grad_q, like_q),
            *(_tokens_first(x.to(k.dtype), like_k) for x in (grad_k, grad_v)))


@block_attention.register_fake
def _(q, k, v, cu_seqlens):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@block_attention_backward.register_fake
def _(gradient, q, k, v, cu_seqlens):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, gradient):
    return *block_attention_backward(gradient, *ctx.saved_tensors), None


block_attention.register_autograd(_backward, setup_context=_setup_context)
