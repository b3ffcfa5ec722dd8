"""How cost grows: what is doubled, and by which power time and memory follow. Development only.

    python tests/bench/growth.py --out growth.json
    python tests/bench/growth.py --only steps --largest-pack 65536        (six minutes)
    python tests/bench/growth.py --only data --largest-data 1000000       (a million documents)

Each line fits cost = c · size^exponent to its measurements, in logarithms. An exponent below the
one that theory has means that something which does not grow is still a large share. Steps are
chapter 3's, dense and eager, optimizer included; sizes take turns, and the fastest of a few counts.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1]),
                str(Path(__file__).parents[2])]
from helpers import ROOT, load
from report import conditions, peak_resident, show_conditions, table, write

from common import memory

# What is not varied: tokens per pack, documents in it, vocabulary, layers; D stays 256.
BASE = {"tokens": 1024, "documents": 8, "vocabulary": 4096, "layers": 4}
WHY = {
    "tokens, in documents of 128": "every token costs the same: all but attention is per token, "
    "and attention looks no further than the document",
    "tokens, in one document": "attention grows with the square of a document; how far above 1 the "
    "exponent is tells attention's share",
    "documents in 2048 tokens": "the more documents the shorter they are, so attention falls, until "
    "a document is no longer than a block of queries (attention.py); the rest does not care",
    "vocabulary": "the head and its loss, the embedding's optimizer step: in proportion, beside "
    "layers that do not change",
    "layers": "in proportion, beside a head that does not change",
    "data: seconds to tokenise": "one pass, each document by itself",
    "data: resident memory": "tokens go to a file that is mapped; what is kept is 8 bytes for each "
    "document, beside PyTorch itself",
    "data: seconds to pack an epoch": "a shuffle, and one binary search for each pack",
    "data: seconds from the cache": "the files are read once, to know by their content whether "
    "they are the same",
}


# --- steps ---

def stepper(tokens, documents, vocabulary, layers):
    """A function that does one optimizer step on a pack of equal documents."""
    modeling, packing = (load(f"chapter-03/{n}.py") for n in ("modeling_llama", "packing"))
    torch.manual_seed(0)
    model = modeling.LlamaForCausalLM(modeling.LlamaConfig(
        vocab_size=vocabulary, hidden_size=256, intermediate_size=768, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, head_dim=64, max_position_embeddings=2**16,
        qk_norm=True, qkv_bias=False, rope_theta=1e6, windows=(None,) * layers,
        tie_word_embeddings=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, vocabulary, (documents, tokens // documents))
    pack = packing.packed_sequence_collate_fn([(row, row) for row in ids])

    def step():
        (model(**pack) / tokens).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def seconds(cases, repeats):
    """The fastest step of each case, a dict of `stepper`'s arguments; they take turns."""
    steps = [stepper(**{**BASE, **case}) for case in cases]
    best = [float("inf")] * len(steps)
    for repeat in range(repeats + 1):
        for i, step in enumerate(steps):
            started = time.perf_counter()
            step()
            if repeat:  # the first allocates
                best[i] = min(best[i], time.perf_counter() - started)
    return best


