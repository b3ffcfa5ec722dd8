"""Learn from a teacher: another model, or this one as it was before training.

    python chapter-03/post_training/train_distill.py        new skills, with the old ones guarded
    python chapter-03/post_training/train_distill.py --model Qwen/Qwen3-0.6B \\
        --teacher Qwen/Qwen3-4B --data my.jsonl

New in chapter 3's loop are the teacher's pass, the divergence, and answers of the student's own."""

import math
import random
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path[:0] = map(str, Path(__file__).resolve().parents[1:3])

import torch

from common import guard, hub, memory, predict, prepare, runs
from common.asking.generation import generate
from common.errors import UserError, run_main
from common.metrics import COLUMNS
from common.options import option, settle
from common.ranks import any_rank, say
from common.tiny import skills
from distill import chunked_divergence
from loops import begin, open_run
from lora import after_step, before_step
from loss import chunked_cross_entropy
from nf4 import weights_kept
from packing import PackSampler
from prompts import Problems, problems
from quantized_model import build
from reference import copy_bytes
from rollout import rollout
from batches import add_rollout, document, keeps_weights, packed
from teacher import add_teacher, lesson, load_teacher, teacher_shapes
import train
from train import evaluate, finish, learning_rate, save_result

CHAPTER = "03-distill"
TINY = {**train.TINY, "steps": 200, "kd": 0.0, "beta": 1.0, "on_policy": 0.3, "max_new_tokens": 24}
REAL = {**train.REAL, "kd": 0.5, "beta": 0.0, "on_policy": 0.0, "max_new_tokens": 256}
SCREEN = {**{name: COLUMNS[name] for name in ("step", "loss")},
          "divergence": ("divergence", 12, "{:.4f}".format), **{name: COLUMNS[name] for name in (
    "grad_norm", "tokens_per_second", "peak_memory_bytes", "left")}}


# Changed from chapter-03: the teacher, and answers of one's own.
@dataclass
class Options(train.Options):
    """Chapter 3's options, and those of the teacher, the divergence and the rollouts."""

    gpu_data = None  # not an option: auto is tiny on a GPU too
    files = (*train.Options.files, "teacher", "prompts")
    teacher: str = option("self", "who teaches: self (this model before training), or a folder or "
                          "Hub id with the same tokenizer")
    kd: float = option(None, "λ, the teacher's share in the loss of a document of --data; the rest "
                             "is cross-entropy", least=0)
    beta: float = option(None, "β: 0 forward KL, 1 reverse KL, between them JSD", least=0)
    kd_temperature: float = option(1.0, "τ, which softens both distributions", least=1e-3)
    on_policy: float = option(None, "share of a step's documents that the student writes itself; "
                                    "of these only the teacher's part counts", least=0)
    prompts: str = option(None, "what these answer, written as --data is (default: --data; tiny: "
                                "the skills that the model has)")
    max_new_tokens: int = option(None, "longest answer in tokens", least=1)
    temperature: float = option(1.0, "of what the student writes", least=1e-3)

    def __post_init__(self):
        for name in ("kd", "beta", "on_policy"):
            if (getattr(self, name) or 0) > 1:
                raise UserError(f"--{name.replace('_', '-')} is a share: 1 at most")

    @property
    def needs_reference(self):
        return self.teacher == "self"


