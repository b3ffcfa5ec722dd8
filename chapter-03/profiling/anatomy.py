"""What a training step's memory is made of at its fullest moment: predicted, and measured.

`common/predict.py` predicts it. Here every allocation of one step is followed from beginning to
end: where it was made (forward, loss, backward) and whether it outlives the backward tells what it
is. It needs no list of tensors, so nothing is missed.
"""

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from buckets import region, wait
from common.memory import readable_bytes
from nf4 import NF4Linear

CATEGORIES = ("weights", "quantised base", "optimizer", "gradients", "activations",
              "logits and loss")
REGIONS = {"forward": "activations", "loss": "logits and loss", "backward": "activations",
           "optimizer": "optimizer"}  # inner regions first


def predicted(model, prediction):
    """{category: bytes} at the fullest moment, from a `common.predict.Prediction`."""
    sizes = dict.fromkeys(CATEGORIES, 0)
    names = {"optimizer moments": "optimizer", "layer at work": "activations"}
    for name, size in prediction.items():
        sizes["activations" if name.startswith("copies of") else names.get(name, name)] += size
    sizes["quantised base"] = sum(module.quantized.nbytes for module in model.modules()
                                  if isinstance(module, NF4Linear))
    sizes["weights"] -= sizes["quantised base"]
    return sizes


def measured(step, model, optimizer, device):
    """{category: bytes} at the fullest moment of `step()`, which opens the regions of REGIONS."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, \
            region("step"):
        step()
        wait(device)
    events = profiler.profiler.kineto_results.experimental_event_tree()
    for event in events:  # a list that grows: of roots, and then of all below
        events.extend(event.children)
    spans = {event.name: (event.start_time_ns, event.end_time_ns) for event in events
             if event.name in REGIONS}
    changes = []
    for born, died, size in _lives(events, device):
        name = category(born, died, spans)
        changes += [(born, name, size), (died, name, -size)]
    own = (*model.parameters(), *model.buffers())
    sizes = predicted(model, {"weights": sum(tensor.nbytes for tensor in own)})
    sizes["optimizer"] = sum(t.nbytes for state in optimizer.state.values()
                             for t in state.values() if t.device.type == device.type)
    fullest = dict(sizes)
    for _, name, size in sorted(changes):
        sizes[name] += size
        if sum(sizes.values()) > sum(fullest.values()):
            fullest = dict(sizes)
    return fullest


def _lives(events, device):
    """(when it was allocated, when freed, bytes) of all that the step allocates."""
    memory = sorted((event.start_time_ns, event.typed[1].ptr, event.typed[1].alloc_size)
                    for event in events if event.typed[0] == _EventType.Allocation
                    and event.typed[1].device.type == device.type)
    alive = {}
    for time, address, size in memory:
        if size > 0:
            alive[address] = time, size
        elif address in alive:  # or it is older than the step
            born, size = alive.pop(address)
            yield born, time, size
    for born, size in alive.values():
        yield born, float("inf"), size


def category(born, died, spans):
    """The category of what was allocated and freed at these times; `spans` is {region: (begin,
    end)}."""
    where = next((name for name in REGIONS if name in spans
                  and spans[name][0] <= born < spans[name][1]), "forward")
    if where == "backward" and died > spans["backward"][1]:
        return "gradients"  # all else that the backward makes is freed before it ends
    return REGIONS[where]


def table(expected, found):
    """Both side by side, as lines of text."""
    rows = [(name, expected[name], found[name]) for name in CATEGORIES]
    rows.append(("peak", sum(expected.values()), sum(found.values())))
    return [f"{'memory':<18}{'predicted':>12}{'measured':>12}{'difference':>12}"] + [
        f"{name:<18}{readable_bytes(a):>12}{readable_bytes(b):>12}"
        f"{(f'{a / b - 1:+.1%}' if b > 2**16 else '-'):>12}" for name, a, b in rows]


def write_snapshot(step, path, device):
    """Write PyTorch's record of every allocation of `step()` on a CUDA device, for its viewer: a
    pickle, which is not read here."""
    # Python's frames only: looking up the names of C++'s takes minutes.
    torch.cuda.memory._record_memory_history(max_entries=200_000, stacks="python")
    try:
        step()
        wait(device)
        torch.cuda.memory._dump_snapshot(str(path))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
