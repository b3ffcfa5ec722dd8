"""Chapter 3's train.py as a user runs it, on a base of four bits, and merging what it has learned."""

import json

import pytest
import torch
from checks import assert_resume_is_bitwise, training_lines
from helpers import load, run_script
from safetensors.torch import load_file

from common.adapters import peft

train = load("chapter-03/train.py")
merge = load("chapter-03/merge.py")
nf4 = load("chapter-03/nf4.py")
quantized_model = load("chapter-03/quantized_model.py")
UserError = train.UserError
pytestmark = pytest.mark.usefixtures("short_answers")


def arguments(data, *more):
    return ["--model", "tiny", "--data", str(data), "--device", "cpu", "--dtype", "float32",
            "--batch-tokens", "512", "--rank", "2", "--warmup", "0", "--steps", "4", "--lr", "5e-3",
            "--save-every", "2", "--eval-every", "0", *more]


@torch.no_grad()
def logits(model):
    ids = torch.arange(40) * 7 % 500
    pack = train.packed_sequence_collate_fn([(ids, ids), (ids[:9], ids[:9])])
    pack.pop("labels")
    return model(**pack)


def loaded(name, adapter=None, **how):
    model, _ = quantized_model.load_model(name, "cpu", torch.float32, adapter, **how)
    if adapter:
        peft.load_adapter(model, adapter, train.lora)
    return model


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """(run folder, the logits of the model as it was at the end of the training)."""
    folder = tmp_path_factory.mktemp("run") / "qlora"
    live = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "generate", lambda model, *others: live.append(logits(model)) or [])
        assert train.main([*arguments(data, "--double-quant"), "--out", str(folder)]) == 0
    return folder, live[-1]


def test_chapter_2_says_that_an_adapter_learned_beside_four_bits(run, capsys):
    load("chapter-02/generate.py").load_model("tiny", "cpu", torch.float32, run[0] / "final")
    assert "python chapter-03/generate.py" in capsys.readouterr().err


def test_qlora_trains_and_its_adapter_reloads_to_the_live_logits(run):
    folder, live = run
    losses = [line[1] for line in training_lines(folder)]
    assert losses[-1] < losses[0]
    assert (live - logits(loaded("tiny"))).abs().max() > 0.1
    model = loaded(None, folder / "final")
    assert type(model.model.layers[0].mlp.up_proj.base) is nf4.NF4Linear
    assert (logits(model) - live).abs().max() <= 1e-5
    # On the weights that it was not trained on, or on scales that were not: another model.
    for other in ("none", "nf4"):
        off = logits(loaded(None, folder / "final", base=other)) - live
        assert off.abs().max() > 1e-3


@pytest.mark.parametrize("method", ["lora", pytest.param("dora", marks=pytest.mark.slow)])
def test_resume_is_bitwise(tmp_path, data, method):
    """On an NF4 base, with dropout: 4 steps equal 2 + 2."""
    assert_resume_is_bitwise(train, arguments(
        data, "--double-quant", "--activation-checkpointing", "selective", "--method", method,
        "--dropout", "0.2"), tmp_path)


@pytest.mark.parametrize("more, message", [
    *((("--method", method), reason) for method, reason in quantized_model.DENSE_ONLY.items()),
    (("--quantize", "none", "--double-quant"), "--double-quant needs --quantize nf4"),
    (("--quantize", "nf5"), "nf4")])
def test_what_cannot_be_is_refused_with_the_reason(tmp_path, data, more, message):
    with pytest.raises(UserError) as error:
        train.main([*arguments(data, *more), "--out", str(tmp_path / "run")])
    assert message in str(error.value) and not (tmp_path / "run").exists()


