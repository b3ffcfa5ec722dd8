"""Which files of a data set are meant, by their names: a split, and the one to train on.

The names are paths below the data set, with "/". Files of one split share a label:

    data/train_sft-00000-of-00003-a1b2.parquet    train_sft
    main/train-00000-of-00001.parquet             main/train
    train/0000.parquet                            train
    train-1.jsonl                                 train
    alpaca_data_cleaned.json                      alpaca_data_cleaned
    data/part-0.jsonl                             default (nothing in its name says more)
"""

import re

from common.data import readers
from common.errors import UserError

NOT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json",
            "license.txt", "readme.txt", "requirements.txt")
HELD_OUT = {"test", "valid", "validation", "val", "dev", "eval", "heldout", "held"}
NAMED = 8  # labels in a message

_SHARD = re.compile(r"(?:^|[-._])(\d+)-of-(\d+).*")
_NUMBER = re.compile(r"(?<=.)[-_.]\d+$")
_SAYS_NOTHING = re.compile(r"(part|shard|data|file|chunk)?[-_.]?\d*", re.IGNORECASE)


def choose(names, part, place, flag, page=None, unread=()):
    """The files that are meant among `names`, and a line that says so (None: it goes without).

    `place` is the data set as it was named, and `part` what stood behind the colon: a file, a
    label, the last component of one, a folder of several, or "". `page` is the data set's address
    on the Hub; in a local folder (None) all files are taken if none is named for training, but
    those that are held out. `unread` is what else is there. Raises UserError where nothing, or more
    than one thing, can be meant.
    """
    if part in names:
        readers.check_kind(part)
        return [part], _line(place, part, [], flag) if page else None
    groups, others = _groups(names, local=page is None)
    if not groups:
        for name in names:
            if name.endswith(".arrow"):
                readers.check_kind(f"{place}/{name}")
        where = f"; see {page}" if page else ""
        raise UserError(f"{place} holds no file that ends in {readers.KINDS}{where}")
    labels = _default(_inside(groups, part, place, flag), page is None, place, flag)
    files = sorted(file for one in labels for file in groups[one])
    others = [*(one for one in groups if one not in labels), *others, *unread]
    absent = missing(files)
    if not (page or others or absent):
        return files, None
    count = f"{len(files)} of {len(files) + absent}" if absent else str(len(files))
    what = f"{count} file{'s' if count != '1' else ''}"
    if len(files) == 1 and not absent and not part:
        what = files[0]
    elif len(labels) == 1:
        what = f"{labels[0]}, {what}"
    return files, _line(place, what, others, flag)


def is_data(name):
    """Whether a file of a data set holds examples, as far as its name tells."""
    *folders, file = name.split("/")
    hidden = any(component.startswith(".") for component in (*folders, file))
    return readers.suffix(name) is not None and not hidden and file.lower() not in NOT_DATA


def label(name):
    """What a data file is called for: its path without what numbers it and what says nothing."""
    *folders, file = name.split("/")
    stem = file[:-3] if file.lower().endswith(".gz") else file
    stem = _NUMBER.sub("", _SHARD.sub("", stem[:stem.rindex(".")]))
    folders = _without_data(folders)
    return "/".join(folders if _SAYS_NOTHING.fullmatch(stem) else [*folders, stem]) or "default"


def missing(files):
    """How many files are not there of those that `-00000-of-00003` in the others' names counts."""
    there, wanted = set(), {}
    for name in files:
        shard = _SHARD.search(name.rpartition("/")[2])
        if shard:
            kind = label(name), shard[2]
            there.add((kind, int(shard[1])))
            wanted[kind] = int(shard[2])
    return max(0, sum(wanted.values()) - len(there))


def _groups(names, local):
    """{label: files}, of one suffix each, and what is there in a second one, for a message.

    A text file beside others is as a rule no data: it counts if there is nothing else.
    """
    everything = sorted(filter(is_data, names))
    data = [name for name in everything if readers.suffix(name) != ".txt"] or everything
    kinds = {}
    for name in data:
        kind = list(readers.READERS).index(readers.suffix(name)), name.lower().endswith(".gz")
        kinds.setdefault(label(name), {}).setdefault(kind, []).append(name)
    groups, others = {}, [name for name in everything if name not in data] if local else []
    for found, by_kind in kinds.items():
        first, *rest = sorted(by_kind)
        groups[found] = by_kind[first]
        others += [by_kind[kind][0] for kind in rest]
    return groups, others


def _inside(groups, part, place, flag):
    """The labels that `part` stands for: one, the end of a single one, or a folder of some."""
    path = "/".join(_without_data(part.rstrip("/").split("/")))
    for exact in (part, path):
        if exact in groups:
            return [exact]
    last = [one for one in groups if one.rpartition("/")[2] == path]
    inside = [one for one in groups if not path or one.startswith(path + "/")]
    if len(last) == 1 or inside:
        return last if len(last) == 1 else inside
    if last:
        raise _several(last, place, flag)
    files = [file for group in groups.values() for file in group]
    raise UserError(f"{place} has no {part!r}{readers.nearest(part, [*groups, *files])}; it holds "
                    f"{_listed(groups)}, as in {flag} {place}:{next(iter(groups))}")


def _default(labels, local, place, flag):
    """Those of several labels to train on, or for --eval-data, those to hold out."""
    train, held_out = ([one for one in labels if _purpose(one) == purpose]
                       for purpose in ("train", "held out"))
    wanted = held_out if flag == "--eval-data" and held_out else train
    if len(labels) == 1 or len(wanted) == 1:
        return wanted or labels
    if wanted or not local:
        raise _several(wanted or labels, place, flag)
    if len(held_out) == len(labels):
        raise _several(labels, place, flag)
    return [one for one in labels if one not in held_out]


def _purpose(label):
    """"train" or "held out", by the last component of a label that says either; else None."""
    for component in label.split("/")[::-1]:
        words = re.split(r"[\W\d_]+", component.lower())
        if any(word.startswith("train") for word in words):
            return "train"
        if HELD_OUT & set(words):
            return "held out"
    return None


def _several(labels, place, flag):
    return UserError(f"{place} holds {_listed(labels)}: name one, as in {flag} {place}:{labels[0]}")


def _line(place, what, others, flag):
    there = f" (also there: {_listed(others)})" if others else ""
    return f"{flag.lstrip('-')}: {place}: {what}{there}"


def _listed(labels):
    labels = list(labels)
    more = [f"{len(labels) - NAMED} more"] if len(labels) > NAMED else []
    return ", ".join(labels[:NAMED] + more)


def _without_data(folders):
    """The folders of a path without leading ones that only say that there is data."""
    while folders and folders[0] in ("data", "default", ""):
        folders = folders[1:]
    return folders
