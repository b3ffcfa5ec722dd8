"""Packing: documents of unequal length, end to end in one row, with nothing wasted on padding,
or, for `--compile`, with just enough padding to give every pack the same shape.

Compiled code is made for the shapes it has seen, and a new shape costs a compilation: seconds,
where a step takes a fraction of one. So a pack here can be filled up to a `StaticShape`: dummy
documents after the real ones, and `cu_seqlens` of fixed length. The rest is chapter 1's."""

from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F

IGNORE = -100  # the label of a position that is not trained on; F.cross_entropy knows it too
LOOK_AHEAD = 64  # documents among which a pack looks for one that still fits


@dataclass(frozen=True)
class StaticShape:
    """What all packs of a run have in common: `tokens` (T), `documents` (N) and `max_seqlen`."""

    tokens: int
    documents: int
    max_seqlen: int

    @classmethod
    def of(cls, *uses):
        """The shape that fits the first `count` packs of each (`PackSampler`, count). N is no
        larger than they need, because attention pays for it, as for max_seqlen, the length of the
        longest document. Padding is cut into pieces no longer than that."""
        longest = max(int(sampler.lengths.max()) for sampler, _ in uses)
        most = max(sampler.most_documents(count, longest) for sampler, count in uses)
        return cls(uses[0][0].batch_tokens, most, longest)


# Changed from chapter-01: static shapes; the positions of the targets.
def packed_sequence_collate_fn(examples, shape=None):
    """Join documents into one pack, as in chapter 1, with one more entry:

        labelled      (L,) int64    the positions that have a target: the loss looks at no others,
                                    and finding them on a GPU would mean waiting for it (if you
                                    change the labels of a pack, change this too)

    With a `StaticShape` the pack has exactly its T, N and max_seqlen. Three documents of 2, 1 and 3
    tokens for StaticShape(tokens=8, documents=5, max_seqlen=4), whose last one has no tokens:

        input_ids     7  8 | 5 | 9  4  6 | 0  0  cu_seqlens  0 2 3 6 8 8
        labels        8  . | . | 4  6  . | .  .  max_seqlen  4
        position_ids  0  1 | 0 | 0  1  2 | 0  1  labelled    0 3 4"""
    examples = list(examples)
    if shape is not None:
        missing = shape.tokens - sum(len(input_ids) for input_ids, _ in examples)
        dummy = torch.zeros(max(missing, 0), dtype=torch.int64)  # any token: nothing uses them
        examples += [(piece, torch.full_like(piece, IGNORE))
                     for piece in dummy.split(shape.max_seqlen) if len(piece)]
    lengths = torch.tensor([len(input_ids) for input_ids, _ in examples])
    pack = {
        "input_ids": torch.cat([input_ids for input_ids, _ in examples]),
        "labels": torch.cat([F.pad(labels[1:], (0, 1), value=IGNORE) for _, labels in examples]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths.tolist()]),
        "cu_seqlens": F.pad(lengths.cumsum(0), (1, 0)).int(),
        "max_seqlen": int(lengths.max()),
    }
    pack["labelled"] = (pack["labels"] >= 0).nonzero()[:, 0]
    if shape is not None:
        empty = shape.documents - len(examples)
        if missing < 0 or empty < 0 or pack["max_seqlen"] > shape.max_seqlen:
            raise ValueError(f"{len(examples)} documents of {lengths.sum()} tokens, the longest of"
                             f" {lengths.max()}, do not fit {shape}")
        pack["cu_seqlens"] = F.pad(pack["cu_seqlens"], (0, empty), value=shape.tokens)
        pack["max_seqlen"] = shape.max_seqlen
    return pack


# Changed from chapter-01: looks ahead, so that little padding is needed.
class PackSampler:
    """The endless sequence of packs: each epoch shuffled anew, each pack filled to a token budget.

    `lengths` are the documents' lengths in tokens, none above `batch_tokens`. A pack takes
    documents in shuffled order (with `seed=None`, for evaluation, in their own), but skips those
    that do not fit any more and looks for others that do, among the next LOOK_AHEAD; what it skips
    comes first in the next pack. Pack i is always the same, so a sampler's state is one number."""

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
        following = iter(zip(order.tolist(), self.lengths[order].tolist()))
        waiting = list(islice(following, LOOK_AHEAD))  # (document, its length)
        packed, starts = [], [0]
        while waiting:
            room, place = self.batch_tokens, 0
            while place < len(waiting):
                document, length = waiting[place]
                if length > room:
                    place += 1
                    continue
                packed.append(document)
                room -= length
                del waiting[place]
                waiting += islice(following, 1)
            starts.append(len(packed))
        order = np.array(packed)
        if epoch + 1 == len(self.first_packs):
            self.first_packs.append(self.first_packs[-1] + len(starts) - 1)
        self._epoch, self._order, self._starts = epoch, order, starts

    def packs_in(self, epochs):
        """How many packs the first `epochs` epochs have together."""
        while len(self.first_packs) <= epochs:
            self._load_epoch(len(self.first_packs) - 1)
        return self.first_packs[epochs]

    def most_documents(self, count, piece):
        """The most documents in one of `count` packs; padding counts as some of `piece` tokens."""
        epoch = most = 0
        while self.packs_in(epoch) < count:
            self._load_epoch(epoch)
            tokens = np.add.reduceat(self.lengths[self._order], self._starts[:-1])
            documents = np.diff(self._starts) - (tokens - self.batch_tokens) // piece
            most = max(most, int(documents[:count - self.first_packs[epoch]].max()))
            epoch += 1
        return most

    def pack(self, index):
        """The list of documents (indices into `lengths`) of pack number `index`."""
        epoch = max(e for e, first in enumerate(self.first_packs) if first <= index)
        while self.packs_in(epoch + 1) <= index:
            epoch += 1
        if self._epoch != epoch:
            self._load_epoch(epoch)
        within = index - self.first_packs[epoch]
        return self._order[self._starts[within] : self._starts[within + 1]].tolist()
