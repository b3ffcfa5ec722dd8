"""Merging: the same logits in one folder, what the rounding costs, and nothing written over."""

import json
import shlex

import ch2_folders as folders
import pytest
import torch
from helpers import GOLDENS, load, run_script
from safetensors.torch import load_file

from common import weights
from common.adapters import merging, peft
from common.data.chat import Chat
from common.errors import UserError
from common.files.checkpoint import verify

script = load("chapter-02/merge.py")
generate = load("chapter-02/generate.py")
packing = load("chapter-02/packing.py")
METHODS = ("lora", "rslora", "dora", "vera", "lora+", "lora-fa", "pissa")
FAMILIES = {
    "lora": dict(tie_word_embeddings=False),
    "dora": dict(model_type="qwen2"),  # with biases, which DoRA must not scale
    "vera": dict(model_type="qwen3", head_dim=12),
}


def logits_of(folder, adapter=None, ids=None):
    model, _ = generate.load_model(str(folder), "cpu", torch.float32)
    if adapter:
        peft.load_adapter(model, adapter, folders.lora)
    documents = [torch.arange(30) * 7 % 250, torch.arange(7)]
    if ids is not None:
        documents = [torch.tensor(ids)]
    pack = packing.packed_sequence_collate_fn([(each, each) for each in documents])
    pack.pop("labels")
    with torch.no_grad():
        return model(**pack)


@pytest.mark.parametrize("method", METHODS)
def test_merged_equals_adapter(tmp_path, method):
    base = folders.write_model(tmp_path / "base", **FAMILIES.get(method, {}))
    targets = "all-linear" if method != "lora" else "lm_head,q_proj,down_proj"
    adapter = folders.write_adapter(tmp_path / "adapter", base, method, 0.03, targets)
    report = script.merge(str(adapter), tmp_path / "merged")
    before, after = logits_of(base, adapter), logits_of(tmp_path / "merged")
    assert (after - before).abs().max() <= 1e-5
    assert (logits_of(base) - before).abs().max() > 0.05  # the adapter does something
    assert report["dtype"] == "float32" and report["total"] == 0 and report["delta"] > 0
    assert report["logit_difference"] <= 1e-5
    assert len(report["layers"]) == (5 if method == "lora" else 14)


@pytest.mark.parametrize("name", ["lora", "rslora", "dora", "dora-bias", "regex", "vera",
                                  "vera-seed", "pissa", "pissa-raw"])
def test_adapters_made_by_peft_merge_to_pefts_logits(name):
    about = json.loads((GOLDENS / "peft" / "about.json").read_text())
    base = str(GOLDENS / "peft" / about["cases"][name])
    model, _ = generate.load_model(base, "cpu", torch.float32)
    peft.load_adapter(model, GOLDENS / "peft" / name, folders.lora)
    merging.merge_into(model, torch.float32, folders.lora)
    assert not list(folders.lora.adapter_modules(model))
    documents = [torch.tensor(ids) for ids in about["documents"]]
    pack = packing.packed_sequence_collate_fn([(ids, ids) for ids in documents])
    pack.pop("labels")
    with torch.no_grad():
        logits = model(**pack)
    golden = load_file(GOLDENS / "peft" / "logits.safetensors")[name]
    assert (logits - golden).abs().max() <= 1e-5


@pytest.mark.parametrize("rounding", ["bfloat16", "float16"])
def test_the_sum_is_rounded_once_and_the_loss_is_reported(tmp_path, rounding):
    """Oracle: the merged weight in float64, from the two files alone."""
    base = folders.write_model(tmp_path / "base", torch.bfloat16)
    adapter = folders.write_adapter(tmp_path / "adapter", base, scale=0.02)
    report = script.merge(str(adapter), tmp_path / "merged", dtype=rounding)
    dtype = getattr(torch, rounding)
    old, delta, new = (load_file(file) for file in (
        base / "model.safetensors", adapter / "adapter_model.safetensors",
        tmp_path / "merged" / "model.safetensors"))
    deltas = errors = 0
    for name, weight in old.items():
        assert new[name].dtype == dtype
        prefix = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if prefix + "A.weight" not in delta:
            assert torch.equal(new[name], weight.to(dtype))
            continue
        change = 2 * delta[prefix + "B.weight"].double() @ delta[prefix + "A.weight"].double()
        wanted = weight.double() + change
        # At most one unit in the last place off, where float32 and float64 round apart.
        assert torch.equal(new[name], wanted.float().to(dtype)) or (
            (new[name].double() - wanted).abs()
            <= 1.01 * (wanted.to(dtype).double() - wanted).abs() + 1e-6).all()
        error, change = (new[name].double() - wanted).norm(), change.norm()
        assert report["layers"][name.removesuffix(".weight")] == pytest.approx(
            (error / change).item(), rel=1e-3)
        deltas, errors = deltas + change.square(), errors + error.square()
    assert report["total"] == pytest.approx((errors / deltas).sqrt().item(), rel=1e-3)
    assert report["delta"] == pytest.approx(deltas.sqrt().item(), rel=1e-3)
    assert (0.02 if rounding == "bfloat16" else 0.002) < report["total"] < 1
    ids = Chat.load(base).encode_prompt(merging.SAMPLE)
    before, after = logits_of(base, adapter, ids), logits_of(tmp_path / "merged", None, ids)
    difference = (after - before).abs().max().item()
    assert report["logit_difference"] == pytest.approx(difference, rel=1e-2)
    assert report["largest_logit"] == pytest.approx(before.abs().max().item(), rel=1e-4)
    assert report["tokens"] == len(ids)
    assert report["tokens_changed"] == (before.argmax(-1) != after.argmax(-1)).sum()


