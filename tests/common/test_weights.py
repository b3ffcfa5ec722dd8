"""Model folders against what transformers wrote, and against every way in which they break."""

import codecs
import gc
import json
import struct
from dataclasses import replace

import pytest
import small_runs
import torch
import torch.distributed as dist
from checks import refused
from faults import Faults, disk_full
from helpers import GOLDENS, load
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from common import weights
from common.errors import located, writing
from common.files import tensors as tensor_files
from common.files.config import write_config
from common.hub import ARCHITECTURES, COMMON

MODELS = GOLDENS / "models"
NAMES = (
    "qwen3_tied", "qwen3_untied", "llama3_tied", "llama3_untied", "qwen2_tied", "qwen2_untied")
ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32, "rope_type": "llama3"}


def tree(shapes, dtype=torch.float32):
    """A module with parameters of these names and shapes, and NaN in all of them."""
    root = nn.Module()
    for name, shape in shapes.items():
        module, *parts = root, *name.split(".")
        for part in parts[:-1]:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        values = torch.full(shape, float("nan"), dtype=dtype)
        module.register_parameter(parts[-1], nn.Parameter(values))
    return root


def golden(name):
    """The tensors of a golden folder, read without the code under test."""
    tensors = {}
    for file in (MODELS / name).glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def model_of(name, **options):
    return tree({key: value.shape for key, value in golden(name).items()}, **options)


def write_folder(path, tensors, config=None):
    path.mkdir(exist_ok=True)
    config = config or {"model_type": "qwen3", "tie_word_embeddings": True}
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors")
    return path


def tied_tensors():
    return {"model.embed_tokens.weight": torch.randn(6, 4), "model.norm.weight": torch.randn(4)}


def shapes_of(tensors):
    return {name: tensor.shape for name, tensor in tensors.items() if name != "lm_head.weight"}


# --- config.json ---

def config_of(tmp_path, text):
    text = text if isinstance(text, str) else json.dumps(text)
    (tmp_path / "config.json").write_text(text)
    return weights.read_config(tmp_path)


@pytest.mark.parametrize("given, theta, scaling", [
    # transformers 4
    ({"rope_theta": 1000000, "rope_scaling": None}, 1e6, None),
    ({"rope_theta": 5e5, "rope_scaling": ROPE}, 5e5, ROPE),
    ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}, 5e5,
     {"rope_type": "linear", "factor": 2.0}),
    # transformers 5
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 1e6, None),
    ({"rope_parameters": {"rope_theta": 5e5, **ROPE}}, 5e5, ROPE),
    # both at once, and neither
    ({"rope_parameters": {"rope_theta": 5e5, **ROPE}, "rope_theta": 500000,
      "rope_scaling": ROPE}, 5e5, ROPE),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_theta": 1e6,
      "rope_scaling": None}, 1e6, None),
    ({}, 1e4, None),
    # what changes the maths is never dropped
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                          "partial_rotary_factor": 0.5}}, 1e4,
     {"rope_type": "default", "partial_rotary_factor": 0.5}),
])
def test_read_config_knows_both_dialects(tmp_path, given, theta, scaling):
    config = config_of(tmp_path, {"model_type": "llama", "other": [1], **given})
    assert config["rope_theta"] == theta and isinstance(config["rope_theta"], float)
    assert config["rope_scaling"] == scaling
    assert "rope_parameters" not in config and config["other"] == [1]


@pytest.mark.parametrize("given, twice", [
    ({"rope_scaling": {**ROPE, "type": "linear"}}, "linear"),
    ({"rope_parameters": {"rope_type": "default", "type": "linear", "rope_theta": 1e4}}, "linear"),
    ({"rope_scaling": {**ROPE, "original_max_position_embeddings": 16},
      "original_max_position_embeddings": 32}, "'original_max_position_embeddings': 32"),
    ({"rope_parameters": ROPE, "rope_scaling": {**ROPE, "factor": 3.5}}, "3.5")])
def test_a_scaling_that_is_given_twice_must_be_one(tmp_path, given, twice):
    """transformers 4 and 5 do not take the same one of the two."""
    with refused("two different values of RoPE scaling", twice):
        config_of(tmp_path, {"model_type": "llama", **given})


