"""common/memory.py: what is freed is kept."""

import ctypes
import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

from common.options import choose_device


# Page faults of ten tensors of 64 MB, one after another: as it is by itself, and as we want it.
LARGE = """
import resource, torch
from common import memory
for device in ("cuda", "cpu"):
    memory.keep_freed(device)
    for n in range(30):
        if n == 20:  # the heap has found its form
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(2**24).fill_(1)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_large_tensors_reuse_memory():
    done = subprocess.run([sys.executable, "-c", LARGE], cwd=ROOT, check=True, capture_output=True,
                          text=True)  # elsewhere than on Linux with glibc it must do no harm
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        by_itself, kept = map(int, done.stdout.split())
        assert kept < by_itself / 4


@pytest.mark.parametrize("already", [{}, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"},
                                     {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"}], ids=str)
def test_on_cuda_blocks_may_grow_unless_the_user_has_said_otherwise(already, monkeypatch):
    names = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
    for name in names:
        monkeypatch.setenv(name, already.get(name, ""))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto").type == "cuda"
    expected = already or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert {name: os.environ[name] for name in names if os.environ[name]} == expected
