"""What `fuzz.py` reads: for each reader a folder of real files, and a function that reads it."""

import gzip
import json
import os
import shutil
import zlib
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Callable
from unittest.mock import patch

import small_runs
import torch
from helpers import GOLDENS, ROOT, encode_text, load

from common import hub, metrics, weights
from common.adapters import peft
from common.data import encode, readers
from common.data.chat import Chat
from common.errors import UserError, located
from common.files import checkpoint, state
from common.files.checkpoint import commit, seal, verify
from common.files.config import write_config
from common.options import TrainOptions, parse, save_options

CHAPTER_1, CHAPTER_2 = load("chapter-01/train.py"), load("chapter-02/train.py")
NF4 = load("chapter-03/bnb_files.py")
PAIRS = load("chapter-03/post_training/pairs.py")
TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How do you do?"},
        {"role": "assistant", "content": "Well.\nAnd you?"}]


@dataclass(frozen=True)
class Target:
    """`prepare(folder)` fills it and gives the names of the files that may be damaged,
    `read(folder, names)` reads what these files are a part of."""

    name: str
    share: float  # of all inputs
    prepare: Callable
    read: Callable


def each(*actions):
    """Do all of them; the first UserError comes at the end, any other exception at once."""
    first = None
    for action in actions:
        try:
            action()
        except UserError as error:
            first = first or error
    if first:
        raise first


def folders(folder, names):
    """The folders that the named files lie in."""
    return sorted({(folder / name).parent for name in names})


def copy(source, folder, *names):
    for name in names:
        shutil.copyfile(source / name, folder / name)
    return list(names)


def model_of(family=CHAPTER_1.Qwen3Config, kind=CHAPTER_1.Qwen3ForCausalLM):
    torch.manual_seed(0)
    return kind(family.from_dict({**small_runs.CONFIG, "rope_scaling": None}))


# --- data sets ---

RECORDS = {
    "messages.jsonl": {"messages": TALK, "tools": [{"type": "function", "function": {
        "name": "look", "parameters": {"type": "object", "properties": {}}}}]},
    "parts.jsonl": {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]},
                                 {"role": "assistant", "content": None, "tool_calls": [
                                     {"function": {"name": "f", "arguments": {"x": 1}}}]}]},
    "sharegpt.jsonl": {"conversations": [{"from": "human", "value": "Hi"},
                                         {"from": "gpt", "value": "<think>\na\n</think>\nHo"}]},
    "alpaca.jsonl": {"instruction": "Add.", "input": "1 2", "output": "3", "system": "s"},
    "history.jsonl": {"instruction": "Add.", "output": "3", "history": [["a", "b"], ["c", "d"]]},
    "caller.jsonl": {"conversations": [
        {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "I look.", "weight": 0},
        {"from": "function_call", "value": '{"name": "look", "arguments": {"at": "x", "n": null}}'},
        {"from": "observation", "value": "21"}, {"from": "gpt", "value": "Ho", "train": True}],
        "tools": '[{"name": "look", "parameters": {"properties": {"at": {"type": "string"}}}}]'},
    "prompt.jsonl": {"prompt": "a", "completion": "b"}, "text.jsonl": {"text": "once upon a time"}}


def prepare_data(folder):
    small_runs.write_inputs(folder / "made")
    for name, record in RECORDS.items():
        (folder / name).write_text("".join(json.dumps(record) + "\n" for _ in range(3)))
        (folder / name.replace("jsonl", "json")).write_text(json.dumps([record] * 2, indent=1))
    (folder / "data.json").write_text(json.dumps({"data": [RECORDS["prompt.jsonl"]] * 2}))
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress(
        (folder / "messages.jsonl").read_bytes(), mtime=0))
    (folder / "table.csv").write_text('instruction,output,id\n"Say ""a"",\nb",c,1\nd,e,2\n')
    (folder / "book.txt").write_text("Once upon a time\r\nthere was é.\n" * 9)
    global _chat
    _chat = Chat.load(folder / "made/model")
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def read_data(folder, names):
    """The records, their tokens, and the columns that a person might name."""
    def records(name, columns=None):
        return readers.Records(hub.resolve_data(folder / name), columns)

    columns = {"prompt": "instruction", "completion": "output"}
    each(*(lambda name=name: encode.encode(records(name), _chat, 64, vocab_size=512)
           for name in names),
         *(lambda name=name: list(records(name, columns)) for name in names if "alp" in name))


