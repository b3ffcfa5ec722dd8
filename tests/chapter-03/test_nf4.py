"""NF4 against bitsandbytes' tensors (tests/goldens/bnb) and float64 maths; what stays in memory."""

import gc
import sys

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from helpers import GOLDENS, load
from live_memory import LivePeak
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.compile_fx import partition_fn

from common.weights import own_tensors

nf4 = load("chapter-03/nf4.py")
load_base = load("chapter-03/quantized_model.py").load_base
golden = load_file(GOLDENS / "bnb" / "tensors.safetensors")
WEIGHTS = sorted(name.removesuffix(".weight") for name in golden if name.endswith(".weight"))
CASES = [name for name in WEIGHTS if golden[f"{name}.weight"].numel() % nf4.BLOCK == 0]


def same(found, expected):
    """Bitwise, with dtype and shape."""
    return found.dtype == expected.dtype and torch.equal(found, expected)


def layer(out_features=48, in_features=64, double_quant=False, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    weight = torch.randn(out_features, in_features, dtype=dtype)
    bias = torch.randn(out_features) if bias else None
    return nf4.NF4Linear(nf4.quantize_nf4(weight, double_quant), bias)


# --- the format ---

def test_levels_are_the_published_ones():
    assert same(nf4.nf4_levels(), golden["levels"])
    assert same(nf4.dynamic_map(), golden["dynamic_map"])


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_equals_bitsandbytes(name, double):
    weight, kind = golden[f"{name}.weight"], f"{name}.{'double' if double else 'single'}"
    quantized = nf4.quantize_nf4(weight, double)
    assert same(quantized.packed, golden[f"{name}.packed"])
    for part in ("absmax",) + (("absmax2", "offset") if double else ()):
        assert same(getattr(quantized, part), golden[f"{kind}.{part}"])
    if f"{kind}.dequantised" in golden:
        assert same(nf4.dequantize_nf4(quantized), golden[f"{kind}.dequantised"])


def test_nested_scales_equal_bitsandbytes():
    """Enough of them that truly nearest codes would differ."""
    found = nf4._quantize_absmax(golden["scales"])
    for tensor, part in zip(found, ("absmax", "absmax2", "offset")):
        assert same(tensor, golden[f"scales.{part}"])


def test_pieces_of_a_large_weight_equal_the_whole(monkeypatch):
    torch.manual_seed(0)
    weight = torch.randn(33, 192)
    whole = nf4.quantize_nf4(weight)
    dequantised = nf4.dequantize_nf4(whole)
    monkeypatch.setattr(nf4, "PIECE", 256)
    assert same(nf4.quantize_nf4(weight).packed, whole.packed)
    assert same(nf4.quantize_nf4(weight).absmax, whole.absmax)
    assert same(nf4.dequantize_nf4(whole), dequantised)


def test_not_contiguous_and_other_shapes():
    weight = torch.randn(64, 6).t()
    assert same(nf4.quantize_nf4(weight).packed, nf4.quantize_nf4(weight.contiguous()).packed)
    assert nf4.dequantize_nf4(nf4.quantize_nf4(torch.randn(2, 8, 12))).shape == (2, 8, 12)


def test_bits_per_parameter():
    weight = torch.zeros(1024, 1024, dtype=torch.bfloat16)
    for double, bits in ((False, 4.5), (True, 4.127)):
        bytes_held = nf4.quantize_nf4(weight, double).nbytes
        assert bytes_held * 8 / weight.numel() == pytest.approx(bits, abs=5e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_refuses_what_is_not_finite(bad):
    weight = torch.randn(5, 64)
    weight[2, 3] = bad
    with pytest.raises(ValueError, match="not finite"):
        nf4.quantize_nf4(weight)


@pytest.mark.parametrize("name", [name for name in WEIGHTS if name not in CASES])
def test_refuses_a_block_that_is_not_whole(name):
    with pytest.raises(ValueError, match="no whole number of blocks of 64"):
        nf4.quantize_nf4(golden[f"{name}.weight"])


def test_error_on_a_gaussian():
    torch.manual_seed(0)
    weight = torch.randn(2**20)
    error = nf4.dequantize_nf4(nf4.quantize_nf4(weight)) - weight
    assert (error.norm() / weight.norm()).item() == pytest.approx(0.092, abs=2e-4)


# --- the layer ---

@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_backward_equal_a_dense_layer(double, dtype):
    quantised = layer(double_quant=double, dtype=torch.bfloat16)
    x = torch.randn(7, 64, dtype=dtype, requires_grad=True)
    grad = torch.randn(7, 48, dtype=dtype)
    y = quantised(x)
    dense = F.linear(x, quantised.weight.to(dtype), quantised.bias.to(dtype))
    assert same(y.detach(), dense.detach())
    found, = torch.autograd.grad(y, x, grad)
    expected = grad.double() @ quantised.weight.double()
    unit = torch.finfo(dtype).eps
    assert ((found.double() - expected).norm() / expected.norm()).item() < unit


def test_gradcheck():
    quantised = layer(5, 64)
    x = torch.randn(3, 2, 64, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(quantised, (x,), fast_mode=True)
    quantised.bias.requires_grad_()
    quantised(x).sum().backward()
    assert torch.equal(quantised.bias.grad, torch.full((5,), 6.0))


@pytest.mark.parametrize("double", [False, True])
def test_only_the_packed_weight_is_saved(double):
    quantised = layer(double_quant=double, bias=False)
    own = {buffer.data_ptr() for buffer in quantised.buffers()}
    saved = []

    def watch(tensor):
        saved.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(watch, lambda tensor: tensor):
        quantised(torch.randn(7, 64, requires_grad=True))
    assert saved and set(saved) <= own  # neither the weight nor x


def test_no_weight_is_alive_between_forward_and_backward():
    model = nn.Sequential(*(layer(512, 512, bias=False) for _ in range(8)))
    x = torch.randn(4, 512, requires_grad=True)
    model(x).sum().backward()
    with LivePeak() as live:
        model(x).sum().backward()
    weight = 512 * 512 * 4
    assert live.grown < 3.6 * weight  # one weight, its indices and its float32 scratch; not 8


@pytest.fixture
def compiler(monkeypatch):
    """What torch.compile needs, and what it leaves behind removed."""
    monkeypatch.setitem(sys.modules, "nf4", nf4)  # it looks for a function's globals there
    yield
    torch._dynamo.reset()
    gc.collect()


def partitioned(forwards):
    """A backend that runs what torch.compile's default one would, split at the same place, in
    eager mode, so that no C++ compiler is needed; collects what the forward hands over."""
    def compile_forward(graph, _):
        outputs = next(node for node in graph.graph.nodes if node.op == "output").args[0]
        forwards.append([node.meta["val"] for node in outputs if node is not None])
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=compile_forward, partition_fn=partition_fn,
                        bw_compiler=lambda graph, _: make_boxed_func(graph.forward))


@pytest.mark.parametrize("double", [False, True])
def test_compiled_saves_no_weight_either(double, compiler):
    model = nn.Sequential(layer(64, 64, double), nn.SiLU(), layer(64, 64, double))
    x = torch.randn(7, 64, requires_grad=True)
    expected = model(x)
    grad, = torch.autograd.grad(expected.sum(), x)
    for backend in ("aot_eager", partitioned(forwards := [])):
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        found = compiled(x)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found.sum(), x)[0], grad)
    assert forwards
    for value in forwards[0]:
        assert value.numel() < 64 * 64 or value.dtype == torch.uint8


