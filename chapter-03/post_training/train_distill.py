"""Learn from a teacher: another model's distribution over each token, or this model's own of before.

    python chapter-03/post_training/train_distill.py        new skills, with the old ones guarded
    python chapter-03/post_training/train_distill.py --model Qwen/Qwen3-0.6B \\
        --teacher Qwen/Qwen3-4B --data my.jsonl --on-policy 0.5

The loop is chapter 3's, without compiling. New are the teacher's pass, the divergence in place of
the cross-entropy, and answers that the student writes itself, for the teacher to correct.
"""

import math
import sys
import time
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

sys.path[:0] = map(str, Path(__file__).resolve().parents[1:3])

import torch

from common import guard, hub, memory, predict, prepare, runs, weights
from common.adapters.merging import merge_into
from common.adapters.peft import save_adapter
from common.asking.generation import generate
from common.errors import UserError, located, run_main
from common.files.checkpoint import latest, new_run_folder, verify
from common.files.state import load_state
from common.metrics import COLUMNS, Metrics
from common.options import option, parse, save_options
from common.ranks import any_rank, full_tensor, say, start_ranks, stop_ranks, world_size
from common.tiny import skills
import lora
from distill import chunked_divergence
from lora import AdapterConfig, after_step, before_step, optimizer_groups, state_names
from loss import chunked_cross_entropy
from modeling_llama import LlamaConfig
from packing import PackSampler, packed_sequence_collate_fn
from prompts import Problems, problems
from quantized_model import build, check_base, check_options, mark
from reference import check_training
from rollout import document, rollout
from rollout_size import add_rollout
from teacher import add_teacher, lesson, load_teacher
from train import Options as LoopOptions, evaluate, learning_rate

CHAPTER = "03-distill"
TINY = {"lr": {"full": 1e-3, "vera": 3e-2, "lora+": 1e-3, "default": 5e-3}, "warmup": 20,
        "steps": 120, "batch_tokens": 1024, "dtype": "float32", "rank": 8, "alpha": 16.0,
        "eval_every": 40, "save_every": 60, "delta_start": 60, "teacher": "self", "kd": 0.0,
        "beta": 1.0, "on_policy": 0.3, "max_new_tokens": 24}
REAL = {"lr": {"full": 1e-5, "vera": 2e-3, "default": 2e-4}, "warmup": 20, "rank": 16,
        "alpha": 32.0, "kd": 0.5, "beta": 0.0, "on_policy": 0.0, "max_new_tokens": 256}


# Changed from chapter-03: the teacher, and answers of one's own.
@dataclass
class Options(LoopOptions):
    """Chapter 3's options, and those of the teacher, the divergence and the rollouts."""

    gpu_data = None  # not an option: auto is tiny on a GPU too
    teacher: str = option(None, "who teaches: self (this model before training, its adapters off),"
                                " or a folder or Hub id with the same tokenizer")
    kd: float = option(None, "λ, the teacher's share in the loss of a document of --data; the rest "
                             "is cross-entropy", least=0)
    beta: float = option(None, "β: 0 forward KL, 1 reverse KL, between them JSD", least=0)
    kd_temperature: float = option(1.0, "τ, which softens both distributions", least=1e-3)
    on_policy: float = option(None, "share of a step's documents that the student writes itself, "
                                    "from prompts; of these only the teacher's part counts", least=0)
    prompts: str = option(None, "where these prompts come from, written as --data is (default: "
                                "--data; tiny: the skills that the model has)")
    max_new_tokens: int = option(None, "longest answer in tokens", least=1)
    temperature: float = option(1.0, "of what the student writes", least=1e-3)

    @property
    def needs_reference(self):
        return self.teacher == "self"


def check_teaching(options):
    """Raise UserError for options that make no sense with a teacher."""
    if options.teacher is None:
        raise UserError("--teacher: give a folder or Hub id, or self")
    for name in ("kd", "beta", "on_policy"):
        if getattr(options, name) > 1:
            raise UserError(f"--{name.replace('_', '-')} is a share: 1 at most")
    if options.on_policy and world_size() > 1:
        raise UserError("--on-policy runs on one process: of a sharded model, each token of an "
                        "answer would gather every layer")


def prompts_of(options, data, limit):
    """The Problems of --on-policy: of --prompts, or of the training data."""
    if options.prompts is None and data.scored:
        records = skills.records("base", "train", 2000, options.seed)
        return problems(data.chat, None, records, limit)
    if options.prompts is None:
        return problems(data.chat, data.train, data.records[0], limit)
    return problems(data.chat, None, Problems(hub.resolve_data(options.prompts, "--prompts")), limit)