def prepare_pairs(folder):
    global _chat
    ask, *answers = TALK[1], TALK[2], {"role": "assistant", "content": "Badly."}
    words = [one["content"] for one in (ask, *answers)]
    for name, more in {
            "text": dict(zip(("prompt", "chosen", "rejected"), words)),
            "list": {"chosen": [*TALK[:2], answers[0]], "rejected": [*TALK[:2], answers[1]]},
            "hh": {key: f"\n\nHuman: {words[0]}\n\nAssistant: {answer}"
                   for key, answer in zip(("chosen", "rejected"), words[1:])},
            "share": {"conversations": [{"from": "human", "value": words[0]}], "system": "Brief.",
                      "chosen": {"from": "gpt", "value": words[1]}, "rejected": answers[1]},
            "alpaca": {"instruction": words[0], "input": "", "output": words[1:]},
            "json": {"prompt": json.dumps([ask]), "chosen": json.dumps(answers[:1]),
                     "rejected": words[2]}}.items():
        (folder / f"{name}.jsonl").write_text((json.dumps(more) + "\n") * 3)
    small_runs.write_inputs(folder / "made")
    _chat = Chat.load(folder / "made/model")
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def read_pairs(folder, names):
    each(*(lambda name=name: PAIRS.Pairs.of(encode.encode(
        PAIRS.PairRecords(folder / name), _chat, 64, vocab_size=512), 100) for name in names))


# --- models ---