def test_checkpointing_changes_nothing():
    quantised = layer()
    x = torch.randn(7, 64, requires_grad=True)
    again = torch.utils.checkpoint.checkpoint(quantised, x, use_reentrant=False)
    for function in (lambda y: y, lambda y: torch.autograd.grad(y.sum(), x)[0]):
        assert torch.equal(function(again), function(quantised(x)))


@pytest.mark.parametrize("double", [False, True])
def test_a_cast_moves_the_bias_and_not_the_scales(double):
    quantised = layer(double_quant=double)
    before = {name: buffer.clone() for name, buffer in quantised.named_buffers()}
    model = nn.Sequential(quantised).to(torch.bfloat16).half()
    assert quantised.bias.dtype == torch.float16
    for name, buffer in model[0].named_buffers():
        assert same(buffer, before[name])
    assert {buffer.device.type for buffer in model.to("meta").buffers()} == {"meta"}


def test_a_layer_takes_the_place_of_a_linear_one():
    linear = nn.Linear(64, 48)
    quantised = nf4.NF4Linear(nf4.quantize_nf4(linear.weight, True), linear.bias)
    assert (quantised.in_features, quantised.out_features) == (64, 48)
    assert quantised.weight.shape == (48, 64) and torch.equal(quantised.bias, linear.bias)
    assert not any(parameter.requires_grad for parameter in quantised.parameters())
    assert "double_quant=True" in repr(quantised)
    y = quantised(torch.randn(2, 64))
    y.addmm_(torch.randn(2, 3), torch.randn(3, 48))  # as an adapter adds its share


# --- loading ---

class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width, bias=False)
        self.q_proj = nn.Linear(width, width, bias=True)
        self.up_proj = nn.Linear(width, 2 * width, bias=False)


class Model(nn.Module):
    """The names of a decoder, and no more."""

    def __init__(self, width=64, vocab=100, layers=2, tied=False):
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(vocab, width)
        self.model.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.lm_head = None if tied else nn.Linear(width, vocab, bias=False)


