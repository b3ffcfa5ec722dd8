"""Speed and memory on many GPUs, by a small simulation; and the simulation held to real runs.

    python tests/bench/scale_out.py                       tables for 1, 8, 64 and 512 GPUs, at once
    python tests/bench/scale_out.py --check               1 and 2 ranks on this CPU too, and run

The simulation is in scale_model.py; what it assumes about a machine is printed above each table.
"Of perfect" compares with as many GPUs on their own, each with the whole optimizer: more than 100 %
means that sharing the optimizer's work saves more than communication costs. Memory is that of
`common.predict`. The check measures one model on ranks that share nothing, and the link between two
ranks, and predicts from these another model, and both models sharded over two ranks.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1]),
                str(Path(__file__).parents[2])]
from helpers import load
from report import adamw, conditions, show_conditions, table, write
from scale_model import MACHINES, Machine, groups_of, simulate

from common import hub, predict_memory, weights
from common.ranks import any_rank, is_main, shard, start_ranks, stop_ranks, world_size


# --- predictions ---

RUNS = [("qwen3-0.6b", "full", 16384), ("llama-3.2-1b", "full", 16384), ("qwen3-8b", "full", 8192),
        ("qwen3-8b", "lora", 8192), ("qwen3-8b", "qlora", 8192)]


def shapes_only(name, method, dtype=torch.bfloat16):
    """A built-in architecture without numbers, as chapter 3 shards it."""
    modeling, lora = (load(f"chapter-03/{file}.py") for file in ("modeling_llama", "lora"))
    source = weights.read_config(hub.resolve(name))
    config = modeling.LlamaConfig.from_dict(source)
    if method == "qlora":
        model = load("chapter-03/quantized_model.py").base_model(
            config, None, dtype, "meta", "nf4-double", "shapes")
    else:
        with torch.device("meta"):
            model = modeling.LlamaForCausalLM(config)
        model.compute_dtype = dtype
    if method != "full":
        model.to(dtype)
        lora.apply_adapter(model, lora.AdapterConfig(method="lora"))
    return model


def predictions(machine, counts, attended=2048):
    """For every run of RUNS and number of ranks: tokens/s, efficiency, exposed time, memory."""
    dtype, found = torch.bfloat16, []
    for name, method, tokens in RUNS:
        model = shapes_only(name, method)
        groups = groups_of(model, tokens, attended, dtype if method == "full" else None)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        chunk = load("chapter-03/loss.py").chunk_for(model.config.vocab_size, int(machine.memory))
        alone = None
        for ranks in counts:
            times = simulate(groups, ranks, machine, trained)
            rate = ranks * tokens / times["step"]
            alone = alone or rate / ranks
            memory = sum(predict_memory.memory(
                model, tokens, dtype, chunk=chunk, ranks=ranks, varlen_kernel=True, compiled=True,
            ).values())
            found.append({"model": name, "method": method, "tokens_per_rank": tokens,
                          "ranks": ranks, "tokens_per_second": rate, "efficiency":
                          rate / ranks / alone, "memory_per_rank": memory, **times})
    return found


# --- checked on a CPU ---

CHECKED = {"small": (4, 512), "large": (8, 1024)}  # layers, tokens


def cpu_model(layers):
    """A model for the check, float32."""
    modeling = load("chapter-03/modeling_llama.py")
    return modeling.LlamaForCausalLM(modeling.LlamaConfig(
        vocab_size=2048, hidden_size=256, intermediate_size=768, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, head_dim=64, max_position_embeddings=2048,
        qk_norm=True, qkv_bias=False, rope_theta=1e6, windows=(None,) * layers,
        tie_word_embeddings=True))


def measure(layers, tokens, steps, device, sharded):
    """(seconds of the fastest step, of its clipping and optimizer), of all ranks at once."""
    torch.manual_seed(0)
    model, packing = cpu_model(layers), load("chapter-03/packing.py")
    if sharded:
        shard(model, device, torch.float32)
    optimizer, times, updates = adamw(model, 1e-4), [], []
    ids = torch.randint(0, 2048, (tokens // 128, 128))
    pack = packing.packed_sequence_collate_fn([(row, row) for row in ids])
    for _ in range(2 + steps):
        any_rank(False)  # wait
        started = time.perf_counter()
        (model(**pack) / tokens).backward()
        middle = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - started)
        updates.append(time.perf_counter() - middle)
    return min(times[2:]), min(updates[2:])


def worker(steps):
    """One rank of a real run; on rank 0 it prints what was measured: every model, sharded; the
    small one when each rank has it to itself, "alone"; and what the link carries a second."""
    torch.set_num_threads(1)
    device = start_ranks("cpu")
    found = {"alone": measure(*CHECKED["small"], steps, device, False)}
    for name, (layers, tokens) in CHECKED.items():
        found[name] = measure(layers, tokens, steps, device, True)
    if world_size() > 1:
        parts, times = [torch.ones(2**20) for _ in range(world_size())], []
        for _ in range(2 + steps):
            started = time.perf_counter()
            torch.distributed.all_gather(parts, torch.ones(2**20))
            torch.distributed.reduce_scatter(torch.empty(2**20), parts)
            times.append(time.perf_counter() - started)
        found["bandwidth"] = 2 * (world_size() - 1) * parts[0].nbytes / min(times[2:])
    if is_main():
        print("FOUND " + json.dumps(found), flush=True)
    stop_ranks()


def run_ranks(count, steps):
    """What `worker` finds with `count` ranks, started by torchrun on this machine."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
         str(count), __file__, "--worker", "--steps", str(steps)], check=True, text=True,
        stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return json.loads(done.stdout.partition("FOUND ")[2].splitlines()[0])


