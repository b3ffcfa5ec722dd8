"""What the methods, four bits and a merge do to a real pretrained model. Development only.

    python tests/bench/real.py data gsm8k_train.jsonl DATA          training and held-out files
    python tests/bench/real.py sweep MODEL DATA --runs runs/sweep --out sweep.json     losses by rate
    python tests/bench/real.py zoo MODEL DATA --runs runs/zoo --text shakespeare.txt --out zoo.json
    python tests/bench/real.py bits MODEL DATA --lora DIR --qlora DIR --text ... --out bits.json
    python tests/bench/real.py start MODEL DATA --out start.json    from the command to the first step
    python tests/bench/real.py pace MODEL DATA --out pace.json      tokens a second of each method

MODEL is the folder of a Llama, Qwen3 or Qwen2.5 with a chat template. `zoo` takes every run of
`chapter-02/compare.py --out runs/zoo` (see chapter-02/real_model/README.md for its options) and
measures what the run itself does not: answers to 100 questions, and what was forgotten. What is
done stays done: a second call goes on with the rows that are missing. `bits` compares bases of 16
and 4 bits, adapters on them and merges, and, where it is installed, bitsandbytes' loss.
"""

import argparse
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1]),
                str(Path(__file__).parents[2])]
from helpers import ROOT, load
from report import conditions, show_conditions, table, write

from common.adapters.peft import load_adapter
from common.asking.generation import generate
from common.data.chat import Chat
from common.data.encode import encode
from common.data.readers import Records

ASIDE, HELD_OUT, FEW = 600, 100, 40  # the last records: not trained on, asked, for a sweep
COLUMNS = {"prompt": "question", "completion": "answer"}
PACK = 1024  # tokens of a forward pass, and of the pieces of the plain text
TEXT = 8  # pieces of the plain text
PACE = 4  # steps that are timed, after two others
LONGEST = 256  # tokens of an answer
ANSWER = re.compile(r"^#### (-?[\d,.]+)\s*$", re.MULTILINE)
# Asked of the base model, whose own answers are what it should not forget.
GENERAL = (
    "What is the capital of France?", "Name three primary colours.", "Who wrote Hamlet?",
    "Explain what a volcano is in two sentences.", "Give me a recipe for pancakes.",
    "Write a short poem about the sea.", "What is the difference between a frog and a toad?",
    "How do I boil an egg?", "Suggest a name for a cat.", "What causes the seasons?",
    "Translate 'good morning' into Spanish.", "List five fruits.", "What is photosynthesis?",
    "Write an email that asks for a day off.", "Why is the sky blue?",
    "What should I pack for a week at the beach?", "Tell me a joke.", "Who was Marie Curie?",
    "Explain gravity to a child.", "How can I sleep better?", "What is a haiku?",
    "Summarise the story of Cinderella.", "Name the planets of the solar system.",
    "How does a bicycle stay upright?", "What is the largest ocean?",
    "Write the first sentence of a mystery novel.", "What is inflation?",
    "Give three tips for a job interview.", "How are rainbows formed?", "What do bees do?",
    "Describe a perfect weekend.", "What is the purpose of a constitution?",
    "How do vaccines work?", "Rewrite more politely: give me the book.",
    "What is the opposite of generous?", "Write a Python function that adds two numbers.",
    "What is a balanced diet?", "Why do cats purr?", "How do I tie a tie?",
    "Write a birthday greeting for my grandmother.")


# --- data ---

def split(source, folder):
    """train.jsonl: all but the last ASIDE records; held-out.jsonl: the last HELD_OUT of these;
    few.jsonl: the first FEW of those, for comparisons of many runs; plain.jsonl: train.jsonl as
    texts, of which every token is trained on."""
    lines = Path(source).read_text(encoding="utf-8").splitlines(keepends=True)
    Path(folder).mkdir(parents=True, exist_ok=True)
    held_out = lines[-HELD_OUT:]
    texts = [json.dumps({"text": f"{one['question']}\n{one['answer']}"}) + "\n"
             for one in map(json.loads, lines[:-ASIDE])]
    for name, some in (("train", lines[:-ASIDE]), ("held-out", held_out),
                       ("few", held_out[:FEW]), ("plain", texts)):
        Path(folder, f"{name}.jsonl").write_text("".join(some), encoding="utf-8")
        print(f"{folder}/{name}.jsonl: {len(some):,} records")