def on_meta(**options):
    with torch.device("meta"):
        return Model(**options)


def tensors(model, backwards=False):
    items = [(name, value.detach()) for name, value in model.named_parameters()]
    return reversed(items) if backwards else items


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("double", [False, True])
def test_load_quantises_the_decoders_linears_only(double, backwards):
    torch.manual_seed(0)
    dense, model = Model(), on_meta()
    load_base(model, tensors(dense, backwards), double, dtype=torch.bfloat16)
    for name, module in dense.named_modules():
        loaded = model.get_submodule(name)
        if isinstance(module, nn.Linear) and "layers" in name:
            expected = nf4.quantize_nf4(module.weight.bfloat16(), double)
            assert type(loaded) is nf4.NF4Linear and loaded.dtype == torch.bfloat16
            assert same(loaded.packed, expected.packed) and same(loaded.absmax, expected.absmax)
        else:
            assert type(loaded) is type(module)
    for name, value in model.named_parameters():
        assert same(value.detach(), dense.get_parameter(name).detach().bfloat16())
        assert not value.requires_grad
    assert not any(buffer.is_meta for buffer in model.buffers())


def test_load_a_tied_model():
    dense = Model(tied=True)
    embedding = dense.model.embed_tokens.weight.detach()
    head = ("lm_head.weight", embedding.clone())
    rest = [item for item in tensors(dense) if "embed" not in item[0]]
    for stream in (tensors(dense), [head, *tensors(dense)], [*rest, head]):
        model = on_meta(tied=True)
        load_base(model, own_tensors(stream, tied=True))
        assert torch.equal(model.model.embed_tokens.weight, embedding)
    with pytest.raises(ValueError, match="lm_head.weight differs"):
        list(own_tensors([("lm_head.weight", embedding + 1), *tensors(dense)], tied=True))


@pytest.mark.parametrize("change, message", [
    (lambda items: items[:-1], "missing lm_head.weight"),
    (lambda items: [*items, ("model.layers.9.q_proj.weight", torch.zeros(2, 2))],
     "unexpected model.layers.9.q_proj.weight"),
    (lambda items: [*items, items[0]], "unexpected model.embed_tokens.weight"),
    (lambda items: [(n, v[:1]) if "q_proj.weight" in n else (n, v) for n, v in items],
     r"model.layers.0.q_proj.weight has shape \(1, 64\), not \(64, 64\)"),
    (lambda items: [(n, v * float("nan")) if "up_proj" in n else (n, v) for n, v in items],
     "model.layers.0.up_proj.weight cannot be quantised: .*not finite"),
    (lambda items: [(n, v.char()) if "up_proj" in n else (n, v) for n, v in items],
     "model.layers.0.up_proj.weight is int8"),
    (lambda items: [(n, nf4.quantize_nf4(v)) if "norm" in n else (n, v) for n, v in items],
     "model.layers.0.norm.weight is quantised: only linear"),
])
def test_load_names_what_does_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        load_base(on_meta(), change(list(tensors(Model()))))


def test_loading_peak_is_the_model_and_two_tensors():
    shapes = {name: value.shape for name, value in on_meta(width=256, layers=6).named_parameters()}

    def stream():  # made as it is read, as from a file
        for name, shape in shapes.items():
            yield name, torch.ones(shape, dtype=torch.bfloat16)

    model = on_meta(width=256, layers=6)
    load_base(on_meta(width=256, layers=1), ((n, torch.ones(s)) for n, s in shapes.items()
                                                    if "layers" not in n or "layers.0" in n))
    with LivePeak() as live:
        load_base(model, stream())
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    largest = max(shape.numel() for shape in shapes.values()) * 2
    scratch = 16 * 256 * 512  # one piece of a weight; fixed, but larger than these small tensors
    assert live.grown < held + 2 * largest + scratch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_weights_give_the_same_bits_and_are_given_back(dtype, monkeypatch):
    model = nn.Sequential(layer(64), layer(32, 64, True, bias=False))
    model.compute_dtype = dtype
    x = torch.randn(5, 64, dtype=dtype)
    expected, made = model(x), []
    real = nf4._dequantize
    monkeypatch.setattr(nf4, "_dequantize", lambda *parts: made.append(1) or real(*parts))
    with nf4.weights_kept(model):
        assert same(model(x), expected) and same(model(x), expected) and len(made) == 2
    with nf4.weights_kept(model, False):
        assert same(model(x), expected) and len(made) == 4
    with pytest.raises(KeyError), nf4.weights_kept(model):
        raise KeyError
    made.clear()
    assert same(model(x), expected) and len(made) == 2
