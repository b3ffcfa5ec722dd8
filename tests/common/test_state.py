"""Training state out and in: bitwise resume, by name, strict, and over other numbers of ranks."""

import types

import pytest
import torch
from faults import Faults, disk_full
from helpers import ranks_of, start_script
from safetensors.torch import load_file, save_file
from torch import nn

from common import runs
from common.errors import UserError
from common.files import checkpoint, state
from common.files.checkpoint import CheckpointError, commit, verify
from common.files.state import load_state, save_state
from common.metrics import Metrics
from common.options import TrainOptions


def network(seed=0, width=6):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(4, width), nn.Dropout(0.3), nn.Tanh(), nn.Linear(width, width, bias=False),
        nn.Linear(width, 3))


def adamw(model, fused=False, lr=1e-2):
    return torch.optim.AdamW(model.parameters(), lr=lr, fused=fused)


def train(model, optimizer, first, last):
    """Steps first..last-1, whose data depends on the step alone; gives the losses."""
    losses = []
    for step in range(first, last):
        data = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        loss = model(data).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def moments(model, optimizer):
    return {(name, entry): value.clone() for name, parameter in model.named_parameters()
            for entry, value in optimizer.state.get(parameter, {}).items()}


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key].dtype == value.dtype and torch.equal(got[key], value), key


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("steps", range(5))
def test_rows_12_13_15_resume_is_bitwise_at_every_step(tmp_path, steps, fused):
    """Losses (with dropout), weights and moments after a resume equal those of a run left alone."""
    model = network()
    optimizer = adamw(model, fused)
    losses = train(model, optimizer, 0, 6)

    stopped = network()
    before = adamw(stopped, fused)
    train(stopped, before, 0, steps)
    folder = checkpoint.step_folder(tmp_path, steps)
    commit(folder, lambda tmp: save_state(tmp, stopped, before, {"step": steps}))

    resumed = network(seed=99)
    after = adamw(resumed, fused)
    train(resumed, after, 50, 52)  # what was there must go
    assert load_state(checkpoint.latest(tmp_path), resumed, after) == {"step": steps}
    assert_equal(moments(resumed, after), moments(stopped, before))
    assert train(resumed, after, steps, 6) == losses[steps:]
    assert_equal(resumed.state_dict(), model.state_dict())
    assert_equal(moments(resumed, after), moments(model, optimizer))