def prepare_config(folder):
    (folder / "config.json").write_text(json.dumps({
        **small_runs.CONFIG, "attention_bias": False, "hidden_act": "silu", "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32}, "sliding_window": None,
        "rope_parameters": {"rope_theta": 1e4, "rope_type": "llama3", "factor": 8.0,
                            "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                            "original_max_position_embeddings": 32}}, indent=1))
    with torch.device("meta"):  # what PyTorch imports for it, not on the clock
        CHAPTER_1.Qwen3ForCausalLM(CHAPTER_1.Qwen3Config.from_dict(
            {**small_runs.CONFIG, "rope_scaling": None}))
    (folder / "plain").mkdir()
    (folder / "plain/config.json").write_text(json.dumps(small_runs.CONFIG))
    return ["config.json", "plain/config.json"]


def read_configs(folder, names):
    def read(place, family, kind):
        values = weights.read_config(place)
        with located(place / "config.json"):
            config = family.from_dict(values)
        # Ten milliseconds for each layer: a deep model is not what this is about.
        rare = zlib.crc32(str(values).encode("utf-8", "replace")) % 8 == 0
        if rare and config.num_hidden_layers < 64:
            with torch.device("meta"):
                kind(config)
        (place / "out").mkdir(exist_ok=True)
        write_config(values, place / "out", torch.float32)
        weights.read_config(place / "out")

    each(*(lambda place=place, kinds=kinds: read(place, *kinds)
           for place in folders(folder, names) for kinds in (
               (CHAPTER_1.Qwen3Config, CHAPTER_1.Qwen3ForCausalLM),
               (CHAPTER_2.LlamaConfig, CHAPTER_2.LlamaForCausalLM))))


def prepare_weights(folder):
    model = model_of()
    weights.save_weights(model, small_runs.CONFIG, folder / "single")
    weights.save_weights(model, small_runs.CONFIG, folder / "shards", max_shard_bytes=20_000)
    copy(folder / "single", folder, "model.safetensors")
    for path in (folder / "shards").iterdir():
        shutil.copyfile(path, folder / path.name)
    shutil.rmtree(folder / "single")
    (folder / "one").mkdir()
    shutil.move(folder / "model.safetensors", folder / "one/model.safetensors")
    shutil.rmtree(folder / "shards")
    return [*sorted(path.name for path in folder.iterdir() if path.is_file()
                    and path.name != "config.json"), "one/model.safetensors"]


def read_weights(folder, names):
    each(*(lambda place=place: weights.load_weights(model_of(), place)
           for place in folders(folder, names)))


def prepare_quantised(folder):
    return copy(GOLDENS / "bnb/double", folder, *sorted(
        path.name for path in (GOLDENS / "bnb/double").iterdir()
        if path.suffix in (".json", ".safetensors")))


def read_quantised(folder, names):
    for _ in NF4.iter_bnb(folder):
        pass


def prepare_adapter(folder):
    lora = load("chapter-02/lora.py")
    names = []
    for method in ("lora", "dora", "vera"):
        model = model_of(CHAPTER_2.LlamaConfig, CHAPTER_2.LlamaForCausalLM)
        config = lora.AdapterConfig(method=method, rank=2, alpha=4.0)
        lora.apply_adapter(model, config)
        peft.save_adapter(model, config, folder / method, "tiny", CHAPTER_2.lora)
        names += [f"{method}/adapter_config.json", f"{method}/adapter_model.safetensors"]
    return names


def read_adapter(folder, names):
    def load_into_model(place):
        model = model_of(CHAPTER_2.LlamaConfig, CHAPTER_2.LlamaForCausalLM)
        peft.load_adapter(model, place, CHAPTER_2.lora)

    each(*(lambda place=place, read=read: read(place) for place in folders(folder, names)
           for read in (peft.base_model_name, peft.metadata, load_into_model)))


# --- tokenizer and template ---

def prepare_tokenizer(folder):
    names = copy(ROOT / "common/tiny", folder, "tokenizer.json", "tokenizer_config.json",
                 "generation_config.json")
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {
        "content": "<|im_end|>", "lstrip": False}, "additional_special_tokens": ["<|im_start|>"]}))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "chat_template.jinja").write_text(config["chat_template"])
    return [*names, "special_tokens_map.json", "chat_template.jinja"]


def read_tokenizer(folder, names=()):
    chat = Chat.load(folder)

    def talk(messages):
        ids, _ = chat.encode_messages(messages)
        chat.decode(ids)

    each(lambda: talk(TALK), lambda: talk(TALK[1:2]), lambda: chat.encode_prompt(TALK[:1]),
         lambda: chat.decode(encode_text(chat, "once")[0]))


def prepare_template(folder):
    prepare_tokenizer(folder)
    (folder / "qwen").mkdir(), (folder / "llama").mkdir()
    names = ["chat_template.jinja"]
    for name, source in (("qwen", "qwen3"), ("llama", "llama3")):
        copy(folder, folder / name, "tokenizer.json", "generation_config.json")
        source = GOLDENS / "chat" / source
        template = source / "chat_template.jinja"
        text = template.read_text() if template.exists() else json.loads(
            (source / "tokenizer_config.json").read_text())["chat_template"]
        (folder / name / "chat_template.jinja").write_text(text)
        names.append(f"{name}/chat_template.jinja")
    return names


def read_template(folder, names):
    each(*(lambda place=place: read_tokenizer(place) for place in folders(folder, names)))


# --- runs ---

