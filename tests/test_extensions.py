"""The worked changes of README.md, "Extending": each applied to a copy and put to work.

    git apply tests/extensions/loss.diff        applies one for good

Those that add a family of models to chapter 3 are checked by test_families.py.
"""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from diffs import apply_diff
from helpers import GOLDENS, ROOT, load, run_script
from safetensors.torch import load_file

DIFFS = sorted((ROOT / "tests" / "extensions").glob("*.diff"))
SHORT = ["--device", "cpu", "--dtype", "float32", "--steps", "2", "--batch-tokens", "128",
         "--eval-every", "0"]


@pytest.fixture
def patched(tmp_path, monkeypatch):
    """patched("loss", "chapter-01"): a copy of those folders with that diff applied."""
    monkeypatch.setattr(sys, "path", list(sys.path))  # a chapter puts its root in front

    def make(name, *folders):
        ignore = shutil.ignore_patterns("__pycache__", "*.md", "*.svg")
        for folder in folders:
            shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)
        diff = ROOT / "tests" / "extensions" / f"{name}.diff"
        apply_diff(diff.read_text(encoding="utf-8"), tmp_path)
        return tmp_path

    return make


def random_pack(train, vocabulary=64):
    torch.manual_seed(0)
    documents = []
    for length in (7, 1, 5):
        ids = torch.randint(0, vocabulary, (length,))
        documents.append((ids, torch.where(torch.arange(length) < 2, -100, ids)))
    return train.packed_sequence_collate_fn(documents)


@pytest.mark.parametrize("diff", DIFFS, ids=lambda path: path.stem)
def test_a_diff_is_short_and_in_the_readme(diff):
    lines = diff.read_text(encoding="utf-8").splitlines()
    assert max(map(len, lines)) <= 101
    new_file, changed = 0, 0  # lines of a model file of its own; lines added and removed elsewhere
    for line, after in zip(lines, [*lines[1:], ""]):
        if line.startswith("--- "):
            made = line == "--- /dev/null" and "/modeling_" in after
        elif re.match(r"[-+](?!\+\+ b/)", line):
            new_file, changed = new_file + made, changed + (not made)
    family = (diff.parent / f"check_{diff.stem}.py").exists()
    assert new_file < 300 and changed < (80 if new_file else 120 if family else 40)
    row = next(line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
               if f"(tests/extensions/{diff.name})" in line)
    assert f"| {changed}{f', and a file of {new_file}' if new_file else ''} |" in row
    subprocess.run(["git", "apply", "--check", diff], cwd=ROOT, check=True)


def test_the_loss_is_dynamic_fine_tuning(patched, tmp_path):
    train = load(patched("loss", "chapter-01") / "chapter-01/train.py")
    config = train.weights.read_config(GOLDENS / "models/qwen3_tied")
    model = train.Qwen3ForCausalLM(train.Qwen3Config.from_dict(config)).double()
    model.compute_dtype = torch.float64
    pack = random_pack(train)
    logits = model(**{k: v for k, v in pack.items() if k != "labels"}).detach().float()
    logits.requires_grad_()
    fixed = type("Fixed", (), {"__call__": lambda self, **_: logits})()
    loss = train.dft_loss_sum(fixed, pack)
    loss.backward()
    expected, gradient = 0.0, torch.zeros_like(logits, dtype=torch.float64)
    for t, label in enumerate(pack["labels"].tolist()):
        if label >= 0:  # d(-log p)/d logits = softmax - 1 at the label, here times p
            chances = logits[t].detach().double().softmax(-1)
            expected -= float(chances[label] * chances[label].log())
            gradient[t] = chances[label] * chances
            gradient[t, label] -= chances[label]
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert torch.allclose(logits.grad.double(), gradient, atol=1e-6)
    assert train.main(["--model", "tiny", "--init", "random", "--data", "virtual", *SHORT,
                       "--out", str(tmp_path / "run")]) == 0


