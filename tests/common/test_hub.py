"""Names to files, and each way in which the Hub says no, without a network."""

import contextlib
import errno
import functools
import io
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
from checks import refused
from huggingface_hub import constants, errors

from common import hub
from common.data import splits
from common.data.readers import Records
from common.errors import UserError
from common.files.config import read_config

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
            ("./runs/finall", "final"), ("run", "runs")):
        with refused(f"{name}: no such folder (did you mean {near}?)", "owner/name"):
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
    (errors.LocalEntryNotFoundError("no\nroute"), False, ["cache", "no route", TINY]),
    (errors.LocalEntryNotFoundError("offline"), True,
     ["nor complete in the Hub's cache", "HF_HUB_OFFLINE is set: unset it", TINY]),
    (errors.OfflineModeIsEnabled("offline"), True, ["HF_HUB_OFFLINE is set", TINY]),
    (http(errors.HfHubHTTPError, 503), False, ["there, failed", "503", "try again", TINY]),
    (http(errors.HfHubHTTPError, 429), False, ["there, failed", "429", "try again"]),
    (errors.HFValidationError("Repo id must be\n..."), False, ["nor a valid name"]),
    (TRANSPORT("timed\nout"), False, ["there, failed", "timed out", TINY]),
    (ConnectionResetError(104, "reset"), False, ["there, failed", "reset", TINY]),
    (RuntimeError("Data processing error"), False, ["there, failed", "Data processing", TINY]),
    (OSError(errno.ENOSPC, "No space left"), False, ["cannot write", "No space left", "HF_HOME"]),
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
    with refused("(did you mean final?)"):
        hub.resolve("runs/finall")


# --- data ---

ULTRACHAT = [f"data/{split}-0000{n}-of-0000{count}-f7dfac4afe5b93f4.parquet"
             for split, count in (("test_gen", 1), ("test_sft", 1), ("train_gen", 3),
                                  ("train_sft", 3)) for n in range(count)]
GSM8K = [f"{config}/{split}-00000-of-00001.parquet" for config in ("main", "socratic")
         for split in ("test", "train")]
C4 = [f"{config}/c4-{split}.0000{n}-of-00002.json.gz" for config in ("en", "en.noblocklist")
      for split in ("train", "validation") for n in range(2)]
SMOLTALK = [f"data/{config}/{split}-00000-of-00001.parquet" for config in ("all", "apigen-80k")
            for split in ("test", "train")]


@pytest.fixture
def parquet():
    pytest.importorskip("pyarrow", reason="Parquet is read where pyarrow is installed")


