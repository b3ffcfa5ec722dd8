"""What the tests share: chapter files as isolated modules, and scripts as a user runs them."""

import importlib
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = ROOT / "tests" / "goldens"


def load(relative_path):
    """Import the file of a chapter, say `chapter-02/lora.py`, as a module of its own.

    Chapters repeat file names (`packing`, `train`), and their files import one another by bare
    name. So a chapter's own files come from its own folder here, each loaded once, and the bare
    names are removed from `sys.modules` afterwards, for the next chapter.
    """
    path = ROOT / relative_path
    folder = next((f for f in path.parents if f.name.startswith("chapter-")), path.parent)
    siblings = [file.stem for file in folder.rglob("*.py")]
    cache = _loaded.setdefault(folder, {})
    outside = {name: sys.modules.pop(name) for name in siblings if name in sys.modules}
    sys.modules.update(cache)
    before = list(sys.path)
    sys.path[:0] = [str(path.parent), str(folder)]
    try:
        module = importlib.import_module(path.stem)
    finally:
        sys.path[:] = before
        for name in siblings:
            if name in sys.modules:
                cache[name] = sys.modules.pop(name)
        sys.modules.update(outside)
    return module


_loaded = {}


def start_script(script, *arguments, cwd=ROOT, timeout=300, **how):
    """Start `python script arguments...` in folder `cwd`, on one thread, as a `faults.Forked`."""
    from faults import Forked  # who wants ROOT alone may have neither PyTorch nor common/

    def action():
        signal.alarm(timeout)
        os.chdir(cwd)
        sys.stdin = open(os.devnull)
        path = ROOT / script
        sys.argv = [str(path), *map(str, arguments)]
        sys.path.insert(0, str(path.parent))
        if ROOT not in path.parents and (path.parents[1] / "common").is_dir():  # of a copy
            for name in [name for name in sys.modules if name.partition(".")[0] == "common"]:
                del sys.modules[name]
        runpy.run_path(sys.argv[0], run_name="__main__")

    return Forked(action, **how)


def run_script(script, *arguments, cwd, timeout=300, environment=None, fresh=False):
    """Run `python script arguments...` in folder `cwd`; gives the finished process, text captured.

    It is a fork of this one, with `environment` beside ours (see `start_script`); or, where what
    is read at an import matters, a `fresh` Python.
    """
    if fresh:
        return subprocess.run([sys.executable, str(ROOT / script), *map(str, arguments)], cwd=cwd,
                              capture_output=True, text=True, timeout=timeout,
                              env={**os.environ, "NO_COLOR": "1", **(environment or {})})
    with tempfile.TemporaryFile() as errors, mock.patch.dict(
            os.environ, {"NO_COLOR": "1", **(environment or {})}):
        process = start_script(script, *arguments, cwd=cwd, timeout=timeout, errors=errors)
        code, output = process.finish()
        errors.seek(0)
        return subprocess.CompletedProcess(script, code, output, errors.read().decode())


def ranks_of(world, start):
    """`start()` so many processes that are one another's ranks, without torchrun, which would kill
    the peers of a dead one; gives what `start` gives for each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world):
        with mock.patch.dict(os.environ, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(
                world), MASTER_ADDR="localhost", MASTER_PORT=str(port)):
            processes.append(start())
    return processes


def encode_text(chat, text):
    """(ids, trained) of a document, as lists: all trained, eos appended."""
    layout = chat.layout({"text": text})
    ids, trained = chat.finish(layout, chat.tokenise([layout.text], layout.whole)[0])
    return ids.tolist(), trained.tolist()
