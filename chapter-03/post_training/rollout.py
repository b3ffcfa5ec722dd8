"""Answers that a model draws itself, many to a prompt, on the packed KV cache. A prompt is computed
once, and its row of the cache repeated for each of its answers. All grow together, drawn from
exactly softmax(logits / temperature): with top-k or top-p it would be another distribution."""

from typing import NamedTuple

import numpy as np
import torch

from common.asking.kv_cache import KVCache
from common.errors import UserError
from batches import batches, document
from packing import packed_sequence_collate_fn


class Answer(NamedTuple):
    """What was drawn for a prompt; the lists have one entry for each token."""
    ids: list  # the stop token included
    log_probs: list  # at the temperature it was drawn at
    entropies: list  # of what it was drawn from, in nats
    finished: bool  # by a stop token; else it was cut at the limit


def draw(logits, temperature, draws):
    """(token, its log p, entropy), each (N,), from logits (N, V) and `draws` (N,), uniform in
    [0, 1): the first token at which the running sum of softmax(logits / temperature) passes the
    draw. Temperature 0 takes the likeliest, and its log p at temperature 1."""
    found = []
    for rows, u in zip(*(x.split(max(1, 2**21 // logits.shape[1])) for x in (logits, draws))):
        log_p = (rows.float() / (temperature or 1)).log_softmax(-1)  # (a few, V)
        p = log_p.exp()
        if temperature:
            sums = p.cumsum(-1)
            token = torch.searchsorted(sums, u[:, None] * sums[:, -1:], right=True)
            token.clamp_(max=logits.shape[1] - 1)  # the product may be rounded up to the sum
        else:
            token = log_p.argmax(-1, keepdim=True)
        # Where p is 0, log p can be -inf, and 0 · -inf is no number.
        found.append((token[:, 0], log_p.gather(1, token)[:, 0], -(p * log_p).nansum(-1)))
    return map(torch.cat, zip(*found))


@torch.no_grad()
def rollout(model, prompts, group, limit, stop_ids, temperature=1.0, seed=(0,), room=2**62):
    """`group` Answers to each of `prompts`, lists of token ids, of at most `limit` tokens each, the
    answers to a prompt in a row. Answer i to prompt n depends on `seed` (a tuple of whole numbers),
    n, i and `limit`, whatever else is drawn. `room`: see `batches`."""
    longest = max(map(len, prompts)) + limit
    if longest > model.config.max_position_embeddings:
        raise UserError(f"a prompt and its answer can have {longest} tokens, more than the model "
                        "takes (--max-new-tokens, --max-seq-len)")
    draws = torch.tensor(np.concatenate([
        np.random.default_rng((*seed, n)).random((group, limit), dtype=np.float32)
        for n in range(len(prompts))]), device=next(model.parameters()).device)  # (answers, limit)
    answers, was_training = {}, model.training
    model.eval()
    try:
        for rows in batches([*map(len, prompts)], group, limit, room):
            asked = [prompts[row // group] for row in rows]
            answers.update(zip(rows, grow(model, asked, stop_ids, temperature, draws[rows])))
    finally:
        model.train(was_training)
    return [answers[row] for row in range(len(draws))]


def grow(model, prompts, stop_ids, temperature, draws):
    """An Answer to each of N prompts, which may repeat, with `draws` (N, limit) in [0, 1)."""
    device, (N, limit) = draws.device, draws.shape
    asked = list(dict.fromkeys(map(tuple, prompts)))
    repeated = [asked.index(tuple(one)) for one in prompts]
    pack = packed_sequence_collate_fn([document(list(one), []) for one in asked])
    ids, sums, positions = (pack[name].to(device) for name in (
        "input_ids", "cu_seqlens", "position_ids"))
    cache = KVCache(len(asked), pack["max_seqlen"] + limit)
    logits = model(ids, sums, pack["max_seqlen"], positions, cache=cache)[repeated]
    cache.keep(repeated)
    ends = sums.diff().long()[repeated]
    # All that is drawn, and how many tokens of it are the answer; which rows the cache still has.
    tokens, numbers, lengths = ends.new_zeros(N, limit), draws.new_zeros(2, N, limit), [limit] * N
    of_row, rows = [*range(N)], torch.arange(N, device=device)
    for n in range(limit):
        new, *beside = draw(logits, temperature, draws[rows, n])
        tokens[rows, n], numbers[:, rows, n] = new, torch.stack(beside)
        for row, token in zip(of_row, new.tolist()):
            if token in stop_ids:
                lengths[row] = min(lengths[row], n + 1)
        growing = [place for place, row in enumerate(of_row) if lengths[row] > n + 1]
        if not growing:
            break
        if len(growing) < 0.75 * len(of_row):  # else copying the cache costs more than it saves
            cache.keep(growing)
            rows, new, ends = rows[growing], new[growing], ends[growing]
            of_row = [of_row[place] for place in growing]
        sums = torch.arange(len(of_row) + 1, dtype=torch.int32, device=device)
        logits, ends = model(new, sums, 1, ends, cache=cache), ends + 1  # (rows, V)
    if not numbers.isfinite().all():
        raise UserError("logits are not finite numbers: a lower --lr or --dtype float32 may help")
    return [Answer(ids[:n], *(one[:n] for one in more), finished=ids[n - 1] in stop_ids)
            for n, ids, *more in zip(lengths, tokens.tolist(), *numbers.tolist())]
