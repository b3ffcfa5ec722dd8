"""What the methods do over steps: what moves, at which rate, and how a run goes on after a stop."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, load, ranks_of, start_script
from safetensors.torch import load_file
from torch import nn

llama = load("chapter-02/modeling_llama.py")
lora = load("chapter-02/lora.py")
METHODS = [method for method in lora.METHODS if method != "full"]
INPUTS, OUTPUTS = 14, 18


class Toy(nn.Module):
    """Two layers and something else: enough for adapters to have neighbours."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up_proj = llama.Linear(INPUTS, OUTPUTS, bias=True)
        self.norm = nn.LayerNorm(OUTPUTS)
        self.down_proj = llama.Linear(OUTPUTS, INPUTS, bias=False)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 4
        self.to(dtype)

    def forward(self, x):
        return x + self.down_proj(F.silu(self.norm(self.up_proj(x))))


def start(method, dtype=torch.float32, **options):
    """(model with adapters, its config)."""
    options = {"method": method, "rank": 4, "alpha": 6.0, "delta_start": 2, **options}
    model, config = Toy(dtype), lora.AdapterConfig(**options)
    lora.apply_adapter(model, config)
    return model.to(dtype), config


def adamw(model, config, lr=1e-2, weight_decay=0.1, eps=1e-8):
    return torch.optim.AdamW(lora.optimizer_groups(model, config, lr, weight_decay), eps=eps)


def train(model, config, optimizer, steps, first=1, each=lambda: None):
    """Steps number `first` and on, in the order that train.py has."""
    dtype = model.norm.weight.dtype
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(24, INPUTS, generator=generator, dtype=torch.float64).to(dtype)
        optimizer.zero_grad()
        (model(x) - x.roll(1, 1)).square().mean().backward()
        lora.before_step(model, config)
        optimizer.step()
        lora.after_step(model, config, step)
        each()
    return model


def snapshot(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


# --- what holds for all ---

@pytest.mark.parametrize("method", METHODS)
def test_frozen_is_frozen_and_what_is_trainable_moves(method):
    model, config = start(method, delta_start=0)
    before = snapshot(model)
    optimizer = adamw(model, config)
    train(model, config, optimizer, 2)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and set(optimizer.state) == set(trainable.values())
    for name, value in snapshot(model).items():
        moves = name in trainable or (method == "delta-lora" and name.endswith("base.weight"))
        assert torch.equal(value, before[name]) != moves, name
        assert name in trainable or model.get_parameter(name).grad is None


def test_full_trains_everything():
    model, config = Toy(), lora.AdapterConfig(method="full")
    before = snapshot(lora.apply_adapter(model, config))
    train(model, config, adamw(model, config), 1)
    assert all(not torch.equal(value, before[name]) for name, value in snapshot(model).items())


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_goes_on_from_its_state_equals_one_that_never_stopped(method):
    """`state_names` and the optimizer's state are all that a checkpoint needs, to the bit."""
    whole, config = start(method)
    train(whole, config, adamw(whole, config), 6)

    stopped, _ = start(method)
    optimizer = adamw(stopped, config)
    train(stopped, config, optimizer, 4)
    names = lora.state_names(stopped)
    saved = {name: stopped.get_parameter(name).detach().clone() for name in names}
    moments = copy.deepcopy(optimizer.state_dict())
    assert any(".base." in name for name in names) == (method == "delta-lora")

    resumed, _ = start(method)
    for name, value in saved.items():
        resumed.get_parameter(name).data.copy_(value)
    optimizer = adamw(resumed, config)
    optimizer.load_state_dict(moments)
    train(resumed, config, optimizer, 2, first=5)
    for name, value in snapshot(whole).items():
        assert torch.equal(value, resumed.get_parameter(name)), name


@pytest.mark.parametrize("method", METHODS)
def test_it_learns(method):
    """Far below the loss at the start, so no gradient has the wrong sign or scale."""
    rate = {"vera": 0.1, "lora-fa": 0.02}.get(method, 0.01)
    reach = 0.85 if method in ("vera", "lora-fa") else 0.6  # of the frozen A's rows, less
    model, config = start(method)
    losses = []
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, INPUTS, generator=generator)
    optimizer = adamw(model, config, rate, 0.0)

    def each():
        with torch.no_grad():
            losses.append((model(x) - x.roll(1, 1)).square().mean().item())
    each()
    train(model, config, optimizer, 150, each=each)
    assert losses[-1] < reach * losses[0], losses[-1] / losses[0]