def test_the_optimizer_is_lion_and_resumes_bitwise(patched, tmp_path):
    root = patched("optimizer", "chapter-01")
    w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    lion = load(root / "chapter-01/lion.py").Lion([w], lr=0.1, betas=(0.9, 0.99), weight_decay=0.5)
    for gradient in ([1.0, -1.0], [-0.05, -1.0]):
        w.grad = torch.tensor(gradient)
        lion.step()
    # m = (0.01, -0.01) after the first step, so the second blends 0.9 m + 0.1 g = (0.004, -0.109).
    assert torch.allclose(w, torch.tensor([(0.95 - 0.1) * 0.95 - 0.1, (-1.9 + 0.1) * 0.95 + 0.1]))
    train, options = load(root / "chapter-01/train.py"), ["--model", "tiny", "--data", "virtual",
                                                          "--init", "random", *SHORT]
    options += ["--schedule", "constant", "--save-every", "1", "--lr", "1e-3"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert train.main([*options, "--out", str(one)]) == 0
    assert train.main([*options, "--steps", "1", "--out", str(two)]) == 0
    assert train.main(["--resume", str(two), "--steps", "2"]) == 0
    a, b = (load_file(run / "step-000002/model.safetensors") for run in (one, two))
    assert all(torch.equal(a[name], b[name]) for name in a)
    moments = load_file(one / "step-000002/optimizer.safetensors")
    assert {name.rpartition(".")[2] for name in moments} == {"exp_avg"}


def test_the_peft_method_is_lora_xs_and_saves_as_lora(patched, tmp_path, monkeypatch):
    root = patched("peft_method", "chapter-02", "common")
    lora, peft = load(root / "chapter-02/lora.py"), load(root / "common/adapters/peft.py")
    run = tmp_path / "run"
    train = load(root / "chapter-02/train.py")
    monkeypatch.setattr(train, "save_adapter", peft.save_adapter)  # not that of this process
    assert train.main(["--model", "tiny", "--init", "random", "--data", "virtual", "--method",
                       "lora-xs", "--rank", "4", *SHORT, "--out", str(run)]) == 0
    saved = json.loads((run / "final/adapter_config.json").read_text())
    assert saved["peft_type"] == "LORA" and saved["r"] == 4

    config = train.LlamaConfig.from_dict(train.weights.read_config(GOLDENS / "models/llama3_tied"))
    model, settings = train.LlamaForCausalLM(config), lora.AdapterConfig(method="lora-xs", rank=4)
    pack = random_pack(train)
    pack.pop("labels")
    before, state = model(**pack).detach(), {k: v.clone() for k, v in model.state_dict().items()}
    lora.apply_adapter(model, settings)
    assert torch.equal(model(**pack), before)  # R = 0
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 4 * 4 * 7 * config.num_hidden_layers
    for parameter in trained:
        torch.nn.init.normal_(parameter)
    name, module = next(lora.adapter_modules(model))
    U, S, Vt = torch.linalg.svd(state[name + ".weight"].double(), full_matrices=False)
    signs = torch.sign((module.lora_A.double() * Vt[:4]).sum(1))  # u and v may both be negated
    change = (U[:, :4] * S[:4] * signs) @ module.lora_R.double() @ (signs[:, None] * Vt[:4])
    change *= 32 / 4  # s = α/r
    assert torch.allclose(module.merged().double(), state[name + ".weight"].double() + change,
                          atol=1e-4)
    peft.save_adapter(model, settings, tmp_path / "adapter", "base", lora)
    plain = train.LlamaForCausalLM(config)
    plain.load_state_dict(state)
    peft.load_adapter(plain, tmp_path / "adapter", lora)
    assert torch.allclose(plain(**pack), model(**pack), atol=1e-4)


def test_the_data_format_is_markdown(patched, tmp_path):
    root = patched("data_format", "chapter-01", "common")
    text = "# Opening\n## How many?\none,\n\ntwo\n" + "".join(
        f"## q{n}\na{n}\n" for n in range(20))
    (tmp_path / "my.md").write_text(text, encoding="utf-8")
    rows = [{"prompt": "How many?", "completion": "one,\n\ntwo"}] + [
        {"prompt": f"q{n}", "completion": f"a{n}"} for n in range(20)]
    (tmp_path / "my.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")

    def train(name):
        return run_script(
            root / "chapter-01/train.py", "--model", "tiny", "--data", tmp_path / name, *SHORT,
            "--out", tmp_path / name[3:], cwd=tmp_path)

    shown = []
    for name in ("my.md", "my.jsonl"):
        done = train(name)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        shown.append([line for line in lines if re.match("data|held|  +[aq]", line)])
    assert shown[0] == shown[1] and len(shown[0]) > 4
    (tmp_path / "my.md").write_text("# Only a heading\n", encoding="utf-8")
    wrong = train("my.md")
    assert wrong.returncode == 2 and "my.md: empty, no example in it" in wrong.stderr


def test_the_model_family_is_smollm3(patched):
    root = patched("model_family", "chapter-02")
    model_file = load(root / "chapter-02/modeling_llama.py")
    weights = load(root / "chapter-02/train.py").weights
    folder = GOLDENS / "smollm3"
    config = model_file.LlamaConfig.from_dict(weights.read_config(folder))
    model = model_file.LlamaForCausalLM(config)
    weights.load_weights(model, folder)
    golden = load_file(folder / "answers.safetensors")
    lengths = golden["lengths"]
    logits = model(golden["input_ids"], torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
                   int(lengths.max()), torch.cat([torch.arange(n) for n in lengths.tolist()]))
    assert (logits - golden["logits"]).abs().max() < 1e-5 * golden["logits"].abs().max()
    with pytest.raises(ValueError, match="no_rope_layers"):
        model_file.LlamaConfig.from_dict(weights.read_config(folder) | {"no_rope_layers": None})