def test_a_scaling_may_be_given_twice_alike(tmp_path):
    scaling = {**ROPE, "original_max_position_embeddings": 16}
    config = config_of(tmp_path, {
        "rope_scaling": {**scaling, "type": ROPE["rope_type"]}, "rope_parameters": scaling,
        "original_max_position_embeddings": 16})
    assert config["rope_scaling"] == scaling


@pytest.mark.parametrize("given, head_dim", [
    ({"model_type": "qwen3"}, 128),
    ({"model_type": "qwen3", "head_dim": 64}, 64),
    ({"model_type": "llama"}, 16),
    ({"model_type": "llama", "head_dim": None}, 16),
    ({"model_type": "llama", "head_dim": 32}, 32),
    ({"model_type": "qwen2"}, 16),
])
def test_head_dim_by_family(tmp_path, given, head_dim):
    sizes = {"hidden_size": 64, "num_attention_heads": 4}
    assert config_of(tmp_path, sizes | given)["head_dim"] == head_dim


@pytest.mark.parametrize("given, groups, positions", [  # as transformers 5.23, where it has a model
    ({"model_type": "llama"}, 64, 2048), ({"model_type": "mistral"}, 8, 131072),
    ({"model_type": "qwen2"}, 32, 32768), ({"model_type": "qwen3"}, 32, 32768),
    ({"model_type": "qwen3", "num_attention_heads": 16}, 16, 32768),
    ({"model_type": "qwen3", "num_key_value_heads": None}, 64, 32768),
    ({"model_type": "llama", "num_key_value_heads": None}, 64, 2048),
    ({"model_type": "llama", "num_key_value_heads": 4, "max_position_embeddings": 77}, 4, 77),
])
def test_key_value_heads_and_positions_that_are_not_said(tmp_path, given, groups, positions):
    config = config_of(tmp_path, {"hidden_size": 256, "num_attention_heads": 64} | given)
    assert config["num_key_value_heads"] == groups
    assert config["max_position_embeddings"] == positions


@pytest.mark.parametrize("script, name, of", [
    ("chapter-01/modeling_qwen3.py", "Qwen3Config", "qwen3_tied"),
    ("chapter-02/llama_config.py", "LlamaConfig", "llama3_tied"),
    ("chapter-03/llama_config.py", "LlamaConfig", "qwen2_tied")])
def test_optional_keys_may_be_absent_or_null_in_every_chapter(tmp_path, script, name, of):
    read = getattr(load(script), name).from_dict
    config = json.loads((MODELS / of / "config.json").read_text())
    heads = config["num_attention_heads"]
    expected = replace(read(weights.read_config(MODELS / of)), num_key_value_heads=heads)
    assert read(config_of(tmp_path, config | {"num_key_value_heads": None})) == expected
    for key, default in {"rms_norm_eps": 1e-6, "tie_word_embeddings": False,
                         "initializer_range": 0.02, "num_key_value_heads": heads}.items():
        less = {k: v for k, v in config.items() if k not in (key, "num_key_value_heads")}
        assert read(config_of(tmp_path, less)) == replace(expected, **{key: default})


def test_byte_order_marks_are_passed_over(tmp_path):
    folder = sharded(tmp_path)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    expected = weights.read_config(folder), list(tensor_files.tensor_headers(folder))
    for name in ("config.json", "model.safetensors.index.json"):
        (folder / name).write_bytes(codecs.BOM_UTF8 + (folder / name).read_bytes())
    assert (weights.read_config(folder), list(tensor_files.tensor_headers(folder))) == expected
    (folder / "config.json").write_bytes(codecs.BOM_UTF8 + b"{")
    with refused(folder / "config.json", "not valid JSON", "line 1"):
        weights.read_config(folder)


