"""The targets that gpu.py measures: each function gives rows (what, measured, target, verdict).

On another GPU than a target is for, and on a CPU, the verdict is "not measured". `options` are
those of gpu.py; `figures`, a dict, gets the plain numbers.
"""

import math
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1]),
                str(Path(__file__).parents[2])]
import loss_bench
from gpu_checks import compile_model, lora, modeling, on, packing
from helpers import load
from report import adamw, held_bytes

from common import hub, predict, weights
from common.encode import virtual
from common.memory import LivePeak, peak_memory_bytes, reset_peak_memory

TARGETS = {"A100": (40e3, 54e3), "H200": (104e3, 140e3)}  # tokens/s: dense, LoRA r 16
S = {"full": 2048, "tiny": 128}  # tokens of a document
TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "max_position_embeddings": 2048, "model_type": "qwen3", "rope_theta": 1e6,
        "tie_word_embeddings": True, "rope_scaling": None}


def architecture(name, size):
    """LlamaConfig of a built-in architecture, or of a tiny one in its place."""
    source = TINY if size == "tiny" else weights.read_config(hub.resolve(name))
    return modeling.LlamaConfig.from_dict(source)


def make(kind, config, options, double_quant=False):
    """A model as chapter 3 makes it: "dense", "lora" or "qlora"; random weights."""
    dtype = getattr(torch, options.dtype)
    if kind == "qlora":
        with torch.device(options.device):  # drawn where they are quantised
            model = load("chapter-03/quantized_model.py").quantized_model(
                config, None, dtype, options.device, double_quant, "random")
    else:
        with torch.device(options.device):
            model = modeling.LlamaForCausalLM(config)
        model.compute_dtype = dtype
    if kind != "dense":
        model.to(dtype)
        lora.apply_adapter(model, lora.AdapterConfig(rank=16, alpha=32.0))
    return model


