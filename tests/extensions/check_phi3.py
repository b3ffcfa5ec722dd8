"""Phi-3 and Phi-4-mini: what every family must hold, and what is theirs.

phi3_untied has windows, phi3_tied turns three quarters of each head, and phi3_longrope has both and
long-rope, as Phi-4-mini does.
"""

import json

import family_checks
import pytest
import torch
from checks import refused
from family_checks import FAMILIES, config_of, large, llama, lora, model_of, random_pack
from helpers import GOLDENS

from common import weights
from common.adapters import peft
from common.asking.generation import generate
from common.predict_memory import layer_costs, saved_per_token, weight_copies

NAMES = ["phi3_tied", "phi3_untied", "phi3_longrope"]
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.25, 2.5], "long_factor": [1.5, 3.0, 8.0]}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("check", family_checks.ALL, ids=lambda check: check.__name__)
def test_it_holds(check, name, tmp_path):
    check(name, tmp_path)


# --- fused products ---

def test_files_have_the_names_of_the_fused_products(tmp_path):
    model, _ = model_of("phi3_tied")
    config = lora.AdapterConfig(rank=4)
    lora.apply_adapter(model, config)
    peft.save_adapter(model, config, tmp_path, "base", lora)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(saved["target_modules"]) == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}


@pytest.mark.parametrize("method", ["full", "lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_keeps_what_is_predicted(method, dtype):
    """In wide heads and to the byte: where a view keeps a whole product, there is more."""
    model = large("phi3_tied", head_dim=64)
    lora.apply_adapter(model, lora.AdapterConfig(method=method, rank=8))
    pack, inputs = random_pack()
    layer, tokens = model.model.layers[1], len(pack["labels"])
    x = torch.randn(tokens, 128, dtype=dtype, requires_grad=True)
    cos, sin = (torch.randn(tokens, 1, 24, dtype=dtype) for _ in "cs")
    known = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers(),
                                                      cos, sin, pack["cu_seqlens"])}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and tensor.ndim > 1:  # not a norm's cast weight
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x, cos, sin, inputs["cu_seqlens"], inputs["max_seqlen"])
    predicted = tokens * saved_per_token(layer, dtype) + weight_copies(layer, dtype)
    got = sum(storage.nbytes() for storage in kept.values())
    if method == "dora":  # row norms: matrices of the rank, whatever T is
        assert predicted <= got <= 1.03 * predicted
    else:
        assert got == predicted


def test_a_fused_product_counts_as_much_as_its_parts():
    """Trained, with LoRA, and frozen: FLOPs, and the numbers of quantised matrices."""
    for method in ("full", "lora"):
        model = large("phi3_tied")
        lora.apply_adapter(model, lora.AdapterConfig(method=method, rank=8))
        layer = model.model.layers[0]
        matrices = [p for name, p in layer.named_parameters() if "norm" not in name]
        flops = sum((6 if p.requires_grad else 4) * p.numel() for p in matrices)
        assert sum(cost.flops() for cost in layer_costs(layer)) == flops


# --- partial rotation ---

def test_only_the_first_pairs_of_a_head_turn():
    """And their number is rounded down, as by transformers: 0.8 of 8 numbers is 6."""
    config = config_of("phi3_tied", partial_rotary_factor=0.8)
    tables = llama.rotary_tables(torch.arange(5), config)
    assert all(torch.equal(*pair) for pair in zip(
        tables, llama.rotary_tables(torch.arange(5), config_of("phi3_tied"))))
    x = torch.randn(5, 2, 8)
    turned = llama.apply_rotary(x, *tables)
    assert torch.equal(turned[..., 6:], x[..., 6:])
    assert all((turned[1:, :, i] != x[1:, :, i]).all() for i in range(6))


# --- long-rope ---

def test_documents_are_as_long_as_the_original_ones():
    """Beyond them transformers takes `long_factor`, for all tokens."""
    model, golden = model_of("phi3_longrope")
    assert model.config.max_position_embeddings == 24
    assert weights.read_config(FAMILIES / "phi3_longrope")["max_position_embeddings"] == 64
    assert len(generate(model, [[1] * 20], 8)[0]) == 4
    with refused("24 tokens: the model takes 24"):
        generate(model, [[1] * 24], 1)


# --- config.json ---

