"""Memory as it is: live tensor bytes on a CPU, the allocator's peak on a GPU.

`common/predict.py` says what a step should need; this file measures what it needed.
"""

import resource
import sys
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LivePeak(TorchDispatchMode):
    """Counts the bytes of live tensors while it is active, and remembers the most there were.

        with LivePeak() as live:
            model(**pack).sum().backward()
        live.peak            # bytes
        live.at_peak()       # where they came from: {"before": ..., "aten.mm": ...}

    It looks at every operation, in the forward, in the backward and inside autograd.Function. A
    storage counts once, in full, however many views it has, from the operation that made it
    until nothing refers to it. One that an operation reads without having seen it made (the
    weights, optimizer moments) was there before, so it counts from the beginning. Not counted:
    what a kernel allocates and frees within one operation, tensors that nothing touches here, and
    what compiled code makes (compiled functions run eagerly in here: measure them as `eager`).
    """

    def __enter__(self):
        self.current = self.peak = 0
        self._log = []  # (storage's number, bytes, what made it): bytes None when it is freed
        self._peak_length = 0
        self._sizes = {}  # id of a live storage's Python object -> (its number, bytes)
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for tensor in _tensors((args, kwargs)):
            self._see(tensor, "before")
        result = function(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._see(tensor, str(function.overloadpacket))
        return result

    def at_peak(self):
        """Bytes by the operation that made them, at the moment of the peak, the largest first."""
        live, made_before = {}, {}
        for index, (number, size, origin) in enumerate(self._log):
            if origin == "before":
                made_before[number] = (size, origin)
            elif index < self._peak_length and size is None:
                live.pop(number, None)
                made_before.pop(number, None)
            elif index < self._peak_length:
                live[number] = (size, origin)
        totals = {}
        for size, origin in (*live.values(), *made_before.values()):
            totals[origin] = totals.get(origin, 0) + size
        return dict(sorted(totals.items(), key=lambda item: -item[1]))

    def _see(self, tensor, origin):
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        known = self._sizes.get(key)
        if known is not None and known[1] == size:
            return
        if known is not None:  # resized in place, as FSDP does
            self._forget(key)
        number = len(self._log)
        self._sizes[key] = (number, size)
        self._log.append((number, size, origin))
        self.current += size
        if origin == "before":  # it was there at every earlier moment too
            self.peak += size
        if self.current >= self.peak:
            self.peak = self.current
            self._peak_length = len(self._log)
        if known is None:  # PyTorch keeps this Python object as long as the storage itself
            weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key):
        number, size = self._sizes.pop(key)
        self.current -= size
        self._log.append((number, None, None))


def _tensors(values):
    return [leaf for leaf in tree_leaves(values)
            if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided]


def peak_memory_bytes(device):
    """The most memory this process has used so far, in bytes.

    On CUDA what PyTorch's allocator had handed out, since the start or `reset_peak_memory`; on a
    CPU the largest resident set of the whole process, which nothing resets; None where the
    device does not say (MPS).
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu":
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory(device):
    """Let `peak_memory_bytes` of a CUDA device begin anew; nothing elsewhere."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
