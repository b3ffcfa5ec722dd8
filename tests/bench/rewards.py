"""GRPO and distillation: rollouts beside transformers' `generate`, the parts of a step, memory
beside its prediction, the divergence from a teacher beside its plain form. Development only.

    pip install transformers      (for `rollout`; without it that has ours alone)
    python tests/bench/rewards.py --parts rollout --models tiny --threads 1 --out tiny.json
    python tests/bench/rewards.py --parts rollout --models qwen3-0.6b --repeats 3 --out qwen.json
    OMP_NUM_THREADS=1 python tests/bench/rewards.py --parts step --threads 1 --out step.json
    python tests/bench/rewards.py --parts memory divergence --out rest.json

`rollout`: the same weights, prompts, answers to each, dtype, threads, limit and stop tokens, drawn
from softmax(logits) on a KV cache by both; of transformers in several forms, of which the fastest
counts. They take turns, another one first each time. A token counts if it was written for an
answer that had not ended, its stop token included. Rows "LoRA" have no peer: what the policy of a
run costs beside the plain model.
`step`: train_grpo.py on the tiny model as a user runs it, and where its seconds go.
`memory`: the peak of live tensors in a whole step, its rollout included, beside what --dry-run
predicts; the rollout's alone too.
`divergence`: a forward and backward, as time and as peak of live tensors above the inputs and their
gradients. Prints Markdown; --out is JSON.
"""

import argparse
import contextlib
import functools
import gc
import importlib.util
import io
import json
import math
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from random import Random
from unittest import mock

import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1]),
                str(Path(__file__).parents[2])]
from helpers import load
from live_memory import LivePeak
from report import adamw, conditions, show_conditions, table, write

from common import hub, predict, weights
from common.data.chat import Chat
from common.memory import keep_freed
from common.options import parse
from common.tiny import skills

grpo = load("chapter-03/post_training/train_grpo.py")
lora, modeling = load("chapter-03/lora.py"), load("chapter-03/modeling_llama.py")
quantized = load("chapter-03/quantized_model.py")
distill = load("chapter-03/post_training/distill.py")
teaching = load("chapter-03/post_training/train_distill.py")
logprobs = load("chapter-03/post_training/logprobs.py")
rollout = load("chapter-03/post_training/rollout.py").rollout
Problem = load("chapter-03/post_training/prompts.py").Problem
RANK, ALPHA = 8, 16.0


# --- rollouts beside transformers ---

def ours(kind, folder, dtype):
    """A function of (prompts, group, limit, stop_ids, seed), which gives the lengths of the answers
    that rollout() draws from a model "plain", with adapters ("LoRA"), or on NF4 ("QLoRA")."""
    config = modeling.LlamaConfig.from_dict(weights.read_config(folder))
    model = quantized.base_model(config, folder, dtype, base="nf4" if kind == "QLoRA" else "none")
    if kind != "plain":
        lora.apply_adapter(model, lora.AdapterConfig(rank=RANK, alpha=ALPHA))

    def draw(prompts, group, limit, stop_ids, seed):
        return [len(one.ids) for one in rollout(model, prompts, group, limit, stop_ids,
                                                seed=(seed,))]

    return draw


def transformers_forms(folder, dtype):
    """{name: a function as `ours` gives it} of transformers' generate, or why there is none."""
    if importlib.util.find_spec("transformers") is None:
        return {"transformers": "not installed"}
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None  # the stop tokens are given each time

    def form(repeated, **how):
        def draw(prompts, group, limit, stop_ids, seed):
            torch.manual_seed(seed)
            rows = [prompt for prompt in prompts for _ in range(group if repeated else 1)]
            longest = max(map(len, rows))
            ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
            found = model.generate(
                ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                max_new_tokens=limit, pad_token_id=0, use_cache=True,
                eos_token_id=sorted(stop_ids) or None,
                num_return_sequences=1 if repeated else group, **how)[:, longest:]
            return written(found, stop_ids)

        return draw

    return {"transformers, prompts repeated": form(True),
            "transformers, num_return_sequences": form(False),
            "transformers, static cache": form(True, cache_implementation="static")}


def written(found, stop_ids):
    """The length of each row of tokens up to its first stop token, which counts."""
    ends = torch.isin(found, torch.tensor(sorted(stop_ids), dtype=found.dtype))
    first = torch.where(ends.any(1), ends.int().argmax(1) + 1, found.shape[1])
    return first.tolist()