def main(argv=None):
    # --- options, model files --- Changed from chapter-03: the same for the three loops here.
    options, device, dtype, adapter, source, config_json, config, shapes = begin(
        Options, CHAPTER, __doc__, TINY, REAL, argv, one_process=True)

    # --- data --- Changed from chapter-03: prompts.
    other = teacher_shapes(options, shapes)
    beside = copy_bytes(shapes, options) if other is shapes else sum(
        parameter.nbytes for parameter in other.parameters())
    predict.fit_batch(options, shapes, shapes.chunk, beside)
    data = prepare.load(options, source, config, skills="new")
    asked = data.train, data.records[0]
    if options.prompts:
        asked = None, Problems(hub.resolve_data(options.prompts, "--prompts"))
    elif data.scored:
        asked = None, skills.records("base", "train", 2000, options.seed)
    limit = min(options.max_seq_len, options.batch_tokens, config.max_position_embeddings)
    prompts = options.on_policy and problems(data.chat, *asked, limit - options.max_new_tokens)

    # --- what it will need --- Changed from chapter-03: the teacher, the rollouts.
    sampler = PackSampler(data.train.lengths, options.batch_tokens, options.seed)
    packs_per_step = options.grad_accum
    total_steps = options.steps or math.ceil(sampler.packs_in(options.epochs) / packs_per_step)
    predicted = predict.costs(shapes, data.train.lengths, options, shapes.chunk)
    vocabulary = add_teacher(predicted, shapes, other, options, data.chat)
    if prompts:
        order = PackSampler([1] * len(prompts), 1, options.seed)  # of prompts, one by one
        longest = max(len(one.prompt) for one in prompts) + options.max_new_tokens
        kept = keeps_weights(predicted, shapes, options)
        room = add_rollout(predicted, config, options, options.batch_tokens, longest, kept)
    say(predicted.report())
    settle(options, config, total_steps)
    if options.dry_run:
        return 0

    # --- model --- Changed from chapter-03: the teacher.
    model = build(config, options, adapter, device, source)
    teacher = load_teacher(model, options, device)  # None: the model itself, adapters off
    model.to(device)
    teach = partial(chunked_divergence, vocabulary=vocabulary, beta=options.beta,
                    temperature=options.kd_temperature)

    # --- optimizer, run folder --- Changed from chapter-03: what the screen shows.
    optimizer, names, run, state, saved, metrics = open_run(
        CHAPTER, options, model, adapter, data, total_steps, SCREEN, next_prompt=0)

    # --- before --- Copied from chapter-03/train.py
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

            # --- write ---
            # Some of the step's documents give way to answers of the student's own.
            documents = [n for index in range(packs_per_step)
                         for n in sampler.pack(state["next_pack"] + index)]
            state["next_pack"] += packs_per_step
            share = options.on_policy * len(documents)  # below a half: one now and then
            own = round(share) or int(random.Random(f"{options.seed} {step}").random() < share)
            asked = [prompts[order.pack(state["next_prompt"] + i)[0]].prompt for i in range(own)]
            state["next_prompt"] += own
            with weights_kept(model, own and kept > 0):
                answers = [one.ids for one in rollout(
                    model, asked, 1, options.max_new_tokens, data.chat.stop_ids,
                    options.temperature, (options.seed, step), room)] if own else []

            # --- accumulate --- Changed from chapter-03: the teacher's part.
            given = packed([data.train[n] for n in documents[own:]], options)
            written = packed([document(*both) for both in zip(asked, answers)], options)
            packs = [(pack, options.kd) for pack in given] + [(pack, 1.0) for pack in written]
            targets = sum(len(pack["labelled"]) for pack, _ in packs)
            taught = sum(len(pack["labelled"]) for pack, share in packs if share)
            totals = torch.zeros(2, device=device)
            for pack, share in packs:
                model.loss = chunked_cross_entropy
                if share:
                    model.loss = partial(teach, share=share, **lesson(model, teacher, pack))
                found = model(**pack)
                loss, sums = found if share else (found, totals.new_zeros(2))
                (loss / targets).backward()
                totals += torch.stack((loss.detach() / targets, sums[1]))

            # --- clip and step --- Changed from chapter-03: the divergence.
            before_step(model, adapter)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip or math.inf)
            loss, divergence, norm = torch.stack((*totals, norm)).tolist()
            lr = learning_rate(step, total_steps, options)
            if nonfinite.check(loss, norm, step, [documents], saved):
                for group in optimizer.param_groups:
                    group["lr"] = lr * group["lr_ratio"]
                optimizer.step()
                after_step(model, adapter, step)
            optimizer.zero_grad(set_to_none=True)

            # --- log --- Changed from chapter-03: the divergence.
            tokens = sum(len(pack["input_ids"]) for pack, *_ in packs)
            state["step"], state["tokens"] = step, state["tokens"] + tokens
            metrics.log_step(step, loss, lr, norm, tokens, time.perf_counter() - started,
                             memory.peak_memory_bytes(device), None,
                             divergence=divergence / taught if taught else None)

            # --- evaluate --- Changed from chapter-03: by the cross-entropy.
            if options.eval_every and (step % options.eval_every == 0 or step == total_steps):
                model.loss = chunked_cross_entropy
                eval_loss = evaluate(model, data.held_out, options, None)
                runs.note_loss(state, step, eval_loss)
                metrics.log_eval(step, eval_loss=eval_loss)

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
