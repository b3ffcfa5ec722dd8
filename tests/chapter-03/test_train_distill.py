"""Whole runs of train_distill.py: small models with random weights, taught by one another."""

import json
import math
import os
import random
import re
import shutil
import signal
import sys
from types import SimpleNamespace

import pytest
import rollout_runs
import small_runs
import torch
from checks import assert_resume_is_bitwise, refused
from faults import forked
from helpers import ROOT, load, run_script
from rollout_runs import (
    DENSE, assert_close, assert_parts_are_the_whole, copied_model, lines, pretend_gpu,
    same_weights, state_of, value_of, weights_of, without, write)

from common.data.chat import Chat
from common.errors import run_main
from common.options import parse
from common.weights import load_weights, read_config, save_weights

sys.path.append(str(ROOT / "tests" / "long"))
import kill

CHAPTER = "03-distill"
train = load("chapter-03/post_training/train_distill.py")
sft = load("chapter-03/train.py")
quantized_model = load("chapter-03/quantized_model.py")
llama = load("chapter-03/modeling_llama.py")
METHODS = load("chapter-03/lora.py").METHODS
STOPS = [2, 0, *range(300, 512, 2)]  # none of which the documents of the runs end with
SMALLER = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "head_dim": 4}
TOKENS = 511  # of the tokenizer; the models have a row more
ON_POLICY = ("--on-policy", "0.5")


@pytest.fixture(autouse=True)
def short_answers():
    with small_runs.short_answers(train), small_runs.short_answers(sft):
        yield


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Of a run of 4 steps, half of whose loss is the teacher's part."""
    return rollout_runs.inputs(tmp_path_factory.mktemp("distill"), stops=STOPS)


@pytest.fixture(scope="module")
def teacher(options, tmp_path_factory):
    """Another model with the same tokenizer."""
    return copied_model(options, tmp_path_factory.mktemp("teacher") / "model", seed=1, **SMALLER)


def run(options, folder, *more, name="run"):
    return rollout_runs.run(train, options, folder, *more, name=name)


def dense(folder):
    return quantized_model.load_model(folder, "cpu", torch.float32, base="none")[0]


@pytest.fixture
def packs(monkeypatch):
    """The packs of each step of a run: those of --data, and those that the student wrote."""
    steps, real = [], train.packed
    monkeypatch.setattr(train, "packed", lambda *given: steps.append(real(*given)) or steps[-1])
    return SimpleNamespace(of=lambda step: steps[2 * step - 2:2 * step], clear=steps.clear)


@pytest.fixture
def lessons(monkeypatch):
    """(pack, what the teacher gave) of a run."""
    found, real = [], train.lesson
    monkeypatch.setattr(train, "lesson", lambda model, teacher, pack: found.append(
        (pack, real(model, teacher, pack))) or found[-1][1])
    return found


def divergence(student, teacher, packs, beta, temperature=1.0):
    """(sum, tokens) over packs, from whole (T, V) tables in float64."""
    total, tokens = 0.0, 0
    for pack in packs:
        at = pack["labelled"]
        inputs = [pack[name] for name in ("input_ids", "cu_seqlens", "max_seqlen", "position_ids")]
        with torch.no_grad():
            p, q = ((model(*inputs)[at].double() / temperature).softmax(-1)
                    for model in (teacher, student))
        m = beta * p + (1 - beta) * q
        kl = {0: lambda: p * (p / q).log(), 1: lambda: q * (q / p).log()}.get(
            beta, lambda: beta * p * (p / m).log() + (1 - beta) * q * (q / m).log())
        total, tokens = total + kl().sum().item(), tokens + len(at)
    return total, tokens


# --- what a run says and leaves ---

def test_a_run_logs_and_shows_the_divergence(options, teacher, tmp_path, capsys):
    folder = run(options, tmp_path, "--teacher", teacher, *ON_POLICY)
    text = capsys.readouterr().out
    for line in lines(folder):
        assert line.keys() == {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second",
                               "step_seconds", "peak_memory_bytes", "mfu", "divergence"}
        assert line["divergence"] > 0 and line["grad_norm"] > 0 and line["mfu"] is None
    assert [line["step"] for line in lines(folder)] == [1, 2, 3, 4]
    assert [line["step"] for line in lines(folder, "eval_loss")] == [2, 4]
    (titles,) = re.findall(r"^ +step .*$", text, re.MULTILINE)
    assert titles.split()[:3] == ["step", "loss", "divergence"]
    capsys.readouterr()
    load("chapter-03/generate.py").main([
        "--adapter", str(folder / "final"), "--prompt", "Repeat 3.", "--device", "cpu", "--dtype",
        "float32", "--max-new-tokens", "2"])
    assert "Repeat 3." in capsys.readouterr().out


