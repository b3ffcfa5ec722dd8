"""NF4: four-bit weights with one scale for every 64, and a frozen linear layer of such weights.

Dettmers et al. 2023, QLoRA (arXiv 2305.14314), section 3. The tensors equal those of
bitsandbytes' CPU code bit for bit, so `bnb_files.py` can exchange checkpoints with it.

Bytes per parameter: 0.5 for the code, 4 / 64 for the scale: 4.5 bits. Double quantisation turns
the scale into 1 / 64 + 4 / (64 * 256): 4.127 bits."""

import contextlib
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from common.adapters.targets import QuantizedLinear
from common.predict_memory import LinearCost

BLOCK = 64  # weights that share one absmax
NESTED_BLOCK = 256  # absmax values that share one second-level absmax
SMALLEST_SCALE = 1e-38  # what a block of zeros is divided by
PIECE = 2**19  # weights (de)quantised at a time, so that the float32 scratch stays in the cache
CUDA_PIECE = 2**22  # the same on a GPU, whose cache is larger, as is the cost of starting a kernel


def nf4_levels():
    """The 16 levels, float32, ascending from -1 to 1: QLoRA appendix E.

    Quantiles of N(0, 1) with probabilities evenly spaced from 1/2 to `tail`: eight steps above
    zero, seven below, zero itself, divided by the largest. `tail` is halfway between the last
    probabilities that 15 and 16 bins would have: (1 - 1/30 + 1 - 1/32) / 2. The published table has
    float32 probabilities, float64 quantiles and a float32 division: others give other bits."""
    tail = 0.9677083
    above = torch.linspace(tail, 0.5, 9)[:-1].double()
    below = torch.linspace(tail, 0.5, 8)[:-1].double()
    quantile = torch.special.ndtri
    levels = torch.cat([-quantile(below), torch.zeros(1, dtype=torch.float64), quantile(above)])
    levels = levels.sort().values.float()
    return levels / levels.max()


def dynamic_map():
    """The 256 levels of an 8-bit absmax, float32, ascending: Dettmers 2015 (arXiv 1511.04561). For
    each power of ten from 1e-6 to 1, evenly spaced levels of both signs, twice as many as for the
    power below it; then 0 and 1. Zero has code 127."""
    levels = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        middles = 10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        levels += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(levels))


LEVELS = nf4_levels()
DYNAMIC_MAP = dynamic_map()
# A byte holds two codes, so looking up one row gives two weights.
PAIRS = torch.stack([LEVELS.repeat_interleave(16), LEVELS.repeat(16)], dim=1)


@dataclass(frozen=True)
class NF4Weight:
    """A quantised weight of n = prod(shape) elements; blocks run over the flattened tensor."""

    packed: torch.Tensor  # (n / 2, 1) uint8, the even element in the high four bits
    absmax: torch.Tensor  # (n / 64,) float32, or uint8 codes when double quantised
    absmax2: torch.Tensor | None  # (ceil(len(absmax) / 256),) float32, double quantised only
    offset: torch.Tensor | None  # (1,) float32, the mean absmax, double quantised only
    shape: torch.Size
    dtype: torch.dtype  # of the weight that was quantised, and of the dequantised one

    @property
    def nbytes(self):
        parts = (self.packed, self.absmax, self.absmax2, self.offset)
        return sum(part.nbytes for part in parts if part is not None)


