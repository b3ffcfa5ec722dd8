"""DPO: a step beside TRL's, log p of tokens beside the plain form, memory beside its prediction.
Development only.

    pip install transformers peft trl datasets      (for `peers`; without them that has ours alone)
    python tests/bench/dpo.py --parts peers --out peers.json
    python tests/bench/dpo.py --parts peers --dtype float32 --steps 3   (are the losses the same?)
    python tests/bench/dpo.py --parts logprobs memory --out rest.json

`peers`: the same pairs, in the same order, from the same weights, with the same optimizer, clipping
and threads, on LoRA and on all weights. A step is the reference's forward, the policy's forward and
backward, clipping and fused AdamW; of TRL it is its collator and `training_step`. All take turns
step by step, another one first each time. Padding is no work done.
`logprobs`: a forward and backward of log p, as time and as peak of live tensors above the inputs
and their gradients.
`memory`: the peak of live tensors in a whole step of train_dpo.py, the reference included, beside
what --dry-run predicts. Prints Markdown; --out is JSON.
"""

import argparse
import gc
import importlib.util
import json
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1]),
                str(Path(__file__).parents[2])]
from contestants import SIZES, WARM, Row, config_of
from helpers import ROOT, load
from live_memory import LivePeak
from loss_bench import chunked_cross_entropy, plain_cross_entropy
from peers import TOLERANCE, compare_losses, measure, report
from report import adamw, conditions, show_conditions, table, write

from common import hub, predict, prepare, weights
from common.options import parse

dpo = load("chapter-03/post_training/train_dpo.py")
lora, modeling = load("chapter-03/lora.py"), load("chapter-03/modeling_llama.py")
logprobs = load("chapter-03/post_training/logprobs.py")
RANK, ALPHA, BETA = 8, 16, 0.1
SHORTEST, LONGEST = 16, 512  # tokens of a prompt with its answer


# --- beside TRL ---

