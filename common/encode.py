"""Records to documents of token ids and labels: once, streaming, and kept for the next run.

All documents lie in flat arrays, one behind the other: tokens (int32), which of them are trained
(bool), and where each document begins (int64). They are written to a file as they are made, and
mapped from there, so a million short documents need some hundred megabytes of memory.
"""

import os
import re
import sys
from collections import Counter

import numpy as np
import torch
from tqdm import tqdm

from common import cache
from common.errors import UserError
from common.template import Refused, bounded_memory

IGNORE = -100  # the label of a token that is not trained
CHUNK, CHARACTERS = 1000, 1_000_000  # records, and characters, tokenised at once
PIECE = 2**16  # characters: a longer text is tokenised in pieces, in parallel
KINDS = 1000  # of reasons to skip that are counted apart


class Encoded:
    """Documents of token ids. `encoded[i]` is (input_ids, labels), int64, labels not yet shifted.

    `tokens` (int32), `trained` (bool) and `offsets` (int64, one more than documents) are the flat
    arrays; `lengths` (int64) the documents' lengths. `chosen`: a subset, by document number.
    `notes`: what was left out when they were made, line by line.
    """

    def __init__(self, tokens, trained, offsets, chosen=None, notes=()):
        self.tokens, self.trained, self.offsets = tokens, trained, offsets
        self.chosen = np.arange(len(offsets) - 1) if chosen is None else np.asarray(chosen)
        self.lengths = np.diff(offsets)[self.chosen].astype(np.int64)
        self.notes = list(notes)

    def __len__(self):
        return len(self.chosen)

    def __getitem__(self, i):
        span = slice(*self.offsets[self.chosen[i]:][:2])
        input_ids = torch.from_numpy(self.tokens[span].astype(np.int64))
        trained = torch.from_numpy(np.array(self.trained[span]))
        return input_ids, torch.where(trained, input_ids, IGNORE)


def encode(records, chat, max_length, too_long="truncate", vocab_size=None):
    """Tokenise `records` (see common/datasets.py) into an `Encoded`, saying what was left out.

    A conversation longer than `max_length` tokens is cut, dropped or an error, as `too_long` says.
    A text is cut into consecutive documents, each of which begins with the last token of the one
    before: so nothing of it is lost, and every token but the first is predicted once. Records that
    cannot be used (empty, nothing to train on, control tokens in the text, refused by the
    template) are skipped, counted and named. Raises UserError where a token id is not below
    `vocab_size`, or nothing is left.
    """
    if max_length < 2:
        raise UserError(f"documents of {max_length} token: at least 2 are needed to predict one")
    counts, first, lengths = Counter(), {}, [np.zeros(1, np.int64)]
    seen = 0

    def skip(reason, record):
        reason = reason if reason in counts or len(counts) < KINDS else "skipped, other reasons"
        counts[reason] += 1
        first.setdefault(reason, record.get("where", f"example {seen}"))

    with cache.no_space(), cache.scratch() as token_file, cache.scratch() as trained_file:
        for chunk in _chunks(records):
            for record, ids, trained in _tokenise(chunk, chat, skip):
                seen += 1
                if vocab_size is not None and len(ids) and int(ids.max()) >= vocab_size:
                    raise UserError(
                        f"{record.get('where', f'example {seen}')}: token {int(ids.max())} is not "
                        f"below the model's vocab_size {vocab_size}: is this its tokenizer?")
                for start, end in _documents(record, len(ids), max_length, too_long, skip):
                    if trained[start + 1:end].any():  # nothing predicts a document's first token
                        token_file.write(ids[start:end])
                        trained_file.write(trained[start:end])
                        lengths.append(end - start)
                    else:
                        blank = not chat.decode(ids).strip()
                        skip("skipped, empty" if blank else "skipped, nothing in it to train on"
                             + (f" within {max_length} tokens" if end < len(ids) else ""), record)
        notes = [f"{count:,} {reason} (first: {first[reason]})"
                 for reason, count in counts.most_common()]
        if len(lengths) == 1:
            raise UserError("no example can be trained on: " + ("; ".join(notes[:5]) or "no data"))
        offsets = np.cumsum(np.hstack(lengths), dtype=np.int64)
        token_file.flush(), trained_file.flush()
        tokens = np.memmap(token_file, np.int32, "r", shape=(offsets[-1],))
        trained = np.memmap(trained_file, bool, "r", shape=(offsets[-1],))
    return _say(Encoded(tokens, trained, offsets, notes=notes))
