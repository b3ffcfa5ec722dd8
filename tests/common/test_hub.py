"""Names to files, and each way in which the Hub says no, without a network."""

import errno
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
from checks import refused
from huggingface_hub import constants, errors

from common import hub
from common.errors import UserError
from common.model_config import read_config

TINY = "--model tiny --data tiny"


def http(kind, status):
    """One of huggingface_hub's own errors, as it comes with a response of the server."""
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind(f"{status} Client Error.\n\nCannot access url", response=response)


@pytest.fixture
def answer(monkeypatch):
    """Let every call to the Hub raise or return what the test sets; records the calls."""
    given = SimpleNamespace(value=None, files=[], calls=[])

    def reply(value):
        def function(*positional, **named):
            given.calls.append((positional, named))
            result = value()
            if isinstance(result, BaseException):
                raise result
            return result
        return function

    monkeypatch.setattr(sys, "argv", ["chapter-01/train.py"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", reply(lambda: given.value))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", reply(lambda: given.value))
    monkeypatch.setattr(
        huggingface_hub, "HfApi",
        lambda: SimpleNamespace(list_repo_files=reply(lambda: given.files)))
    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", lambda: SimpleNamespace(repos=[]))
    return given


def test_a_script_without_data_is_not_told_to_give_it(monkeypatch, answer):
    monkeypatch.setattr(sys, "argv", ["chapter-02/generate.py"])
    answer.value = errors.LocalEntryNotFoundError("nothing")
    with refused("no folder here", "python chapter-02/generate.py --model tiny"):
        hub.resolve("runs/nope")
    with pytest.raises(UserError) as caught:
        hub.resolve("runs/nope")
    assert "--data" not in str(caught.value)


# --- names of models ---

def test_built_in_names_and_folders(tmp_path, monkeypatch, answer):
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("tiny") == hub.COMMON / "tiny"
    for name in hub.ARCHITECTURES:
        assert read_config(hub.resolve(name))["vocab_size"] > 100_000
    (tmp_path / "Qwen" / "Qwen3-0.6B").mkdir(parents=True)
    assert hub.resolve("Qwen/Qwen3-0.6B").resolve() == tmp_path / "Qwen" / "Qwen3-0.6B"
    assert hub.resolve(tmp_path) == tmp_path
    assert answer.calls == []


def test_a_wrong_name_suggests_the_nearest(tmp_path, monkeypatch, answer):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "final").mkdir(parents=True)
    for name, near in (
            ("qwen3-06b", "qwen3-0.6b"), ("Llama-3.2-1B", "llama-3.2-1b"), ("tinny", "tiny"),
            ("./runs/finall", "runs/final"), ("run", "runs")):
        with refused(name, "no such folder", "did you mean", near, "owner/name"):
            hub.resolve(name)
    with refused("--adapter ./typo", "no such folder"):
        hub.resolve("./typo", "--adapter")
    (tmp_path / "weights.safetensors").touch()
    with refused("weights.safetensors is a file"):
        hub.resolve("weights.safetensors")
    assert answer.calls == []  # a mistyped path is never asked of the Hub


def test_a_hub_id_is_downloaded_with_its_patterns_and_progress_bars(tmp_path, answer):
    answer.value = str(tmp_path)
    assert hub.resolve("Qwen/Qwen3-0.6B") == tmp_path
    [(positional, named)] = answer.calls
    assert positional == ("Qwen/Qwen3-0.6B",)
    # The same patterns always: offline the cache is complete only for those it was filled with.
    assert named == {
        "allow_patterns": ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]}
    assert not huggingface_hub.utils.are_progress_bars_disabled()


# --- the Hub says no ---

TRANSPORT = errors.HfHubHTTPError.__bases__[0]  # of the HTTP library in use


@pytest.mark.parametrize("error, offline, parts", [
    (http(errors.GatedRepoError, 401), False,
     ["is gated", constants.ENDPOINT + "/a/b", "hf auth login", "HF_TOKEN"]),
    (http(errors.GatedRepoError, 403), False,
     ["is gated", "no access", constants.ENDPOINT + "/a/b", "hf auth whoami"]),
    (http(errors.RepositoryNotFoundError, 404), False,
     ["a/b: no such folder here, and no such model on the Hub", "hf auth login"]),
    (errors.LocalEntryNotFoundError("no\nroute"), False, ["no connection", "cache", TINY]),
    (errors.LocalEntryNotFoundError("offline"), True,
     ["not complete in the cache", "HF_HUB_OFFLINE is set", TINY]),
    (errors.OfflineModeIsEnabled("offline"), True, ["HF_HUB_OFFLINE is set", TINY]),
    (http(errors.HfHubHTTPError, 503), False, ["the Hub answered 503", "try again", TINY]),
    (http(errors.HfHubHTTPError, 429), False, ["the Hub answered 429"]),
    (errors.HFValidationError("Repo id must be\n..."), False, ["nor a valid name"]),
    (TRANSPORT("timed\nout"), False, ["failed for a/b", "timed out", TINY]),
    (ConnectionResetError(104, "reset"), False, ["failed for a/b", "reset", TINY]),
    (RuntimeError("Data processing error"), False, ["failed for a/b", "Data processing", TINY]),
    (OSError(errno.ENOSPC, "No space left"), False, ["no disk space", "HF_HOME"]),
    (PermissionError(13, "denied"), False, ["cannot write", "denied", "HF_HOME"]),
])
def test_each_refusal_is_one_line_with_the_next_step(monkeypatch, answer, error, offline, parts):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    answer.value = error
    with refused("a/b", *parts):
        hub.resolve("a/b")


