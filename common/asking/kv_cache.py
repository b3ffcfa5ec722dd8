"""The KV cache: a new token costs the work of one token, not of its whole document, as attention
needs only keys and values of earlier ones, which never change. Shapes as in modeling_llama.py."""

import torch
import torch.nn.functional as F


class KVCache:
    """Room, without gradients, for N = `documents` documents of up to C = `room` tokens. In each
    layer document n is row n of keys and of values, (N, K, C, d), from its position 0 on. The first
    pass takes whole prompts, and attends within them as usual; later ones a token a document."""

    def __init__(self, documents, room):
        self.documents, self.room = documents, room
        self.layers = {}  # attention layer -> its keys and values

    def begin(self, cu_seqlens, max_seqlen, position_ids):
        """Note where this pass's tokens belong; once per pass, from the model's forward."""
        self.first_pass = not self.layers
        self.length = int(position_ids.max()) + 1  # of the longest document
        if len(cu_seqlens) != self.documents + 1 or self.length > self.room:
            raise ValueError(f"the cache is for {self.documents} documents of {self.room} tokens")
        if max_seqlen > 1 and not self.first_pass:
            raise ValueError("after its first pass a cache takes one token of each document")
        rows = torch.arange(self.documents, device=position_ids.device)
        self.where = rows.repeat_interleave(cu_seqlens.diff()), slice(None), position_ids
        if not self.first_pass:
            columns = torch.arange(self.length, device=position_ids.device)
            self.ages = position_ids[:, None, None, None] - columns  # (N, 1, 1, C); 0: new

    def store(self, layer, k, v):
        """Keep this pass's keys and values (T, K, d) of an attention layer."""
        if layer not in self.layers:
            # Zeros: a masked value is multiplied by zero, and 0 · NaN would still be NaN.
            shape = self.documents, k.shape[1], self.room, k.shape[2]
            self.layers[layer] = k.new_zeros(shape), v.new_zeros(shape)
        keys, values = self.layers[layer]
        keys[self.where], values[self.where] = k, v  # of a row and a column each, all heads

    def attention(self, layer, q, window=None):
        """softmax(q kᵀ / √d) v, (N, H, d), of one new token per document with all of its row, or,
        if there is a window, with the last so many of it, the new token included."""
        keys, values = (x[:, :, : self.length] for x in self.layers[layer])
        visible = (self.ages >= 0) & (self.ages < (window or self.room))
        # (N, K, H/K, d): the query heads that share a key/value head take the place of tokens.
        # Never is_causal here: it would align the first query with the first key.
        q = q.unflatten(1, (keys.shape[1], -1))
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=visible).flatten(1, 2)

    def keep(self, rows):
        """Go on with these documents only, `rows` being their row numbers in the new order."""
        self.documents = len(rows)
        for layer, (keys, values) in self.layers.items():
            self.layers[layer] = keys[rows], values[rows]
