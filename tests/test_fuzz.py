"""A seeded part of `tests/long/fuzz.py`, what it has found, and that nothing is ever unpickled."""

import ast
import json
import os
import pickle
import random
import sys

import pytest
import torch
from faults import forked
from helpers import ROOT, load

sys.path.append(str(ROOT / "tests" / "long"))
import fuzz
import fuzz_readers
import small_runs

from common import hub, weights
from common.adapters import peft
from common.data.chat import Chat
from common.errors import UserError, run_main
from common.files import checkpoint
from common.files.checkpoint import verify
from common.files.config import write_config
from common.files.state import load_state
from common.metrics import Metrics
from common.options import TrainOptions, parse

PAYLOADS = []  # what `Payload` leaves behind, if it is ever unpickled


def remember(text):
    PAYLOADS.append(text)


class Payload:
    """Unpickled, it says so."""

    def __reduce__(self):
        return remember, ("unpickled",)


@pytest.mark.parametrize("trials", [25, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("target", fuzz_readers.TARGETS, ids=lambda target: target.name)
def test_hostile_input_gives_an_answer_or_one_line(target, trials):
    assert fuzz.fuzz(target, int(trials * target.share), seed=1) == []


def test_the_fuzzer_finds_what_it_should(monkeypatch):
    """A traceback, a text of two lines, a loop and too much memory are findings."""
    def broken(folder, names):
        number = (folder / "a.json").read_bytes()[0] % 5
        if number == 0:
            raise UserError("x" * 10)
        if number == 1:
            raise KeyError("x")
        if number == 2:
            while True:
                pass
        if number == 3:
            bytearray(2**34)  # more than earlier tests can have left on the heap
        if number == 4:
            os._exit(7)

    def prepare(folder):
        (folder / "a.json").write_text("[1]")
        return ["a.json"]

    monkeypatch.setattr(fuzz, "SECONDS", 0.6)  # of a machine that others use too
    monkeypatch.setattr(fuzz, "changed", lambda path, rng: bytes([rng.randrange(5)]))
    found = fuzz.fuzz(fuzz_readers.Target("broken", 1, prepare, broken), 12)
    kinds = {what.partition(":")[0] for _, what in found}
    assert {"KeyError", "TooSlow", "MemoryError", "the process ended with 7"} <= kinds, kinds
    assert len(found) < 12


def test_mutations_change_something():
    rng = random.Random(0)
    text = json.dumps({"a": [1, {"b": "c"}], "d": None}).encode()
    changed = {fuzz.change_json(text, rng) for _ in range(300)}
    assert len(changed) > 150 and len({fuzz.change_bytes(text, rng) for _ in range(300)}) > 250


# --- what it has found ---

def test_a_message_stays_one_printable_line_whatever_it_quotes():
    error = UserError("file: \x1b[2J\n" + "\ud800" + "é" * 5000)
    assert str(error).isprintable() and str(error).startswith("file: \\x1b[2J\\n\\ud800éé")
    assert len(str(error)) < 2050


def test_an_end_token_beyond_any_tokenizer(tmp_path):
    """More than the 32 bits of the tokenizers library: an OverflowError."""
    small_runs.write_inputs(tmp_path)
    (tmp_path / "model/generation_config.json").write_text('{"eos_token_id": [2, 18446744073709]}')
    with pytest.raises(UserError, match="eos_token_id must be an id"):
        Chat.load(tmp_path / "model")


@pytest.mark.parametrize("name", ["x" * 300, "~nobody-of-this-name", "a\0b"])
def test_a_name_that_no_file_can_have(name):
    """Too long for the file system, in the home of somebody unknown, with a zero in it."""
    for look in (hub.resolve, hub.resolve_data, lambda name: resume(name)):
        with pytest.raises(UserError, match="no such|no train_config.json"):
            look(name)
    assert hub.whole_name(name) == name


@pytest.mark.parametrize("text", [b'{"a": ' + b"1" * 5000 + b"}", b'{"a": "\xff"}', b"[" * 5000])
def test_json_beyond_the_limits_of_python(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(UserError, match="config.json: not valid JSON"):
        weights.read_config(tmp_path)


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="a file without an end is needed")
@pytest.mark.parametrize("name, read", [
    ("config.json", weights.read_config), ("tokenizer.json", Chat.load),
    ("metrics.jsonl", lambda folder: Metrics(folder, 1)),
    ("train_config.json", lambda folder: resume(folder)),
    ("manifest.json", verify)])
def test_a_link_to_a_file_without_end_is_not_read(tmp_path, name, read):
    (tmp_path / name).symlink_to("/dev/zero")
    try:
        assert read(tmp_path) == {}  # (for `verify`: a folder that is not ours)
    except UserError as error:
        assert "regular file" in str(error) or "no train_config.json" in str(error)


def resume(folder):
    train = load("chapter-01/train.py")
    return parse(TrainOptions, "01", "", train.TINY, train.REAL, ["--resume", str(folder)])


@pytest.mark.parametrize("key", ["grad_accum", "seed", "steps_", "clip", "data"])
def test_null_where_a_value_must_be(tmp_path, key, capsys):
    train = load("chapter-01/train.py")
    (tmp_path / "options.json").write_text(json.dumps({key: None}))
    with pytest.raises(UserError, match="may not be null|unknown option"):
        parse(TrainOptions, "01", "", train.TINY, train.REAL,
                      ["--config", str(tmp_path / "options.json")])


def test_names_that_the_terminal_cannot_show(tmp_path):
    """A file name, or a model's answer, that the encoding of the output lacks ends no run."""
    def action():
        sys.stdout.reconfigure(encoding="ascii")
        run_main(lambda: print("café \ud800"))

    assert forked(action) == (0, "caf\\xe9 \\ud800\n")


def test_no_memory_is_one_line_also_before_the_loop():
    code, text = forked(lambda: run_main(lambda: torch.empty(2**60, dtype=torch.uint8)))
    assert code == 2 and text.startswith("error: out of memory: ") and text.count("\n") == 1, text


def test_a_config_of_a_million_layers_or_of_odd_text(tmp_path):
    config = {**small_runs.CONFIG, "num_hidden_layers": 10**6}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="num_hidden_layers must be at most"):
        weights.read_config(tmp_path)
    config = {**small_runs.CONFIG, "\ud800": "é"}
    write_config(config, tmp_path, torch.float32)
    assert weights.read_config(tmp_path)["\ud800"] == "é"


# --- nothing is unpickled ---

FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve",
                     "marshal"}
