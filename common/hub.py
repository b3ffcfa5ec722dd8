"""Names to local files: built-in architectures, folders, and the Hugging Face Hub.

Everything that can go wrong between a name and a file is told in one line, with the next command
to type. Downloads go through huggingface_hub, with its cache and its progress bars.
"""

import difflib
import errno
import os
import re
import sys
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    CacheNotFound, EntryNotFoundError, GatedRepoError, HfHubHTTPError, HFValidationError,
    LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError)

from common.data import readers, splits
from common.errors import UserError
from common.ranks import say

COMMON = Path(__file__).resolve().parent
ARCHITECTURES = ("qwen3-0.6b", "qwen3-8b", "llama-3.2-1b", "llama-3.1-8b")
# Offline the Hub's cache counts as whole only for the patterns that it was filled with, so there
# is one list. It leaves out pickled weights and Llama's original/*.pth.
PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# What a failed connection raises: the HTTP library under huggingface_hub, another one in each of
# its major versions, and its download helper hf_xet (RuntimeError).
_CONNECTION = (OSError, RuntimeError, *HfHubHTTPError.__bases__)


def resolve(name, flag="--model"):
    """The folder of a model: `tiny`, a built-in architecture, a local folder, or a Hub id.

    A folder of ARCHITECTURES holds config.json only, for `--init random`. A Hub id (`owner/name`)
    is downloaded, or found in the Hub's cache. Raises UserError, naming `flag`, where there is no
    such thing, with the nearest names, or where it cannot be had (gated, private, offline).
    """
    text = str(name)
    if text == "tiny":
        return COMMON / "tiny"
    if text in ARCHITECTURES:
        return COMMON / "architectures" / text
    path = Path(os.path.expanduser(text))
    if os.path.isdir(path):
        return path
    if os.path.exists(path):
        raise UserError(f"{path} is a file: give the folder that holds the model")
    if not _HUB_ID.fullmatch(text):
        raise UserError(f"{flag} {text}: no such folder{_near(text, ('tiny', *ARCHITECTURES))}"
                        " (a model on the Hub is written owner/name)")
    with _plain_words(text, "model"):
        return Path(huggingface_hub.snapshot_download(text, allow_patterns=PATTERNS))


def resolve_data(name, flag="--data"):
    """The data files that `name` stands for, as a list of paths; `name` may be a list of names.

    A name is a file that `common/data/readers.py` reads, a folder of such files, a data set on the Hub
    (`owner/name`), or a part of one of the latter two, a split or a file: `owner/name:test`. Which
    files that means is decided in `common/data/splits.py`; where there was a choice, the screen says it.
    Raises UserError, naming `flag`, where there is no such thing, where several could be meant, or
    where it cannot be had or read here.
    """
    if isinstance(name, (list, tuple)):
        return [path for each in name for path in resolve_data(each, flag)]
    text = str(name)
    path = Path(os.path.expanduser(text))
    if os.path.exists(path) and not os.path.isdir(path):
        readers.check_kind(path)
        return [path]
    place, _, part = (text, "", "") if os.path.isdir(path) else text.partition(":")
    folder = Path(os.path.expanduser(place))
    if os.path.isdir(folder):
        names, unread = _files_below(folder, deep=part)
        chosen, note = splits.choose(names, part, place, flag, unread=unread)
        if note:
            say(note)
        return [folder / file for file in chosen]
    local = readers.suffix(path) and not part
    if local or not _HUB_ID.fullmatch(place):
        raise UserError(f"{flag} {text}: no such file or folder{_near(text, ('tiny', 'virtual'))}"
                        " (a data set on the Hub is written owner/name or owner/name:split)")
    if readers.suffix(part):
        chosen, note = [part], f"{flag.lstrip('-')}: {place}: {part}"
    else:
        chosen, note = _choose(place, part, flag)
    for file in chosen:
        readers.check_kind(file)  # before anything is downloaded
    say(note)
    paths = []
    for file in chosen:
        with _plain_words(place, "dataset", file):
            paths.append(Path(huggingface_hub.hf_hub_download(place, file, repo_type="dataset")))
    return paths


def whole_name(name):
    """A local file or folder by its absolute path, so that it is found from any other folder, with
    `:split` behind it or not; what is no such path, and what means something else first (`tiny`,
    `virtual`...), as it is."""
    path = os.path.expanduser(name)
    if name in ("auto", "tiny", "virtual", *ARCHITECTURES):
        return name
    if os.path.exists(path):
        return os.path.abspath(path)
    folder, colon, part = path.partition(":")
    return os.path.abspath(folder) + colon + part if colon and os.path.isdir(folder) else name


