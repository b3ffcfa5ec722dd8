"""Records to documents of token ids and labels: once, streaming, and kept for the next run.

All documents lie in flat arrays, one behind the other: tokens (int32), which of them are trained
(bool), where each document begins, which record it came from, and a hash of its tokens (int64).
They are written to a file as they are made, and mapped from there, so a million short documents
need some hundred megabytes of memory.
"""

import hashlib
import os
import re
import sys
from array import array
from collections import Counter

import numpy as np
import torch
from tqdm import tqdm

from common.data import cache
from common.data.parts import LeftOut
from common.data.template import Refused
from common.errors import UserError
from common.ranks import is_main, say

IGNORE = -100  # the label of a token that is not trained
BATCH, CHARACTERS = 1000, 1_000_000  # records, and characters, tokenised at once
PIECE = 2**16  # characters: a longer text is tokenised in pieces, in parallel
KINDS = 1000  # of reasons to leave something out that are counted apart


class Encoded:
    """Documents of token ids. `encoded[i]` is (input_ids, labels), int64, labels not yet shifted.

    `tokens` (int32), `trained` (bool) and `offsets` (int64, one more than documents) are the flat
    arrays; `lengths` (int64) the documents' lengths. `records`: the number of the record that each
    document came from, counted from 0, skipped ones included; `digests`: a hash of each document's
    tokens. `chosen`: a subset, by document number. `notes`: what was left out when they were made,
    line by line.
    """

    def __init__(self, tokens, trained, offsets, records, digests, chosen=None, notes=()):
        self.tokens, self.trained, self.offsets = tokens, trained, offsets
        self.records, self.digests = records, digests
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


def encode(records, chat, max_length, too_long="truncate", vocab_size=None, title="data",
           strict=False):
    """Tokenise `records` (see common/data/datasets.py) into an `Encoded`, saying what was left out.

    A conversation longer than `max_length` tokens is cut, dropped or an error, as `too_long` says.
    A text is cut into consecutive documents, each of which begins with the last token of the one
    before: so nothing of it is lost, and every token but the first is predicted once. Records that
    cannot be used (empty, nothing to train on, control tokens in the text, refused by the
    template) are skipped, counted and named; so is what the template leaves out of the others,
    unless `strict`: then it is an error. Raises UserError where a token id is not below
    `vocab_size`, or nothing is left.
    """
    if max_length < 2:
        raise UserError(f"a limit of {max_length} token leaves nothing to predict; 2 at least")
    counts, first = Counter(), {}
    lengths, origins, digests = array("q"), array("q"), array("q")

    def place(number, record):
        return record.get("where", f"example {number + 1}")

    def note(reason, number, record):
        reason = reason if reason in counts or len(counts) < KINDS else "skipped, other reasons"
        counts[reason] += 1
        first.setdefault(reason, place(number, record))

    with cache.no_space(), cache.scratch() as token_file, cache.scratch() as trained_file:
        for chunk in _chunks(records):
            for number, record, layout, ids, trained in _tokenise(chunk, chat, note, strict):
                where = place(number, record)
                if vocab_size is not None and len(ids) and int(ids.max()) >= vocab_size:
                    raise UserError(f"{where}: token {int(ids.max())} is not below the model's "
                                    f"vocab_size {vocab_size}: is this its tokenizer?")
                if strict and layout.left_out:
                    raise UserError(f"{where}: the chat template leaves out "
                                    f"{', '.join(layout.left_out)} (--strict-template)")
                for what in layout.left_out:
                    note(f"without {what}: the chat template leaves that out", number, record)
                for reason in layout.notes if trained[1:].any() else ():
                    note(reason, number, record)
                for start, end in _documents(where, record, len(ids), max_length, too_long,
                                             lambda reason: note(reason, number, record)):
                    if trained[start + 1:end].any():  # nothing predicts a document's first token
                        token_file.write(ids[start:end])
                        trained_file.write(trained[start:end])
                        lengths.append(end - start)
                        origins.append(number)
                        digest = hashlib.sha256(ids[start:end]).digest()[:8]
                        digests.append(int.from_bytes(digest, "little", signed=True))
                    else:
                        note("skipped, nothing in it to train on"
                             + (f" within {max_length} tokens" if end < len(ids) else ""),
                             number, record)
        notes = [f"{count:,} {reason} (first: {first[reason]})"
                 for reason, count in counts.most_common()]
        ignored = list(getattr(records, "ignored", {}).items())  # files know
        if ignored:
            more = f" and {len(ignored) - 8} more" if len(ignored) > 8 else ""
            notes.insert(0, f"not used: the key{'s' * (len(ignored) > 1)} "
                         f"{', '.join(key for key, _ in ignored[:8])}{more} "
                         f"(first: {ignored[0][1]})")
        if not lengths:
            raise UserError("no example can be trained on: " + ("; ".join(notes[:5]) or "no data"))
        offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        token_file.flush(), trained_file.flush()
        tokens = np.memmap(token_file, np.int32, "r", shape=(offsets[-1],))
        trained = np.memmap(trained_file, bool, "r", shape=(offsets[-1],))
    origins, digests = np.array(origins, np.int64), np.array(digests, np.int64)
    return _announce(Encoded(tokens, trained, offsets, origins, digests, notes=notes), title)


