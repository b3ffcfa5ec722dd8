"""Packing: documents of unequal length, end to end in one row, with nothing wasted on padding.

`PackSampler` chooses the documents of every pack of the run, in an order that depends on the seed
alone: not on the number of GPUs, and not on where a run was interrupted."""

import numpy as np
import torch
import torch.nn.functional as F

IGNORE = -100  # the label of a position that is not trained on; F.cross_entropy knows it too


def packed_sequence_collate_fn(examples):
    """Join documents into one pack.

    `examples` is a list of (input_ids, labels), two (length,) int64 tensors each; labels[t] is
    token t itself where it is trained on and -100 where it is not. Returns a dict:

        input_ids     (T,) int64    the documents' tokens, end to end
        labels        (T,) int64    the target *of* each position: labels[t] is token t+1, so the
                                    shift is done here, inside each document, and the last
                                    position of a document has no target (-100)
        position_ids  (T,) int64    0, 1, 2, ... from each document's beginning
        cu_seqlens    (N+1,) int32  the running sum of lengths: document n is the tokens
                                    cu_seqlens[n] to cu_seqlens[n+1]
        max_seqlen    int           the longest document

    Three documents of 2, 1 and 3 tokens, all trained on:

        input_ids     7  8 | 5 | 9  4  6        cu_seqlens  0 2 3 6
        labels        8  . | . | 4  6  .        max_seqlen  3
        position_ids  0  1 | 0 | 0  1  2"""
    lengths = torch.tensor([len(input_ids) for input_ids, _ in examples])
    return {
        "input_ids": torch.cat([input_ids for input_ids, _ in examples]),
        "labels": torch.cat([F.pad(labels[1:], (0, 1), value=IGNORE) for _, labels in examples]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths.tolist()]),
        "cu_seqlens": F.pad(lengths.cumsum(0), (1, 0)).int(),
        "max_seqlen": int(lengths.max()),
    }


class PackSampler:
    """The endless sequence of packs: each epoch shuffled anew, each pack filled to a token budget.

    `lengths` are the documents' lengths in tokens, none above `batch_tokens`. A pack takes
    documents in shuffled order (with `seed=None`, for evaluation, in their own) for as long as the
    next one still fits. Pack i is always the same, so a sampler's state is one number."""

    def __init__(self, lengths, batch_tokens, seed):
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.batch_tokens = batch_tokens
        self.seed = seed
        self.first_packs = [0]  # number of the first pack of each epoch seen so far
        self._epoch = None
        if len(self.lengths) == 0 or self.lengths.max() > batch_tokens:
            raise ValueError("needs at least one document, and none longer than batch_tokens")

    def _load_epoch(self, epoch):
        """Order of the documents in this epoch, and where in it each pack starts."""
        order = np.arange(len(self.lengths))
        if self.seed is not None:
            order = np.random.default_rng((self.seed, epoch)).permutation(order)
        ends = self.lengths[order].cumsum()
        starts = [0]
        while starts[-1] < len(order):
            tokens_before = ends[starts[-1] - 1] if starts[-1] else 0
            starts.append(int(ends.searchsorted(tokens_before + self.batch_tokens, "right")))
        if epoch + 1 == len(self.first_packs):
            self.first_packs.append(self.first_packs[-1] + len(starts) - 1)
        self._epoch, self._order, self._starts = epoch, order, starts

    def packs_in(self, epochs):
        """How many packs the first `epochs` epochs have together."""
        while len(self.first_packs) <= epochs:
            self._load_epoch(len(self.first_packs) - 1)
        return self.first_packs[epochs]

    def pack(self, index):
        """The list of documents (indices into `lengths`) of pack number `index`."""
        epoch = max(e for e, first in enumerate(self.first_packs) if first <= index)
        while self.packs_in(epoch + 1) <= index:
            epoch += 1
        if self._epoch != epoch:
            self._load_epoch(epoch)
        within = index - self.first_packs[epoch]
        return self._order[self._starts[within] : self._starts[within + 1]].tolist()
