"""The operators of a training step on shapes alone, and how long they will take.

The real model runs on tensors without numbers (PyTorch's fake tensors), and every operator that
comes by, forward and backward, is written down: how many FLOPs, how many bytes. Divided by what
the device can do (ceilings.py) that is seconds, bucket by bucket (buckets.py), before a step runs.
"""

import collections
import itertools
import re
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ceilings
from attention import block_attention
from buckets import BUCKETS, bucket, loss_of, open_regions, region
from loss import softmax_at_once_

# AdamW's bytes for each trained parameter. Fused it reads p, g, m, v and writes p, m, v. Otherwise it
# is one operator after another: p - lr·wd·p 8 bytes, m + (1-β₁)(g-m) 12, β₂v 8, + (1-β₂)g² 12, √ 8,
# / 8, + ε 8, p - lr·m/… 16. Clipping reads g for its norm, then reads and writes it.
ADAMW_BYTES = {True: 28, False: 80}  # whether it is fused
CLIP_BYTES = 12


@dataclass(frozen=True)
class Op:
    """An operator on shapes: what it computes and moves."""

    name: str
    bucket: str
    call: tuple | None  # for `ceilings.alone`
    flops: int
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
        self.ops, self.recent = [], collections.deque(maxlen=3)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        call = ceilings.call(function, args, kwargs or {}, lambda t: any(
            _storage(t) in touched for touched in self.recent))
        result = function(*args, **(kwargs or {}))
        name = "::".join(str(function).split(".")[:2])
        outputs = _tensors(result) or _tensors(args)[:1] * function._schema.is_mutable
        if outputs and not function.is_view and not re.search("empty|detach|prim::", name):
            node = torch._C._current_autograd_node()
            names = [name, *([node.name()] if node else []), *reversed(open_regions)]
            inputs = _tensors((args, kwargs))
            self.ops.append(_op(name, bucket(names), call, inputs, outputs))
            self.recent.append({**self.ops[-1].reads, **self.ops[-1].writes})
        return result


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _storage(tensor):
    return tensor.untyped_storage()._cdata


def _op(name, kind, call, inputs, outputs):
    reads = {_storage(t): t.nbytes for t in inputs}
    writes = {_storage(t): t.nbytes for t in outputs}
    if re.search("embedding$|gather|scatter|index", name):  # a row for each index, not the table
        rows = inputs[-1] if name.endswith("_") else outputs[0]
        reads, writes = {id(rows): rows.nbytes}, {_storage(outputs[0]): rows.nbytes}
    elif re.search("::(copy_|fill_|zero_|zeros_like|ones_like)$", name):
        reads.pop(_storage(inputs[0]))  # what it holds is not looked at
    flops = 2 * inputs[-2].numel() * inputs[-1].shape[-1] if kind == "matrix products" else 0
    return Op(name, kind, call, flops, reads, writes)


def set_attention(model, function):
    """Have all layers of the model attend by `function`; gives the one they had."""
    attentions = [layer.self_attn for layer in model.model.layers]
    before = attentions[0].attend
    for attention in attentions:
        attention.attend = function
    return before


def record(model, pack, finish=None, compiled=False):
    """The `Op`s of one forward and backward of `pack`, without computing anything; where the model
    is to be `compiled`, as `fused` has them.

    `finish(logits, labels)` gives the loss if the model shall not. Attention is two operators a
    layer, one each way, whichever the device has. Call it before `compile_model`.
    """
    def forward_and_backward():  # both while the tensors are exchanged: checkpointing looks twice
        total = loss_of(model, inputs, finish)
        with region("backward"):
            (total / len(inputs["labels"])).backward()

    whole = torch.nn.Module()
    whole.model, whole.forward = model, forward_and_backward
    compile_loss = compiled and pack["labels"].device.type == "cuda"
    model.softmax = softmax_at_once_ if compile_loss else None
    attention = set_attention(model, lambda q, k, v, ends, longest: block_attention(q, k, v, ends))
    try:
        with FakeTensorMode() as mode, _Recorder() as recorder:
            fake = {name: mode.from_tensor(tensor)
                    for name, tensor in (*whole.named_parameters(), *whole.named_buffers())}
            inputs = {name: mode.from_tensor(value) if torch.is_tensor(value) else value
                      for name, value in pack.items()}
            recorder.ops.clear()
            torch.func.functional_call(whole, fake, ())
    finally:
        model.softmax = None
        set_attention(model, attention)
    kinds = ("element-wise", "loss") if compile_loss else ("element-wise",)
    return fused(recorder.ops, kinds) if compiled else recorder.ops


def fused(ops, kinds=("element-wise",)):
    """The same work if every run of operators of one of these buckets between two others were one
    kernel, as a compiler makes it: what comes from outside is read once, what is used later
    written."""
    last_use = {storage: i for i, op in enumerate(ops) for storage in op.reads}
    result, end = [], 0
    for kind, group in itertools.groupby(ops, key=lambda op: op.bucket):
        group = list(group)
        end += len(group)
        if kind not in kinds:
            result += group
            continue
        reads, made = {}, {}
        for op in group:
            reads.update({s: size for s, size in op.reads.items() if s not in made})
            made.update(op.writes)
        writes = {s: size for s, size in made.items()
                  if end == len(ops) or last_use.get(s, 0) >= end}
        result.append(Op("fused", kind, None, 0, reads, writes))
    return result


def predict(model, pack, ops, device, fused_optimizer=True):
    """Seconds of a step by bucket: {bucket: (roofline, alone)}, before it has run.

    The first number is FLOPs and bytes over the two large ceilings; the second adds up what every
    operator takes alone on its own shapes, and the cost of calling it. `ops` are those of
    `record`, or `fused` of them.
    """
    config, dtype = model.config, model.compute_dtype
    lengths = tuple(length for length in pack["cu_seqlens"].diff().tolist() if length)
    width = config.num_attention_heads * config.head_dim
    pairs = sum(length * length for length in lengths) / 2  # the causal half
    forward, backward = ceilings.attention(
        model.model.layers[0].self_attn.attend, device, dtype, lengths,
        config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    peak, bandwidth = ceilings.large_product(device, dtype), ceilings.large_copy(device)
    roofline, alone = collections.Counter(), collections.Counter()
    for op in ops:
        if op.bucket == "attention":  # two products; in the backward five
            again = op.name.endswith("backward")
            roofline[op.bucket] += (5 if again else 2) * 2 * width * pairs / peak
            alone[op.bucket] += backward if again else forward
            continue
        best = op.flops / peak if op.flops else op.bytes / bandwidth
        roofline[op.bucket] += best
        alone[op.bucket] += ceilings.alone(device, *op.call) if op.call else best
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    roofline["optimizer"] = trained * (ADAMW_BYTES[fused_optimizer] + CLIP_BYTES) / bandwidth
    alone["optimizer"] = roofline["optimizer"]
    calls = len(ops) * ceilings.small_operator(device)
    # A GPU computes while Python calls, and is idle only where Python is the slower of the two.
    alone["idle"] = calls if device.type == "cpu" else max(0.0, calls - alone.total())
    return {name: (roofline[name], alone[name]) for name in BUCKETS}