def tiny_work():
    """{name: (prompts, group, limit, stop_ids)} on the tiny model."""
    chat, random = Chat.load(hub.resolve("tiny")), Random(0)
    asked = {"add": [skills.record("add", "train", random) for _ in range(16)],
             "base": skills.records("base", "train", 16)}
    return {name: ([chat.encode_prompt(one["messages"][:1]) for one in records], 8, 24,
                   chat.stop_ids) for name, records in asked.items()}


def real_work(vocabulary, limit):
    """The same for the architecture of Qwen3-0.6B, with random prompts."""
    random = Random(0)
    prompts = [random.choices(range(vocabulary), k=random.randint(20, 200)) for _ in range(8)]
    stops = set(random.sample(range(vocabulary), vocabulary * 3 // 100))
    return {"equally long": (prompts, 8, limit, set()),
            "ends at random": (prompts, 8, limit, stops)}


def rollout_figures(options):
    """The part `rollout`: {model: {work: {row: its figures}}}."""
    figures = {}
    for name in options.models:
        with tempfile.TemporaryDirectory() as scratch:
            if name == "tiny":
                folder, dtype, work = hub.resolve("tiny"), torch.float32, tiny_work()
            else:
                folder, dtype = Path(options.weights or scratch), torch.bfloat16
                config = random_weights(name, folder, dtype)
                work = real_work(config["vocab_size"], options.limit)
            rows = {f"ours, {kind}": ours(kind, folder, dtype) for kind in options.kinds}
            rows |= {} if options.profile else transformers_forms(folder, dtype)
            figures[name] = {}
            for each, arguments in work.items():
                if options.profile:
                    print(f"\n{name}, {each}\n{profiled(next(iter(rows.values())), arguments)}")
                else:
                    figures[name][each] = found = take_turns(rows, arguments, options.repeats)
                    show_rollout(f"{name}, {each}", arguments, found)
            del rows
            gc.collect()
    return figures


def random_weights(name, folder, dtype):
    """Write a random model of a built-in architecture into a folder, if none is there."""
    config = weights.read_config(hub.resolve(name))
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        model = modeling.LlamaForCausalLM(modeling.LlamaConfig.from_dict(config)).to(dtype)
        weights.save_weights(model, config, folder)
    return config


def take_turns(rows, work, repeats):
    """{row: {"tokens_per_second", "spread", "repeats", "tokens"}, or why there is none}."""
    present = [name for name, draw in rows.items() if callable(draw)]
    seconds, busy, tokens = ({name: [] for name in present} for _ in range(3))
    prompts, group, limit, stop_ids = work
    for name in present:  # the first time is slower
        rows[name](prompts, group, min(4, limit), stop_ids, 0)
    for repeat in range(repeats):
        for turn in range(len(present)):
            name = present[(repeat + turn) % len(present)]
            started = time.perf_counter(), time.process_time()
            tokens[name].append(sum(rows[name](*work, repeat)))
            seconds[name].append(time.perf_counter() - started[0])
            busy[name].append(time.process_time() - started[1])
            print(f"{name}: {seconds[name][-1]:.2f} s", file=sys.stderr)
    figures = {name: why for name, why in rows.items() if not callable(why)}
    for name in present:
        rates = [count / time for count, time in zip(tokens[name], seconds[name])]
        middle = statistics.median(rates)
        figures[name] = {"tokens_per_second": middle, "spread": (max(rates) - min(rates)) / middle,
                         "repeats": rates, "tokens": tokens[name], "seconds": seconds[name],
                         "processor_seconds": busy[name]}
    peers = [figures[name] for name in present if not name.startswith("ours")]
    best = max(peers, key=lambda one: one["tokens_per_second"], default=None)
    for name in present:
        figures[name]["over"] = best and statistics.median(
            a / b for a, b in zip(figures[name]["repeats"], best["repeats"]))
        figures[name]["over_by_processor_time"] = best and statistics.median(
            a * d / b / c for a, b, c, d in zip(*(one[key] for key in (
                "tokens", "processor_seconds") for one in (figures[name], best))))
    return figures


def show_rollout(title, work, figures):
    prompts, group, limit, _ = work
    print(f"\n{title}: {len(prompts)} prompts of {min(map(len, prompts))} to "
          f"{max(map(len, prompts))} tokens x {group} answers of at most {limit}")
    table(["row", "tokens/s", "spread", "tokens an answer", "of transformers' fastest",
           "by processor time"], [
        [name, one, "", "", "", ""] if isinstance(one, str) else
        [name, f"{one['tokens_per_second']:.0f}", f"{one['spread']:.0%}",
         f"{statistics.mean(one['tokens']) / len(prompts) / group:.1f}",
         *(f"{one[key]:.2f}x" if one[key] else "unknown"
           for key in ("over", "over_by_processor_time"))] for name, one in figures.items()])


def profiled(draw, work):
    """The operators that take most of a rollout's time, their own alone, as text."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        draw(*work, 1)
    return profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=18,
                                        max_name_column_width=40)


# --- the parts of a step ---

PARTS = {"rollout": ("rollout",), "reward": ("judge", "summary"), "packing": ("make_packs",)}


def step_figures(options):
    """The part `step`: median seconds of steps 5 to --steps of train_grpo.py, and of its parts:
    what its functions take; the rest is the update, with what is written to files."""
    seconds = {part: [] for part in PARTS}

    def timed(part, function):
        def call(*arguments, **named):
            started = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                spent[part] += time.perf_counter() - started

        return call

    spent = dict.fromkeys(PARTS, 0.0)
    log_step = grpo.Metrics.log_step

    def end_of_step(*arguments, **named):
        for part in PARTS:
            seconds[part].append(spent[part])
            spent[part] = 0.0
        return log_step(*arguments, **named)

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        for part, names in PARTS.items():
            for name in names:
                stack.enter_context(mock.patch.object(
                    grpo, name, timed(part, getattr(grpo, name))))
        stack.enter_context(mock.patch.object(grpo.Metrics, "log_step", end_of_step))
        with contextlib.redirect_stdout(io.StringIO()):
            grpo.main(["--model", "tiny", "--data", "tiny", "--device", "cpu", "--steps",
                       str(options.steps), "--eval-every", "0", "--save-every", "0", "--out",
                       f"{folder}/run"])
        lines = [json.loads(line) for line in open(f"{folder}/run/metrics.jsonl")]
    lines = [line for line in lines if "step_seconds" in line]
    whole = [line["step_seconds"] for line in lines]
    seconds["update"] = [all_ - sum(parts) for all_, *parts in zip(whole, *seconds.values())]
    figures = {part: statistics.median(each[4:]) for part, each in
               {"step": whole, **seconds}.items()}
    kept = statistics.mean(1 - line["degenerate"] for line in lines[4:])
    print(f"\ntrain_grpo.py, tiny, 16 x 8 answers; median of steps 5 to {options.steps}; "
          f"{kept:.0%} of groups trained on")
    table(["part", "seconds", "of a step"], [
        [part, f"{one:.3f}", f"{one / figures['step']:.1%}"] for part, one in figures.items()])
    return {**figures, "step_seconds": whole, "trained_groups": kept,
            "rollout_seconds": [line["rollout_seconds"] for line in lines]}


# --- memory of a step ---

QWEN = ["--dry-run", "--model", "qwen3-0.6b", "--init", "random", "--data", "tiny", "--prompts",
        "4", "--group", "4", "--max-new-tokens", "64"]
RUNS = {  # name: the options of train_grpo.py, or of train_distill.py
    "GRPO, QLoRA": QWEN,
    "GRPO, LoRA": [*QWEN, "--quantize", "none"],
    "GRPO, LoRA, --kl, checkpointing": [*QWEN, "--quantize", "none", "--kl", "0.05",
                                        "--activation-checkpointing", "full"],
    "distillation, QLoRA, by itself": QWEN[:7],
}


def grpo_memory(arguments):
    """(peak bytes of live tensors in a whole step of train_grpo.py, the rollout's alone, the
    categories predicted), with random prompts and rewards, all answers of full length."""
    options = parse(grpo.Options, grpo.CHAPTER, "", grpo.TINY, grpo.REAL, arguments)
    source, device = hub.resolve(options.model), torch.device("cpu")
    config = modeling.LlamaConfig.from_dict(weights.read_config(source))
    adapter = lora.AdapterConfig(method=options.method, rank=options.rank, alpha=options.alpha)
    shapes = grpo.build(config, options, adapter)
    # Four documents fill a pack, as full packs are what is predicted.
    length, count = options.batch_tokens // 4, options.prompts * options.group
    problems = [Problem(torch.randint(config.vocab_size, (length - options.max_new_tokens,))
                        .tolist(), "", {}, "") for _ in range(options.prompts)]
    full = count * length > options.batch_tokens
    predicted = predict.costs(
        shapes, [length] * count, replace(options, grad_accum=1 + full), shapes.chunk)
    predicted = grpo.add_reference(predicted, shapes, options)
    room = grpo.add_rollout(predicted, config, options, count, length)
    model = grpo.build(config, options, adapter, device, source)
    model.loss = logprobs.chunked_log_probs
    reference = grpo.frozen_copy(model, options, device)
    optimizer = adamw(model, 1e-5)
    asked = [one for one in problems for _ in range(options.group)]

    def answer(limit=options.max_new_tokens):
        return rollout(model, [one.prompt for one in problems], options.group, limit, set(),
                       options.temperature, (0,), room)

    def step(limit=options.max_new_tokens):
        answers = answer(limit)
        rewards = torch.rand(options.prompts, options.group)
        for pack, beside in grpo.make_packs(asked, answers, rewards, options):
            log_p = model(**pack)
            log_ref = grpo.reference_log_probs(model, pack, reference) if options.kl else None
            loss, *_ = grpo.policy_loss(pack, beside, log_p, log_p.detach(), log_ref, options)
            loss.backward()
            del log_p, log_ref, loss, pack, beside
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    model.train()
    step(1)  # the first has no moments yet
    peaks = []
    for work in (answer, step):
        gc.collect()
        with LivePeak() as live:
            work()
        peaks.append(live.peak)
    return peaks[1], peaks[0], dict(predicted)


def distillation_memory(arguments):
    """The same of train_distill.py, for a full pack of random documents that are all trained; 0 for
    the rollout, as there is none."""
    options = parse(teaching.Options, teaching.CHAPTER, "", teaching.TINY, teaching.REAL, arguments)
    source, device = hub.resolve(options.model), torch.device("cpu")
    config = modeling.LlamaConfig.from_dict(weights.read_config(source))
    adapter = lora.AdapterConfig(method=options.method, rank=options.rank, alpha=options.alpha)
    shapes = teaching.build(config, options, adapter)
    length = options.batch_tokens // 4
    predicted = predict.costs(shapes, [length] * 4, options, shapes.chunk)
    teaching.add_teacher(predicted, shapes, shapes, options, None)
    model = teaching.build(config, options, adapter, device, source).train()
    optimizer = adamw(model, 1e-5)
    documents = [(ids, ids) for ids in torch.randint(config.vocab_size, (4, length))]
    pack, = teaching.packed(documents, options)

    def step():
        model.loss = functools.partial(
            distill.chunked_divergence, share=options.kd, beta=options.beta,
            **teaching.lesson(model, None, pack))
        loss, _ = model(**pack)
        loss.backward()
        del loss
        model.loss = None  # it holds what the teacher had to say
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()  # the first has no moments yet
    gc.collect()
    with LivePeak() as live:
        step()
    return live.peak, 0, dict(predicted)


def memory_figures(options):
    """The part `memory`: a dict of the runs."""
    figures = {}
    for name in options.runs:
        measure = grpo_memory if name.startswith("GRPO") else distillation_memory
        measured, drawing, predicted = measure([
            *RUNS[name], "--batch-tokens", str(options.batch_tokens), "--dtype", options.dtype])
        gc.collect()
        figures[name] = {"measured": measured, "rollout": drawing,
                         "predicted": sum(predicted.values()), "categories": predicted}
        print(f"{name}: {json.dumps(figures[name])}", flush=True)  # a run takes minutes
    table(["run", "measured MB", "its rollout MB", "predicted MB", "predicted / measured"], [
        [name, *(f"{one[key] / 1e6:.0f}" for key in ("measured", "rollout", "predicted")),
         f"{one['predicted'] / one['measured']:.3f}"] for name, one in figures.items()])
    return figures


# --- the divergence from a teacher ---

def plain_divergence(hidden, weight, teacher_hidden, teacher_weight, beta):
    """The sum of divergences, by the logits of all tokens in float32 and autograd."""
    log_q = (hidden @ weight.t()).float().log_softmax(-1)
    log_p = (teacher_hidden @ teacher_weight.t()).float().log_softmax(-1)
    if beta in (0, 1):
        first, second = (log_q, log_p) if beta == 0 else (log_p, log_q)
        return F.kl_div(first, second, reduction="sum", log_target=True)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return (beta * F.kl_div(log_m, log_p, reduction="sum", log_target=True)
            + (1 - beta) * F.kl_div(log_m, log_q, reduction="sum", log_target=True))


def divergence_figures(options):
    """The part `divergence`: a list with a dict for each β, number of tokens and form. The plain
    one is only measured on --plain-tokens: at 4096 it takes 12 GB, and 22 for a JSD."""
    V, D, dtype = options.vocab, options.width, getattr(torch, options.dtype)
    torch.manual_seed(0)
    weight, teacher_weight = ((torch.randn(V, D) * 0.05).to(dtype) for _ in range(2))
    figures, lines = [], []
    for T in sorted({options.plain_tokens, options.tokens}):
        hidden, teacher_hidden = (torch.randn(T, D).to(dtype) for _ in range(2))
        hidden.requires_grad_()
        labels = torch.randint(0, V, (T,))
        for beta in options.betas:
            forms = {"chunked": lambda: distill.chunked_divergence(
                hidden, weight, labels, teacher_hidden=teacher_hidden,
                teacher_weight=teacher_weight, beta=beta)[0]}
            if T == options.plain_tokens:
                forms["plain"] = lambda: plain_divergence(
                    hidden, weight, teacher_hidden, teacher_weight, beta)
            rows = {name: {"tokens": T, "beta": beta, "form": name, "seconds": []}
                    for name in forms}

            def step(name):
                loss = forms[name]()
                loss.backward()
                rows[name] |= {"loss": loss.item(), "gradient": hidden.grad}
                hidden.grad = None

            for name in forms:  # also the first time, which is slower
                with LivePeak() as live:
                    step(name)
                rows[name]["bytes"] = live.grown - hidden.nbytes
            for repeat in range(options.repeats):
                for name in sorted(forms, reverse=repeat % 2):
                    started = time.perf_counter()
                    step(name)
                    rows[name]["seconds"].append(time.perf_counter() - started)
            gradients = [row.pop("gradient").float() for row in rows.values()]
            for row in rows.values():
                shown = ["", "", "", ""]
                if "plain" in rows:
                    plain, middle = rows["plain"], statistics.median(row["seconds"])
                    row |= {"memory": row["bytes"] / plain["bytes"],
                            "time": middle / statistics.median(plain["seconds"]),
                            "loss_error": abs(row["loss"] / plain["loss"] - 1),
                            "gradient_error": ((gradients[0] - gradients[1]).norm()
                                               / gradients[1].norm()).item()}
                    shown = [f"{row['time']:.2f}", f"{row['memory']:.1%}",
                             f"{row['loss_error']:.1e}", f"{row['gradient_error']:.1e}"]
                lines.append([beta, T, row["form"], f"{statistics.median(row['seconds']):.2f}",
                              f"{row['bytes'] / 1e6:.0f}", *shown])
                figures.append(row)
    print(f"\nV {V}, D {D}, {options.dtype}, both heads frozen; median of {options.repeats}")
    table(["β", "T", "form", "seconds", "MB above inputs and gradients", "time of plain",
           "memory of plain", "loss's error", "gradient's"], lines)
    return figures


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parts = {"rollout": rollout_figures, "step": step_figures, "memory": memory_figures,
             "divergence": divergence_figures}
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--models", nargs="+", choices=("tiny", "qwen3-0.6b"),
                        default=["tiny", "qwen3-0.6b"], help="rollout")
    parser.add_argument("--kinds", nargs="+", choices=("plain", "LoRA", "QLoRA"),
                        default=["plain"], help="rollout: of our model")
    parser.add_argument("--limit", type=int, default=64,
                        help="rollout: most tokens of an answer of the larger model")
    parser.add_argument("--weights", help="rollout: a folder to keep its random weights in")
    parser.add_argument("--profile", action="store_true", help="rollout: where our time goes")
    parser.add_argument("--steps", type=int, default=40, help="step")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16",
                        help="memory, divergence")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="memory")
    parser.add_argument("--batch-tokens", type=int, default=1024, help="memory")
    parser.add_argument("--tokens", type=int, default=4096, help="divergence: T")
    parser.add_argument("--plain-tokens", type=int, default=1024,
                        help="divergence: T of the plain form, which needs far more memory")
    parser.add_argument("--vocab", type=int, default=151_936, help="divergence: V")
    parser.add_argument("--width", type=int, default=1024, help="divergence: D")
    parser.add_argument("--betas", type=float, nargs="+", default=[0.0, 0.5, 1.0],
                        help="divergence")
    parser.add_argument("--out", help="file for the figures, as JSON")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    keep_freed("cpu")  # as every run of ours does; it helps both
    found = conditions()
    show_conditions(found)
    figures = {part: parts[part](options) for part in options.parts}
    write(options.out, {**found, "options": vars(options), "figures": figures})


if __name__ == "__main__":
    main()
