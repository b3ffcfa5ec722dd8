"""The reference model: to the last bit what was there before training, with no second model."""

from math import prod
from types import SimpleNamespace

import ch3_models
import pytest
import torch
from helpers import GOLDENS, load
from safetensors.torch import load_file

from common import predict
from common.adapters import peft
from common.weights import load_weights, read_config

logprobs = load("chapter-03/post_training/logprobs.py")
preference = load("chapter-03/post_training/preference.py")
reference_file = load("chapter-03/post_training/reference.py")
train_dpo = load("chapter-03/post_training/train_dpo.py")
adapters_off, lora = reference_file.adapters_off, ch3_models.lora
reference_log_probs, frozen_copy = reference_file.reference_log_probs, reference_file.frozen_copy

PACK = ch3_models.pack_of([9, 14, 3])
CASES = [(method, "dense") for method in ("lora", "rslora", "dora", "vera", "lora+", "lora-fa")]
CASES += [(method, "nf4") for method in ("lora", "dora", "vera")]


def options(method="lora", loss="dpo", dtype="float32", **more):
    return SimpleNamespace(method=method, loss=loss, dtype=dtype,
                           needs_reference=loss not in preference.NO_REFERENCE, **more)


@torch.no_grad()
def logits(model):
    return model(**ch3_models.inputs_of(PACK))


def build(*how, **changes):
    model = ch3_models.build(*how, **changes)
    model.loss = logprobs.chunked_log_probs
    return model


@pytest.mark.parametrize("method, base", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_its_adapters_a_model_is_its_base_to_the_last_bit(method, base, dtype):
    """`build` gives every number of an adapter a value, so that none is without effect."""
    original, model = build(base), build(base, method)
    original.compute_dtype = model.compute_dtype = dtype
    adapted, expected = logits(model), logits(original)
    assert (adapted - expected).abs().max() > 0.01
    with adapters_off(model):
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), adapted)


def test_an_nf4_reference_is_the_quantised_model():
    model = build("nf4", "lora")
    with adapters_off(model):
        found = logits(model)
    assert torch.equal(found, logits(build("nf4"))) and (found - logits(build())).abs().max() > 0.01


def test_pissas_reference_is_the_model_before_and_not_what_was_left_of_it():
    original = logits(build())
    model = build("dense", "pissa")  # its A and B have moved since
    adapted = logits(model)
    assert (adapted - original).abs().max() > 0.01
    with adapters_off(model):
        assert (logits(model) - original).abs().max() < 1e-5 * original.abs().max()
    assert torch.equal(logits(model), adapted)
    for _, layer in lora.adapter_modules(model):
        layer.initial_B.zero_()
    with adapters_off(model):
        assert (logits(model) - original).abs().max() > 0.01

    fresh = ch3_models.build()
    lora.apply_adapter(fresh, lora.AdapterConfig("pissa", rank=4, alpha=8.0))
    at_start = logits(fresh)
    with adapters_off(fresh):  # what the policy itself computes first: β s is 0
        assert torch.equal(logits(fresh), at_start)


@pytest.mark.parametrize("method", ["lora", "dora", "vera"])
def test_it_is_what_peft_gives_with_its_adapter_disabled(method):
    folder, stored = GOLDENS / "trl/qwen3", load_file(GOLDENS / "trl/disabled.safetensors")
    model = ch3_models.llama.LlamaForCausalLM(
        ch3_models.llama.LlamaConfig.from_dict(read_config(folder)))
    load_weights(model, folder)
    if method == "lora":
        peft.load_adapter(model, GOLDENS / "trl/qwen3-lora", lora)
    else:
        lora.apply_adapter(model, lora.AdapterConfig(method, rank=4))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1
    ids = stored["input_ids"]
    pack = ch3_models.inputs_of(ch3_models.packing.packed_sequence_collate_fn([(ids, ids)]))
    expected, largest = stored["logits"], stored["logits"].abs().max()
    assert (model(**pack) - expected).abs().max() > 0.01 * largest
    with adapters_off(model):
        assert (model(**pack) - expected).abs().max() < 1e-5 * largest


def test_adapters_are_on_again_after_an_error():
    model = build("dense", "lora")
    adapted = logits(model)
    with pytest.raises(KeyboardInterrupt), adapters_off(model):
        raise KeyboardInterrupt
    assert torch.equal(logits(model), adapted)
    with pytest.raises(IndexError):
        reference_log_probs(model, {**PACK, "input_ids": PACK["input_ids"] + 1000})
    assert torch.equal(logits(model), adapted)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_the_reference_pass_leaves_nothing_behind(checkpointing):
    """No gradient, no graph, and the policy's own gradients as if it had not been."""
    model = build("dense", "lora")
    for layer in model.model.layers:
        layer.checkpointing = checkpointing
    model(**PACK).sum().backward()
    kept = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    found = reference_log_probs(model, PACK)
    assert not found.requires_grad and torch.is_grad_enabled()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name not in kept)
        assert parameter.grad is None or torch.equal(parameter.grad, kept[name])
    model.zero_grad(set_to_none=True)
    log_p = model(**PACK)
    reference_log_probs(model, PACK)  # even between a forward and its backward
    log_p.sum().backward()
    assert all(torch.equal(model.get_parameter(name).grad, grad) for name, grad in kept.items())


