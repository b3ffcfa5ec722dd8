"""Faults put in on purpose: calls that fail or end the process, damaged files, kills.

`tests/common/test_checkpoint.py` uses them on a few small folders, `tests/long/` on whole runs.
"""

import builtins
import contextlib
import errno
import gc
import io
import os
import signal
import sys
import tempfile
import time
import traceback
from unittest import mock

import torch

from common.errors import UserError
from common.files import tensors as tensor_files

KILLED = 77  # exit code of a process that ended at a fault
PATCHED = [(os, name) for name in (
    "fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "open")] + [
    (tensor_files, "save_file")]


class Faults:
    """Within it, the `at`-th call (from 0) that changes the disk runs `fault(name)` instead.

    A faulty write has written half of its bytes. `calls` lists what was called, by name. With
    `at` None nothing fails: that is how a sweep learns how many calls there are.
    """

    def __init__(self, at=None, fault=None):
        self.at, self.fault, self.calls = at, fault, []

    def __enter__(self):
        self.patches = [mock.patch.object(module, name, self._counted(name, getattr(module, name)))
                        for module, name in PATCHED]
        opened = self._counted_open(builtins.open)
        self.patches += [mock.patch.object(builtins, "open", opened),
                         mock.patch.object(io, "open", opened)]
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *error):
        for patch in reversed(self.patches):
            patch.stop()

    def _due(self, name):
        self.calls.append(name)
        return len(self.calls) - 1 == self.at

    def _counted(self, name, function):
        def call(*arguments, **options):
            if name == "open" and not arguments[1] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
                return function(*arguments, **options)
            if self._due(name):
                self.fault(name)
            return function(*arguments, **options)
        return call

    def _counted_open(self, function):
        def call(file, mode="r", *arguments, **options):
            if not set(mode) & set("wax+"):
                return function(file, mode, *arguments, **options)
            if self._due("open to write"):
                self.fault("open to write")
            return _File(self, function(file, mode, *arguments, **options))
        return call


class _File:
    """An open file whose writes are counted."""

    def __init__(self, faults, file):
        self.faults, self.file = faults, file

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, data):
        if self.faults._due("write"):
            self.file.write(data[:len(data) // 2])
            self.file.flush()
            self.faults.fault("write")
        return self.file.write(data)


def end_process(name):
    """A fault: the process is gone at once, as after SIGKILL or a power cut."""
    os._exit(KILLED)


def disk_full(name):
    """A fault: the error of a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def broken_disk(name):
    """A fault: the error of a disk that fails."""
    raise OSError(errno.EIO, os.strerror(errno.EIO))


class Forked:
    """`action()` in a forked process, begun at once: PyTorch is imported already, which takes two
    seconds. What it prints goes to the files `output` and `errors`, or both to one."""

    def __init__(self, action, output=None, errors=None):
        self.output = output or tempfile.TemporaryFile()
        sys.stdout.flush()
        sys.stderr.flush()
        self.child = os.fork()
        if self.child == 0:
            code = 3
            gc.freeze()  # what the parent has made is no garbage here, and takes long to look at
            try:
                os.dup2(self.output.fileno(), 1)
                os.dup2((errors or self.output).fileno(), 2)
                sys.stdout, sys.stderr = (open(n, "w", closefd=False) for n in (1, 2))
                torch.set_num_threads(1)  # the parent's threads are not here: it would wait for them
                action()
                code = 0
            except UserError as error:
                code = 2
                print(f"error: {error}")
            except SystemExit as error:
                code = error.code or 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def kill(self):
        os.kill(self.child, signal.SIGKILL)

    def finish(self):
        """Wait for its end: (exit code or -signal, what it printed).

        The code is 2 after a UserError, 3 after any other exception, as the text tells.
        """
        status = os.waitpid(self.child, 0)[1]
        self.output.seek(0)
        with self.output:
            return os.waitstatus_to_exitcode(status), self.output.read().decode()


def forked(action, kill_after=None):
    """`action()` as a `Forked` process, which gets SIGKILL after so many seconds; gives its end."""
    process = Forked(action)
    if kill_after is not None:
        time.sleep(kill_after)
        process.kill()
    return process.finish()


def sweep(prepare, action, check, faults=(end_process, disk_full, broken_disk)):
    """`prepare()`, then `action()` with a fault at its k-th call, then `check(where, code, text)`.

    For every k and every fault; returns how many there were. `prepare` must give `action` the same
    start each time.
    """
    prepare()
    with Faults() as counted:
        action()
    for fault in faults:
        for at, name in enumerate(counted.calls):
            prepare()

            def faulty():
                with Faults(at, fault):
                    action()

            where = f"{fault.__name__} at call {at} ({name})"
            check(where, *(forked(faulty) if fault is end_process else _tried(faulty)))
    return len(faults) * len(counted.calls)


def _tried(action):
    """As `forked`, in this process."""
    try:
        action()
    except UserError as error:
        return 2, f"error: {error}"
    return 0, ""


@contextlib.contextmanager
def damaged(folder, random):
    """One file of `folder`, chosen by `random` (a random.Random), is damaged within; gives how.

    A byte is flipped (three times in five), or the file is truncated, or deleted.
    """
    path = random.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    data = path.read_bytes()
    kind = random.choice(("flip", "flip", "flip", "truncate", "delete"))
    if kind == "delete" or not data:
        path.unlink()
        what = f"{path.name} deleted"
    elif kind == "truncate":
        size = random.randrange(len(data))
        path.write_bytes(data[:size])
        what = f"{path.name} cut to {size} of {len(data)} bytes"
    else:
        place, bit = random.randrange(len(data)), 1 << random.randrange(8)
        path.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1:])
        what = f"{path.name} byte {place} of {len(data)}: bit {bit} flipped"
    try:
        yield what
    finally:
        path.write_bytes(data)