def check(steps):
    """Rows of (model, ranks, predicted, measured), and the machine with two ranks at work.

    The speed is that of the small model, when as many ranks compute but share nothing: two at
    once are slower than one, as they have one memory between them.
    """
    cases = {}
    for name, (layers, tokens) in CHECKED.items():
        model = cpu_model(layers)
        cases[name] = (groups_of(model, tokens, 128, torch.float32),
                       sum(p.numel() for p in model.parameters()))
    groups, trained = cases["small"]
    rows = []
    for count in (1, 2):
        found = run_ranks(count, steps)
        seconds, update = found["alone"]
        link, work = found.get("bandwidth", 1.0), sum(g.forward + g.backward for g in groups)
        machine = Machine("this CPU", work / (seconds - update), 2, link, link, 0.0,
                          40 * trained / update, 0.0, overlap=False)
        rows += [{"model": name, "ranks": count, "measured": found[name][0],
                  "predicted": simulate(case[0], count, machine, case[1])["step"]}
                 for name, case in cases.items()]
    return rows, machine


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--machine", choices=MACHINES, nargs="+", default=list(MACHINES))
    parser.add_argument("--check", action="store_true", help="also run 1 and 2 ranks on this CPU")
    parser.add_argument("--steps", type=int, default=5, help="of each run of the check")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", help="file for the figures, as JSON")
    options = parser.parse_args(argv)
    if options.worker:
        worker(options.steps)
        return 0
    found, figures = conditions(), {}
    show_conditions(found)
    for name in options.machine:
        machine = MACHINES[name]
        print(f"\n### {machine.name}: {machine.flops / 1e12:.0f} TFLOP/s in a step alone, "
              f"{machine.inside / 1e9:.0f} GB/s to the others of {machine.ranks_per_node} in a "
              f"node, {machine.between / 1e9:.0f} GB/s to other nodes, {machine.latency * 1e6:.0f} "
              f"µs a hop, {machine.optimizer / 1e12:.1f} TB/s in the optimizer; documents of 2048")
        figures[name] = {"assumed": asdict(machine),
                         "predicted": predictions(machine, options.gpus)}
        table(["model", "method", "tokens per GPU", "GPUs", "tokens/s", "of perfect",
               "waiting for others", "memory per GPU"],
              [[p["model"], p["method"], p["tokens_per_rank"], p["ranks"],
                f"{p['tokens_per_second']:,.0f}", f"{p['efficiency']:.0%}",
                f"{p['exposed'] / p['step']:.0%}", f"{p['memory_per_rank'] / 2**30:.1f} GiB"
                + ", too much" * (p["memory_per_rank"] > machine.memory)]
               for p in figures[name]["predicted"]])
    if options.check:
        rows, machine = check(options.steps)
        print(f"\n### This CPU: {machine.flops / 1e9:.1f} GFLOP/s for each of two ranks that share "
              f"nothing, {machine.inside / 1e6:.0f} MB/s between them (both measured)")
        table(["model", "ranks", "predicted s", "measured s", "predicted / measured"],
              [[r["model"], r["ranks"], f"{r['predicted']:.3f}", f"{r['measured']:.3f}",
                f"{r['predicted'] / r['measured']:.2f}"] for r in rows])
        figures["cpu"] = {"assumed": asdict(machine), "rows": rows}
    write(options.out, {**found, "figures": figures})
    return 0


if __name__ == "__main__":
    sys.exit(main())
