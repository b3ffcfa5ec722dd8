# Copied from chapter-02/kv_cache.py (whole file)
"""The cache of keys and values, with which a document grows by a token at the cost of a token.

Attention is the only part of the model that looks at earlier tokens, and all it needs of them is
their keys and values, which never change again. Kept, they make a step of generation one token's
work instead of the whole document's. Shapes as in modeling_llama.py; C is the tokens of room.
"""

import torch
import torch.nn.functional as F

from modeling_llama import varlen_attention


class KVCache:
    """Keys and values of all tokens so far, so that a forward pass computes only the new ones.

    Room for N = `documents` documents of up to C = `room` tokens. In each layer, document n is
    row n of keys and of values, (N, K, C, d), from its position 0 on. The first pass takes the
    prompts, whole and of any lengths; every pass after it one token of each document. Not for
    training: nothing here has gradients.
    """

    def __init__(self, documents, room):
        self.documents, self.room = documents, room
        self.layers = {}  # attention layer -> its keys and values

    def begin(self, cu_seqlens, max_seqlen, position_ids):
        """Note where this pass's tokens belong; once per pass, from the model's forward."""
        rows = torch.arange(self.documents, device=position_ids.device)
        self.length = int(position_ids.max()) + 1  # of the longest document
        if len(cu_seqlens) != self.documents + 1 or self.length > self.room:
            raise ValueError(f"the cache is for {self.documents} documents of {self.room} tokens")
        if max_seqlen > 1 and self.layers:
            raise ValueError("after its first pass a cache takes one token of each document")
        self.where = rows.repeat_interleave(cu_seqlens.diff()), position_ids  # row, column
        if max_seqlen == 1:
            columns = torch.arange(self.length, device=position_ids.device)
            self.visible = columns <= position_ids[:, None, None, None]  # (N, 1, 1, C)

    def attention(self, layer, q, k, v, cu_seqlens, max_seqlen):
        """`varlen_attention`, but over everything that is in the cache; stores k and v in it."""
        if layer not in self.layers:
            # Zeros: a masked value is multiplied by zero, which memory as it is may not survive.
            shape = self.documents, k.shape[1], self.room, k.shape[2]
            self.layers[layer] = k.new_zeros(shape), v.new_zeros(shape)
        row, column = self.where
        keys, values = self.layers[layer]
        keys[row, :, column], values[row, :, column] = k, v
        if max_seqlen > 1:
            return varlen_attention(q, k, v, cu_seqlens, max_seqlen)
        # One new token per document sees all of its own row. The query heads that share a
        # key/value head stand where several tokens would: (N, K, H/K, d). Never is_causal here:
        # it would line up the first query with the first key, not the last with the last.
        output = F.scaled_dot_product_attention(
            q.unflatten(1, (k.shape[1], -1)), keys[:, :, : self.length],
            values[:, :, : self.length], attn_mask=self.visible)
        return output.flatten(1, 2)  # (N, H, d)

    def keep(self, rows):
        """Go on with these documents only, `rows` being their row numbers in the new order."""
        self.documents = len(rows)
        for layer, (keys, values) in self.layers.items():
            self.layers[layer] = keys[rows], values[rows]
