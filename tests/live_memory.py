"""Memory as it is: live tensor bytes on a CPU; on a GPU the allocator's peak, from now on."""

import gc

import torch
from torch.profiler import ProfilerActivity, profile


class LivePeak:
    """Measures the peak of live tensor bytes on the CPU, for a `with` block.

        with LivePeak() as live:
            model(**pack).sum().backward()
        live.before     # bytes of the tensors that were there on entry
        live.peak       # the most there were at any moment, those included
        live.grown      # peak - before: what the block itself needed

    Every allocation of PyTorch's CPU allocator counts, as its profiler reports it: in the forward
    and the backward, eager or compiled, a kernel's own scratch memory too. (An operation recorder,
    TorchDispatchMode, would disturb what it measures: while one is active autograd adds gradients
    out of place.) Only the thread of the block counts, which on a CPU runs the backward as well.
    A tensor that was there on entry is taken to stay, and one that only a graph holds, between a
    forward and its backward, is not seen: enter between two steps. Profilers do not nest.
    """

    def __enter__(self):
        self.before = live_tensor_bytes()
        self.peak = self.grown = 0
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *error):
        self._profile.__exit__(*error)
        events = [(event.start_ns(), event.nbytes())
                  for event in self._profile.profiler.kineto_results.events()
                  if event.name() == "[memory]"]
        self._profile = None
        current = 0
        for _, size in sorted(events, key=lambda event: event[0]):
            current += size
            self.grown = max(self.grown, current)
        self.peak = self.before + self.grown


def live_tensor_bytes():
    """Bytes of all CPU tensors that Python can reach, each storage once."""
    storages = {}
    plain = (torch.Tensor, torch.nn.Parameter)  # no wrapper around another, nor a stand-in
    for thing in gc.get_objects():
        if type(thing) not in plain:
            continue
        for tensor in (thing, thing.grad if thing.is_leaf else None):
            if type(tensor) not in plain or torch._is_functional_tensor(tensor):
                continue  # the latter is a compiler's, with no memory
            if tensor.device.type == "cpu" and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                storages[_address(storage)] = storage.nbytes()
    storages.pop(None, None)
    return sum(storages.values())


def _address(storage):
    """Where a storage's memory is; None for one that has none, as tracing for a compiler leaves."""
    try:
        return storage.data_ptr()
    except RuntimeError as error:
        if "invalid python storage" not in str(error):
            raise
        return None


def reset_peak_memory(device):
    """Let `peak_memory_bytes` of a CUDA device begin anew; nothing elsewhere."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
