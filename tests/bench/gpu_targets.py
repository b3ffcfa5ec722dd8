"""The targets that gpu.py measures, as rows (what, measured, target, verdict).

On another GPU than a target is for, and on a CPU, the verdict is "not measured". `options` are
those of gpu.py; `figures`, a dict, gets the plain numbers. Each function gives rows, `speed` and
`peers` a list of such generators, of which one may fail without the others.
"""

import functools
import gc
import importlib.util
import math
import re
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1]),
                str(Path(__file__).parents[2])]
import loss_bench
from contestants import attention_of, peer, trl_row
from gpu_checks import compile_model, lora, modeling, on, packing
from helpers import load
from live_memory import LivePeak, reset_peak_memory
from report import adamw, held_bytes, largest

from common import hub, predict, predict_memory, weights
from common.data.encode import virtual
from common.memory import peak_memory_bytes

# Tokens/s by the end of the card's name: dense, LoRA of rank 16, chapter 1. The cards with less
# power ("PCIe", "NVL") or memory, and slices of one ("MIG"), have none.
TARGETS = {"A100-SXM4-80GB": (40e3, 54e3, 30e3), "H100 80GB HBM3": (104e3, 140e3, 60e3),
           "H200": (104e3, 140e3, 60e3)}
S = {"full": 2048, "tiny": 128}  # tokens of a document
TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "max_position_embeddings": 2048, "model_type": "qwen3", "rope_theta": 1e6,
        "tie_word_embeddings": True, "rope_scaling": None, "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "architectures": ["Qwen3ForCausalLM"]}


def source(name, size):
    """config.json of a built-in architecture, or of a tiny one in its place."""
    return TINY if size == "tiny" else weights.read_config(hub.resolve(name))


def make(kind, name, options, double_quant=False, checkpointing="none"):
    """A model as chapter 3 makes it: "dense", "lora" or "qlora"; random weights, drawn there."""
    config = modeling.LlamaConfig.from_dict(source(name, options.size))
    run = SimpleNamespace(
        dtype=options.dtype, device=options.device.type, init="random", double_quant=double_quant,
        method="full" if kind == "dense" else "lora", activation_checkpointing=checkpointing,
        quantize="nf4" if kind == "qlora" else "none")
    adapter = lora.AdapterConfig(method=run.method, rank=16, alpha=32.0)
    return load("chapter-03/quantized_model.py").build(
        config, run, adapter, options.device, draw_on=options.device)


