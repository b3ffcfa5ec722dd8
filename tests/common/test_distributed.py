"""Two and three gloo processes against one: losses, gradients, norm, weights; and a dead rank."""

import pytest
import torch
from helpers import ranks_of, start_script
from safetensors.torch import load_file

from common.errors import UserError
from common.ranks import (
    all_sum, any_rank, copy_into, full_tensor, is_main, shard, start_ranks, stop_ranks, this_rank,
    world_size)

# A decoder reduced to what sharding can get wrong: tied embeddings with a vocabulary that no
# world size divides, layers, frozen weights beside trainable ones, parameters with fewer rows
# than ranks. Trained on 6 packs a step, with 1 to 40 labelled tokens and one pack with none.
SCRIPT = """
import sys, torch
from torch import nn
import torch.nn.functional as F
from safetensors.torch import save_file
from common.ranks import (
    all_sum, any_rank, copy_into, full_tensor, is_main, shard, start_ranks, stop_ranks, this_rank,
    world_size)

V, D, RANK = 17, 6, 2

class Layer(nn.Module):
    def __init__(self, adapters):
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.up, self.down = nn.Linear(D, 10, bias=False), nn.Linear(10, D, bias=False)
        self.register_buffer("packed", torch.randint(0, 255, (7,), dtype=torch.uint8))
        self.A = self.B = None
        if adapters:
            self.requires_grad_(False)
            self.A = nn.Parameter(torch.randn(RANK, D))
            self.B = nn.Parameter(torch.randn(10, RANK) / 4)
    def forward(self, x, table):
        assert table.dtype == torch.float32, table.dtype
        h = self.norm(x)
        up = self.up(h)
        if self.A is not None:
            up = up + F.linear(F.linear(h, self.A), self.B)
        return x + self.down(F.silu(up) * table.to(up.dtype))

class Model(nn.Module):
    def __init__(self, adapters):
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(V, D)
        if adapters:
            self.model.embed_tokens.requires_grad_(False)
        self.model.layers = nn.ModuleList(Layer(adapters) for _ in range(3))
        self.lm_head = nn.Linear(D, V, bias=False)
        self.lm_head.weight = self.model.embed_tokens.weight
    def forward(self, ids):
        x, table = self.model.embed_tokens(ids), torch.linspace(0.5, 1, 10)
        for layer in self.model.layers:
            x = layer(x, table)
        return self.lm_head(x)

def train(device, adapters, dtype):
    torch.manual_seed(7 + 100 * this_rank())    # wrong on purpose: shard() must make them equal
    model = Model(adapters)
    shard(model, device, dtype)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-2)
    generator, results = torch.Generator().manual_seed(0), {}
    for step in range(3):
        packs = []
        for labelled in (40, 1, 0, 7, 2, 25):
            ids = torch.randint(0, V, (41,), generator=generator)
            labels = ids.roll(-1)
            labels[labelled:] = -100
            packs.append((ids, labels))
        mine = packs[this_rank()::world_size()]
        tokens = all_sum(torch.tensor(float(sum((l >= 0).sum() for _, l in mine))))
        loss = torch.zeros((), dtype=torch.float64)
        for ids, labels in mine:
            part = F.cross_entropy(model(ids).float(), labels, reduction="sum") / tokens
            part.backward()
            loss += part.detach()
        results[f"loss.{step}"] = all_sum(loss)
        for name, parameter in trainable.items():
            assert parameter.grad.dtype == parameter.dtype == torch.float32
            results[f"grad.{step}.{name}"] = full_tensor(parameter.grad).clone()
        norm = torch.nn.utils.clip_grad_norm_(trainable.values(), 0.3)
        results[f"norm.{step}"] = full_tensor(norm)
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    for name, parameter in model.named_parameters():
        results[f"weight.{name}"] = full_tensor(parameter).clone()
    return model, results

def main(out):
    device = start_ranks("cpu")
    every = {}
    for name, adapters, dtype in (("dense", False, torch.float32), ("lora", True, torch.float32),
                                  ("dense-bf16", False, torch.bfloat16)):
        model, results = train(device, adapters, dtype)
        every |= {f"{name}.{key}": value for key, value in results.items()}
    # copy_into, then full_tensor: the same tensor back, and only this rank's rows are kept
    for name, parameter in model.named_parameters():
        whole = torch.randn(parameter.shape, dtype=torch.float64,
                            generator=torch.Generator().manual_seed(3))
        copy_into(parameter, whole)
        assert torch.equal(full_tensor(parameter), whole.float()), name
        if world_size() > 1:
            assert parameter.to_local().numel() < whole.numel(), name
    for layer in model.model.layers:      # buffers: equal everywhere, whole
        packed = layer.packed.to(torch.int64)
        assert torch.equal(all_sum(packed.clone()), packed * world_size())
    assert any_rank(this_rank() == world_size() - 1) is True
    assert any_rank(False) is False
    if is_main():
        save_file({k: v.contiguous() for k, v in every.items()}, out)
    stop_ranks()

main(sys.argv[1])
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What 1, 2 and 3 processes computed: world size -> name -> tensor."""
    folder = tmp_path_factory.mktemp("ranks")
    script = folder / "script.py"
    script.write_text(SCRIPT)
    out = {world: folder / f"{world}.safetensors" for world in (1, 2, 3)}
    processes = [process for world in out for process in ranks_of(
        world, lambda: start_script(script, out[world]))]
    for process in processes:
        code, output = process.finish()
        assert code == 0, output
    return {world: load_file(path) for world, path in out.items()}


