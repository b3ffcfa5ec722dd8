"""Where the time of a training step goes, by bucket: predicted from shapes, and measured.

The prediction runs the real model on tensors without numbers (PyTorch's fake tensors) and writes
down every operator that comes by, forward and backward: how many FLOPs, how many bytes. Divided
by what the device can do (ceilings.py) that is seconds. The measurement is torch.profiler's. Both
give an operator to its bucket by one function, `bucket`, so that both columns mean the same.
"""

import contextlib
import re
from collections import Counter
from dataclasses import dataclass
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ceilings
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
    """While this is open, the model's forward opens the region "forward", and its head "loss"."""
    part = contextlib.ExitStack()

    def begin(name):
        part.close()
        part.enter_context(region(name))

    handles = [model.model.register_forward_pre_hook(lambda *_: begin("forward")),
               model.model.register_forward_hook(lambda *_: begin("loss")),
               model.register_forward_hook(lambda *_: part.close())]
    try:
        yield
    finally:
        part.close()
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
    call: tuple | None  # for `ceilings.alone`
    flops: int
    reads: dict  # storage: bytes
    writes: dict

    @property
    def bytes(self):
        """Bytes read and written."""
        return sum(self.reads.values()) + sum(self.writes.values())


class _Recorder(TorchDispatchMode):
    """Writes down the operators that run while it is active; `calls` counts views as well."""

    def __init__(self):
        super().__init__()
        self.ops, self.calls = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        call = ceilings.call(function, args, kwargs or {})  # before it changes anything
        result = function(*args, **(kwargs or {}))
        name = "::".join(str(function).split(".")[:2])
        outputs = _tensors(result)
        self.calls += not name.startswith("prim")
        if outputs and not function.is_view and not re.search("empty|detach|prim", name):
            node = torch._C._current_autograd_node()
            names = [name, *([node.name()] if node else []), *reversed(_open)]
            kind = bucket(names)
            if kind == "attention":
                name = kind if kind in names else "attention backward"
            self.ops.append(_op(name, kind, call, _tensors((args, kwargs)), outputs))
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
        del reads[_storage(inputs[0])]  # what it holds is not looked at
    flops = 2 * inputs[-2].numel() * inputs[-1].shape[-1] if kind == "matrix products" else 0
    return Op(name, kind, call, flops, reads, writes)


class _Attention(torch.autograd.Function):
    """Stands for attention where there are only shapes: one operator each way."""

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return q.clone()

    @staticmethod
    def backward(ctx, grad):
        q, k, v = ctx.saved_tensors
        return grad.clone(), torch.empty_like(k), torch.empty_like(v)


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
            result.append(Op("fused", "element-wise", None, 0, reads, writes))
            run = []
        if op is not None:
            result.append(op)
    return result


def predict(model, pack, ops, device, optimizer="fused"):
    """Seconds of a step by bucket: {bucket: (roofline, alone)}, before it has run.

    The first number is FLOPs and bytes over the two large ceilings; the second adds up what every
    operator takes alone on its own shapes, and the cost of calling them. `ops` are those of
    `record`, or `fused` of them.
    """
    config, dtype = model.config, model.compute_dtype
    lengths = tuple(length for length in pack["cu_seqlens"].diff().tolist() if length)
    width = config.num_attention_heads * config.head_dim
    pairs = sum(n * n for n in lengths) / 2  # the causal half
    forward, backward = ceilings.attention(device, dtype, lengths, config.num_attention_heads,
                                           config.num_key_value_heads, config.head_dim)
    peak, bandwidth = ceilings.large_product(device, dtype), ceilings.large_copy(device)
    roofline, alone = Counter(), Counter()
    for op in ops:
        if op.bucket == "attention":  # two products; in the backward five
            again = op.name == "attention backward"
            roofline[op.bucket] += (5 if again else 2) * 2 * width * pairs / peak
            alone[op.bucket] += backward if again else forward
            continue
        best = op.flops / peak if op.flops else op.bytes / bandwidth
        roofline[op.bucket] += best
        alone[op.bucket] += ceilings.alone(device, *op.call) if op.call else best
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    roofline["optimizer"] = trained * (ADAMW_BYTES[optimizer] + CLIP_BYTES) / bandwidth
    alone["optimizer"] = roofline["optimizer"]
    alone["idle"] = len(ops) * ceilings.small_operator(device)
    return {name: (roofline[name], alone[name]) for name in BUCKETS}


# --- measured ---

def measure(step, device, trace=None):
    """Run `step()` under the profiler: seconds by bucket, which add up to those of the step.

    `trace` is a file for the timeline. On a CPU an operator's time is its own, without that of
    the operators that it calls; on CUDA it is that of its kernels, and idle is what is left.
    """
    on_gpu = device.type == "cuda"
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=kinds) as profiler, region("step"):
        step()
        if on_gpu:
            torch.cuda.synchronize(device)
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    events = [event for event in profiler.events() if event.device_type == DeviceType.CPU]
    (whole,) = (event for event in events if event.name == "step")
    times = dict.fromkeys(BUCKETS, 0.0)
    for event in events:
        names, above = [event.name], event.cpu_parent
        while above is not None:
            names.append(above.name)
            above = above.cpu_parent
        if on_gpu:
            times[bucket(names)] += event.self_device_time_total / 1e6
        elif names[-1] == "step":
            times[bucket(names)] += event.self_cpu_time_total / 1e6
    if on_gpu:
        times["idle"] = whole.cpu_time_total / 1e6 - sum(
            seconds for name, seconds in times.items() if name != "idle")
    return times, len(events)


def compare(predicted, measured):
    """The two as a table, with what the prediction leaves unexplained: the sum of the buckets'
    differences, so that a bucket too slow does not make up for one too fast. Gives (text, share
    explained)."""
    total = sum(measured.values())
    rest = sum(abs(measured[name] - predicted[name][1]) for name in BUCKETS)
    lines = [f"{'milliseconds':<18}{'roofline':>12}{'alone':>12}{'measured':>12}{'rest':>12}"]
    for name in BUCKETS:
        roofline, alone = predicted[name]
        lines.append(f"{name:<18}{1e3 * roofline:>12.1f}{1e3 * alone:>12.1f}"
                     f"{1e3 * measured[name]:>12.1f}{1e3 * (measured[name] - alone):>+12.1f}")
    sums = [1e3 * sum(predicted[name][i] for name in BUCKETS) for i in (0, 1)]
    lines.append(f"{'step':<18}{sums[0]:>12.1f}{sums[1]:>12.1f}{1e3 * total:>12.1f}"
                 f"{1e3 * total - sums[1]:>+12.1f}")
    lines.append(f"explained {1 - rest / total:.1%}; unexplained {1e3 * rest:.1f} ms, differences of "
                 "all buckets added up whatever their sign")
    return "\n".join(lines), 1 - rest / total
