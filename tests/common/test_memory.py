"""common/memory.py: what is freed is kept. (LivePeak is held to the prediction: test_predict.py.)"""

import ctypes
import subprocess
import sys

from helpers import ROOT

LARGE = """
import resource, torch
from common import memory
memory.keep_freed("{device}")
for n in range(30):
    if n == 20:  # the heap has found its form
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(2**24).fill_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(device):
    """Of ten tensors of 64 MB, one after another, in a process of their own."""
    done = subprocess.run([sys.executable, "-c", LARGE.format(device=device)], cwd=ROOT, check=True,
                          capture_output=True, text=True)
    return int(done.stdout)


def test_large_tensors_reuse_memory():
    faults = page_faults("cpu")  # elsewhere than on Linux with glibc it must do no harm
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        assert faults < page_faults("cuda") / 4
