"""Predict a training step, measure it, and show both side by side: time and memory.

    python chapter-03/profiling/profile_step.py                              the embedded tiny model
    python chapter-03/profiling/profile_step.py --model qwen3-0.6b --init random --data virtual \
        --method full --quantize none --compile

It takes the options of train.py, and profiles a step on the first pack of that run. Writes
`trace.json.gz`, a timeline of the step, and `profile.json`, all figures."""

import json
import math
import sys
from dataclasses import fields
from pathlib import Path

sys.path[:0] = map(str, Path(__file__).resolve().parents[1:3])

import torch

import anatomy
import buckets
import operators
from common import hub, predict, prepare, weights
from common.errors import UserError, located, run_main
from common.files.checkpoint import new_run_folder
from common.memory import keep_freed, readable_bytes, to_device
from common.options import parse, settle
from common.ranks import world_size
from compiling import compile_model
from lora import AdapterConfig, after_step, before_step, optimizer_groups
from modeling_llama import LlamaConfig
from packing import PackSampler, StaticShape, packed_sequence_collate_fn
from quantized_model import build, check_base, check_options
from train import CHAPTER, REAL, TINY, Options


def set_up(options, fused=True):
    """(model, optimizer, adapter, data) as in train.py, but random weights drawn on the device."""
    source, device = hub.resolve(options.model), torch.device(options.device)
    with located(source / "config.json"):
        config = LlamaConfig.from_dict(check_base(weights.read_config(source), options))
    adapter = AdapterConfig(**{f.name: getattr(options, f.name) for f in fields(AdapterConfig)})
    shapes = build(config, options, adapter)
    predict.fit_batch(options, shapes, shapes.chunk)
    torch.manual_seed(options.seed)
    model = build(config, options, adapter, device, source, draw_on=device).train()
    settle(options, config, total_steps=1000)
    groups = optimizer_groups(model, adapter, options.lr, options.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95), foreach=False,
                                  fused=fused and device.type != "mps")
    return model, optimizer, adapter, prepare.load(options, source, config, skills="new").train


def first_packs(options, data, count):
    """The documents of each of a run's first packs, and the function that makes a pack of them."""
    sampler = PackSampler(data.lengths, options.batch_tokens, options.seed)
    shape = StaticShape.of((sampler, sampler.packs_in(1))) if options.compile else None
    return [[data[i] for i in sampler.pack(number)] for number in range(count)], (
        lambda examples: to_device(packed_sequence_collate_fn(examples, shape), options.device))


def step_of(model, optimizer, pack, adapter, clip):
    """A function that takes one optimizer step on `pack`, its parts in named regions."""
    def step():
        loss = buckets.loss_of(model, pack)
        with buckets.region("backward"):
            (loss / max(1, len(pack["labelled"]))).backward()  # one pack is the step
        with buckets.region("optimizer"):
            before_step(model, adapter)
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)
            optimizer.step()
            after_step(model, adapter, 1)
            optimizer.zero_grad(set_to_none=True)

    return step


def show(title, columns, rows, total, form):
    """Print {name: numbers} and their sums, and in the last column how the last two differ."""
    rows = {**rows, total: [sum(column) for column in zip(*rows.values())]}
    print(f"\n{title:<18}" + "".join(f"{column:>12}" for column in columns))
    for name, numbers in rows.items():
        cells = map(form, (*numbers, numbers[-1] - numbers[-2]))
        print(f"{name:<18}" + "".join(f"{cell:>12}" for cell in cells))


def main(argv=None):
    # --- what a run would have ---
    options = parse(Options, CHAPTER, __doc__.split("\n\n")[0], TINY, REAL, argv)
    if options.dry_run or options.resume or world_size() > 1:
        raise UserError("profile_step.py profiles one step on one device: leave out --dry-run, "
                        "--resume and torchrun")
    check_options(options)
    device = torch.device(options.device)
    keep_freed(device)
    model, optimizer, adapter, data = set_up(options)
    (examples,), pack_of = first_packs(options, data, 1)
    pack = pack_of(examples)
    tokens = len(pack["labels"])

    # --- predicted ---
    prediction = predict.costs(model, data.lengths, options, model.chunk)
    memory = anatomy.predicted(model, prediction)
    print(prediction.report())
    peak, bandwidth = operators.ceilings(device, model.compute_dtype)
    print(f"\nceilings    {peak / 1e9:,.0f} GFLOP/s in a large {options.dtype} product, "
          f"{bandwidth / 1e9:.1f} GB/s in a large copy")
    times = operators.predict(model, pack, options.compile)
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
    # Bucket by bucket, so that one that is too slow cannot make up for one that is too fast.
    rest = sum(abs(seconds[name] - times[name][1]) for name in seconds)
    share = 1 - rest / sum(seconds.values())
    show("milliseconds", ("roofline", "alone", "measured", "rest"),
         {name: (*times[name], seconds[name]) for name in seconds}, "step",
         lambda number: f"{1e3 * number:.1f}")
    print(f"explained {share:.1%}: bucket by bucket {1e3 * rest:.1f} ms are not\nwithout the "
          f"profiler a step takes {1e3 * plain:.1f} ms: {tokens / plain:,.0f} tokens a second")
    mfu = prediction.mfu(tokens / plain)
    print(f"{prediction.flops['total'] * tokens / plain / 1e9:,.0f} GFLOP/s, " + (
        f"MFU {mfu:.1%} ({prediction.mfu(tokens / plain, full=True):.1%} if attention counts S²)"
        if mfu is not None else "and no peak is known for this device, so no MFU"))
    show("memory", ("predicted", "measured", "difference"),
         {name: (memory[name], found[name]) for name in found}, "peak", readable_bytes)
    (out / "profile.json").write_text(json.dumps({
        "torch": torch.__version__, "device": str(device), "options": vars(options),
        "tokens": tokens, "seconds": plain, "explained": share, "predicted": times,
        "measured": seconds, "predicted_bytes": memory, "measured_bytes": found}, indent=1) + "\n")
    print(f"\n{out / 'trace.json.gz'}: the timeline; open it at https://ui.perfetto.dev or in "
          "Chrome at chrome://tracing\n" + f"{out / 'profile.json'}: the figures above")
    return 0


if __name__ == "__main__":
    run_main(main)
