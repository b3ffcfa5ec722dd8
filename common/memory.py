"""Memory: how much a process has used, how to keep what is freed, how packs get to the device."""

import contextlib
import ctypes
import resource
import sys

import torch


def keep_freed(device):
    """On a CPU with glibc, keep freed memory: each training step needs the same blocks. By default
    those of 32 MB or more are mapped anew, filled with zeros: a quarter of Qwen3-0.6B's time."""
    if torch.device(device).type == "cpu" and sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library than glibc
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-4, 0)  # M_MMAP_MAX: no block is a mapping of its own
            mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap is never given back


def to_device(pack, device):
    """The pack on `device`. A GPU copies pinned memory while Python goes on; else Python waits."""
    pinned = torch.device(device).type == "cuda"
    return {name: (value.pin_memory() if pinned else value).to(device, non_blocking=True)
            if torch.is_tensor(value) else value for name, value in pack.items()}


def peak_memory_bytes(device):
    """The most bytes used so far: on CUDA by PyTorch's allocator, on a CPU resident; else None."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu":
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def readable_bytes(count):
    """1536 -> "1.5 KiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