def equal_documents(vocabulary, length, budget, count):
    """`count` lists of (ids, labels): documents of `length` tokens that fill the budget."""
    ids = torch.randint(0, vocabulary, (count, budget // length, length))
    return [[(row, row) for row in pack] for pack in ids]


def packs_of(examples, device, shape=None):
    return [on(device, packing.packed_sequence_collate_fn(each, shape)) for each in examples]


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def train(model, items, device, warm=2, loss_of=None):
    """(seconds of the median step after `warm`, peak bytes of a step, losses). An item is a pack,
    or what `loss_of` makes a mean loss of."""
    optimizer, times, losses = adamw(model, 1e-4), [], []
    loss_of = loss_of or (lambda pack: model(**pack) / max(1, len(pack["labelled"])))

    def step(item):
        loss = loss_of(item)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    for number, item in enumerate(items):
        if number == warm:
            reset_peak_memory(device)
        wait(device)
        started = time.perf_counter()
        losses.append(step(item))
        wait(device)
        times.append(time.perf_counter() - started)
    if device.type == "cuda":
        peak = peak_memory_bytes(device)
    else:
        with LivePeak() as live:
            step(items[-1])
        peak = held_bytes(model, optimizer) + live.grown
    losses = [loss.item() for loss in losses]
    if not all(map(math.isfinite, losses)):
        raise RuntimeError(f"a loss is not finite: {losses}")
    return sorted(times[warm:])[len(times[warm:]) // 2], peak, losses


# --- targets ---

def verdict(good, applies=True):
    """Of a target: "met", "missed", or "not measured" where it is for another device or size."""
    return "not measured" if not applies else "met" if good else "missed"


def goals(options):
    """The targets of this device and size, or None for each."""
    name = torch.cuda.get_device_name(options.device) if options.device.type == "cuda" else "CPU"
    known = [goal for gpu, goal in TARGETS.items() if re.search(rf"\b{gpu}$", name)]
    return known[0] if known and options.size == "full" else (None, None, None)


def rows_of(kind, options, figures, model, budget, measured, goal, **how):
    """The two rows of a way to train: speed with MFU, and the peak of memory beside what was
    predicted."""
    seconds, peak, losses = measured
    dtype, rate = getattr(torch, options.dtype), budget / seconds
    flops, most = predict.flops_per_token(model, S[options.size]), predict.peak_flops(
        options.device, dtype)
    mfu = [rate * flops[way] / most for way in ("total", "full")] if most else None
    expected = sum(predict_memory.memory(
        model, budget, dtype, varlen_kernel=options.device.type == "cuda" and (
            dtype != torch.float32), **how).values())
    figures[kind] = {"tokens_per_second": rate, "tokens": budget, "mfu": mfu, "peak_bytes": peak,
                     "predicted_bytes": expected, "losses": losses}
    used = f", MFU {mfu[0]:.1%} ({mfu[1]:.1%} counting all of S²)" if mfu else ""
    yield (f"{kind}, {budget} tokens of S {S[options.size]}", f"{rate:,.0f} tokens/s{used}",
           f"{goal:,.0f}" if goal else "none for this device", verdict(goal and rate >= goal, goal))
    yield (f"{kind}: peak memory / predicted", f"{peak / 1e9:.3g} GB / {expected / 1e9:.3g} GB"
           f" = {peak / expected:.3f}", "0.95 to 1.05",
           verdict(abs(peak / expected - 1) <= 0.05, options.size == "full"))


def budget_of(options):
    return (8 if options.size == "full" else 2) * S[options.size]


def speed(options, figures):
    """Tokens per second, MFU and memory of chapter 3's three kinds, compiled; NF4 against LoRA."""
    dense, lora, _ = goals(options)
    return [speed_of("dense", dense, options, figures), speed_of("lora", lora, options, figures),
            speed_of("qlora", None, options, figures), quantised_over_lora(options, figures)]


def speed_of(kind, goal, options, figures):
    budget, length = budget_of(options), S[options.size]
    model = compile_model(make(kind, "qwen3-0.6b", options), options.backend)
    examples = equal_documents(model.config.vocab_size, length, budget, 2 + options.steps)
    shape = packing.StaticShape(budget, budget // length, length)
    measured = train(model, packs_of(examples, options.device, shape), options.device)
    yield from rows_of(kind, options, figures, model, budget, measured, goal, chunk=model.chunk,
                       compiled=options.backend == "inductor")


def quantised_over_lora(options, figures):
    if "lora" in figures and "qlora" in figures:
        ratio = figures["lora"]["tokens_per_second"] / figures["qlora"]["tokens_per_second"]
        yield "QLoRA step / LoRA step", f"{ratio:.3f}", "1.05", verdict(
            ratio <= 1.05, options.size == "full" and options.device.type == "cuda")


def chapter_1(options, figures):
    """Chapter 1 as it is: eager, the plain loss. Fewer tokens where they do not fit."""
    file, trainer = load("chapter-01/modeling_qwen3.py"), load("chapter-01/train.py")
    collate, budget = load("chapter-01/packing.py").packed_sequence_collate_fn, budget_of(options)
    with torch.device(options.device):
        model = file.Qwen3ForCausalLM(
            file.Qwen3Config.from_dict(source("qwen3-0.6b", options.size)))
    model.compute_dtype = getattr(torch, options.dtype)

    def measure(budget):
        examples = equal_documents(model.config.vocab_size, S[options.size], budget,
                                   2 + options.steps)
        packs = [on(options.device, collate(each)) for each in examples]
        return train(model, packs, options.device, loss_of=lambda pack: trainer.loss_sum(
            model, pack) / (len(pack["labels"]) - len(pack["cu_seqlens"]) + 1))

    budget, measured = halved_until_it_fits(measure, budget, S[options.size])
    yield from rows_of("chapter 1", options, figures, model, budget, measured, goals(options)[2])


def halved_until_it_fits(measure, budget, least):
    """(tokens, `measure(tokens)`) of the largest number of tokens for which memory suffices."""
    while True:
        try:
            return budget, measure(budget)
        except torch.OutOfMemoryError:
            if budget <= least:
                raise
        gc.collect()
        torch.cuda.empty_cache()
        budget //= 2


PEERS = (  # name, kind, as a batch, with layers compiled
    ("transformers, packed", "dense", False, False),
    ("transformers, a batch of equal documents", "dense", True, False),
    ("PEFT, packed", "lora", False, False),
    ("PEFT, a batch of equal documents", "lora", True, False),
    ("transformers, a batch of equal documents, compiled", "dense", True, True))


def peers(options, figures):
    """transformers, PEFT and TRL, where they are installed, on documents of the same length."""
    if importlib.util.find_spec("transformers") is None:
        return [iter([("transformers, PEFT, TRL", "not installed: transformers", "none",
                       "not measured")])]
    folder = tempfile.TemporaryDirectory()

    @functools.cache
    def checkpoint():  # written when it is first asked for
        raw = source("qwen3-0.6b", options.size)
        weights.save_weights(make("dense", "qwen3-0.6b", options), raw, folder.name)
        return folder.name

    return [*(peer_of(*each, checkpoint, options, figures) for each in PEERS),
            trl_of(checkpoint, options, figures)]


def peer_of(name, kind, padded, compiled, checkpoint, options, figures):
    length, device = S[options.size], options.device
    vocabulary = source("qwen3-0.6b", options.size)["vocab_size"]
    # PEFT's adapters as they begin: nothing is compared but time.
    row = peer(name, kind, checkpoint(), getattr(torch, options.dtype), {}, padded,
               device=device, needs=("transformers", "peft")[:1 + (kind == "lora")])
    name = f"{name} ({attention_of(device)})"
    if row.missing:
        yield name, row.missing, "none", "not measured"
        return
    if compiled:
        for layer in row.model.model.layers:
            layer.compile(backend=options.backend, dynamic=False)

    def measure(budget):
        examples = equal_documents(vocabulary, length, budget, 2 + options.steps)
        return train(row.model, examples, device, loss_of=lambda documents: row.loss(
            documents, len(documents) * (length - 1)))

    budget, (seconds, peak, _) = halved_until_it_fits(measure, budget_of(options), length)
    figures[name] = {"tokens_per_second": budget / seconds, "tokens": budget, "peak_bytes": peak}
    yield from over(figures, name, kind, peak)
    if kind == "dense":
        yield from over(figures, name, "chapter 1", peak)


def trl_of(checkpoint, options, figures):
    length = S[options.size]
    name = f"TRL SFTTrainer, packed, steps of {length} tokens"
    vocabulary = source("qwen3-0.6b", options.size)["vocab_size"]
    documents = sum(equal_documents(vocabulary, length, budget_of(options), 4 + options.steps), [])
    row = trl_row(checkpoint(), documents, options, 1e-4, length, options.device)
    if row.missing:
        yield name, row.missing, "none", "not measured"
        return
    figures[name] = row.figures
    yield from over(figures, name, "dense", None)


def over(figures, name, ours, peak):
    """A row: ours beside a peer, if ours was measured in this run."""
    rate, known = figures[name]["tokens_per_second"], figures.get(ours)
    ratio = f"; {ours}: {known['tokens_per_second'] / rate:.2f} times" if known else ""
    size = f", peak {peak / 1e9:.3g} GB" if peak else ""
    yield f"{name}, {ours}", f"{rate:,.0f} tokens/s{size}{ratio}", "none", "measured"


def shapes(options, figures):
    """Graph breaks and recompilations over 50 packs of varied lengths, and whether what is compiled
    computes what it did before."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    small = SimpleNamespace(**{**vars(options), "size": "tiny"})
    model = make("dense", "qwen3-0.6b", small)
    documents = virtual(500, model.config.vocab_size, 96, seed=0)
    sampler = packing.PackSampler(documents.lengths, 256, seed=0)
    shape = packing.StaticShape.of((sampler, 50))
    packs = packs_of([[documents[i] for i in sampler.pack(n)] for n in range(50)], options.device,
                     shape)
    with torch.no_grad():
        eager = [model(**pack).item() for pack in packs[:8]]
    compile_model(model, options.backend)
    with torch.no_grad():
        same = [model(**pack).item() for pack in packs[:8]]
    train(model, packs[:1], options.device, warm=0)
    stats = torch._dynamo.utils.counters
    before = stats["stats"]["unique_graphs"]
    train(model, packs[1:], options.device)
    again = stats["stats"]["unique_graphs"] - before
    breaks = sum(stats["graph_break"].values())
    figures["shapes"] = {"graph_breaks": breaks, "recompilations": again}
    yield ("graph breaks, recompilations over 50 packs", f"{breaks}, {again}", "0, 0",
           verdict(not breaks and not again))
    worst = largest(abs(a / b - 1) for a, b in zip(same, eager))
    yield "compiled loss / eager loss", f"{worst:.1e} apart", "1e-3", verdict(worst <= 1e-3)


def loss_cost(options, figures):
    """The chunked loss against the plain one: time, and memory above inputs and gradients."""
    tokens, vocabulary, width = ((4096, 151_936, 1024) if options.size == "full"
                                 else (512, 4096, 64))
    device, dtype = options.device, getattr(torch, options.dtype)
    hidden = torch.randn(tokens, width, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, device=device) * 0.05).requires_grad_()
    inputs = hidden, weight, torch.randint(0, vocabulary, (tokens,), device=device)
    chunk, labelled = 64, torch.arange(tokens, device=device)
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        chunk = load("chapter-03/loss.py").chunk_for(vocabulary, memory)

    def chunked(*inputs):
        return loss_bench.chunked_cross_entropy(*inputs, chunk, labelled)

    both = loss_bench.plain_cross_entropy, chunked
    above = [loss_bench.peak_bytes(f, *inputs) - hidden.nbytes - weight.nbytes for f in both]
    seconds = loss_bench.seconds(both, inputs, 3)
    memory, slower = above[1] / above[0], seconds[1] / seconds[0]
    figures["loss"] = {"bytes": above, "seconds": seconds}
    yield (f"chunked loss / plain, T {tokens}, V {vocabulary}",
           f"{memory:.1%} of the memory, {slower:.2f} of the time", "15 %, 1.1",
           verdict(memory <= 0.15 and slower <= 1.1, options.size == "full"))


def loading(options, figures):
    """Peak memory while a 16-bit checkpoint becomes an NF4 model."""
    dtype, device = torch.bfloat16, options.device
    with tempfile.TemporaryDirectory() as folder:
        model = make("dense", "qwen3-0.6b", options).to(dtype)
        config = model.config
        weights.save_weights(model, source("qwen3-0.6b", options.size), folder)
        largest = sorted(p.nbytes for p in model.parameters())[-2:]
        del model
        gc.collect()
        reset_peak_memory(device)
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        read = load("chapter-03/quantized_model.py").base_model
        if device.type == "cuda":
            model = read(config, folder, dtype, device)
            peak = peak_memory_bytes(device) - before
        else:
            with LivePeak() as live:
                model = read(config, folder, dtype, device)
            peak = live.grown
    size = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    figures["loading"] = {"peak_bytes": peak, "model_bytes": size, "largest": largest}
    yield ("loading into NF4: peak / model + two largest tensors",
           f"{peak / 1e6:.0f} MB / {(size + sum(largest)) / 1e6:.0f} MB", "1",
           verdict(peak <= size + sum(largest), options.size == "full"))


def eight_billion(options, figures):
    """QLoRA of Qwen3-8B, one sequence: the memory it takes, double quantised, checkpointed."""
    length = S[options.size]
    model = make("qlora", "qwen3-8b", options, double_quant=True, checkpointing="full")
    packs = packs_of(equal_documents(model.config.vocab_size, length, length, 3), options.device)
    measured = train(model, packs, options.device, warm=1)
    name = "8B QLoRA, one sequence" if options.size == "full" else "tiny QLoRA, one sequence"
    yield from rows_of(name, options, figures, model, length, measured, None, chunk=model.chunk,
                       checkpointing="full")
    peak = measured[1]
    yield (f"{name} of {length}: peak", f"{peak / 2**30:.2f} GiB", "10 GiB",
           verdict(peak <= 10 * 2**30, options.size == "full" and options.device.type == "cuda"))
