"""The pieces of a step, each alone: how long its kernels take, and what others would. For gpu.py.

A piece has the sizes that it has in a step of Qwen3-0.6B on documents of 2,048 tokens. Rows are
(what, measured, "none", "measured"); `figures["pieces"]` gets the milliseconds by name. Each of the
functions below gives (name, function, FLOPs or None) of some pieces.
"""

import functools
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from gpu_checks import loss_module, modeling, nf4
from gpu_targets import S, budget_of, source
from helpers import load

buckets = load("chapter-03/profiling/buckets.py")


def pieces(options, figures):
    """A list of generators of rows, of which one may fail without the others."""
    return [told(piece, options, figures) for piece in (
        attention, products, low_rank, dequantising, loss, norms, optimizer)]


def told(piece, options, figures):
    """The rows of what `piece` gives."""
    sizes = source("qwen3-0.6b", options.size)
    for name, function, flops in piece(options, sizes):
        milliseconds = 1e3 * buckets.duration(function, options.device, repeats=3)
        figures.setdefault("pieces", {})[name] = milliseconds
        rate = f", {flops / milliseconds / 1e9:,.0f} TFLOP/s" if flops else ""
        yield name, f"{milliseconds:.3f} ms{rate}", "none", "measured"


def normal(options, *shape):
    return torch.randn(*shape, device=options.device, dtype=getattr(torch, options.dtype))


def there_and_back(function, *inputs):
    """A function that computes `function(*inputs)` and its gradients."""
    gradient = torch.randn_like(function(*inputs))

    def both():
        for tensor in inputs:
            tensor.grad = None
        function(*inputs).backward(gradient)

    return both


def attention(options, sizes):
    """Of one layer, forward and backward: as the model calls it; with documents of no tokens
    besides, as `StaticShape` may add them; and PyTorch's other kernels on a batch."""
    T, length, d = budget_of(options), S[options.size], sizes["head_dim"]
    heads = [sizes[f"num_{kind}_heads"] for kind in ("attention", "key_value", "key_value")]
    qkv = [normal(options, T, count, d).requires_grad_() for count in heads]
    flops = 3.5 * 2 * T * length * heads[0] * d
    for name, empty in (("", 0), (", 143 empty documents besides", 143)):
        ends = torch.arange(0, T + 1, length, device=options.device)
        cu_seqlens = F.pad(ends, (0, empty), value=T).int()
        function = there_and_back(functools.partial(
            modeling.varlen_attention, cu_seqlens=cu_seqlens, max_seqlen=length), *qkv)
        yield f"attention, varlen{name}", function, flops
    batch = [x.detach().unflatten(0, (-1, length)).transpose(1, 2).requires_grad_() for x in qkv]

    def attend(q, k, v, backend):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        if options.device.type == "cuda" or backend != SDPBackend.CUDNN_ATTENTION:
            function = functools.partial(attend, backend=backend)
            yield f"attention, a batch, {backend.name}", there_and_back(function, *batch), flops


def products(options, sizes):
    """All products of the layers' matrices: forward, gradient of the input, of the weight."""
    T, D, width = budget_of(options), sizes["hidden_size"], sizes["intermediate_size"]
    q, kv = (sizes[f"num_{kind}_heads"] * sizes["head_dim"] for kind in (
        "attention", "key_value"))
    shapes = [(q, D), (kv, D), (kv, D), (D, q), (width, D), (width, D), (D, width)]
    each = [(normal(options, T, i), normal(options, o, i), normal(options, T, o))
            for o, i in shapes]
    layers, flops = sizes["num_hidden_layers"], sum(2 * T * o * i for o, i in shapes)

    def in_all_layers(product):
        for _ in range(layers):
            for tensors in each:
                product(*tensors)

    for name, product in (("x Wᵀ", lambda x, w, g: x @ w.t()), ("g W", lambda x, w, g: g @ w),
                          ("gᵀ x", lambda x, w, g: g.t() @ x)):
        yield (f"products of {layers} layers, {name}", functools.partial(in_all_layers, product),
               layers * flops)


