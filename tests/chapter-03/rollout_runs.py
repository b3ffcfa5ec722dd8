"""Whole runs of train_grpo.py and train_distill.py: small models for them, and what they left."""

import json
import shutil
from types import SimpleNamespace

import pytest
import small_runs
import torch
from helpers import load
from safetensors.torch import load_file

from common.weights import save_weights

llama = load("chapter-03/modeling_llama.py")
DENSE = ("--quantize", "none")
# Tokens that end an answer: a model that has learned nothing then ends two of three within six.
STOPS = range(0, 512, 3)


def write_model(folder, seed=0, stops=STOPS, **changes):
    """A model with random weights in `folder`, which has its other files; gives its config."""
    config = {**small_runs.CONFIG, **changes}
    torch.manual_seed(seed)
    model = llama.LlamaForCausalLM(llama.LlamaConfig.from_dict(config))
    save_weights(model, config, folder, torch.float32)
    (folder / "config.json").write_text(json.dumps(config))
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": [*stops]}))
    return config


def inputs(folder, **changes):
    """The options of a run of 4 steps on a model with weights in `folder`."""
    options = small_runs.write_inputs(folder, 4)
    write_model(folder / "model", **changes)
    return [*options, "--warmup", "0", "--batch-tokens", "300", "--rank",
            "2", "--log-every", "1", "--max-new-tokens", "6", "--schedule", "constant"]


def value_of(options, flag):
    """What stands last behind a flag."""
    return options[len(options) - options[::-1].index(flag)]


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(train, options, folder, *more, name="run"):
    """A run in this process; gives its folder."""
    assert train.main([*options, *map(str, more), "--out", str(folder / name)]) == 0
    return folder / name


def lines(folder, kind="grad_norm", file="metrics.jsonl"):
    """The lines of a run's file that have the key `kind`."""
    found = map(json.loads, (folder / file).read_text().splitlines())
    return [line for line in found if kind in line]


def samples(folder):
    return lines(folder, "answers", "samples.jsonl")


def weights_of(folder, step=None):
    """{name: tensor} of `final/`, or of the checkpoint after a step."""
    folder = folder / ("final" if step is None else f"step-{step:06d}")
    (file,) = (file for file in folder.glob("*model.safetensors"))
    return load_file(file)


def bytes_of(folder, step):
    """Weights and moments after a step, as they lie in the files."""
    return [(folder / f"step-{step:06d}" / f"{stem}.safetensors").read_bytes()
            for stem in ("model", "optimizer")]


def state_of(folder, step):
    return json.loads((folder / f"step-{step:06d}" / "state.json").read_text())


def same_weights(one, other):
    """Whether two finished runs wrote the same tensors, bit for bit."""
    first, second = weights_of(one), weights_of(other)
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def assert_close(one, other, but=()):
    """Two finished runs have done the same, but for rounding and the numbers `but`."""
    for kind in ("grad_norm", "eval_loss"):
        for a, b in zip(lines(one, kind), lines(other, kind), strict=True):
            assert a.keys() == b.keys()
            for name in a.keys() - {*small_runs.TIMES, *but}:
                expected = None if b[name] is None else pytest.approx(b[name], rel=2e-5, abs=2e-6)
                assert a[name] == expected, (a["step"], name)
    first, second = weights_of(one), weights_of(other)
    assert first.keys() == second.keys()
    for name in first:
        gap = (first[name].float() - second[name].float()).norm()
        assert gap <= 1e-4 * first[name].float().norm() + 1e-7, name


def assert_parts_are_the_whole(folder, *files):
    """After `assert_resume_is_bitwise`: what both runs logged is the same, but for times."""
    whole, parts = (small_runs.metrics(folder / name) for name in ("whole", "parts"))
    assert whole == parts and whole
    for file in files:
        one, other = ((folder / name / file).read_bytes() for name in ("whole", "parts"))
        assert one == other and one, file
    states = [state_of(folder / name, 4) for name in ("whole", "parts")]
    assert states[0] == states[1]


def pretend_gpu(monkeypatch, gigabytes=80):
    """Until the test ends PyTorch says that it has a GPU, of which it knows the memory."""
    card = SimpleNamespace(total_memory=int(gigabytes * 1e9))
    for name, answer in {"is_available": True, "get_device_properties": card,
                         "get_device_name": "NVIDIA H100 80GB HBM3", "device_count": 1,
                         "is_bf16_supported": True}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)


def without(options, flag):
    """The options without a flag, wherever it stands, and what stands behind it."""
    while flag in options:
        at = options.index(flag)
        options = options[:at] + options[at + 2:]
    return options


def copied_model(options, folder, **changes):
    """A copy of the run's model in `folder`, with other weights; gives the folder."""
    shutil.copytree(value_of(options, "--model"), folder)
    write_model(folder, **changes)
    return folder
