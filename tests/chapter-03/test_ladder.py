"""The ladder: the same documents on every rung, what each changes, resuming."""

import json
import sys

import pytest
import torch
from ch3_models import build, pack_of, write_half
from helpers import load

ladder = load("chapter-03/profiling/ladder.py")
compile_model = load("chapter-03/compiling.py").compile_model
llama = load("chapter-03/modeling_llama.py")


def test_padding_makes_all_as_long_as_the_longest_and_trains_none_of_it():
    examples = [(torch.arange(n), torch.arange(n)) for n in (5, 9, 2)]
    rectangle = ladder.padded(examples)
    assert [len(ids) for ids, _ in rectangle] == [9, 9, 9]
    for (ids, labels), (wide, wide_labels) in zip(examples, rectangle):
        assert torch.equal(wide[:len(ids)], ids) and torch.equal(wide_labels[:len(ids)], labels)
        assert (wide_labels[len(ids):] == -100).all()


def test_slices_attend_as_the_model_does():
    pack = pack_of([33, 5, 20])
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(58, heads, 16, generator=generator, requires_grad=True)
               for heads in (4, 2, 2))
    gradients = []
    for function in (ladder.sliced_attention, llama.varlen_attention):
        output = function(q, k, v, pack["cu_seqlens"], pack["max_seqlen"])
        gradients.append((output, *torch.autograd.grad(output.square().sum(), (q, k, v))))
    for ours, expected in zip(*gradients):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_whole_loss_is_the_chunked_one():
    model, pack = build(), pack_of([40, 12])
    with torch.no_grad():
        chunked, model.chunk = model(**pack).item(), None
        assert model(**pack).item() == pytest.approx(chunked, rel=1e-6)


@pytest.fixture
def two_layers(tmp_path_factory, monkeypatch):
    """The tiny size with half of its layers: every operator of a rung takes a while to predict."""
    folder = write_half(tmp_path_factory.mktemp("two-layers"))
    monkeypatch.setitem(ladder.SIZES, "tiny", (folder, 128, 64))


@pytest.mark.parametrize("rungs", [
    ("naive", "packing", "LoRA", "QLoRA"), pytest.param(tuple(ladder.RUNGS), marks=pytest.mark.slow)])
def test_ladder_measures_every_rung_and_goes_on_when_interrupted(
        tmp_path, capsys, monkeypatch, quick_ceilings, two_layers, rungs):
    monkeypatch.setattr(ladder, "RUNGS", {name: ladder.RUNGS[name] for name in rungs})
    arguments = ["--size", "tiny", "--steps", "1", "--device", "cpu", "--no-compile",
                 "--out", str(tmp_path)]
    climbed, climb = [], ladder.climb

    def interrupted(rung, *rest):
        if len(climbed) == 2:
            raise KeyboardInterrupt
        climbed.append(dict(rung))
        return climb(rung, *rest)

    monkeypatch.setattr(ladder, "climb", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ladder.main(arguments)
    assert [row["name"] for row in json.loads((tmp_path / "ladder.json").read_text())] == [
        *rungs[:2]]

    monkeypatch.setattr(ladder, "climb", lambda *rest: climbed.append(dict(rest[0])) or climb(*rest))
    capsys.readouterr()
    assert ladder.main(arguments) == 0
    names = [name for name in ladder.RUNGS if name != "compile"]
    assert len(climbed) == len(names)  # the first two were not measured again
    rows = json.loads((tmp_path / "ladder.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in rows] == names
    for row, rung in zip(rows, climbed):
        assert row["rung"] == rung and not row["rung"]["compile"]
        assert row["tokens_per_second"] > 0 and row["predicted_tokens_per_second"] > 0
        assert row["mfu"] is None and row["flops_per_second"] > 0
    memory = {row["name"]: row["peak_memory_bytes"] for row in rows}
    assert memory["packing"] < memory["naive"] and memory["LoRA"] < memory["packing"]
    if "checkpointing" in rungs:
        assert memory["LoRA"] < memory["checkpointing"] < memory["fused optimizer"]
    table = (tmp_path / "ladder.md").read_text(encoding="utf-8")
    assert table.count("\n") == 2 + len(names) and table in capsys.readouterr().out
    assert "| QLoRA | " in table

    capsys.readouterr()
    assert ladder.main([*arguments, "--seed", "0"]) == 0 and len(climbed) == len(names)
    assert ladder.RUNGS["naive"]["packed"] is False  # the table itself has not been climbed
    file = tmp_path / "ladder.json"
    file.write_text(json.dumps(json.loads(file.read_text())[1:]))  # only the first is measured again
    assert ladder.main(arguments) == 0 and len(climbed) == len(names) + 1
    assert [row["name"] for row in json.loads(file.read_text())] == names


def test_a_compiled_rung_compiles_once_for_all_of_its_packs(monkeypatch, quick_ceilings, two_layers):
    # Packs of one number of tokens in unequal numbers of documents: each would compile anew.
    for name in ("attention", "compiling", "lora", "loss", "modeling_llama", "nf4"):
        monkeypatch.setitem(sys.modules, name, load(f"chapter-03/{name}.py"))
    monkeypatch.setattr(ladder, "compile_model", lambda model: compile_model(model, "aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    rung = {key: value for changes in ladder.RUNGS.values() for key, value in changes.items()}
    ladder.climb({**rung, "quantize": "none", "dtype": "float32"},
                 ladder.LadderOptions(size="tiny", steps=3), torch.device("cpu"))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3  # a probe, layer 1, others


def test_gains_are_over_the_rung_before_that_was_measured():
    def row(name, speed, **more):
        return {"name": name, "tokens_per_second": speed, "predicted_tokens_per_second": speed,
                "peak_memory_bytes": 2**20, "flops_per_second": 2e9, "mfu": None, **more}

    rows = [row("naive", 100), {"name": "compile", "missing": "no compiler"}, row("fused", 150)]
    *_, first, second, third = ladder.markdown(rows).splitlines()
    assert first == "| naive | 100 |  |  | 1.0 MiB | 2 |"
    assert second == "| compile | no compiler | | | | |"
    assert third == "| fused | 150 | 1.50 | 1.50 | 1.0 MiB | 2 |"
    assert ladder.markdown([row("naive", 100, mfu=0.5)]).endswith("| 2 (MFU 50.0%) |")
