"""Chapter 3's model against chapter 2's, against transformers' goldens, and against itself."""

import pytest
import torch
import torch.nn.functional as F
from ch3_models import CONFIG, build, inputs_of, llama, lora, loss_and_gradients, pack_of
from helpers import GOLDENS, load
from safetensors.torch import load_file

from common import weights
from common.asking.kv_cache import KVCache

two = load("chapter-02/modeling_llama.py")
NAMES = ["llama3_tied", "llama3_untied", "qwen2_tied", "qwen2_untied", "qwen3_tied", "qwen3_untied"]


# --- the same model as chapter 2's ---

@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_equal_transformers(name):
    folder = GOLDENS / "models" / name
    golden = load_file(folder.with_suffix(".safetensors"))
    model = llama.LlamaForCausalLM(llama.LlamaConfig.from_dict(weights.read_config(folder)))
    weights.load_weights(model, folder)
    lengths = golden["lengths"].tolist()
    packing = load("chapter-03/packing.py")
    pack = packing.packed_sequence_collate_fn(list(zip(
        golden["input_ids"].split(lengths), golden["labels"].split(lengths))))
    assert (model(**inputs_of(pack)) - golden["logits"]).abs().max() <= 1e-5
    loss = model(**pack) / (pack["labels"] != -100).sum()
    assert loss.dtype == torch.float32 and abs(loss - golden["loss"]) <= 1e-6
    loss.backward()
    for name, parameter in model.named_parameters():
        expected = golden[f"grad.{name}"]
        assert (parameter.grad - expected).norm() <= 1e-4 * expected.norm(), name


@pytest.mark.parametrize("changes", [{}, {"model_type": "qwen2", "tie_word_embeddings": False}])
def test_logits_are_chapter_2s(changes):
    """Attention in blocks adds up in another order: equal to 1e-5, not to the bit."""
    model = build(**changes)
    old = two.LlamaForCausalLM(two.LlamaConfig.from_dict({**CONFIG, **changes}))
    old.load_state_dict(model.state_dict())
    pack = pack_of([7, 1, 40])
    expected = old(**inputs_of(pack))
    assert (model(**inputs_of(pack)) - expected).abs().max() <= 1e-5
    model.compute_dtype = torch.bfloat16
    assert (model(**inputs_of(pack)) - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize("operator, expensive", [
    (torch.ops.aten.mm, True), (torch.ops.aten.addmm_, True), (torch.ops.aten.bmm, True),
    (torch.ops.bareloop.block_attention, True), (torch.ops.torch_attn._varlen_attn, True),
    (torch.ops.aten._scaled_dot_product_flash_attention, True),
    (torch.ops.aten.scatter_, False), (torch.ops.aten.mul, False)], ids=str)
def test_products_and_attention_are_kept_and_nothing_else(operator, expensive):
    """By selective checkpointing; "att" is in scatter_, too, which must be computed again."""
    overload = getattr(operator, operator.overloads()[0])
    assert llama.is_expensive(None, overload) == expensive


def test_fresh_weights_are_chapter_2s_to_the_bit():
    torch.manual_seed(3)
    model = llama.LlamaForCausalLM(llama.LlamaConfig.from_dict({**CONFIG, "model_type": "qwen2"}))
    torch.manual_seed(3)
    old = two.LlamaForCausalLM(two.LlamaConfig.from_dict({**CONFIG, "model_type": "qwen2"}))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), old.parameters()))


def test_an_adapted_head_is_in_the_loss():
    model = build(tie_word_embeddings=False)
    lora.apply_adapter(model, lora.AdapterConfig(rank=4, target_modules="lm_head,q_proj"))
    model.lm_head.lora_B.data.normal_()
    pack = pack_of([30, 2, 9])
    loss, gradients = loss_and_gradients(model, pack)
    logits = model(**inputs_of(pack))
    expected = F.cross_entropy(logits, pack["labels"], reduction="sum")
    assert abs(loss - expected) <= 1e-6 * expected
    assert gradients["lm_head.lora_A"].norm() > 0
    model.lm_head.lora_B.data.zero_()
    assert abs(model(**pack) - expected) > 1e-3 * expected


def test_a_pack_without_labels_costs_nothing_and_is_not_nan():
    model, pack = build(), pack_of([5, 8])
    pack["labels"].fill_(-100)
    pack["labelled"] = pack["labelled"][:0]
    loss, gradients = loss_and_gradients(model, pack)
    assert loss == 0 and all(not g.any() for g in gradients.values())


@torch.no_grad()
def test_the_cache_ignores_checkpointing():
    model, pack = build(), inputs_of(pack_of([9, 4]))
    expected = model(**pack)[[8, 12]]
    for kind in ("full", "selective"):
        for layer in model.model.layers:
            layer.checkpointing = kind
        logits = model(**pack, cache=KVCache(2, 16))
        assert (logits - expected).abs().max() <= 1e-5


# --- activation checkpointing ---

@pytest.mark.parametrize("base, method", [
    ("dense", "full"), *((base, method) for base in ("dense", "nf4")
                         for method in ("lora", "dora", "vera", "lora-fa"))])
def test_checkpointing_changes_no_bit_of_any_gradient(base, method):
    model, pack = build(base, method), pack_of([50, 3, 1, 41])
    loss, plain = loss_and_gradients(model, pack)
    assert plain
    for kind in ("full", "selective"):
        for layer in model.model.layers:
            layer.checkpointing = kind
        again, gradients = loss_and_gradients(model, pack)
        assert torch.equal(again, loss)
        assert plain.keys() == gradients.keys()
        assert all(torch.equal(gradients[name], plain[name]) for name in plain), kind


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("method", [method for method, kind in lora.METHODS.items()
                                    if kind and not kind.no_dropout])
def test_dropout_is_the_same_when_computed_again(method, base):
    model = build(base)
    lora.apply_adapter(model, lora.AdapterConfig(method=method, rank=4, dropout=0.5))
    for parameter in filter(lambda p: p.requires_grad, model.parameters()):
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.train()
    results = []
    for kind in ("none", "full", "selective"):
        for layer in model.model.layers:
            layer.checkpointing = kind
        torch.manual_seed(5)
        results.append(loss_and_gradients(model, pack_of([30, 20]))[1])
    assert results[0]
    for other in results[1:]:
        assert all(torch.equal(other[name], results[0][name]) for name in results[0])