@pytest.mark.parametrize("beta", [0, 0.3, 1])
@pytest.mark.parametrize("temperature", [1, 2])
def test_the_first_step_is_the_divergence_of_two_models(
        options, teacher, tmp_path, packs, beta, temperature):
    """Of a smaller teacher and the base, worked out from whole tables of logits."""
    folder = run(options, tmp_path, "--teacher", teacher, "--steps", 1, "--beta", beta, *DENSE,
                 "--kd-temperature", temperature, "--kd", 1, *ON_POLICY, "--eval-every", 0)
    given, written = packs.of(1)
    assert given and written
    total, tokens = divergence(dense(value_of(options, "--model")), dense(teacher),
                               given + written, beta, temperature)
    (line,) = lines(folder)
    assert line["divergence"] == pytest.approx(total / tokens, rel=1e-4)
    assert line["loss"] == pytest.approx(temperature**2 * total / tokens, rel=1e-4)
    assert line["tokens"] == sum(len(pack["input_ids"]) for pack in given + written)


def test_the_share_mixes_both_losses(options, teacher, tmp_path, packs):
    found = {kd: lines(run(options, tmp_path, "--teacher", teacher, "--steps", 1, "--kd", kd,
                           name=f"kd{kd}"))[0] for kd in (0, 0.25, 1)}
    mixed = 0.75 * found[0]["loss"] + 0.25 * found[1]["loss"]
    assert found[0.25]["loss"] == pytest.approx(mixed, rel=1e-6)
    assert found[0]["divergence"] is None
    assert found[0.25]["divergence"] == pytest.approx(found[1]["divergence"], rel=1e-6)
    assert found[1]["loss"] == pytest.approx(found[1]["divergence"], rel=1e-6)


def test_of_what_the_student_writes_only_the_teachers_part_counts(
        options, teacher, tmp_path, packs):
    folder = run(options, tmp_path, "--teacher", teacher, "--steps", 1, "--kd", 0, *ON_POLICY,
                 "--beta", 1, *DENSE)
    given, written = packs.of(1)
    base = dense(value_of(options, "--model"))
    base.loss = train.chunked_cross_entropy
    with torch.no_grad():
        labels = sum(base(**pack).item() for pack in given)
    total, tokens = divergence(base, dense(teacher), written, 1)
    (line,) = lines(folder)
    assert line["divergence"] == pytest.approx(total / tokens, rel=1e-5)
    targets = tokens + sum(len(pack["labelled"]) for pack in given)
    assert line["loss"] == pytest.approx((labels + total) / targets, rel=1e-5)


def test_without_a_teachers_part_it_is_chapter_3s_run(options, tmp_path):
    """Weights and moments to the last bit."""
    chapter = without(options, "--max-new-tokens")
    for more in ((), ("--method", "full", *DENSE, "--warmup", "2", "--schedule", "cosine")):
        name = f"{len(more)}"
        assert sft.main([*chapter, *more, "--out", str(tmp_path / f"sft{name}")]) == 0
        folder = run(options, tmp_path, "--kd", 0, "--on-policy", 0, *more, name=f"run{name}")
        assert same_weights(tmp_path / f"sft{name}", folder)
        for file in ("model", "optimizer", "rng"):
            file = f"step-000004/{file}.safetensors"
            assert (tmp_path / f"sft{name}" / file).read_bytes() == (folder / file).read_bytes()
        for kind in ("loss", "eval_loss"):
            for one, other in zip(lines(tmp_path / f"sft{name}", kind), lines(folder, kind),
                                  strict=True):
                assert [one[key] for key in (kind, "step")] == [other[key] for key in (
                    kind, "step")]


