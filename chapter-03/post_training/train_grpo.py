"""Learn from rewards that a program gives: GRPO and its corrections, with rollouts of one's own.

    python chapter-03/post_training/train_grpo.py           the tiny model learns to add
    python chapter-03/post_training/train_grpo.py --model Qwen/Qwen3-0.6B --no-thinking \\
        --data openai/gsm8k:main/train --reward gsm8k --max-new-tokens 512

New in chapter 3's loop are the rollout, a group of answers to each prompt, and their rewards."""

import math
import os
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

sys.path[:0] = map(str, Path(__file__).resolve().parents[1:3])

import torch

from common import guard, memory, predict, prepare, runs
from common.asking.generation import generate
from common.errors import one_line, run_main
from common.metrics import COLUMNS, Metrics
from common.options import option, settle
from common.ranks import any_rank, say
from grpo import live_groups, make_packs, policy_loss
from logprobs import chunked_log_probs
from loops import begin, open_run
from lora import after_step, before_step
from nf4 import weights_kept
from packing import PackSampler
from prompts import Problems, problems, tiny_problems
from quantized_model import build
from reference import add_reference, copy_bytes, frozen_copy, reference_log_probs
from rewards import check_answers, judge, load_reward
from rollout import Answer, rollout
from batches import add_rollout, keeps_weights
from train import Options as LoopOptions, finish, learning_rate, save_result

CHAPTER = "03-grpo"
TINY = {"lr": {"full": 2e-4, "vera": 2e-2, "lora+": 1e-3, "default": 4e-3}, "warmup": 5,
        "steps": 80, "batch_tokens": 2048, "dtype": "float32", "rank": 8, "alpha": 16.0,
        "eval_every": 20, "save_every": 40, "delta_start": 40, "max_new_tokens": 24}
REAL = {"lr_at_4096": {"full": 1e-6, "vera": 2e-4, "default": 1e-5}, "rank": 16,
        "alpha": 32.0, "max_new_tokens": 256}
GAP = 0.05  # mean difference of a token's log p between drawing and training that is noted
ASKED = 200  # held-out prompts of an evaluation
SAMPLES = 20e6  # bytes of samples.jsonl
SCREEN = {"step": COLUMNS["step"], "reward": ("reward", 9, "{:.3f}".format),
          "degenerate": ("alike", 7, "{:.0%}".format), "entropy": ("entropy", 9, "{:.3f}".format),
          "answer_tokens": ("length", 8, "{:.1f}".format), **{
    name: COLUMNS[name] for name in ("tokens_per_second", "peak_memory_bytes", "left")}}


# Changed from chapter-03: what is drawn, how it is judged, and what is made of it.
@dataclass
class Options(LoopOptions):
    """Chapter 3's options, and those of rollouts, rewards and the loss."""

    gpu_data = None  # not an option: auto is tiny on a GPU too
    too_long: str = option("drop", "what to do with a prompt that is too long with its expected "
                           "answer", choices=("drop", "error"))
    grad_accum: int = option(1, "not used: a step has the packs that its answers fill", least=1)
    weight_decay: float = option(0.0, "AdamW's weight decay, on matrices only", least=0)
    reward: str = option("exact", "exact, letters, gsm8k, or your own FILE.py:function of (record, "
                         "answer), which is run")
    prompts: int = option(16, "prompts of a step", least=1)
    group: int = option(8, "G, answers to each prompt", least=2)
    max_new_tokens: int = option(None, "longest answer in tokens; one that is cut gets 0", least=1)
    temperature: float = option(1.0, "of what is drawn, and of what is trained", least=1e-3)
    no_thinking: bool = option(False, "ask with thinking switched off, as generate.py can")
    baseline: str = option("mean", "compare with the group's mean, or that of the others (RLOO)",
                           choices=("mean", "others"))
    scale_rewards: bool = option(False, "divide by the group's standard deviation")
    divisor: str = option("tokens", "of the step's sum of losses: grpo.py has the formulas",
                          choices=("tokens", "constant", "answers"))
    updates: int = option(1, "steps on the same answers; the ratio of probabilities and its "
                          "bounds matter from the second on", least=1)
    ratio: str = option("token", "of each token, or one of an answer: sequence (GSPO, whose "
                        "--epsilon is 1000 times smaller)", choices=("token", "sequence"))
    epsilon: float = option(0.2, "how far below 1 the ratio counts", least=0)
    epsilon_high: float = option(None, "how far above (default: --epsilon; DAPO: 0.28)", least=0)
    kl: float = option(0.0, "β, the weight of the distance to the model before training", least=0)
    kl_estimator: str = option("k3", "of that distance, as a loss", choices=("k3", "k2"))

    def __post_init__(self):
        if self.epsilon_high is None:
            self.epsilon_high = self.epsilon
        file, colon, function = self.reward.rpartition(":")
        if colon:  # absolute, as the other names of files are
            self.reward = f"{os.path.abspath(file)}:{function}"

    @property
    def needs_reference(self):
        return self.kl > 0


