"""Qwen3.5's text models, with qwen3_5.diff applied: what holds for every family, and what is its own.

The recurrence in chunks is held against the recurrence itself, a token at a time, in float64. A
model of 9 B has the sizes of Qwen/Qwen3.5-9B's config.json: the defaults of transformers.
"""

import json
import shutil

import family_checks
import pytest
import torch
import torch.nn.functional as F
from checks import refused
from family_checks import (
    FAMILIES, config_of, documents_of, large, llama, load, load_file, model_of, pack_of, packing,
    quantized_model, random_pack)
from safetensors.torch import save_file

from common import predict, weights
from common.asking.generation import generate
from common.asking.kv_cache import KVCache

family_checks.COMPILED += ("modeling_qwen3_5",)
qwen = load("chapter-03/modeling_qwen3_5.py")

VISION = FAMILIES / "qwen3_5_vision"
NINE_B = dict(
    model_type="qwen3_5_text", vocab_size=248320, hidden_size=4096, intermediate_size=12288,
    num_hidden_layers=32, num_attention_heads=16, num_key_value_heads=4, head_dim=256,
    rms_norm_eps=1e-6, max_position_embeddings=262144, full_attention_interval=4,
    attn_output_gate=True, tie_word_embeddings=False, rope_parameters={
        "rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25,
        "mrope_section": [11, 11, 10], "mrope_interleaved": True})


@pytest.mark.parametrize("name", ["qwen3_5_tied", "qwen3_5_untied"])
@pytest.mark.parametrize("check", family_checks.ALL, ids=lambda check: check.__name__)
def test_what_holds_for_every_family(check, name, tmp_path):
    check(name, tmp_path)


# --- the recurrence ---

def random_inputs(lengths, K=2, H=4, dk=8, dv=6, dtype=torch.float64, seed=0):
    """(q, k, v, g, beta) of a pack, and the gradient of o."""
    torch.manual_seed(seed)
    T = sum(lengths)
    q, k = (F.normalize(torch.randn(T, K, dk, dtype=dtype), dim=-1) for _ in "qk")
    g = -2 * torch.rand(H, dtype=dtype) * torch.rand(T, H, dtype=dtype)
    starts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
    g[starts[starts < T]] = -torch.inf
    inputs = q, k, torch.randn(T, H, dv, dtype=dtype), g, torch.rand(T, H, dtype=dtype)
    return [x.requires_grad_() for x in inputs], torch.randn(T, H, dv, dtype=dtype)


