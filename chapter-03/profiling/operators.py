"""The operators of a training step on shapes alone, and how long they will take on this device.

A copy of the model runs on tensors without numbers (PyTorch's fake tensors), and the FLOPs and
bytes of every operator are recorded. Divided by two ceilings, those of a large matrix product and
of a large copy, they give its roofline. No model reaches it: its products have other shapes, and
what is read may not be in the cache. So each operator is also measured alone, on its own shapes."""

import collections
import copy
import functools
import itertools
import re
from statistics import fmean
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from attention import block_attention
from buckets import BUCKETS, bucket, duration, loss_of, open_regions, region
from loss import chunked_cross_entropy, softmax_at_once_

from common.predict import mean_attended

# AdamW's bytes for each trained parameter. Fused it reads p, g, m, v and writes p, m, v. Otherwise
# it is one operator after another: p - lr·wd·p 8 bytes, m + (1-β₁)(g-m) 12, β₂v 8, + (1-β₂)g² 12,
# √ 8, / 8, + ε 8, p - lr·m/… 16. Clipping reads g for its norm, then reads and writes it.
ADAMW_BYTES = {True: 28, False: 80}  # whether it is fused
CLIP_BYTES = 12
larger_than_caches = functools.cache(lambda: torch.ones(2**24))


@functools.cache
def ceilings(device, dtype):
    """(FLOP/s of a large square product, bytes per second read and written by a large copy)."""
    n, size = (8192, 2**30) if device.type == "cuda" else (2048, 2**28)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in "ab")
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return (2 * n**3 / duration(lambda: a @ b, device),
            2 * size / duration(lambda: target.copy_(source), device))


def attention(model, pack, window):
    """(forward, backward) seconds of attention in one layer of the model, if it has this window."""
    config, labels = model.config, pack["labels"]
    q, k, v = (torch.randn(len(labels), heads, config.head_dim, device=labels.device)
               .to(model.compute_dtype).requires_grad_()
               for heads in (config.num_attention_heads, *[config.num_key_value_heads] * 2))

    def forward():
        return model.model.layers[0].self_attn.attend(
            q, k, v, pack["cu_seqlens"], pack["max_seqlen"], window)

    output = forward()
    grad = torch.ones_like(output)
    return duration(forward, labels.device), duration(
        lambda: torch.autograd.grad(output, (q, k, v), grad, retain_graph=True), labels.device)


class Layout(NamedTuple):
    """What the time of an operator depends on in a tensor."""
    shape: tuple
    stride: tuple
    dtype: torch.dtype
    cached: bool  # whether one of the operators just before has touched it

    def tensor(self, device):
        """A tensor like that, of random numbers, or of zeros if it holds integers."""
        size = 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.stride))
        numbers = torch.rand if self.dtype.is_floating_point else torch.zeros
        return numbers(size, device=device).to(self.dtype).as_strided(self.shape, self.stride)


@functools.cache
@torch.no_grad()
def alone(device, function, leaves, tree):
    """Seconds of an operator on flattened arguments with a `Layout` in place of each tensor."""
    made = [leaf.tensor(device) if isinstance(leaf, Layout) else leaf for leaf in leaves]
    args, kwargs = tree_unflatten(made, tree)
    original = args[0].clone() if function._schema.is_mutable else None

    def prepare():
        if original is not None:  # otherwise repeated changes, say exp_, would soon overflow
            args[0].copy_(original)
        if device.type == "cpu":
            larger_than_caches().add_(1)
            for leaf, tensor in zip(leaves, made):
                if isinstance(leaf, Layout) and leaf.cached:
                    tensor.clone()

    return duration(lambda: function(*args, **kwargs), device, prepare)


class Op(NamedTuple):
    """An operator on shapes: what it computes, reads and writes."""
    name: str
    bucket: str
    call: tuple | None  # for `alone`
    flops: int
    reads: dict  # storage: bytes
    writes: dict