def version_4(**changes):
    """phi3_longrope's config.json as version 4 has it."""
    config = json.loads((FAMILIES / "phi3_longrope" / "config.json").read_text())
    del config["rope_parameters"]
    scaling = {"type": "longrope", **{key: LONG[key] for key in LONG.keys() - {"rope_type"}}}
    return {**config, "rope_theta": 100.0, "partial_rotary_factor": 0.75,
            "rope_scaling": scaling, **changes}


def config_from(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    return weights.read_config(folder)


@pytest.mark.parametrize("kind", ["longrope", "su"])  # su: its name in the first files
def test_both_dialects_are_read_and_written(kind, tmp_path):
    given = version_4()
    given["rope_scaling"]["type"] = kind
    config = config_from(tmp_path, given)
    assert llama.LlamaConfig.from_dict(config) == config_of("phi3_longrope")
    weights.write_config(config, tmp_path, torch.float32)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["rope_scaling"] == version_4()["rope_scaling"]  # version 4 takes nothing else
    assert written["rope_parameters"] == json.loads(
        (FAMILIES / "phi3_longrope" / "config.json").read_text())["rope_parameters"]
    for key in version_4().keys() - {"rope_scaling", "rope_parameters"}:
        assert written[key] == version_4()[key], key
    again = weights.read_config(tmp_path)
    assert llama.LlamaConfig.from_dict(again) == config_of("phi3_longrope")


def test_what_is_not_said_is_as_in_transformers(tmp_path):
    given = json.loads((FAMILIES / "phi3_tied" / "config.json").read_text())
    for key in ("max_position_embeddings", "num_key_value_heads", "rms_norm_eps", "rope_parameters",
                "sliding_window", "tie_word_embeddings"):
        del given[key]
    config = llama.LlamaConfig.from_dict(config_from(tmp_path, given))
    assert config.max_position_embeddings == 4096 and config.num_key_value_heads == 4
    assert config.rms_norm_eps == 1e-5 and config.rope_theta == 1e4
    assert config.windows == (None, None) and not config.tie_word_embeddings
    assert config.partial_rotary_factor == 1 and config.fused_projections


@pytest.mark.parametrize("changes, named", [
    ({"resid_pdrop": 0.1}, "resid_pdrop=0.1"), ({"embd_pdrop": 0.1}, "embd_pdrop=0.1"),
    ({"attention_bias": True}, "attention_bias=True"), ({"mlp_bias": True}, "mlp_bias=True"),
    ({"partial_rotary_factor": 0.9}, "partial_rotary_factor=0.9"),  # 7 of 8 numbers
    ({"partial_rotary_factor": 0.1}, "partial_rotary_factor=0.1"),
    ({"partial_rotary_factor": 1.25}, "partial_rotary_factor=1.25"),
    ({"partial_rotary_factor": "all"}, "partial_rotary_factor='all'"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "only longrope is"),
    ({"rope_scaling": {**LONG, "attention_factor": 1.5}}, "only longrope is"),
    ({"rope_scaling": {**LONG, "short_factor": [1.0, 1.0]}}, "3 positive numbers in short_factor"),
    ({"rope_scaling": {**LONG, "short_factor": [1.0, 1.0, "2"]}}, "3 positive numbers"),
    ({"rope_scaling": {**LONG, "short_factor": [1.0, 1.0, 0.0]}}, "3 positive numbers"),
    ({"original_max_position_embeddings": 0.5}, "original_max_position_embeddings=0.5"),
    ({"original_max_position_embeddings": 1}, "only longrope is"),
], ids=str)
def test_what_is_not_computed_is_refused_by_name(changes, named):
    with pytest.raises(ValueError) as caught:
        config_of("phi3_longrope", **changes)
    assert named in str(caught.value)


@pytest.mark.parametrize("changes, named", [
    ({"partial_rotary_factor": 0.7}, "partial_rotary_factor=0.7 is not supported here in a llama"),
    ({"rope_scaling": LONG}, "only linear, llama3, yarn are")], ids=str)
def test_other_families_have_neither(changes, named):
    config = weights.read_config(GOLDENS / "models" / "llama3_untied")
    with pytest.raises(ValueError, match=named):
        llama.LlamaConfig.from_dict(config | changes)


def test_two_dialects_that_disagree_are_refused(tmp_path):
    for key, value in (("partial_rotary_factor", 0.5), ("original_max_position_embeddings", 32)):
        rope = {**LONG, "rope_theta": 100.0, "partial_rotary_factor": 0.75,
                "original_max_position_embeddings": 24, key: value}
        with refused(f"two different values of {key}"):
            config_from(tmp_path, version_4(rope_parameters=rope))
