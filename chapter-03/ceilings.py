"""What this device can do at most, measured: the denominators of a prediction.

Two ceilings make a roofline: how many FLOPs a second in a large matrix product, how many bytes a
second in a large copy. They are not what a model reaches. Its products have their own shapes, its
element-wise operators work on tensors that fit a cache or do not, in a dtype that the processor
has or must convert. So the same few operators are measured once more at the model's own sizes.
"""

import math
import time

import torch
import torch.nn.functional as F

from modeling_llama import varlen_attention

LARGE = {"cpu": (2048, 2**26), "cuda": (8192, 2**30)}  # of a product; bytes of a copy


def seconds(function, device, repeats=3):
    """The fastest of a few calls."""
    function()
    best = math.inf
    for _ in range(repeats):
        _wait(device)
        started = time.perf_counter()
        function()
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return best


def _wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Ceilings:
    """Measured when first asked for, then kept. `device` a torch.device, `dtype` of the products.
    """

    def __init__(self, device, dtype):
        self.device, self.dtype, self.known = device, dtype, {}

    def _once(self, key, measure):
        if key not in self.known:
            self.known[key] = measure()
        return self.known[key]

    def _random(self, *shape, dtype=None):
        return torch.randn(shape, device=self.device).to(dtype or self.dtype)