def test_auto_keeps_the_dtype_of_the_base_and_more_digits_keep_more(tmp_path):
    base = folders.write_model(tmp_path / "base", torch.bfloat16)
    adapter = folders.write_adapter(tmp_path / "adapter", base, scale=0.02)
    totals = [script.merge(str(adapter), tmp_path / name, dtype=name)["total"]
              for name in ("auto", "float16", "float32")]
    assert totals[0] > 4 * totals[1] and totals[2] == 0
    config = json.loads((tmp_path / "auto" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"


def test_the_folder_stands_alone(tmp_path):
    base = folders.write_model(tmp_path / "base")
    adapter = folders.write_adapter(tmp_path / "adapter", base, tokenizer=False)
    script.merge(str(adapter), tmp_path / "new" / "merged")
    merged = tmp_path / "new" / "merged"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (merged / name).read_bytes() == (base / name).read_bytes()
    stops = json.loads((merged / "generation_config.json").read_text())["eos_token_id"]
    assert stops == [folders.END_OF_TEXT, folders.IM_END]  # the second is the template's
    manifest = verify(merged)
    assert "model.safetensors" in manifest["files"] and "merged_from" in manifest["extra"]
    names = [set(load_file(folder / "model.safetensors")) for folder in (merged, base)]
    assert names[0] == names[1]
    assert weights.read_config(merged) == {
        **weights.read_config(base), **{k: "float32" for k in ("dtype", "torch_dtype")}}
    # The adapter's own tokenizer files win, where it has them.
    weights.copy_tokenizer(base, adapter)
    (adapter / "chat_template.jinja").write_text("{{ messages[0].content }}")
    script.merge(str(adapter), tmp_path / "other")
    assert (tmp_path / "other" / "chat_template.jinja").read_text().startswith("{{ messages")


def test_an_untrained_adapter_is_noticed(tmp_path, capsys):
    base = folders.write_model(tmp_path / "base", torch.bfloat16)
    adapter = folders.write_adapter(tmp_path / "adapter", base, scale=0.0)
    report = script.merge(str(adapter), tmp_path / "merged")
    merging.show(report, tmp_path / "merged")
    assert report["delta"] == 0 and "lora_B is zero: this adapter was never" in capsys.readouterr().err
    for name, tensor in load_file(base / "model.safetensors").items():
        assert torch.equal(load_file(tmp_path / "merged" / "model.safetensors")[name], tensor)


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_nothing_is_written_over(tmp_path, kind):
    base = folders.write_model(tmp_path / "base")
    adapter = folders.write_adapter(tmp_path / "adapter", base)
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
    elif kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="is there already"):
        script.merge(str(adapter), out)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_wrong_is_said_and_leaves_nothing(tmp_path):
    base = folders.write_model(tmp_path / "base")
    adapter = folders.write_adapter(tmp_path / "adapter", base)
    with pytest.raises(UserError, match="adapter_config.json"):
        script.merge(str(base), tmp_path / "out")
    with pytest.raises(UserError):
        script.merge(str(adapter), tmp_path / "out", model=str(adapter))
    config = json.loads((adapter / "adapter_config.json").read_text())
    del config["base_model_name_or_path"]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="--model"):
        script.merge(str(adapter), tmp_path / "out")
    other = folders.write_model(tmp_path / "other", vocab_size=80)
    with pytest.raises(UserError, match="vocabulary ends at 79"):
        script.merge(str(adapter), tmp_path / "out", model=str(other))
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "other"}
    script.merge(str(adapter), tmp_path / "out", model=str(base))


def test_as_a_script_then_generate(tmp_path):
    base = folders.write_model(tmp_path / "base", torch.bfloat16)
    folders.write_adapter(tmp_path / "adapter", base)
    command = "chapter-02/merge.py", "--adapter", "adapter", "--out", "merged"
    done = run_script(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for words in ("rounding to bfloat16", "layer 0", "layer 1", "all layers",
                  "largest logit difference", "wrote merged: a Hugging Face model folder"):
        assert words in done.stdout
    python, *asked = shlex.split(done.stdout.partition("ask it:\n")[2])  # as printed
    asked = run_script(*asked, "--device", "cpu", "--max-new-tokens", "3", cwd=tmp_path)
    assert python == "python" and asked.returncode == 0, asked.stderr
    done = run_script(*command, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: merged is there already")