def conversations(pairs, chat):
    """Documents of (question, answer) pairs."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "pairs.jsonl")
        file.write_text("".join(json.dumps({"prompt": question, "completion": answer}) + "\n"
                                for question, answer in pairs), encoding="utf-8")
        return [*encode(Records(file), chat, PACK, title="general questions")]


class Work:
    """What every model is measured on; made once, with the base model's answers."""

    def __init__(self, model, chat, data, text):
        held_out = Path(data, "held-out.jsonl")
        self.chat = chat
        self.records = [json.loads(line) for line in held_out.open(encoding="utf-8")]
        answers = self.answers(model, GENERAL, 96)
        self.documents = {
            "held_out": [*encode(Records(held_out, COLUMNS), chat, PACK, title="held out")],
            "general": conversations(zip(GENERAL, answers), chat),
            "text": [*encode(Records(text), chat, PACK, title="plain text")][:TEXT]}

    def answers(self, model, questions, longest=LONGEST):
        prompts = [self.chat.encode_prompt([{"role": "user", "content": text}])
                   for text in questions]
        found = generate(model, prompts, longest, self.chat.stop_ids)
        return [self.chat.decode(ids) for ids in found]

    def losses(self, model):
        """Mean loss per labelled token of each set of documents."""
        return {name: loss(model, documents) for name, documents in self.documents.items()}

    def score(self, model):
        """Share of answers with a line "#### number", and of those with the right number."""
        wanted = [ANSWER.search(one["answer"])[1].replace(",", "") for one in self.records]
        texts = self.answers(model, [one["question"] for one in self.records])
        given = [ANSWER.search(text) for text in texts]
        right = [found is not None and found[1].replace(",", "").rstrip(".") == number
                 for found, number in zip(given, wanted)]
        return {"format": sum(found is not None for found in given) / len(given),
                "right": sum(right) / len(right)}


@torch.no_grad()
def loss(model, documents):
    """Mean loss per labelled token of (ids, labels) pairs; `model` is chapter 3's."""
    packing = load("chapter-03/packing.py")
    total, labelled, pack = 0.0, 0, []
    for ids, labels in (*documents, (None, None)):
        if pack and (ids is None or sum(len(i) for i, _ in pack) + len(ids) > PACK):
            batch = packing.packed_sequence_collate_fn(pack)
            labelled += int((batch["labels"] >= 0).sum())
            total += model(**batch).item()
            pack = []
        pack.append((ids, labels))
    return total / labelled


def model_of(folder, adapter=None, dtype=torch.float32, base="auto"):
    """Chapter 3's model from `folder`, with the adapter of that folder if there is one."""
    model, _ = load("chapter-03/quantized_model.py").load_model(
        str(folder), torch.device("cpu"), dtype, adapter, base)
    if adapter:
        load_adapter(model, adapter, load("chapter-03/lora.py"))
    return model.eval()


def of_run(base, final):
    """The model that a run has left in `final`, an adapter's or a whole model's folder."""
    return (model_of(base, final) if (final / "adapter_config.json").is_file()
            else model_of(final))


def unrounded(model):
    """The model, with four-bit weights that become float32, as bitsandbytes' do in float32
    products. Else they are first rounded to the dtype of the files."""
    for module in model.modules():
        if isinstance(module, load("chapter-03/nf4.py").NF4Linear):
            module.dtype = torch.float32
    return model


# --- the parts ---

def zoo(options, work, rows, save):
    """A row for the base and for each run of compare.py."""
    runs = sorted(path for path in Path(options.runs).iterdir() if (path / "final").is_dir())
    for path in tqdm([None, *runs], unit="model"):
        name = "base" if path is None else path.name
        if name in rows:
            continue
        model = model_of(options.model) if path is None else of_run(options.model, path / "final")
        rows[name] = {"loss": work.losses(model), **work.score(model)}
        if path is not None:
            with open(path / "train_config.json", encoding="utf-8") as file:
                told = json.load(file)["options"]
            run = load("chapter-02/compare.py").read_run(path)
            rows[name] |= {key: told[key] for key in ("method", "lr", "seed", "steps")} | {
                key: run[key] for key in ("trainable", "memory", "speed")}
        save()
    table(["run", "held-out loss", "general", "plain text", "####", "right"],
          [[name, *(f"{row['loss'][key]:.3f}" for key in ("held_out", "general", "text")),
            f"{row['format']:.0%}", f"{row['right']:.0%}"] for name, row in rows.items()])