def test_of_the_tiny_data_the_prompts_are_old_skills(tmp_path, capsys, monkeypatch, packs):
    monkeypatch.setattr(train.prepare, "SCORED", 2)
    monkeypatch.setattr(train.prepare, "TINY_DOCUMENTS", 200)
    folder = run(["--model", "tiny", "--data", "tiny", "--device", "cpu", "--dtype", "float32",
                  "--steps", "2", "--batch-tokens", "256"], tmp_path)
    text = capsys.readouterr().out
    for name in ("new", "base"):
        assert f"{name} skills, before training" in text and f"{name} skills, after" in text
    first, second = lines(folder)
    assert first["divergence"] == pytest.approx(0, abs=1e-6)  # the teacher is the model itself
    chat = Chat.load(ROOT / "common/tiny")
    phrases = [phrase.partition("{}")[0] for _, _, some in train.skills.BASE.values()
               for phrase in some]
    (pack,) = packs.of(1)[1]
    for ids in pack["input_ids"].split(pack["cu_seqlens"].diff().tolist()):
        asked = chat.decode(ids).removeprefix("user\n")
        assert asked.startswith(tuple(filter(None, phrases))), asked


# --- what the student writes ---

def documents_of(packs):
    return [ids.tolist() for pack in packs
            for ids in pack["input_ids"].split(pack["cu_seqlens"].diff().tolist())]


