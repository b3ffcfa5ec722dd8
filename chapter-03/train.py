"""Fine-tune Llama, Mistral or Qwen beside a base of four bits (QLoRA), or as chapter 2 does.

    python chapter-03/train.py                                  the embedded tiny model, new skills
    python chapter-03/train.py --model Qwen/Qwen3-8B --data my.jsonl --double-quant --compile
    torchrun --nproc-per-node 8 chapter-03/train.py ...         the same on eight GPUs

The loop is chapter 2's. New are the NF4 base, the loss in chunks (inside the model's forward),
activation checkpointing, and compiling, for which every pack is given the same shape."""

import math
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from common import guard, hub, memory, predict, prepare, runs, weights
from common.adapters.merging import merge_into
from common.adapters.peft import save_adapter
from common.asking.generation import generate
from common.errors import UserError, located, run_main
from common.options import TrainOptions, option, parse, settle
from common.ranks import (
    all_sum, any_rank, full_tensor, say, shard, start_ranks, stop_ranks, this_rank, world_size)
from compiling import compile_model
import lora
from lora import METHODS, AdapterConfig, after_step, before_step, optimizer_groups, state_names
from modeling_llama import LlamaConfig
from packing import PackSampler, StaticShape, packed_sequence_collate_fn
from quantized_model import build, check_base, check_options, mark

CHAPTER = "03"
# What `auto` sets, as in chapter 2.
TINY = {"lr": {"full": 1e-3, "vera": 3e-2, "lora+": 1e-3, "default": 5e-3}, "warmup": 20,
        "steps": 220, "batch_tokens": 1024, "dtype": "float32", "rank": 8, "alpha": 16.0,
        "eval_every": 50, "save_every": 100}
REAL = {"lr_at_4096": {"full": 1e-5, "lora+": 3e-5, "pissa": 3e-5, "rslora": 8e-5, "vera": 2e-2,
                       "default": 2e-4}, "rank": 16, "alpha": 32.0}


# Changed from chapter-02: the last four options.
@dataclass
class Options(TrainOptions):
    """Chapter 2's options, and those for how the base is kept and the step computed."""

    method: str = option("lora", "what is trained", choices=tuple(METHODS))
    rank: int = option(None, "r, the rank of an adapter", least=1)
    alpha: float = option(None, "α; the adapter's product is scaled by α/r, rsLoRA's by α/√r",
                              least=0)
    dropout: float = option(0.0, "share of the adapter's input that is dropped", least=0)
    target_modules: str = option("all-linear", "which linear layers are adapted: all-linear, "
                                     "names such as q_proj,v_proj, or a regular expression")
    lr_ratio: float = option(16.0, "lora+: B's learning rate over A's", least=0)
    project_gradient: bool = option(True, "lora-fa: B's gradient as the second version of the "
                                        "paper has it")
    delta_ratio: float = option(1.0, "delta-lora: λ, the share of the product's change that "
                                    "goes into W", least=0)
    delta_start: int = option(100, "delta-lora: steps before W begins to move", least=0)
    vera_d: float = option(0.1, "vera: first value of the vector d")
    quantize: str = option("nf4", "how the frozen base is kept: in 4 bits, or in --dtype",
                               choices=("nf4", "none"))
    double_quant: bool = option(False, "quantise the scales of NF4 too: 4.13 bits per weight "
                                    "instead of 4.5")
    compile: bool = option(False, "compile (train.py only): packs are then filled up to "
                               "--batch-tokens")
    activation_checkpointing: str = option(
        "none", "what the backward computes again instead of keeping it; selective: all but "
        "matrix products and attention", choices=("none", "full", "selective"))


# Copied from chapter-02/train.py
def learning_rate(step, total, options):
    """The learning rate of step 1 … total: a linear warm-up, then --schedule, down to --min-lr."""
    if step <= options.warmup:
        return options.lr * step / options.warmup
    done = (step - options.warmup) / max(1, total - options.warmup)  # (0, 1]
    share = {
        "constant": 1.0,
        "linear": 1 - done,
        "cosine": (1 + math.cos(math.pi * done)) / 2,
        "wsd": min(1.0, (1 - done) / 0.2),
    }[options.schedule]
    return options.min_lr + share * (options.lr - options.min_lr)