def main(argv=None):
    # --- options --- Changed from chapter-03: the teacher.
    options = parse(Options, CHAPTER, __doc__.split("\n\n")[0], TINY, REAL, argv)
    check_options(options)
    check_training(options)
    check_teaching(options)
    device, dtype = start_ranks(options.device), getattr(torch, options.dtype)
    if options.method == "delta-lora" and world_size() > 1:
        raise UserError("--method delta-lora runs on one process: it moves whole weights")
    torch.manual_seed(options.seed)
    adapter = AdapterConfig(**{f.name: getattr(options, f.name) for f in fields(AdapterConfig)})

    # --- model files and data --- Changed from chapter-03: prompts.
    source = hub.resolve(options.model)
    verify(source)
    config_json = weights.read_config(source)
    with located(source / "config.json"):
        config = LlamaConfig.from_dict(check_base(config_json, options))
    shapes = build(config, options, adapter)  # enough to predict what the run will need
    if isinstance(shapes.lm_head, lora.LoRALinear):
        raise UserError("--target-modules: distillation needs a plain output head; leave lm_head out")
    predict.fit_batch(options, shapes, shapes.chunk)
    data = prepare.load(options, source, config, skills="new")
    prompts = []
    if options.on_policy:
        limit = min(options.max_seq_len, options.batch_tokens, config.max_position_embeddings)
        prompts = prompts_of(options, data, limit - options.max_new_tokens)

    # --- what it will need --- Changed from chapter-03: the teacher, the rollouts.
    sampler = PackSampler(data.train.lengths, options.batch_tokens, options.seed)
    packs_per_step = world_size() * options.grad_accum
    total_steps = options.steps or math.ceil(sampler.packs_in(options.epochs) / packs_per_step)
    predicted = predict.costs(shapes, data.train.lengths, options, shapes.chunk)
    vocabulary = add_teacher(predicted, shapes, options, data.chat)
    if prompts:
        order = PackSampler([1] * len(prompts), 1, options.seed)  # of prompts, one by one
        longest = max(len(one.prompt) for one in prompts) + options.max_new_tokens
        room = add_rollout(predicted, config, options, options.batch_tokens, longest)
    say(predicted.report())
    if total_steps < options.warmup:
        say(f"note: only {total_steps} of the {options.warmup} warm-up steps will happen; see "
            "--epochs, --steps, --warmup")
    if options.dry_run:
        return 0

    # --- model --- Changed from chapter-03: the teacher.
    home = device if world_size() == 1 else torch.device("cpu")
    model = build(config, options, adapter, home, source)
    teacher = load_teacher(model, options, device)  # None: the model itself, adapters off
    # Adapters and a base that is already in `dtype` are gathered as they are.
    shard(model, device, dtype if options.method == "full" else None)
    model.to(device)
    teach = partial(chunked_divergence, vocabulary=vocabulary, beta=options.beta,
                    temperature=options.kd_temperature)

    # --- optimizer --- Copied from chapter-03/train.py
    groups = optimizer_groups(model, adapter, options.lr, options.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95),
                                  fused=device.type != "mps")
    names = state_names(model)  # what training can change: all that a checkpoint has to hold

    # --- run folder, resume --- Changed from chapter-03: what the screen shows; the next prompt.
    saved = None  # the last whole checkpoint
    state = {"step": 0, "next_pack": 0, "next_prompt": 0, "tokens": 0, "best_loss": None,
             "best_step": None, "eval_loss": None}
    if options.resume:
        run = Path(options.resume)
        saved = latest(run)
        if saved is not None:
            state = load_state(saved, model, optimizer, names)
        say(f"resuming {run} after step {state['step']}")
    else:
        run = new_run_folder(f"chapter-{CHAPTER}", options.out)
    save_options(options, CHAPTER, run, data)
    metrics = Metrics(run, total_steps, options.tensorboard, options.log_every, state["step"])
    metrics.columns = SCREEN

    # --- before --- Copied from chapter-03/train.py
    if saved is None:  # the beginning, also of a run that was stopped before its first checkpoint
        data.show_example()
        say(f"run folder: {run}")
        prepare.ask(data, model, generate, metrics, 0)

    # --- loop --- Changed from chapter-03: what the student writes depends on the step before.
    nonfinite = guard.NonFinite()
    memory.keep_freed(device)
    model.train()
    with guard.caught_signals() as signals, guard.memory_advice(options, predicted):
        for step in range(state["step"] + 1, total_steps + 1):
            started = time.perf_counter()

            # --- write --- the student's own documents, in place of some of the step's
            mine = range(state["next_pack"] + this_rank(), state["next_pack"] + packs_per_step,
                         world_size())
            documents = [n for index in mine for n in sampler.pack(index)]
            state["next_pack"] += packs_per_step
            own = round(options.on_policy * len(documents))
            written = []
            if own:
                asked = [prompts[order.pack(state["next_prompt"] + i)[0]].prompt
                         for i in range(own)]
                state["next_prompt"] += own
                answers = rollout(model, asked, 1, options.max_new_tokens, data.chat.stop_ids,
                                  options.temperature, (options.seed, step), room)
                written = list(map(document, asked, answers))

            # --- accumulate --- Changed from chapter-03: the teacher's part.
            packs = [(pack, options.kd) for pack in packed(
                [data.train[n] for n in documents[own:]], options)]
            packs += [(pack, 1.0) for pack in packed(written, options)]
            counts = torch.tensor([sum(len(pack["labelled"]) * one for pack, share in packs)
                                   for one in (1,)])
            totals = torch.zeros(3, device=device)
            for pack, share in packs:
                more = lesson(model, teacher, pack) if share else None
                ...
