"""Whole runs of a chapter's train.py, small enough to be killed hundreds of times in a minute.

A run happens in a forked process: PyTorch is imported once, and a kill harms nobody else. Its
model has 20 thousand parameters, its documents a few words.
"""

import contextlib
import functools
import json
import shutil
import sys
from unittest import mock

import torch
from faults import Faults, forked
from helpers import ROOT, load

from common import prepare, weights
from common.files import checkpoint
from common.files.checkpoint import verify

TIMES = ("tokens_per_second", "step_seconds", "rollout_seconds", "peak_memory_bytes", "mfu")
CONFIG = dict(
    model_type="qwen3", vocab_size=512, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=64,
    rope_theta=1e4, rms_norm_eps=1e-6, initializer_range=0.1, tie_word_embeddings=True)
STEPS, EVERY = 6, 2
SCRIPTS = {f"03-{name}": f"chapter-03/post_training/train_{name}.py"
           for name in ("dpo", "grpo", "distill")}  # others than chapter-0N/train.py


def script_of(chapter):
    return SCRIPTS.get(chapter, f"chapter-{chapter}/train.py")


def write_inputs(folder, steps=STEPS, documents=24):
    """A model folder and a data file, in `folder`; gives the options of a run."""
    model, data = folder / "model", folder / "data.jsonl"
    model.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(ROOT / "common/tiny" / name, model / name)
    qwen3 = load("chapter-01/modeling_qwen3.py")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = qwen3.Qwen3ForCausalLM(qwen3.Qwen3Config.from_dict(CONFIG))
    weights.save_weights(made, CONFIG, model, torch.float32)
    (model / "config.json").write_text(json.dumps(CONFIG))
    with open(data, "w") as file:
        for i in range(documents):
            record = {"prompt": f"Repeat {i}.", "completion": "ab " * (1 + i % 5)}
            file.write(json.dumps(record) + "\n")
    return ["--model", str(model), "--init", "pretrained", "--data", str(data), "--device", "cpu",
            "--dtype", "float32", "--batch-tokens", "64", "--lr", "1e-2", "--warmup", "2",
            "--steps", str(steps), "--save-every", str(EVERY), "--eval-every", str(EVERY)]


def short_answers(module):
    """Within it the `generate` of a train.py gives three tokens: a model that has learned nothing
    never stops."""
    generate = module.generate
    return mock.patch.object(module, "generate", lambda model, prompts, longest, *others: generate(
        model, prompts, min(longest, 3), *others))


def train(arguments, chapter="01"):
    """`train.main(arguments)` in this process, on one thread, asking few and short questions."""
    script = script_of(chapter)
    module = load(script)
    torch.set_num_threads(1)
    with contextlib.ExitStack() as small:
        for name, value in (("SCORED", 3), ("SHOWN", 2), ("TINY_DOCUMENTS", 60)):
            small.enter_context(mock.patch.object(prepare, name, value))
        small.enter_context(mock.patch.object(sys, "argv", [script]))
        small.enter_context(short_answers(module))
        code = module.main(list(map(str, arguments)))
    if code:
        raise SystemExit(code)


def start(arguments, chapter="01", kill_after=None, fault=None, at=None):
    """`train` in a forked process: (exit code or -signal, what it printed).

    It gets SIGKILL `kill_after` seconds from now, or `fault` at its `at`-th change of the disk.
    """
    def action():
        with Faults(at, fault) if fault else contextlib.nullcontext():
            train(arguments, chapter)

    _import_all(chapter)
    return forked(action, kill_after)


def changes_of_the_disk(arguments, chapter="01"):
    """The names of all calls at which `start` can put a fault, of an undisturbed run."""
    def action():
        with Faults() as faults:
            train(arguments, chapter)
        print("\nCALLS " + json.dumps(faults.calls))

    _import_all(chapter)
    code, text = forked(action)
    assert code == 0, text
    return json.loads(text.rpartition("\nCALLS ")[2])


@functools.cache
def _import_all(chapter):
    """What PyTorch imports at the first step takes a second: better here than in each fork."""
    load(script_of(chapter))
    parameter = torch.nn.Parameter(torch.ones(1, 1))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    parameter.grad = torch.ones(1, 1)
    torch.nn.utils.clip_grad_norm_([parameter], 1.0)
    optimizer.step()
    optimizer.zero_grad()


def go_on(options, run, **keywords):
    """What a person types after a run was killed: --resume, or, if it had not begun, the same.

    Gives (exit code, what it printed, the step that it went on from).
    """
    if (run / "train_config.json").exists():
        code, text = start(["--resume", run], **keywords)
    else:
        code, text = start([*options, "--out", run], **keywords)
    after = text.partition("resuming ")[2].partition(" after step ")[2].partition("\n")[0]
    return code, text, int(after or 0)


def metrics(run):
    """The lines of metrics.jsonl, but for what differs by the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def files(folder):
    """{name: bytes} of a folder, without the manifest; final.bareloop-tmp and the like must not be there."""
    verify(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()
            if path.name != "manifest.json"}


def whole_steps(run):
    """The steps that `run` has a checkpoint of; each must be whole, as its name says so."""
    steps = [int(path.name[5:]) for path in run.glob("step-*") if not path.suffix]
    for step in steps:
        verify(checkpoint.step_folder(run, step))
    return sorted(steps)


def assert_equal(run, undisturbed, steps=STEPS):
    """Fails unless the finished `run` is the undisturbed one: weights, moments, random states,
    state, tokenizer, bit for bit, and the logged numbers. Nothing half-written may be left."""
    more = {path.name for path in run.iterdir()} ^ {path.name for path in undisturbed.iterdir()}
    assert not [name for name in more if name.endswith(("-tmp", "-old", ".new"))], more
    assert more <= {path.name for path in run.glob("step-*")}, more  # one not yet pruned
    whole_steps(run)
    for name in (f"step-{steps:06d}", "final"):
        got, expected = files(run / name), files(undisturbed / name)
        assert got.keys() == expected.keys(), name
        for file, content in expected.items():
            assert got[file] == content, f"{name}/{file} differs"
    assert metrics(run) == metrics(undisturbed)