# Changed from chapter-03: the rewards of greedy answers.
def evaluate(model, held_out, judges, chat, options, room):
    """{name of `judges`: the mean over held-out problems}, of greedy answers; shows two of them."""
    both = list(zip(held_out[:ASKED], rollout(
        model, [one.prompt for one in held_out[:ASKED]], 1, options.max_new_tokens, chat.stop_ids,
        temperature=0.0, room=room)))
    found = {name: [judge(one, *each, chat) for each in both] for name, one in judges.items()}
    for each, reward in list(zip(both, found["eval_reward"]))[:2]:
        show(chat, *each, reward)
    return {name: sum(values) / len(values) for name, values in found.items()}


def show(chat, problem, answer, reward):
    """Print a question, its answer and the reward."""
    answer = one_line(chat.decode(answer.ids).strip() or "(nothing)", limit=30)
    say(f"{'':15}{one_line(problem.text, limit=36)} -> {answer}  ({reward:g})")


def summary(rewards, answers):
    """{name: mean} of a step's rewards (P, G) and Answers."""
    alike, solved = ~live_groups(rewards), rewards[:, 0] >= 1
    tokens = sum(len(one.ids) for one in answers)
    means = {"reward": rewards, "reward_std": rewards.std(1), "degenerate": alike,
             "all_right": alike & solved, "all_wrong": alike & ~solved}
    return {**{name: value.float().mean().item() for name, value in means.items()},
            "answer_tokens": tokens / len(answers),
            "truncated": sum(not one.finished for one in answers) / len(answers),
            "entropy": sum(sum(one.entropies) for one in answers) / tokens}