def fill(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def chosen(name, **options):
    """The names of the files below the current folder, and what was said."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        paths = hub.resolve_data(name, **options)
    return [str(path) for path in paths], said.getvalue().splitlines()


def downloads(answer):
    return [positional[1] for positional, named in answer.calls if len(positional) == 2]


def test_data_files_and_folders(tmp_path, monkeypatch, answer):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path, "d/b.jsonl", "d/a.json", "d/c.TXT", "d/e.csv.gz", "d/notes.md", "d/sub/x.json",
         "d/.hidden.json", "d/.cache/x.json", "d/dataset_info.json", "d/state.json",
         "d/README.txt")
    assert chosen("d/c.TXT") == (["d/c.TXT"], [])
    assert chosen("d") == (["d/a.json", "d/b.jsonl", "d/e.csv.gz"],
                           ["data: d: a, b, e, 3 of 3 files (also there: c.TXT, sub/x.json)"])
    assert chosen(["d/c.TXT", "d/a.json"]) == (["d/c.TXT", "d/a.json"], [])
    assert chosen(tmp_path / "d" / "a.json") == ([str(tmp_path / "d/a.json")], [])
    assert chosen("d:a.json") == (["d/a.json"], [])
    assert chosen("d:sub/x.json") == (["d/sub/x.json"], [])
    assert answer.calls == []


def test_a_folder_whose_files_lie_in_subfolders(tmp_path, monkeypatch, answer):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path, "d/README.md", "d/z/b.json", "d/a/deep/c.json", "d/a/b.json", "d/.git/x.json",
         "d/dataset_dict.json")
    assert chosen("d") == (["d/a/b.json", "d/a/deep/c.json", "d/z/b.json"], [])
    fill(tmp_path, "d/top.json")
    assert chosen("d") == (
        ["d/top.json"],
        ["data: d: top, 1 of 1 file (also there: a/b.json, a/deep/c.json, z/b.json)"])
    assert chosen("d:a") == (["d/a/b.json", "d/a/deep/c.json"],
                             ["data: d: a/b, a/deep/c, 2 of 2 files (also there: top, z/b)"])
    (tmp_path / "d/top.json").rename(tmp_path / "d:top.json")
    assert chosen("d:top.json") == (["d:top.json"], [])  # a file of that name comes first


def test_a_folder_with_train_and_test_files_trains_on_train_and_says_so(
        tmp_path, monkeypatch, answer, capsys):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path, "d/train.jsonl", "d/test.jsonl", "e/train/1.json", "e/train/2.json",
         "e/dev/1.json")
    assert chosen("d") == (["d/train.jsonl"], ["data: d: train, 1 of 1 file (also there: test)"])
    assert chosen("d:test", flag="--eval-data") == (
        ["d/test.jsonl"], ["eval-data: d: test, 1 of 1 file (also there: train)"])
    assert chosen("e/") == (["e/train/1.json", "e/train/2.json"],
                            ["data: e: train, 2 of 2 files (also there: dev)"])
    assert chosen(["d", "d:test"], flag="--x")[1] == [
        "x: d: train, 1 of 1 file (also there: test)",
        "x: d: test, 1 of 1 file (also there: train)"]
    hub.resolve_data("d")
    assert capsys.readouterr().out == "data: d: train, 1 of 1 file (also there: test)\n"


@pytest.mark.parametrize("names, expected", [
    (["a", "b", "test"], ["a", "b"]), (["en/valid", "en/x", "eval/x"], ["en/x"]),
    (["constraint", "dev_a", "held-out", "heldout"], ["constraint"]),
    (["contest", "latest"], ["contest", "latest"]),
    (["a", "test1"], ["a"]), (["Training-v2", "other"], ["Training-v2"]),
    (["x.train", "constraint"], ["x.train"]),
    (["train/en", "test/en", "test/de"], ["train/en"]), (["my_train2", "sub"], ["my_train2"]),
])
def test_the_default_of_a_local_folder(tmp_path, monkeypatch, answer, names, expected):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path, *(f"d/{name}.json" for name in names))
    paths, said = chosen("d")
    assert paths == [f"d/{name}.json" for name in expected]
    assert len(said) == (expected != names)
    for name in set(names) - set(expected):
        assert name in said[0]


def test_a_folder_of_held_out_data_alone_is_asked_about(tmp_path, monkeypatch, answer):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path, "d/test.json", "d/validation.json", "e/test.json")
    with refused("d holds test, validation: name one, as in --data d:test"):
        hub.resolve_data("d")
    assert chosen("e")[0] == ["e/test.json"]


def test_a_name_that_means_two_files_is_asked_about(tmp_path, monkeypatch, answer):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path, "d/a/foo.jsonl", "d/b/foo.jsonl", "e/README.jsonl", "e/train_eval.jsonl")
    with refused("d holds a/foo, b/foo: name one, as in --data d:a/foo"):
        hub.resolve_data("d:foo")
    assert chosen("e")[0] == ["e/train_eval.jsonl"]  # what trains comes first


def test_one_suffix_of_the_same_data(tmp_path, monkeypatch, answer, parquet):
    monkeypatch.chdir(tmp_path)
    kinds = [".jsonl", ".json", ".jsonl.gz", ".csv", ".tsv", ".parquet", ".txt"]
    order = [".jsonl", ".jsonl.gz", ".json", ".csv", ".tsv", ".parquet", ".txt"]
    fill(tmp_path, *(f"d/train{kind}" for kind in kinds))
    for kind in order:
        paths, said = chosen("d")
        assert paths == [f"d/train{kind}"]
        assert all(f"train{other}" in said[0] for other in order[order.index(kind) + 1:])
        (tmp_path / paths[0]).unlink()
    fill(tmp_path, "e/data-00000-of-00002.parquet", "e/data-00001-of-00002.parquet", "e/all.csv")
    assert chosen("e")[0] == ["e/all.csv", "e/data-00000-of-00002.parquet",
                              "e/data-00001-of-00002.parquet"]  # of two labels


def test_missing_shards_are_said(tmp_path, monkeypatch, answer):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path, "d/x-00000-of-00003.json", "d/x-00002-of-00003.json")
    assert chosen("d") == (["d/x-00000-of-00003.json", "d/x-00002-of-00003.json"],
                           ["data: d: x, 2 of 3 files"])
    fill(tmp_path, "d/x-00001-of-00003.json")
    assert chosen("d")[1] == []


def test_data_that_is_not_there_or_not_readable(tmp_path, monkeypatch, answer):
    monkeypatch.chdir(tmp_path)
    with refused("holds no file", "end in .jsonl, .json, .csv, .tsv, .parquet, .txt"):
        hub.resolve_data(tmp_path)
    fill(tmp_path, "train.jsonl", "table.xlsx", "ds/data-00000-of-00001.arrow", "ds/state.json",
         "dd/train/data-00000-of-00001.arrow", "dd/dataset_dict.json", "e/test_a.json",
         "e/train_b.json", "e/train_c.json")
    with refused("--data trian.jsonl: no such file or folder", "did you mean train.jsonl"):
        hub.resolve_data("trian.jsonl")
    for name in ("data/train.jsonl", "data/train.csv.gz", "data/x.parquet", "data/x.TSV"):
        with refused(f"{name}: no such file"):
            hub.resolve_data(name)  # a path that looks like a Hub id
    with refused("--eval-data tinny", "did you mean tiny"):
        hub.resolve_data("tinny", flag="--eval-data")
    with refused("table.xlsx", "end in .jsonl"):
        Records(hub.resolve_data("table.xlsx"))
    for name in ("ds", "dd", "ds/data-00000-of-00001.arrow"):
        with refused(f"{name}", "Arrow files: ds.to_json", "ds.to_parquet"):
            Records(hub.resolve_data(name))
    with refused("e holds train_b, train_c: name one, as in --data e:train_b"):
        hub.resolve_data("e")
    with refused("e has no 'trian_b' (did you mean train_b?); e holds test_a, train_b, train_c: "
                 "name one, as in --eval-data e:test_a"):
        hub.resolve_data("e:trian_b", flag="--eval-data")
    with refused("e has no 'test_b.json'", "did you mean test_a.json"):
        hub.resolve_data("e:test_b.json")
    with refused("no such file or folder"):
        hub.resolve_data("train.jsonl:train")
    assert answer.calls == []


def test_a_part_of_a_folder_is_found_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path, "d/train.json")
    assert hub.whole_name("d:train") == f"{tmp_path}/d:train"
    assert hub.whole_name("d") == f"{tmp_path}/d"
    for name in ("owner/name:train", "d2:train", "tiny", "no", ":x"):
        assert hub.whole_name(name) == name


def test_a_named_file_of_a_data_set(tmp_path, answer):
    answer.value = str(tmp_path / "x.json")
    assert chosen("a/b:data/x.json") == ([str(tmp_path / "x.json")], [])
    assert answer.calls == [(("a/b", "data/x.json"), {"repo_type": "dataset"})]
    answer.value = http(getattr(errors, "RemoteEntryNotFoundError", errors.EntryNotFoundError), 404)
    with refused("a/b has no file x.json", constants.ENDPOINT + "/datasets/a/b/tree/main"):
        hub.resolve_data("a/b:x.json")
    answer.value = http(errors.GatedRepoError, 401)
    with refused("gated", constants.ENDPOINT + "/datasets/a/b"):
        hub.resolve_data("a/b:x.json")


@pytest.mark.parametrize("name", ["a/b:x.parquet", "a/b:train", "a/b"])
def test_without_pyarrow_nothing_is_downloaded(monkeypatch, answer, name):
    for module in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    answer.files = ["train-00000-of-00001.parquet"]
    with refused(".parquet: Parquet needs pyarrow: pip install pyarrow"):
        hub.resolve_data(name)
    assert downloads(answer) == []


@pytest.mark.parametrize("files, part, expected, said", [
    (["README.md", "alpaca_data_cleaned.json", "dataset_infos.json"], "",
     ["alpaca_data_cleaned.json"], "alpaca_data_cleaned, 1 of 1 file"),
    (["data/train.jsonl", "data/test.jsonl"], "", ["data/train.jsonl"],
     "train, 1 of 1 file (also there: test)"),
    (["alpaca.json", "urls.txt", "sub/x.txt"], "", ["alpaca.json"],
     "alpaca, 1 of 1 file (also there: sub/x.txt, urls.txt)"),
    (["a.txt", "README.md"], "", ["a.txt"], "a, 1 of 1 file"),
    (["data/train-00000-of-00001-a09b74b3ef9c3b56.parquet"], "",
     ["data/train-00000-of-00001-a09b74b3ef9c3b56.parquet"],
     "train, 1 of 1 file"),
    (["data/part-0.jsonl", "data/part-1.jsonl", ".x/a.json"], "",
     ["data/part-0.jsonl", "data/part-1.jsonl"], "default, 2 of 2 files"),
    (["data.json", "test.json"], "default", ["data.json"],
     "default, 1 of 1 file (also there: test)"),
    (ULTRACHAT, "train_sft", ULTRACHAT[5:],
     "train_sft, 3 of 3 files (also there: test_gen, test_sft, train_gen)"),
    (ULTRACHAT, "data/test_sft", ULTRACHAT[1:2],
     "test_sft, 1 of 1 file (also there: test_gen, train_gen, train_sft)"),
    (GSM8K, "main", GSM8K[1:2],
     "main/train, 1 of 1 file (also there: main/test, socratic/test, socratic/train)"),
    (GSM8K, "main/train", GSM8K[1:2],
     "main/train, 1 of 1 file (also there: main/test, socratic/test, socratic/train)"),
    (GSM8K, "socratic/test", GSM8K[2:3],
     "socratic/test, 1 of 1 file (also there: main/test, main/train, socratic/train)"),
    (GSM8K[:2], "train", GSM8K[1:2], "main/train, 1 of 1 file (also there: main/test)"),
    (GSM8K[:2], "", GSM8K[1:2], "main/train, 1 of 1 file (also there: main/test)"),
    (C4, "en", C4[:2], "en/c4-train, 2 of 2 files (also there: "
     "en.noblocklist/c4-train, en.noblocklist/c4-validation, en/c4-validation)"),
    (SMOLTALK, "all", SMOLTALK[1:2],
     "all/train, 1 of 1 file (also there: all/test, apigen-80k/test, apigen-80k/train)"),
    (SMOLTALK, "data/all/", SMOLTALK[1:2],
     "all/train, 1 of 1 file (also there: all/test, apigen-80k/test, apigen-80k/train)"),
    (["train/en.json", "test/en.json"], "", ["train/en.json"],
     "train/en, 1 of 1 file (also there: test/en)"),
    (["train-1.json", "train-2.json"], "", ["train-1.json", "train-2.json"], "train, 2 of 2 files"),
    (["train.jsonl", "train/0.parquet", "test.csv"], "", ["train.jsonl"],
     "train, 1 of 1 file (also there: test, train/0.parquet)"),
    (["train/0000.parquet", "train/0001.parquet", "test/0000.parquet"], "",
     ["train/0000.parquet", "train/0001.parquet"], "train, 2 of 2 files (also there: test)"),
])
def test_the_files_of_a_data_set_are_chosen(tmp_path, answer, parquet, files, part, expected, said):
    answer.files, answer.value = [*reversed(files), "README.md", ".gitattributes"], "x"
    line = f"data: a/b: {said}"
    assert chosen(f"a/b:{part}" if part else "a/b") == (["x"] * len(expected), [line])
    assert downloads(answer) == expected


@pytest.mark.parametrize("files, part, parts", [
    (["a.json", "b.json"], "", ["a/b holds a, b: name one, as in --data a/b:a"]),
    (["train-a.json", "train-b.json"], "", ["name one, as in --data a/b:train-a"]),
    ([f"{chr(97 + i)}.json" for i in range(11)], "", ["g, h, 3 more: name one"]),
    (ULTRACHAT, "", ["a/b holds train_gen, train_sft: name one, as in --data a/b:train_gen"]),
    (GSM8K, "", ["a/b holds main/train, socratic/train: name one, as in --data a/b:main/train"]),
    (GSM8K, "train", ["a/b holds main/train, socratic/train: name one"]),
    (GSM8K, "mian", ["a/b has no 'mian'", "a/b holds main/test, main/train, socratic/test"]),
    (ULTRACHAT, "train_stf", ["a/b has no 'train_stf' (did you mean train_sft?)"]),
    (ULTRACHAT, "train", ["a/b has no 'train'", "a/b holds test_gen, test_sft, train_gen, "]),
    (["m/en.json", "m/de.json"], "m", ["a/b holds m/de, m/en: name one, as in --data a/b:m/de"]),
    (["README.md", "data/x.arrow"], "", ["a/b holds no file", "Arrow files: ds.to_json"]),
    (["README.md"], "README.md", ["README.md: not a kind of file that is read", "end in .jsonl"]),
    (["README.md"], "", [constants.ENDPOINT + "/datasets/a/b holds no file", "in .jsonl"]),
    ([], "", ["holds no file"]),
])
def test_a_data_set_without_one_obvious_split(answer, files, part, parts):
    answer.files = files
    with refused(*parts):
        hub.resolve_data(f"a/b:{part}" if part else "a/b")
    assert downloads(answer) == []


@pytest.mark.parametrize("files, expected", [
    (GSM8K[:2], [GSM8K[0]]), (["train.json", "dev.json"], ["dev.json"]),
    (["train.json", "x.json"], ["train.json"]), (["x.json"], ["x.json"])])
def test_what_is_held_out_is_the_part_that_is_named_so(answer, parquet, files, expected):
    answer.files, answer.value = files, "x"
    hub.resolve_data("a/b", "--eval-data")
    assert downloads(answer) == expected
    answer.files = [*GSM8K, "validation.json"]
    with refused("main/test, socratic/test, validation: name one, as in --eval-data a/b:"):
        hub.resolve_data("a/b", flag="--eval-data")


@pytest.mark.parametrize("name, label", [
    ("data/train_sft-00000-of-00003-a1b2.parquet", "train_sft"), ("a.b/c.d.jsonl.gz", "a.b/c.d"),
    ("main/train-00000-of-00001.parquet", "main/train"), ("train/0000.parquet", "train"),
    ("alpaca_data_cleaned.json", "alpaca_data_cleaned"), ("train/00000-of-00003.json", "train"),
    ("default/train/0000.parquet", "train"), ("data/default/x.json", "x"),
    ("x/data/y.json", "x/data/y"),
    ("x/Part_003.csv", "x"), ("x/shard7.csv", "x"), ("x/chunk.csv", "x"), ("x/file-1.csv", "x"),
    ("x/parts.csv", "x/parts"), ("train-1.json", "train"), ("2.json", "default"), ("c4.json", "c4"),
    ("en/c4-train.00000-of-01024.json.gz", "en/c4-train"),
])
def test_labels(name, label):
    assert splits.label(name) == label


def test_offline_the_file_is_chosen_from_the_cache(tmp_path, monkeypatch, answer):
    answer.files = errors.OfflineModeIsEnabled("offline")
    answer.value = errors.LocalEntryNotFoundError("nothing")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
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
    for name in ("snapshot_download", "hf_hub_download"):
        function = functools.partial(getattr(huggingface_hub, name), cache_dir=tmp_path)
        monkeypatch.setattr(huggingface_hub, name, function)
    assert hub.resolve_data("a/b") == [snapshot / "data" / "train.json"]

    # Of three files that belong together one is there: half a data set is none.
    (snapshot / "data" / "train.json").rename(snapshot / "data" / "train-00000-of-00003.json")
    with refused("a/b", "nor complete in the Hub's cache", "HF_HUB_OFFLINE"):
        hub.resolve_data("a/b")
    name = "data/train-00000-of-00003.json"
    assert hub.resolve_data(f"a/b:{name}") == [snapshot / name]
