"""Make `import common` and `from helpers import load` work from every test file."""

import atexit
import ctypes
import functools
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs the network is a defect
# One thread: many tests fork, and threads do not survive that; and two processes that each take
# every core of a shared machine wait for each other most of the time.
os.environ["OMP_NUM_THREADS"] = "1"
# The tests are the same with a GPU and without one; what only a GPU shows, bench/gpu.py checks.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Tokenised data of the tests, not of the person who runs them: made anew for every session.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="bareloop-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

import small_runs
from helpers import load

collect_ignore = ["long", "bench", "goldens"]


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests, and no others")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: further cases of what a faster test holds already; "
                            "`python -m pytest --slow` runs them")


def pytest_collection_modifyitems(config, items):
    """The slow tests, or the others; the rest counts as deselected, not as skipped."""
    wanted, others = [], []
    for item in items:
        is_slow = item.get_closest_marker("slow") is not None
        (wanted if is_slow == config.option.slow else others).append(item)
    items[:] = wanted
    config.hook.pytest_deselected(items=others)
    config.left_out = len(others)


def pytest_report_collectionfinish(config):
    left_out = getattr(config, "left_out", 0)  # 0: nothing could be collected
    if left_out and not config.option.slow:
        return f"{left_out} slow tests are left out: python -m pytest --slow"


@pytest.fixture(scope="session", autouse=True)
def fake_cuda_runs(request):
    """The processes that test_cuda_branch.py reads: they run the cases of its tests.

    They take a minute of the core that the tests, on one thread, leave idle: so they begin with
    the first test, whichever it is, and give way to whatever else wants to run.
    """
    script = Path(__file__).parent / "fake_cuda.py"
    cases = [item.callspec.params["case"] for item in request.session.items
             if item.path.name == "test_cuda_branch.py" and "found" in item.fixturenames]
    started = [] if shutil.which("g++") is None else [
        subprocess.Popen(["nice", sys.executable, script, *half], text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for half in (cases[::2], cases[1::2]) if half]
    yield started
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="session", autouse=True)
def family_runs(request):
    """A function that gives (exit code, output) of a family's check: see family_runs.py.

    One process runs those that are wanted, one after another, from the first test on.
    """
    names = [item.callspec.params["name"] for item in request.session.items
             if item.path.name == "test_families.py" and hasattr(item, "callspec")]
    if not names:
        yield None
        return
    script = Path(__file__).parent / "family_runs.py"
    process = subprocess.Popen(["nice", sys.executable, script, *names], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    found = {}

    def result(name):
        while name not in found:
            line = process.stdout.readline()
            assert line.startswith("{"), f"family_runs.py has failed: {line}{process.stdout.read()}"
            said = json.loads(line)
            found[said["name"]] = said["code"], said["said"]
        return found[name]

    yield result
    process.kill()
    process.communicate()


@pytest.fixture(scope="module", autouse=True)
def give_memory_back():
    """Training keeps what it frees, and a fork takes 40 ms for each GB that this process has."""
    yield
    gc.collect()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twelve short documents with short answers: together they fit one pack."""
    file = tmp_path_factory.mktemp("data") / "data.jsonl"
    rows = [{"prompt": f"Say {word} {i}", "completion": f"{word} " * (1 + i % 3)}
            for i, word in enumerate("one two three four five six".split() * 2)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture
def short_answers(request):
    """The train.py of the test's chapter asks for three tokens: see `small_runs.short_answers`."""
    with small_runs.short_answers(load(f"{request.path.parent.name}/train.py")):
        yield


@pytest.fixture
def quick_ceilings(monkeypatch):
    """What the device can do, told or measured in one call: for tests that read no speed."""
    operators = load("chapter-03/profiling/operators.py")
    small = operators.torch.ones(2**16)
    for name, answer in {"duration": functools.partial(operators.duration, repeats=1),
                         "ceilings": lambda device, dtype: (1e11, 1e10),
                         "larger_than_caches": lambda: small}.items():
        monkeypatch.setattr(operators, name, answer)
