"""What the three loops here have in common before their steps. It is chapter 3's."""

from dataclasses import fields

import torch

from common import hub, runs, weights
from common.errors import UserError, located
from common.options import parse
from common.ranks import start_ranks, world_size
import lora
from lora import AdapterConfig, optimizer_groups, state_names
from modeling_llama import LlamaConfig
from quantized_model import build, check_base, check_options


def begin(options_class, chapter, text, tiny, real, argv, one_process=False):
    """Options, device, dtype, AdapterConfig; the base's folder, config.json and LlamaConfig; shapes
    of the model. Raises UserError for what makes no sense here."""
    options = parse(options_class, chapter, text.split("\n\n")[0], tiny, real, argv)
    check_options(options)
    if options.dropout:
        raise UserError("--dropout must be 0: what is compared would differ by what it drops")
    if options.compile:
        raise UserError("--compile: only train.py can; here it has to be left out")
    if one_process and world_size() > 1:
        raise UserError("this script runs on one process: of a sharded model, each token of an "
                        "answer would gather every layer; start it without torchrun")
    device, dtype = start_ranks(options.device), getattr(torch, options.dtype)
    if options.method == "delta-lora" and world_size() > 1:
        raise UserError("--method delta-lora runs on one process: it moves whole weights")
    torch.manual_seed(options.seed)
    adapter = AdapterConfig(**{f.name: getattr(options, f.name) for f in fields(AdapterConfig)})
    source = hub.resolve(options.model)
    config_json = weights.read_config(source)
    with located(source / "config.json"):
        config = LlamaConfig.from_dict(check_base(config_json, options))
    shapes = build(config, options, adapter)
    if isinstance(shapes.lm_head, lora.LoRALinear):
        raise UserError("--target-modules: log p comes from a plain output head; leave lm_head out")
    return options, device, dtype, adapter, source, config_json, config, shapes


def open_run(chapter, options, model, adapter, data, total_steps, columns, **state):
    """AdamW, the names of what a checkpoint has to hold, and what `runs.open_run` gives. `state` is
    what a loop keeps beside the usual, `columns` the screen's."""
    groups = optimizer_groups(model, adapter, options.lr, options.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95),
                                  fused=torch.device(options.device).type != "mps")
    names = state_names(model)
    run, state, saved, metrics = runs.open_run(
        chapter, options, model, optimizer, data, total_steps, names, **state)
    metrics.columns = columns
    return optimizer, names, run, state, saved, metrics