# Changed from chapter-01: without dropout; static shapes.
@torch.no_grad()
def evaluate(model, dataset, options, shape):
    """Mean loss per labelled token of `dataset`. Every rank computes the whole of it."""
    sampler = PackSampler(dataset.lengths, options.batch_tokens, seed=None)
    total, targets = 0.0, 0
    model.eval()
    for index in range(sampler.packs_in(1)):
        pack = packed_sequence_collate_fn([dataset[i] for i in sampler.pack(index)], shape)
        targets += len(pack["labelled"])
        total += model(**memory.to_device(pack, options.device)).item()
    model.train()
    return total / max(1, targets)


def save_result(run, model, adapter, options, config_json, data):
    """Write `final/`: a model if all of it was trained or moved, else an adapter."""
    dtype = getattr(torch, options.dtype)
    if options.method == "delta-lora":
        merge_into(model, dtype, lora)  # W itself has moved: an adapter would not hold it all
    if options.method in ("full", "delta-lora"):
        runs.save_model(run / "final", model, config_json, data, dtype)
    else:
        runs.save_files(run / "final", lambda folder: save_adapter(
            model, adapter, folder, options.model, lora, metadata=mark(options)), data)


def finish(run, options, data, metrics, script="generate.py"):
    """Say what was written and how to ask it; gives the exit code."""
    kind = "model" if options.method in ("full", "delta-lora") else "adapter"
    say(runs.wrote(kind, run / "final", data.chat is not None, script))
    metrics.close()
    stop_ranks()
    return 0