# --- learning rates ---

def rates(model, groups):
    names = {id(p): name.rpartition(".")[2] for name, p in model.named_parameters()}
    return {names[id(p)]: (group["lr"], group["lr_ratio"], group["weight_decay"])
            for group in groups for p in group["params"]}


def test_groups_have_their_rates_and_spare_vectors_the_decay():
    for method, expected in {
            "lora": {"lora_A": (0.5, 1, 0.1), "lora_B": (0.5, 1, 0.1)},
            "lora+": {"lora_A": (0.5, 1, 0.1), "lora_B": (8.0, 16, 0.1)},
            "dora": {"lora_A": (0.5, 1, 0.1), "lora_B": (0.5, 1, 0.1),
                     "lora_magnitude_vector": (0.5, 1, 0.0)},
            "lora-fa": {"lora_B": (0.5, 1, 0.1)},
            "vera": {"vera_lambda_b": (0.5, 1, 0.0), "vera_lambda_d": (0.5, 1, 0.0)}}.items():
        model, config = start(method)
        groups = lora.optimizer_groups(model, config, 0.5, 0.1)
        assert rates(model, groups) == expected
        assert len({id(p) for g in groups for p in g["params"]}) == sum(
            p.requires_grad for p in model.parameters())
    model = Toy()
    groups = lora.optimizer_groups(model, lora.AdapterConfig(method="full"), 0.5, 0.1)
    for group in groups:
        assert {p.ndim for p in group["params"]} == ({2} if group["weight_decay"] else {1})


def test_lora_plus_with_ratio_1_is_lora_to_the_bit():
    plus, config = start("lora+", lr_ratio=1.0)
    plain, plain_config = start("lora")
    train(plus, config, adamw(plus, config), 20)
    train(plain, plain_config, adamw(plain, plain_config), 20)
    for name, value in snapshot(plain).items():
        assert torch.equal(value, plus.get_parameter(name)), name


def test_lora_plus_moves_B_by_exactly_its_ratio():
    plus, config = start("lora+", lr_ratio=16.0)
    plain, plain_config = start("lora")
    before = snapshot(plain)
    train(plus, config, adamw(plus, config), 1)
    train(plain, plain_config, adamw(plain, plain_config), 1)
    for name, value in snapshot(plain).items():
        if name.endswith("lora_B"):
            assert value.any() and torch.equal(16 * value, plus.get_parameter(name))
        else:
            assert torch.equal(value, plus.get_parameter(name))
            assert torch.equal(value, before[name]) != name.endswith("lora_A")  # decay moves A


# --- LoRA-FA ---

@pytest.mark.parametrize("rank", [4, 16])
def test_lora_fa_never_moves_A_and_stays_in_its_rows(rank):
    model, config = start("lora-fa", torch.float64, rank=rank)
    before = snapshot(model)
    train(model, config, adamw(model, config), 10)
    for name, layer in lora.adapter_modules(model):
        A = layer.lora_A
        assert torch.equal(A, before[f"{name}.lora_A"])
        change = layer.delta()
        outside = change - change @ torch.linalg.pinv(A) @ A
        assert change.abs().max() > 0.01 and outside.abs().max() < 1e-13


@pytest.mark.parametrize("rank", [4, 16])
def test_a_step_of_lora_fa_with_sgd_is_the_projected_step_of_the_weight(rank):
    """W moves by -η G_W A⁺A: gradient descent on W itself, as far as A's rows reach."""
    model, config = start("lora-fa", torch.float64, rank=rank)
    twin = Toy(torch.float64)
    x = torch.randn(24, INPUTS, dtype=torch.float64)
    for each in (model, twin):
        (each(x) - x.roll(1, 1)).square().mean().backward()
    lora.before_step(model, config)
    torch.optim.SGD(lora.optimizer_groups(model, config, 0.3, 0.0)).step()
    for name, layer in lora.adapter_modules(model):
        gradient = twin.get_submodule(name).weight.grad
        expected = -0.3 * gradient @ torch.linalg.pinv(layer.lora_A) @ layer.lora_A
        assert (layer.delta() - expected).abs().max() < 1e-14