def test_the_reference_pass_has_no_gradient_whatever_could_be_trained():
    trained = build()  # adapters off, nothing could be; here everything can
    for found in (reference_log_probs(trained, PACK),
                  reference_log_probs(build("dense", "lora"), PACK, trained)):
        assert trained(**PACK).requires_grad and not found.requires_grad


@pytest.mark.parametrize("method", ["full", "delta-lora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_frozen_copy_is_the_model_as_it_was(method, dtype):
    model = build()
    if method == "delta-lora":
        config = lora.AdapterConfig(method, rank=4, alpha=8.0, delta_start=0)
        lora.apply_adapter(model, config)
    model.compute_dtype = getattr(torch, dtype)
    reference = frozen_copy(model, options(method, dtype=dtype), "cpu")
    assert not any(p.requires_grad for p in reference.parameters())
    assert {p.dtype for p in reference.parameters()} == {getattr(torch, dtype)}
    first = model(**PACK)
    found = reference_log_probs(model, PACK, reference)
    assert torch.equal(found, first) and not found.requires_grad and found.any()

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    weight = model.get_submodule("model.layers.0.mlp.up_proj")
    weight = (weight.base if method == "delta-lora" else weight).weight
    before = weight.detach().clone()
    for step in (1, 2):
        model(**PACK).sum().backward()
        if method == "delta-lora":
            lora.before_step(model, config)
        optimizer.step()
        if method == "delta-lora":
            lora.after_step(model, config, step)
        optimizer.zero_grad()
    assert not torch.equal(weight, before)
    assert (model(**PACK) - first).abs().max() > 0.01
    assert torch.equal(reference_log_probs(model, PACK, reference), first)


def test_a_copy_is_made_for_nothing_else():
    model = build()
    assert frozen_copy(model, options("full"), "cpu") is not None
    for method in set(lora.METHODS) - {"full", "delta-lora"}:
        assert frozen_copy(model, options(method), "cpu") is None
    for loss in ("simpo", "orpo"):
        assert frozen_copy(model, options("full", loss), "cpu") is None
        assert reference_file.copy_bytes(model, options("full", loss)) == 0


def test_copy_bytes_are_the_copys():
    model = build("dense", "delta-lora", tie_word_embeddings=False)
    for dtype in ("float32", "bfloat16"):
        for method in ("full", "delta-lora"):
            how = options(method, dtype=dtype)
            copied = frozen_copy(model, how, "cpu")
            assert reference_file.copy_bytes(model, how) == sum(
                p.nbytes for p in copied.parameters())
        assert reference_file.copy_bytes(model, options("lora", dtype=dtype)) == 0


@pytest.mark.parametrize("method, base", [("full", "dense"), ("lora", "dense"), ("lora", "nf4"),
                                          ("delta-lora", "dense")])
@pytest.mark.parametrize("tied", [True, False])
def test_the_flops_of_a_step_with_a_reference(method, base, tied, capsys):
    """Counted by hand: the reference costs a token 2 FLOPs for each number of a matrix, and in
    attention 4 H d for each token that it looks at, half of its document."""
    model = build(base, method, tie_word_embeddings=tied)
    how = options(method, batch_tokens=64, grad_accum=1, device="cpu")
    without, predicted = (predict.costs(model, [10, 10], how, 8) for _ in range(2))
    found = reference_file.add_reference(predicted, model, how)
    D, F, H, K, d, V, layers = 64, 128, 4, 2, 16, 96, 3
    added = {"matrices": 2 * layers * (2 * D * H * d + 2 * D * K * d + 3 * D * F),
             "head": 2 * V * D, "attention": layers * 4 * H * d * 10 / 2}
    for name, flops in added.items():
        assert found.flops[name] == pytest.approx(without.flops[name] + flops)
    assert found.flops["total"] == pytest.approx(without.flops["total"] + sum(added.values()))
    assert found.flops["full"] == pytest.approx(without.flops["full"] + sum(added.values())
                                                + added["attention"])
    copied = sum(prod(p.shape) for p in model.parameters()) * 4 * (method in ("full", "delta-lora"))
    assert found.peak == without.peak + copied
    said = capsys.readouterr().out
    assert "one more forward" in said and ("frozen copy" in said) == bool(copied)

    plain = predict.costs(model, [10, 10], how, 8)
    for loss in ("simpo", "orpo"):
        how.loss, how.needs_reference = loss, False
        unchanged = reference_file.add_reference(plain, model, how)
        assert unchanged.flops == without.flops and unchanged == without
    assert not capsys.readouterr().out


def test_an_adapted_head_is_refused():
    with pytest.raises(train_dpo.UserError, match="leave lm_head out"):
        train_dpo.main(["--model", str(GOLDENS / "trl/llama3"), "--target-modules", "lm_head",
                        "--device", "cpu", "--data", "none.jsonl", "--dry-run"])
