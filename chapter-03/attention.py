"""Attention over packed documents where there is no FlashAttention: in blocks of queries.

A document at a time, as in chapters 1 and 2, is slow on a CPU: the tiles of PyTorch's kernel are
small products, its backward is slower still, and each document pays for calls. Here the pack is cut
into blocks of BLOCK queries, whatever documents they belong to. A block looks at the keys from the
beginning of its first document to its own end, and a mask hides from each query all but those of
its own document, up to itself. Documents a (5 tokens), b (2) and c (1), in blocks of 2 queries:

                keys   a a a a a b b c
    1st block   a      1 .
                a      1 1
    2nd block   a      1 1 1 .
                a      1 1 1 1
    3rd block   a      1 1 1 1 1 .           1: seen
                b      . . . . . 1           .: computed and masked
    4th block   b                1 1 .       nothing: not computed
                c                . . 1

So the products are large, and there are T / BLOCK of them, however many the documents. As in
FlashAttention (arXiv 2205.14135), probabilities are computed again in the backward, not kept."""

import torch

BLOCK = 128  # queries at a time: with more, more is masked in vain; with fewer, products are small
STEP = 32  # keys begin at a multiple: a CPU's library generates code for each shape of a product


@torch.library.custom_op("bareloop::block_attention", mutates_args=())
def block_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                    cu_seqlens: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """Causal softmax(q kᵀ / √d) v within each document: (T, H, d), as in `varlen_attention`.
    Autograd, the compiler and selective checkpointing see one operator and do not look inside."""
    (_, K, d), G = k.shape, q.shape[1] // k.shape[1]
    output = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for first, end, begin, mask in _blocks(cu_seqlens, window, q.dtype):
        q_b, k_b, v_b = (_by_head(x, K) for x in (q[first:end], k[begin:end], v[begin:end]))
        p = _probabilities(q_b, k_b, mask, d**-0.5)
        output[first:end] = _by_token(torch.bmm(p, v_b), G)
    return output


@torch.library.custom_op("bareloop::block_attention_backward", mutates_args=())
def block_attention_backward(
        gradient: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        cu_seqlens: torch.Tensor,
        window: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v, each of its shape."""
    (_, K, d), G = k.shape, q.shape[1] // k.shape[1]
    sum_dtype = torch.promote_types(k.dtype, torch.float32)  # gradients of keys sum over blocks
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    grad_k, grad_v = (torch.zeros(k.shape, dtype=sum_dtype, device=k.device) for _ in "kv")
    for first, end, begin, mask in _blocks(cu_seqlens, window, q.dtype):
        q_b, gradient_b = (_by_head(x[first:end], K) for x in (q, gradient))
        k_b, v_b = (_by_head(x[begin:end], K) for x in (k, v))
        p = _probabilities(q_b, k_b, mask, d**-0.5)
        grad_p = torch.bmm(gradient_b, v_b.transpose(1, 2))
        grad_s = torch._softmax_backward_data(grad_p, p, -1, p.dtype)  # p (grad_p - Σ p grad_p)
        grad_q[first:end] = _by_token(torch.bmm(grad_s, k_b), G)
        grad_k[begin:end] += _by_token(torch.bmm(grad_s.transpose(1, 2), q_b), 1)
        grad_v[begin:end] += _by_token(torch.bmm(p.transpose(1, 2), gradient_b), 1)
    return grad_q.mul_(d**-0.5), grad_k.mul_(d**-0.5).to(k.dtype), grad_v.to(v.dtype)


def _blocks(cu_seqlens, window, dtype):
    """(first query, end, first key, mask of 0 and -inf (queries, keys)) of each block."""
    starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff())  # (T,) of each token's document
    positions = torch.arange(len(starts), device=starts.device)
    if window is not None:  # the first that a token sees begins no earlier than the window
        starts = torch.maximum(starts, positions - (window - 1))
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


def _by_head(x, K):
    """(B, H, d) -> (K, B·G, d), G = H / K: all queries of one key/value head in one matrix."""
    return x.unflatten(1, (K, -1)).transpose(0, 1).flatten(1, 2).contiguous()


def _by_token(x, G):
    """(K, B·G, d) -> (B, H, d)."""
    return x.unflatten(1, (-1, G)).transpose(0, 1).flatten(1, 2)


# --- what autograd and the compiler need to know of the operators ---

def _keep_inputs(ctx, inputs, output):
    *tensors, ctx.window = inputs
    ctx.save_for_backward(*tensors)


block_attention.register_fake(
    lambda q, k, v, cu_seqlens, window=None: q.new_empty(q.shape))
block_attention_backward.register_fake(
    lambda gradient, q, k, v, cu_seqlens, window: tuple(x.new_empty(x.shape) for x in (q, k, v)))
block_attention.register_autograd(
    lambda ctx, gradient: (
        *block_attention_backward(gradient, *ctx.saved_tensors, ctx.window), None, None),
    setup_context=_keep_inputs)