def test_dry_run(tmp_path, data):
    done = run_script("chapter-03/train.py", *arguments(data, "--dry-run"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "adapters" in done.stdout and "predicted peak" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_missing_compiler_is_one_line(tmp_path, data):
    done = run_script("chapter-03/train.py", *arguments(data, "--compile", "--steps", "1"),
                      cwd=tmp_path, environment={"CXX": "/no/such/compiler"}, fresh=True)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and lines[-1].startswith("error: --compile: "), done.stderr
    assert "g++" in lines[-1]


# --- merging ---

def test_merged_into_its_own_base_it_is_the_model_that_was_trained(run, tmp_path):
    folder, live = run
    report = merge.merge(str(folder / "final"), tmp_path / "own", dtype="float32")
    own = logits(loaded(str(tmp_path / "own")))
    assert (own - live).abs().max() <= 1e-4
    again = merge.merge(str(folder / "final"), tmp_path / "original", dtype="float32", original=True)
    other = logits(loaded(str(tmp_path / "original")))
    assert (other - live).abs().max() > 100 * (own - live).abs().max()
    assert report["choices"] == pytest.approx(again["choices"])
    assert report["logit_difference"] == report["choices"]["base it was trained on"] <= 1e-4
    assert again["logit_difference"] == again["choices"]["original weights"] > 1e-2
    # The original is ΔW added to the weights themselves.
    weights = load_file(train.hub.resolve("tiny") / "model.safetensors")
    tensors = load_file(folder / "final/adapter_model.safetensors")
    merged = load_file(tmp_path / "original/model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    A, B = (tensors[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
    scale = json.loads((folder / "final/adapter_config.json").read_text())["lora_alpha"] / 2
    expected = weights[f"{name}.weight"].double() + scale * B @ A
    assert (merged[f"{name}.weight"] - expected).abs().max() <= 1e-6


def resized(folder, out, size):
    """The run's adapter with each layer's change made `size` times as large as the weight."""
    model, _ = quantized_model.load_model(None, "cpu", torch.float32, folder / "final")
    config = peft.load_adapter(model, folder / "final", train.lora)
    for _, module in train.lora.adapter_modules(model):
        module.lora_B.data *= size * module.base.weight.norm() / module.delta().norm()
    peft.save_adapter(model, config, out, "tiny", train.lora, {"trained_on": "nf4-double"})
    return out


def test_quantising_anew_loses_a_small_change_and_is_refused(run, tmp_path, capsys):
    folder, live = run
    adapter = resized(folder, tmp_path / "small", 0.01)
    arguments = ["--adapter", str(adapter), "--out", str(tmp_path / "out"), "--dtype", "nf4"]
    with pytest.raises(UserError, match=r"would survive quantising anew.*--requantize"):
        merge.main(arguments)
    assert not (tmp_path / "out").exists()
    merge.main([*arguments, "--requantize"])
    shown = capsys.readouterr().out
    share = float(shown.partition("% of ΔW survived")[0].split()[-1])
    assert -1 <= share <= 4
    model = loaded(str(tmp_path / "out"))
    assert type(model.model.layers[0].mlp.up_proj) is nf4.NF4Linear
    # Measured here once more, from the two folders.
    base = loaded("tiny", base="nf4-double")
    adapted = dict(train.lora.adapter_modules(loaded(None, adapter)))
    left = total = 0
    for name, module in adapted.items():
        delta = module.delta().double()
        change = model.get_submodule(name).weight.double() - base.get_submodule(name).weight
        left, total = left + (delta * change).sum(), total + (delta * delta).sum()
    assert share == pytest.approx(100 * (left / total).item(), abs=0.06)
    report = merge.merge(str(resized(folder, tmp_path / "large", 0.3)), tmp_path / "large-out",
                         dtype="nf4", requantize=True)
    assert report["left"] > 0.8


def test_a_folder_that_is_quantised_already_has_no_original(run, tmp_path):
    """Trained on bitsandbytes' layout, merged into it dequantised; the original has to be given."""
    folder, live = run
    model = loaded("tiny", base="nf4-double")
    source = train.hub.resolve("tiny")
    config = train.weights.read_config(source)
    load("chapter-03/bnb_files.py").save_bnb(model, config, tmp_path / "bnb")
    train.weights.copy_tokenizer(source, tmp_path / "bnb")
    adapter = str(folder / "final")
    with pytest.raises(UserError, match="does not hold the original weights"):
        merge.merge(adapter, tmp_path / "out", model=str(tmp_path / "bnb"), original=True)
    report = merge.merge(adapter, tmp_path / "out", model=str(tmp_path / "bnb"), dtype="float32")
    assert list(report["choices"]) == ["base it was trained on"]
    assert (logits(loaded(str(tmp_path / "out"))) - live).abs().max() <= 1e-4
    assert "quantization_config" not in train.weights.read_config(tmp_path / "out")