def low_rank(options, sizes):
    """The products of one adapter of rank 16, on the feed-forward's first matrix."""
    T, D, out = budget_of(options), sizes["hidden_size"], sizes["intermediate_size"]
    x, A, B, y = (normal(options, *shape) for shape in ((T, D), (16, D), (out, 16), (T, out)))
    u, flops = x @ A.t(), 2 * T * 16 * out
    yield "rank 16: x Aᵀ", lambda: x @ A.t(), 2 * T * 16 * D
    yield "rank 16: y += u Bᵀ, in place", lambda: loss_module.addmm_(y, u, B.t()), flops
    yield "rank 16: y + u Bᵀ, a new tensor", lambda: torch.addmm(y, u, B.t()), flops
    yield "rank 16: g B", lambda: y @ B, flops
    yield "rank 16: gᵀ u", lambda: y.t() @ u, flops
    yield "rank 16: (g B)ᵀ x", lambda: u.t() @ x, 2 * T * 16 * D
    yield "rank 16: (g B) A", lambda: u @ A, 2 * T * 16 * D


def dequantising(options, sizes):
    """The NF4 weight of the feed-forward's first matrix, eager and compiled."""
    weight = normal(options, sizes["intermediate_size"], sizes["hidden_size"])
    for double in (False, True):
        layer = nf4.NF4Linear(nf4.quantize_nf4(weight, double))
        compiled = torch.compile(lambda layer=layer: layer.weight, backend=options.backend)
        yield f"NF4 to 16 bits{', double' * double}", lambda layer=layer: layer.weight, None
        yield f"NF4 to 16 bits{', double' * double}, compiled", compiled, None


def loss(options, sizes):
    """The chunked loss with gradients, by its chunk; with the softmax compiled, and in pieces."""
    T, D, V = budget_of(options), sizes["hidden_size"], sizes["vocab_size"]
    x = normal(options, T, D).requires_grad_()
    head = (0.05 * torch.randn(V, D, device=options.device)).requires_grad_()
    labels = torch.randint(0, V, (T,), device=options.device)
    compiled = functools.partial(loss_module.softmax_at_once_, compiled=torch.compile(
        loss_module.softmax_, backend=options.backend, fullgraph=True, dynamic=False))
    rows = torch.arange(T, device=options.device)
    for name, softmax, chunks in (("compiled", compiled, (512, 1024, 2048, 4096, 8192)),
                                  ("in pieces", None, (2048,))):
        for chunk in chunks:
            function = functools.partial(loss_module.chunked_cross_entropy, labels=labels,
                                         chunk=chunk, labelled=rows, softmax=softmax)
            yield (f"loss, softmax {name}, chunks of {chunk}", there_and_back(function, x, head),
                   6 * T * V * D)
    yield "loss, softmax compiled, chunks of 2048, frozen head", there_and_back(functools.partial(
        loss_module.chunked_cross_entropy, weight=head.detach(), labels=labels, chunk=2048,
        labelled=rows, softmax=compiled), x), 4 * T * V * D


def norms(options, sizes):
    """RMSNorm of a layer's input and of its queries, forward and backward; and the same in plain
    operations."""
    def plain(norm, x):
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + norm.eps)
        return x32.to(x.dtype) * norm.weight.to(x.dtype)

    T = budget_of(options)
    for what, *shape in (("input", T, sizes["hidden_size"]),
                         ("queries", T, sizes["num_attention_heads"], sizes["head_dim"])):
        norm = modeling.RMSNorm(shape[-1], 1e-6).to(options.device)
        x = normal(options, *shape).requires_grad_()
        yield f"norm of the {what}", there_and_back(norm, x), None
        yield f"norm of the {what}, in plain operations", there_and_back(
            functools.partial(plain, norm), x), None


def optimizer(options, sizes):
    """Clipping and AdamW of 600 million float32 parameters."""
    count = 6_000_000 if options.size == "full" else 60
    parameters = [torch.nn.Parameter(torch.randn(count, device=options.device))
                  for _ in range(100)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    yield "clipping", lambda: torch.nn.utils.clip_grad_norm_(parameters, 1.0), None
    yield "AdamW", torch.optim.AdamW(parameters, lr=1e-9, fused=True).step, None