# --- Delta-LoRA ---

def products(model):
    return {name: (layer.lora_B @ layer.lora_A).detach()
            for name, layer in lora.adapter_modules(model)}


@pytest.mark.parametrize("first, rank", [(0, 4), (3, 8)])
def test_delta_lora_telescopes(first, rank):
    """W_T = W_0 + λ s (B_T A_T - B_K A_K): by steps, by the sum, and by its rank (≤ r, ≤ 2r)."""
    ratio = 0.7
    model, config = start("delta-lora", torch.float64, delta_start=first, delta_ratio=ratio)
    scale = config.alpha / config.rank
    originals = {name: layer.base.weight.detach().clone()
                 for name, layer in lora.adapter_modules(model)}
    weights = dict(originals)
    history = [products(model)]

    def each():
        history.append(products(model))
        step = len(history) - 1
        for name, layer in lora.adapter_modules(model):
            if step > first:  # equation 5
                weights[name] = weights[name] + ratio * scale * (
                    history[step][name] - history[step - 1][name])
            else:
                assert torch.equal(layer.base.weight, originals[name])
            assert (layer.base.weight - weights[name]).abs().max() < 1e-14
            assert not layer.base.weight.requires_grad and layer.base.weight.grad is None
    optimizer = adamw(model, config, 0.02)
    train(model, config, optimizer, 12, each=each)
    for name, layer in lora.adapter_modules(model):
        total = ratio * scale * (history[-1][name] - history[first][name])
        assert total.abs().max() > 0.01
        assert (layer.base.weight - originals[name] - total).abs().max() < 1e-13
        change = layer.merged() - originals[name]
        assert torch.linalg.matrix_rank(change, rtol=1e-9) == rank


def test_delta_lora_from_step_0_is_lora_with_a_larger_alpha():
    """Under Adam, which does not see the gradient's scale, up to its ε."""
    ratio = 0.7
    delta, config = start("delta-lora", torch.float64, delta_start=0, delta_ratio=ratio)
    plain, plain_config = start("lora", torch.float64, alpha=config.alpha * (1 + ratio))
    train(delta, config, adamw(delta, config, eps=1e-30), 60)
    train(plain, plain_config, adamw(plain, plain_config, eps=1e-30), 60)
    for (_, one), (_, other) in zip(lora.adapter_modules(delta), lora.adapter_modules(plain)):
        assert other.delta().abs().max() > 0.1
        assert (one.merged() - other.merged()).abs().max() < 1e-10


def test_delta_lora_keeps_small_steps():
    """In float32, 200 steps of 1e-5 add up as in float64 (in bfloat16 nearly all are lost)."""
    moved = {}
    for dtype in (torch.float32, torch.float64):
        model, config = start("delta-lora", dtype, delta_start=0)
        before = {n: layer.base.weight.detach().clone() for n, layer in lora.adapter_modules(model)}
        train(model, config, adamw(model, config, 1e-5), 200)
        moved[dtype] = {n: (layer.base.weight - before[n]).double()
                        for n, layer in lora.adapter_modules(model)}
    for name, exact in moved[torch.float64].items():
        error = (moved[torch.float32][name] - exact).norm() / exact.norm()
        assert error < 0.01, error


def test_a_step_that_was_skipped_leaves_nothing_behind():
    model, config = start("delta-lora", delta_start=0)
    optimizer = adamw(model, config)
    train(model, config, optimizer, 1)
    before = snapshot(model)
    lora.before_step(model, config)  # and then the gradient was found not to be finite
    assert all(torch.equal(value, before[name]) for name, value in snapshot(model).items())
    optimizer.zero_grad()
    other, _ = start("delta-lora", delta_start=0)
    other_optimizer = adamw(other, config)
    train(other, config, other_optimizer, 3)
    train(model, config, optimizer, 2, first=2)
    for name, value in snapshot(other).items():
        assert torch.equal(value, model.get_parameter(name))


