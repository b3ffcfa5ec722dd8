"""What must hold for every family of models in chapter 3; check_gemma3.py and its like call it.

They check a tree in which a diff of this folder is applied, so pytest does not collect them by
itself: tests/test_families.py applies each diff to a copy and runs its check there. With the diff
applied to your own tree, `python -m pytest tests/extensions/check_gemma3.py` does the same.

Each check takes the name of a model in tests/goldens/families/ (see make_families.py) and an empty
folder.
"""

import json
import sys

import pytest
import torch
from checks import assert_equals_golden
from helpers import GOLDENS, load
from live_memory import LivePeak, live_tensor_bytes
from safetensors.torch import load_file

from common import predict, weights
from common.adapters import peft
from common.asking.generation import generate
from common.asking.kv_cache import KVCache
from common.predict_memory import memory

llama = load("chapter-03/modeling_llama.py")
lora = load("chapter-03/lora.py")
packing = load("chapter-03/packing.py")
compiling = load("chapter-03/compiling.py")
nf4 = load("chapter-03/nf4.py")
quantized_model = load("chapter-03/quantized_model.py")
train = load("chapter-03/train.py")

FAMILIES = GOLDENS / "families"
COMPILED = ("attention", "compiling", "lora", "loss", "modeling_llama", "nf4")
LENGTHS = (60, 3, 100, 29)  # of a pack in which every layer has something to keep


def config_of(name, **changes):
    """The LlamaConfig of a golden model."""
    return llama.LlamaConfig.from_dict(weights.read_config(FAMILIES / name) | changes)


def model_of(name):
    """(model with its weights, the golden tensors)."""
    model = llama.LlamaForCausalLM(config_of(name))
    weights.load_weights(model, FAMILIES / name)
    return model, load_file(FAMILIES / f"{name}.safetensors")


def pack_of(documents):
    pack = packing.packed_sequence_collate_fn([(ids, ids) for ids in documents])
    inputs = {key: value for key, value in pack.items() if not key.startswith("label")}
    return pack, inputs


def random_pack(lengths=LENGTHS, vocabulary=64):
    generator = torch.Generator().manual_seed(0)
    return pack_of([torch.randint(vocabulary, (n,), generator=generator) for n in lengths])


def documents_of(golden):
    return golden["input_ids"].split(golden["lengths"].tolist())


def large(name, **changes):
    """A random model of this family, large enough that its own tensors are what needs memory."""
    torch.manual_seed(0)
    return llama.LlamaForCausalLM(config_of(
        name, hidden_size=128, intermediate_size=192, moe_intermediate_size=96, vocab_size=256,
        **changes))


def logits_and_gradients_are_transformers(name, folder):
    """Of packed documents, against transformers' of each alone; and chapter 3's loss."""
    model, golden = model_of(name)
    assert_equals_golden(model, packing.packed_sequence_collate_fn, golden)
    model.zero_grad()
    lengths = golden["lengths"].tolist()
    pack = packing.packed_sequence_collate_fn(list(zip(
        golden["input_ids"].split(lengths), golden["labels"].split(lengths))))
    # In training a family may add to its loss, which transformers' alone does not.
    loss = model.eval()(**pack) / (pack["labels"] >= 0).sum()
    assert abs(loss - golden["loss"]) <= 1e-6
    loss.backward()
    for parameter_name, parameter in model.named_parameters():
        expected = golden[f"grad.{parameter_name}"]
        assert (parameter.grad - expected).norm() <= 1e-4 * expected.norm(), parameter_name


def generation_is_transformers(name, folder):
    """Greedy, all prompts together, of unequal lengths, through the cache."""
    model, golden = model_of(name)
    prompts = [ids.tolist() for ids in documents_of(golden)]
    assert generate(model, prompts, 8) == golden["generated"].tolist()


def a_cached_pass_is_a_whole_pass(name, folder):
    """The logits of the last token of each document, grown by a token three times."""
    model, golden = model_of(name)
    documents = documents_of(golden)
    cache = KVCache(len(documents), int(golden["lengths"].max()) + 3)
    with torch.no_grad():
        for new in range(4):
            parts = documents if new == 0 else [ids[-1:] for ids in documents]
            _, inputs = pack_of(parts)
            if new:
                inputs["position_ids"] = torch.tensor([len(ids) - 1 for ids in documents])
            cached = model(**inputs, cache=cache)
            whole_pack, whole = pack_of(documents)
            logits = model(**whole)[whole["cu_seqlens"][1:].long() - 1]
            assert (cached - logits).abs().max() <= 2e-5
            documents = [torch.cat((ids, (7 * ids[-1:] + 5) % 64)) for ids in documents]


def low_rank_adapters_go_out_and_in(name, folder):
    """All linear layers: no change at first, then a change that files and a merge keep."""
    model, golden = model_of(name)
    _, inputs = pack_of(documents_of(golden))
    config = lora.AdapterConfig(rank=4)
    before = model(**inputs)
    linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)} - {"lm_head"}
    lora.apply_adapter(model, config)
    assert torch.equal(model(**inputs), before)
    adapters = dict(lora.adapter_modules(model))
    assert adapters.keys() == linear
    for adapter in adapters.values():
        torch.nn.init.normal_(adapter.lora_B, std=0.05)
    changed = model(**inputs)
    assert (changed - before).abs().max() > 1e-3
    changed.sum().backward()
    assert all(adapter.lora_A.grad is not None for adapter in adapters.values())
    peft.save_adapter(model, config, folder / "adapter", "base", lora)
    again, _ = model_of(name)
    peft.load_adapter(again, folder / "adapter", lora)
    assert torch.equal(again(**inputs), changed)
    merged, _ = model_of(name)
    for adapted, adapter in adapters.items():
        merged.get_submodule(adapted).weight.data = adapter.merged()
    assert (merged(**inputs) - changed).abs().max() <= 1e-4