@pytest.mark.parametrize("kind", ["dense", "lora"])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_equal_one_process(results, world, kind):
    """Gradients are sums over ranks, the clip norm is counted once, weights end up the same."""
    names = [name for name in results[1] if name.startswith(kind + ".")]
    assert len(names) > 20
    for name in names:
        expected, got = results[1][name], results[world][name]
        assert got.dtype == expected.dtype, name
        if ".weight." in name:  # Adam divides tiny gradients by tiny moments
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6, msg=name)
        else:
            scale = expected.abs().max().item()
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6 * scale, msg=name)


@pytest.mark.parametrize("world", [2, 3])
def test_bf16_compute_keeps_float32_masters_and_reduction(results, world):
    """Gathered in bf16, kept and summed in float32: near the float32 run, and not equal to it."""
    for step in range(3):
        near = results[world][f"dense-bf16.loss.{step}"]
        exact = results[1][f"dense.loss.{step}"]
        assert near != exact
        torch.testing.assert_close(near, exact, rtol=2e-2, atol=0)
    weight = results[world]["dense-bf16.weight.model.layers.0.up.weight"]
    assert weight.dtype == torch.float32 and not torch.equal(weight, weight.bfloat16().float())


def test_frozen_parameters_stay(results):
    """Adapters move; what they sit on is bit for bit what rank 0 began with."""
    for world in (2, 3):
        for name, value in results[1].items():
            if name.startswith("lora.weight.") and name[-1] not in "AB":
                assert torch.equal(results[world][name], value), name


@pytest.mark.parametrize("fate", ["os._exit(9)", "time.sleep(9)"], ids=["dies", "hangs"])
def test_a_lost_rank_ends_the_others(tmp_path, fate):
    """Rank 1 dies, or answers no more: rank 0 stops with a plain message instead of waiting."""
    script = tmp_path / "script.py"
    script.write_text(f"""
import os, time, torch
from common.ranks import all_sum, any_rank, is_main, start_ranks
os.environ["BARELOOP_TIMEOUT_SECONDS"] = "4"
start_ranks("cpu")
any_rank(False)  # wait for it
if not is_main():
    {fate}
    os._exit(0)
all_sum(torch.ones(1))
""")
    first, lost = ranks_of(2, lambda: start_script(script, timeout=60))
    code, text = first.finish()
    lost.kill()
    lost.finish()
    assert code == 2
    assert "error: rank 0: another rank has ended or does not answer" in text


def test_single_process_needs_no_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    device = start_ranks("cpu")
    assert (this_rank(), world_size(), is_main()) == (0, 1, True)
    assert not torch.distributed.is_initialized()
    model = torch.nn.Linear(3, 2)
    shard(model, device, torch.float32)
    assert type(model.weight) is torch.nn.Parameter
    value = torch.randn(2, 3, dtype=torch.float64)
    copy_into(model.weight, value)
    assert torch.equal(full_tensor(model.weight), value.float())
    with pytest.raises(ValueError, match="cannot copy"):
        copy_into(model.weight, value[:1])
    count = torch.tensor(3)
    assert all_sum(count) is count and count == 3
    assert any_rank(True) is True and any_rank(False) is False
    stop_ranks()


@pytest.mark.parametrize("environment, device, words", [
    ({"WORLD_SIZE": "2"}, "cpu", "torchrun: .*RANK expected"),
    ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "cpu", "MASTER_ADDR expected"),
    ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
     "mps", "cpu or cuda"),
])
def test_bad_environment_is_one_clear_line(monkeypatch, environment, device, words):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        start_ranks(device)