def sweep(options):
    """A row for each method among the runs: {rate: held-out loss, the mean over seeds}."""
    found, runs = {}, load("chapter-02/compare.py")
    for path in sorted(Path(options.runs).iterdir()):
        if (path / "final").is_dir():
            with open(path / "train_config.json", encoding="utf-8") as file:
                told = json.load(file)["options"]
            rates = found.setdefault(told["method"], {})
            rates.setdefault(told["lr"], []).append(runs.read_run(path)["loss"])
    rows = {}
    for method, losses in found.items():
        means = {rate: statistics.mean(losses[rate]) for rate in sorted(losses)}
        best = min(means, key=means.get)
        rows[method] = {"best": best, "loss": means[best], "rates": [*means],
                        "losses": [*means.values()], "at_an_end": best in (min(means), max(means))}
    table(["method", "best rate", "loss", "losses by rate"],
          [[method, f"{row['best']:g}" + " (edge)" * row["at_an_end"], f"{row['loss']:.3f}",
            ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in zip(row["rates"], row["losses"]))]
           for method, row in rows.items()])
    return rows


def bits(options, work, rows, save):
    """Losses by how the base is kept, with and without adapters, and after merges."""
    merge = load("chapter-03/merge.py").merge
    lora, qlora = options.lora, options.qlora
    plan = {
        "base, float32": lambda: model_of(options.model),
        "base, NF4": lambda: model_of(options.model, base="nf4"),
        "base, NF4, not rounded": lambda: unrounded(model_of(options.model, base="nf4")),
        "base, NF4, double": lambda: model_of(options.model, base="nf4-double"),
        "LoRA": lambda: model_of(options.model, lora),
        "LoRA, on NF4": lambda: model_of(options.model, lora, base="nf4"),
        "QLoRA": lambda: model_of(options.model, qlora),
        "QLoRA, on the original weights": lambda: model_of(options.model, qlora, base="none"),
        "base, bfloat16": lambda: model_of(options.model, dtype=torch.bfloat16)}
    merged = {
        "LoRA, merged, bfloat16": (lora, {"dtype": "bfloat16"}),
        "QLoRA, merged, bfloat16": (qlora, {"dtype": "bfloat16"}),
        "QLoRA, merged into the original": (qlora, {"dtype": "bfloat16", "original": True}),
        "QLoRA, merged, --requantize": (qlora, {"dtype": "nf4", "requantize": True})}
    for name in tqdm([*plan, *merged], unit="model"):
        if name in rows:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            told = {}
            if name in merged:
                adapter, how = merged[name]
                out = Path(scratch, "merged")
                told = merge(str(adapter), str(out), **how)
                told = {key: told[key] for key in ("total", "left")}
                model = model_of(out)
            else:
                model = plan[name]()
            rows[name] = {"loss": work.losses(model), **told}
        save()
    if importlib.util.find_spec("bitsandbytes") and "base, NF4, bitsandbytes" not in rows:
        rows["base, NF4, bitsandbytes"] = {"loss": bitsandbytes_losses(options.model, work)}
        save()
    table(["weights", "held-out loss", "general", "plain text"],
          [[name, *(f"{row['loss'][key]:.4f}" for key in ("held_out", "general", "text"))]
           for name, row in rows.items()])


@torch.no_grad()
def bitsandbytes_losses(folder, work):
    """The losses of transformers' model with bitsandbytes' NF4 layers, a document at a time."""
    from contestants import transformers_model

    model = transformers_model("qlora", folder, torch.float32, {}, False)
    model.get_base_model()  # PEFT's, whose fresh adapters add nothing
    found = {}
    for name, documents in work.documents.items():
        total, labelled = 0.0, 0
        for ids, labels in documents:
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
            total += torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum").item()
            labelled += int((labels[1:] >= 0).sum())
        found[name] = total / labelled
    return found


def pace(options):
    """Tokens a second of each method: the median over the last steps of a short run each."""
    rows = {}
    with tempfile.TemporaryDirectory() as scratch:
        for method in tqdm(load("chapter-02/lora.py").METHODS, unit="method"):
            out = Path(scratch, method)
            subprocess.run([*train_command(options), "--method", method, "--steps",
                            str(PACE + 2), "--log-every", "1", "--delta-start", "1", "--out", out],
                           check=True, stdout=subprocess.DEVNULL)
            steps = [json.loads(line) for line in (out / "metrics.jsonl").open(encoding="utf-8")]
            rates = [step["tokens_per_second"] for step in steps if "loss" in step]
            rows[method] = {"tokens_per_second": statistics.median(rates[-PACE:]), "steps": rates}
    table(["method", "tokens/s"],
          [[name, f"{row['tokens_per_second']:.0f}"] for name, row in rows.items()])
    return rows


