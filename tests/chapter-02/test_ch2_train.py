"""Chapter 2's train.py as a user runs it: every method, its files, its resume, its refusals."""

import json

import pytest
import torch
from checks import assert_resume_is_bitwise, training_lines
from helpers import load, run_script
from safetensors.torch import load_file

from common.adapters import peft

train = load("chapter-02/train.py")
generate = load("chapter-02/generate.py")
merge = load("chapter-02/merge.py")
lora = load("chapter-02/lora.py")
UserError = train.UserError
pytestmark = pytest.mark.usefixtures("short_answers")

METHODS = sorted(set(lora.METHODS) - {"full"})


def arguments(data, *more):
    return ["--model", "tiny", "--data", str(data), "--device", "cpu", "--dtype", "float32",
            "--batch-tokens", "512", "--rank", "2", "--warmup", "0", "--steps", "4",
            "--save-every", "2", "--eval-every", "0", "--delta-start", "1", *more]


def logits(model, chat):
    ids = torch.tensor(chat.encode_prompt("Say one 1"))
    pack = train.packed_sequence_collate_fn([(ids, ids)])
    pack.pop("labels")
    with torch.no_grad():
        return model(**pack)


@pytest.mark.parametrize("method", METHODS)
def test_incidents_21_24_train_merge_generate(tmp_path, data, method, monkeypatch):
    """Train; the file holds a change and reloads to what was trained; merge; ask the result."""
    run, live = tmp_path / "run", []
    real, asked = train.save_adapter, train.prepare.Chat.load(train.hub.resolve("tiny"))
    monkeypatch.setattr(train, "save_adapter", lambda model, *given, **options: (
        live.append(logits(model, asked)), real(model, *given, **options)))
    assert train.main([*arguments(data, "--method", method, "--lr", "5e-3"), "--out", str(run)]) == 0
    losses = [line[1] for line in training_lines(run)]
    assert losses[-1] < losses[0]
    chat = train.prepare.Chat.load(run / "final")
    if method == "delta-lora":
        model, _ = generate.load_model(str(run / "final"), "cpu", torch.float32)
        changed = load_file(run / "final/model.safetensors")
        base = load_file(train.hub.resolve("tiny") / "model.safetensors")
        assert any(not torch.equal(changed[name], base[name].float()) for name in changed)
        return
    assert (run / "final/adapter_config.json").is_file()
    tensors = load_file(run / "final/adapter_model.safetensors")
    assert sum(t.abs().sum() for n, t in tensors.items() if "lora_B" in n or "lambda_b" in n) > 0
    base, _ = generate.load_model("tiny", "cpu", torch.float32)
    before = logits(base, chat)
    adapted, _ = generate.load_model("tiny", "cpu", torch.float32)
    peft.load_adapter(adapted, run / "final", train.lora)
    after = logits(adapted, chat)
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after, live[0], rtol=1e-5, atol=1e-4 if method == "pissa" else 1e-5)
    report = merge.merge(str(run / "final"), tmp_path / "merged", dtype="float32")
    assert report["delta"] > 0
    merged, _ = generate.load_model(str(tmp_path / "merged"), "cpu", torch.float32)
    assert (logits(merged, chat) - after).abs().max() <= 1e-4
    answers = [train.generate(model, [chat.encode_prompt("Say one 1")], 8, chat.stop_ids)
               for model in (adapted, merged)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("method", ["dora", "delta-lora", *(
    pytest.param(method, marks=pytest.mark.slow) for method in ("vera", "full"))])
def test_resume_is_bitwise(tmp_path, data, method):
    """With dropout where the method has it: 4 steps equal 2 + 2."""
    dropout = [] if method in ("delta-lora", "full") else ["--dropout", "0.2"]
    common = arguments(data, "--method", method, "--lr", "5e-3", *dropout)
    assert_resume_is_bitwise(train, common, tmp_path)


def test_a_checkpoint_of_an_adapter_run_holds_the_adapter_only(tmp_path, data):
    run = tmp_path / "run"
    train.main([*arguments(data, "--method", "lora"), "--out", str(run)])
    saved = load_file(run / "step-000004/model.safetensors")
    assert saved and all("lora_" in name for name in saved)
    moments = load_file(run / "step-000004/optimizer.safetensors")
    assert {name.rpartition(".")[0] for name in moments} == set(saved)


def test_lora_plus_keeps_its_ratio_through_the_schedule(tmp_path, data):
    """Two learning rates in the ratio λ at every step: the first update of B is λ times larger."""
    steps = {}
    for ratio in ("1", "16"):
        run = tmp_path / ratio
        train.main([*arguments(data, "--method", "lora+", "--lr-ratio", ratio, "--steps", "1",
                               "--weight-decay", "0", "--lr", "1e-4"), "--out", str(run)])
        steps[ratio] = load_file(run / "step-000001/model.safetensors")
    for name, tensor in steps["1"].items():
        if name.endswith("lora_B"):
            torch.testing.assert_close(steps["16"][name], 16 * tensor, rtol=1e-5, atol=0)


def test_refusals(tmp_path, data):
    for more, message in (
        (("--method", "lorra"), "lora"),
        (("--method", "delta-lora", "--dropout", "0.1"), "dropout"),
        (("--target-modules", "qq_proj"), "q_proj"),
        (("--method", "pissa", "--rank", "100000"), "rank"),
        (("--method", "vera", "--vera-d", "inf"), "--vera-d: inf"),
        (("--init", "random"), "not the random weights that it fits; say --method full"),
    ):
        with pytest.raises(UserError, match=message):
            train.main([*arguments(data, *more), "--out", str(tmp_path / "run")])
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("more", [("--data", "virtual"), ("--method", "full"), ("--dry-run",)])
def test_random_weights_are_for_what_saves_them_or_is_not_kept(tmp_path, data, more):
    assert train.main([*arguments(data, "--init", "random", *more, "--steps", "1"),
                       "--out", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize("name, rows", {
    "alpaca": [{"instruction": "Say", "input": f"it {i}", "output": "it"} for i in range(8)],
    "sharegpt": [{"conversations": [{"from": "human", "value": f"Say {i}"},
                                    {"from": "gpt", "value": "it"}]} for i in range(8)],
    "messages": [{"messages": [{"role": "user", "content": f"Say {i}"},
                               {"role": "assistant", "content": "it"}]} for i in range(8)],
    "text": [{"text": f"Some text, number {i}."} for i in range(8)],
}.items())
def test_data_formats(tmp_path, capsys, name, rows):
    """Each format trains, and only the answer (or all of a text) is marked as trained."""
    file = tmp_path / f"{name}.json"
    file.write_text(json.dumps(rows))
    train.main([*arguments(file, "--steps", "1"), "--out", str(tmp_path / "run")])
    printed = capsys.readouterr().out
    marked = "[Some text" if name == "text" else "[it<|im_end|>]"
    assert marked in printed


def test_dry_run_counts_the_adapter(tmp_path, data):
    process = run_script("chapter-02/train.py", *arguments(data, "--dry-run"), cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "adapters" in process.stdout and "%" in process.stdout
    assert list(tmp_path.iterdir()) == []


def test_evaluation_is_without_dropout(tmp_path, data):
    """The same weights score the same twice, whatever --dropout is."""
    scores = []
    for dropout in ("0", "0.5"):
        run = tmp_path / dropout
        train.main([*arguments(data, "--dropout", dropout, "--lr", "0", "--steps", "1",
                               "--eval-every", "1"), "--out", str(run)])
        lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
        scores += [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert len(scores) == 2 and scores[0] == scores[1]
