"""Continuing prompts with a KV cache: all of them together, a token at a time."""

from itertools import accumulate

import numpy as np
import torch

from common.asking.kv_cache import KVCache
from common.errors import UserError


def choose_tokens(logits, temperature, top_k, top_p, draws):
    """The next token of each document, (N,) int64, from logits (N, V). Temperature 0, or one too
    small for float32, takes the likeliest. Otherwise a token is drawn from softmax(logits /
    temperature), of which `top_k` (0: no limit) and then `top_p` (1: no limit) leave only the
    likeliest: k tokens, and the fewest that together have probability p (1904.09751, section 3.1).
    `draws` (N,), uniform in [0, 1), say at which running sum of probabilities."""
    if temperature < torch.finfo(torch.float32).tiny:
        return logits.argmax(dim=-1)
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # 0 at most: no overflow
    logits, tokens = logits.sort(dim=-1, descending=True)
    chances = logits[:, : top_k or None].softmax(-1)
    sums = chances.cumsum(-1)
    left = (sums - chances < top_p).sum(-1, keepdim=True)  # the tokens before it have less than p
    left = left.clamp(min=1)  # even a p that float32 rounds to 0 leaves the likeliest
    drawn = draws[:, None] * sums.gather(-1, left - 1)
    # A running sum computed in parallel may fall by a rounding error: stay within what is left.
    index = (sums <= drawn).sum(-1, keepdim=True).minimum(left - 1)
    return tokens.gather(-1, index)[:, 0]


@torch.no_grad()
def generate(model, prompts, max_new_tokens, stop_ids=(), temperature=0.0, seed=0, top_k=0,
             top_p=1.0, on_token=lambda document, token: None):
    """Continue `prompts`, lists of token ids, until a stop token, `max_new_tokens` or the model's
    last position; gives the new tokens of each, without the stop token. They are drawn by
    `choose_tokens`; the draws depend on `seed` and the place in the list alone. Each new token
    calls `on_token(document, token)`. UserError if a prompt does not fit the model."""
    longest, vocabulary = model.config.max_position_embeddings, model.config.vocab_size
    for n, prompt in enumerate(prompts):
        if len(prompt) >= longest:
            raise UserError(f"prompt {n + 1} has {len(prompt)} tokens: the model takes {longest}")
        if max(prompt, default=0) >= vocabulary:
            raise UserError(f"prompt {n + 1} has token {max(prompt)}, but the model's vocabulary "
                            f"ends at {vocabulary - 1}: is this its tokenizer?")
    device = next(model.parameters()).device
    limits = [min(max_new_tokens, longest - len(prompt)) for prompt in prompts]
    random = [np.random.default_rng((seed, n)) for n in range(len(prompts))]
    answers = [[] for _ in prompts]
    growing = [n for n, prompt in enumerate(prompts) if prompt and limits[n] > 0]
    new = [list(prompts[n]) for n in growing]  # each document's tokens that the cache lacks
    cache = KVCache(len(growing), max((len(prompts[n]) + limits[n] for n in growing), default=0))
    was_training = model.training
    model.eval()
    while growing:
        ends = [len(prompts[n]) + len(answers[n]) for n in growing]
        positions = [range(end - len(ids), end) for end, ids in zip(ends, new)]
        logits = model(
            input_ids=torch.tensor([token for ids in new for token in ids], device=device),
            cu_seqlens=torch.tensor([0, *accumulate(map(len, new))]).int().to(device),
            max_seqlen=max(map(len, new)),
            position_ids=torch.tensor([p for each in positions for p in each], device=device),
            cache=cache)  # (N, V)
        if not logits.isfinite().all():
            raise UserError("the model's logits are not finite numbers: its weights are damaged, "
                            "or --dtype float32 is needed")
        draws = torch.tensor([random[n].random(dtype=np.float32) for n in growing], device=device)
        chosen = choose_tokens(logits, temperature, top_k, top_p, draws).tolist()
        rows = []  # of the documents that go on
        for row, (n, token) in enumerate(zip(growing, chosen)):
            if token in stop_ids:
                continue
            answers[n].append(token)
            on_token(n, token)
            if len(answers[n]) < limits[n]:
                rows.append(row)
        if 0 < len(rows) < len(growing):
            cache.keep(rows)  # finished documents cost nothing any more
        growing = [growing[row] for row in rows]
        new = [[answers[n][-1]] for n in growing]
    model.train(was_training)
    return answers