@pytest.mark.parametrize("text, parts", [
    ("", ["line 1", "not valid JSON"]),
    ('{"a": 1,\n "b" 2}', ["line 2", "not valid JSON"]),
    ("[1]", ["JSON object", "list"]),
    ("[" * 100_000, ["not valid JSON"]),
    ({"hidden_size": "64"}, ["hidden_size='64'", "positive int"]),
    ({"num_hidden_layers": 2.5}, ["num_hidden_layers", "2.5"]),
    ({"num_hidden_layers": True}, ["num_hidden_layers", "True"]),
    ({"vocab_size": 0}, ["vocab_size", "0"]),
    ({"rms_norm_eps": "1e-6"}, ["rms_norm_eps='1e-6'", "positive float"]),
    ({"rms_norm_eps": float("nan")}, ["rms_norm_eps=nan", "positive float"]),
    ({"rope_theta": float("inf")}, ["rope_theta=inf", "positive float"]),
    ({"vocab_size": 2**31}, ["vocab_size=2147483648", "positive int below 2147483648"]),
    ({"hidden_size": 10**30}, ["hidden_size=1000", "positive int"]),
    ({"rope_theta": -10**400}, ["rope_theta=-1000", "positive float"]),
    ({"tie_word_embeddings": "false"}, ["tie_word_embeddings='false'", "bool"]),
    ({"model_type": 3}, ["model_type=3"]),
    ({"model_type": ["qwen3"]}, ["model_type=['qwen3']"]),
    ({"rope_theta": 0}, ["rope_theta=0", "positive float"]),
    ({"rope_theta": [1e4]}, ["rope_theta=[10000.0]", "positive float"]),
    ({"rope_scaling": "llama3"}, ["rope_scaling", "'llama3'"]),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["rope_scaling.low_freq_factor", "missing"]),
    ({"rope_scaling": ROPE | {"factor": "8"}}, ["factor", "'8'"]),
    ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, ["rope_theta", "1000000.0"]),
    ({"rope_scaling": ROPE, "rope_parameters": ROPE | {"factor": 4.0}}, ["RoPE scaling"]),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
     ["rope_scaling", "full_attention"]),
    ({"model_type": "llama", "hidden_size": 65, "num_attention_heads": 4, "head_dim": None},
     ["head_dim", "65"]),
])
def test_a_broken_config_is_refused(tmp_path, text, parts):
    """By `read_config`, or by the model's own config, as every script has them."""
    if isinstance(text, dict):
        text = small_runs.CONFIG | text
    with refused(tmp_path / "config.json", *parts), located(tmp_path / "config.json"):
        load("chapter-02/llama_config.py").LlamaConfig.from_dict(config_of(tmp_path, text))


def test_missing_folder_and_missing_config(tmp_path):
    with refused(tmp_path / "nothing", "no config.json"):
        weights.read_config(tmp_path / "nothing")
    with refused(tmp_path, "no config.json"):
        weights.read_config(tmp_path)


def test_a_config_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "config.json").write_bytes(b'{"a": "\xff"}')
    with refused(tmp_path / "config.json", "not valid JSON"):
        weights.read_config(tmp_path)


def test_write_config_speaks_both_dialects(tmp_path):
    # What was seen to load with equal logits in transformers 4.57.3 and 5.23.0.
    config = weights.read_config(MODELS / "llama3_untied")
    write_config(config, tmp_path, torch.bfloat16)
    assert (tmp_path / "config.json").read_text() == json.dumps({
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 1, "dtype": "bfloat16", "eos_token_id": 2, "head_dim": 6,
        "hidden_act": "silu", "hidden_size": 24, "initializer_range": 0.02,
        "intermediate_size": 32, "max_position_embeddings": 64, "mlp_bias": False,
        "model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 2,
        "num_key_value_heads": 2, "pad_token_id": None, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_parameters": {
            "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 32, "rope_theta": 100.0, "rope_type": "llama3"},
        "rope_scaling": {
            "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 32, "rope_type": "llama3"},
        "rope_theta": 100.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "5.23.0", "use_cache": True, "vocab_size": 64}, indent=2) + "\n"


@pytest.mark.parametrize("name", NAMES)
def test_config_round_trip(tmp_path, name):
    config = weights.read_config(MODELS / name)
    write_config(config, tmp_path, "float32")
    written = json.loads((tmp_path / "config.json").read_text())
    rope = {"rope_type": "default", **(config["rope_scaling"] or {})}
    assert written["rope_parameters"] == rope | {"rope_theta": config["rope_theta"]}
    again = weights.read_config(tmp_path)
    assert again == config | {"dtype": "float32", "torch_dtype": "float32"}


def test_architectures_have_their_published_parameter_counts():
    published = {
        "qwen3-0.6b": 596_049_920, "qwen3-8b": 8_190_735_360, "llama-3.2-1b": 1_235_814_400,
        "llama-3.1-8b": 8_030_261_248}
    assert set(published) == set(ARCHITECTURES)
    for name, count in published.items():
        c = weights.read_config(COMMON / "architectures" / name)
        width, heads, groups = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"]
        attention = 2 * width * c["head_dim"] * (heads + groups)
        norms = 2 * width + (2 * c["head_dim"] if c["model_type"] == "qwen3" else 0)
        layer = attention + 3 * width * c["intermediate_size"] + norms
        tables = c["vocab_size"] * width * (1 if c["tie_word_embeddings"] else 2)
        assert c["num_hidden_layers"] * layer + width + tables == count, name


# --- loading ---

@pytest.mark.parametrize("name", NAMES)
def test_loads_what_transformers_wrote(name):
    model = model_of(name)
    weights.load_weights(model, MODELS / name)
    expected = golden(name)
    for key, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, expected[key].float()), key


