"""Predict a training step, measure it, and show both side by side: time and memory.

    python chapter-03/profiling/profile_step.py                              the embedded tiny model
    python chapter-03/profiling/profile_step.py --model chapter-03/profiling/mid --init random \
        --data virtual
    python chapter-03/profiling/profile_step.py --model qwen3-0.6b --init random --data virtual \
        --method full --quantize none --compile

It takes the options of train.py, and profiles a step on the first pack of that run. Time is divided
into six buckets (buckets.py), memory into six categories (anatomy.py). Writes `trace.json.gz`, a
timeline of the step, and `profile.json`, all figures.
"""

import json
import math
import sys
from dataclasses import dataclass, fields
from pathlib import Path

sys.path[:0] = map(str, Path(__file__).resolve().parents[1:3])

import torch

import anatomy
import buckets
import operators
from common import hub, predict, prepare, weights
from common.errors import UserError, located, run_main
from common.files.checkpoint import new_run_folder
from common.files.manifest import verify
from common.memory import keep_freed
from common.options import option, parse
from common.ranks import start_ranks, stop_ranks, world_size
from lora import AdapterConfig, after_step, before_step, optimizer_groups
from compiling import compile_model
from modeling_llama import LlamaConfig
from packing import PackSampler, StaticShape, packed_sequence_collate_fn
from quantized_model import build, check_base, check_options
from train import CHAPTER, REAL, TINY, Options, to_device


@dataclass
class ProfileOptions(Options):
    """The options of train.py, and one more."""

    snapshot: bool = option(False, "on CUDA: write snapshot.pickle, a record of every "
                                "allocation")


def model_and_optimizer(options, adapter, source, config, device, fused):
    """As in train.py, except that random weights are drawn on the device."""
    torch.manual_seed(options.seed)
    model = build(config, options, adapter, device, source, draw_on=device).train()
    groups = optimizer_groups(model, adapter, options.lr, options.weight_decay)
    return model, torch.optim.AdamW(
        groups, lr=options.lr, betas=(0.9, 0.95), foreach=False, fused=fused)


def step_of(model, optimizer, pack, adapter, clip, finish=None):
    """A function that takes one optimizer step on `pack`, its parts in named regions. The loss is
    the model's own, or `finish(logits, labels)`."""
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step():
        loss = buckets.loss_of(model, pack, finish)
        with buckets.region("backward"):
            (loss / max(1, len(pack["labelled"]))).backward()
        with buckets.region("optimizer"):
            before_step(model, adapter)
            torch.nn.utils.clip_grad_norm_(parameters, clip or math.inf)
            optimizer.step()
            after_step(model, adapter, 1)
            optimizer.zero_grad(set_to_none=True)

    return step


def main(argv=None):
    # --- what a run would have ---
    options = parse(ProfileOptions, CHAPTER, __doc__.split("\n\n")[0], TINY, REAL, argv)
    if options.dry_run or options.resume or world_size() > 1:
        raise UserError("profile_step.py profiles one step on one device: leave out --dry-run, "
                        "--resume and torchrun")
    check_options(options)
    device = start_ranks(options.device)
    keep_freed(device)
    source = hub.resolve(options.model)
    verify(source)
    with located(source / "config.json"):
        config = LlamaConfig.from_dict(check_base(weights.read_config(source), options))
    adapter = AdapterConfig(**{f.name: getattr(options, f.name) for f in fields(AdapterConfig)})
    shapes = build(config, options, adapter)
    predict.fit_batch(options, shapes, shapes.chunk)
    data = prepare.load(options, source, config, skills="new").train
    model, optimizer = model_and_optimizer(
        options, adapter, source, config, device, fused=device.type != "mps")
    sampler = PackSampler(data.lengths, options.batch_tokens, options.seed)
    shape = StaticShape.of((sampler, sampler.packs_in(1))) if options.compile else None
    pack = packed_sequence_collate_fn([data[i] for i in sampler.pack(0)], shape)
    pack, tokens = to_device(pack, device), len(pack["labels"])

    # --- predicted ---
    prediction = predict.costs(model, data.lengths, options, model.chunk)
    memory = anatomy.predicted(model, prediction)
    print(prediction.report())
    ops = operators.record(model, pack, compiled=options.compile)
    peak, bandwidth = operators.ceilings(device, model.compute_dtype)
    print(f"\nceilings    {peak / 1e9:,.0f} GFLOP/s in a large {options.dtype} product, "
          f"{bandwidth / 1e9:.1f} GB/s in a large copy")
    times = operators.predict(model, pack, ops, device)
    total = sum(alone for _, alone in times.values())
    print(f"predicted   {1e3 * total:.1f} ms a step of {tokens} tokens, {tokens / total:,.0f} "
          "tokens a second")

    # --- measured ---
    if options.compile:
        compile_model(model)
    step = step_of(model, optimizer, pack, adapter, options.clip)
    step()  # makes the optimizer's moments, and compiles
    plain = buckets.duration(step, device, repeats=3)
    out = new_run_folder(f"chapter-{CHAPTER}-profile", options.out)
    seconds = buckets.measure(step, device, out / "trace.json.gz")
    found = anatomy.measured(step, model, optimizer, device)

    # --- side by side ---
    share = buckets.explained(times, seconds)
    rest = (1 - share) * sum(seconds.values())
    print("", *buckets.table(times, seconds), sep="\n")
    print(f"explained {share:.1%}: bucket by bucket {1e3 * rest:.1f} ms are not\n"
          f"without the profiler a step takes {1e3 * plain:.1f} ms: {tokens / plain:,.0f} tokens a "
          "second")
    mfu = prediction.mfu(tokens / plain)
    flops = prediction.flops["total"] * tokens / plain
    print(f"{flops / 1e9:,.0f} GFLOP/s, " + (
        f"MFU {mfu:.1%} ({prediction.mfu(tokens / plain, full=True):.1%} if attention counts S²)"
        if mfu is not None else "and no peak is known for this device, so no MFU"))
    print("", *anatomy.table(memory, found), sep="\n")
    (out / "profile.json").write_text(json.dumps({
        "torch": torch.__version__, "device": str(device), "options": vars(options),
        "tokens": tokens, "seconds": plain, "explained": share, "predicted": times,
        "measured": seconds, "predicted_bytes": memory, "measured_bytes": found}, indent=1) + "\n")
    print(f"\n{out / 'trace.json.gz'}: the timeline; open it at https://ui.perfetto.dev or in "
          "Chrome at chrome://tracing\n" + f"{out / 'profile.json'}: the figures above")
    if options.snapshot and device.type == "cuda":
        anatomy.write_snapshot(step, out / "snapshot.pickle", device)
        print(f"{out / 'snapshot.pickle'}: every allocation; drop it on "
              "https://pytorch.org/memory_viz (nothing is uploaded)")
    stop_ranks()
    return 0


if __name__ == "__main__":
    run_main(main)