def train_command(options):
    """Chapter 2's train.py on problems, in float32, without evaluation and checkpoints."""
    return [sys.executable, ROOT / "chapter-02" / "train.py", "--model", options.model, "--data",
            Path(options.second, "few.jsonl"), "--columns", "prompt=question,completion=answer",
            "--dtype", "float32", "--batch-tokens", "1024", "--eval-every", "0", "--save-every", "0"]


# What a user of transformers and PEFT would write for one step on one pack.
PEER = """
import json, sys
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, data = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
packed, positions, labels = [], [], []
for line in open(data):
    one = json.loads(line)
    messages = [{"role": "user", "content": one["question"]}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    messages.append({"role": "assistant", "content": one["answer"]})
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    if len(packed) + len(ids) <= 1024:
        packed += ids
        positions += range(len(ids))
        labels += [-100] * len(prompt) + ids[len(prompt):]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
rows = [torch.tensor([one]) for one in (packed, positions, labels)]
model(input_ids=rows[0], position_ids=rows[1], labels=rows[2], use_cache=False).loss.backward()
optimizer.step()
print("1/1", flush=True)
"""


def start(options):
    """Seconds from the command to the end of the first step, three times each, in turns."""
    train = [*train_command(options), "--steps", "1"]
    found = {"ours": [], "ours, first time": [], "transformers and PEFT": []}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(6):
            new = {"XDG_CACHE_HOME": f"{scratch}/cache-{number // 2}"}  # of tokenised data
            row = ("ours, first time", "ours")[number % 2]
            found[row].append(seconds_to_step([*train, "--out", f"{scratch}/{number}"], new))
            if number % 2 and importlib.util.find_spec("peft"):
                found["transformers and PEFT"].append(
                    seconds_to_step([sys.executable, "-c", PEER, options.model,
                                     Path(options.second, "few.jsonl")], {}))
    rows = {name: {"seconds": times} for name, times in found.items() if times}
    table(["what", "seconds to the first step"],
          [[name, f"{statistics.median(row['seconds']):.1f}"] for name, row in rows.items()])
    return rows


def seconds_to_step(command, variables):
    """Seconds until a line of the command's output begins with "1/1"."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                               env={**os.environ, **variables, "PYTHONUNBUFFERED": "1"})
    for line in process.stdout:
        if line.lstrip().startswith("1/1 ") or line == "1/1\n":
            seconds = time.perf_counter() - started
            process.stdout.read()
            process.wait()
            return seconds
    raise SystemExit(f"no step: {' '.join(map(str, command[:3]))}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("part", choices=("data", "sweep", "zoo", "bits", "start", "pace"))
    parser.add_argument("first", metavar="MODEL", help="with `data`: the file to split")
    parser.add_argument("second", metavar="DATA", help="the folder that `data` has written")
    parser.add_argument("--runs", help="sweep, zoo: the --out of compare.py")
    parser.add_argument("--lora", type=Path, help="bits: `final` of a run with --quantize none")
    parser.add_argument("--qlora", type=Path, help="bits: `final` of a run on an NF4 base")
    parser.add_argument("--text", help="a file of plain text")
    parser.add_argument("--out", help="a JSON file; what it holds is not measured again")
    options = parser.parse_args(argv)
    if options.part == "data":
        return split(options.first, options.second)
    options.model = options.first
    found = conditions()
    show_conditions(found)
    if options.part in ("start", "sweep", "pace"):
        rows = {"start": start, "sweep": sweep, "pace": pace}[options.part](options)
        return write(options.out, {**found, "rows": rows})
    out = Path(options.out)
    rows = json.loads(out.read_text())["rows"] if out.is_file() else {}
    base = model_of(options.model)
    work = Work(base, Chat.load(Path(options.model)), options.second, options.text)
    del base
    {"zoo": zoo, "bits": bits}[options.part](
        options, work, rows, lambda: write(options.out, {**found, "rows": rows}))


if __name__ == "__main__":
    sys.exit(main())
