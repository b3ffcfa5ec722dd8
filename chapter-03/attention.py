"""Attention over packed documents where there is no FlashAttention: in blocks of queries.

A document at a time, as in chapters 1 and 2, is slow on a CPU: the tiles of PyTorch's kernel are
small products, its backward is slower still, and each document pays for calls. Here the pack is cut
into blocks of BLOCK queries, whatever documents they belong to. A block looks at the keys from the
beginning of its first document to its own end, and a mask leaves to each query those of its own
document, up to itself. Documents a (5 tokens), b (2) and c (1), in blocks of 2 queries:

                keys   a a a a a b b c
    1st block   a      1 .
                a      1 1
    2nd block   a      1 1 1 .
                a      1 1 1 1
    3rd block   a      1 1 1 1 1 .           1: seen
                b      . . . . . 1           .: computed and masked
    4th block   b                1 1 .       nothing: not computed
                c                . . 1

So the products are large and there are T / BLOCK of them, be the documents few or many. As in
FlashAttention (arXiv 2205.14135) the probabilities are not kept for the backward but computed
again.
"""

import torch

BLOCK = 128  # queries at a time: of more, more is computed and masked; of fewer, products are small
STEP = 32  # keys begin at a multiple: a CPU's library makes code anew for each shape of a product


@torch.library.custom_op("bareloop::block_attention", mutates_args=())
def block_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                    cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Causal softmax(q kᵀ / √d) v within each document: (T, H, d), as `varlen_attention` has it.

    One operator to autograd, to the compiler and to selective checkpointing: none looks inside.
    """
    (_, K, d), G = k.shape, q.shape[1] // k.shape[1]
    q, k, v = (_heads_first(x, K) for x in (q, k, v))
    output = torch.empty_like(q)
    for first, end, begin, mask in _blocks(cu_seqlens, q.dtype):
        rows, keys = slice(first * G, end * G), slice(begin, end)
        p = _probabilities(q[:, rows], k[:, keys], mask, d**-0.5)
        output[:, rows] = torch.bmm(p, v[:, keys])
    return _tokens_first(output, G)


@torch.library.custom_op("bareloop::block_attention_backward", mutates_args=())
def block_attention_backward(
        gradient: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        cu_seqlens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v, each of its shape."""
    (_, K, d), G = k.shape, q.shape[1] // k.shape[1]
    gradient, q, k, v = (_heads_first(x, K) for x in (gradient, q, k, v))
    wide = torch.promote_types(k.dtype, torch.float32)  # a key's gradient is several blocks' sum
    grad_q, grad_k, grad_v = torch.empty_like(q), *(torch.zeros_like(x, dtype=wide) for x in (k, v))
    for first, end, begin, mask in _blocks(cu_seqlens, q.dtype):
        rows, keys = slice(first * G, end * G), slice(begin, end)
        p = _probabilities(q[:, rows], k[:, keys], mask, d**-0.5)
        grad_v[:, keys] += torch.bmm(p.transpose(1, 2), gradient[:, rows])
        grad_p = torch.bmm(gradient[:, rows], v[:, keys].transpose(1, 2))
        grad_s = torch._softmax_backward_data(grad_p, p, -1, p.dtype)  # p (grad_p - Σ p grad_p)
        grad_q[:, rows] = torch.bmm(grad_s, k[:, keys])
        grad_k[:, keys] += torch.bmm(grad_s.transpose(1, 2), q[:, rows])
    return (_tokens_first(grad_q.mul_(d**-0.5), G),
            _tokens_first(grad_k.mul_(d**-0.5).to(k.dtype), 1),
            _tokens_first(grad_v.to(v.dtype), 1))


def _blocks(cu_seqlens, dtype):
    """(first query, end, first key, mask of 0 and -inf (queries, keys)) of each block."""
    starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff())  # (T,) of each token's document
    positions = torch.arange(len(starts), device=starts.device)
    for number, begin in enumerate((starts[::BLOCK] // STEP * STEP).tolist()):
        first, end = number * BLOCK, min(number * BLOCK + BLOCK, len(starts))
        keys, own = positions[begin:end], slice(first, end)
        hidden = (keys < starts[own, None]) | (keys > positions[own, None])
        mask = torch.zeros(hidden.shape, dtype=dtype, device=starts.device)
        yield first, end, begin, mask.masked_fill_(hidden, -torch.inf)


def _probabilities(q, k, mask, scale):
    """softmax(scale q kᵀ + mask), (K, B·G, keys), from q (K, B·G, d) and k (K, keys, d)."""
    scores = torch.bmm(q, k.transpose(1, 2))
    by_query = scores.unflatten(1, (len(mask), -1))  # (K, B, G, keys)
    torch.add(mask[:, None], by_query, alpha=scale, out=by_query)
    return scores.softmax(-1)


def _heads_first(x, K):
    """(T, H, d) -> (K, T·G, d), G = H / K: all that looks at one key/value head, in one matrix."""
    return x.unflatten(1, (K, -1)).transpose(0, 1).flatten(1, 2).contiguous()


def _tokens_first(x, G):
    """(K, T·G, d) -> (T, H, d)."""
    return x.unflatten(1, (-1, G)).transpose(0, 1).flatten(1, 2).contiguous()


# --- what autograd and the compiler need to know of the operators ---

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
