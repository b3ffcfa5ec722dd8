"""Which files of a data set are meant, by their names: a split, and the one to train on.

The names are paths below the data set, with "/". Files of one split share a label:

    data/train_sft-00000-of-00003-a1b2.parquet    train_sft
    main/train-00000-of-00001.parquet             main/train
    train-1.jsonl                                 train
    data/part-0.jsonl                             default (nothing in its name says more)"""

import re

from common.data import readers
from common.errors import UserError, listed, nearest
from common.ranks import say

NOT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json",
            "license.txt", "readme.txt", "requirements.txt")

_SUFFIX = re.compile(r"\.\w+(\.gz)?$", re.IGNORECASE)
_SHARD = re.compile(r"(?:^|(?<=/)|[-._])(\d+)-of-(\d+)[^/]*$")
_NUMBER = re.compile(r"(?<=.)[-_.]\d+$")
_PURPOSE = re.compile(r"(?<![^\W\d_])(train|(?:test|val|valid|validation|dev|eval|held|heldout)"
                      r"(?![^\W\d_]))")
_SAYS_NOTHING = re.compile(r"(part|shard|data|file|chunk)?[-_.]?\d*", re.IGNORECASE)
_NO_PART_OF_IT = re.compile(r"^((data|default)?/)*")  # folders whose names say nothing either


def choose(names, part, place, flag, page=None):
    """The files that are meant among `names`; prints the choice if there was one.

    `place` is the data set as it was named, `page` its address on the Hub, and `part` what followed
    the colon: a file, a label, the last component of one, a folder of several, or "". In a local
    folder (no `page`) with no files named for training, all are taken but those named as held out;
    subfolders count only if it has no files itself. Raises UserError unless one thing is meant."""
    if part in names:
        return [part]
    data = sorted(name for name in names if readers.suffix(name) and "/." not in f"/{name}"
                  and name.split("/")[-1].lower() not in NOT_DATA)
    groups = _groups([name for name in data if part or page or "/" not in name] or data)
    if not groups:
        raise UserError(f"{page or place} holds no file that can be read; {readers.KINDS}")
    labels = _labels(groups, part, page is None, place, flag)
    files = sorted(file for one in labels for file in groups[one])
    total = len(files) + missing(files)
    others = [one for one in groups if one not in labels]
    others += sorted({*data} - {*sum(groups.values(), [])})
    if page or others or total > len(files):
        there = f" (also there: {listed(others)})" if others else ""
        count = f"{len(files)} of {total} file{'s' * (total > 1)}"
        say(f"{flag.lstrip('-')}: {place}: {listed(labels)}, {count}{there}")
    return files


def label(name):
    """The label of a data file: its path without numbering and without words that say nothing."""
    folder, slash, file = _NO_PART_OF_IT.sub("", name).rpartition("/")
    stem = _NUMBER.sub("", _SHARD.sub("", _SUFFIX.sub("", file)))
    return (folder if _SAYS_NOTHING.fullmatch(stem) else folder + slash + stem) or "default"


def missing(files):
    """How many files are missing, if others' names end in, say, `-00000-of-00003`."""
    shards = [(label(name), shard[2]) for name in files if (shard := _SHARD.search(name))]
    return max(0, sum(int(count) for _, count in {*shards}) - len(shards))


def _groups(data):
    """{label: files}, of one suffix each; text files count only if there are no others."""
    def kind(name):
        return [*readers.READERS].index(readers.suffix(name)), name.lower().endswith(".gz")

    groups = {}
    data = [name for name in data if readers.suffix(name) != ".txt"] or data
    for name in sorted(data, key=kind):
        files = groups.setdefault(label(name), [])
        if not files or kind(name) == kind(files[0]):
            files.append(name)
    return dict(sorted(groups.items()))


def _labels(groups, part, local, place, flag):
    """The labels that `part` means: one, by its name or its end, or a folder's that suit `flag`."""
    path = _NO_PART_OF_IT.sub("", part.rstrip("/") + "/").rstrip("/")
    folder = [one for one in groups if not path or one.startswith(path + "/")]
    found = ([one for one in groups if one in (part, path)]
             or [one for one in groups if one.rpartition("/")[2] == path] or folder)

    def purpose(label):  # by the last component that has one; "train" wins within it
        words = [_PURPOSE.findall(component) for component in label.lower().split("/")]
        last = next(filter(None, words[::-1]), [""])
        return "train" if "train" in last else last[0]

    says = {one: purpose(one) for one in found}
    train, unmarked = ([one for one in found if says[one] == said] for said in ("train", ""))
    held_out = [one for one in found if one not in train + unmarked]
    meant = (held_out if flag == "--eval-data" and held_out else train) or found
    if local and unmarked and meant is folder:
        return unmarked
    if len(meant) == 1:
        return meant
    why = ""
    if not meant:
        near = nearest(part, [*groups, *sum(groups.values(), [])])
        meant, why = [*groups], f"{place} has no {part!r}{near}; "
    raise UserError(f"{why}{place} holds {listed(meant)}: name one, as in {flag} "
                    f"{place}:{meant[0]}")
