"""The teacher: this model as it was before training, or another one with the same tokenizer."""

from math import prod

import torch

from common import hub, weights
from common.data.chat import Chat
from common.errors import UserError, located, one_line
from common.predict_memory import layer_costs
from common.ranks import say
from modeling_llama import LlamaConfig
from quantized_model import base_model, load_model
from reference import add_reference, frozen_copy, reference_log_probs


def add_teacher(predicted, shapes, options, chat):
    """Add the teacher's memory and its forward to `predicted`, a `predict.Prediction` for the model
    `shapes`, and say what it is. Gives the vocabulary to which both heads are to be cut, None if
    they have the same. Raises UserError if the teacher's tokenizer is another than the `chat`'s."""
    if options.teacher == "self":
        add_reference(predicted, shapes, options)
        return None
    folder = hub.resolve(options.teacher, "--teacher")
    with located(folder / "config.json"):
        config = LlamaConfig.from_dict({**weights.read_config(folder), "quantization_config": None})
    own, theirs = (one and one.tokenizer.get_vocab() for one in (
        chat, chat and Chat.load(folder)))
    if own != theirs:
        token = next(iter(own.items() ^ theirs.items()))[0]
        raise UserError(f"--teacher {options.teacher}: its tokenizer is not this model's (they "
                        f"differ in the token {one_line(token)!r}), so its distribution is over "
                        "other tokens: take a teacher of the same family")
    c = getattr(torch, options.dtype).itemsize
    teacher = base_model(config, None, getattr(torch, options.dtype), "meta", "none", "shapes")
    matrices = sum(2 * prod(cost.shape) for layer in teacher.model.layers
                   for cost in layer_costs(layer))
    predicted.flops["matrices"] += matrices
    predicted.flops["head"] += 2 * config.vocab_size * config.hidden_size
    for name in ("total", "full"):
        predicted.flops[name] += matrices + 2 * config.vocab_size * config.hidden_size
    predicted["teacher"] = c * sum(parameter.numel() for parameter in teacher.parameters())
    rows = min(shapes.chunk, predicted.tokens)
    predicted["logits and loss"] += c * (rows * config.vocab_size
                                         + predicted.tokens * config.hidden_size)
    say(f"teacher     {options.teacher}: one more forward, counted below")
    same = config.vocab_size == shapes.config.vocab_size
    return None if same else 1 + max(own.values())


def load_teacher(model, options, device):
    """The frozen model that teaches, or None: `model` itself, its adapters off."""
    if options.teacher == "self":
        return frozen_copy(model, options, device)
    return load_model(options.teacher, device, getattr(torch, options.dtype), base="none")[0]


def lesson(model, teacher, pack):
    """What `chunked_divergence` takes of the teacher for a pack: {"teacher_hidden" (T, D'),
    "teacher_weight" (V', D')}. Under `shard` a head is whole only within a forward: so that of the
    model itself is left out, and there the student's, which is the same."""
    (teacher or model).loss = hidden_and_head
    hidden, weight = reference_log_probs(model, pack, teacher)
    return {"teacher_hidden": hidden, "teacher_weight": None if teacher is None else weight}


def hidden_and_head(hidden, weight, *_):
    """In place of a loss."""
    return hidden, weight
