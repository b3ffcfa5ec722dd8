"""Answers that a model draws itself, many to a prompt, on the packed KV cache.

A prompt is computed once. Then its row of the cache is repeated for each of its answers, and all
grow together, a token at a time. They are drawn from exactly softmax(logits / temperature):
`generate`'s top-k and top-p would make that another distribution than the one which is trained.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from common.asking.kv_cache import KVCache
from common.errors import UserError
from packing import packed_sequence_collate_fn
from batches import batches, document


@dataclass
class Answer:
    """What was drawn for a prompt; the lists have one entry for each token."""

    ids: list = field(default_factory=list)  # the stop token included
    log_probs: list = field(default_factory=list)  # at the temperature it was drawn at
    entropies: list = field(default_factory=list)  # of what it was drawn from, in nats
    finished: bool = False  # by a stop token; else it was cut at the limit


def draw(logits, temperature, draws):
    """(token, its log p, entropy), each (N,), from logits (N, V) and `draws` (N,), uniform in
    [0, 1): the first token at which the running sum of softmax(logits / temperature) passes the
    draw. Temperature 0 takes the likeliest, and its log p at temperature 1."""
    found = []
    for rows, u in zip(*(x.split(max(1, 2**21 // logits.shape[1])) for x in (logits, draws))):
        log_p = (rows.float() / (temperature or 1)).log_softmax(-1)  # (a few, V)
        p = log_p.exp()
        token = log_p.argmax(-1, keepdim=True)
        if temperature:
            sums = p.cumsum(-1)
            token = torch.searchsorted(sums, u[:, None] * sums[:, -1:], right=True)
            token.clamp_(max=logits.shape[1] - 1)  # the product may be rounded up to the sum
        # Where p is 0, log p can be -inf, and 0 · -inf is no number.
        found.append((token[:, 0], log_p.gather(1, token)[:, 0], -(p * log_p).nansum(-1)))
    return map(torch.cat, zip(*found))


@torch.no_grad()
def rollout(model, prompts, group, limit, stop_ids, temperature=1.0, seed=(0,), room=2**62):
    """`group` Answers to each of `prompts`, lists of token ids, of at most `limit` tokens each; the
    answers to a prompt follow one another. Answer i to prompt n depends on `seed` (a tuple of whole
    numbers), n and i, whatever else is drawn. `room`: see `batches`. UserError if the model has no
    positions for them, or its logits are not finite."""
    longest = max(map(len, prompts)) + limit
    if longest > model.config.max_position_embeddings:
        raise UserError(f"a prompt and its answer can have {longest} tokens, more than the model "
                        "takes (--max-new-tokens, --max-seq-len)")
    answers = [Answer() for _ in range(len(prompts) * group)]
    random = [np.random.default_rng((*seed, *divmod(row, group))) for row in range(len(answers))]
    was_training = model.training
    model.eval()
    try:
        for rows in batches([*map(len, prompts)], group, limit, room):
            grow(model, prompts, group, rows, limit, stop_ids, temperature, answers, random)
    finally:
        model.train(was_training)
    return answers


def grow(model, prompts, group, rows, limit, stop_ids, temperature, answers, random):
    """Draw the `answers` of a batch of rows, all together."""
    device, asked = next(model.parameters()).device, list(dict.fromkeys(r // group for r in rows))
    lengths = [len(prompts[n]) for n in asked]
    cache = KVCache(len(asked), max(lengths) + limit)
    pack = packed_sequence_collate_fn([document(prompts[n], []) for n in asked])
    logits = model(*(pack[name].to(device) for name in ("input_ids", "cu_seqlens")), max(lengths),
                   pack["position_ids"].to(device), cache=cache)
    repeated = [asked.index(row // group) for row in rows]
    cache.keep(repeated)
    logits, ends = logits[repeated], torch.tensor(lengths, device=device)[repeated]
    while True:
        u = torch.tensor([random[row].random(dtype=np.float32) for row in rows], device=device)
        tokens, log_p, entropy = draw(logits, temperature, u)
        if not log_p.isfinite().all():
            raise UserError("the model's logits are not finite numbers: has it diverged (a lower "
                            "--lr helps), or does it need --dtype float32?")
        growing = []
        for place, (row, *new) in enumerate(zip(rows, *(x.tolist() for x in (
                tokens, log_p, entropy)))):
            one = answers[row]
            if one.finished or len(one.ids) == limit:
                continue
            for values, value in zip((one.ids, one.log_probs, one.entropies), new):
                values.append(value)
            one.finished = new[0] in stop_ids
            if not one.finished and len(one.ids) < limit:
                growing.append(place)
        if not growing:
            return
        if len(growing) < 0.75 * len(rows):  # else copying the cache costs more than it saves
            rows, tokens, ends = [rows[p] for p in growing], tokens[growing], ends[growing]
            cache.keep(growing)
        sums = torch.arange(len(rows) + 1, dtype=torch.int32, device=device)
        logits, ends = model(tokens, sums, 1, ends, cache=cache), ends + 1  # (N, V)
