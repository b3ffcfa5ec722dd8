"""Qwen3-MoE: the change in qwen3_moe.diff holds what every family must, but for --compile, and the
balance of its experts, the two ways to compute them, its prediction and its config."""

import json
from unittest import mock

import family_checks
import pytest
import torch
import torch.nn.functional as F
from checks import refused
from family_checks import (
    FAMILIES, config_of, large, llama, lora, model_of, pack_of, packing, quantized_model, train)

from common import predict, weights
from common.errors import UserError

NAMES = ["qwen3_moe_tied", "qwen3_moe_untied"]
TIED = FAMILIES / NAMES[0]
# How many tokens an expert gets differs from pack to pack: it is refused, see below.
CHECKS = [check for check in family_checks.ALL
          if check is not family_checks.it_compiles_and_counts_the_same]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_it_holds(check, name, tmp_path):
    check(name, tmp_path)


def loss_and_gradients(model, pack):
    """Per labelled token."""
    model.zero_grad()
    loss = model(**pack) / len(pack["labelled"])
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters()}


def golden_pack(golden):
    lengths = golden["lengths"].tolist()
    return packing.packed_sequence_collate_fn(list(zip(
        golden["input_ids"].split(lengths), golden["labels"].split(lengths))))


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
@pytest.mark.parametrize("chunk", [None, 1024])
@pytest.mark.parametrize("name", NAMES)
def test_training_adds_the_balance_of_transformers(name, chunk, checkpointing):
    """What a loss in training has over one in evaluation, and what its gradient has: all tokens
    and layers together, for each labelled token once, whatever is computed again."""
    model = llama.LlamaForCausalLM(config_of(name, router_aux_loss_coef=0.5))
    weights.load_weights(model, FAMILIES / name)
    golden, model.chunk = model_of(name)[1], chunk
    pack = golden_pack(golden)
    plain, gradients = loss_and_gradients(model.eval(), pack)
    assert abs(plain - golden["loss"]) <= 1e-6
    for layer in model.model.layers:
        layer.checkpointing = checkpointing
    loss, balanced = loss_and_gradients(model.train(), pack)
    assert abs((loss - plain) / 0.5 - golden["aux_loss"]) <= 1e-5
    routers = [n for n in gradients if n.endswith("mlp.gate.weight")]
    assert len(routers) == model.config.num_hidden_layers
    for router in routers:
        expected = golden[f"aux_grad.{router}"]
        change = (balanced[router] - gradients[router]) / 0.5
        assert (change - expected).norm() <= 1e-4 * expected.norm()


def test_nothing_is_added_without_a_coefficient_or_to_another_loss():
    pack = golden_pack(model_of(NAMES[0])[1])
    changed = {}
    for coefficient in (0, 0.0, 0.5):
        model = llama.LlamaForCausalLM(config_of(NAMES[0], router_aux_loss_coef=coefficient))
        weights.load_weights(model, TIED)
        changed[coefficient] = (model.train()(**pack) - model.eval()(**pack)).item()
    assert changed[0] == 0 and changed[0.5] > 0.5 * 2 * len(pack["labelled"])  # c k, if all alike
    model.loss = lambda hidden, weight, *_: (hidden, weight)  # as in distillation
    hidden, _ = model.train()(**pack)
    assert hidden.shape == (len(pack["labels"]), model.config.hidden_size)


def gradients_of(moe, x):
    """(output, gradients of x and of each parameter) of one feed-forward."""
    x = x.clone().requires_grad_()
    with mock.patch.object(F, "grouped_mm", wraps=F.grouped_mm) as grouped:
        y, use = moe(x)
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    ((y * weight).sum() + use[1] @ use[1]).backward()
    return y.detach(), [x.grad, *(p.grad for p in moe.parameters())], grouped.call_count


