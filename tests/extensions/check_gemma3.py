"""Gemma 3's text models, with gemma3.diff applied: what holds for every family, and what is its own.

A model of 1 B has the values of google/gemma-3-1b-it's config.json, as transformers 4 writes it.
"""

import family_checks
import pytest
import torch
from family_checks import config_of, llama, model_of, pack_of

from common import weights

ONE_B = dict(
    model_type="gemma3_text", attention_bias=False, attn_logit_softcapping=None, head_dim=256,
    final_logit_softcapping=None, hidden_activation="gelu_pytorch_tanh", hidden_size=1152,
    intermediate_size=6912, max_position_embeddings=32768, num_attention_heads=4,
    num_hidden_layers=26, num_key_value_heads=1, query_pre_attn_scalar=256, rms_norm_eps=1e-6,
    rope_local_base_freq=10000, rope_scaling=None, rope_theta=1000000, sliding_window=512,
    sliding_window_pattern=6, vocab_size=262144)


def read(folder, config):
    (folder / "config.json").write_text(family_checks.json.dumps(config))
    return weights.read_config(folder)


@pytest.mark.parametrize("name", ["gemma3_tied", "gemma3_untied"])
@pytest.mark.parametrize("check", family_checks.ALL, ids=lambda check: check.__name__)
def test_what_holds_for_every_family(check, name, tmp_path):
    check(name, tmp_path)


def test_the_old_dialect_is_the_new_one(tmp_path):
    """rope_local_base_freq, rope_theta, rope_scaling and a pattern: what version 4 has written."""
    old = family_checks.json.loads((family_checks.FAMILIES / "gemma3_tied/config.json").read_text())
    rope = old.pop("rope_parameters")
    assert old.pop("layer_types") == 2 * ["sliding_attention"] + [
        "full_attention", "sliding_attention"]
    old |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 3,
            "rope_scaling": {"rope_type": "linear", "factor": rope["full_attention"]["factor"]}}
    del old["_sliding_window_pattern"]
    config = llama.LlamaConfig.from_dict(read(tmp_path, old))
    assert config == config_of("gemma3_tied", sliding_window_pattern=3)
    weights.write_config(read(tmp_path, old), tmp_path, torch.float32)
    assert llama.LlamaConfig.from_dict(weights.read_config(tmp_path)) == config


def test_one_billion_parameters(tmp_path):
    config = llama.LlamaConfig.from_dict(read(tmp_path, ONE_B))
    assert config.tie_word_embeddings and config.windows == (5 * (512,) + (None,)) * 4 + (512, 512)
    with torch.device("meta"):
        model = llama.LlamaForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == 999_885_952


@pytest.mark.parametrize("change", [
    {"attn_logit_softcapping": 50.0}, {"final_logit_softcapping": 30.0},
    {"use_bidirectional_attention": True}, {"hidden_activation": "gelu"},
    {"sliding_window_pattern": "6"}, {"query_pre_attn_scalar": 0}, {"rope_local_base_freq": -1}])
def test_what_it_does_not_compute_is_refused_by_name(change, tmp_path):
    with pytest.raises(ValueError, match=next(iter(change))):
        llama.LlamaConfig.from_dict(read(tmp_path, ONE_B | change))


def test_a_fresh_model_multiplies_by_one():
    model = llama.LlamaForCausalLM(config_of("gemma3_tied"))
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    assert len(norms) == 4 * 6 + 1 and not any(norm.any() for norm in norms)


def test_bfloat16_is_near():
    model, golden = model_of("gemma3_tied")
    _, inputs = pack_of(family_checks.documents_of(golden))
    model.compute_dtype = torch.bfloat16
    logits = model(**inputs).float()
    assert (logits - golden["logits"]).norm() <= 0.03 * golden["logits"].norm()
