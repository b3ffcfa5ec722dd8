"""What a training step's memory is made of at its fullest moment: predicted, and measured.

Every allocation of one step is followed: where it was made (forward, loss, backward) and whether it
outlives the backward tells what it is. It needs no list of tensors, so nothing is missed."""

import itertools
import math

from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from buckets import region, wait
from nf4 import NF4Linear

CATEGORIES = ("weights", "quantised base", "optimizer", "gradients", "activations",
              "logits and loss")
REGIONS = {"forward": "activations", "loss": "logits and loss", "backward": "activations",
           "optimizer": "optimizer"}  # inner regions first


def predicted(model, prediction):
    """{category: bytes} at the fullest moment, from a `common.predict.Prediction`."""
    sizes = dict.fromkeys(CATEGORIES, 0)
    for name, size in prediction.items():
        name = name.replace("optimizer moments", "optimizer")
        sizes[name if name in sizes else "activations"] += size  # copies, and the layer at work
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
    memory = sorted((event.start_time_ns, event.typed[1].ptr, event.typed[1].alloc_size)
                    for event in events if event.typed[0] == _EventType.Allocation
                    and event.typed[1].device.type == device.type)
    alive, lives = {}, []  # [time of allocation, bytes, time when it is freed]
    for time, address, size in memory:
        if size > 0:
            alive[address] = [time, size, math.inf]
            lives.append(alive[address])
        elif address in alive:  # or it is older than the step
            alive.pop(address)[2] = time
    times, sizes = zip(*sorted(change for born, size, died in lives
                               for change in ((born, size), (died, -size))))
    _, fullest = max(zip(itertools.accumulate(sizes), times))
    states = (tensor for state in optimizer.state.values() for tensor in state.values())
    sizes = predicted(model, {
        "weights": sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
        "optimizer": sum(tensor.nbytes for tensor in states if tensor.device.type == device.type)})
    for born, size, died in lives:
        if born <= fullest < died:
            sizes[category(born, died, spans)] += size
    return sizes


def category(born, died, spans):
    """The category of what lived between these times; `spans` is {region: (begin, end)}."""
    where = next((name for name in REGIONS if spans[name][0] <= born < spans[name][1]), "forward")
    if where == "backward" and died > spans["backward"][1]:
        return "gradients"  # all else that the backward makes is freed before it ends
    return REGIONS[where]