# --- several ranks ---

SCRIPT = """
import sys, torch
from safetensors.torch import save_file
from common.ranks import full_tensor, is_main, shard, start_ranks, stop_ranks, this_rank, world_size
sys.path.insert(0, sys.argv[3])
import lora
from common.adapters import peft
from modeling_llama import LlamaConfig, LlamaForCausalLM

def make():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig.from_dict(dict(
        model_type="qwen2", vocab_size=32, hidden_size=16, intermediate_size=24,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        max_position_embeddings=32, rope_theta=1e4, tie_word_embeddings=True,
        initializer_range=0.2)))

def main(out, adapters):
    device, results = start_ranks("cpu"), {}
    # A bfloat16 base, and DoRA's m as it is: gathered in bfloat16 too, m/|V| would not be 1.
    model, cu = make().bfloat16(), torch.tensor([0, 10], dtype=torch.int32)
    model.compute_dtype = torch.bfloat16
    before = model(torch.arange(10), cu, 10, torch.arange(10))
    lora.apply_adapter(model, lora.AdapterConfig(method="dora", rank=3))
    shard(model, device, None)
    assert torch.equal(model(torch.arange(10), cu, 10, torch.arange(10)), before)

    for method in ("lora-fa", "delta-lora", "vera", "dora", "pissa"):
        model = make()
        config = lora.AdapterConfig(method=method, rank=3, delta_start=1)
        lora.apply_adapter(model, config)
        shard(model, device, torch.float32)
        optimizer = torch.optim.AdamW(lora.optimizer_groups(model, config, 1e-2, 0.1), eps=1e-3)
        packs = torch.randint(0, 32, (3, 2, 10), generator=torch.Generator().manual_seed(1))
        for step, both in enumerate(packs, 1):
            for ids in both[this_rank()::world_size()]:
                logits = model(ids, cu, 10, torch.arange(10))
                torch.nn.functional.cross_entropy(logits[:-1], ids[1:]).backward()
            lora.before_step(model, config)
            for name, p in model.named_parameters():
                if p.grad is not None:
                    results[f"{method}.grad{step}.{name}"] = full_tensor(p.grad).clone()
            optimizer.step()
            lora.after_step(model, config, step)
            optimizer.zero_grad()
        for name, parameter in model.named_parameters():
            results[f"{method}.{name}"] = full_tensor(parameter).clone()
        if method != "vera":
            for name, layer in lora.adapter_modules(model):
                results[f"{method}.{name}.merged"] = layer.merged()
        if method != "delta-lora":
            peft.save_adapter(model, config, f"{adapters}/{method}", "base", lora)
    if is_main():
        save_file({name: tensor.contiguous() for name, tensor in results.items()}, out)
    stop_ranks()

main(sys.argv[1], sys.argv[2])
"""


def test_two_ranks_equal_one_process(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    processes = []
    for world in (1, 2):
        (tmp_path / str(world)).mkdir()
        processes += ranks_of(world, lambda: start_script(
            script, tmp_path / f"{world}.safetensors", tmp_path / str(world), ROOT / "chapter-02"))
    for process in processes:
        code, output = process.finish()
        assert code == 0, output
    one, two = (load_file(tmp_path / f"{world}.safetensors") for world in (1, 2))
    assert one.keys() == two.keys() and len(one) > 200
    for name, expected in one.items():
        torch.testing.assert_close(two[name], expected, rtol=1e-4, atol=2e-6, msg=name)
    for method in ("lora-fa", "vera", "dora", "pissa"):
        one, two = (load_file(tmp_path / world / method / "adapter_model.safetensors")
                    for world in "12")
        assert one.keys() == two.keys()
        for name, expected in one.items():
            torch.testing.assert_close(two[name], expected, rtol=1e-4, atol=2e-6, msg=name)