def four_bits_are_the_dequantised_weights(name, folder):
    """An NF4 base gives what a dense one gives with the same weights dequantised."""
    model, golden = model_of(name)
    _, inputs = pack_of(documents_of(golden))
    small = quantized_model.base_model(config_of(name), FAMILIES / name, torch.float32)
    quantised = {n: m for n, m in small.named_modules() if isinstance(m, nf4.NF4Linear)}
    linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)} - {"lm_head"}
    assert quantised.keys() == linear
    for layer, module in quantised.items():
        model.get_submodule(layer).weight.data = module.weight
    assert (small(**inputs) - model(**inputs)).abs().max() <= 1e-5


def it_trains_and_is_saved_as_it_was(name, folder):
    """Two steps, full and on four bits; `final` has the config and the names of the original."""
    short = ["--data", "virtual", "--device", "cpu", "--dtype", "float32", "--steps", "2",
             "--batch-tokens", "64", "--eval-every", "0", "--model", str(FAMILIES / name)]
    assert train.main([*short, "--quantize", "none", "--method", "full", "--out",
                       str(folder / "full")]) == 0
    assert train.main([*short, "--rank", "4", "--out", str(folder / "nf4")]) == 0
    final = folder / "full" / "final"
    before, after = (json.loads((part / "config.json").read_text())
                     for part in (FAMILIES / name, final))
    if before["rope_parameters"].get("partial_rotary_factor") == 1:
        del before["rope_parameters"]["partial_rotary_factor"]  # it says nothing
    for key in before.keys() - {"transformers_version", "dtype"}:
        assert after[key] == before[key], key
    with torch.no_grad():
        model, golden = model_of(name)
        weights.save_weights(model, weights.read_config(FAMILIES / name), folder / "saved")
        again = llama.LlamaForCausalLM(llama.LlamaConfig.from_dict(
            weights.read_config(folder / "saved")))
        weights.load_weights(again, folder / "saved")
        _, inputs = pack_of(documents_of(golden))
        assert torch.equal(again(**inputs), model(**inputs))
    saved = load_file(folder / "saved" / "model.safetensors")
    assert saved.keys() == load_file(FAMILIES / name / "model.safetensors").keys()


def its_memory_is_predicted(name, folder):
    """A step's peak of live bytes within 5 %, trained whole and with LoRA; 6 with checkpointing."""
    config = weights.read_config(FAMILIES / name)
    twice = {"num_hidden_layers": 2 * config["num_hidden_layers"],
             "layer_types": config.get("layer_types") and 2 * config["layer_types"]}
    for method, dtype, checkpointing, changes in (
            ("full", torch.float32, "none", {}), ("full", torch.bfloat16, "none", {}),
            ("lora", torch.float32, "none", {}), ("full", torch.float32, "full", twice)):
        model = large(name, **changes)
        model.compute_dtype = dtype
        for layer in model.model.layers:
            layer.checkpointing = checkpointing
        if method == "lora":
            lora.apply_adapter(model, lora.AdapterConfig(rank=8))
        pack, _ = random_pack()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

        def step():
            (model(**pack) / 100).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        step()  # the first step has no moments yet
        own = sum(t.nbytes for t in (*model.parameters(), *model.buffers())) + sum(
            t.nbytes for state in optimizer.state.values() for t in state.values())
        others = live_tensor_bytes() - own
        with LivePeak() as live:
            step()
        predicted = sum(memory(model, len(pack["labels"]), dtype, checkpointing=checkpointing,
                               chunk=1024).values())
        tolerance = 0.05 if checkpointing == "none" else 0.06
        assert predicted == pytest.approx(live.peak - others, rel=tolerance), (
            method, dtype, checkpointing)
    counts = predict.parameters(llama.LlamaForCausalLM(config_of(name)))
    assert counts["total"] == sum(p.numel() for p in model_of(name)[0].parameters())


def it_compiles_and_counts_the_same(name, folder):
    """--compile: the loss and gradients of the eager model, in float32."""
    modules = {module: load(f"chapter-03/{module}.py") for module in COMPILED}
    before = {module: sys.modules.get(module) for module in modules}
    sys.modules.update(modules)  # the compiler imports what it traces by name
    try:
        pack, _ = random_pack()
        eager, compiled = large(name), large(name)
        torch._dynamo.reset()
        compiling.compile_model(compiled, backend="aot_eager")
        losses = [model(**pack) for model in (eager, compiled)]
        assert torch.allclose(*losses, rtol=1e-5)
        for loss in losses:
            loss.backward()
        for (parameter, a), b in zip(eager.named_parameters(), compiled.parameters()):
            assert (a.grad - b.grad).norm() <= 1e-4 * a.grad.norm(), parameter
    finally:
        torch._dynamo.reset()
        for module, old in before.items():
            sys.modules.pop(module)
            if old is not None:
                sys.modules[module] = old


ALL = [logits_and_gradients_are_transformers, generation_is_transformers,
       a_cached_pass_is_a_whole_pass, low_rank_adapters_go_out_and_in,
       four_bits_are_the_dequantised_weights, it_trains_and_is_saved_as_it_was,
       its_memory_is_predicted, it_compiles_and_counts_the_same]
