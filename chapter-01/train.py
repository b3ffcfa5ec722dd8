"""Train or fine-tune Qwen3, every weight of it, on packed documents.

    python chapter-01/train.py                                         the embedded tiny model
    python chapter-01/train.py --model Qwen/Qwen3-0.6B --data my.jsonl the real thing
    torchrun --nproc-per-node 8 chapter-01/train.py ...                the same on eight GPUs

Read `main` from top to bottom: the sections are in the order in which things happen."""

import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

from common import guard, hub, memory, predict, prepare, runs, weights
from common.errors import located, run_main
from common.options import TrainOptions, parse, settle
from common.ranks import (
    all_sum, any_rank, full_tensor, say, shard, start_ranks, stop_ranks, this_rank, world_size)
from generate import generate
from modeling_qwen3 import Qwen3Config, Qwen3ForCausalLM
from packing import IGNORE, PackSampler, packed_sequence_collate_fn

CHAPTER = "01"
# What `auto` sets for the embedded model and data; and for everything else.
TINY = {"init": "random", "lr": 3e-3, "min_lr": 3e-4, "warmup": 50, "steps": 500,
        "batch_tokens": 1024, "dtype": "float32", "eval_every": 100, "save_every": 200}
REAL = {"lr_at_4096": 1e-5}


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


def loss_sum(model, pack):
    """Sum of the cross-entropies of a pack's labelled tokens, float32; 0 if it has none."""
    inputs = {name: value for name, value in pack.items() if name != "labels"}
    logits = model(**inputs).float()  # (T, V): a softmax over V classes needs float32
    return F.cross_entropy(logits, pack["labels"], ignore_index=IGNORE, reduction="sum")


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


def main(argv=None):
    # --- options ---
    options = parse(TrainOptions, CHAPTER, __doc__.split("\n\n")[0], TINY, REAL, argv)
    device, dtype = start_ranks(options.device), getattr(torch, options.dtype)
    torch.manual_seed(options.seed)

    # --- model files and data ---
    source = hub.resolve(options.model)
    config_json = weights.read_config(source)
    with located(source / "config.json"):
        config = Qwen3Config.from_dict(config_json)
    with torch.device("meta"):  # shapes, no numbers: enough to predict what the run will need
        model = Qwen3ForCausalLM(config)
    predict.fit_batch(options, model)
    data = prepare.load(options, source, config, skills="base")

    # --- what it will need ---
    sampler = PackSampler(data.train.lengths, options.batch_tokens, options.seed)
    packs_per_step = world_size() * options.grad_accum
    total_steps = options.steps or math.ceil(sampler.packs_in(options.epochs) / packs_per_step)
    predicted = predict.costs(model, data.train.lengths, options)
    say(predicted.report())
    settle(options, config, total_steps)
    if options.dry_run:
        return 0

    # --- model ---
    # Pretrained weights are read into a model without storage, so that nothing is initialised in
    # vain and no rank ever holds the whole model on its GPU.
    if options.init == "random":
        model = Qwen3ForCausalLM(config)
    model.compute_dtype = dtype
    shard(model, device, dtype)
    if options.init == "random":
        model.to(device)
    else:
        model.to_empty(device=device)
        weights.load_weights(model, source)

    # --- optimizer ---
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]  # the norms: not decayed
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": options.weight_decay},
         {"params": vectors, "weight_decay": 0.0}],
        lr=options.lr, betas=(0.9, 0.95), fused=device.type != "mps",
    )

    # --- run folder, resume ---
    run, state, saved, metrics = runs.open_run(  # saved: the last whole checkpoint, or None
        CHAPTER, options, model, optimizer, data, total_steps)

    # --- before ---
    if saved is None:  # the beginning, also of a run that was stopped before its first checkpoint
        data.show_example()
        say(f"run folder: {run}")
        prepare.ask(data, model, generate, metrics, 0)

    # --- loop ---
    nonfinite = guard.NonFinite()
    memory.keep_freed(device)
    with guard.caught_signals() as signals, guard.memory_advice(options, predicted):
        for step in range(state["step"] + 1, total_steps + 1):
            started = time.perf_counter()

            # --- accumulate ---
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

            # --- clip and step ---
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip or math.inf)
            norm = full_tensor(norm)
            loss, norm = torch.stack((total_loss, norm)).tolist()  # the only wait for a single GPU
            lr = learning_rate(step, total_steps, options)
            if nonfinite.check(loss, norm, step, documents, saved):
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            # --- log ---
            state["step"], state["tokens"] = step, state["tokens"] + tokens
            seconds = time.perf_counter() - started
            metrics.log_step(step, loss, lr, norm, tokens, seconds,
                             memory.peak_memory_bytes(device), predicted.mfu(tokens / seconds))

            # --- evaluate ---
            if options.eval_every and (step % options.eval_every == 0 or step == total_steps):
                eval_loss = evaluate(model, data.held_out, options)
                runs.note_loss(state, step, eval_loss)
                metrics.log_eval(step, eval_loss=eval_loss)

            # --- checkpoint ---
            stop = any_rank(signals.requested)
            due = options.save_every and (step % options.save_every == 0 or step == total_steps)
            if due or stop or (options.keep_best and state["best_step"] == step):
                saved = runs.save_step(run, model, optimizer, state, options, metrics)
            if stop:
                return runs.stopped(run, state, signals)

        # --- result ---
        runs.save_model(run / "final", model, config_json, data, dtype)
        if any_rank(signals.requested):  # one that came during the saving
            return runs.stopped(run, state, signals)

    # --- after ---
    prepare.ask(data, model, generate, metrics, total_steps, state["eval_loss"])
    say(runs.wrote("model", run / "final", data.chat is not None))
    metrics.close()
    stop_ranks()
    return 0


if __name__ == "__main__":
    run_main(main)
