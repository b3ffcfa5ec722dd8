"""What a training step's memory is made of at its fullest moment: predicted, and measured.

`common/predict.py` says it beforehand. Here every allocation of one step is followed from its
birth to its end: where it was born (forward, loss, backward) and whether it outlives the backward
tells what it is. No tensor has to be asked, so nothing is missed.
"""

import pickletools

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from buckets import region
from ceilings import wait
from common.errors import UserError
from common.memory import readable_bytes
from nf4 import NF4Linear

CATEGORIES = ("weights", "quantised base", "optimizer", "gradients", "activations",
              "logits and loss")
REGIONS = {"forward": "activations", "loss": "logits and loss", "backward": "activations",
           "optimizer": "optimizer"}
# What a pickle would need to call anything: without these it can only be numbers, text, lists.
CALLING = {"GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX",
           "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID"}


def base_bytes(model):
    """Bytes of the layers that are kept in four bits."""
    return sum(module.quantized.nbytes for module in model.modules()
               if isinstance(module, NF4Linear))


def predicted(model, prediction):
    """{category: bytes} from a `common.predict.Prediction`, at the moment that it takes for the
    fullest."""
    sizes = dict.fromkeys(CATEGORIES, 0)
    names = {"optimizer moments": "optimizer", "layer at work": "activations"}
    for name, size in prediction.items():
        name = "activations" if name.startswith("copies of") else names.get(name, name)
        sizes[name] += size
    sizes["quantised base"] = base_bytes(model)
    sizes["weights"] -= sizes["quantised base"]
    return sizes


def measured(step, model, optimizer, device):
    """{category: bytes} at the fullest moment of `step()`, which opens the regions of REGIONS."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, \
            region("step"):
        step()
        wait(device)
    events = _events(profiler.profiler.kineto_results.experimental_event_tree())
    spans = {event.name: (event.start_time_ns, event.end_time_ns) for event in events
             if event.name in REGIONS}
    sizes = dict.fromkeys(CATEGORIES, 0)
    sizes["quantised base"] = base_bytes(model)
    sizes["weights"] = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    sizes["weights"] -= sizes["quantised base"]
    sizes["optimizer"] = sum(t.nbytes for state in optimizer.state.values()
                             for t in state.values() if t.device.type == device.type)
    fullest = dict(sizes)
    for _, name, size in sorted(_births_and_deaths(events, spans, device)):
        sizes[name] += size
        if sum(sizes.values()) > sum(fullest.values()):
            fullest = dict(sizes)
    return fullest


def _events(roots):
    """All events of the profiler's trees."""
    found, waiting = [], list(roots)
    while waiting:
        found.append(waiting.pop())
        waiting.extend(found[-1].children)
    return found


def _births_and_deaths(events, spans, device):
    """(time, category, bytes) of what the step allocates, and of its end with minus bytes."""
    changes = sorted((event.start_time_ns, event.typed[1].ptr, event.typed[1].alloc_size)
                     for event in events if event.typed[0] == _EventType.Allocation
                     and event.typed[1].device.type == device.type)
    alive = {}
    for time, address, size in changes:
        if size > 0:
            alive[address] = time, size
        elif address in alive:  # or it is older than the step
            yield from _life(*alive.pop(address), time, spans)
    for born, size in alive.values():
        yield from _life(born, size, float("inf"), spans)


def _life(born, size, died, spans):
    where = next((name for name, (start, end) in spans.items() if start <= born < end), "forward")
    category = REGIONS[where]
    if where == "backward" and died > spans["backward"][1]:
        category = "gradients"  # all else that the backward makes is gone when it ends
    yield born, category, size
    if died != float("inf"):
        yield died, category, -size


def table(expected, found):
    """Both side by side, as lines of text."""
    rows = [(name, expected[name], found[name]) for name in CATEGORIES]
    rows.append(("peak", sum(expected.values()), sum(found.values())))
    return [f"{'memory':<18}{'predicted':>12}{'measured':>12}{'difference':>12}"] + [
        f"{name:<18}{readable_bytes(a):>12}{readable_bytes(b):>12}"
        f"{(f'{a / b - 1:+.1%}' if b > 2**16 else '-'):>12}" for name, a, b in rows]


# --- CUDA's own record ---

def write_snapshot(step, path, device):
    """Write PyTorch's record of every allocation of `step()` on a CUDA device, for its viewer."""
    # Python's frames only: looking up the names of C++'s takes minutes.
    torch.cuda.memory._record_memory_history(max_entries=200_000, stacks="python")
    try:
        step()
        wait(device)
        torch.cuda.memory._dump_snapshot(str(path))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    check_snapshot(path)


def check_snapshot(path):
    """Raise UserError unless the file is a memory snapshot that can do nothing when it is read.

    The file is a pickle, the one format in which PyTorch writes it, so it is taken apart into its
    instructions and never loaded.
    """
    words = set()
    try:
        with open(path, "rb") as file:
            for instruction, argument, _ in pickletools.genops(file):
                if instruction.name in CALLING:
                    raise UserError(f"{path}: this snapshot calls code ({instruction.name}): do "
                                    "not open it")
                if isinstance(argument, str) and len(argument) < 20:
                    words.add(argument)
    except ValueError as error:  # pickletools' word for a file that is cut off or no pickle
        raise UserError(f"{path}: not a whole snapshot: {error}") from error
    if not {"segments", "device_traces"} <= words:
        raise UserError(f"{path}: no memory snapshot: it lists no segments and no device_traces")
