"""--compile: no graph break, no second compilation, the loss of the eager model; checked here with
`aot_eager`, which traces as the default backend does but needs no C++ compiler."""

import sys

import numpy as np
import pytest
import torch
from ch3_models import build, inputs_of, llama, lora, loss_and_gradients, pack_of, packing
from helpers import load
from torch._dynamo.utils import counters

from common.asking.kv_cache import KVCache
from common.errors import UserError

compiling = load("chapter-03/compiling.py")


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch):
    """The compiler imports the modules of what it traces by name, which tests do not have there."""
    for name in ("attention", "compiling", "lora", "loss", "modeling_llama", "nf4"):
        monkeypatch.setitem(sys.modules, name, load(f"chapter-03/{name}.py"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def varied_packs(count, shape, seed=0):
    """Packs of random lengths, from one document to as many as fit, with and without the shape."""
    random = np.random.default_rng(seed)
    lengths = np.exp(random.uniform(0, np.log(shape.max_seqlen), 40 * count)).astype(int)
    sampler = packing.PackSampler(lengths, shape.tokens, seed)
    shape = packing.StaticShape.of((sampler, count))
    for index in range(count):
        chosen = [int(lengths[i]) for i in sampler.pack(index)]
        yield pack_of(chosen, shape, seed=index), pack_of(chosen, seed=index)


@pytest.mark.parametrize("base, method, checkpointing, graphs", [
    ("dense", "full", "none", 1), ("nf4", "lora", "selective", 2),
    pytest.param("nf4", "lora", "full", 2, marks=pytest.mark.slow)])
def test_50_packs_of_varied_lengths_compile_once(base, method, checkpointing, graphs):
    model, eager = (build(base, method, num_hidden_layers=2) for _ in range(2))
    for layer in model.model.layers:
        layer.checkpointing = checkpointing
    compiling.compile_model(model, backend="aot_eager")
    counters.clear()  # of the trial
    shapes = set()
    for number, (static, plain) in enumerate(varied_packs(50, packing.StaticShape(96, 0, 64))):
        with torch._dynamo.config.patch(error_on_recompile=True):
            loss, gradients = loss_and_gradients(model, static)
        shapes.add(tuple(plain["cu_seqlens"].tolist()))
        if number % 10 == 0:
            expected, wanted = loss_and_gradients(eager, plain)
            assert abs(loss - expected) <= 1e-4 * expected
            assert wanted.keys() == gradients.keys()
            for name in wanted:
                assert (gradients[name] - wanted[name]).norm() <= 1e-4 * wanted[name].norm(), name
    assert len(shapes) == 50 and len(set(map(len, shapes))) > 10  # the packs were varied
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("base, method, graphs", [
    ("dense", "full", 2), pytest.param("nf4", "lora", 4, marks=pytest.mark.slow)])
def test_evaluation_and_generation_beside_training(base, method, graphs):
    model = compiling.compile_model(build(base, method), backend="aot_eager")
    shape = packing.StaticShape(64, 12, 32)
    for seed in range(4):
        with torch._dynamo.config.patch(error_on_recompile=seed > 0):
            pack = pack_of([5 + seed, 9], shape, seed)
            loss_and_gradients(model, pack)
            model.eval()
            with torch.no_grad():
                model(**pack)
            model.train()
        with torch.no_grad():  # prompts of any length: not compiled
            cache = KVCache(1, 64)
            model(**inputs_of(pack_of([5 + seed])), cache=cache)
    assert counters["stats"]["unique_graphs"] == 1 + graphs


def test_bfloat16_compiled_equals_eager():
    model, eager = build(), build()
    model.compute_dtype = eager.compute_dtype = torch.bfloat16
    compiling.compile_model(model, backend="aot_eager")
    pack = pack_of([30, 7, 20], packing.StaticShape(64, 6, 32))
    loss, expected = model(**pack), eager(**pack)
    assert loss.dtype == torch.float32
    assert abs(loss - expected) <= 1e-4 * expected


def test_a_missing_compiler_is_one_clear_line(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("\nNo working C++ compiler found in torch._inductor.config\nand more")

    with pytest.raises(UserError) as error:
        compiling.compile_model(build(), backend=broken)
    text = str(error.value)
    assert "\n" not in text and "No working C++ compiler" in text and "--compile" in text
    assert "g++" in text


def test_dora_on_some_layers_of_a_quantised_base_only():
    model = build("nf4", num_hidden_layers=2)
    lora.apply_adapter(model, lora.AdapterConfig(
        "dora", rank=4, target_modules=r".*layers\.1\..*q_proj"))
    compiling.compile_model(model, backend="aot_eager")
    shape = packing.StaticShape(64, 6, 32)
    for seed in range(3):
        with torch._dynamo.config.patch(error_on_recompile=True):
            loss, _ = loss_and_gradients(model, pack_of([30 - seed, 7], shape, seed))
    for layer in model.model.layers:
        layer.forward_packed = llama.forward_checkpointed
    assert abs(model(**pack_of([28, 7], shape, 2)) - loss) <= 1e-5 * loss
