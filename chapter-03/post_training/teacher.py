"""The teacher: this model as it was before training, or another one with the same tokenizer."""

import torch

from common import hub, weights
from common.data.chat import Chat
from common.errors import UserError, located, one_line
from modeling_llama import LlamaConfig
from quantized_model import base_model, load_model
from reference import add_reference, frozen_copy, reference_log_probs

PIECES = 6 * 4  # bytes of what distill.py has in float32 for each logit of a piece


def teacher_shapes(options, shapes):
    """The teacher's shapes; `shapes`, the model's, if it teaches itself."""
    if options.teacher == "self":
        return shapes
    folder = hub.resolve(options.teacher, "--teacher")
    with located(folder / "config.json"):
        config = LlamaConfig.from_dict({**weights.read_config(folder), "quantization_config": None})
    return base_model(config, None, getattr(torch, options.dtype), base="none", init="shapes")


def add_teacher(predicted, shapes, teacher, options, chat):
    """Add to `predicted`, of the model `shapes`, what the `teacher` (shapes too) needs. Gives the
    vocabulary that both heads are cut to, None if equally large. UserError if tokenizers differ."""
    if teacher is shapes:
        add_reference(predicted, shapes, options)
    else:
        predicted["teacher"] = sum(parameter.nbytes for parameter in teacher.parameters())
    V, rows = teacher.config.vocab_size, min(shapes.chunk, predicted.tokens)
    predicted["teacher's logits"] = getattr(torch, options.dtype).itemsize * (
        rows * V + predicted.tokens * teacher.config.hidden_size) + PIECES * min(
            rows * V, 2**20 if options.device == "cpu" else 2**22)
    if teacher is shapes:
        return None
    theirs = Chat.load(hub.resolve(options.teacher)).tokenizer.get_vocab()
    own = theirs if chat is None else chat.tokenizer.get_vocab()  # random tokens are anyone's
    if own != theirs:
        token = one_line(repr(min(own.items() ^ theirs.items())[0]))
        raise UserError(f"--teacher {options.teacher}: its tokenizer is another one (they differ "
                        f"in {token}): take a teacher of the same family")
    return None if V == shapes.config.vocab_size else 1 + max(own.values())


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
