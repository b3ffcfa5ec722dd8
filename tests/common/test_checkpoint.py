"""Commits that are killed, fail or run out of space; damaged folders; latest, prune, new runs."""

import hashlib
import itertools
import json
import os
import random
import resource
import runpy
import shutil
import sys
import time
import warnings

import pytest
import torch
from faults import KILLED, broken_disk, damaged, disk_full, end_process, forked, sweep
from safetensors.torch import load_file

from common.errors import UserError
from common.files import checkpoint
from common.files.checkpoint import (
    CheckpointError, MARK, OLD, TMP, commit, seal, step_folder, verify)
from common.files.tensors import save_tensors


def writer(value):
    """A `write` for `commit`: three files that say `value`."""
    def write(folder):
        save_tensors({"a": torch.full((300,), float(value))}.items(), folder, MARK)
        (folder / "state.json").write_text(json.dumps({"value": value}))
        with open(folder / "chat_template.jinja", "w") as file:
            file.write("template\n" * 20)
    return write


def save(folder, value):
    commit(folder, writer(value), {"step": value})


def value_of(folder):
    """What `writer` was given, after checking the folder and that all files agree."""
    state = json.loads((folder / "state.json").read_text())
    values = {verify(folder)["extra"]["step"], state["value"],
              *load_file(folder / "model.safetensors")["a"].tolist()}
    assert len(values) == 1
    return int(values.pop())


def leftovers(run):
    return [path.name for path in run.iterdir() if path.suffix in (TMP, OLD, ".new")]


def steps(run):
    return [int(path.name[5:]) for path in sorted(run.glob("step-*")) if not path.suffix]


# --- commit ---

def test_commit_writes_a_manifest_that_says_everything(tmp_path):
    save(tmp_path / "step-000007", 7)
    found = verify(tmp_path / "step-000007")
    assert set(found["files"]) == {"model.safetensors", "state.json", "chat_template.jinja"}
    assert found["extra"]["step"] == 7 and found["extra"]["world_size"] == 1
    assert found["extra"]["versions"]["torch"] == torch.__version__
    assert leftovers(tmp_path) == []


def test_files_are_flushed_before_the_manifest_and_the_rename_and_the_parent_after(
        tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(os, "fsync", lambda fd, real=os.fsync: (
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))), real(fd)))
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, lambda old, new, real=getattr(os, name): (
            events.append(f"-> {os.path.basename(new)}"), real(old, new)))
    if not os.path.exists("/proc/self/fd"):
        pytest.skip("needs /proc to tell which file was flushed")
    save(tmp_path / "step-000001", 1)
    events = [event for event in events if not event.startswith("-> model")]  # inside `write`
    assert events == [
        "chat_template.jinja", "model.safetensors", "state.json", "manifest.json.new",
        "-> manifest.json", f"step-000001{TMP}", "-> step-000001", tmp_path.name]