@pytest.mark.parametrize("tokens", [150, 2])  # of two tokens, at least two experts get none
def test_grouped_products_are_the_loop(tokens):
    """bfloat16 over float32 weights is grouped, over weights of its own a loop: the same numbers,
    but for the order of sums in bfloat16; and float32 is a loop."""
    moes = [large(NAMES[0]).model.layers[1].mlp for _ in range(3)]
    moes[1].bfloat16()
    for parameters in zip(*(moe.parameters() for moe in moes)):
        for parameter in parameters:
            parameter.data.copy_(parameters[1].data)
    x = torch.randn(tokens, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    grouped, looped, exact = (
        gradients_of(moe, x) for moe, x in zip(moes, (x, x, x.float())))
    assert (grouped[2], looped[2], exact[2]) == (3, 0, 0)
    assert grouped[0].dtype == looped[0].dtype == torch.bfloat16
    for y, z, right in zip([grouped[0], *grouped[1]], [looped[0], *looped[1]],
                           [exact[0], *exact[1]]):
        assert (y.float() - right).norm() <= 0.02 * right.norm() + 1e-6
        assert (y.float() - z.float()).norm() <= 0.01 * right.norm() + 1e-6
    unused = [i for i, g in enumerate(exact[1]) if not g.any()]
    assert bool(unused) == (tokens == 2)
    with torch.no_grad():  # a stack of all for the sake of some
        with mock.patch.object(F, "grouped_mm") as never:
            moes[0](x)
    assert not never.called


def test_without_gradients_only_chosen_experts_run():
    model, _ = model_of(NAMES[0])
    called = []
    for number, expert in enumerate(model.model.layers[0].mlp.experts):
        expert.register_forward_hook(lambda *_, number=number: called.append(number))
    _, inputs = pack_of([torch.tensor([9])])
    with torch.no_grad():
        model(**inputs)
    assert len(called) == 2
    called.clear()
    model(**inputs).sum().backward()
    assert called == list(range(6))
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_router_is_left_as_it_is():
    """Not of four bits, without an adapter, yet found by nothing that looks for linear layers."""
    small = quantized_model.base_model(config_of(NAMES[0]), TIED, torch.float32)
    lora.apply_adapter(small, lora.AdapterConfig(target_modules=r".*mlp.*"))
    adapted = {name for name, _ in lora.adapter_modules(small)}
    assert len(adapted) == 2 * 6 * 3 and all(".experts." in name for name in adapted)
    for layer, other in zip(small.model.layers, model_of(NAMES[0])[0].model.layers):
        assert torch.equal(layer.mlp.gate.weight, other.mlp.gate.weight)


def test_a_token_pays_for_its_experts():
    model = large(NAMES[0])
    attention, router, expert = 128 * (32 + 16 + 16 + 32), 6 * 128, 3 * 128 * 96
    flops = predict.flops_per_token(model, [10])
    assert flops["matrices"] == 6 * 2 * (attention + router + 2 * expert)
    counts = predict.parameters(model)
    assert counts["blocks"] == 2 * (attention + router + 6 * expert)
    model = quantized_model.base_model(config_of(NAMES[0]), TIED, torch.float32)
    assert predict.parameters(model)["total"] == predict.parameters(model_of(NAMES[0])[0])["total"]


def test_thirty_billion_parameters(tmp_path):
    """Qwen/Qwen3-30B-A3B's config.json, in the dialect of version 4, but for 2 layers of its 48;
    3.3 B are used for a token."""
    (tmp_path / "config.json").write_text(json.dumps(dict(
        model_type="qwen3_moe", attention_bias=False, attention_dropout=0.0, head_dim=128,
        decoder_sparse_step=1, hidden_act="silu", hidden_size=2048, intermediate_size=6144,
        max_position_embeddings=40960, max_window_layers=48, mlp_only_layers=[],
        moe_intermediate_size=768, norm_topk_prob=True, num_attention_heads=32, num_experts=128,
        num_experts_per_tok=8, num_hidden_layers=2, num_key_value_heads=4, rms_norm_eps=1e-6,
        rope_scaling=None, rope_theta=1000000.0, router_aux_loss_coef=0.001, sliding_window=None,
        tie_word_embeddings=False, use_sliding_window=False, vocab_size=151936)))
    with torch.device("meta"):
        model = llama.LlamaForCausalLM(llama.LlamaConfig.from_dict(weights.read_config(tmp_path)))
    counts, flops = predict.parameters(model), predict.flops_per_token(model, [4096])
    rest = 2 * 151936 * 2048 + 2048  # embedding, head, last norm
    assert rest + 48 * (counts["total"] - rest) // 2 == 30_532_122_624
    assert rest + 48 * flops["matrices"] / 6 / 2 == pytest.approx(3.35e9, rel=2e-3)


def test_compiling_is_refused(tmp_path):
    with refused("--compile", "expert"):
        train.main(["--model", str(TIED), "--data", "virtual", "--device", "cpu", "--dtype",
                    "float32", "--compile", "--dry-run", "--out", str(tmp_path / "run")])


@pytest.mark.parametrize("name, value", [
    ("mlp_only_layers", [0]), ("decoder_sparse_step", 2), ("use_sliding_window", True),
    ("num_experts_per_tok", 7), ("num_local_experts", 0), ("moe_intermediate_size", 1.5),
    ("norm_topk_prob", 1), ("router_aux_loss_coef", -1.0), ("hidden_act", "gelu"),
    ("mlp_bias", True)])
def test_a_field_that_is_not_computed_is_refused_by_name(name, value):
    wrong = {name: value} if name != "num_local_experts" else {name: 0, "num_experts": 0}
    with pytest.raises(ValueError, match=name.replace("local_", "")):
        config_of(NAMES[0], **wrong)


def test_both_dialects_are_read_and_written(tmp_path):
    """Version 4 of transformers says num_experts, 5 num_local_experts; absent keys mean to us what
    they do to Qwen3MoeConfig."""
    config = json.loads((TIED / "config.json").read_text())

    def read(**changes):
        changed = {k: v for k, v in {**config, **changes}.items() if v != "absent"}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        return weights.read_config(tmp_path)

    assert "num_experts" not in config and config["num_local_experts"] == 6
    for changes in ({}, {"num_local_experts": "absent", "num_experts": 6}, {"num_experts": 6}):
        found = read(**changes)
        assert found["num_experts"] == found["num_local_experts"] == 6
        assert llama.LlamaConfig.from_dict(found) == config_of(NAMES[0])
    with pytest.raises(UserError, match="num_experts and num_local_experts differ"):
        read(num_experts=8)
    fields = ("num_local_experts", "num_experts_per_tok", "moe_intermediate_size",
              "norm_topk_prob", "router_aux_loss_coef", "num_key_value_heads", "head_dim",
              "max_position_embeddings", "decoder_sparse_step", "mlp_only_layers")
    bare = llama.LlamaConfig.from_dict(read(**dict.fromkeys(fields, "absent")))
    assert (bare.num_experts, bare.num_experts_per_tok, bare.moe_intermediate_size,
            bare.norm_topk_prob, bare.router_aux_loss_coef, bare.num_key_value_heads,
            bare.head_dim, bare.max_position_embeddings) == (128, 8, 768, False, 0.001, 4, 6, 32768)
    weights.save_weights(model_of(NAMES[0])[0], weights.read_config(TIED), tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/config.json").read_text())
    assert saved["num_experts"] == saved["num_local_experts"] == 6