def packs_of(config, length, budget, count, varied, device):
    """(packs on the device, their shape): documents of `length` tokens, or of varied ones."""
    documents = virtual(500, config.vocab_size, length, seed=0)
    shape = packing.StaticShape.of([documents.lengths], budget, length)
    if not varied:
        ids = torch.randint(0, config.vocab_size, (count, budget // length, length))
        examples = [[(row, row) for row in pack] for pack in ids]
    else:
        sampler = packing.PackSampler(documents.lengths, budget, seed=0)
        examples = [[documents[i] for i in sampler.pack(n)] for n in range(count)]
    return [on(device, packing.packed_sequence_collate_fn(each, shape)) for each in examples]


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def train(model, packs, device, warm=2):
    """(seconds of the median step after `warm`, peak bytes of a step, losses)."""
    optimizer, times, losses = adamw(model, 1e-4), [], []

    def step(pack):
        targets = max(1, int((pack["labels"] >= 0).sum()))
        loss = model(**pack) / targets
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    for number, pack in enumerate(packs):
        if number == warm:
            reset_peak_memory(device)
        wait(device)
        started = time.perf_counter()
        losses.append(step(pack))
        wait(device)
        times.append(time.perf_counter() - started)
    if device.type == "cuda":
        peak = peak_memory_bytes(device)
    else:
        with LivePeak() as live:
            step(packs[-1])
        peak = held_bytes(model, optimizer) + live.grown
    return sorted(times[warm:])[len(times[warm:]) // 2], peak, [loss.item() for loss in losses]


# --- targets ---

def verdict(good, applies=True):
    """Of a target: "met", "missed", or "not measured" where it is for another device or size."""
    return "not measured" if not applies else "met" if good else "missed"


def speed(options, figures):
    """Tokens per second, MFU and memory of the three kinds; NF4 against LoRA."""
    config, length = architecture("qwen3-0.6b", options.size), S[options.size]
    budget = (8 if options.size == "full" else 2) * length
    device, dtype, seconds = options.device, getattr(torch, options.dtype), {}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    goals = next((goal for gpu, goal in TARGETS.items() if gpu in name), None)
    full = options.size == "full"
    for kind in ("dense", "lora", "qlora"):
        torch.compiler.reset()
        model = make(kind, config, options)
        compile_model(model, options.backend)
        packs = packs_of(config, length, budget, 2 + options.steps, False, device)
        seconds[kind], peak, losses = train(model, packs, device)
        rate = budget / seconds[kind]
        flops = predict.flops_per_token(model, length)
        most = predict.peak_flops(device, dtype)
        mfu = [rate * flops[way] / most for way in ("total", "full")] if most else None
        expected = sum(predict.memory(
            model, budget, dtype, chunk=modeling.CHUNK, compiled=options.backend == "inductor",
            kernel_joins=device.type == "cuda" and dtype != torch.float32).values())
        figures[kind] = {"tokens_per_second": rate, "mfu": mfu, "peak_bytes": peak,
                         "predicted_bytes": expected, "losses": losses}
        used = f", MFU {mfu[0]:.1%} ({mfu[1]:.1%} counting all of S²)" if mfu else ""
        goal = {"dense": goals and goals[0], "lora": goals and goals[1]}.get(kind)
        yield (f"{kind}, {budget} tokens of S {length}", f"{rate:,.0f} tokens/s{used}",
               f"{goal:,.0f}" if goal else "none for this device",
               verdict(goal and rate >= goal, full and goal is not None))
        yield (f"{kind}: peak memory / predicted", f"{peak / 1e9:.3g} GB / {expected / 1e9:.3g} GB"
               f" = {peak / expected:.3f}", "0.95 to 1.05",
               verdict(abs(peak / expected - 1) <= 0.05, full))
        if not all(map(math.isfinite, losses)):
            raise RuntimeError(f"{kind}: a loss is not finite: {losses}")
        del model, packs
    ratio = seconds["qlora"] / seconds["lora"]
    yield "QLoRA step / LoRA step", f"{ratio:.3f}", "1.05", verdict(
        ratio <= 1.05, full and device.type == "cuda")


def shapes(options, figures):
    """Graph breaks and recompilations over 50 packs of varied lengths."""
    config = architecture("qwen3-0.6b", "tiny")
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = make("dense", config, options)
    compile_model(model, options.backend)
    packs = packs_of(config, 96, 256, 50, True, options.device)
    train(model, packs[:1], options.device, warm=0)
    stats = torch._dynamo.utils.counters
    before = stats["stats"]["unique_graphs"]
    train(model, packs[1:], options.device)
    again = stats["stats"]["unique_graphs"] - before
    breaks = sum(stats["graph_break"].values())
    figures["shapes"] = {"graph_breaks": breaks, "recompilations": again}
    yield ("graph breaks, recompilations over 50 packs", f"{breaks}, {again}", "0, 0",
           verdict(not breaks and not again))


def loss_cost(options, figures):
    """The chunked loss against the plain one: time, and memory above inputs and gradients."""
    tokens, vocabulary, width = ((4096, 151_936, 1024) if options.size == "full"
                                 else (512, 4096, 64))
    device, dtype = options.device, getattr(torch, options.dtype)
    hidden = torch.randn(tokens, width, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, device=device) * 0.05).requires_grad_()
    inputs = hidden, weight, torch.randint(0, vocabulary, (tokens,), device=device)
    chunk = modeling.CHUNK if options.size == "full" else 64

    def chunked(*inputs):
        return loss_bench.chunked_cross_entropy(*inputs, chunk)

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
    config = architecture("qwen3-0.6b", options.size)
    dtype, device = torch.bfloat16, options.device
    source = TINY if options.size == "tiny" else weights.read_config(hub.resolve("qwen3-0.6b"))
    with tempfile.TemporaryDirectory() as folder:
        with torch.device(device):
            model = modeling.LlamaForCausalLM(config).to(dtype)
        weights.save_weights(model, source, folder)
        largest = sorted(p.nbytes for p in model.parameters())[-2:]
        del model
        reset_peak_memory(device)
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        read = load("chapter-03/quantized_model.py").quantized_model
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
    config, length = architecture("qwen3-8b", options.size), S[options.size]
    model = make("qlora", config, options, double_quant=True)
    for layer in model.model.layers:
        layer.checkpointing = "full"
    packs = packs_of(config, length, length, 3, False, options.device)
    seconds, peak, _ = train(model, packs, options.device, warm=1)
    figures["qlora-8b"] = {"peak_bytes": peak, "tokens_per_second": length / seconds}
    name = "Qwen3-8B" if options.size == "full" else "a tiny model"
    yield (f"QLoRA of {name}, one sequence of {length}",
           f"{peak / 2**30:.2f} GiB", "10 GiB",
           verdict(peak <= 10 * 2**30, options.size == "full" and options.device.type == "cuda"))