FORBIDDEN_NAMES = {"torch.load", "torch.jit.load", "torch.hub.load", "torch.package", "np.load",
                   "torch.distributed.checkpoint", "numpy.load", "allow_pickle", "weights_only"}


def unpicklers(root):
    """["file:line: name", ...] of what can unpickle in the product under `root`: pickle and what
    uses it, torch.distributed's object collectives among it."""
    found = []
    for file in sorted([*root.glob("common/**/*.py"), *root.glob("chapter-0?/*.py")]):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            words = []
            if isinstance(node, ast.Import):
                words = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                words = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Attribute):
                words = [ast.unparse(node)]
            elif isinstance(node, ast.keyword):
                words = [node.arg or ""]
            found += [f"{file.relative_to(root)}:{node.lineno}: {word}" for word in words if (
                word.split(".")[0] in FORBIDDEN_MODULES or word in FORBIDDEN_NAMES
                or word.endswith(("_object", "_object_list")))]
    return found


def test_no_code_can_unpickle():
    assert unpicklers(ROOT) == []


def test_the_search_for_pickle_finds_it(tmp_path):
    (tmp_path / "common").mkdir()
    (tmp_path / "common/a.py").write_text(
        "import pickle\nfrom torch import load\nx = np.load(f, allow_pickle=True)\n"
        "torch.distributed.broadcast_object_list([x])\ny = state.load(f)\n")
    assert [line.partition(": ")[2] for line in unpicklers(tmp_path)] == [
        "pickle", "torch.load", "np.load", "allow_pickle",
        "torch.distributed.broadcast_object_list"]


@pytest.mark.parametrize("kind", ["model", "adapter", "checkpoint"])
def test_a_pickle_is_refused_and_never_opened(tmp_path, kind, capfd):
    """As pytorch_model.bin and adapter_model.bin, where PyTorch's own loaders would run it, and
    under the names of the files that are read."""
    PAYLOADS.clear()
    model, run = tmp_path / "model", tmp_path / "run"
    small_runs.write_inputs(tmp_path)
    (model / "model.safetensors").unlink()
    for folder, names in (
            (model, ("pytorch_model.bin", "model.bin", "model.pt", "adapter_model.bin")),
            (model, ("model.safetensors", "adapter_model.safetensors"))):
        for name in names:
            torch.save({"model.norm.weight": Payload()}, folder / name)
        if kind == "model":
            arguments = ["--model", str(model), "--prompt", "x", "--device", "cpu"]
            with pytest.raises(UserError, match="pickled weights|not a whole safetensors"):
                load("chapter-01/generate.py").main(arguments)
        elif kind == "adapter":
            (model / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
            with pytest.raises(UserError, match="pickled weights|not a whole safetensors"):
                peft.load_adapter(
                    fuzz_readers.model_of(fuzz_readers.CHAPTER_2.LlamaConfig,
                                          fuzz_readers.CHAPTER_2.LlamaForCausalLM), model,
                    fuzz_readers.CHAPTER_2.lora)
        else:
            step = checkpoint.step_folder(run, 1)
            step.mkdir(parents=True, exist_ok=True)
            for name in ("state.json", "manifest.json", "model.safetensors"):
                (step / name).write_bytes(pickle.dumps(Payload()))
            assert checkpoint.latest(run) is None
            with pytest.raises(UserError):
                network = torch.nn.Linear(1, 1)
                load_state(step, network, torch.optim.AdamW(network.parameters()))
    assert PAYLOADS == []
    pickle.loads(pickle.dumps(Payload()))
    assert PAYLOADS == ["unpickled"]  # it would have been seen