def a_token_at_a_time(q, k, v, g, beta, lengths):
    """(o, S after each document), as the papers have it."""
    q, k = (x.repeat_interleave(v.shape[1] // x.shape[1], 1) for x in (q, k))
    outputs, states = [], []
    for t in range(len(q)):
        if torch.isinf(g[t]).any():
            S = q.new_zeros(v.shape[1], q.shape[-1], v.shape[-1])
        else:
            S = S * g[t].exp()[:, None, None]
        missed = v[t] - torch.einsum("hkv,hk->hv", S, k[t])
        S = S + torch.einsum("hk,h,hv->hkv", k[t], beta[t], missed)
        outputs.append(torch.einsum("hkv,hk->hv", S, q[t]))
        states.append(S)
    ends = torch.tensor(lengths).cumsum(0)
    return torch.stack(outputs), torch.stack(states)[ends - 1]


def output_and_gradients(function, inputs, gradient):
    o = function(*inputs)
    return [o.detach(), *torch.autograd.grad(o, inputs, gradient)]


@pytest.mark.parametrize("lengths", [
    (1,), (63,), (64,), (65,), (128,), (64, 128), (5, 65, 1, 57, 72, 56), (1, 1, 1, 190), (300,)],
    ids=str)
@pytest.mark.parametrize("heads", [(2, 4), (3, 3), (6, 12)], ids=str)
def test_chunks_are_the_recurrence(lengths, heads):
    """Documents within a chunk, over several, of exactly some; more heads than HEADS."""
    inputs, gradient = random_inputs(lengths, *heads)
    before = [x.detach().clone() for x in inputs]
    ours = output_and_gradients(qwen.delta_attention, inputs, gradient)
    assert all(map(torch.equal, inputs, before))
    o, S = a_token_at_a_time(*inputs, lengths)
    expected = [o, *torch.autograd.grad(o, inputs, gradient, materialize_grads=True)]
    for mine, right in zip(ours, expected):
        assert (mine - right).abs().max() <= 1e-10
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    with torch.no_grad():
        states = qwen.states_after(
            inputs[1], qwen.forward(*inputs)[1], inputs[3], cu_seqlens)
        assert (states - S).abs().max() <= 1e-12


def test_a_token_more_is_the_recurrence():
    lengths = 70, 3, 64
    (q, k, v, g, beta), _ = random_inputs(lengths)
    o, S = a_token_at_a_time(q, k, v, g, beta, lengths)
    lasts = torch.tensor(lengths).cumsum(0) - 1
    earlier = [n - 1 for n in lengths]
    kept = torch.ones(len(q), dtype=torch.bool).index_fill(0, lasts, False)
    _, before = a_token_at_a_time(*(x[kept] for x in (q, k, v, g, beta)), earlier)
    new_o, new_S = qwen.one_token(before, *(x[lasts] for x in (q, k, v, g, beta)))
    assert (new_S - S).abs().max() <= 1e-12 and (new_o - o[lasts]).abs().max() <= 1e-12


def test_a_document_does_not_know_its_neighbours():
    """Not by a bit, forward and backward, wherever it lies; and packed it is what it is alone."""
    lengths = 5, 65, 1, 57, 72, 56
    inputs, gradient = random_inputs(lengths, dtype=torch.float32)
    others, _ = random_inputs(lengths, dtype=torch.float32, seed=1)
    whole = output_and_gradients(qwen.delta_attention, inputs, gradient)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    for end, length in zip(ends, lengths):
        own = slice(end - length, end)
        mixed = [x.detach().clone() for x in others]
        for x, mine in zip(mixed, inputs):
            x[own] = mine.detach()[own]
        mixed = [x.requires_grad_() for x in mixed]
        again = output_and_gradients(qwen.delta_attention, mixed, gradient)
        assert all(torch.equal(a[own], b[own]) for a, b in zip(again, whole))
        alone = output_and_gradients(
            qwen.delta_attention, [x.detach()[own].requires_grad_() for x in inputs],
            gradient[own])
        for a, b in zip(alone, whole):
            assert (a - b[own]).abs().max() <= 2e-6 * max(1, a.abs().max())


def test_a_sudden_decay_costs_no_digits():
    """Of what comes after: the sum of decays since the chunk's beginning is not what it uses."""
    inputs, gradient = random_inputs((128,))
    with torch.no_grad():
        inputs[3][1:] *= 0.01
        inputs[3][20] = -1e6
    right = output_and_gradients(qwen.delta_attention, inputs, gradient)
    single = [x.detach().float().requires_grad_() for x in inputs]
    ours = output_and_gradients(qwen.delta_attention, single, gradient.float())
    for mine, exact in zip(ours, right):
        assert (mine - exact).norm() <= 1e-6 * exact.norm()


def test_the_operator_is_what_the_compiler_is_told():
    inputs, _ = random_inputs((70, 30), dtype=torch.float32)
    inputs[2] = inputs[2].detach().bfloat16().requires_grad_()
    torch.library.opcheck(qwen.delta_attention, inputs, test_utils=(
        "test_schema", "test_autograd_registration", "test_faketensor"))


def test_the_convolution_stays_in_its_document():
    torch.manual_seed(0)
    lengths = 1, 2, 9, 3, 40
    x, weight = torch.randn(sum(lengths), 6).double(), torch.randn(6, 4).double()
    first = torch.zeros(len(x), dtype=torch.bool)
    first[torch.tensor([0, *lengths[:-1]]).cumsum(0)] = True
    alone = [F.conv1d(F.pad(part.t()[None], (3, 0)), weight[:, None], groups=6)[0].t()
             for part in x.split(lengths)]
    ours = qwen.causal_convolution(x, weight, first)
    assert (ours - torch.cat(alone)).abs().max() <= 1e-12


# --- the model ---

def test_documents_without_tokens():
    """What packs of a static shape end with changes nothing."""
    model = large("qwen3_5_tied")
    documents = [(ids, ids) for ids in torch.arange(100).split([40, 3, 57])]
    pack = packing.packed_sequence_collate_fn(documents)
    padded = packing.packed_sequence_collate_fn(documents, packing.StaticShape(128, 9, 60))
    assert (padded["cu_seqlens"] == 128).sum() > 3
    results = []
    for each in pack, padded:
        model.zero_grad()
        loss = model(**each)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*results):
        assert (a - b).norm() <= 1e-5 * a.norm()


def test_the_cache_forgets_documents():
    model, golden = model_of("qwen3_5_untied")
    documents = documents_of(golden)
    cache = KVCache(len(documents), 80)
    kept = [5, 0, 3]
    with torch.no_grad():
        model(**pack_of(documents)[1], cache=cache)
        cache.keep(kept)
        longer = [torch.cat((documents[n], torch.tensor([9]))) for n in kept]
        _, inputs = pack_of([ids[-1:] for ids in longer])
        inputs["position_ids"] = torch.tensor([len(ids) - 1 for ids in longer])
        logits = model(**inputs, cache=cache)
        whole = [model(**pack_of([ids])[1])[-1] for ids in longer]
    assert (logits - torch.stack(whole)).abs().max() <= 1e-5


@pytest.mark.parametrize("checkpointing", ["full", "selective"])
def test_checkpointing_changes_no_bit(checkpointing):
    gradients = []
    for kind in "none", checkpointing:
        model = large("qwen3_5_untied")
        for layer in model.model.layers:
            layer.checkpointing = kind
        model(**random_pack()[0]).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *gradients))


