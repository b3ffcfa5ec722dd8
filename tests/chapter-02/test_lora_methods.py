"""Each method of lora.py against float64 mathematics written from its paper's equation."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import load
from torch import nn

from common.adapters.targets import QuantizedLinear
from common.errors import UserError

llama = load("chapter-02/modeling_llama.py")
lora = load("chapter-02/lora.py")
METHODS = [method for method in lora.METHODS if method != "full"]
NO_DROPOUT = ("pissa", "delta-lora")
# in, out, rank, bias: ordinary, the other way round, rank 1, and a rank above min(in, out).
SHAPES = [(12, 20, 4, False), (20, 12, 4, True), (12, 20, 1, True), (6, 5, 9, True)]


def allowed(method, shape):
    return not (method == "pissa" and shape[2] > min(shape[:2]))


CASES = [(method, shape) for method in METHODS for shape in SHAPES if allowed(method, shape)]


class Toy(nn.Module):
    """One linear layer with a name, as the model file's `Linear` or as PyTorch's."""

    def __init__(self, inputs, outputs, bias, dtype, linear=llama.Linear):
        super().__init__()
        self.q_proj = linear(inputs, outputs, bias=bias, dtype=dtype)

    def forward(self, x):
        return self.q_proj(x)


def make(method, shape, dtype=torch.float64, linear=llama.Linear, randomise=True, **options):
    """(Toy with one adapter of random values, config, weight before it was adapted)."""
    inputs, outputs, rank, bias = shape
    torch.manual_seed(3)
    toy = Toy(inputs, outputs, bias, dtype, linear)
    original = toy.q_proj.weight.detach().clone()
    options = {"method": method, "rank": rank, "alpha": 3.0, "seed": 5, **options}
    config = lora.AdapterConfig(**options)
    lora.apply_adapter(toy, config)
    if dtype == torch.float64:
        toy.double()
    if randomise:
        with torch.no_grad():
            for parameter in toy.q_proj.parameters(recurse=False):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return toy, config, original


def scale_of(method, config):
    return config.alpha / (math.sqrt(config.rank) if method == "rslora" else config.rank)


def oracle(method, layer, config, x, upstream):
    """{"y", "x" and each parameter's name: what it, or its gradient, must be}, all in float64."""
    W = layer.base.weight.detach().double()
    bias = 0 if layer.base.bias is None else layer.base.bias.detach().double()
    p = {name: value.detach().double() for name, value in layer.named_parameters(recurse=False)}
    X, G = x.detach().double(), upstream.double()
    if method == "vera":
        A = layer.shared.vera_A.double()[:, :W.shape[1]]
        B = layer.shared.vera_B.double()[:W.shape[0]]
        b, d = p["vera_lambda_b"], p["vera_lambda_d"]
        return {
            "y": X @ W.T + b * (((X @ A.T) * d) @ B.T) + bias,
            "x": G @ (W + b[:, None] * (B @ torch.diag(d) @ A)),
            "vera_lambda_b": (G * ((X @ A.T * d) @ B.T)).sum(0),
            "vera_lambda_d": (((G * b) @ B) * (X @ A.T)).sum(0),
        }
    A, B, s = p["lora_A"], p["lora_B"], scale_of(method, config)
    V, dV = W + s * B @ A, G.T @ X  # of the weight as a whole
    expected = {}
    if method == "dora":
        m, c = p["lora_magnitude_vector"], V.norm(dim=1)
        expected["lora_magnitude_vector"] = (dV * V).sum(1) / c
        V, dV = (m / c)[:, None] * V, (m / c)[:, None] * dV
    expected |= {"y": X @ V.T + bias, "x": G @ V, "lora_A": s * B.T @ dV, "lora_B": s * dV @ A.T}
    if method == "lora-fa":
        del expected["lora_A"]
    return expected


def close(actual, expected, tolerance):
    actual, expected = actual.detach().double(), expected.double()
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"relative error {error:.2e}"


# --- the equations ---

@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("method, shape", CASES)
def test_forward_and_gradients_equal_the_papers_equation(method, shape, dtype, tolerance):
    toy, config, _ = make(method, shape, dtype)
    x = torch.randn(30, shape[0], dtype=dtype, requires_grad=True)
    upstream = torch.randn(30, shape[1], dtype=dtype)
    y = toy(x)
    y.backward(upstream)
    layer = toy.q_proj
    got = {"y": y, "x": x.grad}
    for name, parameter in layer.named_parameters(recurse=False):
        if parameter.requires_grad:
            assert parameter.grad.dtype == dtype
            got[name] = parameter.grad
    expected = oracle(method, layer, config, x, upstream)
    assert got.keys() == expected.keys()
    for name in got:
        close(got[name], expected[name], tolerance)
    assert layer.base.weight.grad is None and (not shape[3] or layer.base.bias.grad is None)


@pytest.mark.parametrize("linear, base_dtype", [
    (llama.Linear, torch.float32), (llama.Linear, torch.bfloat16), (nn.Linear, torch.bfloat16)])
@pytest.mark.parametrize("method", METHODS)
def test_in_bfloat16_adapters_and_their_gradients_stay_float32(method, linear, base_dtype):
    if method == "delta-lora" and base_dtype == torch.bfloat16:
        pytest.raises(UserError, make, method, SHAPES[1], base_dtype).match("float32 base weight")
        return
    toy, config, _ = make(method, (64, 48, 4, True), base_dtype, linear)
    x = torch.randn(30, 64).bfloat16().requires_grad_()
    upstream = torch.randn(30, 48).bfloat16()
    y = toy(x)
    y.backward(upstream)
    assert y.dtype == torch.bfloat16
    expected = oracle(method, toy.q_proj, config, x, upstream)
    close(y, expected["y"], 0.02)
    close(x.grad, expected["x"], 0.02)
    for name, parameter in toy.q_proj.named_parameters(recurse=False):
        assert parameter.dtype == torch.float32
        if parameter.requires_grad:
            assert parameter.grad.dtype == torch.float32
            close(parameter.grad, expected[name], 0.02)


@pytest.mark.parametrize("method, shape", CASES)
def test_one_merged_weight_does_the_same(method, shape):
    toy, _, original = make(method, shape)
    layer = toy.q_proj
    x = torch.randn(30, shape[0], dtype=torch.float64)
    merged = layer.merged()
    close(F.linear(x, merged, layer.base.bias), toy(x), 1e-13)
    close(original + layer.delta(), merged, 1e-13)
    assert not merged.requires_grad
    assert make(method, shape, torch.float32)[0].q_proj.merged().dtype == torch.float32


def test_a_merged_bfloat16_base_is_float32():
    layer = make("dora", SHAPES[1], torch.bfloat16)[0].q_proj
    assert layer.merged().dtype == layer.delta().dtype == torch.float32


# --- at the start nothing changes ---

@pytest.mark.parametrize("linear, base_dtype, dtype", [
    (llama.Linear, torch.float32, torch.float32), (llama.Linear, torch.float32, torch.bfloat16),
    (llama.Linear, torch.bfloat16, torch.bfloat16), (nn.Linear, torch.bfloat16, torch.bfloat16)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_at_the_start_a_layer_equals_its_base(method, bias, linear, base_dtype, dtype):
    if method == "delta-lora" and base_dtype == torch.bfloat16:
        return  # refused, see above
    torch.manual_seed(1)
    toy = Toy(96, 64, bias, base_dtype, linear)
    toy.q_proj.weight.data[3] = 0  # DoRA divides by a row's norm
    x = torch.randn(40, 96).to(dtype)
    before = toy(x)
    lora.apply_adapter(toy, lora.AdapterConfig(method=method, rank=8))
    if method != "pissa":
        assert torch.equal(toy(x), before)
    elif dtype == torch.float32:
        assert (toy(x) - before).abs().max() <= 1e-5
    else:
        close(toy(x), before, 0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_at_the_start_a_models_logits_equal_the_base_models(family, method, dtype):
    model, pack = small_model(family), small_pack()
    model.compute_dtype = dtype
    with torch.no_grad():
        before = model(**pack)
        lora.apply_adapter(model, lora.AdapterConfig(method=method, rank=4))
        after = model(**pack)
    if method != "pissa":
        assert torch.equal(before, after)
    elif dtype == torch.float32:
        assert (before - after).abs().max() <= 1e-5


def small_model(family="qwen3", tied=False):
    torch.manual_seed(0)
    return llama.LlamaForCausalLM(llama.LlamaConfig.from_dict(dict(
        model_type=family, vocab_size=64, hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        max_position_embeddings=64, rope_theta=1e4, tie_word_embeddings=tied,
        initializer_range=0.2)))


def small_pack():
    ids = torch.arange(12) * 5 % 64
    return {"input_ids": ids, "cu_seqlens": torch.tensor([0, 7, 12], dtype=torch.int32),
            "max_seqlen": 7, "position_ids": torch.tensor([*range(7), *range(5)])}


# --- what each method claims ---

def test_first_values():
    layer = make("lora", (50, 40, 8, False), torch.float32, randomise=False)[0].q_proj
    assert layer.lora_A.shape == (8, 50) and layer.lora_B.shape == (40, 8)
    assert not layer.lora_B.any()
    bound = 1 / math.sqrt(50)
    assert 0.97 * bound < layer.lora_A.abs().max() <= bound and layer.lora_A.mean().abs() < 0.02
    again = make("lora", (50, 40, 8, False), torch.float32, randomise=False)[0].q_proj
    assert torch.equal(layer.lora_A, again.lora_A)
    other = make("lora", (50, 40, 8, False), torch.float32, randomise=False, seed=6)[0].q_proj
    assert not torch.equal(layer.lora_A, other.lora_A)
    vera = make("vera", (50, 40, 8, False), torch.float32, randomise=False)[0].q_proj
    assert not vera.vera_lambda_b.any() and (vera.vera_lambda_d == 0.1).all()


def test_rslora_is_lora_with_a_larger_alpha():
    rs, config, _ = make("rslora", (12, 20, 8, True))
    plain, _, _ = make("lora", (12, 20, 8, True), alpha=config.alpha * math.sqrt(8))
    plain.load_state_dict(rs.state_dict())
    x = torch.randn(9, 12, dtype=torch.float64)
    assert torch.allclose(rs(x), plain(x), rtol=1e-14, atol=1e-14)


def test_dora_merged_rows_have_length_m_and_the_norm_is_a_constant_to_the_backward():
    toy, config, _ = make("dora", (12, 20, 4, False))
    layer = toy.q_proj
    merged = layer.merged()
    assert torch.allclose(merged.norm(dim=1), layer.lora_magnitude_vector.abs(), rtol=1e-14)
    A, B = layer.factors()
    V = layer.base.weight + B @ A
    assert torch.allclose(layer.row_norms(), V.norm(dim=1), rtol=1e-14)

    x, upstream = torch.randn(30, 12).double(), torch.randn(30, 20).double()
    toy(x).backward(upstream)
    m = layer.lora_magnitude_vector.detach()
    full = torch.autograd.grad((x @ ((m / V.norm(dim=1))[:, None] * V).T * upstream).sum(),
                               layer.lora_B)[0]
    detached = layer.lora_B.grad
    assert F.cosine_similarity(full.flatten(), detached.flatten(), 0) < 0.999
    # What the constant leaves in, and the full derivative takes out: growth along V's own rows.
    direction = torch.autograd.grad(
        (x @ ((m / V.norm(dim=1))[:, None] * (W := V.detach().requires_grad_())
              / W.norm(dim=1)[:, None] * V.norm(dim=1)[:, None]).T * upstream).sum(), W)[0]
    assert (direction * V).sum(1).abs().max() < 1e-12


def test_doras_m_is_not_rounded_to_bfloat16():
    layer = make("dora", (64, 48, 4, False), torch.float32, randomise=False)[0].q_proj
    x = torch.randn(400, 64).bfloat16()
    before = layer(x).double().square().sum().sqrt()
    layer.lora_magnitude_vector.data *= 1.006  # in bfloat16 this is 1.0078
    assert abs(layer(x).double().square().sum().sqrt() / before - 1.006) < 5e-4


def test_vera_shares_one_pair_of_matrices_and_stays_so():
    model = lora.apply_adapter(small_model(), lora.AdapterConfig(method="vera", rank=4, seed=3))
    shapes, buffers = set(), set()
    for module in (model, model.double()):
        buffers = {id(layer.shared.vera_A) for _, layer in lora.adapter_modules(module)}
        buffers |= {id(layer.shared.vera_B) for _, layer in lora.adapter_modules(module)}
        assert len(buffers) == 2
    for _, layer in lora.adapter_modules(model):
        A, B = layer.factors()
        shapes.add((A.shape, B.shape))
        assert A.data_ptr() == layer.shared.vera_A.data_ptr()
    assert len(shapes) == 5  # q, k = v, o, gate = up, down
    assert layer.shared.vera_A.shape == (4, 64) and layer.shared.vera_B.shape == (64, 4)
    assert not any("vera_A" in name or "vera_B" in name for name in model.state_dict())
    again = lora.apply_adapter(small_model(), lora.AdapterConfig(method="vera", rank=4, seed=3))
    other = lora.apply_adapter(small_model(), lora.AdapterConfig(method="vera", rank=4, seed=4))
    A, A_again, A_other = (
        next(lora.adapter_modules(m))[1].shared.vera_A.float() for m in (model, again, other))
    assert torch.equal(A, A_again) and not torch.equal(A, A_other)


@pytest.mark.parametrize("inputs, outputs, rank", [(12, 20, 4), (20, 12, 12), (12, 20, 1)])
def test_pissa_takes_the_largest_singular_values_out_of_the_base(inputs, outputs, rank):
    toy, config, W = make("pissa", (inputs, outputs, rank, False), randomise=False)
    layer, s = toy.q_proj, config.alpha / rank
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    rest = layer.base.weight
    following = S[rank] if rank < len(S) else torch.tensor(0.0)
    assert (torch.linalg.matrix_norm(rest, 2) - following).abs() < 1e-12
    assert (rest.T @ U[:, :rank]).abs().max() < 1e-12
    assert torch.allclose(layer.lora_B.T @ layer.lora_B, torch.diag(S[:rank] / s), atol=1e-12)
    assert torch.allclose(layer.lora_A @ layer.lora_A.T, torch.diag(S[:rank] / s), atol=1e-12)
    assert (layer.original() - W).abs().max() < 1e-14
    with torch.no_grad():  # trained, it is an adapter of rank 2r for the original weight
        layer.lora_A.add_(torch.randn_like(layer.lora_A))
        B2 = torch.cat((layer.lora_B, -layer.initial_B), 1)
        A2 = torch.cat((layer.lora_A, layer.initial_A), 0)
        assert (W + s * B2 @ A2 - layer.merged()).abs().max() < 1e-12


def test_pissa_is_the_same_every_time():
    first, second = (make("pissa", (48, 64, 8, True), torch.float32, randomise=False)[0]
                     for _ in range(2))
    for one, two in zip(first.parameters(), second.parameters()):
        assert torch.equal(one, two)


@pytest.mark.parametrize("shape", SHAPES)
def test_lora_fa_projects_the_gradient_of_the_weight_onto_the_rows_of_A(shape):
    toy, config, _ = make("lora-fa", shape)
    layer, s = toy.q_proj, config.alpha / config.rank
    assert not layer.lora_A.requires_grad
    x, upstream = torch.randn(30, shape[0]).double(), torch.randn(30, shape[1]).double()
    toy(x).backward(upstream)
    plain = layer.lora_B.grad.clone()
    lora.before_step(toy, replace(config, project_gradient=False))
    assert torch.equal(layer.lora_B.grad, plain)
    lora.before_step(toy, config)
    A, of_weight = layer.lora_A, upstream.T @ x
    close(s * layer.lora_B.grad @ A, of_weight @ torch.linalg.pinv(A) @ A, 1e-12)
    if config.rank <= min(shape[:2]):
        close(layer.lora_B.grad, plain @ torch.linalg.inv(A @ A.T) / s**2, 1e-12)


# --- what is kept for the backward ---

def saved_for_backward(module, x):
    """The tensors that autograd keeps beside the module's parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = module(x)
    return [t for t in saved if t.untyped_storage().data_ptr() not in own], y


def saved_bytes(method, dtype=torch.float32, tokens=512, width=64, rank=4, dropout=0.0):
    torch.manual_seed(0)
    toy = Toy(width, width, False, torch.float32)
    if method == "frozen":
        toy.requires_grad_(False)
    else:
        lora.apply_adapter(toy, lora.AdapterConfig(method=method, rank=rank, dropout=dropout))
    x = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    saved, y = saved_for_backward(toy, x)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved
                if t.shape[0] == tokens or (t.ndim == 2 and t.shape[1] == tokens)}
    assert y.dtype == dtype
    for tensor in saved:  # nothing as large as x may be in more digits than x
        assert tensor.numel() < tokens * width or tensor.element_size() <= x.element_size()
    return sum(storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_saved_for_the_backward(dtype):
    """In units of one activation: x is (512, 64), and an r-wide product a sixteenth of it."""
    unit = 512 * 64 * dtype.itemsize
    units = {method: saved_bytes(method, dtype) / unit for method in ("frozen", *lora.METHODS)}
    assert units["frozen"] == 0 and units["full"] == 1
    for method in ("lora", "rslora", "pissa", "lora+", "delta-lora"):
        assert units[method] == 1 + 1 / 16  # no less than full fine-tuning
    assert units["lora-fa"] == 1 / 16  # x is not kept
    assert units["vera"] == 1 / 16  # nor is b's (T, out) factor
    assert units["dora"] == 2 + 1 / 16  # and the output, for the gradient of m
    masked = saved_bytes("lora", dtype, dropout=0.1) / unit
    assert 2 + 1 / 16 >= masked > units["lora"]  # the mask, and a dropped x of the layer's own


# --- dropout ---

@pytest.mark.parametrize("method", METHODS)
def test_dropout_where_the_method_allows_it(method):
    if method in NO_DROPOUT:
        with pytest.raises(UserError, match=f"--dropout must be 0 with {method}"):
            lora.AdapterConfig(method=method, dropout=0.1)
        return
    toy, _, _ = make(method, (12, 20, 4, True), dropout=0.5)
    layer, x = toy.q_proj, torch.randn(30, 12, dtype=torch.float64)
    torch.manual_seed(11)
    first = toy(x)
    torch.manual_seed(11)
    assert torch.equal(toy(x), first)
    assert not torch.equal(toy(x), first)  # and another mask from the next numbers
    # The base sees x, the change that the adapter makes sees drop(x).
    torch.manual_seed(11)
    dropped = F.dropout(x, 0.5)
    change = layer.merged() - layer.base.weight
    close(first, F.linear(x, layer.base.weight, layer.base.bias) + dropped @ change.T, 1e-12)
    toy.eval()
    close(toy(x), F.linear(x, layer.merged(), layer.base.bias), 1e-12)
    toy.train()
    x.requires_grad_()
    toy(x).sum().backward()
    assert all(p.grad is not None for p in toy.parameters() if p.requires_grad)


def test_an_adapter_is_in_the_models_mode():
    model = small_model().eval()
    lora.apply_adapter(model, lora.AdapterConfig(dropout=0.5))
    assert not any(layer.training for _, layer in lora.adapter_modules(model))


# --- into a model ---

@pytest.mark.parametrize("method", METHODS)
def test_only_the_adapters_are_trainable_and_as_many_as_the_formula_says(method):
    model = lora.apply_adapter(small_model(), lora.AdapterConfig(method=method, rank=4))
    layers = dict(lora.adapter_modules(model))
    assert len(layers) == 14 and all("lm_head" not in name for name in layers)
    r, expected = 4, 0
    for layer in layers.values():
        n, m = layer.base.in_features, layer.base.out_features
        expected += {"dora": r * (m + n) + m, "vera": m + r, "lora-fa": r * m}.get(
            method, r * (m + n))
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trainable.values()) == expected
    assert all(name.rpartition(".")[2].startswith(("lora_", "vera_")) for name in trainable)
    assert all(p.dtype == torch.float32 for p in trainable.values())
    assert all(p.is_contiguous() for p in trainable.values())  # FSDP2 asks for it


@pytest.mark.parametrize("method", METHODS)
def test_on_the_meta_device_too(method):
    with torch.device("meta"):
        model = small_model()
    lora.apply_adapter(model, lora.AdapterConfig(method=method, rank=4))
    assert all(parameter.is_meta for parameter in model.parameters())


def test_full_changes_nothing():
    model = small_model()
    names = [name for name, _ in model.named_parameters()]
    lora.apply_adapter(model, lora.AdapterConfig(method="full"))
    assert [name for name, p in model.named_parameters() if p.requires_grad] == names
    assert lora.state_names(model) == names


@pytest.mark.parametrize("target_modules, count", [
    ("all-linear", 14), ("q_proj,v_proj", 4), ("q_proj, v_proj", 4), (("down_proj",), 2),
    ("self_attn.k_proj", 2), ("model.layers.1.mlp.up_proj", 1), ("lm_head", 1),
    (r".*\.(gate|up)_proj", 4), (r"model\.layers\.0\..*", 7)])
def test_targets(target_modules, count):
    config = lora.AdapterConfig(target_modules=target_modules, rank=2)
    model, pack = small_model(), small_pack()
    before = model(**pack)
    lora.apply_adapter(model, config)
    layers = dict(lora.adapter_modules(model))
    assert len(layers) == count
    assert torch.equal(model(**pack), before)
    for layer in layers.values():
        layer.lora_B.data.normal_()
    assert not torch.equal(model(**pack), before)  # the model does use them


@pytest.mark.parametrize("target_modules, message", [
    ("q_porj", "no linear layer has a name that fits.*down_proj, gate_proj"),
    ("q_proj,nothing", "no linear layer has a name that fits"),
    ("(q_proj|v_proj)", "must fit the whole of, for example, model.layers.0.self_attn.q_proj"),
    ("proj", "no linear layer"), ("input_layernorm", "no linear layer"),
    ("q_proj[", "neither names nor a regular expression"),
    ("embed_tokens", "is an embedding"), (r".*embed.*", "is an embedding")])
def test_targets_that_do_not_fit(target_modules, message):
    with pytest.raises(UserError, match=message):
        lora.apply_adapter(small_model(), lora.AdapterConfig(target_modules=target_modules))


@pytest.mark.parametrize("target_modules", ["lm_head", "q_proj,lm_head", "embed_tokens", r".*"])
def test_tied_embeddings_are_refused_with_the_reason(target_modules):
    with pytest.raises(UserError, match="are one tensor .tie_word_embeddings."):
        lora.apply_adapter(
            small_model(tied=True), lora.AdapterConfig(target_modules=target_modules))


def test_adapters_on_adapters_are_refused():
    model = lora.apply_adapter(small_model(), lora.AdapterConfig())
    with pytest.raises(UserError, match="has adapters already"):
        lora.apply_adapter(model, lora.AdapterConfig())


class Quantised(QuantizedLinear):
    """Like chapter 3's NF4Linear to an adapter: its weight is computed, not a parameter."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.in_features, self.out_features, self.bias = inputs, outputs, None
        self.register_buffer("packed", torch.randint(-9, 9, (outputs, inputs), dtype=torch.int8))

    @property
    def weight(self):
        return self.packed.bfloat16() / 16

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


@pytest.mark.parametrize("method", METHODS)
def test_on_a_quantised_base(method):
    toy = Toy(8, 8, False, torch.float32)
    toy.q_proj = Quantised(24, 16)
    config = lora.AdapterConfig(method=method, rank=4)
    if method in ("pissa", "delta-lora"):
        with pytest.raises(UserError, match=f"{method} changes the base weight.*quantised"):
            lora.apply_adapter(toy, config)
        return
    x = torch.randn(30, 24)
    before = toy(x)
    lora.apply_adapter(toy, config)
    assert torch.equal(toy(x), before)
    with torch.no_grad():
        for parameter in toy.q_proj.parameters(recurse=False):
            parameter.add_(0.1 * torch.randn_like(parameter))
    # DoRA's norm sees the weight as far as it is known, in bfloat16.
    close(x @ toy.q_proj.merged().T, toy(x), 1e-2 if method == "dora" else 1e-6)


@pytest.mark.parametrize("options, message", [
    ({"method": "lorra"}, "--method 'lorra' does not exist .did you mean lora.*delta-lora"),
    ({"rank": 0}, "--rank 0 is out of range"), ({"rank": 2.5}, "--rank 2.5 is not a whole number"),
    ({"rank": True}, "--rank True is not a whole number"), ({"alpha": 0}, "--alpha 0 is out of"),
    ({"alpha": math.inf}, "--alpha inf"), ({"alpha": math.nan}, "--alpha nan"),
    ({"alpha": "8"}, "--alpha '8' is not a number"), ({"dropout": 1.0}, "--dropout 1.0 is out"),
    ({"dropout": -0.1}, "--dropout -0.1"), ({"lr_ratio": 0}, "--lr-ratio 0"),
    ({"method": "pissa", "rank": 40}, "--rank 40 is too large for pissa.*32 singular values")])
def test_options_that_no_run_could_use(options, message):
    with pytest.raises(UserError, match=message):
        lora.apply_adapter(small_model(), lora.AdapterConfig(**options))
