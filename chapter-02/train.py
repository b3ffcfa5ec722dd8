"""Fine-tune Llama, Mistral or Qwen: one of the LoRA family, or every weight (--method full).

    python chapter-02/train.py                                  the embedded tiny model, new skills
    python chapter-02/train.py --model Qwen/Qwen3-0.6B --data my.jsonl --method dora --rank 8
    torchrun --nproc-per-node 8 chapter-02/train.py ...         the same on eight GPUs

The loop is chapter 1's. What a method adds is in lora.py and is called at five places here:
`apply_adapter`, `optimizer_groups`, `state_names`, `before_step`, `after_step`."""

import math
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

from common import guard, hub, memory, predict, prepare, runs, weights
from common.adapters.merging import merge_into
from common.adapters.peft import save_adapter
from common.asking.generation import generate
from common.errors import UserError, located, run_main
from common.files.checkpoint import MARK
from common.options import TrainOptions, option, parse, settle
from common.ranks import (
    all_sum, any_rank, full_tensor, say, shard, start_ranks, stop_ranks, this_rank, world_size)
import lora
from lora import (METHODS, AdapterConfig, after_step, apply_adapter, before_step, optimizer_groups,
                  state_names)
from modeling_llama import LlamaConfig, LlamaForCausalLM
from packing import IGNORE, PackSampler, packed_sequence_collate_fn

CHAPTER = "02"
# What `auto` sets for the embedded model and data; and for everything else. A learning rate
# depends on the method: VeRA's two vectors per layer want a far higher one than whole matrices.
TINY = {"lr": {"full": 1e-3, "vera": 3e-2, "lora+": 1e-3, "default": 5e-3}, "warmup": 20,
        "steps": 220, "batch_tokens": 1024, "dtype": "float32", "rank": 8, "alpha": 16.0,
        "eval_every": 50, "save_every": 100}
REAL = {"lr_at_4096": {"full": 1e-5, "lora+": 3e-5, "pissa": 3e-5, "rslora": 8e-5, "vera": 2e-2,
                       "default": 2e-4}, "rank": 16, "alpha": 32.0}


@dataclass
class Options(TrainOptions):
    """Chapter 1's options, and those of the adapters: the fields of `lora.AdapterConfig`."""

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


# Copied from chapter-01/train.py
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


# Copied from chapter-01/train.py
def loss_sum(model, pack):
    """Sum of the cross-entropies of a pack's labelled tokens, float32; 0 if it has none."""
    inputs = {name: value for name, value in pack.items() if name != "labels"}
    logits = model(**inputs).float()  # (T, V): a softmax over V classes needs float32
    return F.cross_entropy(logits, pack["labels"], ignore_index=IGNORE, reduction="sum")


# Copied from chapter-01/train.py
@torch.no_grad()
def evaluate(model, dataset, options):
    """Mean loss per labelled token of `dataset`. Every rank computes the whole of it."""
    sampler = PackSampler(dataset.lengths, options.batch_tokens, seed=None)
    total, targets = 0.0, 0
    model.eval()
    for index in range(sampler.packs_in(1)):
        pack = packed_sequence_collate_fn([dataset[i] for i in sampler.pack(index)])
        targets += int((pack["labels"] != IGNORE).sum())
        total += loss_sum(model, memory.to_device(pack, options.device)).item()
    model.train()
    return total / max(1, targets)


def build(config, options, adapter, device="meta", source=None):
    """The model with its adapters, its weights from folder `source` or random; on "meta" shapes
    alone. A base that does not change has the run's dtype; what is trained is float32."""
    fresh = options.init == "random" and device != "meta"
    with torch.device("cpu" if fresh else "meta"):
        model = LlamaForCausalLM(config)
    model.compute_dtype = getattr(torch, options.dtype)
    if options.method not in ("full", "pissa", "delta-lora"):
        model.to(model.compute_dtype)
    if fresh:
        model.to(device)
    elif device != "meta":
        model.to_empty(device=device)
        weights.load_weights(model, source)
    return apply_adapter(model, adapter)