def prepare_run(folder):
    """A run's own files, and a checkpoint whose manifest is put right again after the damage."""
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.tensor([1, 2]), torch.tensor([0, 2]).int(), 2, torch.tensor([0, 1])).sum().backward()
    optimizer.step()
    values = {"step": 2, "next_pack": 2, "tokens": 9, "best_loss": 1.5, "best_step": 2}
    for step in (2, 4):
        commit(checkpoint.step_folder(folder, step), lambda tmp: state.save_state(
            tmp, model, optimizer, values), {"step": step})
    options = parse(TrainOptions, "01", "", CHAPTER_1.TINY, CHAPTER_1.REAL,
                            ["--model", "tiny", "--data", "tiny", "--device", "cpu"])
    save_options(options, "01", folder, SimpleNamespace(digest=lambda: "0" * 64))
    report = metrics.Metrics(folder, 10)
    for step in range(1, 6):
        report.log_step(step, 1.0, 1e-3, 1.0, 10, 0.5)
    report.log_eval(2, eval_loss=1.0)
    report.close()
    (folder / "options.json").write_text(json.dumps(
        {"lr": 1e-3, "steps": 5, "data": ["tiny"], "model": "tiny", "too_long": "drop"}))
    return ["train_config.json", "metrics.jsonl", "options.json"]


def read_run(folder, names):
    def parsed(*arguments):
        return parse(TrainOptions, "01", "", CHAPTER_1.TINY, CHAPTER_1.REAL, arguments)

    by_name = {
        "train_config.json": lambda: parsed("--resume", str(folder)),
        "options.json": lambda: parsed("--device", "cpu", "--config", str(folder / "options.json")),
        "metrics.jsonl": lambda: metrics.Metrics(folder, 10, start_step=3).close()}
    each(*(by_name[name] for name in names))


def prepare_manifest(folder):
    prepare_run(folder)
    return [f"step-{step:06d}/{name}" for step in (2, 4) for name in (
        "manifest.json", "state.json", "model.safetensors")]


def read_manifest(folder, names):
    checkpoint.latest(folder)
    for place in folders(folder, names):
        checkpoint.read_manifest(place)
        checkpoint.is_ours(place)
    each(*(lambda place=place: verify(place) for place in folders(folder, names)))


def prepare_state(folder):
    prepare_run(folder)
    return [f"step-000004/{name}" for name in (
        "state.json", "model.safetensors", "optimizer.safetensors", "rng.safetensors")]


def read_state(folder, names):
    """As if somebody had made the checkpoint so: its manifest agrees."""
    step = folder / "step-000004"
    whole = (step / "manifest.json").read_bytes()
    model = model_of()
    try:
        seal(step)
        newest = checkpoint.latest(folder)
        if newest is not None:
            state.load_state(newest, model, torch.optim.AdamW(model.parameters()))
    finally:
        (step / "manifest.json").write_bytes(whole)


def cached(folder):
    def make(file):
        made = encode.virtual(3, 100, 20, 0)
        file.write(made.tokens.tobytes())
        return made

    with patch.dict(os.environ, {"XDG_CACHE_HOME": str(folder / "home")}):
        found = encode.cached(make, "fuzz")
    (kept,) = folder.glob("home/*/*/*/")
    return found, kept


def prepare_cache(folder):
    _, kept = cached(folder)
    return copy(kept, folder, *(path.name for path in kept.iterdir()))


def read_cache(folder, names):
    """What is kept, or, where it is damaged, what is made again."""
    _, kept = cached(folder)
    for name in names:
        (kept / name).unlink()
    copy(folder, kept, *(name for name in names if (folder / name).is_file()))
    found, _ = cached(folder)
    for i in range(len(found)):
        found[i]


TARGETS = [
    Target("data", 4, prepare_data, read_data),
    Target("pairs", 2, prepare_pairs, read_pairs),
    Target("config", 4, prepare_config, read_configs),
    Target("weights", 3, prepare_weights, read_weights),
    Target("quantised", 1, prepare_quantised, read_quantised),
    Target("adapter", 2, prepare_adapter, read_adapter),
    Target("tokenizer", 2, prepare_tokenizer, read_tokenizer),
    Target("template", 2, prepare_template, read_template),
    Target("run", 4, prepare_run, read_run),
    Target("manifest", 2, prepare_manifest, read_manifest),
    Target("state", 2, prepare_state, read_state),
    Target("cache", 1, prepare_cache, read_cache),
]