def _chunks(records):
    """Lists of (number, record), not too long, with a progress bar for the work on them."""
    size = getattr(records, "size", None)  # files know how many bytes they have
    chunk, characters = [], 0
    with tqdm(total=size, unit="B" if size else " documents", unit_scale=True, desc="tokenising",
              delay=2, leave=False, disable=None if is_main() else True) as bar:
        for number, record in enumerate(records):
            chunk.append((number, record))
            texts = record.get("messages", [record])
            characters += sum(len(str(text.get("text") or text.get("content"))) for text in texts)
            if len(chunk) == BATCH or characters > CHARACTERS:
                yield chunk
                bar.update(records.done - bar.n if size else len(chunk))
                chunk, characters = [], 0
        yield chunk


def _tokenise(chunk, chat, note, strict):
    """(number, record, layout, ids, trained) of each record that can be used; `note` of others."""
    kept = []
    for number, record in chunk:
        try:
            if "refused" in record:
                raise Refused(record["refused"])
            kept.append((number, record, chat.layout(record)))
        except Refused as error:
            if strict and isinstance(error, LeftOut):
                raise UserError(f"{record.get('where', f'example {number + 1}')}: {error} "
                                "(--strict-template)") from None
            note(f"skipped, {error}", number, record)
    found, groups = {}, {True: [], False: []}  # by what the tokenizer shall add
    for n, (_, _, layout) in enumerate(kept):
        if layout.spans is None and len(layout.text) > PIECE:
            found[n] = _long(layout.text, chat)
        else:
            groups[layout.whole].append(n)
    for whole, group in groups.items():  # tokenizers are fast on many texts at once, in parallel
        for n, encoding in zip(group, chat.tokenise([kept[n][2].text for n in group], whole)):
            found[n] = encoding
    for n, (number, record, layout) in enumerate(kept):
        yield (number, record, layout, *chat.finish(layout, found.pop(n)))


def _long(text, chat):
    """The ids of a long text: the tokens of its pieces, if this tokenizer never looks across the
    line end at which they are cut, and else of all of it at once, which takes more memory."""
    for probe in ("a\nb", "It ends.\nNext", "1\n2", ":\n\nx", " \nA"):
        at = probe.rindex("\n") + 1
        pieces = [chat.tokenise([probe[:at]], True)[0].ids, chat.tokenise([probe[at:]])[0].ids]
        if sum(pieces, []) != chat.tokenise([probe], True)[0].ids:
            return chat.tokenise([text], True)[0].ids
    cuts = [0]
    while line_end := re.compile(r"\n(?=\w)").search(text, cuts[-1] + PIECE):
        cuts.append(line_end.end())
    pieces = [text[start:end] for start, end in zip(cuts, cuts[1:] + [len(text)])]
    ids = [np.array(chat.tokenise(pieces[:1], True)[0].ids, np.int32)]
    for n in range(1, len(pieces), 16):
        ids += [np.array(one.ids, np.int32) for one in chat.tokenise(pieces[n:n + 16])]
    return np.concatenate(ids)


def _documents(where, record, length, max_length, too_long, skip):
    """[(start, end)] of the documents that a record of `length` tokens makes."""
    if length <= max_length:
        return [(0, length)]
    if too_long == "error":
        raise UserError(f"{where}: {length:,} tokens, the limit is {max_length:,} (--max-seq-len, "
                        "--batch-tokens, the model's positions); raise it, or choose --too-long "
                        "truncate or drop")
    if too_long == "truncate" and "text" in record and "rendered" not in record:
        return [(start, min(start + max_length, length))
                for start in range(0, length - 1, max_length - 1)]
    skip(f"{'cut' if too_long == 'truncate' else 'dropped'}, longer than {max_length} tokens")
    return [(0, max_length)] if too_long == "truncate" else []


