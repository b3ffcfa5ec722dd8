"""Predict a training step, measure it, and show both side by side: time and memory.

    python chapter-03/profile_step.py                              the embedded tiny model
    python chapter-03/profile_step.py --model chapter-03/mid --init random --data virtual
    python chapter-03/profile_step.py --model qwen3-0.6b --init random --data virtual \
        --method full --quantize none --compile

It takes the options of train.py, and of its run one pack. Time falls into six buckets
(buckets.py), memory into six categories (anatomy.py). Leaves `trace.json`, a timeline of the
step, `profile.json`, all figures, and on CUDA `snapshot.pickle`, a record of its allocations.
"""

import json
import math
import sys
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import anatomy
import buckets
import ceilings
import operators
from bnb_files import is_bnb
from common import checkpoint, cli, distributed, hub, predict, prepare, presets, weights
from common.errors import UserError, named
from common.memory import keep_freed
from lora import AdapterConfig, after_step, apply_adapter, before_step, optimizer_groups
from compiling import compile_model
from modeling_llama import CHUNK, LlamaConfig, LlamaForCausalLM
from packing import IGNORE, PackSampler, StaticShape, packed_sequence_collate_fn
from quantized_model import quantized_model
from train import CHAPTER, DENSE_ONLY, REAL, TINY, Options, to_device


def build(options, config, source, device):
    """The model of this run with its adapters, as train.py makes it on one device: (model,
    AdapterConfig). Not compiled yet."""
    dtype = getattr(torch, options.dtype)
    if options.quantize == "nf4" and options.method in DENSE_ONLY:
        raise UserError(f"--method {options.method} needs --quantize none: "
                        f"{DENSE_ONLY[options.method]}")
    adapter = AdapterConfig(**{f.name: getattr(options, f.name) for f in fields(AdapterConfig)})
    torch.manual_seed(options.seed)
    if options.quantize == "nf4":
        model = quantized_model(config, source, dtype, device, options.double_quant, options.init)
    else:
        with torch.device("cpu" if options.init == "random" else "meta"):
            model = LlamaForCausalLM(config)
        model.compute_dtype = dtype
        if options.method not in DENSE_ONLY:
            model.to(dtype)
        if options.init == "random":
            model.to(device)
        else:
            model.to_empty(device=device)
            weights.load_weights(model, source)
    apply_adapter(model, adapter)
    for layer in model.model.layers:
        layer.checkpointing = options.activation_checkpointing
    return model.to(device).train(), adapter


def step_of(model, optimizer, pack, adapter, clip, finish=None):
    """A function that makes one optimizer step on `pack`, part by part in named regions. The
    loss is the model's own, or `finish(logits, labels)`."""
    labels = pack["labels"]
    inputs = pack if finish is None else {n: v for n, v in pack.items() if n != "labels"}
    targets = max(1, int((labels != IGNORE).sum()))
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step():
        with buckets.named_parts(model):
            loss = model(**inputs) if finish is None else finish(model(**inputs), labels)
        with buckets.region("backward"):
            (loss / targets).backward()
        with buckets.region("optimizer"):
            before_step(model, adapter)
            torch.nn.utils.clip_grad_norm_(parameters, clip or math.inf)
            optimizer.step()
            after_step(model, adapter, 1)
            optimizer.zero_grad(set_to_none=True)

    return step


def main(argv=None):
    # --- what a run would have ---
    options = presets.parse(Options, CHAPTER, __doc__.split("\n\n")[0], TINY, REAL, argv)
    if options.dry_run or options.resume or presets.world_size() > 1:
        raise UserError("profile_step.py profiles one step on one device: leave out --dry-run, "
                        "--resume and torchrun")
    device = distributed.start(options.device).device
    keep_freed(device)
    source = hub.resolve(options.model)
    checkpoint.verify(source)
    config_json = weights.read_config(source)
    with named(source / "config.json"):
        if is_bnb(config_json) and options.quantize == "none":
            raise UserError("quantised by bitsandbytes: say --quantize nf4, or give the original")
        config = LlamaConfig.from_dict({**config_json, "quantization_config": None})
    data = prepare.load(options, source, config, skills="new").train
    model, adapter = build(options, config, source, device)
    sampler, shape = PackSampler(data.lengths, options.batch_tokens, options.seed), None
    if options.compile:
        longest = prepare.longest_document(options, config)
        shape = StaticShape.of([data.lengths], options.batch_tokens, longest)
    pack = packed_sequence_collate_fn([data[i] for i in sampler.pack(0)], shape)
    pack, tokens = to_device(pack, device), len(pack["labels"])
    optimizer = torch.optim.AdamW(
        optimizer_groups(model, adapter, options.lr, options.weight_decay), lr=options.lr,
        betas=(0.9, 0.95), fused=device.type != "mps")

    # --- predicted ---
    prediction = predict.training(config, model, data.lengths, options, 1, CHUNK)
    memory = anatomy.predicted(model, prediction)
    print(prediction.report())
    ops = operators.record(model, pack)
    print(f"\nceilings    {ceilings.large_product(device, model.compute_dtype) / 1e9:,.0f} GFLOP/s "
          f"in a large {options.dtype} product, {ceilings.large_copy(device) / 1e9:.1f} GB/s in a "
          "large copy")
    times = operators.predict(model, pack, operators.fused(ops) if options.compile else ops, device)
    total = sum(alone for _, alone in times.values())
    print(f"predicted   {1e3 * total:.1f} ms a step of {tokens} tokens, {tokens / total:,.0f} "
          "tokens a second")

    # --- measured ---
    if options.compile:
        compile_model(model)
    step = step_of(model, optimizer, pack, adapter, options.clip)
    step()  # makes the optimizer's moments, and compiles
    plain = ceilings.duration(step, device, repeats=3)
    out = checkpoint.new_run_folder(f"chapter-{CHAPTER}-profile", options.out)
    seconds = buckets.measure(step, device, out / "trace.json")
    found = anatomy.measured(step, model, optimizer, device)
    if device.type == "cuda":
        anatomy.write_snapshot(step, out / "snapshot.pickle", device)

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
    print(f"\n{out / 'trace.json'}: the timeline; open it at https://ui.perfetto.dev or in Chrome "
          "at chrome://tracing\n" + f"{out / 'profile.json'}: the figures above")
    if device.type == "cuda":
        print(f"{out / 'snapshot.pickle'}: every allocation; drop it on "
              "https://pytorch.org/memory_viz (nothing is uploaded)")
    distributed.stop()
    return 0


if __name__ == "__main__":
    cli.run(main)
