"""What the benchmarks share: where and with what a number was measured, tables, JSON."""

import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
import helpers

from common.memory import peak_memory_bytes

KERNELS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS",
           "TORCHINDUCTOR_CPP_MARCH")
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "trl")


def conditions():
    """Machine, versions, threads, date and command (with the variables that change the kernels),
    without which a number says nothing."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    variables = [f"{k}={v}" for k, v in sorted(os.environ.items())
                 if k.startswith("OMP_") or k in KERNELS]
    command = " ".join([*variables, "python", "tests/bench/" + Path(sys.argv[0]).name,
                        *sys.argv[1:]])
    return {"machine": machine(), "threads": torch.get_num_threads(), "versions": versions,
            "date": f"{datetime.datetime.now():%Y-%m-%d %H:%M}", "command": command}


def machine():
    """The processor's name and what it multiplies bfloat16 with; the GPU's name if there is one."""
    names = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    cpu = Path("/proc/cpuinfo")
    found = cpu.exists() and re.search(r"model name\s*: (.+)", cpu.read_text())
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    fast = next((name for name in ("amx_bf16", "avx512_bf16") if able.get(name)), "no fast bf16")
    if fast == "avx512_bf16" and able.get("avx512_fp16"):
        fast += " without AMX"
    if "ONEDNN_MAX_CPU_ISA" in os.environ:
        fast = f"limited to {os.environ['ONEDNN_MAX_CPU_ISA']}"
    names.append(f"{found[1] if found else platform.machine()}, {os.cpu_count()} cores, {fast}")
    return "; ".join(names)


def show_conditions(found):
    """One Markdown line of what `conditions` found, load of the machine included."""
    versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items() if v)
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    print(f"{found['machine']}, {found['threads']} threads, load {load}; {versions}; "
          f"{found['date']}\n\n    {found['command']}")


@contextlib.contextmanager
def importable(chapter):
    """While this is open, the files of a chapter that `load` has loaded can be imported by name,
    which the compiler needs: it looks there for the globals of a function."""
    mine = dict(helpers._loaded[helpers.ROOT / chapter])
    outside = {name: sys.modules[name] for name in mine if name in sys.modules}
    sys.modules.update(mine)
    try:
        yield
    finally:
        for name in mine:
            sys.modules.pop(name, None)
        sys.modules.update(outside)


def largest(errors):
    """The largest error, None of none. Infinite if one is NaN, which `max` drops unless it comes
    first: whatever is compared with a limit then exceeds it."""
    errors = [float(error) for error in errors]
    return math.inf if any(map(math.isnan, errors)) else max(errors, default=None)


def held_bytes(model, optimizer):
    """Bytes of a model's parameters and buffers and of its optimizer's state."""
    state = {}
    for thing in (*model.parameters(), *model.buffers(),
                  *(value for each in optimizer.state.values() for value in each.values())):
        storage = thing.untyped_storage()
        state[storage.data_ptr()] = storage.nbytes()
    return sum(state.values())


def resident(key):
    """VmRSS or VmHWM (its high-water mark) of this process, in bytes; Linux only."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in status if line.startswith(key))


def peak_resident():
    """The most bytes that this process has had in memory."""
    # getrusage's figure begins with what the process that started this one had.
    return resident("VmHWM") if Path("/proc/self/status").exists() else peak_memory_bytes("cpu")


def adamw(model, lr):
    """The optimizer of every benchmark: fused AdamW, without decay of vectors."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
              {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]],
                             lr=lr, betas=(0.9, 0.95), fused=True)


def table(columns, rows):
    """Print a Markdown table."""
    print("\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")


def write(path, figures):
    """Write what was measured as JSON, if a path is given: a file is there whole, or as before."""
    if path:
        new = Path(f"{path}.tmp")
        new.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        os.replace(new, path)