def cached(make, key, files=(), title="data"):
    """`make()`, an `Encoded`, or what an earlier call with the same `key` and `files` made.

    `key` is anything that JSON can write; of the files, the content counts. See common/data/cache.py.
    """
    encoded, earlier = cache.cached(make, key, files, Encoded)
    return _announce(encoded, title) if earlier else encoded


def _announce(encoded, title):
    """Print how much there is to train on, and what was left out; returns its argument."""
    say(f"{title}: {len(encoded):,} documents, {len(encoded.tokens):,} tokens, "
        f"{np.mean(encoded.trained):.0%} of them trained on")
    for note in encoded.notes[:8]:
        say(f"{title}: {note}")
    if len(encoded.notes) > 8:
        say(f"{title}: and {len(encoded.notes) - 8} more such lines")
    return encoded


def virtual(count, vocab_size, max_length, seed):
    """`count` documents of random tokens, all trained, for throughput where there is no data.

    Lengths are log-normal, as lengths of instruction data are: half of them below a quarter of
    `max_length`, none above it.
    """
    random = np.random.default_rng(seed)
    lengths = np.exp(random.normal(np.log(max(2, max_length / 4)), 0.8, count))
    lengths = np.clip(lengths, 2, max_length).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = random.integers(0, vocab_size, offsets[-1], dtype=np.int32)
    return Encoded(tokens, np.ones(len(tokens), bool), offsets, np.arange(count), np.arange(count))


def split(encoded, seed, share=0.02, most=200):
    """(training, held-out): 2 % of the documents, 1 to 200, are held out; prints how many.

    No document is on both sides: one that occurs several times is trained on, every time, or, if
    there are no others, held out with all its copies.
    """
    if len(encoded) < 2:
        raise UserError("one example cannot also be held out: add some, or give --eval-data")
    _, groups, copies = np.unique(encoded.digests[encoded.chosen], return_inverse=True,
                                  return_counts=True)
    if copies.max() == len(encoded):
        raise UserError(f"all {len(encoded):,} documents are the same: give others with "
                        "--eval-data, to be held out")
    order = np.random.default_rng((seed, 1)).permutation(len(encoded))
    count = min(most, max(1, int(share * len(encoded))))
    single = copies[groups[order]] == 1
    held = order[single][:count]
    if not len(held):
        held = np.flatnonzero(groups == groups[order[0]])
    training = order[~np.isin(order, held)]
    say(f"held out: {len(held):,} of these documents (--eval-data takes others)")
    if not single.all():
        say(f"held out: {int((~single).sum()):,} documents occur more than once; none of them is "
            "both trained on and held out")
    arrays = (encoded.tokens, encoded.trained, encoded.offsets, encoded.records, encoded.digests)
    return tuple(Encoded(*arrays, encoded.chosen[np.sort(part)]) for part in (training, held))


def say_shared(train, held_out):
    """Print how many of the documents of `held_out`, another file's, are trained on too."""
    shared = np.isin(held_out.digests[held_out.chosen], train.digests[train.chosen]).sum()
    if shared:
        say(f"held out: {shared:,} of these documents are in the training data too, so their loss "
            "says little")


def show_example(encoded, chat, limit=400):
    """The first document as text, what is trained on marked: in green, or in [brackets] where the
    output is no terminal or NO_COLOR is set. Of a long one, the beginning and the end."""
    ids, labels = encoded[0]
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    begin, end = ("\033[32m", "\033[0m") if colour else ("[", "]")
    trained = (labels >= 0).tolist()
    parts = [(0, len(ids))]
    if len(ids) > limit:
        parts = [(0, limit * 3 // 4), (len(ids) - limit // 4, len(ids))]
    lines = ["an example; what the model learns to write is "
             + ("green:" if colour else "in [brackets]:"), ""]
    for first, last in parts:
        if first > 0:
            lines.append(f"\n... {first - parts[0][1]:,} tokens ...\n")
        start = first
        for i in range(first + 1, last + 1):
            if i == last or trained[i] != trained[start]:
                text = _printable(chat.decode(ids[start:i].tolist(), skip_special=False))
                lines[-1] += begin + text + end if trained[start] else text
                start = i
    return "\n".join(lines).rstrip()


def _printable(text):
    """Text that cannot command the terminal: control characters are spelled out."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