def test_parameters_keep_their_dtype():
    model = model_of("llama3_untied", dtype=torch.bfloat16)
    weights.load_weights(model, MODELS / "llama3_untied")
    expected = golden("llama3_untied")["model.norm.weight"].to(torch.bfloat16)
    assert torch.equal(model.model.norm.weight, expected)


def test_missing_unexpected_and_misshapen_are_named(tmp_path):
    tensors = tied_tensors()
    folder = write_folder(tmp_path / "m", tensors)
    shapes = shapes_of(tensors)
    with refused(folder, "missing model.layers.0.mlp.up_proj.weight"):
        weights.load_weights(tree(shapes | {"model.layers.0.mlp.up_proj.weight": (2, 4)}), folder)
    with refused(folder, "unexpected model.norm.weight"):
        weights.load_weights(tree({"model.embed_tokens.weight": (6, 4)}), folder)
    with refused(folder, "model.norm.weight has shape (4,), not (5,)"):
        weights.load_weights(tree(shapes | {"model.norm.weight": (5,)}), folder)
    many = {f"model.layers.{i}.w": (1,) for i in range(9)}
    with refused("model.layers.0.w, model.layers.1.w, model.layers.2.w, 6 more"):
        weights.load_weights(tree(shapes | many), folder)


def test_problems_of_tensors_in_few_words():
    headers = {name: ((2,), "F32", None) for name in "abcdefg"}
    wanted = {name: (2,) for name in "abcdefg"}
    assert tensor_files.tensor_problems(headers, wanted) == ""
    headers["d"] = ((2,), "I8", None)
    wanted |= {"c": (3,), "x": (1,)}
    del wanted["b"]
    said = "missing x; unexpected b; c has shape (2,), not (3,); d is I8, not BF16 or F16 or F32 or F64"
    assert tensor_files.tensor_problems(headers, wanted) == said
    wanted |= {"e": (), "f": ()}
    assert tensor_files.tensor_problems(headers, wanted) == said + "; 2 more"
    headers["d"] = ((2,), "F16", None)
    assert tensor_files.tensor_problems(headers, wanted | {"e": (2,)}, {"F32"}).endswith(
        "d is F16, not F32; 1 more")


def test_nothing_is_copied_when_something_is_wrong(tmp_path):
    tensors = tied_tensors()
    model = tree(shapes_of(tensors) | {"model.layers.0.w": (1,)})
    with refused("missing"):
        weights.load_weights(model, write_folder(tmp_path / "m", tensors))
    assert all(parameter.isnan().all() for parameter in model.parameters())


def test_tied_duplicate_head(tmp_path):
    tensors = tied_tensors()
    model = tree(shapes_of(tensors))
    embedding = tensors["model.embed_tokens.weight"]
    same = tensors | {"lm_head.weight": embedding.clone()}
    weights.load_weights(model, write_folder(tmp_path / "same", same))
    assert torch.equal(model.model.embed_tokens.weight, embedding)

    other = embedding.clone()
    other[5, 3] += 1e-6
    differs = "lm_head.weight differs from model.embed_tokens.weight"
    for head, said in ((other, differs), (embedding.bfloat16(), differs),
                       (embedding[:5].clone(), "lm_head.weight has shape (5, 4), not (6, 4)")):
        folder = write_folder(tmp_path / "other", tensors | {"lm_head.weight": head})
        with refused(folder, said):
            weights.load_weights(model, folder)


