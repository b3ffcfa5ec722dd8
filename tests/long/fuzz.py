"""Hostile input: every reader gives an answer or one clear line, soon and in little memory.

    python tests/long/fuzz.py                         120,000 inputs over all readers
    python tests/long/fuzz.py --target config --count 5000 --seed 7
    python tests/long/fuzz.py --target config --only 1234       one input again, with its traceback

An input is one of a reader's real files (sometimes two) with some bytes changed, or, where it is
JSON or has a JSON header, with values, keys and structure changed. It may give an answer or a
UserError of one printable line; another exception, more than 5 s, more than 1 GiB, or the end of
the process is a finding. Input number i of a seed is always the same.
"""

import argparse
import collections
import copy
import json
import mmap
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from fuzz_readers import TARGETS

from common.errors import UserError

SECONDS, MEMORY = 5.0, 2**30
CHUNK = 1000  # inputs to a process
LONGEST = 3000  # characters of a clear line


# --- what is changed ---

ODD = [
    None, True, False, 0, 1, -1, 2, 3, 7, 255, 2**31 - 1, 2**31, 2**63, -2**63 - 1, 10**30, 0.0,
    -0.0, 1e-320, 1e308, -1.5, float("nan"), float("inf"), "", " ", "a", "0", "1", "null", "\0",
    "\n", "a\nb", "\x1b[2J", "\ud800", "\U0010ffff", "é" * 50, "x" * 5000, "../x", "/etc/passwd",
    "model.safetensors", "F32", "BF16", "I8", "lora", "{{ 1 }}", [], {}, [[]], [None], ["a"],
    [0, 0], [-1], [2**40, 2**40], {"": None}, {"a": {"a": 1}}, [1] * 3000, {"content": "x"}]
RAW = [b"\0", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"{", b"}", b"[", b"]", b'"', b"\\", b"\\u",
       b"\\ud800", b",", b":", b"\n", b"\r\n", b"null", b"NaN", b"Infinity", b"-", b"1e999",
       b"1" * 5000, b"[" * 3000, b'{"a":' * 3000, b"{{", b"{%", b"%}", b"}}", b"\xf4\x8f\xbf\xbf"]