def test_other_exceptions_are_not_hidden(answer):
    answer.value = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        hub.resolve("a/b")
    answer.value = TypeError("a defect")
    with pytest.raises(TypeError):
        hub.resolve("a/b")


def test_a_missing_repository_may_be_a_mistyped_folder(tmp_path, monkeypatch, answer):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "final").mkdir(parents=True)
    answer.value = http(errors.RepositoryNotFoundError, 404)
    with refused("did you mean runs/final"):
        hub.resolve("runs/finall")


# --- data ---

def test_data_files_and_folders(tmp_path, answer):
    for name in ("b.jsonl", "a.json", "c.txt", "notes.md"):
        (tmp_path / name).touch()
    assert hub.resolve_data(tmp_path / "c.txt") == [tmp_path / "c.txt"]
    assert [path.name for path in hub.resolve_data(tmp_path)] == ["a.json", "b.jsonl", "c.txt"]
    both = hub.resolve_data([tmp_path / "c.txt", tmp_path / "a.json"])
    assert [path.name for path in both] == ["c.txt", "a.json"]
    assert answer.calls == []


def test_data_that_is_not_there_or_not_readable(tmp_path, monkeypatch, answer):
    monkeypatch.chdir(tmp_path)
    with refused("no .json, .jsonl or .txt file in this folder"):
        hub.resolve_data(tmp_path)
    for name in ("train.jsonl", "x.parquet", "table.csv"):
        (tmp_path / name).touch()
    with refused("trian.jsonl: no such file or folder", "did you mean train.jsonl"):
        hub.resolve_data("trian.jsonl")
    with refused("no such file"):
        hub.resolve_data("data/train.jsonl")  # a path that looks like a Hub id
    with refused("did you mean tiny"):
        hub.resolve_data("tinny")
    with refused("table.csv", ".json, .jsonl or .txt"):
        hub.resolve_data("table.csv")
    with refused("x.parquet", "Parquet is not read", "to_json('x.jsonl'"):
        hub.resolve_data("x.parquet")
    (tmp_path / "train.jsonl").unlink()
    with refused("Parquet is not read"):
        hub.resolve_data(tmp_path)
    assert answer.calls == []


def test_a_named_file_of_a_data_set(tmp_path, answer):
    answer.value = str(tmp_path / "x.json")
    assert hub.resolve_data("a/b:data/x.json") == [tmp_path / "x.json"]
    assert answer.calls == [(("a/b", "data/x.json"), {"repo_type": "dataset"})]
    with refused("Parquet is not read"):
        hub.resolve_data("a/b:x.parquet")
    assert len(answer.calls) == 1
    answer.value = http(getattr(errors, "RemoteEntryNotFoundError", errors.EntryNotFoundError), 404)
    with refused("a/b has no file x.json", constants.ENDPOINT + "/datasets/a/b/tree/main"):
        hub.resolve_data("a/b:x.json")
    answer.value = http(errors.GatedRepoError, 401)
    with refused("gated", constants.ENDPOINT + "/datasets/a/b"):
        hub.resolve_data("a/b:x.json")


@pytest.mark.parametrize("files, chosen", [
    (["README.md", "alpaca.json", "dataset_infos.json"], "alpaca.json"),
    (["data/train.jsonl", "data/test.jsonl"], "data/train.jsonl"),
    (["sub/a.jsonl", "b.parquet"], "sub/a.jsonl"),
])
def test_the_file_of_a_data_set_is_chosen(tmp_path, answer, files, chosen):
    answer.files, answer.value = files, str(tmp_path / "x")
    assert hub.resolve_data("a/b") == [tmp_path / "x"]
    assert answer.calls[1][0] == ("a/b", chosen)


@pytest.mark.parametrize("files, parts", [
    (["a.json", "b.json"], ["a.json, b.json", "name one", "--data a/b:a.json"]),
    (["train-1.json", "train-2.json"], ["name one", "a/b:train-1.json"]),
    ([f"{i}.json" for i in range(9)], ["and 4 more"]),
    (["data/train.parquet"], ["data/train.parquet", "Parquet is not read"]),
    (["README.md"], ["no .json or .jsonl file", constants.ENDPOINT + "/datasets/a/b"]),
    ([], ["no .json or .jsonl file"]),
])
def test_a_data_set_without_one_obvious_file(answer, files, parts):
    answer.files = files
    with refused(*parts):
        hub.resolve_data("a/b")
    assert len(answer.calls) == 1


def test_offline_the_file_is_chosen_from_the_cache(tmp_path, monkeypatch, answer):
    answer.files = errors.OfflineModeIsEnabled("offline")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with refused("a/b", "HF_HUB_OFFLINE", TINY):
        hub.resolve_data("a/b")

    def no_cache():
        raise errors.CacheNotFound("nothing", cache_dir="x")
    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", no_cache)
    with refused("a/b", "HF_HUB_OFFLINE", TINY):
        hub.resolve_data("a/b")

    # The real thing: a file that an earlier run downloaded, in the layout of the Hub's cache.
    repo = tmp_path / "datasets--a--b"
    snapshot = repo / "snapshots" / ("0" * 40)
    for folder in (repo / "refs", repo / "blobs", snapshot / "data"):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    (repo / "blobs" / "77").write_text("[]")
    (snapshot / "data" / "train.json").symlink_to(repo / "blobs" / "77")
    monkeypatch.undo()
    assert constants.HF_HUB_OFFLINE  # from conftest.py
    scan, download = huggingface_hub.scan_cache_dir, huggingface_hub.hf_hub_download
    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", lambda: scan(tmp_path))
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download",
        lambda *names, **options: download(*names, **options, cache_dir=tmp_path))
    assert hub.resolve_data("a/b") == [snapshot / "data" / "train.json"]
