"""A seeded part of `tests/long/flip.py`: damage to what we wrote is noticed by all that load it."""

import hashlib
import random
import sys
import time

import pytest
import torch
from faults import damaged
from helpers import ROOT, load

sys.path.append(str(ROOT / "tests" / "long"))
import flip

from common import hub, weights
from common.adapters import peft
from common.files import checkpoint
from common.files.checkpoint import CheckpointError, verify


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield flip.Folders(tmp_path_factory.mktemp("folders"))


def test_every_damage_is_noticed_by_all_that_load_and_resume_falls_back(folders):
    found = flip.trials(folders, 120, seed=3, resumed=10)
    assert {name.partition("/")[0] for name in found} == {
        "checkpoint", "model", "adapter", "merged"}


def test_the_name_of_the_base_is_checked_before_it_is_followed(folders):
    """A flipped bit in adapter_config.json must not send anybody to another model."""
    config = folders.adapter / "adapter_config.json"
    text = config.read_text()
    config.write_text(text.replace("undisturbed", "undisturbee"))
    try:
        for script in ("chapter-02/generate.py", "chapter-02/merge.py"):
            arguments = ["--adapter", str(folders.adapter), "--prompt", "x"]
            if "merge" in script:
                arguments[2:] = ["--out", str(folders.adapter.parent / "out")]
            with pytest.raises(CheckpointError, match="adapter_config.json: its content"):
                load(script).main(arguments)
    finally:
        config.write_text(text)
    verify(folders.adapter)


def test_the_functions_notice_without_the_scripts(folders):
    """`load_weights`, the shortest program, verifies; only once what nobody has touched since."""
    llama = load("chapter-02/modeling_llama.py")
    config = llama.LlamaConfig.from_dict(weights.read_config(folders.model))
    model, rng = llama.LlamaForCausalLM(config), random.Random(4)
    before = [parameter.clone() for parameter in model.parameters()]
    for _ in range(30):
        with damaged(folders.model, rng) as what, pytest.raises(CheckpointError):
            weights.load_weights(model, folders.model)
            pytest.fail(what)
        assert all(map(torch.equal, before, model.parameters())), what
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda real=time.time: real() + 5)
        verify(folders.model)
        real = hashlib.sha256  # of a manifest's own text, not of a file
        patch.setattr(hashlib, "sha256", lambda *text: real(*text) if text else pytest.fail())
        weights.load_weights(model, folders.model)
    assert not all(map(torch.equal, before, model.parameters()))


def test_the_test_notices_a_loader_that_does_not_look(folders, monkeypatch):
    """If `verify` believed every folder, the trials above would fail."""
    for module in (checkpoint, hub, weights, peft):
        monkeypatch.setattr(module, "verify", lambda folder: {"files": {}})
    with pytest.raises(AssertionError):
        flip.trials(folders, 40, seed=5)
