"""Records to documents of token ids and labels, kept for the next run. Tokens go to a file as they
are made and are mapped from there: a million short documents need some hundred MB of memory."""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
import time
from array import array
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.data.parts import LeftOut
from common.data.readers import Records
from common.data.template import Refused
from common.errors import UserError, listed, printable, writing
from common.files import checkpoint
from common.files.json_files import write_whole
from common.ranks import is_main, say

IGNORE = -100  # the label of a token that is not trained
BATCH, CHARACTERS = 1000, 1_000_000  # records, and characters, tokenised at once
PIECE = 2**16  # characters: a longer text is tokenised in pieces, in parallel
TOKEN = np.dtype([("id", np.int32), ("trained", bool)])
# Where it starts, its tokens, the trained ones; its record (skipped ones count); a hash of its ids.
DOCUMENT = np.dtype([(name, np.int64) for name in (
    "start", "length", "trained", "record", "digest")])
CODE = sorted(Path(__file__).parent.glob("*.py"))  # on which tokens and masks depend


class Encoded:
    """Documents of token ids. `encoded[i]` is (input_ids, labels), int64, labels not yet shifted.
    `tokens` is an array of TOKEN, one document after another, and `documents` one of DOCUMENT."""

    unit = "documents"

    def __init__(self, tokens, documents, notes=()):
        self.tokens, self.documents, self.notes = tokens, documents, list(notes)
        self.lengths = np.ascontiguousarray(documents["length"])

    def __len__(self):
        return len(self.documents)

    def __getitem__(self, i):
        start, length, *_ = self.documents[i].item()
        tokens = self.tokens[start:start + length]
        input_ids = torch.from_numpy(tokens["id"].astype(np.int64))
        trained = torch.from_numpy(tokens["trained"].copy())
        return input_ids, torch.where(trained, input_ids, IGNORE)

    def announce(self, title):
        """Print how much there is to train on, and what was left out; returns itself."""
        total, trained = self.documents["length"].sum(), self.documents["trained"].sum()
        say(f"{title}: {len(self):,} {self.unit}, {total:,} tokens, {trained / total:.0%} of them "
            "trained on")
        more = [f"and {len(self.notes) - 8} more such lines"] if len(self.notes) > 8 else []
        for note in self.notes[:8] + more:
            say(f"{title}: {note}")
        return self


def encode(records, chat, max_length, too_long="truncate", vocab_size=None, title="data",
           strict=False, file=None):
    """Tokenise what `readers.Records` gives into an `Encoded`, saying what was left out.

    A conversation longer than `max_length` tokens is cut, dropped or an error, as `too_long` says.
    A text is cut into documents that each begin with the last token of the one before: so every
    token but the first is predicted once. Records that cannot be used are skipped, counted and
    named, as is what the template leaves out of others (if `strict`, a UserError)."""
    if max_length < 2:
        raise UserError(f"a limit of {max_length} token leaves nothing to predict; 2 at least")
    file = file or tempfile.TemporaryFile()
    reasons, rows, written = {}, array("q"), 0  # rows: a DOCUMENT after another

    def note(reason, where, by_template=False):
        if by_template and strict:
            raise UserError(f"{where}: {reason} (--strict-template)")
        reason = reason if reason in reasons or len(reasons) < 1000 else "skipped, other reasons"
        count, first, last = reasons.get(reason, (0, where, None))
        reasons[reason] = count + (where != last), first, where  # an example's records count once

    for number, where, record, layout, ids, trained in _tokenise(records, chat, note):
        if vocab_size is not None and len(ids) and ids.max() >= vocab_size:
            raise UserError(f"{where}: token {ids.max()} is not below the model's vocab_size "
                            f"{vocab_size}: is this its tokenizer?")
        for what in layout.left_out:
            note(f"without {what}: the chat template leaves that out", where, True)
        for reason in layout.notes if trained[1:].any() else ():
            note(reason, where)
        tokens = np.empty(len(ids), TOKEN)
        tokens["id"], tokens["trained"] = ids, trained
        for start, end in _documents(where, record, len(ids), max_length, too_long, note):
            if not trained[start + 1:end].any():  # nothing predicts a document's first token
                note("skipped, nothing in it to train on"
                     + (f" within {max_length} tokens" if end < len(ids) else ""), where)
                continue
            file.write(tokens[start:end].tobytes())
            digest = hashlib.sha256(ids[start:end]).digest()[:8]
            rows.extend((written, end - start, int(trained[start:end].sum()), number,
                         int.from_bytes(digest, "little", signed=True)))
            written += end - start
    notes = [f"{count:,} {reason} (first: {first})" for reason, (count, first, _)
             in sorted(reasons.items(), key=lambda item: -item[1][0])]
    if isinstance(records, Records) and records.ignored:
        keys = records.ignored
        notes.insert(0, f"not used: the key{'s' * (len(keys) > 1)} {listed(keys)} "
                     f"(first: {next(iter(keys.values()))})")
    if not rows:
        raise UserError("no example can be trained on: " + ("; ".join(notes[:5]) or "no data"))
    file.flush()
    made = Encoded(np.memmap(file, TOKEN, "r"), np.frombuffer(rows, DOCUMENT), notes)
    return made.announce(title)