def test_a_teacher_is_found_from_another_folder(options, teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(teacher.parent)
    folder = run(options, tmp_path, "--teacher", teacher.name, "--steps", 1, "--schedule",
                 "constant")
    monkeypatch.chdir(tmp_path)
    assert train.main(["--resume", str(folder), "--steps", "2"]) == 0


def test_a_share_of_less_than_half_a_document_is_one_now_and_then(
        options, teacher, tmp_path, packs):
    run(options, tmp_path, "--teacher", teacher, "--on-policy", 0.1, "--eval-every", 0,
        "--batch-tokens", 64, "--steps", 40)
    steps = [[len(documents_of(part)) for part in packs.of(step)] for step in range(1, 41)]
    given, written = map(sum, zip(*steps))
    assert max(map(sum, steps)) < 5 and 0.05 < written / (given + written) < 0.2


@pytest.mark.parametrize("share", [0, 0.25, 1])
def test_a_share_of_the_documents_gives_way(options, teacher, tmp_path, packs, share, monkeypatch):
    sizes, real = [], train.PackSampler.pack
    monkeypatch.setattr(train.PackSampler, "pack", lambda self, index: sizes.append(
        real(self, index)) or sizes[-1])
    run(options, tmp_path, "--teacher", teacher, "--on-policy", share, "--eval-every", 0)
    whole = [len(pack) for pack in sizes if len(pack) > 1]
    asked = []
    for step in (1, 2, 3, 4):
        given, written = packs.of(step)
        count = len(documents_of(given)) + len(documents_of(written))
        assert count in whole and count > 4
        assert len(documents_of(written)) == round(share * count)
        for pack in written:  # what is trained is behind the prompt, up to the document's end
            for start, end in zip(pack["cu_seqlens"].tolist(), pack["cu_seqlens"].tolist()[1:]):
                labels = pack["labels"][start:end] >= 0
                answer = int(labels.sum())
                assert 1 <= answer <= 6
                assert labels.tolist() == [n >= end - start - 1 - answer and n < end - start - 1
                                           for n in range(end - start)]
                asked.append(pack["input_ids"][start:end - answer].tolist())
    chat = Chat.load(value_of(options, "--model"))
    prompts = [chat.encode_prompt([{"role": "user", "content": f"Repeat {i}."}])
               for i in range(24)]
    assert all(prompt in prompts for prompt in asked)
    assert len({*map(tuple, asked[:23])}) == min(23, len(asked))  # one by one, none left out


def test_prompts_of_their_own(options, teacher, tmp_path, packs):
    file = write(tmp_path / "prompts.jsonl", *(
        {"prompt": f"Sort {i + 50}."} for i in range(3)), {"question": "Add 9.", "answer": "9"},
        {"messages": [{"role": "user", "content": "Copy 8."}]})
    run(options, tmp_path, "--teacher", teacher, *ON_POLICY, "--prompts", file)
    chat = Chat.load(value_of(options, "--model"))
    prompts = [chat.encode_prompt([{"role": "user", "content": text}]) for text in (
        "Sort 50.", "Sort 51.", "Sort 52.", "Add 9.", "Copy 8.")]
    asked = [ids for step in (1, 2, 3, 4) for ids in documents_of(packs.of(step)[1])]
    found = {n for ids in asked for n, prompt in enumerate(prompts) if ids[:len(prompt)] == prompt}
    assert found == {0, 1, 2, 3, 4} and len(asked) > 4
    assert all(any(ids[:len(prompt)] == prompt for prompt in prompts) for ids in asked)


def test_more_packs_are_one_larger_pack(options, teacher, tmp_path, packs):
    """Documents of the same length, so that a step's packs hold the same ones."""
    data, held_out = (write(tmp_path / f"{name}.jsonl", *(
        {"prompt": f"Say {i + 10}.", "completion": f"ab {i + 10}"} for i in range(24)))
        for name in "ab")
    options = [*options, "--data", str(data), "--eval-data", str(held_out), "--teacher",
               str(teacher), *ON_POLICY]
    run(options, tmp_path, "--steps", 1, "--on-policy", 0, "--eval-every", 0)
    length = len(documents_of(packs.of(1)[0])[0])
    found = []
    for count in (1, 3):
        packs.clear()
        found.append(run(options, tmp_path, "--batch-tokens", length * 12 // count, "--grad-accum",
                         count, name=f"packs{count}"))
        assert sum(map(len, packs.of(1))) == (2 if count == 1 else 4)
    assert_close(*found)


def test_checkpointing_activations_changes_nothing(options, teacher, tmp_path):
    found = [run(options, tmp_path, "--teacher", teacher, *ON_POLICY,
                 "--activation-checkpointing", how, name=how) for how in ("none", "full")]
    assert_close(*found)


# --- the teacher ---

@pytest.mark.parametrize("beta", [0, 0.5, 1])
def test_a_model_that_is_its_own_teacher_has_nothing_to_learn(options, tmp_path, beta):
    """Its adapter adds nothing yet: so both compute the same. Of β 0.5 log m is rounded, and Adam
    makes a step of any gradient, however small: so that is the first one's."""
    folder = run(options, tmp_path, "--kd", 1, "--beta", beta, *ON_POLICY)
    for line in lines(folder)[:1 if beta == 0.5 else 4]:
        for name in ("loss", "divergence", "grad_norm"):
            assert abs(line[name]) <= (3e-6 if beta == 0.5 else 0), name
    if beta != 0.5:
        assert all(tensor.count_nonzero() == 0 for name, tensor in weights_of(folder).items()
                   if "lora_B" in name)


@pytest.mark.parametrize("method, more", [
    *((method, DENSE) for method in METHODS), ("lora", ("--quantize", "nf4")),
    ("dora", ("--double-quant",))])
def test_the_teacher_stays_what_the_model_was(options, tmp_path, lessons, method, more):
    """Of every method, while the model moves away from it."""
    folder = run(options, tmp_path, "--method", method, *more, *ON_POLICY, "--kd", 0.5,
                 "--delta-start", 1, "--lr", "2e-2")
    found = [line["divergence"] for line in lines(folder)]
    assert found[0] == pytest.approx(0, abs=1e-5)
    if "none" in more:
        model = dense(value_of(options, "--model"))
        model.loss = lambda hidden, weight, *_: (hidden, weight)
        for pack, given in lessons:
            with torch.no_grad():
                hidden, weight = model(**pack)
            torch.testing.assert_close(given["teacher_hidden"], hidden, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(given["teacher_weight"], weight, rtol=1e-5, atol=1e-6)
    assert all(not tensor.requires_grad or tensor.grad is None
               for _, given in lessons for tensor in given.values())
    if method != "vera":  # whose learning rate is another one
        assert found[-1] > found[0] + 1e-6
    assert (folder / "final/config.json").exists() == (method in ("full", "delta-lora"))


def test_the_student_becomes_the_teacher(options, teacher, tmp_path):
    """The divergence falls, on what the student writes too."""
    for more in (("--kd", 1), ("--on-policy", 1, "--beta", 1)):
        folder = run(options, tmp_path, "--teacher", teacher, "--method", "full", *DENSE, *more,
                     "--lr", "1e-2", "--steps", 30, "--eval-every", 0, name=more[0])
        found = [line["divergence"] for line in lines(folder)]
        assert sum(found[-3:]) < 0.7 * sum(found[:3])


def with_rows(source, folder, rows):
    """A copy of a model whose embedding has so many rows: fewer, or more at its end, which would be
    the likeliest tokens of all."""
    shutil.copytree(source, folder)
    config = {**read_config(source), "vocab_size": rows}
    model = llama.LlamaForCausalLM(llama.LlamaConfig.from_dict(read_config(source)))
    load_weights(model, source)
    weight = model.model.embed_tokens.weight.detach()[:rows]
    more = 3 * torch.ones(rows - len(weight), weight.shape[1])
    model.model.embed_tokens.weight = torch.nn.Parameter(torch.cat((weight, more)))
    save_weights(model, config, folder, torch.float32)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("more", [("--kd", "1"), ON_POLICY, ("--method", "full", *DENSE)])
def test_the_teachers_padding_is_cut(options, teacher, tmp_path, more):
    plain, padded = (run(options, tmp_path, *more, "--teacher", with_rows(
        teacher, tmp_path / f"teacher{rows}", rows), name=f"run{rows}") for rows in (TOKENS, 540))
    assert_close(plain, padded)


def test_the_students_padding_is_cut(options, teacher, tmp_path):
    """And its rows get no gradient: they stay, to the bit, what they were."""
    more = ("--kd", 1, "--method", "full", *DENSE, "--weight-decay", 0, "--teacher", with_rows(
        teacher, tmp_path / "teacher", TOKENS))
    plain, padded = (run([*options, "--model", str(with_rows(
        value_of(options, "--model"), tmp_path / f"model{rows}", rows))], tmp_path, *more,
        name=f"run{rows}") for rows in (TOKENS, 540))
    for one, other in zip(lines(plain), lines(padded), strict=True):
        for name in ("loss", "divergence", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-4), name
    found = weights_of(padded)["model.embed_tokens.weight"]
    assert found[512:].equal(torch.full((28, 16), 3.0))
    expected = weights_of(plain)["model.embed_tokens.weight"]
    assert (found[:TOKENS] - expected).norm() <= 1e-4 * expected.norm()


# --- stopped and gone on with ---

@pytest.mark.parametrize("more", [
    (), ("--teacher", "TEACHER"), ("--teacher", "TEACHER", *ON_POLICY, "--schedule", "cosine"),
    ("--method", "full", *DENSE, *ON_POLICY, "--keep-best")])
def test_resume_is_bitwise(options, teacher, tmp_path, more):
    more = [str(teacher) if word == "TEACHER" else word for word in more]
    assert_resume_is_bitwise(train, [*options, *more], tmp_path)
    assert_parts_are_the_whole(tmp_path)
    assert (state_of(tmp_path / "parts", 4)["next_prompt"] > 0) == ("--on-policy" in more)


@pytest.mark.parametrize("more", [("--teacher", "TEACHER", *ON_POLICY),
                                  ("--method", "full", *DENSE, *ON_POLICY)])
def test_a_signal_saves_and_the_run_goes_on(options, teacher, tmp_path, more):
    """The frozen copy, made anew, is again the model of the beginning."""
    more = [*(str(teacher) if word == "TEACHER" else word for word in more), "--keep", "9"]
    whole = run(options, tmp_path, *more, name="whole")
    real, calls = train.learning_rate, []

    def learning_rate(*given):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*given)

    def action():
        train.learning_rate = learning_rate
        run_main(lambda: small_runs.train([*options, *more, "--out", tmp_path / "run"], CHAPTER))

    code, text = forked(action)
    assert code == 143 and "stopped by SIGTERM after step 3, which is saved" in text, text
    assert f"python chapter-03/post_training/train_distill.py --resume {tmp_path}/run" in text
    code, text = small_runs.start(["--resume", tmp_path / "run"], CHAPTER)
    assert code == 0 and "after step 3" in text, text
    small_runs.assert_equal(tmp_path / "run", whole, 4)


@pytest.mark.parametrize("moments, changes", [(0, 1), pytest.param(6, 12, marks=pytest.mark.slow)])
def test_what_was_killed_becomes_what_it_would_have_been(
        options, tmp_path, monkeypatch, moments, changes):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sweep = kill.Sweep(tmp_path / "sweep", CHAPTER, (
        *options[options.index("--model"):], *ON_POLICY, "--steps", "6"))
    afters = kill.random_moments(sweep, moments, seed=1)
    afters += kill.every_change(sweep, lambda calls: random.Random(2).sample(
        range(len(calls)), changes))
    assert afters.total() == moments + changes


def test_what_may_not_change_on_a_resume(options, teacher, tmp_path):
    folder = run(options, tmp_path, *ON_POLICY)
    for more in (("--kd", "0.1"), ("--teacher", str(teacher)), ("--on-policy", "0.1"),
                 ("--prompts", value_of(options, "--data"))):
        with refused("alters the result", more[0].strip("-").replace("-", "_")):
            train.main(["--resume", str(folder), *more])
    with refused("of chapter '03-distill', not of '03'"):
        sft.main(["--resume", str(folder)])


def test_a_step_that_is_not_finite_is_skipped(options, teacher, tmp_path, capsys, monkeypatch):
    real, calls = train.chunked_divergence, []

    def broken(*given, **more):
        calls.append(1)
        loss, sums = real(*given, **more)
        return loss * (math.nan if len(calls) == 2 else 1), sums
    monkeypatch.setattr(train, "chunked_divergence", broken)
    folder = run(options, tmp_path, "--teacher", teacher)
    assert capsys.readouterr().out.count("skipped (1 in a row, 1 in all)") == 1
    assert [line["loss"] is None for line in lines(folder)] == [False, True, False, False]
    assert all(torch.isfinite(tensor).all() for tensor in weights_of(folder).values())


# --- wrong use ---

@pytest.mark.parametrize("more, parts", [
    (("--dropout", "0.1"), ["--dropout must be 0"]),
    (("--compile",), ["--compile", "left out"]),
    (("--data", "virtual", *ON_POLICY), ["--data virtual", "no questions"]),
    (("--kd", "2"), ["--kd is a share: 1 at most"]),
    (("--beta", "1.5"), ["--beta is a share: 1 at most"]),
    (("--on-policy", "1.01"), ["--on-policy is a share: 1 at most"]),
    (("--kd", "-0.1"), ["--kd", "the least is 0"]),
    (("--kd-temperature", "0"), ["--kd-temperature"]),
    (("--teacher", "nowhere"), ["--teacher nowhere: no such folder"]),
    (("--teacher", "EMPTY"), ["EMPTY", "no config.json"]),
    (("--teacher", "OTHER"), ["OTHER: its tokenizer is another one", "'Q'",
                              "take a teacher of the same family"]),
    (("--teacher", "ADAPTER"), ["ADAPTER", "an adapter, not a model"]),
    (("--data", "TEXTS", *ON_POLICY), ["no prompt is left to answer"]),
    (("--prompts", "nowhere.jsonl", *ON_POLICY), ["--prompts nowhere.jsonl", "no such file"]),
    (("--prompts", "TEXTS", *ON_POLICY), ["TEXTS.jsonl:1", "a text has no question"]),
    (("--max-new-tokens", "64", *ON_POLICY), ["--max-new-tokens leaves no room for a prompt"]),
    (("--method", "full"), ["--method full needs --quantize none"]),
    (("--target-modules", "q_proj,lm_head"), ["lm_head cannot be adapted"])])
def test_wrong_use_is_one_line_and_leaves_nothing(options, tmp_path, monkeypatch, more, parts):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "TEXTS.jsonl", {"text": "once upon a time"}, {"text": "there was"})
    (tmp_path / "EMPTY").mkdir()
    if "OTHER" in more:
        other = copied_model(options, tmp_path / "OTHER")
        file = other / "tokenizer.json"
        content = json.loads(file.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        vocabulary["Q"], vocabulary["Z"] = vocabulary["Z"], vocabulary["Q"]
        file.write_text(json.dumps(content), encoding="utf-8")
    if "ADAPTER" in more:
        shutil.copytree(run(options, tmp_path, "--steps", 1, name="one") / "final",
                        tmp_path / "ADAPTER")
    more = [f"{word}.jsonl" if word == "TEXTS" else word for word in more]
    with refused(*parts):
        train.main([*options, *more, "--out", "run"])
    assert not (tmp_path / "run").exists()


def test_several_ranks_are_refused(options, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refused("on one process", "without torchrun"):
        train.main([*options, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("data", ["virtual", "TEXTS", "LONG"])
def test_where_the_student_writes_nothing_no_prompts_are_needed(options, teacher, tmp_path, data):
    file = write(tmp_path / "data.jsonl", *(
        {"text": f"once upon a time {i}"} if data == "TEXTS" else
        {"prompt": f"Say it for the {i}th time.", "completion": "a"} for i in range(8)))
    folder = run(options, tmp_path, "--teacher", teacher, "--on-policy", 0, "--max-new-tokens", 60,
                 "--data", data if data == "virtual" else file, "--kd", 0.5)
    assert all(line["divergence"] > 0 for line in lines(folder))


def test_a_teacher_with_fewer_positions(options, tmp_path):
    """It is refused, or computes what the same one with more positions would."""
    small, large = (copied_model(options, tmp_path / f"{n}", seed=1, max_position_embeddings=n)
                    for n in (16, 64))
    plain = run(options, tmp_path, "--teacher", large, "--kd", 1, name="plain")
    folder = run(options, tmp_path, "--teacher", small, "--kd", 1)
    assert same_weights(plain, folder)


def test_a_dry_run_stops_before_it_writes(options, teacher, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for more, rows in (((), ()), (("--teacher", str(teacher)), ("teacher",)),
                       (("--method", "full", *DENSE), ("reference model",)),
                       (ON_POLICY, ())):
        assert train.main([*options, *more, "--dry-run", "--out", "run"]) == 0
        text = capsys.readouterr().out
        assert "predicted peak" in text
        assert {*re.findall(r"^ +\S+ \S+  (teacher.*|reference model)$", text,
                            re.MULTILINE)} == {*rows, "teacher's logits"}
        assert ("reference   " in text) == ("--teacher" not in more)
        assert ("rollout     " in text) == ("--on-policy" in more)
    assert list(tmp_path.iterdir()) == []


def test_as_a_script_from_anywhere(options, tmp_path):
    script = "chapter-03/post_training/train_distill.py"
    done = run_script(script, *options, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0 and "predicted peak" in done.stdout, done.stderr
    done = run_script(script, *options, "--techer", "self", cwd=tmp_path)
    assert done.returncode == 2 and "did you mean --teacher?" in done.stderr
    assert done.stderr.count("\n") == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method, tiny, real", [
    ("lora", 5e-3, 2e-4), ("vera", 3e-2, 2e-2), ("lora+", 1e-3, 3e-5), ("full", 1e-3, 1e-5)])
def test_the_learning_rate_follows_the_method(method, tiny, real):
    for model, data, lr, wide in (("tiny", "tiny", tiny, None), ("x/y", "x.jsonl", None, real)):
        words = ["--model", model, "--data", data, "--method", method, "--quantize", "none"]
        found = parse(train.Options, CHAPTER, "", train.TINY, train.REAL, words)
        assert (found.lr, found.lr_at_4096) == (lr, wide)


def test_on_a_gpu_auto_is_tiny_and_data_alone_are_for_a_large_model(monkeypatch):
    pretend_gpu(monkeypatch)
    for typed, model, kd, on_policy in (((), "tiny", 0, 0.3),
                                        (("--data", "x.jsonl"), "Qwen/Qwen3-0.6B", 0.5, 0)):
        found = parse(train.Options, CHAPTER, "", train.TINY, train.REAL, typed)
        assert (found.model, found.kd, found.on_policy) == (model, kd, on_policy)


def test_on_a_gpu_packs_are_chosen(options, teacher, monkeypatch, capsys):
    pretend_gpu(monkeypatch)
    words = [*without(options, "--batch-tokens"), "--device", "cuda", "--dry-run"]
    for more in ((), ("--teacher", str(teacher), "--dtype", "bfloat16")):
        assert train.main([*words, *more]) == 0
        text = capsys.readouterr().out
        assert re.search(r"--batch-tokens \d+ --grad-accum \d+: predicted peak", text)


def test_on_a_gpu_packs_are_chosen_so_that_the_teacher_fits_too(
        options, tmp_path, monkeypatch, capsys):
    """It takes 25 MiB of 57, and packs of 16,384 tokens 38 MiB without it."""
    wide = copied_model(options, tmp_path / "wide", seed=1, hidden_size=512,
                        intermediate_size=2048, num_hidden_layers=2)
    words = [*without(options, "--batch-tokens"), "--device", "cuda", "--dry-run"]
    pretend_gpu(monkeypatch, 0.06)
    chosen = []
    for more in ((), ("--teacher", str(wide))):
        train.main([*words, *more])
        chosen += map(int, re.findall(r"--batch-tokens (\d+)", capsys.readouterr().out))
    assert chosen[1] < chosen[0] == 16384
