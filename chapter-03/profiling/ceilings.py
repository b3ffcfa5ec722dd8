"""What this device can do, measured: the denominators of a prediction.

Two ceilings make a roofline: how many FLOPs a second in a large matrix product, how many bytes a
second in a large copy. No model reaches them. Its products have their own shapes, its other
operators read tensors that are in the cache or are not, in a dtype that the processor computes in
or has to convert. So each operator of a step can also be measured alone, on its own shapes.

Every function measures once and remembers.
"""

import functools
import statistics
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_flatten, tree_unflatten


def duration(function, device, prepare=lambda: None, repeats=5):
    """Seconds of a call: the median of a few, after one that does not count.

    `prepare` runs before each, outside the time. On CUDA each is ten calls in a row, so that the
    wait for the first of them hardly counts.
    """
    calls, times = 10 if device.type == "cuda" else 1, []
    for _ in range(repeats + 1):
        prepare()
        wait(device)
        started = time.perf_counter()
        for _ in range(calls):
            function()
        wait(device)
        times.append((time.perf_counter() - started) / calls)
    return statistics.median(times[1:])


def wait(device):
    """Until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
def attention(function, device, dtype, lengths, heads, kv_heads, head_dim):
    """(forward, backward) seconds of attention in one layer, on documents of these lengths.

    `function` is the model's: (q, k, v, cu_seqlens, max_seqlen) to the output.
    """
    q, k, v = (torch.randn(sum(lengths), n, head_dim, device=device).to(dtype).requires_grad_()
               for n in (heads, kv_heads, kv_heads))
    ends = F.pad(torch.tensor(lengths, device=device).cumsum(0), (1, 0)).int()

    def forward():
        return function(q, k, v, ends, max(lengths))

    output = forward()
    grad = torch.ones_like(output)
    backward = duration(
        lambda: torch.autograd.grad(output, (q, k, v), grad, retain_graph=True), device)
    return duration(forward, device), backward


larger_than_caches = functools.cache(lambda: torch.ones(2**24))


class Layout(NamedTuple):
    """What matters of a tensor for the time of an operator on it."""

    shape: tuple
    stride: tuple
    dtype: torch.dtype
    cached: bool  # whether an operator just before has touched it

    def tensor(self, device):
        """One like it, of random numbers, or of zeros where integers are wanted."""
        size = 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.stride))
        numbers = torch.rand if self.dtype.is_floating_point else torch.zeros
        flat = numbers(size * (0 not in self.shape), device=device).to(self.dtype)
        return flat.as_strided(self.shape, self.stride)


def call(function, args, kwargs, cached):
    """An operator and its arguments, a `Layout` in place of each tensor: hashable, for `alone`.

    `cached` says of a tensor whether it is in the cache.
    """
    leaves, tree = tree_flatten((args, kwargs))
    leaves = [Layout(tuple(leaf.shape), leaf.stride(), leaf.dtype, cached(leaf))
              if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    return function, tuple(leaves), tree


@functools.cache
@torch.no_grad()
def alone(device, function, leaves, tree):
    """Seconds of a `call`."""
    made = [leaf.tensor(device) if isinstance(leaf, Layout) else leaf for leaf in leaves]
    args, kwargs = tree_unflatten(made, tree)
    mutable = function._schema.is_mutable
    original = args[0].clone() if mutable else None

    def prepare():
        if mutable:  # or e to the power of e to the power of e ... is soon not a number
            args[0].copy_(original)
        if device.type == "cpu":
            larger_than_caches().add_(1)
            for layout, tensor in zip(leaves, made):
                if isinstance(layout, Layout) and layout.cached:
                    tensor.clone()

    return duration(lambda: function(*args, **kwargs), device, prepare)
