"""bitsandbytes folders, both ways, against folders that transformers wrote (tests/goldens/bnb)."""

import json
import shutil

import pytest
import torch
from helpers import GOLDENS, load
from safetensors.torch import load_file, save_file

from common.errors import UserError, located
from common.weights import iter_tensors, read_config

bnb_files = load("chapter-03/bnb_files.py")
nf4 = load("chapter-03/nf4.py")
load_base = load("chapter-03/quantized_model.py").load_base
modeling = load("chapter-01/modeling_qwen3.py")

GOLDEN = GOLDENS / "bnb"
# How transformers was asked to load the dense folder before it quantised and saved it.
KINDS = {"single": torch.bfloat16, "double": torch.float32}
UP = "model.layers.0.mlp.up_proj.weight"


def on_meta(folder=GOLDEN / "dense"):
    config = {**read_config(folder), "quantization_config": None}
    with torch.device("meta"):
        return modeling.Qwen3ForCausalLM(modeling.Qwen3Config.from_dict(config))


def load_bnb(model, folder):
    with located(folder):
        load_base(model, bnb_files.iter_bnb(folder), quantize=False)


def logits(model):
    ids = load_file(GOLDEN / "logits.safetensors")["input_ids"]
    n = len(ids)
    with torch.no_grad():
        return model(ids, torch.tensor([0, n], dtype=torch.int32), n, torch.arange(n))


def same_tensors(folder, other):
    found, expected = (load_file(f / "model.safetensors") for f in (folder, other))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("kind", KINDS)
def test_reads_what_transformers_wrote(kind):
    assert bnb_files.is_bnb(read_config(GOLDEN / kind))
    model = on_meta()
    load_bnb(model, GOLDEN / kind)
    assert type(model.model.layers[0].mlp.up_proj) is nf4.NF4Linear
    expected = load_file(GOLDEN / "logits.safetensors")[kind]
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6 * expected.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_writes_what_transformers_wrote(kind, tmp_path):
    """From the dense checkpoint: tensor for tensor, the JSON of each weight byte for byte."""
    model = on_meta()
    load_base(model, iter_tensors(GOLDEN / "dense"), kind == "double", KINDS[kind])
    bnb_files.save_bnb(model, read_config(GOLDEN / "dense"), tmp_path)
    same_tensors(tmp_path, GOLDEN / kind)
    found, expected = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path, GOLDEN / kind))
    assert found["torch_dtype"] == found["dtype"] == expected["dtype"]
    ours, theirs = found["quantization_config"], expected["quantization_config"]
    assert ours.pop("llm_int8_skip_modules") == ["lm_head"]  # theirs: null, which means the same
    assert ours == {name: theirs[name] for name in ours}


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind, tmp_path):
    model = on_meta()
    load_bnb(model, GOLDEN / kind)
    bnb_files.save_bnb(model, read_config(GOLDEN / kind), tmp_path)
    same_tensors(tmp_path, GOLDEN / kind)