def _files_below(folder, deep):
    """(the files of a folder as paths below it, its subfolders with data that are not read).

    Files in subfolders count only if it has no data itself, or if `deep`. What is hidden does not.
    """
    def fail(error):
        raise UserError(f"{folder}: cannot be read ({error.strerror})")

    names, unread = [], []
    for place, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names += [(Path(place) / file).relative_to(folder).as_posix() for file in files]
        if Path(place) == folder and not deep and any(map(splits.is_data, names)):
            unread = [f"{name}/" for name in folders if any(
                map(splits.is_data, next(os.walk(folder / name), ("", (), ()))[2]))]
            break
    return sorted(names), sorted(unread)


def _choose(repo, part, flag):
    """The files of a data set on the Hub that `part` stands for, and what to say of the choice."""
    offline = None
    try:
        with _plain_words(repo, "dataset"):
            names = huggingface_hub.HfApi().list_repo_files(repo, repo_type="dataset")
    except UserError as error:
        names, offline = _cached(repo), error
        if not names:
            raise
    chosen, note = splits.choose(names, part, repo, flag, _page(repo, "dataset"))
    if offline and splits.missing(chosen):
        raise offline
    return chosen, note


def _cached(repo):
    """The names of those files of a data set that are in the Hub's cache."""
    try:
        repos = huggingface_hub.scan_cache_dir().repos
    except CacheNotFound:
        return []
    return sorted({
        file.file_path.relative_to(revision.snapshot_path).as_posix()
        for cached in repos if (cached.repo_id, cached.repo_type) == (repo, "dataset")
        for revision in cached.revisions for file in revision.files})


def _near(text, names):
    """`; did you mean X?`: built-in names, and what lies beside a mistyped path."""
    matches = difflib.get_close_matches(text.lower(), names, n=2)
    path = Path(os.path.expanduser(text))
    if os.path.isdir(path.parent):
        beside = {file.name for file in path.parent.iterdir()}
        close = difflib.get_close_matches(path.name, beside, n=2)
        matches += [str(path.parent / name) for name in close]
    return f"; did you mean {' or '.join(matches)}?" if matches else ""


def _page(repo, kind):
    return f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repo}"


@contextmanager
def _plain_words(repo, kind, file=None):
    """Turn huggingface_hub's errors about `repo` into UserErrors. The order matters: a gated
    repository is a kind of missing one for it, and a missing cache entry a kind of missing file."""
    script = f"python {sys.argv[0]} " if sys.argv[0].endswith(".py") else ""
    options = "--model tiny --data tiny" if script.endswith("train.py ") else "--model tiny"
    tiny = f"to do without the Hub: {script}{options}"
    try:
        yield
    except GatedRepoError as error:
        if _status(error) == 401:
            raise UserError(
                f"{repo} is gated: accept its licence at {_page(repo, kind)}, then"
                " `hf auth login` (or set HF_TOKEN)") from error
        raise UserError(
            f"{repo} is gated and your account has no access: ask for it at {_page(repo, kind)}"
            " (`hf auth whoami` shows the account)") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{repo}: no such folder here, and no such {kind} on the Hub{_near(repo, ())}; if it"
            " is private: `hf auth login` (or set HF_TOKEN)") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        if constants.HF_HUB_OFFLINE:
            raise UserError(
                f"{repo} is not complete in the cache and HF_HUB_OFFLINE is set: unset it to"
                f" download, or, {tiny}") from error
        raise UserError(
            f"{repo} is no folder here, nor complete in the Hub's cache, and there is no connection"
            f" to the Hub: try again, or, {tiny}") from error
    except EntryNotFoundError as error:
        raise UserError(
            f"{repo} has no file {file}: see {_page(repo, kind)}/tree/main") from error
    except HFValidationError as error:
        raise UserError(f"{repo} is neither a folder here nor a valid name on the Hub") from error
    except HfHubHTTPError as error:
        raise UserError(
            f"the Hub answered {_status(error)} for {repo}: try again later, or, {tiny}") from error
    except _CONNECTION as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"no disk space for {repo} in {constants.HF_HUB_CACHE}: make room, or set HF_HOME"
                " to another disk") from error
        if isinstance(error, PermissionError):
            raise UserError(
                f"{repo}: cannot write the Hub's cache: {_line(error)}; set HF_HOME") from error
        raise UserError(
            f"the connection to the Hub failed for {repo} ({type(error).__name__}:"
            f" {_line(error)}): try again (what is there stays), or, {tiny}") from error


def _status(error):
    return getattr(getattr(error, "response", None), "status_code", None)


def _line(error):
    """An error's text as one line."""
    return " ".join(str(error).split())