def test_head_alone_is_the_tied_embedding(tmp_path):
    tensors = tied_tensors()
    model = tree(shapes_of(tensors))
    head = tensors.pop("model.embed_tokens.weight")
    weights.load_weights(
        model, write_folder(tmp_path / "m", tensors | {"lm_head.weight": head}))
    assert torch.equal(model.model.embed_tokens.weight, head)


def test_inv_freq_of_old_checkpoints_is_ignored(tmp_path):
    tensors = tied_tensors()
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    model = tree(shapes_of(tensors))
    weights.load_weights(model, write_folder(tmp_path / "m", tensors | old))
    assert torch.equal(model.model.norm.weight, tensors["model.norm.weight"])


@pytest.mark.parametrize("dtype, name", [
    (torch.uint8, "U8"), (torch.int64, "I64"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_quantised_tensors_are_refused_by_name(tmp_path, dtype, name):
    tensors = tied_tensors() | {"model.norm.weight": torch.ones(4).to(dtype)}
    folder = write_folder(tmp_path / "m", tensors)
    with refused(folder, f"model.norm.weight is {name}, not BF16 or F16"):
        weights.load_weights(tree(shapes_of(tensors)), folder)


def test_no_weights_in_the_folder(tmp_path):
    model = tree({"a": (1,)})
    with refused(COMMON / "architectures" / "qwen3-8b", "no model.safetensors", "--init random"):
        weights.load_weights(model, COMMON / "architectures" / "qwen3-8b")
    with refused("no such folder"):
        weights.load_weights(model, tmp_path / "nothing")
    (tmp_path / "pytorch_model.bin").touch()
    with refused("pickled", "never read"):
        weights.load_weights(model, tmp_path)


def test_parameters_without_memory_are_refused():
    with torch.device("meta"):
        model = nn.Module()
        model.register_parameter("a", nn.Parameter(torch.empty(1)))
    with pytest.raises(ValueError, match="meta"):  # copying into them would do nothing
        weights.load_weights(model, MODELS / "qwen3_tied")


# --- broken files ---

def good_bytes(tmp_path):
    save_file({"a": torch.ones(2, 3)}, tmp_path / "good.safetensors")
    return (tmp_path / "good.safetensors").read_bytes()


@pytest.mark.parametrize("damage, part", [
    (lambda raw: b"", "not a whole safetensors file"),
    (lambda raw: raw[:5], "not a whole safetensors file"),
    (lambda raw: raw[:-3], "not a whole safetensors file"),
    (lambda raw: raw + b"\0\0", "not a whole safetensors file"),
    (lambda raw: struct.pack("<Q", 2**62) + raw[8:], "not a whole safetensors file"),
    (lambda raw: struct.pack("<Q", 99_000_000) + raw[8:], "not a whole safetensors file"),
    (lambda raw: struct.pack("<Q", 3) + raw[8:], "not a whole safetensors file"),
    (lambda raw: raw.replace(b"[2,3]", b"[9,3]"), "not a whole safetensors file"),
    (lambda raw: raw.replace(b"F32", b"F37"), "F37"),
    (lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
])
def test_a_broken_safetensors_file_is_refused(tmp_path, damage, part):
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(damage(good_bytes(tmp_path)))
    with refused(folder / "model.safetensors", part):
        list(tensor_files.iter_tensors(folder))


def sharded(tmp_path, weight_map=None):
    """A folder of two shards, and then another weight_map."""
    folder = tmp_path / "m"
    tensors = [("a", torch.ones(4)), ("b", torch.zeros(4))]
    tensor_files.save_tensors(iter(tensors), folder, max_shard_bytes=16)
    index = folder / "model.safetensors.index.json"
    contents = json.loads(index.read_text())
    index.write_text(json.dumps(contents | {"weight_map": contents["weight_map"] | (
        weight_map or {})}))
    return folder


@pytest.mark.parametrize("weight_map, parts", [
    ({"a": "../model-00001-of-00002.safetensors"}, ["../model", "plain name"]),
    ({"a": "/etc/secret.safetensors"}, ["/etc/secret", "plain name"]),
    ({"a": "..\\secret.safetensors"}, ["secret", "plain name"]),
    ({"a": "x\0.safetensors"}, ["plain name"]),
    ({"a": ".safetensors/../b.safetensors"}, ["plain name"]),
    ({"a": "pytorch_model.bin"}, ["pytorch_model.bin", "not a .safetensors"]),
    ({"a": ["model-00001-of-00002.safetensors"]}, ["not a .safetensors"]),
    ({"a": None}, ["not a .safetensors"]),
    ({"ghost": "model-00009-of-00009.safetensors"}, ["model-00009", "no such file"]),
])
def test_a_hostile_or_wrong_weight_map_is_refused(tmp_path, weight_map, parts):
    folder = sharded(tmp_path, weight_map)
    with refused(folder, *parts):
        list(tensor_files.iter_tensors(folder))


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {}}', "[]", "{"])
def test_a_broken_index_is_refused(tmp_path, text):
    folder = sharded(tmp_path)
    (folder / "model.safetensors.index.json").write_text(text)
    with refused(folder / "model.safetensors.index.json"):
        list(tensor_files.iter_tensors(folder))


def test_a_tensor_is_where_its_file_has_it_and_in_one_file_only(tmp_path):
    """An index that is wrong about names alone does no harm: a model's names are checked anyway."""
    folder = sharded(tmp_path, {"ghost": "model-00001-of-00002.safetensors",
                                "a": "model-00002-of-00002.safetensors"})
    assert dict(tensor_files.iter_tensors(folder)).keys() == {"a", "b"}
    with refused(folder, "missing ghost"):
        weights.load_weights(tree({"a": (4,), "b": (4,), "ghost": (4,)}), folder)
    extra = {"b": torch.zeros(4), "forgotten": torch.zeros(1)}
    save_file(extra, folder / "model-00002-of-00002.safetensors")
    with refused(folder, "unexpected forgotten"):
        weights.load_weights(tree({"a": (4,), "b": (4,)}), folder)
    save_file(extra, folder / "model-00001-of-00002.safetensors")
    with refused(folder / "model-00002-of-00002.safetensors", "b is in model-00001"):
        tensor_files.tensor_headers(folder)


def test_a_head_that_only_the_index_has_is_the_embedding_of_a_tied_model(tmp_path):
    tensors = tied_tensors()
    tensor_files.save_tensors(iter(tensors.items()), tmp_path, max_shard_bytes=16)
    index = tmp_path / "model.safetensors.index.json"
    contents = json.loads(index.read_text())
    contents["weight_map"]["lm_head.weight"] = contents["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(contents))
    model = tree(shapes_of(tensors))
    weights.load_weights(model, tmp_path)
    assert torch.equal(model.model.embed_tokens.weight, tensors["model.embed_tokens.weight"])
    with refused(tmp_path, "missing lm_head.weight"):
        weights.load_weights(tree(shapes_of(tensors) | {"lm_head.weight": (6, 4)}), tmp_path)


def test_links_out_of_the_folder_are_refused(tmp_path):
    folder = sharded(tmp_path)
    shard = folder / "model-00001-of-00002.safetensors"
    shard.rename(tmp_path / "outside.safetensors")
    shard.symlink_to(tmp_path / "outside.safetensors")
    with refused(shard, "link out of its folder"):
        list(tensor_files.iter_tensors(folder))
    shard.unlink()
    (tmp_path / "outside.safetensors").rename(folder / "inside.safetensors")
    shard.symlink_to("inside.safetensors")
    assert {name for name, _ in tensor_files.iter_tensors(folder)} == {"a", "b"}

    single = tmp_path / "single"
    single.mkdir()
    (single / "model.safetensors").symlink_to(folder / "inside.safetensors")
    with refused(single / "model.safetensors", "link out of its folder"):
        list(tensor_files.iter_tensors(single))
    (tmp_path / "linked").symlink_to(folder)  # the user's own link to a whole folder
    assert len(list(tensor_files.iter_tensors(tmp_path / "linked"))) == 2


@pytest.mark.parametrize("blobs", ["hub/models--a--b/blobs", "hub/blobs/ab"])
def test_the_hub_cache_is_links_and_is_read(tmp_path, blobs):
    snapshot = tmp_path / "hub" / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (tmp_path / blobs).mkdir(parents=True)
    save_file({"a": torch.ones(1)}, tmp_path / blobs / "77")
    (snapshot / "model.safetensors").symlink_to(tmp_path / blobs / "77")
    assert [name for name, _ in tensor_files.iter_tensors(snapshot)] == ["a"]


# --- saving ---

@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("limit", [5_000_000_000, 8_000])
def test_save_and_load_are_bitwise(tmp_path, name, limit):
    config = weights.read_config(MODELS / name)
    model, again = model_of(name), model_of(name)
    weights.load_weights(model, MODELS / name)
    weights.save_weights(model, config, tmp_path / "m", max_shard_bytes=limit)
    weights.load_weights(again, tmp_path / "m")
    expected = dict(model.named_parameters())
    for key, parameter in again.named_parameters():
        assert torch.equal(parameter, expected[key]), key
    written = {key for key, _ in tensor_files.iter_tensors(tmp_path / "m")}
    assert written == set(golden(name))  # the names, and so no tied lm_head, as transformers has
    assert ("lm_head.weight" in written) != config["tie_word_embeddings"]


def test_saving_casts_and_says_so(tmp_path):
    model = model_of("qwen3_tied")
    weights.load_weights(model, MODELS / "qwen3_tied")
    config = weights.read_config(MODELS / "qwen3_tied") | {"quantization_config": {"x": 1}}
    weights.save_weights(model, config, tmp_path, torch.bfloat16, {"mark": "1"})
    written = load_file(tmp_path / "model.safetensors")
    for key, tensor in golden("qwen3_tied").items():  # it was bfloat16 before: nothing is lost
        assert tensor.dtype == torch.bfloat16 and torch.equal(written[key], tensor), key
    saved = weights.read_config(tmp_path)
    assert saved["torch_dtype"] == saved["dtype"] == "bfloat16"
    assert "quantization_config" not in saved
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    raw = (tmp_path / "model.safetensors").read_bytes()
    header = json.loads(raw[8:8 + struct.unpack("<Q", raw[:8])[0]])
    assert header["__metadata__"] == {"format": "pt", "mark": "1"}


def test_a_head_where_config_says_otherwise_is_refused(tmp_path):
    for name in ("qwen3_tied", "qwen3_untied"):
        config = weights.read_config(MODELS / name)
        config["tie_word_embeddings"] = not config["tie_word_embeddings"]
        with pytest.raises(ValueError, match="lm_head"):
            weights.save_weights(model_of(name), config, tmp_path)


def test_shards_and_their_index(tmp_path):
    tensors = {name: torch.full((4,), float(i)) for i, name in enumerate("edcba")}
    tensor_files.save_tensors(iter(tensors.items()), tmp_path, max_shard_bytes=32)
    files = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {"metadata": {"total_size": 80}, "weight_map": {
        "a": files[2], "b": files[1], "c": files[1], "d": files[0], "e": files[0]}}
    for name, tensor in tensor_files.iter_tensors(tmp_path):
        assert torch.equal(tensor, tensors[name])
    shape, dtype, file = tensor_files.tensor_headers(tmp_path)["a"]
    assert (shape, dtype, file.name) == ((4,), "F32", files[2])

    # A tensor larger than the limit has a shard of its own; a later save leaves nothing stale.
    tensor_files.save_tensors(iter(tensors.items()), tmp_path, max_shard_bytes=1)
    assert len(list(tmp_path.glob("*.safetensors"))) == 5
    tensor_files.save_tensors(iter([("z", torch.ones(1))]), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    tensor_files.save_tensors(iter([("y", torch.ones(1))]), tmp_path, stem="adapter_model")
    assert [name for name, _ in tensor_files.iter_tensors(tmp_path, "adapter_model")] == ["y"]
    assert [name for name, _ in tensor_files.iter_tensors(tmp_path)] == ["z"]


def test_views_and_transposes_are_saved_as_what_they_show(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    views = {"rows": base[1:], "turned": base.t(), "scalar": base[2, 3], "base": base}
    tensor_files.save_tensors(iter(views.items()), tmp_path)
    for name, tensor in tensor_files.iter_tensors(tmp_path):
        assert torch.equal(tensor, views[name]), name


def test_saved_files_have_the_usual_permissions(tmp_path):
    tensor_files.save_tensors(iter([("a", torch.ones(1))]), tmp_path)
    (tmp_path / "plain").touch()
    usual = (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "model.safetensors").stat().st_mode == usual


def test_saving_holds_one_shard_at_a_time(tmp_path):
    most = 0

    def tensors():
        nonlocal most
        for i in range(6):
            yield str(i), torch.zeros(1237)
            alive = {each.data_ptr() for each in gc.get_objects()
                     if type(each) is torch.Tensor and each.numel() == 1237}
            most = max(most, len(alive))

    tensor_files.save_tensors(tensors(), tmp_path, max_shard_bytes=1237 * 4)
    assert most <= 1


def test_only_one_rank_writes_and_the_others_still_gather(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "is_main", lambda: False)
    monkeypatch.setattr(weights, "is_main", lambda: False)
    gathered = []
    monkeypatch.setattr(
        weights, "full_tensor", lambda tensor: gathered.append(tensor) or tensor.detach())
    model = model_of("qwen3_tied")
    weights.save_weights(model, weights.read_config(MODELS / "qwen3_tied"), tmp_path / "m")
    assert len(gathered) == len(list(model.parameters())) and not (tmp_path / "m").exists()


def test_sharded_parameters_round_trip(tmp_path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = model_of("qwen2_untied")
        for module in list(model.modules()):
            for name, parameter in list(module._parameters.items()):
                sharded_parameter = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
                module._parameters[name] = nn.Parameter(sharded_parameter)
        weights.load_weights(model, MODELS / "qwen2_untied")
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        config = weights.read_config(MODELS / "qwen2_untied")
        weights.save_weights(model, config, tmp_path, torch.bfloat16)
    finally:
        dist.destroy_process_group()
    written = load_file(tmp_path / "model.safetensors")
    for key, tensor in golden("qwen2_untied").items():
        assert torch.equal(written[key], tensor), key


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    """safetensors itself writes two metadata entries in either order, by chance."""
    written = set()
    for i in range(12):
        tensor_files.save_tensors(iter([("ä", torch.ones(2)), ("b", torch.zeros(1))]), tmp_path / str(i),
                             {"bareloop": "manifest.json", "a\n\"": "\x7f\x01é"})
        written.add((tmp_path / str(i) / "model.safetensors").read_bytes())
    assert len(written) == 1
    assert set(load_file(tmp_path / "0/model.safetensors")) == {"ä", "b"}


def test_config_index_and_tokenizer_on_a_full_disk_are_clear_errors(tmp_path):
    config = weights.read_config(MODELS / "qwen3_tied")
    tensors = [("a", torch.ones(9)), ("b", torch.ones(9))]
    (tmp_path / "source").mkdir()
    (tmp_path / "source/tokenizer.json").write_text("{}")

    def save(folder):
        with writing(folder):  # as `commit` has it
            tensor_files.save_tensors(iter(tensors), folder, max_shard_bytes=1)
            write_config(config, folder, torch.float32)
            weights.copy_tokenizer(tmp_path / "source", folder)

    with Faults() as counted:
        save(tmp_path / "counted")
    for at, name in enumerate(counted.calls):
        if at == 0 or name != "mkdir":  # where the folder is there, mkdir may fail
            with Faults(at, disk_full), refused("cannot be written", "No space left"):
                save(tmp_path / f"at {at} ({name})")
    assert counted.calls.count("write") >= 3 and len(counted.calls) > 12


def test_a_full_disk_is_a_clear_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(tensor_files, "save_file", full)
    with refused(tmp_path, "cannot be written", "No space left"):
        tensor_files.save_tensors(iter([("a", torch.ones(1))]), tmp_path)


def test_tokenizer_files_are_copied_byte_for_byte(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    contents = {"tokenizer.json": b"{\r\n}", "chat_template.jinja": b"\xff", "merges.txt": b"a b"}
    for name, raw in {**contents, "config.json": b"{}", "secret.txt": b"x"}.items():
        (source / name).write_bytes(raw)
    weights.copy_tokenizer(source, target)
    assert {file.name: file.read_bytes() for file in target.iterdir()} == contents
    weights.copy_tokenizer(target, target)  # resumed into itself: nothing happens
    assert {file.name: file.read_bytes() for file in target.iterdir()} == contents

    (source / "vocab.json").symlink_to(__file__)
    with refused("vocab.json", "link out of its folder"):
        weights.copy_tokenizer(source, target)
