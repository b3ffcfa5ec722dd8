"""What several tests hold: refusals, resuming to the bit, equality with the goldens."""

import contextlib
import json
import shutil

import pytest
import torch
from torch.nn import functional as F

from common.errors import UserError


@contextlib.contextmanager
def refused(*parts):
    """A UserError of one line that has all of `parts` in it."""
    with pytest.raises(UserError) as caught:
        yield
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert str(part) in text, text


def training_lines(run):
    """What a run's `metrics.jsonl` says of each step, but for times and memory."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [[line[key] for key in ("step", "loss", "lr", "grad_norm", "tokens")] for line in lines
            if "grad_norm" in line]


def assert_resume_is_bitwise(train, arguments, folder):
    """4 steps equal 2 + 2: the same run twice, the second without its end, which it does again."""
    whole, parts = folder / "whole", folder / "parts"
    for run in (whole, parts):
        assert train.main([*arguments, "--out", str(run)]) == 0
    for name in ("step-000004", "final"):
        shutil.rmtree(parts / name)
    assert train.main(["--resume", str(parts)]) == 0
    for name in ("step-000004", "final"):
        files = list((whole / name).glob("*.safetensors"))
        assert files, name
        for file in files:
            assert file.read_bytes() == (parts / name / file.name).read_bytes(), file
    assert training_lines(whole) == training_lines(parts)


def random_documents(lengths, vocab_size=64, seed=1):
    """Documents of these lengths, each a tensor of token ids."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (n,), generator=generator) for n in lengths]


def assert_equals_golden(model, collate, golden):
    """Logits, loss and every gradient of a batch are what transformers has computed."""
    documents, targets = (golden[name].split(golden["lengths"].tolist())
                          for name in ("input_ids", "labels"))
    pack = collate(list(zip(documents, targets)))
    labels = pack.pop("labels")
    logits = model(**pack)
    assert (logits - golden["logits"]).abs().max() <= 1e-5
    loss = F.cross_entropy(logits, labels, reduction="sum") / (labels >= 0).sum()
    assert abs(loss - golden["loss"]) <= 1e-6
    loss.backward()
    for name, parameter in model.named_parameters():
        expected = golden[f"grad.{name}"]
        assert (parameter.grad - expected).norm() <= 1e-4 * expected.norm(), name