def main(argv=None):
    # --- options --- Changed from chapter-01: the adapter's options.
    options = parse(Options, CHAPTER, __doc__.split("\n\n")[0], TINY, REAL, argv)
    device, dtype = start_ranks(options.device), getattr(torch, options.dtype)
    if options.method == "delta-lora" and world_size() > 1:
        raise UserError("--method delta-lora runs on one process: it moves whole weights")
    torch.manual_seed(options.seed)
    adapter = AdapterConfig(**{f.name: getattr(options, f.name) for f in fields(AdapterConfig)})

    # --- model files and data --- Changed from chapter-01: Llama; skills not seen before.
    source = hub.resolve(options.model)
    config_json = weights.read_config(source)
    with located(source / "config.json"):
        config = LlamaConfig.from_dict(config_json)
    shapes = build(config, options, adapter)  # enough to predict what the run will need
    predict.fit_batch(options, shapes)
    data = prepare.load(options, source, config, skills="new")

    # --- what it will need --- Changed from chapter-01: the model's shapes with its adapters.
    sampler = PackSampler(data.train.lengths, options.batch_tokens, options.seed)
    packs_per_step = world_size() * options.grad_accum
    total_steps = options.steps or math.ceil(sampler.packs_in(options.epochs) / packs_per_step)
    predicted = predict.costs(shapes, data.train.lengths, options)
    say(predicted.report())
    settle(options, config, total_steps)
    if options.dry_run:
        return 0

    # --- model --- Changed from chapter-01: a frozen base in --dtype, adapters around its layers.
    # First whole, on the CPU of each rank, because DoRA and PiSSA look at the weights; `shard` then
    # takes one layer at a time to the GPU.
    home = device if world_size() == 1 else torch.device("cpu")
    model = build(config, options, adapter, home, source)
    # Adapters and a base that is already in `dtype` are gathered as they are.
    shard(model, device, dtype if options.method == "full" else None)
    model.to(device)

    # --- optimizer --- Changed from chapter-01: the method's groups.
    groups = optimizer_groups(model, adapter, options.lr, options.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95),
                                  fused=device.type != "mps")
    names = state_names(model)  # what training can change: all that a checkpoint has to hold

    # --- run folder, resume --- Changed from chapter-01: `names`.
    run, state, saved, metrics = runs.open_run(  # saved: the last whole checkpoint, or None
        CHAPTER, options, model, optimizer, data, total_steps, names)

    # --- before --- Copied from chapter-01/train.py
    if saved is None:  # the beginning, also of a run that was stopped before its first checkpoint
        data.show_example()
        say(f"run folder: {run}")
        prepare.ask(data, model, generate, metrics, 0)

    # --- loop --- Copied from chapter-01/train.py
    nonfinite = guard.NonFinite()
    memory.keep_freed(device)
    with guard.caught_signals() as signals, guard.memory_advice(options, predicted):
        for step in range(state["step"] + 1, total_steps + 1):
            started = time.perf_counter()

            # --- accumulate --- Copied from chapter-01/train.py
            # A step is the next ranks × accumulation packs; this rank takes every world_size-th.
            first = state["next_pack"] + this_rank()
            mine = range(first, state["next_pack"] + packs_per_step, world_size())
            state["next_pack"] += packs_per_step
            documents = [sampler.pack(index) for index in mine]
            packs = [packed_sequence_collate_fn([data.train[i] for i in pack])
                     for pack in documents]
            counts = torch.tensor([sum(int((p["labels"] != IGNORE).sum()) for p in packs),
                                   sum(len(p["labels"]) for p in packs)])
            targets, tokens = all_sum(counts).tolist()
            total_loss = torch.zeros((), device=device)
            for pack in packs:
                # Divided by the labelled tokens of the *whole* step, so that every labelled
                # token weighs the same, in whichever pack or rank it lies.
                loss = loss_sum(model, memory.to_device(pack, device)) / max(1, targets)
                loss.backward()
                total_loss += loss.detach()
            total_loss = all_sum(total_loss)

            # --- clip and step --- Changed from chapter-01: the method's two hooks and ratios.
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

            # --- log --- Copied from chapter-01/train.py
            state["step"], state["tokens"] = step, state["tokens"] + tokens
            seconds = time.perf_counter() - started
            metrics.log_step(step, loss, lr, norm, tokens, seconds,
                             memory.peak_memory_bytes(device), predicted.mfu(tokens / seconds))

            # --- evaluate --- Copied from chapter-01/train.py
            if options.eval_every and (step % options.eval_every == 0 or step == total_steps):
                eval_loss = evaluate(model, data.held_out, options)
                runs.note_loss(state, step, eval_loss)
                metrics.log_eval(step, eval_loss=eval_loss)

            # --- checkpoint --- Changed from chapter-01: `names`.
            stop = any_rank(signals.requested)
            due = options.save_every and (step % options.save_every == 0 or step == total_steps)
            if due or stop or (options.keep_best and state["best_step"] == step):
                saved = runs.save_step(run, model, optimizer, state, options, metrics, names)
            if stop:
                return runs.stopped(run, state, signals)

        # --- result --- Changed from chapter-01: it may be an adapter.
        if options.method == "delta-lora":
            merge_into(model, dtype, lora)  # W itself has moved: an adapter would not hold it all
        if options.method in ("full", "delta-lora"):
            runs.save_model(run / "final", model, config_json, data, dtype)
        else:
            runs.save_files(run / "final", lambda folder: save_adapter(
                model, adapter, folder, options.model, lora, metadata=MARK), data)
        if any_rank(signals.requested):  # one that came during the saving
            return runs.stopped(run, state, signals)

    # --- after --- Changed from chapter-01: it may be an adapter.
    prepare.ask(data, model, generate, metrics, total_steps, state["eval_loss"])
    kind = "model" if options.method in ("full", "delta-lora") else "adapter"
    say(runs.wrote(kind, run / "final", data.chat is not None))
    metrics.close()
    stop_ranks()
    return 0


if __name__ == "__main__":
    run_main(main)
