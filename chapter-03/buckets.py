"""Where the time of a training step goes, by bucket: predicted from shapes, and measured.

The prediction runs the real model on tensors without numbers (PyTorch's fake tensors) and writes
down every operator that comes by, forward and backward: how many FLOPs, how many bytes. Divided
by what the device can do (ceilings.py) that is seconds. The measurement is torch.profiler's. Both
give an operator to its bucket by one function, `bucket`, so that both columns mean the same.
"""

import contextlib
import math
import re
import time
from collections import Counter
from dataclasses import dataclass
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import loss
import modeling_llama
from packing import IGNORE

BUCKETS = ("matrix products", "attention", "loss", "element-wise", "optimizer", "idle")
# AdamW's bytes per trained parameter. Fused it reads p, g, m, v and writes p, m, v. One operator
# after another: p ← p(1-lr·wd) 8, m ← m + (1-β₁)(g-m) 12, v ← β₂v 8, v ← v + (1-β₂)g² 12,
# √v 8, / 8, + ε 8, p ← p - m/… 16. Clipping reads g for the norm, reads and writes it to scale.
ADAMW_BYTES = {"fused": 28, "plain": 80}
CLIP_BYTES = 12

_open = []  # the regions that are open now, outermost first


# --- which bucket ---

@contextlib.contextmanager
def region(name):
    """Name a part of the step: in the trace, and for `bucket`."""
    _open.append(name)
    with record_function(name):
        yield
    _open.pop()


@contextlib.contextmanager
def named_parts(model):
    """While this is open the model's forward opens the region "forward", and its loss "loss"."""
    parts = contextlib.ExitStack()
    handles = [
        model.model.register_forward_pre_hook(lambda *_: parts.enter_context(region("forward"))),
        model.model.register_forward_hook(
            lambda *_: (parts.close(), parts.enter_context(region("loss")))[:0] or None),
        model.register_forward_hook(lambda *_: parts.close()),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def bucket(names):
    """The bucket of an operator, from its name and those of all that it runs in, inside out.

    The optimizer's operators are its own, whatever they are. Of the rest a matrix product is one
    wherever it occurs, the output head's too; what remains of the loss is the softmax. A name
    that is no operator (a region, a node of autograd) stands for the Python and C++ around the
    operators, where the device has nothing to do.
    """
    if any(name == "optimizer" or name.startswith("Optimizer.") for name in names):
        return "optimizer"
    operator = "::" in names[0] and not names[0].startswith(("autograd::", "torch::autograd"))
    if not operator and not names[0].startswith("## Call CompiledFxGraph"):
        return "idle"
    if any(re.search("attention|attn", name, re.IGNORECASE) for name in names):
        return "attention"
    if re.fullmatch(r"aten::(mm|addmm_?|bmm|baddbmm_?)", names[0]):
        return "matrix products"
    if any(name == "loss" or re.search("CrossEntropy|LogSoftmax|NllLoss", name) for name in names):
        return "loss"
    return "element-wise"


# --- predicted ---

@dataclass(frozen=True)
class Op:
    """An operator on shapes: what it computes and moves."""

    name: str
    bucket: str
    product: tuple  # of a matrix product: (m, k, n, whether each factor is transposed)
    flops: int
    dtype: torch.dtype  # the narrowest that it reads or writes
    reads: dict  # storage: bytes
    writes: dict

    @property
    def bytes(self):
        """Bytes read and written."""
        return sum(self.reads.values()) + sum(self.writes.values())


class _Recorder(TorchDispatchMode):
    """Writes down the operators that run while it is active."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = "::".join(str(function).split(".")[:2])
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        if not function.is_view and "empty" not in name and outputs and inputs:
            node = torch._C._current_autograd_node()
            names = [name, *([node.name()] if node else []), *reversed(_open)]
            self.ops.append(_op(name, bucket(names), inputs, outputs))
        return result


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _storage(tensor):
    return tensor.untyped_storage()._cdata


def _op(name, kind, inputs, outputs):
    reads = {_storage(t): t.nbytes for t in inputs}
    writes = {_storage(t): t.nbytes for t in outputs}
    if re.search("embedding$|gather|scatter|index", name):  # a row for each index, not the table
        rows = inputs[-1] if name.endswith("_") else outputs[0]
        reads, writes = {id(rows): rows.nbytes}, {_storage(outputs[0]): rows.nbytes}
    elif re.search(r"::(copy_|fill_|zero_|zeros_like|ones_like)$", name):
        del reads[_storage(inputs[0])]  # what it holds is not looked at
    product, flops = (), 0
    if kind == "matrix products":
        a, b = inputs[-2:]
        product = (*a.shape[-2:], b.shape[-1], a.stride(-1) != 1, b.stride(-1) != 1)
        flops = 2 * a.numel() * b.shape[-1]
    dtype = min((t.dtype for t in (*inputs, *outputs) if t.is_floating_point()),
                key=lambda dtype: dtype.itemsize, default=torch.float32)
    return Op(name, kind, product, flops, dtype, reads, writes)


class _Attention(torch.autograd.Function):
    """Stands for attention where there are only shapes: one operator each way."""

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return q.clone()

    @staticmethod
    def backward(ctx, grad):
        return tuple(t.clone() for t in ctx.saved_tensors)


def record(model, pack):
    """The `Op`s of one forward and backward of `pack`, without computing anything.

    Attention is two operators a layer, forward and backward, of the kind "attention".
    """
    count = len(pack["labels"])
    if pack["labels"].device.type == "cpu":  # as the chunked loss does there
        count = int((pack["labels"] != IGNORE).sum())

    def chunks(labels, chunk):
        parts = -(-count // chunk)
        return [slice(count * i // parts, count * (i + 1) // parts) for i in range(parts)]

    def attention(q, k, v, *_):
        with region("attention"):
            return _Attention.apply(q, k, v)

    with (FakeTensorMode() as mode, mock.patch.object(modeling_llama, "varlen_attention", attention),
          mock.patch.object(loss, "_chunks", chunks), named_parts(model), _Recorder() as recorder):
        fake = {name: mode.from_tensor(tensor)
                for name, tensor in (*model.named_parameters(), *model.named_buffers())}
        inputs = {name: mode.from_tensor(value) if torch.is_tensor(value) else value
                  for name, value in pack.items()}
        recorder.ops.clear()
        total = torch.func.functional_call(model, fake, kwargs=inputs)
        with region("backward"):
            (total / count).backward()
    return recorder.ops


def fused(ops):
    """The same work if every run of element-wise operators between two others were one kernel,
    as a compiler makes it: what comes from outside is read once, what is used later written."""
    last_use = {storage: i for i, op in enumerate(ops) for storage in op.reads}
    result, run = [], []
    for i, op in enumerate([*ops, None]):
        if op is not None and op.bucket == "element-wise":
            run.append(op)
            continue
        if run:
            made = {}
            reads = {}
            for each in run:
                reads.update({s: n for s, n in each.reads.items() if s not in made})
                made.update(each.writes)
            writes = {s: n for s, n in made.items() if last_use.get(s, 0) >= i}
            result.append(Op("fused", "element-wise", (), 0, run[0].dtype, reads, writes))
            run = []
        if op is not None:
            result.append(op)
    return result