def steps(options):
    """{line: (sizes, seconds)} of a training step."""
    memory.keep_freed("cpu")  # as train.py does
    sizes = [256 * 2**i for i in range(9)]
    sweeps = {
        "tokens, in documents of 128": [{"tokens": n, "documents": n // 128} for n in sizes
                                        if n <= options.largest_pack],
        "tokens, in one document": [{"tokens": n, "documents": 1} for n in sizes
                                    if n <= options.largest_document],
        "documents in 2048 tokens": [{"tokens": 2048, "documents": n} for n in (1, 4, 16, 64)],
        "vocabulary": [{"vocabulary": n} for n in (1024, 4096, 16384, 65536)],
        "layers": [{"layers": n} for n in (2, 4, 8, 16)],
    }
    varied = {"tokens, in documents of 128": "tokens", "tokens, in one document": "tokens",
              "documents in 2048 tokens": "documents"}
    return {name: ([case[varied.get(name, name)] for case in cases],
                   seconds(cases, options.repeats)) for name, cases in sweeps.items()}


# --- data ---

def write_documents(path, count):
    """`count` short conversations, about 30 tokens each, as JSON lines."""
    words, source = "blue seven tree walks old rain under nine light song".split(), random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for i in range(count):
            said = " ".join(source.choices(words, k=source.randint(2, 8)))
            file.write(json.dumps({"prompt": f"Repeat {i}: {said}", "completion": said}) + "\n")


def prepare(path):
    """What a run does with its data before the first step: seconds of each part, peak memory."""
    from common import hub
    from common.data import encode, readers
    from common.data.chat import Chat

    packing, chat = load("chapter-01/packing.py"), Chat.load(hub.resolve("tiny"))
    before = peak_resident()

    def encoded():
        started = time.perf_counter()
        result = encode.cached(lambda file: encode.encode(
            readers.Records(path), chat, 2048, file=file), "growth", [path])
        return result, time.perf_counter() - started

    documents, first = encoded()
    documents, again = encoded()
    train, _ = encode.split(documents, seed=0)
    started = time.perf_counter()
    sampler = packing.PackSampler(train.lengths, 4096, seed=0)
    sampler.packs_in(1)
    packed = time.perf_counter() - started
    return {"tokenise": first, "cached": again, "pack": packed, "resident": peak_resident(),
            "before": before}


def data(options):
    """{line: (sizes, seconds or bytes)} of preparing data; a process for each size, as peak
    memory is a process's."""
    sizes = [n for n in (1000, 10_000, 100_000, 1_000_000) if n <= options.largest_data]
    found = []
    for count in sizes:
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "data.jsonl"
            write_documents(file, count)
            done = subprocess.run(
                [sys.executable, __file__, "--prepare", str(file)], check=True, text=True,
                stdout=subprocess.PIPE, env={**os.environ, "XDG_CACHE_HOME": scratch})
            found.append(json.loads(done.stdout.splitlines()[-1]))
    return {"data: seconds to tokenise": (sizes, [one["tokenise"] for one in found]),
            "data: seconds from the cache": (sizes, [one["cached"] for one in found]),
            "data: seconds to pack an epoch": (sizes, [one["pack"] for one in found]),
            "data: resident memory": (sizes, [one["resident"] for one in found])}


# --- start ---

def start_up(repeats):
    """Seconds from the command to the first logged step, on the tiny model and data: with nothing
    cached, then the fastest of `repeats` when the data is."""
    with tempfile.TemporaryDirectory() as scratch:
        found = []
        for i in range(1 + repeats):
            started = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, ROOT / "chapter-02/train.py", "--model", "tiny", "--data", "tiny",
                 "--device", "cpu", "--steps", "1", "--eval-every", "0", "--save-every", "0",
                 "--out", f"run{i}"], cwd=scratch, stdout=subprocess.PIPE, text=True,
                env={**os.environ, "XDG_CACHE_HOME": scratch, "PYTHONUNBUFFERED": "1"})
            # The first step's line; before it the model has answered 200 questions.
            for line in process.stdout:
                if line.strip().startswith("1/1"):
                    found.append(time.perf_counter() - started)
            if process.wait():
                raise RuntimeError("chapter-02/train.py failed; its message is above")
    return {"first": found[0], "again": min(found[1:])}


# --- result ---

def fit(sizes, values):
    """(exponent, R²) of the straight line through the logarithms."""
    x, y = np.log(sizes), np.log(values)
    slope, constant = np.polyfit(x, y, 1)
    rest = y - slope * x - constant
    spread = ((y - y.mean()) ** 2).sum()
    return slope, 1 - (rest**2).sum() / spread if spread else 1.0


def shown(name, value):
    """A measurement as text: MB, ms or s."""
    if "memory" in name:
        return f"{value / 1e6:.0f} MB"
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("steps", "data", "start"), help="one part alone")
    parser.add_argument("--largest-pack", type=int, default=8192, help="tokens of many documents")
    parser.add_argument("--largest-document", type=int, default=8192, help="tokens of one")
    parser.add_argument("--largest-data", type=int, default=100_000, help="documents")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", help="file for the figures, as JSON")
    parser.add_argument("--prepare", help=argparse.SUPPRESS)  # the child process of `data`
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    if options.prepare:
        print(json.dumps(prepare(options.prepare)))
        return 0
    found, measured = conditions(), {}
    show_conditions(found)
    if options.only in (None, "steps"):
        measured |= steps(options)
    if options.only in (None, "data"):
        measured |= data(options)
    figures = {}
    for name, (sizes, values) in measured.items():
        exponent, r2 = fit(sizes, values)
        figures[name] = {"sizes": sizes, "values": values, "exponent": exponent, "r2": r2}
    if figures:
        table(["what grows", "from, to", "measured", "exponent", "R²", "why"],
              [[name, f"{f['sizes'][0]:,} to {f['sizes'][-1]:,}",
                ", ".join(shown(name, value) for value in f["values"]),
                f"{f['exponent']:.2f}", f"{f['r2']:.3f}", WHY[name]]
               for name, f in figures.items()])
    if options.only in (None, "start"):
        figures["start"] = start_up(options.repeats)
        print(f"\nfrom the command to the first step, tiny model and data: "
              f"{figures['start']['first']:.1f} s, and {figures['start']['again']:.1f} s once the "
              "data is cached")
    write(options.out, {**found, "options": vars(options), "figures": figures})
    return 0


if __name__ == "__main__":
    sys.exit(main())
