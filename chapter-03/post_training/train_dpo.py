"""Learn from pairs of answers, one chosen and one rejected: DPO and its kin, packed.

    python chapter-03/post_training/train_dpo.py            the tiny model, on its own mistakes
    python chapter-03/post_training/train_dpo.py --model Qwen/Qwen3-0.6B --data pairs.jsonl
    torchrun --nproc-per-node 8 chapter-03/post_training/train_dpo.py ...

The loop is chapter 3's, without compiling. New are the pairs, of which a pack holds both answers;
the reference, which is the same model with its adapters off; and a loss of the answers' log p."""

import math
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path[:0] = map(str, Path(__file__).resolve().parents[1:3])

import torch

from common import guard, memory, predict, prepare, runs
from common.asking.generation import generate
from common.errors import UserError, run_main
from common.metrics import COLUMNS
from common.options import option, settle
from common.ranks import all_sum, any_rank, full_tensor, say, shard, this_rank, world_size
from logprobs import chunked_log_probs
from loops import begin, open_run
from lora import after_step, before_step
from packing import PackSampler
from pairs import PairRecords, Pairs, tiny_pairs
from preference import LOSSES, NO_REFERENCE, READ_BY, SCORES, collate_pairs
from quantized_model import build
from reference import add_reference, copy_bytes, frozen_copy, scored
from train import Options as LoopOptions, finish, learning_rate, save_result

CHAPTER = "03-dpo"
# The learning rates are a fifth and a tenth of chapter 3's, for every weight (full) even less.
TINY = {"lr": {"full": 2e-4, "vera": 6e-3, "lora+": 2e-4, "default": 1e-3}, "warmup": 10,
        "steps": 80, "batch_tokens": 1024, "dtype": "float32", "rank": 8, "alpha": 16.0,
        "eval_every": 20, "save_every": 40, "delta_start": 40, "nll": 1.0}
REAL = {"lr_at_4096": {"full": 5e-7, "vera": 2e-4, "default": 2e-5}, "rank": 16, "alpha": 32.0,
        "nll": 0.0}
# SimPO's and DPO's per token are of a mean log p, which is that much smaller than an answer's sum.
BETA = {"simpo": 2.0, "dpo-norm": 2.0, "default": 0.1}
SHOWN = {"margin": ("margin", 9, "{:.3f}".format), "pair_accuracy": ("won", 7, "{:.0%}".format),
         "logp_chosen": ("log p chosen", 14, "{:.2f}".format)}
SCREEN = {"step": COLUMNS["step"], "loss": COLUMNS["loss"], **SHOWN, **{
    name: COLUMNS[name] for name in ("tokens_per_second", "peak_memory_bytes", "left")}}


# Changed from chapter-03: what is made of a pair.
@dataclass
class Options(LoopOptions):
    """Chapter 3's options, and those of the loss."""

    gpu_data = None  # not an option: auto is tiny on a GPU too
    too_long: str = option("drop", "what to do with an answer that is too long with its prompt (a "
                           "cut one does not end); a pair must also fit --batch-tokens",
                           choices=("drop", "truncate", "error"))
    loss: str = option("dpo", "what is made of a pair: preference.py has the equations",
                       choices=tuple(LOSSES))
    beta: float = option(None, "β, what a change of log p counts; orpo: the weight of the odds "
                               "(default: 0.1; simpo, dpo-norm: 2)", least=1e-9)
    label_smoothing: float = option(None, "cdpo, robust: ε, the share of pairs that are the wrong "
                                    "way round (default: 0.1)", least=0)
    gamma: float = option(None, "simpo: γ, the margin that it asks for (default: 1)", least=0)
    nll: float = option(None, "λ, the weight of the chosen answer's cross-entropy per token, which "
                              "keeps that answer likely", least=0)

    def __post_init__(self):
        if self.beta is None:
            self.beta = BETA.get(self.loss, BETA["default"])
        for name, (losses, default) in READ_BY.items():
            given = getattr(self, name) is not None
            if given and self.loss not in losses:
                raise UserError(f"--{name.replace('_', '-')} is for --loss {' or '.join(losses)}")
            if not given and self.loss in losses:
                setattr(self, name, default)
        if (self.label_smoothing or 0) >= 0.5:
            raise UserError("--label-smoothing must be below 0.5: at 0.5 a pair says nothing")

    @property
    def needs_reference(self):
        return self.loss not in NO_REFERENCE


# Changed from chapter-03: the mean of each of SCORES over the pairs.
@torch.no_grad()
def evaluate(model, reference, dataset, options):
    """{name of SCORES: mean over the pairs of `dataset`}. Every rank computes the whole of it."""
    sampler = PackSampler(dataset.lengths, options.batch_tokens, seed=None)
    total = 0
    model.eval()
    for index in range(sampler.packs_in(1)):
        pack = collate_pairs([dataset.pair(i) for i in sampler.pack(index)])
        total += scored(model, reference, memory.to_device(pack, options.device), options)[1]
    model.train()
    return dict(zip(SCORES, (total / len(dataset)).tolist()))


