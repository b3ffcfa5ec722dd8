"""Where the time of a training step goes, by bucket. One function, `bucket`, sorts both the
operators that torch.profiler has timed and those that operators.py predicts."""

import contextlib
import re
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.profiler import profile, record_function

BUCKETS = ("matrix products", "attention", "loss", "element-wise", "optimizer", "idle")

open_regions = []  # their names, outermost first


@contextlib.contextmanager
def region(name):
    """Name a part of the step: in the trace, and for `bucket`."""
    open_regions.append(name)
    try:
        with record_function(name):
            yield
    finally:
        open_regions.pop()


def loss_of(model, pack):
    """The model's loss of a pack, in a region "loss"; all before the head in a "forward" within."""
    with (region("loss"), contextlib.ExitStack() as forward,
          model.model.register_forward_pre_hook(
              lambda *_: forward.enter_context(region("forward"))),
          model.model.register_forward_hook(lambda *_: forward.close())):
        return model(**pack)


def bucket(names, kernels=False):
    """The bucket of an operator, from its name and those of all that it runs in, inside out.

    A matrix product counts as one wherever it occurs but in the optimizer; what remains of the loss
    is the softmax. A name that is no operator's (a region, a node of autograd) is Python and C++
    around operators, with the device idle, unless compiled code starts `kernels` there on a GPU."""
    part = next((name for name in names if name in ("forward", "loss", "optimizer")), None)
    if part == "optimizer" or any(name.startswith("Optimizer.") for name in names):
        return "optimizer"
    operator = "::" in names[0] and not names[0].startswith(("autograd::", "torch::autograd"))
    if not (operator or kernels or names[0].startswith("## Call CompiledFxGraph")):
        return "idle"
    if any(re.search("attention|attn", name, re.IGNORECASE) for name in names):
        return "attention"
    if re.fullmatch(r"(aten|bareloop)::(mm|addmm_?|bmm|baddbmm_?)", names[0]):
        return "matrix products"
    if part == "loss" or any(re.search("CrossEntropy|LogSoftmax|NllLoss", name) for name in names):
        return "loss"
    return "element-wise"


def duration(function, device, prepare=lambda: None, repeats=5):
    """Seconds of a call: the median of `repeats` (on CUDA ten calls each), `prepare` left out."""
    calls, times = 10 if device.type == "cuda" else 1, []
    for _ in range(repeats + 1):
        prepare()
        times.append(seconds_of(function, device, calls) / calls)
    return statistics.median(times[1:])  # the first has things to load, or to compile


def seconds_of(function, device, calls=1):
    """Seconds of `calls` calls, until the device has finished them."""
    wait(device)
    started = time.perf_counter()
    for _ in range(calls):
        function()
    wait(device)
    return time.perf_counter() - started


def wait(device):
    """Wait until the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(step, device, trace, repeats=3):
    """Run `step()` under the profiler: seconds by bucket, which add up to those of the step. Of the
    runs after the first, the one of median length counts; its timeline goes to file `trace`. On a
    CPU an operator's time excludes what it calls; on CUDA it is its kernels', the rest is idle."""
    measured = []
    with tempfile.TemporaryDirectory(dir=trace.parent) as folder:
        for number in range(repeats + 1):
            with profile() as profiler, region("step"):
                step()
                wait(device)
            timeline = Path(folder, f"{number}-{trace.name}")
            # At once: after the next run, the times of a GPU's kernels in this one would be zeros.
            profiler.export_chrome_trace(str(timeline))
            measured.append((sum_up(profiler.events(), device), timeline))
        times, chosen = sorted(measured[1:], key=lambda one: sum(one[0].values()))[repeats // 2]
        chosen.replace(trace)
    return times


def sum_up(events, device):
    """Seconds by bucket of the profiler's events within the region "step"."""
    on_gpu = device.type == "cuda"
    events = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    times = dict.fromkeys(BUCKETS, 0.0)
    for event in events:
        names, above = [event.name], event.cpu_parent
        while above is not None:
            names.append(above.name)
            above = above.cpu_parent
        if on_gpu:  # the backward has a thread of its own
            times[bucket(names, kernels=True)] += event.self_device_time_total / 1e6
        elif names[-1] == "step":
            times[bucket(names)] += event.self_cpu_time_total / 1e6
    if on_gpu:
        (whole,) = (event for event in events if event.name == "step")
        times["idle"] = whole.cpu_time_total / 1e6 - sum(times.values())
    return times