def random_pairs(count, vocabulary, spread, seed=0):
    """Pairs of documents as (input_ids, labels), of which the answer is trained. The lengths of
    prompts and answers are log-normal, as `encode.virtual`'s; half are below 64 tokens. `spread` is
    the standard deviation of their logarithm; with 0 all are equally long, so nothing is padded."""
    random = np.random.default_rng(seed)
    lengths = np.exp(random.normal(np.log(LONGEST / 8), spread, (count, 3)))
    pairs = []
    for prompt, *answers in np.clip(lengths, SHORTEST // 2, LONGEST // 2).astype(int).tolist():
        start = torch.from_numpy(random.integers(0, vocabulary, prompt))
        ends = [torch.from_numpy(random.integers(0, vocabulary, length)) for length in answers]
        pairs.append([(torch.cat((start, end)), torch.cat((torch.full_like(start, -100), end)))
                      for end in ends])
    return pairs


def in_pairs(documents):
    return list(zip(documents[::2], documents[1::2]))


def loss_options(method="lora"):
    return argparse.Namespace(loss="dpo", beta=BETA, nll=0.0, label_smoothing=0.0, gamma=0.0,
                              method=method, dtype="bfloat16", needs_reference=True)


def ours(kind, folder, dtype, adapters):
    """A row of train_dpo.py; `adapters` is a dict that gets the first values, for the peer."""
    model = modeling.LlamaForCausalLM(modeling.LlamaConfig.from_dict(weights.read_config(folder)))
    weights.load_weights(model, folder)
    model.compute_dtype, model.loss = dtype, logprobs.chunked_log_probs
    options = loss_options("full" if kind == "dense" else kind)
    options.dtype = str(dtype).removeprefix("torch.")
    if kind == "lora":
        model = lora.apply_adapter(model.to(dtype), lora.AdapterConfig(rank=RANK, alpha=ALPHA))
        adapters.update({name: p.detach().clone() for name, p in model.named_parameters()
                         if "lora_" in name})
    reference = dpo.frozen_copy(model, options, torch.device("cpu"))

    def loss(documents, _):
        losses, _ = dpo.scored(model, reference, dpo.collate_pairs(in_pairs(documents)), options)
        return losses.sum() / len(losses)

    held = model if reference is None else nn.ModuleList([model, reference])
    return Row(f"ours, packed, {kind}", True, held.train(), loss)


class TrlRow(Row):
    """TRL's collator and its `training_step`, which includes the backward and what it reports."""

    def step(self, documents):
        trainer = self.trainer
        batch = trainer.data_collator([{
            "prompt_ids": ids[labels < 0].tolist(), "chosen_ids": ids[labels >= 0].tolist(),
            "rejected_ids": others[other_labels >= 0].tolist()}
            for (ids, labels), (others, other_labels) in in_pairs(documents)])
        loss = trainer.training_step(self.policy, batch)
        trainer._metrics["train"].clear()  # else they would grow, as nothing logs them
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def trl_row(kind, folder, stored, autocast, adapters, scratch, same=True):
    """A row of TRL's DPOTrainer, padded: the weights kept in `stored`, products under autocast or
    not; or why there is none."""
    name = f"TRL, {kind}, {str(stored).removeprefix('torch.')} weights" + ", autocast" * autocast
    absent = [p for p in ("transformers", "peft", "trl", "datasets")
              if importlib.util.find_spec(p) is None]
    if absent:
        return Row(name, False, missing=f"not installed: {', '.join(absent)}")
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    def read(dtype):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(ROOT / "common/tiny/tokenizer.json"),
        eos_token="<|im_end|>", pad_token="<|endoftext|>")
    arguments = DPOConfig(
        output_dir=scratch, use_cpu=True, bf16=autocast, gradient_checkpointing=False, beta=BETA,
        max_length=None, report_to=[], disable_tqdm=True, save_strategy="no", seed=0,
        dataloader_pin_memory=False)
    # As TRL itself reads it: in another dtype the first loss would not be ln 2.
    with_reference = {"ref_model": read(stored)}
    with_adapter = {"peft_config": LoraConfig(r=RANK, lora_alpha=ALPHA,
                                              target_modules="all-linear")}
    trainer = DPOTrainer(
        read(stored), args=arguments, processing_class=tokenizer,
        # Not trained on: the steps get their pairs as tokens.
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        **(with_reference if kind == "dense" else with_adapter))
    own = dict(trainer.model.named_parameters())
    for part, value in adapters.items():
        own[f"base_model.model.{part}.default.weight"].data.copy_(value)
    policy = trainer.accelerator.prepare_model(trainer.model)  # autocast begins here
    held = policy if trainer.ref_model is None else nn.ModuleList([policy, trainer.ref_model])
    row = TrlRow(name, False, held, same=same)
    row.trainer, row.policy = trainer, policy.train()
    trainer.current_gradient_accumulation_steps = 1  # as its loop would set it
    return row


def beside_trl(options):
    """The part `peers`; gives its figures, and the largest gap of losses."""
    dtype, config = getattr(torch, options.dtype), config_of(options.size)
    count = WARM + options.steps * options.repeats
    pairs = random_pairs(count * options.pairs, config["vocab_size"], options.spread)
    steps = [[document for pair in pairs[i:i + options.pairs] for document in pair]
             for i in range(0, len(pairs), options.pairs)]
    tokens = sum(len(ids) for step in steps for ids, _ in step)
    padded = sum(len(step) * max(len(ids) for ids, _ in step) for step in steps)
    print(f"\n{options.size}: {options.dtype}, {options.pairs} pairs a step in {tokens / count:.0f}"
          f" tokens, {padded / tokens:.1f} times as many when padded; median of {options.repeats} "
          f"repeats of {options.steps} steps")
    figures, worst = {}, 0
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as scratch:
        torch.manual_seed(0)
        model = modeling.LlamaForCausalLM(modeling.LlamaConfig.from_dict(config))
        weights.save_weights(model, config, folder)
        del model
        for kind in options.kinds:
            adapters = {}
            rows, wide = [ours(kind, folder, dtype, adapters)], torch.float32
            forms = [(wide, False, True)]
            if dtype != wide and kind == "lora":
                forms = [(dtype, False, True), (dtype, True, True), (wide, True, True)]
            elif dtype != wide:  # pure bfloat16: less exact, and less work
                forms = [(wide, True, True), (dtype, False, False)]
            rows += [trl_row(kind, folder, stored, autocast, adapters, scratch, same)
                     for stored, autocast, same in forms]
            present = [row for row in rows if not row.missing]
            measure(present, steps, options)
            for row in present:
                row.figures["pairs_per_second"] = (
                    row.figures["tokens_per_second"] * len(pairs) / tokens)
            report(kind, rows)
            table(["row", "pairs/s", "first loss less ln 2"], [
                [row.name, f"{row.figures['pairs_per_second']:.2f}",
                 f"{row.losses[0] - math.log(2):.1e}"] for row in present])
            worst = max(worst, compare_losses(rows) or 0)
            if options.profile:
                for row in present:
                    print(f"\n{row.name}\n{profiled(row, steps[-1])}")
            figures[kind] = {row.name: row.figures or row.missing for row in rows}
            del rows, present
            gc.collect()
    return figures, worst


