"""How many answers are drawn at a time, and which documents go into a pack."""

from math import prod

import torch

from common import memory
from common.predict import SHARE
from common.predict_memory import layer_costs
from common.ranks import say
from packing import IGNORE, PackSampler, packed_sequence_collate_fn


def batches(lengths, group, limit, room):
    """The rows that are drawn together, as lists. Row r is answer r % group to prompt r // group,
    which has lengths[r // group] tokens. A batch takes its rows times its longest of `room` tokens
    of cache at most, unless it is a single row; so prompts of like length come together."""
    found = [[]]
    for n in sorted(range(len(lengths)), key=lengths.__getitem__):
        for row in range(n * group, (n + 1) * group):
            if found[-1] and (len(found[-1]) + 1) * (lengths[n] + limit) > room:
                found.append([])
            found[-1].append(row)
    return found


def keeps_weights(predicted, shapes, options):
    """Bytes of `nf4.weights_kept`, if a quarter of what a step needs has room for them, or 0."""
    whole = getattr(torch, options.dtype).itemsize * sum(
        prod(cost.shape) for layer in shapes.model.layers for cost in layer_costs(layer)
        if cost.weight is None)
    free = predicted.peak - predicted["weights"] - predicted["optimizer moments"]
    return whole if whole <= free // 4 else 0


def add_rollout(predicted, config, options, answers, longest, kept=0):
    """How many tokens of KV cache may exist at a time, for `answers` documents of at most `longest`
    tokens: what fits into the memory that a training step uses for activations and gradients, or
    on a GPU into all that is left, less `kept`. What one needs beyond is added to `predicted`."""
    c = getattr(torch, options.dtype).itemsize
    # Of a token, keys and values; of a row, logits, as drawn too; a layer's cache is copied.
    row = 2 * config.num_key_value_heads * config.head_dim * c * (config.num_hidden_layers + 1)
    row = row * longest + c * config.vocab_size
    stays = kept + sum(predicted.get(name, 0) for name in (
        "weights", "optimizer moments", "reference model", "teacher"))
    free = predicted.peak - stays
    if options.device == "cuda":
        free = max(free, int(SHARE * torch.cuda.get_device_properties(0).total_memory) - stays)
    rows = max(1, min(answers, free // row))
    beyond = stays + rows * row - predicted.peak
    if beyond > 0:
        predicted["KV cache beyond a step"] = beyond
    say(f"rollout     {rows} of {answers} answers at a time: {memory.readable_bytes(rows * row)}")
    return rows * longest


def document(prompt, answer):
    """(input_ids, labels) of lists of token ids, of which the answer is trained."""
    ids = torch.tensor(prompt + answer)
    return ids, ids.masked_fill(torch.arange(len(ids)) < len(prompt), IGNORE)


def pack_rows(lengths, batch_tokens):
    """Documents of these lengths as packs: lists of their numbers."""
    sampler = PackSampler(lengths, batch_tokens, seed=None) if lengths else None
    return [sampler.pack(index) for index in range(sampler.packs_in(1))] if lengths else []


def packed(documents, options):
    """The packs of documents, each (input_ids, labels), on --device."""
    return [memory.to_device(packed_sequence_collate_fn([documents[n] for n in rows]),
                             options.device)
            for rows in pack_rows([len(ids) for ids, _ in documents], options.batch_tokens)]