def test_row_18_a_fault_at_any_call_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    """Kill, full or broken disk at each write, flush, rename ...: the old one or the new one."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # counted, but not waited for
    pristine, run = tmp_path / "pristine", tmp_path / "run"
    for step in (1, 2):
        save(step_folder(pristine, step), step)
    save(pristine / "final", 1)

    def prepare():
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(pristine, run)

    def action():  # a new step, an older one pruned, final/ replaced
        save(step_folder(run, 3), 3)
        checkpoint.prune(run, keep=2)
        save(run / "final", 2)

    def check(where, code, text):
        assert code in (0, 2, KILLED), (where, text)
        if code != KILLED:  # it had the time to put things right
            assert (run / "final").is_dir(), where
            assert not list(run.glob(f"*{TMP}")) or f"step-000001{TMP}" in leftovers(run), where
        newest = checkpoint.latest(run)
        assert newest and value_of(newest) == int(newest.name[5:]) > 1, where
        assert value_of(run / "final") in (1, 2), where
        for step in steps(run):
            assert value_of(step_folder(run, step)) == step, where
        action()
        assert value_of(step_folder(run, 3)) == 3 and value_of(run / "final") == 2, where
        assert leftovers(run) == [] and not step_folder(run, 1).exists(), where

    faults = (end_process, disk_full, broken_disk)
    assert sweep(prepare, action, check, faults) > 40 * len(faults)


def test_row_18_sigkill_at_random_moments(tmp_path):
    run, rng, newest, final = tmp_path / "run", random.Random(0), 1, 1
    save(step_folder(run, 1), 1)
    save(run / "final", 1)

    def action():
        for step in itertools.count(newest + 1):
            save(step_folder(run, step), step)
            checkpoint.prune(run, keep=2)
            save(run / "final", step)

    for _ in range(25):
        code, text = forked(action, kill_after=rng.uniform(0.01, 0.1))
        assert code == -9, text
        before = newest, final
        newest, final = value_of(checkpoint.latest(run)), value_of(run / "final")
        assert newest >= before[0] and newest >= final >= before[1]
    assert newest > 3


def test_row_19_disk_full_at_any_size_leaves_the_old_checkpoint(tmp_path):
    run = tmp_path / "run"
    save(step_folder(run, 1), 1)
    sizes = sorted(path.stat().st_size for path in step_folder(run, 1).iterdir())
    limits = sorted({0, 1, 100, *sizes, *(size - 1 for size in sizes)} - {sizes[-1]})
    for limit in limits:
        def action():
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            commit(step_folder(run, 2), writer(2), bytes_needed=3_000_000)

        # The text of the error itself goes into a file: the limit holds for that as well.
        code, _ = forked(lambda: _expect_full(action))
        assert code == 0, limit
        assert checkpoint.latest(run) == step_folder(run, 1) and leftovers(run) == [], limit
    save(step_folder(run, 2), 2)


def _expect_full(action):
    with pytest.raises(UserError, match=r"large.* written of at least 2.9 MiB needed, .* free; .*intact"):
        action()


def test_space_is_checked_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match=r"1024.0 TiB needed, .* free"):
        commit(tmp_path / "final", writer(1), bytes_needed=2**50)
    assert list(tmp_path.iterdir()) == []
    commit(tmp_path / "not" / "yet" / "there", writer(1), bytes_needed=1)


def test_what_is_not_ours_is_never_deleted(tmp_path):
    mine = tmp_path / "thesis"
    mine.mkdir()
    (mine / "manifest.json").write_text('{"name": "my web site"}')
    with pytest.raises(UserError, match="not ours"):
        save(mine, 1)
    beside = [tmp_path / name for name in (
        "merged.tmp", "merged.old", f"other{TMP}", f"other{OLD}", f"step-000001{TMP}")]
    for folder in beside:
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    for name in ("merged", "merged", "empty"):
        save(tmp_path / name, 1)
    assert all((folder / "notes.txt").exists() for folder in beside)
    assert (mine / "manifest.json").exists()


def test_half_written_leftovers_are_cleaned_loudly(tmp_path, capfd):
    (tmp_path / f"step-000005{TMP}").mkdir()
    (tmp_path / f"step-000005{TMP}" / "model.safetensors").write_bytes(b"half")
    save(tmp_path / "final", 5)
    assert f"step-000005{TMP}: half-written" in capfd.readouterr().err
    assert leftovers(tmp_path) == []
    (tmp_path / "final").rename(tmp_path / f"final{OLD}")  # ended between its two renames
    save(step_folder(tmp_path, 6), 6)
    assert leftovers(tmp_path) == [] and value_of(tmp_path / "final") == 5


def test_an_error_inside_write_passes_through_and_leaves_nothing(tmp_path):
    def write(folder):
        (folder / "half").write_text("x")
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError):
        commit(tmp_path / "final", write)
    with pytest.raises(UserError, match="Is a directory"):
        commit(tmp_path / "final", lambda folder: (folder / "inner").mkdir())
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_place_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Not a directory|File exists"):
        save(tmp_path / "file" / "final", 1)


# --- verify and seal ---

def test_every_flip_truncation_and_deletion_is_detected(tmp_path):
    folder, rng = tmp_path / "final", random.Random(1)
    save(folder, 1)
    for _ in range(400):
        with damaged(folder, rng) as what, pytest.raises(CheckpointError) as caught:
            pytest.fail(f"not detected: {what} {verify(folder)}")
        assert "\n" not in str(caught.value)
    assert value_of(folder) == 1


def test_every_byte_of_the_manifest_counts(tmp_path):
    folder = tmp_path / "final"
    save(folder, 1)
    data = (folder / "manifest.json").read_bytes()
    for place in range(len(data)):
        changed = data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1:]
        (folder / "manifest.json").write_bytes(changed)
        assert checkpoint.read_manifest(folder) is None, place


@pytest.mark.parametrize("text", [
    b"", b"[]", b"null", b"[" * 100_000, b'{"files": 1}', b"\xff\xfe", b"1" * 10_000,
    checkpoint.encoded([], {}), checkpoint.encoded({"../out": {"size": 1, "sha256": ""}}, {}),
    checkpoint.encoded({"model.safetensors": 3}, {}), checkpoint.encoded({"/etc/passwd": None}, {})])
def test_a_hostile_manifest_is_one_clear_error(tmp_path, text):
    save(tmp_path / "final", 1)
    (tmp_path / "final" / "manifest.json").write_bytes(text)
    with pytest.raises(CheckpointError, match="final"):
        verify(tmp_path / "final")


def test_unlisted_files_that_a_loader_would_read_are_refused(tmp_path):
    save(tmp_path / "final", 1)
    (tmp_path / "final" / "README.md").write_text("notes are welcome")
    assert value_of(tmp_path / "final") == 1
    for name in ("extra.safetensors", "config.json", "x.jinja"):
        (tmp_path / "final" / name).write_text("{}")
        with pytest.raises(CheckpointError, match=f"{name}: was not there.*common.files.checkpoint seal"):
            verify(tmp_path / "final")
        (tmp_path / "final" / name).unlink()


def test_foreign_folders_pass_and_ours_without_manifest_do_not(tmp_path):
    save_tensors({"a": torch.zeros(3)}.items(), tmp_path / "hub")
    (tmp_path / "hub" / "config.json").write_text("{}")
    assert verify(tmp_path / "hub") == {}
    (tmp_path / "hub" / "manifest.json").write_text('{"of": "somebody else"}')
    assert verify(tmp_path / "hub") == {}
    save(tmp_path / "final", 1)
    (tmp_path / "final" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="manifest.json: missing.*seal"):
        verify(tmp_path / "final")
    with pytest.raises(CheckpointError, match="no such folder"):
        verify(tmp_path / "nothing")


def command(*arguments):
    """`python -m common.files.checkpoint ...`, in a fork: (exit code, what it printed)."""
    def action():
        sys.argv = ["checkpoint", *map(str, arguments)]
        warnings.simplefilter("ignore")  # that the module is imported already
        runpy.run_module("common.files.checkpoint", run_name="__main__")
    return forked(action)


def test_seal_after_an_edit_by_hand_keeps_what_the_manifest_said(tmp_path):
    folder = tmp_path / "final"
    save(folder, 1)
    (folder / "state.json").write_text('{"value": 1 }')
    code, text = command("verify", folder)
    assert code == 2 and text.startswith("error: ") and "state.json: its content" in text, text
    assert "python -m common.files.checkpoint seal" in text and text.count("\n") == 1
    assert command("seal", folder) == (0, f"{folder}: 3 files sealed\n")
    assert value_of(folder) == 1
    assert command("verify", folder) == (0, f"{folder}: 3 files, all as written\n")
    assert command("seal", folder / "nothing")[0] == 2
    (folder / "model.safetensors").write_bytes(b"\x08\0\0\0")
    with pytest.raises(UserError, match="not a whole safetensors"):
        seal(folder)


# --- latest and prune ---

def test_latest_skips_damaged_ones_loudly(tmp_path, capfd):
    for step in (9, 10, 11, 12):
        save(step_folder(tmp_path, step), step)
    (step_folder(tmp_path, 12) / "manifest.json").unlink()
    path = step_folder(tmp_path, 11) / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (tmp_path / "step-000099").mkdir()
    (tmp_path / f"step-000013{TMP}").mkdir()
    assert checkpoint.latest(tmp_path) == step_folder(tmp_path, 10)
    said = capfd.readouterr().err
    assert [line.count("skipped") for line in said.splitlines()] == [1, 1, 1]
    assert "step-000099" in said and "step-000012" in said and "model.safetensors" in said


def test_latest_of_nothing(tmp_path, capfd):
    assert checkpoint.latest(tmp_path) is None and capfd.readouterr().err == ""
    save(step_folder(tmp_path, 3), 3)
    (step_folder(tmp_path, 3) / "state.json").write_text("")
    assert checkpoint.latest(tmp_path) is None
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 2 and "damaged" in said[0] and "from the beginning" in said[1]


def test_prune_keeps_the_newest_and_the_best(tmp_path):
    for step in range(1, 6):
        save(step_folder(tmp_path, step), step)
    checkpoint.prune(tmp_path, keep=2, best=2)
    assert steps(tmp_path) == [2, 4, 5]
    checkpoint.prune(tmp_path, keep=0)
    assert steps(tmp_path) == [5]


@pytest.mark.parametrize("forget", [True, False])
def test_prune_never_deletes_the_only_whole_one(tmp_path, forget):
    for step in range(1, 5):
        save(step_folder(tmp_path, step), step)
    for step in (3, 4):
        (step_folder(tmp_path, step) / "state.json").write_text('{"value": 0}')
    if forget:
        checkpoint._known.clear()
    checkpoint.prune(tmp_path, keep=1)
    assert steps(tmp_path) == [2, 3, 4]
    assert checkpoint.latest(tmp_path) == step_folder(tmp_path, 2)


def test_prune_does_not_read_again_what_nobody_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda real=time.time: real() + 5)
    for step in range(1, 4):
        save(step_folder(tmp_path, step), step)
    real = hashlib.sha256  # of a manifest's own text, not of a file
    monkeypatch.setattr(hashlib, "sha256", lambda *text: real(*text) if text else pytest.fail())
    checkpoint.prune(tmp_path, keep=2)
    assert steps(tmp_path) == [2, 3]
    (step_folder(tmp_path, 3) / "state.json").write_text('{"value": 3}')
    with pytest.raises(pytest.fail.Exception):
        checkpoint.latest(tmp_path)


# --- run folders ---

def test_run_folders_are_numbered_and_never_shared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [str(checkpoint.new_run_folder("chapter-01")) for _ in range(2)]
    assert names == ["runs/chapter-01/001", "runs/chapter-01/002"]
    (tmp_path / "runs/chapter-01/041").mkdir()
    assert checkpoint.new_run_folder("chapter-01").name == "042"
    assert str(checkpoint.new_run_folder("chapter-02")) == "runs/chapter-02/001"


def test_out_is_exact_and_refused_where_a_run_is(tmp_path):
    out = tmp_path / "deep" / "out"
    assert checkpoint.new_run_folder("chapter-01", out) == out and out.is_dir()
    (out / "notes.txt").write_text("")
    checkpoint.new_run_folder("chapter-01", out)
    (out / f"step-000001{TMP}").mkdir()
    with pytest.raises(UserError, match="--resume"):
        checkpoint.new_run_folder("chapter-01", out)
    with pytest.raises(UserError, match="--out"):
        checkpoint.new_run_folder("chapter-01", out / "notes.txt")