def test_row_15_moments_go_by_name_not_by_place(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    optimizer = adamw(model)
    (model["a"](torch.ones(2)) * 2 + model["b"](torch.ones(2)) * 7).sum().backward()
    optimizer.step()
    save_state(tmp_path, model, optimizer, {})
    other = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    reversed_ = torch.optim.AdamW(list(other.parameters())[::-1])
    load_state(tmp_path, other, reversed_)
    assert_equal(moments(other, reversed_), moments(model, optimizer))


def test_parameters_that_were_never_stepped_stay_so(tmp_path):
    model = network()
    model[0].requires_grad_(False)
    optimizer = adamw(model)
    train(model, optimizer, 0, 2)
    save_state(tmp_path, model, optimizer, {})
    resumed = network(1)
    after = adamw(resumed)
    load_state(tmp_path, resumed, after)
    assert_equal(moments(resumed, after), moments(model, optimizer))
    assert resumed[0].weight not in after.state


def test_only_the_named_parameters_are_saved_and_touched(tmp_path):
    model, names = network(), ["4.weight", "4.bias"]
    optimizer = torch.optim.AdamW(model[4].parameters())
    model(torch.ones(4)).sum().backward()
    optimizer.step()
    save_state(tmp_path, model, optimizer, {}, names)
    assert set(load_file(tmp_path / "model.safetensors")) == set(names)
    resumed = network(5)
    kept = resumed[0].weight.clone()
    load_state(tmp_path, resumed, torch.optim.AdamW(resumed[4].parameters()), names)
    assert torch.equal(resumed[4].weight, model[4].weight)
    assert torch.equal(resumed[0].weight, kept)
    with pytest.raises(CheckpointError, match="missing 0.bias, 0.weight, 3.weight"):
        load_state(tmp_path, resumed, adamw(resumed))


def test_row_20_what_does_not_fit_is_named_before_anything_changes(tmp_path):
    model = network()
    optimizer = adamw(model)
    train(model, optimizer, 0, 1)
    save_state(tmp_path, model, optimizer, {})

    def refused(changed, match):
        before = {name: value.clone() for name, value in changed.state_dict().items()}
        with pytest.raises(CheckpointError, match=match):
            load_state(tmp_path, changed, adamw(changed))
        assert_equal(changed.state_dict(), before)

    refused(network(1, width=7), r"0.bias has shape \(6,\), not \(7,\)")
    refused(nn.Sequential(*network(1), nn.Linear(3, 3)), "missing 5.bias, 5.weight")
    refused(network(1)[:4], "unexpected 4.bias, 4.weight")
    refused(network(1).bfloat16(), "0.bias is F32, not BF16")
    whole = load_file(tmp_path / "optimizer.safetensors")
    del whole["3.weight.exp_avg_sq"]
    save_file(whole, tmp_path / "optimizer.safetensors")
    refused(network(1), "missing 3.weight.exp_avg_sq")
    save_file({}, tmp_path / "optimizer.safetensors")
    refused(network(1), "missing .*exp_avg")


def test_row_20_compiled_modules_keep_their_names(tmp_path):
    model = network()
    optimizer = adamw(model)
    train(model, optimizer, 0, 1)
    wrapped = nn.Sequential(*model)
    wrapped[0] = torch.compile(model[0])
    assert any("_orig_mod" in name for name, _ in wrapped.named_parameters())
    save_state(tmp_path, wrapped, optimizer, {})
    resumed = network(1)
    load_state(tmp_path, resumed, adamw(resumed))
    assert_equal(resumed.state_dict(), model.state_dict())


def test_large_states_are_sharded_and_not_finite_values_survive(tmp_path, monkeypatch):
    real = state.save_tensors
    monkeypatch.setattr(state, "save_tensors", lambda *arguments, **options: real(
        *arguments, **options, max_shard_bytes=200))
    model = network()
    optimizer = adamw(model)
    train(model, optimizer, 0, 1)
    optimizer.state[model[0].bias]["exp_avg"][0] = float("nan")
    commit(tmp_path / "step-000001",
                      lambda tmp: save_state(tmp, model, optimizer, {}))
    assert (tmp_path / "step-000001" / "optimizer.safetensors.index.json").exists()
    resumed = network(1)
    load_state(checkpoint.latest(tmp_path), resumed, adamw(resumed))
    assert_equal(resumed.state_dict(), model.state_dict())


def test_state_must_be_json_and_comes_back_exactly(tmp_path):
    model = network()
    values = {"step": 3, "best": 0.1 + 0.2, "lr": 1e-300, "names": ["é", None], "of": {"a": True}}
    save_state(tmp_path, model, adamw(model), values)
    assert load_state(tmp_path, model, adamw(model)) == values
    for bad in ({"best": float("inf")}, {1: 2}, {"tensor": torch.ones(1)}):
        with pytest.raises((ValueError, TypeError)):
            save_state(tmp_path, model, adamw(model), bad)


def test_the_space_that_a_step_asks_for_is_about_what_it_writes(tmp_path, monkeypatch):
    model, asked = nn.Linear(1000, 1000), []
    optimizer = adamw(model)
    model(torch.ones(1000)).sum().backward()
    optimizer.step()
    monkeypatch.setattr(runs, "commit", lambda folder, write, extra, needed: (
        asked.append(needed), commit(folder, write, extra, needed)))
    folder = runs.save_step(tmp_path, model, optimizer, {"step": 1, "best_step": None},
                            TrainOptions(), Metrics(tmp_path, total_steps=1))
    written = sum(path.stat().st_size for path in folder.iterdir())
    assert written - 2**20 <= asked[0] <= 1.1 * written


def test_states_of_another_device_are_said(tmp_path, capfd):
    model = network()
    save_state(tmp_path, model, adamw(model), {})
    rng = load_file(tmp_path / "rng.safetensors")
    save_file({**rng, "cuda": torch.zeros(1, 16, dtype=torch.uint8)}, tmp_path / "rng.safetensors")
    load_state(tmp_path, model, adamw(model))
    assert "go on differently" in capfd.readouterr().err
    save_file({"cpu": torch.zeros(1, 16, dtype=torch.uint8)}, tmp_path / "rng.safetensors")
    with pytest.raises(CheckpointError, match="rng.safetensors"):
        load_state(tmp_path, model, adamw(model))


def test_the_device_has_its_own_generator(monkeypatch, tmp_path):
    """What a GPU adds, with a module in torch.cuda's place: its state is saved and set."""
    given = []
    fake = types.SimpleNamespace(get_rng_state=lambda: torch.arange(16, dtype=torch.uint8),
                                 set_rng_state=lambda value: given.append(value.tolist()))
    monkeypatch.setattr(torch, "get_device_module", lambda kind: fake)
    model = types.SimpleNamespace(parameters=lambda: iter([types.SimpleNamespace(
        device=torch.device("cuda"))]))
    generators = state._generators(model)
    state.save_tensors(state._random_states(generators), tmp_path, stem="rng")
    state._set_random_states(tmp_path, generators)
    assert given == [list(range(16))] and set(generators) == {"cpu", "cuda"}


def test_a_broken_state_file_is_one_clear_line(tmp_path):
    model = network()
    save_state(tmp_path, model, adamw(model), {})
    for name, text in (("state.json", b"{"), ("state.json", b"{}"), ("rng.safetensors", b"xx"),
                       ("model.safetensors", b"")):
        save_state(tmp_path, model, adamw(model), {})
        (tmp_path / name).write_bytes(text)
        with pytest.raises(UserError, match=name):
            load_state(tmp_path, model, adamw(model))


# --- ranks ---

# Saved on 2 ranks, taken up by 1 and 3; a vocabulary and widths that no number of ranks divides;
# an adapter run with frozen parameters; a disk that fails on rank 0 in the middle of a gather.
SCRIPT = """
import functools
import sys
from pathlib import Path
import torch
from torch import nn
from faults import Faults, disk_full
from common.errors import UserError
from common.files import checkpoint, state
from common.files.checkpoint import commit
from common.ranks import (
    all_sum, any_rank, copy_into, is_main, shard, start_ranks, stop_ranks, this_rank, world_size)

def build(kind, device=None):
    torch.manual_seed(0)
    model = nn.Module()
    model.model = nn.Module()
    model.model.layers = nn.ModuleList(nn.Linear(5, 7) for _ in range(2))
    model.head = nn.Linear(7, 13, bias=False)
    names = None
    if kind == "adapters":
        model.head.requires_grad_(False)
        names = [name for name, p in model.named_parameters() if p.requires_grad]
    if device:
        shard(model, device, torch.float32)
    chosen = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(chosen, lr=1e-2), names

def save(run, kind, device):
    model, optimizer, names = build(kind, device)
    generator = torch.Generator().manual_seed(1)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.zeros_like(parameter)
        copy_into(parameter.grad, torch.randn(parameter.shape, generator=generator))
    optimizer.step()
    torch.manual_seed(100 + this_rank())
    write = lambda tmp: state.save_state(tmp, model, optimizer, {"step": 1}, names)
    commit(checkpoint.step_folder(run, 1), write)
    after = torch.rand(1)
    second = checkpoint.step_folder(run, 2)
    whole = state.save_tensors  # now a shard for each tensor: others are to gather still
    state.save_tensors = functools.partial(whole, max_shard_bytes=1)
    with Faults(6 if is_main() else None, disk_full):  # no rank may wait for rank 0
        try:
            commit(second, write)
            raise SystemExit("no error")
        except UserError as error:
            print(f"rank {this_rank()}: {error}\\n", end="", flush=True)
    state.save_tensors = whole
    commit(second, write)
    checkpoint.prune(run, keep=1, best=1)
    assert checkpoint.latest(run) == second
    any_rank(False)  # wait
    if is_main():
        (second / "state.json").unlink()
    load(run, kind, device)
    assert torch.equal(torch.rand(1), after) and not torch.equal(
        all_sum(after.clone()), 2 * after), "each rank has its own random numbers"

def load(run, kind, device):
    model, optimizer, names = build(kind, device)
    with torch.no_grad():
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.zero_()
    step = checkpoint.latest(run)
    assert step == checkpoint.step_folder(run, 1)
    assert state.load_state(step, model, optimizer, names) == {"step": 1}
    kept = torch.get_rng_state()
    commit(run / f"of-{world_size() if device else 1}", lambda tmp:
                      state.save_state(tmp, model, optimizer, {"step": 1}, names))
    torch.set_rng_state(kept)

if __name__ == "__main__":
    device = start_ranks("cpu")
    for kind in ("dense", "adapters"):
        {"save": save, "load": load}[sys.argv[1]](Path(kind), kind, device)
    stop_ranks()
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """(folder, {number of ranks: what it printed}): 2 ranks saved and loaded, 3 and 1 loaded."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "script.py").write_text(SCRIPT)
    printed = {}
    for kind in ("dense", "adapters"):
        (folder / kind).mkdir()
    for action, world in (("save", 2), ("load", 3)):
        ended = [process.finish() for process in ranks_of(
            world, lambda: start_script(folder / "script.py", action, cwd=folder))]
        printed[world] = "".join(text for _, text in ended)
        assert not any(code for code, _ in ended), printed[world]
    alone = {"__name__": "alone"}
    exec(SCRIPT, alone)
    for kind in ("dense", "adapters"):
        alone["load"](folder / kind, kind, None)
    return folder, printed


@pytest.mark.parametrize("kind", ["dense", "adapters"])
def test_row_17_other_numbers_of_ranks_take_up_the_same_state(ranks, kind):
    folder = ranks[0] / kind
    for name in ("model", "optimizer"):
        saved = load_file(folder / "step-000001" / f"{name}.safetensors")
        assert all(value.abs().sum() > 0 for value in saved.values())
        assert ("head.weight" in saved) == (kind == "dense" and name == "model")
        for world in (1, 2, 3):
            assert_equal(load_file(folder / f"of-{world}" / f"{name}.safetensors"), saved)
    assert verify(folder / "of-3")["extra"]["world_size"] == 3


def test_row_17_another_number_of_ranks_is_told_about_random_numbers(ranks):
    _, printed = ranks
    assert [printed[world].count("go on differently") for world in (2, 3)] == [0, 2]


def test_row_19_a_full_disk_on_rank_0_ends_all_ranks_alike(ranks):
    _, printed = ranks
    for line in ("rank 0: ", "intact", "rank 1: another rank failed"):
        assert printed[2].count(line) == 2, printed[2]


def test_a_failed_save_leaves_nothing(tmp_path):
    model = network()
    with Faults(9, disk_full), pytest.raises(UserError, match="intact"):
        commit(tmp_path / "step-000001",
                          lambda tmp: save_state(tmp, model, adamw(model), {}))
    assert list(tmp_path.iterdir()) == []
