"""Chapter 1's model against transformers (goldens) and against float64 mathematics."""

import pytest
import torch
import torch.nn.functional as F
from checks import assert_equals_golden, random_documents
from helpers import GOLDENS, load
from safetensors.torch import load_file

from common import weights

qwen3 = load("chapter-01/modeling_qwen3.py")
packing = load("chapter-01/packing.py")

SMALL = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
    tie_word_embeddings=True,
)


def small_model(seed=0, **changes):
    torch.manual_seed(seed)
    model = qwen3.Qwen3ForCausalLM(qwen3.Qwen3Config.from_dict({**SMALL, **changes}))
    for parameter in model.parameters():  # large enough that every part matters
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def pack_of(documents):
    pack = packing.packed_sequence_collate_fn([(ids, ids) for ids in documents])
    return pack, pack.pop("labels")


# --- transformers ---

@pytest.mark.parametrize("name", ["qwen3_tied", "qwen3_untied"])
def test_logits_and_gradients_equal_transformers(name):
    folder = GOLDENS / "models" / name
    golden = load_file(folder.with_suffix(".safetensors"))
    config = qwen3.Qwen3Config.from_dict(weights.read_config(folder))
    assert config.head_dim != config.hidden_size // config.num_attention_heads
    assert config.num_key_value_heads < config.num_attention_heads
    model = qwen3.Qwen3ForCausalLM(config)
    weights.load_weights(model, folder)
    assert_equals_golden(model, packing.packed_sequence_collate_fn, golden)


# --- documents do not see one another ---

def test_incident_6_packed_equals_separate():
    model = small_model()
    documents = random_documents([5, 1, 9, 2])
    pack, labels = pack_of(documents)
    # Rotary embedding sees differences only, so the logits alone would not tell.
    assert pack["position_ids"].tolist() == sum((list(range(len(ids))) for ids in documents), [])
    packed = model(**pack)
    F.cross_entropy(packed, labels, reduction="sum").backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    separate = []
    for document in documents:
        alone, labels = pack_of([document])
        separate.append(model(**alone))
        F.cross_entropy(separate[-1], labels, reduction="sum").backward()
    torch.testing.assert_close(packed, torch.cat(separate), rtol=0, atol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5)


def test_incident_5_changing_document_a_leaves_document_b_bitwise():
    model = small_model()
    documents = random_documents([7, 6, 3])
    before = model(**pack_of(documents)[0])
    documents[0] = (documents[0] + 1) % 64
    after = model(**pack_of(documents)[0])
    assert not torch.equal(before[:7], after[:7])
    assert torch.equal(before[7:], after[7:])


def test_attention_is_causal():
    model = small_model()
    (document,) = random_documents([8])
    before = model(**pack_of([document])[0])
    changed = document.clone()
    changed[5] = (changed[5] + 1) % 64
    after = model(**pack_of([changed])[0])
    assert torch.equal(before[:5], after[:5]) and not torch.equal(before[5:], after[5:])


# --- attention against float64 ---

def attention_oracle(q, k, v, cu_seqlens):
    """Softmax with a dense block-diagonal causal mask, written from the equation."""
    T, H, d = q.shape
    k, v = (x.repeat_interleave(H // k.shape[1], dim=1) for x in (k, v))
    document = torch.bucketize(torch.arange(T), cu_seqlens[1:].long(), right=True)
    visible = (document[:, None] == document[None]) & torch.ones(T, T).tril().bool()
    scores = torch.einsum("thd,shd->hts", q, k) / d**0.5
    scores = scores.masked_fill(~visible, float("-inf"))
    return torch.einsum("hts,shd->thd", scores.softmax(-1), v)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (6, 1)])
def test_varlen_attention_equals_dense_mask(dtype, tolerance, heads, kv_heads):
    lengths = [1, 5, 17, 1, 8]
    generator = torch.Generator().manual_seed(0)
    shape = lambda n: (sum(lengths), n, 8)
    tensors = [torch.randn(shape(n), generator=generator, dtype=torch.float64)
               for n in (heads, kv_heads, kv_heads, heads)]
    cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    results = []
    for function, kind in ((attention_oracle, torch.float64), (None, dtype)):
        q, k, v = (t.to(kind, copy=True).requires_grad_() for t in tensors[:3])
        if function is None:
            output = qwen3.varlen_attention(q, k, v, cu_seqlens, max(lengths))
        else:
            output = function(q, k, v, cu_seqlens)
        output.backward(tensors[3].to(kind))
        results.append([t.double() for t in (output.detach(), q.grad, k.grad, v.grad)])
    for expected, actual in zip(*results):
        assert (actual - expected).norm() <= tolerance * expected.norm()


