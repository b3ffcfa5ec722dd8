"""What this device can do, measured: the denominators of a prediction.

Two ceilings make a roofline: how many FLOPs a second in a large matrix product, how many bytes a
second in a large copy. No model reaches them. Its products have their own shapes, its other
operators read tensors that fit a cache or do not, in a dtype that the processor computes in or has
to convert. So each operator of a step can also be measured alone, on its own shapes.

Every function measures once and remembers.
"""

import functools
import statistics
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from modeling_llama import varlen_attention


def duration(function, device, prepare=None, repeats=5):
    """Seconds of a call: the median of a few, after one that does not count.

    `prepare` runs before each, outside the time. On CUDA each is ten calls in a row, so that the
    wait for the first does not count either.
    """
    calls, times = 10 if device.type == "cuda" else 1, []
    for _ in range(repeats + 1):
        if prepare is not None:
            prepare()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        for _ in range(calls):
            function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append((time.perf_counter() - started) / calls)
    return statistics.median(times[1:])


@functools.cache
def large_product(device, dtype):
    """FLOP/s of a square matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in "ab")
    return 2 * n**3 / duration(lambda: a @ b, device)


@functools.cache
def large_copy(device):
    """Bytes per second of a copy, those read and those written."""
    size = 2**30 if device.type == "cuda" else 2**28
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * size / duration(lambda: target.copy_(source), device)


@functools.cache
def small_operator(device):
    """Seconds that Python, dispatch and autograd take for an operator with nothing to do."""
    x = torch.ones(1, device=device, requires_grad=True)

    def chain():
        y = x
        for _ in range(500):
            y = y + 1
        y.backward()

    return duration(chain, device) / 1000


@functools.cache
def attention(device, dtype, lengths, heads, kv_heads, head_dim):
    """(forward, backward) seconds of attention in one layer, on documents of these lengths."""
    q, k, v = (torch.randn(sum(lengths), n, head_dim, device=device).to(dtype).requires_grad_()
               for n in (heads, kv_heads, kv_heads))
    ends = F.pad(torch.tensor(lengths, device=device).cumsum(0), (1, 0)).int()

    def forward():
        return varlen_attention(q, k, v, ends, max(lengths))

    output = forward()
    grad = torch.ones_like(output)
    backward = duration(
        lambda: torch.autograd.grad(output, (q, k, v), grad, retain_graph=True), device)
    return duration(forward, device), backward


class Layout(NamedTuple):
    """What matters of a tensor for the time of an operator on it."""

    shape: tuple
    stride: tuple
    dtype: torch.dtype


def call(function, args, kwargs):
    """An operator and its arguments, with a `Layout` for each tensor: hashable, for `alone`."""
    leaves, tree = tree_flatten((args, kwargs))
    leaves = [Layout(tuple(leaf.shape), leaf.stride(), leaf.dtype)
              if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    return function, tuple(leaves), tree


@functools.cache
@torch.no_grad()
def alone(device, function, leaves, tree):
    """Seconds of a `call` on random numbers, and on zeros where it wants integers."""
    def make(layout):
        size = 1 + sum((n - 1) * stride for n, stride in zip(layout.shape, layout.stride))
        if 0 in layout.shape:
            size = 0
        numbers = torch.rand if layout.dtype.is_floating_point else torch.zeros
        flat = numbers(size, device=device).to(layout.dtype)
        return flat.as_strided(layout.shape, layout.stride)

    args, kwargs = tree_unflatten(
        [make(leaf) if isinstance(leaf, Layout) else leaf for leaf in leaves], tree)
    inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    first = inputs[0].clone() if inputs else None

    def prepare():
        if "_." in str(function):  # in place: e to the e to the e ... is soon no number
            inputs[0].copy_(first)
        if device.type == "cpu":
            _flush()

    return duration(lambda: function(*args, **kwargs), device, prepare)


_FLUSH=torch.ones(2**24)
def _flush():
    _FLUSH.add_(1)