def main(argv=None):
    # --- options, model files --- Changed from chapter-03: the same for the three loops here.
    options, device, dtype, adapter, source, config_json, config, shapes = begin(
        Options, CHAPTER, __doc__, TINY, REAL, argv, one_process=True)
    reward, beside = load_reward(options.reward)
    judges = {"eval_reward": reward, **{f"eval_{name}": one for name, one in beside.items()}}

    # --- data --- Changed from chapter-03: questions.
    predict.fit_batch(options, shapes, shapes.chunk, copy_bytes(shapes, options))
    data = prepare.load(options, source, config, partial(tiny_problems, options.seed), Problems)
    limit = min(options.max_seq_len, options.batch_tokens, config.max_position_embeddings)
    more = data.chat.no_thinking() if options.no_thinking else {}
    train, held_out = (problems(data.chat, *both, limit - options.max_new_tokens, **more)
                       for both in zip((data.train, data.held_out), data.records))
    check_answers(options.reward, train + held_out)
    example = data.chat.tokenise([train[0].record["expected"]])[0].ids
    judge(reward, train[0], Answer(example, [], [], True), data.chat)  # if it fails, then now

    # --- what it will need --- Changed from chapter-03: the rollouts, the reference.
    sampler = PackSampler([1] * len(train), options.prompts, options.seed)  # of prompts
    total_steps = options.steps or sampler.packs_in(options.epochs)
    lengths = [len(one.prompt) + options.max_new_tokens for one in train]
    full = options.prompts * options.group * sum(lengths) / len(lengths) > options.batch_tokens
    predicted = predict.costs(shapes, lengths, replace(options, grad_accum=1 + full), shapes.chunk)
    predicted = add_reference(predicted, shapes, options)
    kept = keeps_weights(predicted, shapes, options)
    room = add_rollout(predicted, config, options, options.prompts * options.group, max(lengths),
                       kept)
    say(f"reward      {options.reward}; {options.prompts} prompts x {options.group} answers of at "
        f"most {options.max_new_tokens} tokens a step")
    say(predicted.report())
    settle(options, config, total_steps)
    if options.dry_run:
        return 0

    # --- model --- Changed from chapter-03: gives log p, at the temperature of the rollouts.
    model = build(config, options, adapter, device, source)
    model.loss = lambda hidden, *rest: chunked_log_probs(hidden / options.temperature, *rest)
    reference = frozen_copy(model, options, device)  # None: the model itself, adapters off
    model.to(device)

    # --- optimizer, run folder --- Changed from chapter-03: what the screen shows; samples.
    optimizer, names, run, state, saved, metrics = open_run(
        CHAPTER, options, model, adapter, data, total_steps, SCREEN, skipped=0)
    samples = Metrics(run, total_steps, start_step=state["step"], name="samples.jsonl")

    # --- before --- Changed from chapter-03: how the greedy answers are rewarded.
    if saved is None:  # the beginning, also of a run that was stopped before its first checkpoint
        say(f"run folder: {run}")
        if data.scored:
            prepare.ask(data, model, generate, metrics, 0)
        if options.eval_every:
            metrics.log_eval(0, eval_loss=None, **evaluate(
                model, held_out, judges, data.chat, options, room))

    # --- loop --- Copied from chapter-01/train.py
    nonfinite = guard.NonFinite()
    memory.keep_freed(device)
    with guard.caught_signals() as signals, guard.memory_advice(options, predicted):
        for step in range(state["step"] + 1, total_steps + 1):
            started = time.perf_counter()

            # --- rollout ---
            numbers = sampler.pack(state["next_pack"])
            state["next_pack"] += 1
            asked = [train[n] for n in numbers]
            with weights_kept(model, kept > 0):
                answers = rollout(model, [one.prompt for one in asked], options.group,
                                  options.max_new_tokens, data.chat.stop_ids,
                                  options.temperature, (options.seed, step), room)
            rollout_seconds = time.perf_counter() - started

            # --- reward ---
            asked = [one for one in asked for _ in range(options.group)]
            rewards = torch.tensor([judge(reward, *one, data.chat) for one in zip(asked, answers)])
            rewards = rewards.view(-1, options.group)
            packs = make_packs(asked, answers, rewards, options)

            # --- update ---
            old, gaps, lr = [], [], learning_rate(step, total_steps, options)
            totals, norm = torch.zeros(3, device=device), torch.zeros(())
            for update in range(options.updates if packs else 0):
                for n, (pack, beside) in enumerate(packs):
                    log_p = model(**pack)
                    if update == 0:
                        old.append(log_p.detach())
                        gaps.append((old[n] - beside["sampled"]).abs().sum().item())
                    log_ref = reference_log_probs(model, pack, reference) if options.kl else None
                    loss, *counts = policy_loss(pack, beside, log_p, old[n], log_ref, options)
                    loss.backward()
                    totals += torch.stack((loss.detach(), *counts))
                before_step(model, adapter)
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip or math.inf)
                if nonfinite.check(totals[0].item(), norm.item(), step, [numbers], saved):
                    for group in optimizer.param_groups:
                        group["lr"] = lr * group["lr_ratio"]
                    optimizer.step()
                    after_step(model, adapter, step)
                optimizer.zero_grad(set_to_none=True)
            state["skipped"] += not packs  # with nothing to learn from, moments would move weights

            # --- log --- Changed from chapter-03: rewards come first.
            loss, clipped, kl = (totals / options.updates).tolist()
            gap = sum(gaps) / max(1, sum(len(pack["labelled"]) for pack, _ in packs))
            drawn = sum(len(one.ids) for one in answers)
            tokens = drawn + sum(len(one.prompt) for one in asked)
            state["step"], state["tokens"] = step, state["tokens"] + tokens
            metrics.log_step(step, loss, lr, norm.item(), tokens, time.perf_counter() - started,
                             memory.peak_memory_bytes(device), None, **summary(rewards, answers),
                             rollout_seconds=rollout_seconds, sampler_gap=gap,
                             clipped=clipped / drawn, kl=kl / drawn if options.kl else None)
            if gap > GAP:
                say(f"note: log p of a token differs by {gap:.2f} between drawing and training")
            rewards = rewards.flatten().tolist()
            if step % options.log_every == 0 or step == total_steps:
                n = step % len(asked)
                show(data.chat, asked[n], answers[n], rewards[n])
            for n in range(0, len(asked), options.group):
                if samples.path.stat().st_size < SAMPLES:
                    group = slice(n, n + options.group)
                    samples.write({
                        "step": step, "prompt": data.chat.decode(asked[n].prompt, False),
                        "answers": [data.chat.decode(a.ids, False) for a in answers[group]],
                        "rewards": rewards[group], "expected": asked[n].record["expected"]})

            # --- evaluate --- Changed from chapter-03: by the reward.
            if options.eval_every and (step % options.eval_every == 0 or step == total_steps):
                found = evaluate(model, held_out, judges, data.chat, options, room)
                metrics.log_eval(step, eval_loss=None, **found)
                runs.note_loss(state, step, -found["eval_reward"])

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
    if data.scored:
        prepare.ask(data, model, generate, metrics, total_steps)
    return finish(run, options, data, metrics, "../generate.py")


if __name__ == "__main__":
    run_main(main)