class Recorder(TorchDispatchMode):
    """Records the operators that run while it is active."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        leaves, tree = tree_flatten((args, kwargs or {}))
        touched = {storage for op in self.ops[-3:] for storage in (*op.reads, *op.writes)}
        layouts = tuple(Layout(tuple(leaf.shape), leaf.stride(), leaf.dtype,
                               leaf.untyped_storage() in touched)
                        if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
        result = function(*args, **(kwargs or {}))
        name = "::".join(str(function).split(".")[:2])
        inputs = _tensors(leaves)
        outputs = _tensors(result) or inputs[:1] * function._schema.is_mutable
        if not outputs or function.is_view or re.search("empty|detach|prim::", name):
            return result
        node = torch._C._current_autograd_node()
        kind = bucket([name, *([node.name()] if node else []), *reversed(open_regions)])
        flops = 2 * inputs[-2].numel() * inputs[-1].shape[-1] if kind == "matrix products" else 0
        if re.search("::(copy_|fill_|zero_|zeros_like|ones_like)$", name):
            inputs = inputs[1:]  # the old content is not read
        reads, writes = ({tensor.untyped_storage(): tensor.nbytes for tensor in tensors}
                         for tensors in (inputs, outputs))
        if re.search("embedding$|gather|scatter|index", name):  # a row for each, not the table
            rows = inputs[-1] if name.endswith("_") else outputs[0]
            reads, writes = ({tensor.untyped_storage(): rows.nbytes}
                             for tensor in (inputs[0], outputs[0]))
        self.ops.append(Op(name, kind, (function, layouts, tree), flops, reads, writes))
        return result


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def record(model, pack, compiled=False):
    """The `Op`s of one forward and backward of `pack`; those that `fused` gives if the model, not
    compiled yet, will be `compiled`. Attention is two operators a layer, one each way."""
    compile_loss = compiled and pack["labels"].device.type == "cuda"
    fake = FakeTensorMode()
    with FakeCopyMode(fake):
        model, pack = copy.deepcopy((model, pack))
    model.loss = functools.partial(chunked_cross_entropy,
                                   softmax=softmax_at_once_ if compile_loss else None)
    for layer in model.model.layers:
        layer.self_attn.attend = lambda q, k, v, ends, longest, window: block_attention(
            q, k, v, ends, window)
    with fake, Recorder() as recorder:
        total = loss_of(model, pack)
        with region("backward"):
            (total / len(pack["labels"])).backward()
    kinds = ("element-wise", "loss") if compile_loss else ("element-wise",)
    return fused(recorder.ops, kinds) if compiled else recorder.ops


def fused(ops, kinds=("element-wise",)):
    """The same work with consecutive operators of one of these buckets joined in one kernel, as a
    compiler does: input from outside is read once, and what is used only inside is not written."""
    last_use = {storage: i for i, op in enumerate(ops) for storage in op.reads}
    result, end = [], 0
    for kind, group in itertools.groupby(ops, key=lambda op: op.bucket):
        group = list(group)
        end += len(group)
        if kind in kinds:
            reads, made = {}, {}
            for op in group:
                reads |= {s: size for s, size in op.reads.items() if s not in made}
                made |= op.writes
            writes = {s: size for s, size in made.items() if last_use.get(s, end) >= end}
            group = [Op("fused", kind, None, 0, reads, writes)]
        result += group
    return result


def predict(model, pack, compiled=False, fused_optimizer=True):
    """Seconds of a step by bucket: {bucket: (roofline, alone)}, before it has run. Alone adds up
    what every operator takes by itself; for idle, what calling them costs."""
    config, device = model.config, pack["labels"].device
    ops = record(model, pack, compiled)
    width = config.num_attention_heads * config.head_dim
    lengths = pack["cu_seqlens"].diff().tolist()  # below, means over layers, whose windows differ
    pairs = fmean(mean_attended(lengths, window) for window in config.windows) * sum(lengths) / 2
    times = {window: attention(model, pack, window) for window in set(config.windows)}
    forward, backward = map(fmean, zip(*(times[window] for window in config.windows)))
    peak, bandwidth = ceilings(device, model.compute_dtype)
    roofline, own = collections.Counter(), collections.Counter()
    for op in ops:
        if op.bucket == "attention":  # two products; in the backward five
            again = op.name.endswith("backward")
            roofline[op.bucket] += (5 if again else 2) * 2 * width * pairs / peak
            own[op.bucket] += backward if again else forward
            continue
        moved = sum(op.reads.values()) + sum(op.writes.values())
        best = op.flops / peak if op.flops else moved / bandwidth
        roofline[op.bucket] += best
        own[op.bucket] += alone(device, *op.call) if op.call else best
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    roofline["optimizer"] = trained * (ADAMW_BYTES[fused_optimizer] + CLIP_BYTES) / bandwidth
    own["optimizer"] = roofline["optimizer"]
    number = torch.ones(1, device=device, requires_grad=True)
    calls = len(ops) * duration(lambda: number + 1, device)  # of Python, dispatch and autograd
    # A GPU computes while Python calls, and is idle only if Python is the slower of the two.
    own["idle"] = calls if device.type == "cpu" else max(0.0, calls - own.total())
    return {name: (roofline[name], own[name]) for name in BUCKETS}
