"""Names to local files: built-in architectures, folders, and the Hugging Face Hub."""

import errno
import os
import re
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, errors

from common.data import readers, splits
from common.errors import UserError, nearest, one_line
from common.files.checkpoint import verify

COMMON = Path(__file__).resolve().parent
ARCHITECTURES = ("qwen3-0.6b", "qwen3-8b", "llama-3.2-1b", "llama-3.1-8b")
# One list for all, without pickles: offline, the cache is complete only for what filled it.
PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]

_NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM)
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def resolve(name, flag="--model"):
    """The folder of a model, whose files are verified: `tiny`, one of ARCHITECTURES (a config.json,
    for --init random), a folder, or a Hub id, downloaded or cached. Else UserError, by `flag`."""
    text = str(name)
    path = Path(os.path.expanduser(text))
    if text in ("tiny", *ARCHITECTURES):
        path = COMMON / "tiny" if text == "tiny" else COMMON / "architectures" / text
    elif os.path.exists(path) and not os.path.isdir(path):
        raise UserError(f"{path} is a file: give the folder that holds the model")
    elif not os.path.isdir(path) and not _HUB_ID.fullmatch(text):
        near = _similar(path, ("tiny", *ARCHITECTURES))
        raise UserError(f"{flag} {text}: no such folder{near}; a model on the Hub is owner/name")
    elif not os.path.isdir(path):
        with _plain_words(text, "model"):
            path = Path(huggingface_hub.snapshot_download(text, allow_patterns=PATTERNS))
    verify(path)
    return path


def resolve_data(name, flag="--data"):
    """The data files, a list of paths, that a name, or each of a list, means: a file, a folder,
    a data set on the Hub, or a split or file of these (`owner/name:test`). Raises UserError."""
    if isinstance(name, (list, tuple)):
        return [path for each in name for path in resolve_data(each, flag)]
    path, part = _local(str(name))
    if os.path.isdir(path):
        return [path / file for file in splits.choose(_files_below(path), part, path, flag)]
    if os.path.exists(path):
        return [path]
    repo, _, part = str(name).partition(":")
    if not _HUB_ID.fullmatch(repo) or readers.suffix(path) and not part:
        near = _similar(path, ("tiny", "virtual"))
        raise UserError(f"{flag} {name}: no such file or folder{near}; a data set on the Hub is "
                        "owner/name or owner/name:split")
    paths = []
    for file in [part] if readers.suffix(part) else _choose(repo, part, flag):
        readers.check_kind(file)
        with _plain_words(repo, "dataset", file):
            paths.append(Path(huggingface_hub.hf_hub_download(repo, file, repo_type="dataset")))
    return paths


def whole_name(name):
    """A local file or folder, perhaps with `:split`, as an absolute path; other names unchanged."""
    path, part = _local(name)
    if name in ("auto", "tiny", "virtual", *ARCHITECTURES) or not os.path.exists(path):
        return name
    return os.path.abspath(path) + (f":{part}" if part else "")


def _local(name):
    """(path, part) of a name, the part being what follows the colon of an existing folder's."""
    path = os.path.expanduser(name)
    folder, _, part = path.partition(":")
    if not os.path.exists(path) and os.path.isdir(folder):
        return Path(folder), part
    return Path(path), ""


def _similar(path, names=()):
    """" (did you mean X?)" for a missing path: something in the same folder, or one of `names`."""
    beside = os.listdir(path.parent) if os.path.isdir(path.parent) else []
    return nearest(path.name, [*names, *beside])


def _files_below(folder):
    return [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]


def _choose(repo, part, flag):
    """The files of a data set on the Hub that `part`, which is not one of them, stands for."""
    page = f"{constants.ENDPOINT}/datasets/{repo}"
    try:
        with _plain_words(repo, "dataset"):
            names = huggingface_hub.HfApi().list_repo_files(repo, repo_type="dataset")
    except UserError:
        with suppress(errors.LocalEntryNotFoundError):  # what an earlier run has left in the cache
            names = _files_below(Path(huggingface_hub.snapshot_download(
                repo, repo_type="dataset", local_files_only=True, allow_patterns=[])))
            chosen = splits.choose(names, part, repo, flag, page)
            if not splits.missing(chosen):
                return chosen
        raise
    return splits.choose(names, part, repo, flag, page)


@contextmanager
def _plain_words(repo, kind, file=None):
    """Turn huggingface_hub's errors about `repo` into UserErrors that say what to do."""
    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repo}"
    script = f"python {sys.argv[0]} " if sys.argv[0].endswith(".py") else ""
    data = " --data tiny" if "train" in Path(script).name else ""
    offline = "HF_HUB_OFFLINE is set: unset it, or " if constants.HF_HUB_OFFLINE else ""
    failed = (f"{repo} is no folder here, nor complete in the Hub's cache, and the Hub, or the way "
              f"there, failed: {offline}try again, or, to do without the Hub: {script}--model tiny"
              f"{data} (what has been downloaded is kept)")
    words = {  # the first match counts: a gated repository, say, is also a kind of missing one
        errors.GatedRepoError: f"{repo} is gated and you have no access: ask for it, or accept its "
        f"licence, at {page}, then `hf auth login` or set HF_TOKEN (`hf auth whoami`: who you are)",
        errors.RepositoryNotFoundError: f"{repo}: no such folder here, and no such {kind} on the "
        f"Hub{_similar(Path(repo))}; if it is private: `hf auth login`, or set HF_TOKEN",
        errors.LocalEntryNotFoundError: failed,
        errors.EntryNotFoundError: f"{repo} has no file {file}: see {page}/tree/main",
        errors.HFValidationError: f"{repo} is neither a folder here nor a valid name on the Hub",
        # A failed connection: errors of its HTTP library, which changes, and hf_xet's RuntimeError.
        (*errors.HfHubHTTPError.__bases__, OSError, RuntimeError): failed}
    try:
        yield
    except Exception as error:
        found = [text for kinds, text in words.items() if isinstance(error, kinds)]
        if isinstance(error, OSError) and error.errno in _NOT_WRITABLE:
            found = [f"cannot write {repo} to {constants.HF_HUB_CACHE}: make room there, or set "
                     "HF_HOME to another disk"]
        if not found:
            raise
        raise UserError(f"{found[0]} ({one_line(error)})") from error