def test_dense_layers_and_biases_stay(tmp_path):
    """Folders may leave some layers in 16 bits: they are neither quantised here nor lost."""
    model = on_meta()
    load_bnb(model, GOLDEN / "double")
    mlp = model.model.layers[0].mlp
    mlp.down_proj = torch.nn.Linear(64, 64)
    mlp.up_proj.bias = torch.nn.Parameter(torch.randn(64))
    config = read_config(GOLDEN / "double")
    bnb_files.save_bnb(model, config, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert written["llm_int8_skip_modules"] == ["lm_head", "model.layers.0.mlp.down_proj"]

    again = on_meta()
    for name in ("down_proj", "up_proj"):
        again.model.layers[0].mlp.set_submodule(name, torch.nn.Linear(64, 64, device="meta"))
    load_bnb(again, tmp_path)
    assert type(again.model.layers[0].mlp.down_proj) is torch.nn.Linear
    assert type(again.model.layers[0].mlp.up_proj) is nf4.NF4Linear
    x = torch.randn(3, 64)
    assert torch.equal(again.model.layers[0].mlp(x), mlp(x))


def test_parts_may_be_spread_over_shards(tmp_path):
    tensors = load_file(GOLDEN / "double" / "model.safetensors")
    names = sorted(tensors, key=lambda name: name[::-1])
    shards = {f"model-0000{i + 1}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    shutil.copy(GOLDEN / "double" / "config.json", tmp_path)
    model = on_meta()
    load_bnb(model, tmp_path)
    torch.testing.assert_close(
        logits(model), load_file(GOLDEN / "logits.safetensors")["double"], rtol=0, atol=1e-5)


def test_nothing_to_save():
    with pytest.raises(ValueError, match="no NF4Linear"):
        bnb_files.save_bnb(torch.nn.Linear(2, 2), {}, "nowhere")


@pytest.mark.parametrize("change, message", [
    ({"load_in_8bit": True, "load_in_4bit": False}, "load_in_8bit=True"),
    ({"bnb_4bit_quant_type": "fp4"}, "quant_type='fp4'"),
    ({"bnb_4bit_quant_storage": "bfloat16"}, "quant_storage='bfloat16'"),
    ({"quant_method": "gptq"}, "gptq"),
])
def test_other_quantisations_are_refused_by_name(change, message):
    config = read_config(GOLDEN / "single")
    assert not bnb_files.is_bnb(read_config(GOLDEN / "dense"))
    with pytest.raises(UserError, match=message):
        bnb_files.is_bnb({"quantization_config": {**config["quantization_config"], **change}})
    with pytest.raises(UserError, match="unknown"):
        bnb_files.is_bnb({"quantization_config": []})


def state(**change):
    """A change of the quant_state of one weight."""
    def edit(tensors):
        name = f"{UP}.quant_state.bitsandbytes__nf4"
        text = {**json.loads(bytes(tensors[name].tolist())), **change}
        tensors[name] = torch.tensor(list(json.dumps(text).encode()), dtype=torch.uint8)
    return edit


def replace(part, tensor):
    def edit(tensors):
        tensors[f"{UP}.{part}" if part else UP] = tensor
    return edit


@pytest.mark.parametrize("edit, message", [
    (lambda tensors: tensors.pop(f"{UP}.absmax"), f"{UP} is not a whole NF4 weight"),
    (lambda tensors: tensors.pop(UP), f"{UP} is not a whole NF4 weight"),
    (replace("", torch.zeros(2047, 1, dtype=torch.uint8)), f"{UP}: packed should be"),
    (replace("absmax", torch.zeros(64)), f"{UP}: absmax should be"),
    (replace("nested_absmax", torch.tensor([float("nan")])), "nested_absmax has a value"),
    (replace("quant_map", torch.linspace(-1, 1, 16)), "quant_map is not bitsandbytes' table"),
    (replace("quant_state.bitsandbytes__fp4", torch.zeros(3).byte()), "fp4 is not a part"),
    (replace("SCB", torch.zeros(3)), "SCB is not a part of an NF4 weight"),
    (replace("quant_state.bitsandbytes__nf4", torch.zeros(3).byte()), "JSONDecodeError"),
    (state(blocksize=128), "blocks of 128"),
    (state(dtype="int8"), "quant_state cannot be read here: .*int8"),
    (state(shape="wide"), "quant_state cannot be read here"),
    (state(nested_offset="much"), "quant_state cannot be read here"),
    (state(nested_offset=float("nan")), "nested_offset is not finite"),
    (state(shape=[32, 128]), "has shape"),
])
def test_damaged_folders_are_refused(edit, message, tmp_path):
    tensors = load_file(GOLDEN / "double" / "model.safetensors")
    edit(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(GOLDEN / "double" / "config.json", tmp_path)
    with pytest.raises(UserError, match=message):
        load_bnb(on_meta(), tmp_path)