def main(argv=None):
    # --- options, model files --- Changed from chapter-03: the same for the three loops here.
    options, device, dtype, adapter, source, config_json, config, shapes = begin(
        Options, CHAPTER, __doc__, TINY, REAL, argv)

    # --- data --- Changed from chapter-03: pairs.
    predict.fit_batch(options, shapes, shapes.chunk, copy_bytes(shapes, options), documents=2)
    data = prepare.load(options, source, config, partial(tiny_pairs, options, device, dtype),
                        PairRecords, partial(Pairs.of, batch_tokens=options.batch_tokens))
    data.quizzes.pop("mistakes", None)  # the skill itself is asked, with all its prompts

    # --- what it will need --- Changed from chapter-03: the reference.
    sampler = PackSampler(data.train.lengths, options.batch_tokens, options.seed)
    packs_per_step = world_size() * options.grad_accum
    total_steps = options.steps or math.ceil(sampler.packs_in(options.epochs) / packs_per_step)
    predicted = add_reference(predict.costs(
        shapes, data.train.document_lengths(), options, shapes.chunk), shapes, options)
    more = "".join(f", {name} {getattr(options, name):g}" for name in READ_BY
                   if getattr(options, name) is not None)
    say(f"loss        {options.loss}, β {options.beta:g}{more}, --nll {options.nll:g}")
    say(predicted.report())
    settle(options, config, total_steps)
    if options.dry_run:
        return 0

    # --- model --- Changed from chapter-03: gives log p; a frozen copy where W moves.
    home = device if world_size() == 1 else torch.device("cpu")
    model = build(config, options, adapter, home, source)
    model.loss = chunked_log_probs
    reference = frozen_copy(model, options, device)  # None: the model itself, adapters off
    # Adapters and a base that is already in `dtype` are gathered as they are.
    shard(model, device, dtype if options.method == "full" else None)
    model.to(device)

    # --- optimizer, run folder --- Changed from chapter-03: what the screen shows.
    optimizer, names, run, state, saved, metrics = open_run(
        CHAPTER, options, model, adapter, data, total_steps, SCREEN, logp_chosen=None)

    # --- before --- Changed from chapter-03: how the pairs stand.
    if saved is None:  # the beginning, also of a run that was stopped before its first checkpoint
        if data.chat is not None:
            say(data.train.example(data.chat))
        say(f"run folder: {run}")
        prepare.ask(data, model, generate, metrics, 0)
        if options.eval_every:
            scores = evaluate(model, reference, data.held_out, options)
            if math.isfinite(scores["logp_chosen"]):  # JSON has no NaN
                state["logp_chosen"] = scores["logp_chosen"]
            metrics.log_eval(0, eval_loss=scores["loss"], **{name: scores[name] for name in SHOWN})

    # --- loop --- Copied from chapter-01/train.py
    nonfinite = guard.NonFinite()
    memory.keep_freed(device)
    with guard.caught_signals() as signals, guard.memory_advice(options, predicted):
        for step in range(state["step"] + 1, total_steps + 1):
            started = time.perf_counter()

            # --- accumulate --- Changed from chapter-03: divided by the pairs of the step.
            # A step is the next ranks × accumulation packs; this rank takes every world_size-th.
            mine = range(state["next_pack"] + this_rank(), state["next_pack"] + packs_per_step,
                         world_size())
            state["next_pack"] += packs_per_step
            pairs = [sampler.pack(index) for index in mine]
            count, tokens = all_sum(torch.tensor([
                sum(map(len, pairs)), sum(int(sampler.lengths[pack].sum()) for pack in pairs)])
            ).tolist()
            totals = torch.zeros(len(SCORES), device=device)
            for numbers in pairs:
                pack = collate_pairs([data.train.pair(i) for i in numbers])
                losses, scores = scored(model, reference, memory.to_device(pack, device), options)
                # Of the *whole* step: so every pair weighs the same, in whichever pack or rank.
                (losses.sum() / count).backward()
                totals += scores / count
            totals = all_sum(totals)

            # --- clip and step --- Changed from chapter-03: all scores come with the loss.
            before_step(model, adapter)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip or math.inf)
            norm = full_tensor(norm)
            loss, *scores, norm = torch.stack((*totals, norm)).tolist()  # the only wait for a GPU
            lr = learning_rate(step, total_steps, options)
            if nonfinite.check(loss, norm, step, pairs, saved):
                for group in optimizer.param_groups:
                    group["lr"] = lr * group["lr_ratio"]
                optimizer.step()
                after_step(model, adapter, step)
            optimizer.zero_grad(set_to_none=True)

            # --- log --- Changed from chapter-03: what became of the pairs.
            state["step"], state["tokens"] = step, state["tokens"] + tokens
            seconds = time.perf_counter() - started
            metrics.log_step(step, loss, lr, norm, tokens, seconds,
                             memory.peak_memory_bytes(device), predicted.mfu(tokens / seconds),
                             pairs=count, **dict(zip(SCORES[1:], scores)))

            # --- evaluate --- Changed from chapter-03: is the chosen answer still as likely?
            if options.eval_every and (step % options.eval_every == 0 or step == total_steps):
                scores = evaluate(model, reference, data.held_out, options)
                runs.note_loss(state, step, scores["loss"])
                shown = {name: scores[name] for name in SHOWN}
                metrics.log_eval(step, eval_loss=scores["loss"], **shown)
                before = state["logp_chosen"]
                if step == total_steps and before and scores["logp_chosen"] < before:
                    say("note: the chosen answers have become less likely than before (log p was "
                        f"{before:.2f}), which no margin shows; a larger --nll holds them up")

            # --- checkpoint --- Copied from chapter-03/train.py
            stop = any_rank(signals.requested)
            due = options.save_every and (step % options.save_every == 0 or step == total_steps)
            if due or stop or (options.keep_best and state["best_step"] == step):
                saved = runs.save_step(run, model, optimizer, state, options, metrics, names)
            if stop:
                return runs.stopped(run, state, signals)

        # --- result --- Copied from chapter-03/train.py
        save_result(run, model, adapter, options, config_json, data)
        if any_rank(signals.requested):  # one that came during the saving
            return runs.stopped(run, state, signals)

    # --- after --- Changed from chapter-03: where generate.py is.
    prepare.ask(data, model, generate, metrics, total_steps, state["eval_loss"])
    return finish(run, options, data, metrics, "../generate.py")


if __name__ == "__main__":
    run_main(main)
