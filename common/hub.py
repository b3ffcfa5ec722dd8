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

from common.errors import UserError

COMMON = Path(__file__).resolve().parent
ARCHITECTURES = ("qwen3-0.6b", "qwen3-8b", "llama-3.2-1b", "llama-3.1-8b")
# Offline the Hub's cache counts as whole only for the patterns that it was filled with, so there
# is one list. It leaves out pickled weights and Llama's original/*.pth.
PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
DATA_SUFFIXES = (".json", ".jsonl", ".txt")

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


def resolve_data(name):
    """The data files that `name` stands for, as a list of paths; `name` may be a list of names.

    A name is a .json, .jsonl or .txt file, a folder of such files, or a data set on the Hub:
    `owner/name:file`, or `owner/name` if it holds a single JSON file or a single one for training.
    Raises UserError for anything else, Parquet among it.
    """
    if isinstance(name, (list, tuple)):
        return [path for each in name for path in resolve_data(each)]
    text = str(name)
    path = Path(os.path.expanduser(text))
    if os.path.isdir(path):
        files = sorted(file for file in path.iterdir() if file.suffix in DATA_SUFFIXES)
        if not files:
            for parquet in path.glob("*.parquet"):
                _check_suffix(parquet)
            raise UserError(f"{path}: no .json, .jsonl or .txt file in this folder")
        return files
    if os.path.exists(path):
        return [_check_suffix(path)]
    repo, _, file = text.partition(":")
    local = path.suffix in (*DATA_SUFFIXES, ".parquet", ".csv") and not file
    if local or not _HUB_ID.fullmatch(repo):
        raise UserError(f"--data {text}: no such file or folder{_near(text, ('tiny', 'virtual'))}"
                        " (a data set on the Hub is written owner/name or owner/name:file)")
    file = file or _choose(repo)
    _check_suffix(Path(file))
    with _plain_words(repo, "dataset", file):
        return [Path(huggingface_hub.hf_hub_download(repo, file, repo_type="dataset"))]


def whole_name(name):
    """A local file or folder by its absolute path, so that it is found from any other folder; what
    is no such path, and what means something else first (`tiny`, `virtual`...), as it is."""
    path = os.path.expanduser(name)
    reserved = name in ("auto", "tiny", "virtual", *ARCHITECTURES)
    return name if reserved or not os.path.exists(path) else os.path.abspath(path)


def _choose(repo):
    """The one file of a data set on the Hub that must be meant, or an error that lists them."""
    try:
        with _plain_words(repo, "dataset"):
            files = huggingface_hub.HfApi().list_repo_files(repo, repo_type="dataset")
    except UserError:
        files = _cached(repo)
        if not files:
            raise
    names = [file for file in files if Path(file).suffix in (".json", ".jsonl")
             and Path(file).name not in ("dataset_infos.json", "dataset_info.json")]
    train = [file for file in names if "train" in Path(file).name.lower()]
    if len(names) == 1 or len(train) == 1:
        return names[0] if len(names) == 1 else train[0]
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise UserError(f"{repo} holds {', '.join(sorted(names)[:5])}{more}: name one, as in"
                        f" --data {repo}:{sorted(names)[0]}")
    parquet = next((file for file in files if file.endswith(".parquet")), None)
    if parquet:
        _check_suffix(Path(parquet))
    raise UserError(f"{repo} holds no .json or .jsonl file; see {_page(repo, 'dataset')}")


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


def _check_suffix(path):
    """Give `path` back if it is of a format that is read here."""
    if path.suffix == ".parquet":
        raise UserError(
            f"{path}: Parquet is not read; convert it: python -c \"import pandas; pandas"
            f".read_parquet('{path}').to_json('{path.stem}.jsonl', orient='records', lines=True)\"")
    if path.suffix not in DATA_SUFFIXES:
        raise UserError(f"{path}: data must be a .json, .jsonl or .txt file")
    return path


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