def profiled(row, documents):
    """The operators that take most of a step's time, their own alone, as text."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        row.step(documents)
    return profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=18,
                                        max_name_column_width=40)


# --- log p of tokens ---

def plain_log_probs(hidden, weight, labels):
    """log p of each token, (T,), by the logits of all."""
    logits = (hidden @ weight.to(hidden.dtype).t()).float()
    return logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]


def log_prob_figures(options):
    """The part `logprobs`: a list with a dict for each head and form."""
    T, V, D = options.tokens, options.vocab, options.width
    torch.manual_seed(0)
    labels, weigh = torch.randint(0, V, (T,)), torch.randn(T)
    dtype, figures = getattr(torch, options.dtype), []
    for head, stored in (("frozen", dtype), ("trained", torch.float32)):
        hidden = torch.randn(T, D, dtype=dtype, requires_grad=True)
        weight = (torch.randn(V, D) * 0.05).to(stored).requires_grad_(head == "trained")
        forms = {"log p, plain": (plain_log_probs, weigh),
                 "log p, chunked": (logprobs.chunked_log_probs, weigh),
                 "cross-entropy, plain": (plain_cross_entropy, torch.ones(())),
                 "cross-entropy, chunked": (chunked_cross_entropy, torch.ones(()))}
        rows = {name: {"head": head, "form": name, "seconds": []} for name in forms}

        def step(name):
            function, gradient = forms[name]
            function(hidden, weight, labels).backward(gradient)
            hidden.grad = weight.grad = None

        for name in forms:  # also the first time, which is slower
            with LivePeak() as live:
                step(name)
            rows[name]["bytes"] = live.grown - hidden.nbytes - weight.nbytes * weight.requires_grad
        for repeat in range(options.repeats):
            for name in sorted(forms, reverse=repeat % 2):
                started = time.perf_counter()
                step(name)
                rows[name]["seconds"].append(time.perf_counter() - started)
        figures += rows.values()
        del hidden, weight
    print(f"\nT {T}, V {V}, D {D}, {options.dtype}; median of {options.repeats}")
    lines = []
    for row in figures:
        plain = next(one for one in figures
                     if (one["head"], one["form"]) == (row["head"], "log p, plain"))
        middle, other = (statistics.median(one["seconds"]) for one in (row, plain))
        row |= {"memory": row["bytes"] / plain["bytes"], "time": middle / other}
        lines.append([row["head"], row["form"], f"{middle:.2f}", f"{row['time']:.2f}",
                      f"{row['bytes'] / 1e6:.0f}", f"{row['memory']:.1%}"])
    table(["head", "form", "seconds", "of plain log p", "MB above inputs and gradients",
           "of plain log p"], lines)
    return figures


# --- memory of a step ---

QWEN = ["--model", "qwen3-0.6b", "--init", "random", "--data", "virtual"]
RUNS = {  # name: the options of train_dpo.py; "mid" is the folder of a config.json
    "QLoRA": QWEN,
    "QLoRA, checkpointing": [*QWEN, "--activation-checkpointing", "full"],
    "LoRA": [*QWEN, "--quantize", "none"],
    "LoRA, checkpointing": [*QWEN, "--quantize", "none", "--activation-checkpointing", "full"],
    "full, mid": ["--model", "mid", "--init", "random", "--data", "virtual", "--method", "full",
                  "--quantize", "none"],
    "full, mid, two packs": ["--model", "mid", "--init", "random", "--data", "virtual", "--method",
                             "full", "--quantize", "none", "--grad-accum", "2"],
}


def step_memory(arguments):
    """(peak bytes of live tensors in a whole step of train_dpo.py, the categories predicted)."""
    options = parse(dpo.Options, dpo.CHAPTER, "", dpo.TINY, dpo.REAL, arguments)
    source = hub.resolve(options.model)
    config = modeling.LlamaConfig.from_dict(weights.read_config(source))
    adapter = lora.AdapterConfig(method=options.method, rank=options.rank, alpha=options.alpha)
    shapes = dpo.build(config, options, adapter)
    data = prepare.load(options, source, config, None, dpo.PairRecords,
                        lambda encoded: dpo.Pairs.of(encoded, options.batch_tokens))
    predicted = dpo.add_reference(
        predict.costs(shapes, data.train.document_lengths(), options, shapes.chunk), shapes,
        options)
    model = dpo.build(config, options, adapter, torch.device("cpu"), source)
    model.loss = logprobs.chunked_log_probs
    reference = dpo.frozen_copy(model, options, torch.device("cpu"))
    optimizer = adamw(model, 1e-5)
    # The fullest packs, as their prediction is what is compared.
    sampler = dpo.PackSampler(data.train.lengths, options.batch_tokens, options.seed)
    fullest = sorted((sampler.pack(i) for i in range(min(40, sampler.packs_in(1)))), reverse=True,
                     key=lambda pack: sampler.lengths[pack].sum())[:options.grad_accum]
    packs = [dpo.collate_pairs([data.train.pair(i) for i in pack]) for pack in fullest]
    model.train()

    def step():
        count = sum(map(len, fullest))
        for pack in packs:
            losses, _ = dpo.scored(model, reference, pack, options)
            (losses.sum() / count).backward()
            del losses
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()  # the first has no moments yet
    gc.collect()
    with LivePeak() as live:
        step()
    return live.peak, dict(predicted)


def memory_figures(options):
    """The part `memory`: a dict of the runs."""
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config_of("mid")))
        for name in options.runs:
            arguments = [folder if one == "mid" else one for one in RUNS[name]]
            measured, predicted = step_memory([
                *arguments, "--batch-tokens", str(options.batch_tokens), "--dtype", options.dtype])
            gc.collect()
            figures[name] = {"measured": measured, "predicted": sum(predicted.values()),
                             "categories": predicted}
            print(f"{name}: {json.dumps(figures[name])}", flush=True)  # a run takes minutes
    table(["run", "measured MB", "predicted MB", "predicted / measured"], [
        [name, f"{one['measured'] / 1e6:.0f}", f"{one['predicted'] / 1e6:.0f}",
         f"{one['predicted'] / one['measured']:.3f}"] for name, one in figures.items()])
    return figures


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=("peers", "logprobs", "memory"),
                        default=["peers", "logprobs", "memory"])
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--steps", type=int, default=5, help="peers: steps of each repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", choices=SIZES, default="mid", help="peers: of the model")
    parser.add_argument("--kinds", nargs="+", choices=("lora", "dense"), default=["lora", "dense"])
    parser.add_argument("--pairs", type=int, default=8, help="peers: pairs of a step")
    parser.add_argument("--spread", type=float, default=0.8,
                        help="peers: of the lengths; 0: all the same, so that nothing is padded")
    parser.add_argument("--lr", type=float, default=1e-4, help="peers")
    parser.add_argument("--profile", action="store_true", help="peers: where a step's time goes")
    parser.add_argument("--tokens", type=int, default=4096, help="logprobs: T")
    parser.add_argument("--vocab", type=int, default=151_936, help="logprobs: V")
    parser.add_argument("--width", type=int, default=1024, help="logprobs: D")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="memory")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="memory")
    parser.add_argument("--out", help="file for the figures, as JSON")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    found, figures, worst = conditions(), {}, 0
    show_conditions(found)
    if "peers" in options.parts:
        figures["peers"], worst = beside_trl(options)
    if "logprobs" in options.parts:
        figures["logprobs"] = log_prob_figures(options)
    if "memory" in options.parts:
        figures["memory"] = memory_figures(options)
    write(options.out, {**found, "options": vars(options), "figures": figures})
    if options.dtype == "float32" and worst > TOLERANCE:
        print(f"not the same work: {worst:.1e} is more than {TOLERANCE:g}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
