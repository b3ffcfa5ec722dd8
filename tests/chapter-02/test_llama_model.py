"""Chapter 2's model against transformers (goldens), chapter 1 (bitwise) and float64 mathematics."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from checks import assert_equals_golden, random_documents
from helpers import GOLDENS, ROOT, load
from safetensors.torch import load_file

from common import hub, weights
from common.asking.generation import generate
from common.asking.kv_cache import KVCache
from common.errors import UserError

llama = load("chapter-02/modeling_llama.py")
llama_config = load("chapter-02/llama_config.py")
qwen3 = load("chapter-01/modeling_qwen3.py")
packing = load("chapter-02/packing.py")

SMALL = dict(
    model_type="llama", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
    rope_theta=1e4, tie_word_embeddings=True,
)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=2.0,
            beta_slow=0.5)


def small_model(seed=0, **changes):
    torch.manual_seed(seed)
    model = llama.LlamaForCausalLM(llama.LlamaConfig.from_dict({**SMALL, **changes}))
    for parameter in model.parameters():  # large enough that every part matters
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def pack_of(documents):
    pack = packing.packed_sequence_collate_fn([(ids, ids) for ids in documents])
    return pack, pack.pop("labels")


# --- transformers ---

NAMES = ["llama3_tied", "llama3_untied", "qwen2_tied", "qwen2_untied", "qwen3_tied", "qwen3_untied"]


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_gradients_equal_transformers(name):
    folder = GOLDENS / "models" / name
    golden = load_file(folder.with_suffix(".safetensors"))
    config = llama.LlamaConfig.from_dict(weights.read_config(folder))
    assert config.tie_word_embeddings == name.endswith("_tied")
    assert (config.qk_norm, config.qkv_bias, config.rope_scaling is not None) == tuple(
        name.startswith(family) for family in ("qwen3", "qwen2", "llama3"))
    model = llama.LlamaForCausalLM(config)
    weights.load_weights(model, folder)
    assert_equals_golden(model, packing.packed_sequence_collate_fn, golden)


MORE = ["mistral_window", "qwen2_window", "qwen3_window", "llama_yarn", "llama_linear"]


@pytest.mark.parametrize("name", MORE)
def test_windows_scalings_and_biases_equal_transformers(name):
    """Logits and gradients; and what it generates, of unequal prompts, through the cache."""
    folder = GOLDENS / "families" / name
    golden = load_file(folder.with_suffix(".safetensors"))
    config = llama.LlamaConfig.from_dict(weights.read_config(folder))
    assert any(config.windows) == name.endswith("window")
    model = llama.LlamaForCausalLM(config)
    weights.load_weights(model, folder)
    assert_equals_golden(model, packing.packed_sequence_collate_fn, golden)
    prompts = [ids.tolist() for ids in golden["input_ids"].split(golden["lengths"].tolist())]
    assert generate(model, prompts, 8) == golden["generated"].tolist()


def test_on_qwen3_it_is_chapter_1_to_the_bit():
    small = {**SMALL, "model_type": "qwen3"}
    one = qwen3.Qwen3ForCausalLM(qwen3.Qwen3Config.from_dict(small))
    two = small_model(model_type="qwen3")
    one.load_state_dict(two.state_dict())
    pack, labels = pack_of(random_documents([7, 1, 20]))
    logits = [model(**pack) for model in (one, two)]
    assert torch.equal(*logits)
    for model, output in zip((one, two), logits):
        F.cross_entropy(output, labels).backward()
    for a, b in zip(one.parameters(), two.parameters()):
        assert torch.equal(a.grad, b.grad)


# --- rotary embedding ---

@pytest.mark.parametrize("scaling", [LLAMA3, {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192}])
def test_llama3_scaling_equals_the_definition_by_cases(scaling):
    theta, head_dim = 5e5 if scaling["factor"] == 32 else 100.0, 64
    config = llama.LlamaConfig.from_dict(
        {**SMALL, "head_dim": head_dim, "rope_theta": theta, "rope_scaling": scaling})
    positions = torch.tensor([0, 1, 2, 63, 300])
    cos, sin = llama.rotary_tables(positions, config)
    cases = set()
    for i in range(head_dim // 2):
        frequency = theta ** (-2 * i / head_dim)
        wavelength = 2 * math.pi / frequency
        length = scaling["original_max_position_embeddings"]
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        if wavelength < length / high:
            case, expected = "kept", frequency
        elif wavelength > length / low:
            case, expected = "slowed", frequency / scaling["factor"]
        else:
            smooth = (length / wavelength - low) / (high - low)
            case = "blended"
            expected = (1 - smooth) * frequency / scaling["factor"] + smooth * frequency
        cases.add(case)
        angle = positions.double() * expected
        torch.testing.assert_close(cos[:, 0, i].double(), angle.cos(), rtol=0, atol=1e-4)
        torch.testing.assert_close(sin[:, 0, i].double(), angle.sin(), rtol=0, atol=1e-4)
    assert cases == {"kept", "slowed", "blended"}
    assert cos.dtype == torch.float32


@pytest.mark.parametrize("chapter", ["chapter-02", "chapter-03"])
@pytest.mark.parametrize("window, told", [(None, (-1, 0)), (5, (4, 0)), (1, (0, 0))])
def test_the_kernel_is_told_of_the_window(chapter, window, told, monkeypatch):
    """FlashAttention counts the tokens to the left, without the one itself; -1 is all of them."""
    class OnCuda(torch.Tensor):
        is_cuda = True

    calls = []
    model_file = load(f"{chapter}/modeling_llama.py")
    monkeypatch.setattr(model_file, "varlen_attn", lambda *_, **words: calls.append(words))
    q = torch.zeros(4, 2, 8, dtype=torch.bfloat16).as_subclass(OnCuda)
    model_file.varlen_attention(q, q, q, torch.tensor([0, 4]).int(), 4, window)
    assert calls[0]["window_size"] == told


@pytest.mark.parametrize("scaling, theta, head_dim", [
    (YARN, 100.0, 8), ({**YARN, "attention_factor": 1.5}, 100.0, 8),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 1e6, 128),
    ({"rope_type": "linear", "factor": 4.0}, 1e4, 16)])
def test_yarn_and_linear_scaling_equal_their_definitions(scaling, theta, head_dim):
    """YaRN, equations 17 to 22, in plain numbers: a pair's share by where it lies between two."""
    config = llama.LlamaConfig.from_dict(
        {**SMALL, "head_dim": head_dim, "rope_theta": theta, "rope_scaling": scaling})
    positions = torch.tensor([0, 1, 2, 63, 300])
    cos, sin = llama.rotary_tables(positions, config)
    size, shares = 1.0, [0.0] * (head_dim // 2)
    if scaling["rope_type"] == "yarn":
        size = scaling.get("attention_factor", 0.1 * math.log(scaling["factor"]) + 1)
        length = scaling["original_max_position_embeddings"]
        fast, slow = scaling.get("beta_fast", 32), scaling.get("beta_slow", 1)
        turns = [length / (2 * math.pi * theta ** (2 * i / head_dim)) for i in range(head_dim)]
        first = max([i for i in range(head_dim) if turns[i] >= fast], default=0)
        last = min([i for i in range(head_dim) if turns[i] <= slow], default=head_dim - 1)
        shares = [min(max((last - i) / (last - first), 0), 1) for i in range(head_dim // 2)]
        assert 1.0 in shares and 0.0 in shares and any(0 < share < 1 for share in shares)
    for i, share in enumerate(shares):
        frequency = theta ** (-2 * i / head_dim) * (share + (1 - share) / scaling["factor"])
        angle = positions.double() * frequency
        torch.testing.assert_close(cos[:, 0, i].double(), size * angle.cos(), rtol=0, atol=1e-4)
        torch.testing.assert_close(sin[:, 0, i].double(), size * angle.sin(), rtol=0, atol=1e-4)


def test_yarn_without_any_slow_pair_is_as_in_transformers():
    """The range of the blend ends before it begins; 5.23 and 4.57 then slow all pairs down."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    periods = 10.0 ** (torch.arange(8) / 8)
    config = llama.LlamaConfig.from_dict({**SMALL, "rope_scaling": scaling})
    assert config.rope_scaling.kept(periods, 10.0).tolist() == [0.0] * 8


# --- the cache ---

FAMILIES = [dict(model_type="llama", rope_scaling=LLAMA3), dict(model_type="qwen2"),
            dict(model_type="qwen3", tie_word_embeddings=False, num_key_value_heads=1),
            dict(model_type="mistral", sliding_window=None, num_key_value_heads=4),
            dict(model_type="mistral", sliding_window=5),
            dict(model_type="qwen2", use_sliding_window=True, sliding_window=3,
                 max_window_layers=1)]


def test_a_cached_pass_equals_the_whole_pass():
    for family in FAMILIES:
        model = small_model(**family)
        prompts, answers = random_documents([9, 4, 1, 6]), random_documents([3] * 4, seed=2)
        cache = KVCache(4, 12)
        with torch.no_grad():
            for step in range(4):  # the prompts, then three single tokens of each document
                documents = [torch.cat((p, a[:step])) for p, a in zip(prompts, answers)]
                begins = [len(d) - 1 if step else 0 for d in documents]
                new, _ = pack_of([d[begin:] for d, begin in zip(documents, begins)])
                new["position_ids"] += torch.tensor(begins).repeat_interleave(
                    new["cu_seqlens"].diff())
                cached = model(**new, cache=cache)
                pack, _ = pack_of(documents)
                whole = model(**pack)[pack["cu_seqlens"][1:].long() - 1]
                assert cached.shape == (4, 64)
                torch.testing.assert_close(cached, whole, rtol=0, atol=2e-5)


def test_keep_drops_documents_and_leaves_the_others():
    model = small_model()
    documents = random_documents([5, 3, 8])
    with torch.no_grad():
        cache = KVCache(3, 9)
        model(**pack_of(documents)[0], cache=cache)
        cache.keep([2, 0])
        step = dict(input_ids=torch.tensor([7, 9]), position_ids=torch.tensor([8, 5]),
                    cu_seqlens=torch.tensor([0, 1, 2], dtype=torch.int32), max_seqlen=1)
        cached = model(**step, cache=cache)
        for row, (document, token) in enumerate(((2, 7), (0, 9))):
            alone, _ = pack_of([F.pad(documents[document], (0, 1), value=token)])
            torch.testing.assert_close(cached[row], model(**alone)[-1], rtol=0, atol=2e-5)


def test_the_cache_refuses_what_it_would_get_wrong():
    model = small_model()
    pack, _ = pack_of(random_documents([5, 3]))
    with torch.no_grad():
        for documents, room in ((1, 9), (3, 9), (2, 4)):
            with pytest.raises(ValueError, match="the cache is for"):
                model(**pack, cache=KVCache(documents, room))
        cache = KVCache(2, 9)
        model(**pack, cache=cache)
        with pytest.raises(ValueError, match="one token"):
            model(**pack, cache=cache)


# --- configuration and initialisation ---

@pytest.mark.parametrize("name", hub.ARCHITECTURES)
def test_built_in_architectures_are_accepted(name):
    config = llama.LlamaConfig.from_dict(weights.read_config(hub.resolve(name)))
    with torch.device("meta"):
        count = sum(p.numel() for p in llama.LlamaForCausalLM(config).parameters())
    assert count == {"qwen3-0.6b": 596_049_920, "qwen3-8b": 8_190_735_360,
                     "llama-3.2-1b": 1_235_814_400, "llama-3.1-8b": 8_030_261_248}[name]


def test_initial_weights():
    torch.manual_seed(0)
    config = {**SMALL, "model_type": "qwen2", "hidden_size": 256}
    model = llama.LlamaForCausalLM(llama.LlamaConfig.from_dict(config))
    names = dict(model.named_parameters())
    assert "model.layers.1.self_attn.q_proj.bias" in names
    assert "model.layers.1.self_attn.o_proj.bias" not in names
    for name, parameter in names.items():
        if name.endswith(("norm.weight", "bias")):
            assert (parameter == name.endswith("norm.weight")).all()
        else:
            assert abs(parameter.std().item() - 0.02) < 0.002, name


def test_an_adapter_on_the_head_is_used():
    """The head is called as a module: whatever wraps it takes part."""
    model = small_model(tie_word_embeddings=False)
    pack, _ = pack_of(random_documents([4]))
    before = model(**pack)
    model.lm_head = torch.nn.Sequential(model.lm_head, torch.nn.Hardtanh(-0.1, 0.1))
    assert torch.equal(model(**pack), before.clamp(-0.1, 0.1))


@pytest.mark.parametrize("change", [
    {"model_type": "gemma"}, {"model_type": None}, {"hidden_act": "gelu"}, {"mlp_bias": "yes"},
    *({"mlp_bias": True, "model_type": family} for family in ("mistral", "qwen2", "qwen3")),
    *({"attention_bias": True, "model_type": family} for family in ("mistral", "qwen2")),
    {"is_causal": False}, {"is_causal": None},
    {"attention_bias": 1}, {"attention_dropout": 0.1}, {"qk_norm": True}, {"pretraining_tp": 2},
    {"use_sliding_window": True}, {"use_sliding_window": False, "model_type": "mistral"},
    *({"sliding_window": window, "model_type": "mistral"} for window in (0, -1, 4.5, "8", True)),
    {"max_window_layers": None, "model_type": "qwen2", "use_sliding_window": True},
    {"partial_rotary_factor": 0.5},
    *({"layer_types": kinds, "model_type": "qwen3"} for kinds in (
        ["full_attention", "sliding_attention"], ["full_attention"], "full_attention", 2)),
    *({"layer_types": kinds, "model_type": "qwen3", "use_sliding_window": True} for kinds in (
        ["sliding_attention"], ["full_attention", "linear_attention"])),
    {"layer_types": ["full_attention", "sliding_attention"], "model_type": "mistral"},
    {"head_dim": 15}, {"num_attention_heads": 3}, {"hidden_size": "32"}, {"vocab_size": 0},
    {"num_hidden_layers": None}, {"tie_word_embeddings": 1}, {"rope_theta": None},
    {"quantization_config": {"load_in_4bit": True}},
    *({"rope_scaling": {"rope_type": kind, "factor": 4.0}}
      for kind in ("dynamic", "yarn", "longrope", "su", None)),
    {"rope_scaling": {"rope_type": "linear"}},
    *({"rope_scaling": {**YARN, key: value}} for key, value in (
        ("factor", None), ("beta_fast", 0.5), ("mscale", 1.0), ("truncate", False))),
    {"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    *({"rope_scaling": {**LLAMA3, key: value}} for key, value in (
        ("factor", None), ("factor", "8"), ("low_freq_factor", 0.0), ("high_freq_factor", 1.0),
        ("original_max_position_embeddings", 32.5), ("partial_rotary_factor", 0.5))),
])
def test_config_refuses_by_name(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        llama.LlamaConfig.from_dict({**SMALL, **change})


@pytest.mark.parametrize("config, said", [
    ({"model_type": "gemma3_text"}, "tests/extensions/ adds it"),
    ({"model_type": "qwen3_5", "vision_config": {"depth": 1}}, "tests/extensions/ adds it"),
    ({"model_type": "gemma3", "vision_config": {"depth": 1}}, "vision_config"),
    ({"model_type": "gemma2", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ({"model_type": "mamba"}, "qwen3$")])
def test_another_family_is_refused_with_what_can_be_done(config, said):
    with pytest.raises(ValueError, match=f"^model_type='{config['model_type']}' is none .*{said}"):
        llama.LlamaConfig.from_dict(config)


def test_the_changes_that_are_named_exist():
    diffs = "".join(file.read_text("utf-8") for file in (ROOT / "tests/extensions").glob("*.diff"))
    families = [key for key, why in llama_config.REASONS.items() if "tests/extensions" in why]
    assert len(families) == 6 and all(f'"{family}"' in diffs for family in families)


@pytest.mark.parametrize("chapter", ["chapter-01", "chapter-02"])
@pytest.mark.parametrize("quantization", [
    {"quant_method": "bitsandbytes", "load_in_4bit": True}, {"quant_method": "gptq"}, "awq"])
def test_a_quantised_checkpoint_is_sent_to_chapter_3(chapter, quantization, tmp_path):
    config = json.loads((GOLDENS / "models" / "qwen3_tied" / "config.json").read_text())
    text = json.dumps(config | {"quantization_config": quantization})
    (tmp_path / "config.json").write_text(text)
    train = load(f"{chapter}/train.py")
    with pytest.raises(UserError, match="config.json: quantization_config .*original.*NF4.*"
                                        "chapter-03/train.py.*chapter-03/generate.py"):
        train.main(["--model", str(tmp_path), "--data", "tiny", "--dry-run", "--device", "cpu"])


@pytest.mark.parametrize("fields, windows", [
    ({}, (None, None)), ({"sliding_window": 8}, (None, None)),
    ({"model_type": "mistral"}, (4096, 4096)),  # silence means a window there
    ({"model_type": "mistral", "sliding_window": 8}, (8, 8)),
    ({"model_type": "mistral", "sliding_window": None}, (None, None)),
    ({"model_type": "qwen2", "sliding_window": 8}, (None, None)),
    ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True}, (None, None)),
    ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True,
      "max_window_layers": 1}, (None, 8)),
    ({"model_type": "qwen3", "sliding_window": 8, "use_sliding_window": True,
      "layer_types": ["sliding_attention", "full_attention"]}, (8, None)),
])
def test_windows_are_those_of_transformers(fields, windows):
    """As its configuration classes read the same fields."""
    assert llama.LlamaConfig.from_dict({**SMALL, **fields}).windows == windows


def attention_by_definition(q, k, v, lengths, window):
    """In float64, a query at a time: (T, H, d)."""
    q, k, v = q.double(), k.double(), v.double()
    outputs, start = [], 0
    for length in lengths:
        for t in range(start, start + length):
            first = start if window is None else max(start, t - window + 1)
            heads = []
            for h in range(q.shape[1]):
                g = h // (q.shape[1] // k.shape[1])
                scores = k[first:t + 1, g] @ q[t, h] / q.shape[2] ** 0.5
                heads.append(scores.softmax(0) @ v[first:t + 1, g])
            outputs.append(torch.stack(heads))
        start += length
    return torch.stack(outputs)


@pytest.mark.parametrize("chapter", ["chapter-02", "chapter-03"])
@pytest.mark.parametrize("window", [None, 1, 5, 130, 300])
def test_a_token_sees_its_window_and_no_more(chapter, window):
    """Forward and backward, documents shorter and longer than it, over the blocks of chapter 3."""
    model_file = load(f"{chapter}/modeling_llama.py")
    lengths = [3, 150, 1, 140]
    ends = torch.tensor([0, 3, 153, 154, 294], dtype=torch.int32)
    torch.manual_seed(0)
    q, k, v = (torch.randn(294, heads, 4, requires_grad=True) for heads in (4, 2, 2))
    gradient = torch.randn(294, 4, 4)
    results = []
    for attend in (lambda: model_file.varlen_attention(q, k, v, ends, 150, window),
                   lambda: attention_by_definition(q, k, v, lengths, window)):
        output = attend()
        results.append((output.detach(), *torch.autograd.grad(
            output, (q, k, v), gradient.to(output.dtype))))
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours.double(), expected.double(), rtol=0, atol=2e-5)


def test_values_that_leave_a_feature_out_are_accepted():
    llama.LlamaConfig.from_dict({
        **SMALL, "model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False,
        "layer_types": ["full_attention"] * 2, "attention_dropout": 0.0, "pretraining_tp": 1,
        "attention_bias": False, "mlp_bias": False, "rope_scaling": None})


def test_the_model_asks_for_no_family():
    source = (ROOT / "chapter-02" / "modeling_llama.py").read_text("utf-8")
    code = source.split('"""', 2)[2]
    assert "model_type" not in code and '"qwen' not in code