def quantize_nf4(weight, double_quant=False):
    """Quantise a floating-point tensor to an `NF4Weight` on its device, `PIECE` elements at a time,
    so that no second copy of it is needed. On the meta device it gives only shapes. ValueError for
    an element that is not finite, and for a number of elements that is not a multiple of 64."""
    if weight.numel() % BLOCK:
        raise ValueError(f"{tuple(weight.shape)} is no whole number of blocks of {BLOCK} elements")
    blocks = weight.detach().reshape(-1, BLOCK)
    packed = torch.empty(len(blocks), BLOCK // 2, dtype=torch.uint8, device=blocks.device)
    absmax = torch.empty(len(blocks), dtype=torch.float32, device=blocks.device)
    size = weight.numel() if weight.is_meta else CUDA_PIECE if weight.is_cuda else PIECE
    for start in range(0, len(blocks), size // BLOCK):
        rows = slice(start, start + size // BLOCK)
        x = blocks[rows].float()
        scale = torch.amax(x.abs(), dim=1, out=absmax[rows])
        x = x * (1 / scale[:, None].clamp(min=SMALLEST_SCALE))  # as bitsandbytes, without dividing
        # A value in the middle goes to the lower level; |x| may exceed 1 by a rounding error.
        codes = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
        for middle in ((LEVELS[:-1] + LEVELS[1:]) / 2).tolist():
            codes += x > middle  # 2.6 times as fast as torch.bucketize
        packed[rows] = codes[:, 0::2] << 4 | codes[:, 1::2]
    if not (absmax.is_meta or absmax.mean().isfinite()):
        raise ValueError("the weight has an element that is not finite, or all are too large")
    scales = _quantize_absmax(absmax) if double_quant else (absmax, None, None)
    return NF4Weight(packed.view(-1, 1), *scales, weight.shape, weight.dtype)


def _quantize_absmax(absmax):
    """(blocks,) float32 -> uint8 codes, absmax2 of each 256 of them, and their mean: QLoRA eq. 6.
    As in bitsandbytes' CPU code, a value is first rounded to one of 65,536 positions of a table."""
    offset = absmax.mean()
    centred = F.pad(absmax - offset, (0, -len(absmax) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    absmax2 = centred.abs().amax(dim=1)
    # If all 256 are equal this is 0 * inf: bitsandbytes gives code 0, and any code times 0 is 0.
    scaled = (centred * (1 / absmax2)[:, None]).nan_to_num(nan=-1)
    levels = DYNAMIC_MAP.to(absmax.device)
    grid = -1 + 2 * torch.arange(65536, dtype=torch.float32, device=absmax.device) / 65535
    nearest = torch.bucketize(grid, (levels[:-1] + levels[1:]) / 2).to(torch.uint8)
    position = ((scaled.clamp(-1, 1) + 1) * 0.5 * 65535 + 0.5).long()
    return nearest[position].view(-1)[: len(absmax)], absmax2, offset[None]


def dequantize_nf4(quantized):
    """The weight of an `NF4Weight`, in its dtype and shape: levels[code] * absmax in float32."""
    device = quantized.packed.device
    return _dequantize(quantized.packed, quantized.absmax, quantized.absmax2, quantized.offset,
                       PAIRS.to(device), DYNAMIC_MAP.to(device), quantized.shape, quantized.dtype)


def _dequantize(packed, absmax, absmax2, offset, pairs, nested, shape, dtype, index=torch.int32):
    if absmax2 is not None:
        scale2 = absmax2.repeat_interleave(NESTED_BLOCK)[: absmax.shape[0]]
        absmax = F.embedding(absmax.to(index), nested[:, None]).view(-1) * scale2 + offset
    if torch.compiler.is_compiling():  # one kernel
        weight = F.embedding(packed.view(-1).to(index), pairs).view(-1, BLOCK) * absmax[:, None]
        return weight.to(dtype).view(shape)
    weight = torch.empty(len(absmax), BLOCK, dtype=dtype, device=packed.device)
    size = (CUDA_PIECE if packed.is_cuda else PIECE) // BLOCK
    for start in range(0, len(absmax), size):
        rows = slice(start, start + size)
        codes = packed.view(-1, BLOCK // 2)[rows]
        piece = F.embedding(codes.to(index), pairs).view(-1, BLOCK)
        weight[rows] = piece.mul_(absmax[rows, None])
    return weight.view(shape)


class _FrozenLinear(torch.autograd.Function):
    """x Wᵀ + b. W is dequantised in the forward and again in the backward, and not kept between."""

    @staticmethod
    def forward(ctx, x, bias, shape, dtype, *parts):
        ctx.save_for_backward(*parts)  # the layer's own buffers: nothing is added to memory
        ctx.shape, ctx.dtype = shape, dtype
        weight = _dequantize(*parts, shape, dtype).to(x.dtype)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        # W is frozen, so only dL/dx = dL/dy W is needed, and dL/db if b is trained.
        grad_x = grad_bias = None
        parts = ctx.saved_tensors  # read once: checkpointing makes a second read an error
        if ctx.needs_input_grad[0]:
            # A compiler that sees the same computation twice keeps the first result, all of W.
            # With another index type it is not the same, and once fused it costs no more.
            index = torch.int64 if torch.compiler.is_compiling() else torch.int32
            weight = _dequantize(*parts, ctx.shape, ctx.dtype, index)
            grad_x = grad @ weight.to(grad.dtype)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32)
        return grad_x, grad_bias, *[None] * (2 + len(parts))


class NF4Linear(QuantizedLinear):
    """A linear layer on a frozen NF4 weight: y = x deq(W)ᵀ + b, in the dtype of x (QLoRA eq. 5).
    Its parts are buffers that `.to(dtype)` does not cast: a rounded scale would change W."""

    # True in a compiled layer that is computed again in the backward: W is then dequantised again
    # with all the rest, while PyTorch 2.11's compiler would keep what `_FrozenLinear` computes.
    recomputed = False

    def __init__(self, quantized, bias=None):
        super().__init__()
        self.out_features, self.in_features = quantized.shape
        self.shape, self.dtype = quantized.shape, quantized.dtype
        for name in ("packed", "absmax", "absmax2", "offset"):
            self.register_buffer(name, getattr(quantized, name))
        device = quantized.packed.device
        self.register_buffer("pairs", PAIRS.to(device), persistent=False)
        self.register_buffer("nested", DYNAMIC_MAP.to(device), persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def quantized(self):
        """The weight as an `NF4Weight` that shares this layer's memory."""
        return NF4Weight(*self._parts()[:4], self.shape, self.dtype)

    @property
    def weight(self):
        """The dequantised weight (out, in), in the dtype that was quantised: a new tensor."""
        return _dequantize(*self._parts(), self.shape, self.dtype)

    def _parts(self):
        return (self.packed, self.absmax, self.absmax2, self.offset, self.pairs, self.nested)

    def cost(self):
        """What a step keeps, for common/predict_memory.py: nothing but the layer's own bytes."""
        return LinearCost(self.shape, weight=None)

    def forward(self, x):
        if self.recomputed:
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.linear(x, self.weight.to(x.dtype), bias)
        return _FrozenLinear.apply(x, self.bias, self.shape, self.dtype, *self._parts())

    def _apply(self, fn, recurse=True):
        """What `.to`, `.cuda` and `.half` call. Seen as bytes, scales are moved but not cast."""
        fixed = {id(buffer) for buffer in self.buffers()}
        return super()._apply(
            lambda t: fn(t.view(torch.uint8)).view(t.dtype) if id(t) in fixed else fn(t), recurse)

    def extra_repr(self):
        return (f"in_features={self.in_features}, out_features={self.out_features},"
                f" bias={self.bias is not None}, double_quant={self.absmax2 is not None}")


@contextlib.contextmanager
def weights_kept(model, wanted=True):
    """Within it, if `wanted`, the NF4 layers keep their weights in the model's compute dtype, where
    otherwise each pass makes them anew. For many passes in a row without gradients: the same
    results to the last bit, for the memory of a 16-bit model."""
    layers = [layer for layer in model.modules() if wanted and isinstance(layer, NF4Linear)]
    for layer in layers:
        weight, bias = (one if one is None else one.to(model.compute_dtype)
                        for one in (layer.weight, layer.bias))
        layer.forward = partial(F.linear, weight=weight, bias=bias)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own is seen again