def main(argv=None):
    # --- options --- Changed from chapter-02: methods that need a dense base.
    options = parse(Options, CHAPTER, __doc__.split("\n\n")[0], TINY, REAL, argv)
    check_options(options)
    device, dtype = start_ranks(options.device), getattr(torch, options.dtype)
    if options.method == "delta-lora" and world_size() > 1:
        raise UserError("--method delta-lora runs on one process: it moves whole weights")
    torch.manual_seed(options.seed)
    adapter = AdapterConfig(**{f.name: getattr(options, f.name) for f in fields(AdapterConfig)})

    # --- model files and data --- Changed from chapter-02: a folder that is quantised already.
    source = hub.resolve(options.model)
    config_json = weights.read_config(source)
    with located(source / "config.json"):
        config = LlamaConfig.from_dict(check_base(config_json, options))
    shapes = build(config, options, adapter)  # enough to predict what the run will need
    predict.fit_batch(options, shapes, shapes.chunk)
    data = prepare.load(options, source, config, skills="new")

    # --- what it will need --- Changed from chapter-02: the chunk of the loss.
    sampler = PackSampler(data.train.lengths, options.batch_tokens, options.seed)
    packs_per_step = world_size() * options.grad_accum
    total_steps = options.steps or math.ceil(sampler.packs_in(options.epochs) / packs_per_step)
    predicted = predict.costs(shapes, data.train.lengths, options, shapes.chunk)
    say(predicted.report())
    settle(options, config, total_steps)
    if options.dry_run:
        return 0

    # --- model --- Changed from chapter-02: compile.
    home = device if world_size() == 1 else torch.device("cpu")
    model = build(config, options, adapter, home, source)
    # Adapters and a base that is already in `dtype` are gathered as they are.
    shard(model, device, dtype if options.method == "full" else None)
    model.to(device)
    if options.compile:
        compile_model(model)

    # --- optimizer --- Copied from chapter-02/train.py
    groups = optimizer_groups(model, adapter, options.lr, options.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95),
                                  fused=device.type != "mps")
    names = state_names(model)  # what training can change: all that a checkpoint has to hold

    # --- run folder, resume --- Copied from chapter-02/train.py
    run, state, saved, metrics = runs.open_run(  # saved: the last whole checkpoint, or None
        CHAPTER, options, model, optimizer, data, total_steps, names)

    # --- before --- Copied from chapter-02/train.py
    if saved is None:  # the beginning, also of a run that was stopped before its first checkpoint
        data.show_example()
        say(f"run folder: {run}")
        prepare.ask(data, model, generate, metrics, 0)

    # --- loop --- Changed from chapter-02: static shapes; a step's packs are made beforehand.
    shape, ready = None, None
    if options.compile:
        last_pack = state["next_pack"] + (total_steps - state["step"]) * packs_per_step
        held_out = PackSampler(data.held_out.lengths, options.batch_tokens, seed=None)
        shape = StaticShape.of((sampler, last_pack), (held_out, held_out.packs_in(1)))

    def make_packs(first):
        """For the step whose first pack has number `first`: this rank's packs, their documents, and
        how many labelled tokens and tokens these have."""
        # A step is the next ranks × accumulation packs; this rank takes every world_size-th.
        mine = range(first + this_rank(), first + packs_per_step, world_size())
        documents = [sampler.pack(index) for index in mine]
        packs = [packed_sequence_collate_fn([data.train[i] for i in pack], shape)
                 for pack in documents]
        counts = torch.tensor([sum(len(pack["labelled"]) for pack in packs),
                               sum(int(sampler.lengths[pack].sum()) for pack in documents)])
        return [memory.to_device(pack, device) for pack in packs], documents, counts

    nonfinite = guard.NonFinite()
    memory.keep_freed(device)
    with guard.caught_signals() as signals, guard.memory_advice(options, predicted):
        for step in range(state["step"] + 1, total_steps + 1):
            started = time.perf_counter()

            # --- accumulate --- Changed from chapter-02: the next step's packs; no logits.
            packs, documents, counts = ready or make_packs(state["next_pack"])
            state["next_pack"] += packs_per_step
            targets, tokens = all_sum(counts).tolist()
            total_loss = torch.zeros((), device=device)
            for pack in packs:
                # Divided by the labelled tokens of the *whole* step, so that every labelled
                # token weighs the same, in whichever pack or rank it lies.
                loss = model(**pack) / max(1, targets)
                loss.backward()
                total_loss += loss.detach()
            total_loss = all_sum(total_loss)
            # The next step's packs are made while a GPU is still at work on this one.
            ready = make_packs(state["next_pack"]) if step < total_steps else None

            # --- clip and step --- Copied from chapter-02/train.py
            before_step(model, adapter)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip or math.inf)
            norm = full_tensor(norm)
            loss, norm = torch.stack((total_loss, norm)).tolist()  # the only wait for a single GPU
            lr = learning_rate(step, total_steps, options)
            if nonfinite.check(loss, norm, step, documents, saved):
                for group in optimizer.param_groups:
                    group["lr"] = lr * group["lr_ratio"]
                optimizer.step()
                after_step(model, adapter, step)
            optimizer.zero_grad(set_to_none=True)

            # --- log --- Copied from chapter-02/train.py
            state["step"], state["tokens"] = step, state["tokens"] + tokens
            seconds = time.perf_counter() - started
            metrics.log_step(step, loss, lr, norm, tokens, seconds,
                             memory.peak_memory_bytes(device), predicted.mfu(tokens / seconds))

            # --- evaluate --- Changed from chapter-02: static shapes.
            if options.eval_every and (step % options.eval_every == 0 or step == total_steps):
                eval_loss = evaluate(model, data.held_out, options, shape)
                runs.note_loss(state, step, eval_loss)
                metrics.log_eval(step, eval_loss=eval_loss)

            # --- checkpoint --- Copied from chapter-02/train.py
            stop = any_rank(signals.requested)
            due = options.save_every and (step % options.save_every == 0 or step == total_steps)
            if due or stop or (options.keep_best and state["best_step"] == step):
                saved = runs.save_step(run, model, optimizer, state, options, metrics, names)
            if stop:
                return runs.stopped(run, state, signals)

        # --- result --- Changed from chapter-02: says on which base the adapter was trained.
        save_result(run, model, adapter, options, config_json, data)
        if any_rank(signals.requested):  # one that came during the saving
            return runs.stopped(run, state, signals)

    # --- after --- Changed from chapter-02: a function, as the loops of post_training/ end so too.
    prepare.ask(data, model, generate, metrics, total_steps, state["eval_loss"])
    return finish(run, options, data, metrics)


if __name__ == "__main__":
    run_main(main)