def change_bytes(data, rng):
    """`data` with one to four small changes."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(data) + 1)
        size = rng.choice((1, 1, 2, 8, 64, 1000))
        kind = rng.randrange(7)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:at + size]
        elif kind == 2:
            data[at:at] = rng.choice(RAW)
        elif kind == 3:
            data[at:at + size] = rng.randbytes(size)
        elif kind == 4:
            start = rng.randrange(len(data) + 1)
            data[at:at] = data[start:start + size]
        elif kind == 5:
            del data[at:]
        else:
            raw = rng.choice(RAW)
            data[at:at + len(raw)] = raw
    return bytes(data)


def change_value(value, rng):
    """A JSON value with one thing in it changed."""
    places = []  # (container, key) of everything within
    rest = [value]
    while rest and len(places) < 3000:
        one = rest.pop(rng.randrange(len(rest)))
        items = one.items() if isinstance(one, dict) else (
            enumerate(one) if isinstance(one, list) else ())
        for key, inner in items:
            places.append((one, key))
            if isinstance(inner, (dict, list)):
                rest.append(inner)
    if not places or rng.random() < 0.02:
        return copy.deepcopy(rng.choice(ODD))
    container, key = rng.choice(places)
    kind = rng.randrange(6)
    if kind == 0:
        del container[key]
    elif kind == 1 and isinstance(container, dict):
        container[rng.choice([str(odd) for odd in ODD[:40]])] = container.pop(key)
    elif kind == 2:
        other, name = rng.choice(places)
        if isinstance(other, dict) and name in other:
            container[key] = json.loads(json.dumps(other[name]))
    elif kind == 3 and isinstance(container[key], (int, float)):
        container[key] = container[key] * rng.choice((-1, 2, 0.5, 1000)) + rng.choice((0, 1, -1))
    elif kind == 4 and isinstance(container[key], str):
        container[key] = change_bytes(container[key].encode("utf-8", "replace"), rng).decode(
            "utf-8", "replace")
    else:
        container[key] = copy.deepcopy(rng.choice(ODD))
    return value


def change_json(text, rng):
    value = json.loads(text)
    for _ in range(rng.choice((1, 1, 2, 3))):
        value = change_value(value, rng)
    return json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")


def change_header(data, rng):
    """A safetensors file whose header is changed; its length is put right, or not."""
    size = int.from_bytes(data[:8], "little")
    header = change_json(data[8:8 + size], rng)
    odd = (0, 1, len(header) * 2, 2**40, 2**63)
    length = len(header) if rng.random() < 0.9 else rng.choice(odd)
    return length.to_bytes(8, "little") + header + data[8 + size:]


def changed(path, rng):
    """The content of `path`, changed in some way that suits its kind."""
    data = path.read_bytes()
    if path.suffix == ".safetensors" and rng.random() < 0.6:
        return change_header(data, rng)
    if path.suffix == ".json" and rng.random() < 0.7:
        return change_json(data, rng)
    if path.suffix == ".jsonl" and rng.random() < 0.6:
        lines = data.splitlines(keepends=True)
        at = rng.randrange(len(lines))
        lines[at] = change_json(lines[at], rng) + rng.choice((b"\n", b"\n", b"\r\n", b""))
        return b"".join(lines)
    return change_bytes(data, rng)


# --- one input ---

class TooSlow(BaseException):
    """More than SECONDS. (Not an Exception, so that no reader takes it for one of its own.)"""


def _alarm(number, frame):
    raise TooSlow(f"more than {SECONDS:.0f} s")


def read_one(target, place, names, rng):
    """Damage a file or two of `place`, read it all, put them back; gives a finding or None."""
    chosen = rng.sample(names, min(len(names), rng.choice((1, 1, 1, 1, 2))))
    kept = {name: (place / name).read_bytes() for name in chosen}
    for name in chosen:
        path = place / name
        kind = rng.random()
        data = changed(path, rng)
        path.unlink()
        if kind < 0.01:
            path.mkdir()
        elif kind < 0.02:
            path.symlink_to(rng.choice(("/dev/zero", "/etc/passwd", "nowhere", name, "..")))
        elif kind > 0.03:
            path.write_bytes(data)
    signal.signal(signal.SIGPROF, _alarm)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of processor time: the machine may be busy
    began = time.process_time()
    try:
        target.read(place, chosen)
        problem = None
    except UserError as error:
        text = str(error)
        problem = None if text.isprintable() and len(text) <= LONGEST else f"not a line: {text!r}"
    except BaseException as error:
        frames = [f"{Path(frame.filename).name}:{frame.lineno}"
                  for frame in traceback.extract_tb(error.__traceback__)]
        problem = f"{type(error).__name__}: {str(error)[:200]!r} at {' '.join(frames[-3:])}"
        if "--only" in sys.argv:
            traceback.print_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    seconds = time.process_time() - began
    if problem is None and seconds > SECONDS:
        problem = f"took {seconds:.1f} s"
    for name, data in kept.items():
        path = place / name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else (
            path.unlink(missing_ok=True))
        path.write_bytes(data)
    return problem


# --- many ---

def _work(target, place, indices, seed, progress, report):
    """In a process of its own: `indices`, one after the other; findings go to file `report`."""
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))
    torch.set_num_threads(1)  # those of the process that forked are not here
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    names = target.prepare(place)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for index in indices:
        progress[:8] = index.to_bytes(8, "little")
        problem = read_one(target, place, names, random.Random(f"{seed}/{target.name}/{index}"))
        if problem:
            with open(report, "a") as file:
                file.write(json.dumps([index, problem]) + "\n")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024
    if grown > MEMORY:
        with open(report, "a") as file:
            file.write(json.dumps([indices[0], f"grew by {grown >> 20} MiB in this chunk"]) + "\n")


def fuzz(target, count, seed=0, first=0):
    """`count` inputs for one target; gives its findings, [(number, what)]."""
    findings, last = [], first + count
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # a disk would be flushed often
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        report = Path(folder) / "report"
        while first < last:
            end = min(first + CHUNK, last)
            place = Path(folder) / "place"
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            report.write_text("")
            with mmap.mmap(-1, 8) as progress:
                code = _watched(target, place, range(first, end), seed, progress, report)
                at = int.from_bytes(progress[:8], "little")
            findings += [tuple(json.loads(line)) for line in report.read_text().splitlines()]
            if code:  # the input at which it ended is a finding; go on behind it
                findings.append((at, f"the process ended with {code}"))
                end = at + 1
            first = end
    return findings


def _watched(target, place, indices, seed, progress, report):
    """Fork `_work`; kill it when one input takes far too long. Gives its exit status."""
    sys.stdout.flush(), sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            null = os.open(os.devnull, os.O_RDWR)
            for number in (0, 1, 2):
                os.dup2(null, number)
            os.chdir(place)
            _work(target, place, indices, seed, progress, report)
            code = 0
        finally:
            os._exit(code)
    before, since, cpu = None, 0.0, 0.0
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.02)
        if progress[:8] != before:
            before, since, cpu = progress[:8], time.monotonic(), _processor_seconds(child)
        elif _processor_seconds(child) - cpu > 6 * SECONDS or (  # or it waits for something
                time.monotonic() - since > 60 * SECONDS):
            os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _processor_seconds(child):
    """What a process has used: not the clock's time, as the machine may be busy."""
    with open(f"/proc/{child}/stat") as file:
        user, system = file.read().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--target", choices=[target.name for target in TARGETS])
    parser.add_argument("--count", type=int, default=120_000, help="inputs over all targets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", type=int, help="one input, in this process")
    options = parser.parse_args()
    targets = [target for target in TARGETS if options.target in (None, target.name)]
    if options.only is not None:
        place = Path(tempfile.mkdtemp())
        names = targets[0].prepare(place)
        rng = random.Random(f"{options.seed}/{targets[0].name}/{options.only}")
        print(read_one(targets[0], place, names, rng) or "as it should be")
        return shutil.rmtree(place)
    began, total, bad = time.monotonic(), 0, 0
    weights = sum(target.share for target in targets)
    for target in targets:
        count = round(options.count * target.share / weights)
        start = time.monotonic()
        findings = fuzz(target, count, options.seed, options.first)
        total, bad = total + count, bad + len(findings)
        print(f"{target.name:12} {count:7,} inputs, {len(findings)} findings, "
              f"{time.monotonic() - start:.0f} s", flush=True)
        kinds = collections.defaultdict(list)
        for index, what in findings:
            kinds[what.partition(" at ")[2] or what[:60]].append((index, what))
        for same in kinds.values():
            print(f"   {len(same)} x, e.g. input {same[0][0]}: {same[0][1][:400]}", flush=True)
    print(f"{total:,} inputs, {bad} findings, {time.monotonic() - began:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