def _tokenise(records, chat, note):
    """(number, place, record, layout, ids, trained) of all records that can be used."""
    files = isinstance(records, Records)  # they know how many bytes they have
    batch, characters = [], 0
    with tqdm(total=records.size if files else None, unit="B" if files else " documents",
              unit_scale=True, desc="tokenising", delay=2, leave=False,
              disable=None if is_main() else True) as bar:
        for number, record in enumerate(records):
            where = record.get("where", f"example {number + 1}")
            try:
                if "refused" in record:
                    raise Refused(record["refused"])
                layout = chat.layout(record)
                batch.append((number, where, record, layout))
                characters += len(layout.text)
            except Refused as error:
                note(f"skipped, {error}", where, isinstance(error, LeftOut))
            if len(batch) == BATCH or characters > CHARACTERS:
                yield from _tokenise_batch(batch, chat)
                batch, characters = [], 0
            bar.update(records.done - bar.n if files else 1)
        yield from _tokenise_batch(batch, chat)


def _tokenise_batch(batch, chat):
    """Add ids and trained to each. Tokenizers are fast on many texts at once, in parallel."""
    for (whole, long), group in itertools.groupby(batch, lambda one: (
            one[-1].whole, one[-1].spans is None and len(one[-1].text) > PIECE)):
        group = list(group)
        texts = [layout.text for *_, layout in group]
        encodings = (_tokenise_long(text, whole, chat) for text in texts) if long else (
            chat.tokenise(texts, whole))
        for one, encoding in zip(group, encodings):
            yield (*one, *chat.finish(one[-1], encoding))


def _tokenise_long(text, whole, chat):
    """The ids of a long text, tokenised in pieces unless this tokenizer looks across line ends."""
    def tokenised(*pieces):
        batches = [pieces[:1]] + [pieces[n:n + 16] for n in range(1, len(pieces), 16)]
        return np.concatenate([np.array(one.ids, np.int32) for n, batch in enumerate(batches)
                               for one in chat.tokenise(batch, whole and n == 0)])

    probes = ("a\n", "b"), ("It ends.\n", "Next"), ("1\n", "2"), (":\n\n", "x"), (" \n", "A")
    if all(np.array_equal(tokenised(*probe), tokenised("".join(probe))) for probe in probes):
        return tokenised(*re.findall(rf"(?s:.{{{PIECE},}}?)\n(?=\w)|(?s:.+)", text))
    return tokenised(text)


def _documents(where, record, length, max_length, too_long, note):
    """[(start, end)] of the documents that a record of `length` tokens makes."""
    if length <= max_length:
        return [(0, length)]
    if too_long == "error":
        raise UserError(f"{where}: {length:,} tokens, the limit is {max_length:,} (--max-seq-len, "
                        "--batch-tokens, the model's positions); raise it, or see --too-long")
    cut = too_long == "truncate"
    if cut and "text" in record and "rendered" not in record:
        return [(start, min(start + max_length, length))
                for start in range(0, length - 1, max_length - 1)]
    note(f"{'cut' if cut else 'dropped'}, longer than {max_length} tokens", where)
    return [(0, max_length)] if cut else []


