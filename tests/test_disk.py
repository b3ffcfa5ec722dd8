"""A disk that is full, broken or read-only, at every write of a run: one clear line, and what was
saved before is intact. `tests/long/kill.py` has every call of it."""

import ctypes
import os
import random
import resource
import shutil
import struct
import sys

import pytest
import small_runs
from faults import broken_disk, disk_full, forked
from helpers import ROOT

sys.path.append(str(ROOT / "tests" / "long"))
import kill

from common.errors import UserError
from common.files import checkpoint
from common.files.checkpoint import verify


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield kill.Sweep(tmp_path_factory.mktemp("disk"))


def within(arguments, prepare):
    """train.py in a fork after `prepare()`, silently; gives (exit code, the error's line)."""
    reader, writer = os.pipe()
    quiet = os.open(os.devnull, os.O_WRONLY)

    def action():
        for descriptor in (1, 2):  # what it prints would come under the limit as well
            os.dup2(quiet, descriptor)
        prepare()
        try:
            small_runs.train(arguments)
        except UserError as error:
            os.write(writer, str(error).encode())
            raise

    code, _ = forked(action)
    os.close(writer), os.close(quiet)
    with open(reader) as pipe:
        return code, pipe.read()


def test_incident_19_a_disk_that_fills_up_at_any_size_of_any_file(sweep, tmp_path):
    """RLIMIT_FSIZE from nothing to the largest file: step 4 is intact, the line says what is
    needed where a checkpoint is written, and with room the run becomes what it would have been."""
    stopped, run = tmp_path / "stopped", tmp_path / "run"
    shutil.copytree(sweep.undisturbed, stopped)
    for name in (f"step-{small_runs.STEPS:06d}", "final"):
        shutil.rmtree(stopped / name)
    whole = checkpoint.step_folder(run, 4)
    sizes = {path.name: path.stat().st_size for path in (
        *(sweep.undisturbed / "final").iterdir(),
        *(sweep.undisturbed / f"step-{small_runs.STEPS:06d}").iterdir(),
        *sweep.undisturbed.glob("*.json*"))}
    enough = sizes["train_config.json"] + 100  # but not for the next line of metrics.jsonl
    limits = sorted({size - 1 for size in sizes.values()} | {0, 100, enough, 6000, 30_000})
    said = []
    for limit in limits:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(stopped, run)
        code, line = within(["--resume", run], lambda: resource.setrlimit(
            resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY)))
        assert code == 2 and "File too large" in line and "\n" not in line, (limit, line)
        assert not list(run.glob("*.bareloop-tmp*")) or "step-" not in line, (limit, line)
        assert verify(whole)["extra"]["step"] == 4, limit
        if "step-" in line or "final" in line:
            assert "needed" in line and "free" in line and "intact" in line, (limit, line)
        said.append(line)
        if limit in limits[::4]:
            assert small_runs.start(["--resume", run])[0] == 0, limit
            small_runs.assert_equal(run, sweep.undisturbed)
    for name in ("train_config.json", "metrics.jsonl", "step-000006"):
        assert any(name in line for line in said), (name, said)


@pytest.mark.parametrize("count", [4, pytest.param(14, marks=pytest.mark.slow)])
@pytest.mark.parametrize("fault", [disk_full, broken_disk])
def test_incident_19_some_of_all_calls_that_change_the_disk_fail(sweep, fault, count):
    codes = kill.every_failure(sweep, fault, lambda calls: random.Random(7).sample(
        range(len(calls)), count))
    assert codes[2] > count / 2


def without_privileges():
    """Root may write anywhere, but for its capabilities (of Linux): so this process drops them."""
    if os.getuid() == 0:
        header, none = struct.pack("Ii", 0x20080522, 0), struct.pack("6I", *[0] * 6)
        assert ctypes.CDLL(None).capset(header, none) == 0


def test_a_read_only_folder_is_one_clear_line(sweep, tmp_path):
    """A new run there, and a run that has become read-only, as a whole or in part."""
    run = tmp_path / "run"
    shutil.copytree(sweep.undisturbed, run)
    shutil.rmtree(run / "step-000006")
    for folder, arguments, words in (
            (tmp_path, [*sweep.options, "--out", tmp_path / "new"], f"{tmp_path / 'new'} (--out chooses another place): cannot"),
            (run, ["--resume", run], "train_config.json: cannot")):
        os.chmod(folder, 0o555)
        try:
            code, line = within(arguments, without_privileges)
        finally:
            os.chmod(folder, 0o755)
        assert code == 2 and words in line and "Permission denied" in line, line
    assert not (tmp_path / "new").exists()
    assert small_runs.start(["--resume", run])[0] == 0
    small_runs.assert_equal(run, sweep.undisturbed)


def test_space_is_checked_before_the_first_byte(sweep, tmp_path, monkeypatch):
    """A checkpoint that cannot fit is not begun."""
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(
        10**9, 10**9 - 10_000, 10_000))
    code, text = small_runs.start([*sweep.options, "--out", tmp_path / "run"])
    line = text.splitlines()[-1]
    assert code == 2 and "142.3 KiB needed, 9.8 KiB free" in line and "--out" in line, line
    assert not list((tmp_path / "run").glob("step-*"))
