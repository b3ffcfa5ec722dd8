"""The arithmetic of tests/bench/scale_out.py, by hand on small cases."""

from dataclasses import replace

import pytest
import torch
from helpers import load

from common import predict

model_file, script = load("tests/bench/scale_model.py"), load("tests/bench/scale_out.py")
Group, Machine = model_file.Group, model_file.Machine
collective, simulate = model_file.collective, model_file.simulate

# A FLOP and a byte take a second; nodes of 4; the optimizer costs next to nothing.
SIMPLE = Machine("simple", 1.0, 4, 1.0, 0.5, 0.0, 1e30, 1.0)


def test_a_ring_moves_all_but_its_own_part_over_the_slowest_link():
    assert collective(100.0, 1, SIMPLE) == 0
    assert collective(100.0, 4, SIMPLE) == pytest.approx(75)
    assert collective(100.0, 8, SIMPLE) == pytest.approx(100 * 7 / 8 / 0.5)
    assert collective(100.0, 4, replace(SIMPLE, latency=2.0)) == pytest.approx(75 + 3 * 2)
    assert collective(0.0, 4, replace(SIMPLE, latency=2.0)) == 0


def test_one_rank_computes_and_updates_and_waits_for_nobody():
    groups = [Group("layer", 10, 20, 4, 8), Group("root", 1, 2, 4, 8)]
    times = simulate(groups, 1, replace(SIMPLE, optimizer=40.0), trained=7)
    assert times["compute"] == 33 and times["exposed"] == 0 and times["optimizer"] == 7
    assert times["step"] == 40


def test_what_computing_does_not_hide():
    """4 ranks: 3/4 of the bytes. Computing outweighs: only the first gathering, that of the first
    layer (nothing is computed yet), and the last reduction are waited for."""
    groups = [Group("a", 100, 200, 4, 8), Group("b", 100, 200, 4, 8), Group("root", 10, 20, 4, 8)]
    times = simulate(groups, 4, SIMPLE, 0)
    assert times["gather"] == pytest.approx(6 * 3) and times["reduce"] == pytest.approx(3 * 6)
    # The root's reduction waits for layer a's, which begins when a is computed: 6 + 6.
    assert times["exposed"] == pytest.approx(3 + 3 + 12)
    # A slow link: gatherings follow one another, then two reductions that follow the last layer.
    slow = simulate(groups, 4, replace(SIMPLE, inside=0.001), 0)
    assert slow["step"] >= slow["gather"]
    # Without overlap all of it adds up.
    plain = simulate(groups, 4, replace(SIMPLE, overlap=False), 0)
    assert plain["step"] == pytest.approx(630 + 18 + 18)


def test_accumulation_repeats_all_but_the_optimizer():
    groups = [Group("a", 100, 200, 0, 0), Group("root", 10, 20, 0, 0)]
    once, twice = (simulate(groups, 2, replace(SIMPLE, optimizer=20.0), 100, n) for n in (1, 2))
    assert twice["compute"] == 2 * once["compute"] == 660
    assert twice["optimizer"] == once["optimizer"] == 40 * 100 / 2 / 20


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_groups_are_all_of_the_model(method):
    model = script.shapes_only("qwen3-0.6b", method)
    dtype = torch.bfloat16 if method == "full" else None
    groups = model_file.groups_of(model, 1000, 512, dtype)
    flops = predict.flops_per_token(model, 512)["total"]
    assert sum(g.forward + g.backward for g in groups) == pytest.approx(1000 * flops, rel=1e-6)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(g.reduced for g in groups) == 4 * trained
    stored = sum(2 * p.numel() if method == "full" else p.nbytes for p in model.parameters())
    assert sum(g.gathered for g in groups) == stored
    if method == "qlora":  # four-bit weights stay where they are: only adapters and norms travel
        assert groups[0].gathered < 1e6 * 2


def test_more_gpus_more_speed_less_memory():
    rows = script.predictions(model_file.MACHINES["A100"], [1, 8, 512])
    for one, eight, many in zip(rows[::3], rows[1::3], rows[2::3]):
        assert one["tokens_per_second"] < eight["tokens_per_second"] < many["tokens_per_second"]
        assert one["memory_per_rank"] > eight["memory_per_rank"] > many["memory_per_rank"]
        assert one["exposed"] == 0 < many["exposed"]
        assert one["efficiency"] == 1 and 0.5 < many["efficiency"] < 1.2
    dense = rows[0]  # DESIGN's target for one A100 is 40k tokens/s at S = 2048
    assert 36e3 < dense["tokens_per_second"] < 41e3