def cached(make, key, files=(), title="data"):
    """The `Encoded` that `make(file)` gives, writing tokens to `file`, or gave before with the same
    `key` (of JSON), `files` and code, kept in $XDG_CACHE_HOME or ~/.cache. One process makes it."""
    contents = [(Path(file).suffix, checkpoint.fingerprint(file)) for file in [*CODE, *files]]
    name = hashlib.sha256(json.dumps([key, contents], sort_keys=True).encode()).hexdigest()
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    path = home / "bareloop" / "encoded" / name
    with contextlib.ExitStack() as stack:
        stack.enter_context(writing(f"the tokenised data in {path.parent} (XDG_CACHE_HOME)"))
        with contextlib.suppress(OSError):  # if nothing can be locked, each makes its own
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(path.with_suffix(".lock"), "w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
            for left_over in path.parent.glob("new-*"):  # by a process that was killed
                if time.time() - left_over.stat().st_mtime > 24 * 3600:
                    shutil.rmtree(left_over)
        try:
            if path.is_dir():
                notes = checkpoint.verify(path)["extra"]["notes"]
                tokens, documents = path / "tokens", np.fromfile(path / "documents", DOCUMENT)
                return Encoded(np.memmap(tokens, TOKEN, "r"), documents, notes).announce(title)
        except (UserError, LookupError):
            print(f"{path}: damaged; the data are tokenised again", file=sys.stderr)
        try:
            new = stack.enter_context(tempfile.TemporaryDirectory(prefix="new-", dir=path.parent))
        except OSError as error:
            say(f"note: the tokenised data cannot be kept in {path.parent}: {error.strerror}")
            return make(tempfile.TemporaryFile())
        with open(Path(new, "tokens"), "w+b") as file:
            made = make(file)
        made.documents.tofile(Path(new, "documents"))
        fingerprints = {file.name: checkpoint.fingerprint(file) for file in Path(new).iterdir()}
        write_whole(Path(new, checkpoint.MANIFEST),
                    checkpoint.encoded(fingerprints, {"notes": made.notes}))
        shutil.rmtree(path, ignore_errors=True)  # what was damaged
        with contextlib.suppress(OSError):  # without a lock others may be faster
            os.replace(new, path)
        return made


def virtual(count, vocab_size, max_length, seed):
    """`count` documents of random tokens, all trained, to measure throughput without data. Lengths
    are log-normal, as in instruction data: half are below a quarter of `max_length`."""
    random = np.random.default_rng(seed)
    lengths = np.exp(random.normal(np.log(max(2, max_length / 4)), 0.8, count))
    documents = np.zeros(count, DOCUMENT)
    documents["length"] = documents["trained"] = np.clip(lengths, 2, max_length).astype(np.int64)
    documents["start"] = np.cumsum(documents["length"]) - documents["length"]
    documents["record"] = documents["digest"] = np.arange(count)
    tokens = np.ones(documents["length"].sum(), TOKEN)
    tokens["id"] = random.integers(0, vocab_size, len(tokens), dtype=np.int32)
    return Encoded(tokens, documents)


def split(encoded, seed, share=0.02, most=200):
    """(training, held-out): 2 % of the documents, 1 to 200, are held out; prints how many. All
    copies of a document go to the same side: training, unless there are only copies."""
    count = len(encoded)
    _, groups, copies = np.unique(encoded.documents["digest"], return_inverse=True,
                                  return_counts=True)
    if len(copies) == 1:
        all_one = f"all {encoded.unit} ({count:,}) are the same" if count > 1 else "it is only one"
        raise UserError(f"nothing can be held out, as {all_one}: give others with --eval-data")
    order = np.random.default_rng((seed, 1)).permutation(count)
    single = copies[groups[order]] == 1
    held = order[single][:min(most, max(1, int(share * count)))]
    held = held if len(held) else np.flatnonzero(groups == groups[order[0]])
    say(f"held out: {len(held):,} of these {encoded.unit} (--eval-data takes others)")
    if not single.all():
        say(f"held out: {(~single).sum():,} {encoded.unit} occur more than once; none of them is "
            "both trained on and held out")
    is_held = np.isin(np.arange(count), held)
    return tuple(type(encoded)(encoded.tokens, encoded.documents[part])
                 for part in (~is_held, is_held))


def show_example(encoded, chat, limit=400):
    """The first document as text, with what is trained on in green, or in [brackets] if the output
    is not a terminal or NO_COLOR is set. Of a long one, the beginning and the end."""
    ids, labels = encoded[0]
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    begin, end, how = ("\033[32m", "\033[0m", "green") if colour else ("[", "]", "in [brackets]")
    hidden = range(limit * 3 // 4, len(ids) - limit // 4) if len(ids) > limit else ()
    shown = f"an example; what the model learns to write is {how}:\n"
    for kind, places in itertools.groupby(
            range(len(ids)), lambda i: "hidden" if i in hidden else bool(labels[i] >= 0)):
        places = list(places)
        lines = chat.decode(ids[places].tolist(), skip_special=False).split("\n")
        text = "\n".join(printable(line, len(line)) for line in lines)
        shown += {"hidden": f"\n\n... {len(places):,} tokens ...\n", True: begin + text + end,
                  False: text}[kind]
    return shown.rstrip()