def test_bfloat16_is_near():
    model, golden = model_of("qwen3_5_tied")
    model.compute_dtype = torch.bfloat16
    logits = model(**pack_of(documents_of(golden))[1]).float()
    assert (logits - golden["logits"]).norm() <= 0.03 * golden["logits"].norm()


def test_a_fresh_model():
    model = llama.LlamaForCausalLM(config_of("qwen3_5_tied"))
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            assert 0.01 <= parameter.exp().min() and 1 < parameter.exp().max() <= 16
        elif "norm" in name or "dt_bias" in name:
            assert (parameter == (1 if "linear_attn" in name else 0)).all()
        else:
            assert 0.015 < parameter.std() < 0.025


# --- folders and predictions ---

def read(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    return weights.read_config(folder)


def test_nine_billion_parameters(tmp_path):
    config = llama.LlamaConfig.from_dict(read(tmp_path, NINE_B))
    assert config.delta_net.layers == 8 * (True, True, True, False)
    with torch.device("meta"):
        model = llama.LlamaForCausalLM(config)
    assert predict.parameters(model)["total"] == 8_953_803_264
    per_token = predict.flops_per_token(model, [1000])
    matrices = sum(m.weight.numel() for m in model.model.modules()
                   if isinstance(m, torch.nn.Linear))
    assert per_token["matrices"] == 6 * matrices + 24 * 18 * 32 * 128 * 128
    assert per_token["attention"] == 8 * 6 * 16 * 256 * 1000


@pytest.mark.parametrize("change, named", [
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e7}}, "yarn"),
    ({"rope_parameters": NINE_B["rope_parameters"] | {"low_freq_factor": 1.0}}, "low_freq_factor"),
    ({"attn_output_gate": False}, "attn_output_gate"), ({"hidden_act": "gelu"}, "hidden_act"),
    ({"layer_types": 32 * ["sliding_attention"]}, "layer_types"),
    ({"layer_types": 31 * ["linear_attention"] + ["x"]}, "layer_types"),
    ({"layer_types": ["linear_attention", "full_attention"]}, "layer_types"),
    ({"linear_num_value_heads": 24}, "linear_num_value_heads"),
    ({"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim"),
    ({"model_type": "qwen3_5_moe_text"}, "qwen3_5_moe_text")])
def test_what_it_does_not_compute_is_refused_by_name(change, named, tmp_path):
    with pytest.raises(ValueError, match=named):
        llama.LlamaConfig.from_dict(read(tmp_path, NINE_B | change))


def test_a_multimodal_folder_is_its_text_model(tmp_path, capsys):
    """Its images' part is left out, and that is said; what is saved is text alone."""
    model, golden = model_of("qwen3_5_vision")
    said = capsys.readouterr().out
    assert said == "21 tensors are not for text, left out: model.visual.*\n"
    documents = documents_of(golden)
    logits = model(**pack_of(documents)[1])
    assert (logits - golden["logits"]).abs().max() <= 1e-5
    assert generate(model, [ids.tolist() for ids in documents], 8) == golden["generated"].tolist()

    weights.save_weights(model, weights.read_config(VISION), tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["model_type"] == "qwen3_5_text" and "vision_config" not in config
    assert config["architectures"] == ["Qwen3_5ForCausalLM"]
    whole = json.loads((VISION / "config.json").read_text())
    text = whole["text_config"]
    assert read(tmp_path, whole | {"tie_word_embeddings": True})["tie_word_embeddings"] is True
    assert {key: config[key] for key in text if key != "dtype"} == {
        key: text[key] for key in text if key != "dtype"}
    assert config["tie_word_embeddings"] is False
    again = llama.LlamaForCausalLM(llama.LlamaConfig.from_dict(
        weights.read_config(tmp_path / "saved")))
    weights.load_weights(again, tmp_path / "saved")
    assert capsys.readouterr().out == ""
    assert torch.equal(again(**pack_of(documents)[1]), logits)
    names = load_file(tmp_path / "saved" / "model.safetensors").keys()
    assert names == load_file(FAMILIES / "qwen3_5_untied" / "model.safetensors").keys()


def test_what_is_left_out_is_named(tmp_path, capsys):
    """The predictor of further tokens, too; anything else is refused. A base of four bits."""
    folder = tmp_path / "model"
    shutil.copytree(VISION, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors |= {f"mtp.{name}.weight": torch.ones(2, 2) for name in ("fc", "layers.0.q")}
    save_file(tensors, folder / "model.safetensors")
    config = llama.LlamaConfig.from_dict(weights.read_config(folder))
    small = quantized_model.base_model(config, folder, torch.float32)
    assert capsys.readouterr().out == (
        "23 tensors are not for text, left out: model.visual.*, mtp.*\n")
    assert small(**random_pack()[1]).isfinite().all()
    save_file(tensors | {"model.audio.weight": torch.ones(2)}, folder / "model.safetensors")
    with refused("unexpected", "model.audio.weight"):
        weights.load_weights(llama.LlamaForCausalLM(config), folder)
