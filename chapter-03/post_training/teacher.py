"""The teacher: this model as it was before training, or another one with the same tokenizer."""

import torch

from common import hub, weights
from common.data.chat import Chat
from common.errors import UserError, located, one_line
from modeling_llama import LlamaConfig
from quantized_model import base_model, load_model
from reference import add_reference, frozen_copy, reference_log_probs


def add_teacher(predicted, shapes, options, chat):
    """Add to `predicted`, of the model `shapes`, what the teacher needs. Gives the vocabulary that
    both heads are cut to, None if they are equally large. UserError for another tokenizer."""
    if options.teacher == "self":
        return add_reference(predicted, shapes, options) and None
    folder, dtype = hub.resolve(options.teacher, "--teacher"), getattr(torch, options.dtype)
    with located(folder / "config.json"):
        config = LlamaConfig.from_dict({**weights.read_config(folder), "quantization_config": None})
    own, theirs = (one.tokenizer.get_vocab() for one in (chat, Chat.load(folder)))
    if own != theirs:
        token = one_line(repr(min(own.items() ^ theirs.items())[0]))
        raise UserError(f"--teacher {options.teacher}: its tokenizer is another one (they differ "
                        f"in {token}): take a teacher of the same family")
    teacher = base_model(config, None, dtype, base="none", init="shapes")
    predicted["teacher"] = sum(parameter.nbytes for parameter in teacher.parameters())
    predicted["teacher's logits"] = dtype.itemsize * (
        min(shapes.chunk, predicted.tokens) * config.vocab_size
        + predicted.tokens * config.hidden_size)
    return None if config.vocab_size == shapes.config.vocab_size else 1 + max(own.values())


def load_teacher(model, options, device):
    """The frozen model that teaches; None: `model` itself, its adapters off."""
    if options.teacher == "self":
        return frozen_copy(model, options, device)
    return load_model(options.teacher, device, getattr(torch, options.dtype), base="none")[0]


def lesson(model, teacher, pack):
    """{"teacher_hidden" (T, D'), "teacher_weight" (V', D')}, for `chunked_divergence`."""
    (teacher or model).loss = lambda hidden, weight, *_: (hidden, weight)
    hidden, weight = reference_log_probs(model, pack, teacher)
    return {"teacher_hidden": hidden, "teacher_weight": weight}