# --- rotary embedding, norm, masters ---

def test_rotary_angles_are_float32_and_exact_at_long_positions():
    positions = torch.tensor([0, 1, 4095, 40000])
    cos, sin = qwen3.rotary_tables(positions, 16, 1e6)
    assert cos.dtype == sin.dtype == torch.float32
    exponents = torch.arange(0, 16, 2, dtype=torch.float64) / 16
    angles = positions.double()[:, None] / 1e6**exponents
    # float32 positions times float32 frequencies: the angle is right to 40000 · 2^-23 radians.
    torch.testing.assert_close(cos[:, 0].double(), angles.cos(), rtol=0, atol=1e-2)
    torch.testing.assert_close(cos[:3, 0].double(), angles[:3].cos(), rtol=0, atol=1e-3)


def test_rotation_depends_on_the_distance_only():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 16, generator=generator, dtype=torch.float64)
    def score(m, n):
        turned = [qwen3.apply_rotary(x, *(t.double() for t in qwen3.rotary_tables(
            torch.tensor([p]), 16, 1e4))) for x, p in ((q, m), (k, n))]
        return (turned[0] * turned[1]).sum()
    assert (score(3, 1) - score(13, 11)).abs() < 1e-5
    assert (score(3, 1) - score(3, 2)).abs() > 1e-3


def test_rmsnorm_equation():
    norm = qwen3.RMSNorm(8, eps=1e-6)
    norm.weight.data = torch.randn(8, generator=torch.Generator().manual_seed(0))
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    x64 = x.double()
    expected = norm.weight.double() * x64 / (x64.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(norm(x).double(), expected, rtol=1e-6, atol=1e-6)
    assert norm(x.bfloat16()).dtype == torch.bfloat16


def test_bf16_compute_keeps_float32_masters_and_gradients():
    model = small_model()
    pack, labels = pack_of(random_documents([6, 4]))
    reference = model(**pack)
    model.compute_dtype = torch.bfloat16
    logits = model(**pack)
    assert logits.dtype == torch.bfloat16
    assert (logits - reference).norm() < 0.03 * reference.norm()
    F.cross_entropy(logits.float(), labels).backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())


def test_a_temperature_too_small_for_float32_is_greedy():
    generate = load("chapter-01/generate.py").generate
    model, prompts = small_model(), [[5, 9, 2], [7], [60, 1, 1, 33]]
    greedy = generate(model, prompts, 8)
    for temperature in (5e-324, 1e-46, 1e-40, 1.1e-38, 2e-38, 1e-30):
        assert generate(model, prompts, 8, temperature=temperature) == greedy
    assert generate(model, prompts, 8, temperature=3.0) != greedy


# --- configuration, initialisation, tying ---

def test_initial_weights_follow_initializer_range():
    torch.manual_seed(0)
    model = qwen3.Qwen3ForCausalLM(qwen3.Qwen3Config.from_dict({**SMALL, "hidden_size": 256}))
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all()
        else:
            assert abs(parameter.std().item() - 0.02) < 0.002, name


def test_tied_embeddings_are_one_parameter():
    tied, untied = small_model(), small_model(tie_word_embeddings=False)
    assert "lm_head.weight" not in dict(tied.named_parameters())
    assert "lm_head.weight" in dict(untied.named_parameters())
    pack, _ = pack_of(random_documents([4]))
    tied(**pack).sum().backward()
    # Token 0 learns as every other token does: it is nobody's padding.
    assert (tied.model.embed_tokens.weight.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize("change", [
    {"model_type": "llama"}, {"hidden_act": "gelu"}, {"attention_bias": True},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, {"use_sliding_window": True},
    {"attention_dropout": 0.1}, {"head_dim": 15}, {"num_attention_heads": 3},
    {"hidden_size": "32"}, {"vocab_size": 0}, {"num_hidden_layers": None},
    {"tie_word_embeddings": 1}, {"layer_types": ["full_attention", "sliding_attention"]},
    {"quantization_config": {"load_in_4bit": True}},
])
def test_config_refuses_by_name(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        qwen3.Qwen3Config.from_dict({**SMALL, **change})
