"""Whole runs of train_grpo.py: on a model of 13 thousand parameters and questions of a few words.

Its answers are random; a reward of the number of their characters tells them apart."""

import json
import math
import os
import random
import re
import shutil
import signal
import sys

import pytest
import rollout_runs
import small_runs
import torch
from checks import assert_resume_is_bitwise, refused
from faults import forked
from helpers import ROOT, load, run_script
from rollout_runs import (
    DENSE, assert_close, assert_parts_are_the_whole, bytes_of, copied_model, lines, pretend_gpu,
    same_weights, samples, state_of, value_of, weights_of, without, write)

from common.asking.generation import generate
from common.data.chat import Chat
from common.errors import run_main
from common.options import parse

sys.path.append(str(ROOT / "tests" / "long"))
import kill

CHAPTER = "03-grpo"
train = load("chapter-03/post_training/train_grpo.py")
grpo = load("chapter-03/post_training/grpo.py")
rewards = load("chapter-03/post_training/rewards.py")
reference = load("chapter-03/post_training/reference.py")
quantized_model = load("chapter-03/quantized_model.py")
sft = load("chapter-03/train.py")
METHODS = load("chapter-03/lora.py").METHODS
PROMPTS, GROUP, LIMIT = 4, 4, 6
OWN = """
import json

def odd(record, answer):
    return len(answer) % 2

def thirds(record, answer):
    return len(answer) % 3 / 3 - 0.25

def same(record, answer):
    return 0.5

def known(record, answer):
    assert record["expected"] == record.get("wanted", ""), record
    return len(answer) % 2

def fails(record, answer):
    return record["nothing"]

def none(record, answer):
    pass

def infinite(record, answer):
    return float("inf")
"""
DOCUMENTED = {"reward", "reward_std", "degenerate", "all_right", "all_wrong", "answer_tokens",
              "truncated", "entropy", "kl", "clipped", "sampler_gap", "rollout_seconds",
              "grad_norm", "step", "loss", "lr", "tokens", "tokens_per_second", "step_seconds",
              "peak_memory_bytes", "mfu"}


@pytest.fixture(autouse=True)
def short_answers():
    with small_runs.short_answers(train), small_runs.short_answers(sft):
        yield


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Of a run of 4 steps, whose rewards are 0 or 1."""
    folder = tmp_path_factory.mktemp("grpo")
    options = rollout_runs.inputs(folder)
    (folder / "own.py").write_text(OWN)
    return [*options, "--reward", f"{folder}/own.py:odd", "--prompts", f"{PROMPTS}", "--group",
            f"{GROUP}"]


def own(options, name):
    """The options that take another reward of OWN."""
    return "--reward", value_of(options, "--reward").rpartition(":")[0] + f":{name}"


def run(options, folder, *more, name="run"):
    return rollout_runs.run(train, options, folder, *more, name=name)


class Watch:
    """What a run draws and trains: a list entry for each step."""

    def __init__(self, monkeypatch):
        self.steps, self.answers, self.packs, self.rewards = [], [], [], []
        draw, make = train.rollout, train.make_packs

        def rollout(model, prompts, group, limit, stop_ids, temperature=1.0, *rest, **more):
            found = draw(model, prompts, group, limit, stop_ids, temperature, *rest, **more)
            if temperature:  # 0: an evaluation
                self.steps.append(rest[0][1])
                self.answers.append((prompts, found))
            return found

        def make_packs(asked, answers, rewards, options):
            self.rewards.append(rewards)
            self.packs.append(make(asked, answers, rewards, options))
            return self.packs[-1]

        monkeypatch.setattr(train, "rollout", rollout)
        monkeypatch.setattr(train, "make_packs", make_packs)


@pytest.fixture
def watch(monkeypatch):
    return Watch(monkeypatch)


def dead_at(watch, monkeypatch, *steps):
    """At these steps all answers get the same reward."""
    real = train.judge
    monkeypatch.setattr(train, "judge", lambda *given: (
        1.0 if watch.steps and watch.steps[-1] in steps else real(*given)))


# --- what a run says and leaves ---

@pytest.mark.parametrize("reward", ["odd", "thirds"])
def test_a_run_logs_what_it_drew(options, tmp_path, watch, reward):
    """Every documented number, worked out anew from the answers and their rewards."""
    folder = run(options, tmp_path, *own(options, reward))
    chat = Chat.load(folder / "final")
    values = {}
    exec(OWN, values)
    drawn = samples(folder)
    assert [line["step"] for line in lines(folder)] == [1, 2, 3, 4] == watch.steps
    for line, (prompts, answers) in zip(lines(folder), watch.answers, strict=True):
        assert line.keys() == DOCUMENTED
        assert line["kl"] is None and line["mfu"] is None and line["clipped"] == 0
        groups = [one for one in drawn if one["step"] == line["step"]]
        assert [chat.decode(prompt, False) for prompt in prompts] == [
            one["prompt"] for one in groups]
        assert [chat.decode(one.ids, False) for one in answers] == sum(
            (one["answers"] for one in groups), [])
        found = torch.tensor([float(values[reward]({}, chat.decode(one.ids)) * one.finished)
                              for one in answers]).view(PROMPTS, GROUP)
        assert torch.tensor([one["rewards"] for one in groups]).allclose(found)
        alike = found.amax(1) == found.amin(1)
        lengths = [len(one.ids) for one in answers]
        for one in answers:  # the token that ends an answer is one of it, and is its last
            stops = [token in chat.stop_ids for token in one.ids]
            assert stops[:-1].count(True) == 0 and stops[-1] == one.finished
            assert one.finished or len(one.ids) == LIMIT
        expected = {
            "reward": found.mean(), "reward_std": found.std(1).mean(),
            "degenerate": alike.float().mean(),
            "all_wrong": (alike & (found[:, 0] < 1)).float().mean(),
            "answer_tokens": sum(lengths) / len(lengths),
            "truncated": sum(not one.finished for one in answers) / len(answers),
            "entropy": sum(sum(one.entropies) for one in answers) / sum(lengths),
            "tokens": sum(lengths) + GROUP * sum(map(len, prompts))}
        for name, value in expected.items():
            assert line[name] == pytest.approx(float(value), abs=1e-6), name
        assert line["all_right"] == pytest.approx(line["degenerate"] - line["all_wrong"], abs=1e-6)
        assert 0 <= line["sampler_gap"] <= 1e-5
        assert 0 < line["rollout_seconds"] < line["step_seconds"]
        assert 0 < line["entropy"] <= math.log(512)
    evaluations = lines(folder, "eval_reward")
    assert [line["step"] for line in evaluations] == [0, 2, 4]
    assert all(line.keys() == {"step", "eval_loss", "eval_reward"} and line["eval_loss"] is None
               for line in evaluations)
    assert state_of(folder, 4)["tokens"] == sum(line["tokens"] for line in lines(folder))


def test_alike_and_half_right_is_not_all_right(options, tmp_path):
    folder = run(options, tmp_path, *own(options, "same"), "--max-new-tokens", 20, "--steps", 1)
    (line,) = lines(folder)
    assert line["degenerate"] > 0 == line["all_right"]


def test_rewards_come_first_on_the_screen_with_a_question_and_its_answer(
        options, tmp_path, capsys):
    folder = run(options, tmp_path, "--log-every", 2)
    text = capsys.readouterr().out
    (titles,) = re.findall(r"^ +step .*$", text, re.MULTILINE)
    assert titles.split()[:2] == ["step", "reward"] and "loss" not in titles
    by_step = {line["step"]: line for line in lines(folder)}
    for step in (2, 4):
        shown = re.search(rf"^ +{step}/4 +([\d.]+).*\n +(Repeat .*) -> (.*)  \(([01])\)$", text,
                          re.MULTILINE)
        assert float(shown[1]) == pytest.approx(by_step[step]["reward"], abs=6e-4)
        (group,) = (one for one in samples(folder)
                    if one["step"] == step and shown[2] in one["prompt"])
        assert float(shown[4]) in group["rewards"]
    assert f"reward      {value_of(options, '--reward')}; 4 prompts x 4 answers of at" in text
    assert text.count("eval_reward") == 3
    assert "ask it:" in text and "generate.py --adapter" in text


FORMATS = {
    "prompt and completion": ([{"prompt": f"Say {i}.", "completion": f"{i}", "wanted": f"{i}"}
                               for i in range(9)], "known"),
    "messages": ([{"messages": [
        {"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": f"{i}"}],
        "wanted": f"{i}"} for i in range(9)], "known"),
    "GSM8K": ([{"question": f"Add {i}.", "answer": f"It is so.\n#### {i},000",
                "wanted": f"It is so.\n#### {i},000"} for i in range(9)], "gsm8k"),
    "a question alone": ([{"question": f"Add {i}.", "answer": f"{i}", "wanted": f"{i}"}
                          for i in range(9)], "known"),
    "a prompt alone": ([{"prompt": f"Say {i}."} for i in range(9)], "known"),
    "several turns": ([{"messages": [
        {"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Ho."},
        {"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": f"{i}"}],
        "wanted": f"{i}"} for i in range(9)], "known"),
    "messages up to the user's": ([{"messages": [{"role": "user", "content": f"Say {i}."}]}
                                   for i in range(9)], "known")}


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_ends_with_an_adapter_that_can_be_asked(options, tmp_path, capsys, form):
    rows, reward = FORMATS[form]
    data = write(tmp_path / "data.jsonl", *rows)
    reward = own(options, reward) if reward == "known" else ("--reward", reward)
    folder = run(options, tmp_path, "--data", data, *reward, "--steps", 2, "--batch-tokens", 600)
    words = {row.get("wanted", "") for row in rows}
    assert {one["expected"] for one in samples(folder)} <= words and words
    assert all(len(one["answers"]) == len(one["rewards"]) == GROUP for one in samples(folder))
    assert len(samples(folder)) == 2 * PROMPTS
    assert all(("Ho." in one["prompt"]) == (form == "several turns") for one in samples(folder))
    marked = ["#### " in one["prompt"] for one in samples(folder)]
    assert all(marked) if form == "GSM8K" else not any(marked)
    if form == "GSM8K":
        assert all(line.keys() == {"step", "eval_loss", "eval_reward", "eval_last_number",
                                   "eval_marked"} for line in lines(folder, "eval_reward"))
    capsys.readouterr()
    load("chapter-03/generate.py").main([
        "--adapter", str(folder / "final"), "--prompt", "Say 3.", "--device", "cpu", "--dtype",
        "float32", "--max-new-tokens", "2"])
    assert "Say 3." in capsys.readouterr().out


def test_samples_are_kept_up_to_a_size(options, tmp_path, monkeypatch):
    whole = run(options, tmp_path, name="whole")
    size = len((whole / "samples.jsonl").read_bytes())
    monkeypatch.setattr(train, "SAMPLES", size / 2)
    folder = run(options, tmp_path)
    kept = (folder / "samples.jsonl").read_bytes()
    longest = max(map(len, kept.splitlines()))
    assert size / 2 <= len(kept) <= size / 2 + longest + 1
    assert (whole / "samples.jsonl").read_bytes().startswith(kept)
    assert same_weights(whole, folder)


def test_of_the_tiny_data_the_skills_are_asked_too(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train.prepare, "SCORED", 2)
    monkeypatch.setattr(train, "ASKED", 3)
    folder = run(["--model", "tiny", "--data", "tiny", "--device", "cpu", "--dtype", "float32",
                  "--steps", "1", "--prompts", "3", "--group", "4"], tmp_path)
    text = capsys.readouterr().out
    for name in ("add", "base"):
        assert f"{name} skills, before training" in text and f"{name} skills, after" in text
    scores = lines(folder, "exact_match_add")
    assert [line["step"] for line in scores] == [0, 1] and "exact_match_base" in scores[0]
    assert all(re.search(r"\d", one["prompt"]) and one["expected"].isdigit()
               for one in samples(folder))
    assert lines(folder)[0]["reward"] > 0  # it can add already, sometimes


# --- what is trained ---

@pytest.mark.parametrize("more", [(), ("--updates", 2), ("--method", "full", *DENSE),
                                  ("--method", "delta-lora", *DENSE, "--delta-start", 1)])
def test_a_step_without_a_live_group_moves_nothing(options, tmp_path, watch, monkeypatch, more):
    dead_at(watch, monkeypatch, 3)
    folder = run(options, tmp_path, *more, "--save-every", 1, "--keep", 9)
    before, dead, live = lines(folder)[1:]
    assert (dead["loss"], dead["grad_norm"], dead["degenerate"], dead["all_right"]) == (0, 0, 1, 1)
    assert (dead["sampler_gap"], dead["clipped"]) == (0, 0) and dead["lr"] > 0
    assert dead["reward"] == 1 and dead["tokens"] > 0
    assert before["grad_norm"] > 0 and live["grad_norm"] > 0
    assert bytes_of(folder, 2) == bytes_of(folder, 3)
    assert all(a != b for a, b in zip(bytes_of(folder, 3), bytes_of(folder, 4)))
    assert [state_of(folder, step)["skipped"] for step in (1, 2, 3, 4)] == [0, 0, 1, 1]
    assert [len(packs) > 0 for packs in watch.packs] == [True, True, False, True]
    assert len([one for one in samples(folder) if one["step"] == 3]) == PROMPTS


def test_a_distance_to_the_reference_pulls_without_a_live_group_too(
        options, tmp_path, watch, monkeypatch):
    dead_at(watch, monkeypatch, 3)
    folder = run(options, tmp_path, "--kl", 0.1, "--save-every", 1, "--keep", 9)
    line = lines(folder)[2]
    assert line["degenerate"] == 1 and line["grad_norm"] > 0 and line["kl"] > 0
    assert bytes_of(folder, 2) != bytes_of(folder, 3) and state_of(folder, 3)["skipped"] == 0


def test_groups_of_equal_rewards_are_left_out_and_change_nothing(
        options, tmp_path, watch, monkeypatch):
    """With --kl, however small, they are in the packs, with a weight of 0."""
    folder = run(options, tmp_path, "--group", 2)
    rewards, packs = list(watch.rewards), list(watch.packs)
    for found, made, (prompts, answers) in zip(rewards, packs, watch.answers, strict=True):
        live = [n for n, group in enumerate(found.tolist()) if len({*group}) > 1]
        assert 0 < len(live) < PROMPTS
        documents = sorted(prompts[n] + answers[2 * n + i].ids for n in live for i in (0, 1))
        assert documents == sorted(
            ids.tolist() for pack, _ in made
            for ids in pack["input_ids"].split(pack["cu_seqlens"].diff().tolist()))
    whole = run(options, tmp_path, "--group", 2, "--kl", 1e-30, name="whole")
    assert sum(len(pack["cu_seqlens"]) - 1 for pack, _ in watch.packs[-1]) == 2 * PROMPTS
    assert_close(folder, whole, but=("kl", "sampler_gap"))


def test_more_packs_are_one_larger_pack(options, tmp_path, watch):
    one = run(options, tmp_path, "--batch-tokens", 2000, name="one")
    assert {len(packs) for packs in watch.packs} == {1}
    watch.packs.clear()
    more = run(options, tmp_path, "--batch-tokens", 50, name="more")
    assert min(len(packs) for packs in watch.packs) >= 3
    assert max(len(pack["input_ids"]) for packs in watch.packs for pack, _ in packs) <= 50
    assert_close(one, more, but=("sampler_gap",))
    assert samples(one) == samples(more)


def test_checkpointing_activations_changes_nothing(options, tmp_path):
    one = run(options, tmp_path, name="one")
    other = run(options, tmp_path, "--activation-checkpointing", "full", name="other")
    assert_close(one, other)


@pytest.mark.parametrize("method, more", [
    *((method, DENSE) for method in METHODS), ("lora", ("--quantize", "nf4")),
    ("dora", ("--double-quant",))])
def test_every_method(options, tmp_path, method, more):
    """What is drawn is what is trained, also after a step."""
    folder = run(options, tmp_path, "--method", method, *more, "--steps", 3, "--lr", "1e-2",
                 "--delta-start", 1, "--save-every", 1, "--keep", 9)
    assert all(0 <= line["sampler_gap"] <= 1e-5 and line["grad_norm"] > 0
               for line in lines(folder))
    assert (folder / "final/config.json").exists() == (method in ("full", "delta-lora"))
    files = [bytes_of(folder, step)[0] for step in (1, 2, 3)]
    assert len({*files}) == 3


def test_a_reward_is_learned(options, tmp_path):
    """Nearly every answer has an odd number of characters in the end."""
    folder = run(options, tmp_path, "--method", "full", *DENSE, "--lr", "2e-2", "--steps", 60,
                 "--eval-every", 0, "--save-every", 0, "--group", 8)
    found = [line["reward"] for line in lines(folder)]
    assert sum(found[:5]) / 5 < 0.7 and sum(found[-5:]) / 5 > 0.95


# --- the loss ---

def first_step(options, folder, *more, name):
    return lines(run(options, folder, "--steps", 1, "--eval-every", 0, *more, name=name))[0]


def test_every_divisor_and_baseline(options, tmp_path, watch):
    """The first step's gradient, against that of the defaults."""
    options = [*options, "--method", "full", *DENSE, "--group", "2", "--prompts", "9"]
    plain = first_step(options, tmp_path, name="plain")
    tokens = sum(len(one.ids) for one in watch.answers[0][1])
    constant = first_step(options, tmp_path, "--divisor", "constant", name="constant")
    others = first_step(options, tmp_path, "--baseline", "others", name="others")
    scaled = first_step(options, tmp_path, "--scale-rewards", name="scaled")
    # Rewards are 0 and 1, of which the standard deviation is √½.
    for line, factor in ((constant, tokens / (2 * 9 * LIMIT)), (others, 2),
                         (scaled, 1 / (math.sqrt(0.5) + 1e-4))):
        assert line["loss"] == pytest.approx(factor * plain["loss"], rel=1e-4)
        assert line["grad_norm"] == pytest.approx(factor * plain["grad_norm"], rel=1e-4)
    answers = first_step(options, tmp_path, "--divisor", "answers", name="answers")
    drawn, rewards = watch.answers[0][1], watch.rewards[0]
    A = (rewards - rewards.mean(1, keepdim=True)).flatten().tolist()
    assert rewards.mean() != 0.5  # which is a live group's mean
    lengths = [len(one.ids) for one in drawn]
    assert answers["loss"] == pytest.approx(-sum(A) / len(A), abs=1e-6)
    assert plain["loss"] == pytest.approx(
        -sum(a * n for a, n in zip(A, lengths)) / tokens, abs=1e-6)
    assert abs(answers["grad_norm"] / plain["grad_norm"] - 1) > 1e-3


@pytest.mark.parametrize("ratio, epsilon", [("token", 0.01), ("sequence", 0.001)])
def test_the_clip_matters_from_the_second_update_on(options, tmp_path, ratio, epsilon):
    more = ("--ratio", ratio, "--epsilon", epsilon, "--method", "full", *DENSE, "--lr", "1e-2")
    single = run(options, tmp_path, *more, name="single")
    assert all(line["clipped"] == 0 for line in lines(single))
    folder = run(options, tmp_path, *more, "--updates", 3, name="three")
    assert all(0 < line["clipped"] <= 1 for line in lines(folder))
    assert all(line["sampler_gap"] <= 1e-5 for line in lines(folder))  # of the first update
    free = run(options, tmp_path, *more, "--updates", 3, "--epsilon", 1, "--epsilon-high", 1e9,
               name="free")
    assert all(line["clipped"] == 0 for line in lines(free))
    assert not same_weights(folder, free) and not same_weights(single, folder)


def test_epsilon_high_is_epsilon_unless_it_is_given():
    for typed, high in (((), 0.2), (("--epsilon", "0.1"), 0.1), (("--epsilon-high", "0.28"), 0.28)):
        words = ["--model", "tiny", "--data", "tiny", *typed]
        assert parse(train.Options, CHAPTER, "", train.TINY, train.REAL, words).epsilon_high == high


@pytest.mark.parametrize("more", [(), ("--method", "full", *DENSE),
                                  ("--method", "delta-lora", *DENSE, "--delta-start", 0),
                                  ("--method", "pissa", *DENSE)])
def test_the_reference_stays_what_the_model_was(options, tmp_path, monkeypatch, more):
    seen, real = [], reference.reference_log_probs
    monkeypatch.setattr(train, "reference_log_probs", lambda *given: seen.append(
        (given[1], real(*given))) or seen[-1][1])
    folder = run(options, tmp_path, "--kl", 0.1, "--temperature", 0.7, "--lr", "1e-2",
                 *more, *DENSE)
    kls = [line["kl"] for line in lines(folder)]
    assert kls[0] == pytest.approx(0, abs=1e-6) and min(kls[1:]) > 1e-4
    model, _ = quantized_model.load_model(value_of(options, "--model"), "cpu", torch.float32,
                                          base="none")
    model.loss = lambda hidden, *rest: train.chunked_log_probs(hidden / 0.7, *rest)
    assert len(seen) >= 4
    for pack, found in seen:
        with torch.no_grad():
            torch.testing.assert_close(found, model(**pack), rtol=1e-5, atol=1e-5)


def test_kl_holds_the_model_back(options, tmp_path):
    kls = []
    for beta, estimator in (("1e-9", "k3"), ("10", "k3"), ("10", "k2")):
        folder = run(options, tmp_path, "--kl", beta, "--kl-estimator", estimator, "--lr", "1e-2",
                     "--steps", 10, "--method", "full", *DENSE, "--eval-every", 0, "--save-every",
                     0, name=beta + estimator)
        kls.append(sum(line["kl"] for line in lines(folder)[-4:]) / 4)
    free, *held = kls
    assert max(held) < 0.5 * free and held[0] != held[1]


# --- what is drawn is what is trained ---

@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_drawing_and_training_agree(options, tmp_path, capsys, temperature):
    folder = run(options, tmp_path, "--temperature", temperature)
    assert all(line["sampler_gap"] <= 1e-5 for line in lines(folder))
    assert "differs by" not in capsys.readouterr().out


def test_in_16_bits_the_difference_is_logged_and_small(options, tmp_path, capsys):
    folder = run(options, tmp_path, "--dtype", "bfloat16")
    gaps = [line["sampler_gap"] for line in lines(folder)]
    assert 0 < max(gaps) < 0.05 and "differs by" not in capsys.readouterr().out


def test_another_temperature_in_training_would_be_told(options, tmp_path, capsys, monkeypatch):
    real = train.chunked_log_probs
    monkeypatch.setattr(train, "chunked_log_probs", lambda hidden, *rest: real(
        0.7 * hidden, *rest))  # as if it had been left out
    folder = run(options, tmp_path, "--temperature", 0.7)
    assert min(line["sampler_gap"] for line in lines(folder)) > 0.05
    text = capsys.readouterr().out
    assert text.count("note: log p of a token differs by ") == 4


def test_the_temperature_is_that_of_what_is_drawn(options, tmp_path):
    entropies = [lines(run(options, tmp_path, "--temperature", t, name=f"t{t}"))[0]["entropy"]
                 for t in (0.2, 1.0)]
    assert entropies[0] < entropies[1] - 0.5


# --- evaluation ---

def test_held_out_prompts_are_answered_greedily_and_rewarded(options, tmp_path):
    """As generate.py answers them."""
    held_out = write(tmp_path / "held.jsonl", *(
        {"prompt": f"Repeat {i + 40}.", "completion": "a"} for i in range(12)))
    folder = run(options, tmp_path, "--eval-data", held_out, "--method", "full", *DENSE, "--lr",
                 "2e-2")
    chat = Chat.load(folder / "final")
    prompts = [chat.encode_prompt([{"role": "user", "content": f"Repeat {i + 40}."}])
               for i in range(12)]
    found = {line["step"]: line["eval_reward"] for line in lines(folder, "eval_reward")}
    seen = set()
    for step, source in ((0, value_of(options, "--model")), (4, folder / "final")):
        model, _ = quantized_model.load_model(source, "cpu", torch.float32, base="none")
        answers = generate(model, prompts, LIMIT, chat.stop_ids)
        # `generate` leaves the stop token out: so one of LIMIT tokens has not ended.
        with_stop = generate(model, prompts, LIMIT)
        right = []
        for answer, whole in zip(answers, with_stop):
            ended = len(answer) < LIMIT
            text = chat.decode(whole[:len(answer) + ended])
            right.append(ended * (len(text) % 2))
            seen.add(right[-1])
        assert found[step] == pytest.approx(sum(right) / 12), step
    assert seen == {0, 1}


def test_a_shaped_reward_is_evaluated_as_what_it_hides_too(options, tmp_path):
    folder = run(options, tmp_path, "--reward", "letters", "--steps", 1)
    for line in lines(folder, "eval_reward"):
        assert line.keys() == {"step", "eval_loss", "eval_reward", "eval_exact"}


def test_only_so_many_are_asked(options, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "ASKED", 3)
    asked, real = [], train.rollout
    monkeypatch.setattr(train, "rollout", lambda model, prompts, group, *rest, **more: asked.append(
        (group, len(prompts))) or real(model, prompts, group, *rest, **more))
    held_out = write(tmp_path / "held.jsonl", *(
        {"prompt": f"Repeat {i + 40}.", "completion": "a"} for i in range(12)))
    run(options, tmp_path, "--eval-data", held_out, "--steps", 1)
    assert asked == [(1, 3), (GROUP, PROMPTS), (1, 3)]


def test_the_best_is_the_one_with_the_highest_reward(options, tmp_path, monkeypatch):
    values = iter((0.9, 0.0, 0.5, 0.5, 0.25))
    monkeypatch.setattr(train, "evaluate", lambda *given: {"eval_reward": next(values)})
    folder = run(options, tmp_path, "--eval-every", 1, "--save-every", 1, "--keep", 1,
                 "--keep-best")
    state = state_of(folder, 4)
    assert (state["best_loss"], state["best_step"]) == (-0.5, 2)
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-000002", "step-000004"]


def test_without_evaluations_there_is_none_at_the_beginning(options, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "evaluate", None)
    run(options, tmp_path, "--eval-every", 0)


def test_fewer_prompts_than_a_step_takes(options, tmp_path):
    data = write(tmp_path / "a.jsonl", *(
        {"prompt": f"Say {i}.", "completion": f"{i}"} for i in range(4)))
    folder = run(options, tmp_path, "--data", data, "--prompts", 8)
    for step in (1, 2, 3, 4):
        assert len({one["prompt"] for one in samples(folder) if one["step"] == step}) == 3
    lengths = [len([one for one in samples(folder) if one["step"] == step])
               for step in (1, 2, 3, 4)]
    assert lengths == [3] * 4


def test_an_epoch_asks_every_prompt_once(options, tmp_path):
    folder = run(without(options, "--steps"), tmp_path, "--epochs", 1)
    assert len(lines(folder)) == math.ceil(23 / PROMPTS)
    asked = [one["prompt"] for one in samples(folder)]
    assert len(asked) == len({*asked}) == 23


# --- stopped and gone on with ---

@pytest.mark.parametrize("more", [
    (), ("--method", "full", *DENSE, "--keep-best"), ("--updates", "2", "--epsilon", "0.01"),
    ("--kl", "0.1"), ("--method", "full", *DENSE, "--kl", "0.1", "--temperature", "0.7",
                      "--schedule", "cosine")])
def test_resume_is_bitwise(options, tmp_path, more):
    assert_resume_is_bitwise(train, [*options, *more], tmp_path)
    assert_parts_are_the_whole(tmp_path, "samples.jsonl")
    assert len(samples(tmp_path / "parts")) == 4 * PROMPTS
    assert lines(tmp_path / "parts", "reward") == lines(tmp_path / "parts")


@pytest.mark.parametrize("more", [(), ("--method", "full", *DENSE, "--kl", "0.1")])
def test_a_signal_saves_and_the_run_goes_on(options, tmp_path, more):
    more = (*more, "--keep", "9")
    whole = run(options, tmp_path, *more, name="whole")
    real, calls = train.make_packs, []

    def make_packs(*given):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*given)

    def action():
        train.make_packs = make_packs
        run_main(lambda: small_runs.train([*options, *more, "--out", tmp_path / "run"], CHAPTER))

    code, text = forked(action)
    assert code == 143 and "stopped by SIGTERM after step 3, which is saved" in text, text
    assert f"python chapter-03/post_training/train_grpo.py --resume {tmp_path}/run" in text
    with open(tmp_path / "run/samples.jsonl", "a") as file:  # of a step that was not saved
        file.write(json.dumps({"step": 4, "prompt": "?", "answers": [], "rewards": []}) + "\n")
    code, text = small_runs.start(["--resume", tmp_path / "run"], CHAPTER)
    assert code == 0 and "after step 3" in text, text
    small_runs.assert_equal(tmp_path / "run", whole, 4)
    assert samples(tmp_path / "run") == samples(whole)


@pytest.mark.parametrize("moments, changes", [(0, 1), pytest.param(6, 12, marks=pytest.mark.slow)])
def test_what_was_killed_becomes_what_it_would_have_been(
        options, tmp_path, monkeypatch, moments, changes):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sweep = kill.Sweep(tmp_path / "sweep", CHAPTER, (
        *options[options.index("--model"):], "--steps", "6"))
    afters = kill.random_moments(sweep, moments, seed=1)
    afters += kill.every_change(sweep, lambda calls: random.Random(2).sample(
        range(len(calls)), changes))
    assert afters.total() == moments + changes
    assert samples(sweep.run) == samples(sweep.undisturbed)


def test_what_may_not_change_on_a_resume(options, tmp_path):
    data = tmp_path / "data.jsonl"
    shutil.copyfile(value_of(options, "--data"), data)
    options = [*options, "--data", str(data)]
    folder = run(options, tmp_path)
    for more in (("--group", "8"), ("--temperature", "0.5"), ("--kl", "0.1")):
        with refused("alters the result", more[0].strip("-")):
            train.main(["--resume", str(folder), *more])
    with refused("of chapter '03-grpo', not of '03'"):
        sft.main(["--resume", str(folder)])
    with data.open("a") as file:
        file.write(json.dumps({"prompt": "more", "completion": "b"}) + "\n")
    with refused("the documents are not those that it began with"):
        train.main(["--resume", str(folder)])


def test_a_step_that_is_not_finite_is_skipped(options, tmp_path, capsys, watch, monkeypatch):
    real = train.policy_loss

    def broken(*given):
        loss, *counts = real(*given)
        return loss * (math.nan if watch.steps[-1] == 2 else 1.0), *counts
    monkeypatch.setattr(train, "policy_loss", broken)
    folder = run(options, tmp_path, "--save-every", 1, "--keep", 9)
    assert capsys.readouterr().out.count("skipped (1 in a row, 1 in all)") == 1
    assert [line["loss"] is None for line in lines(folder)] == [False, True, False, False]
    assert bytes_of(folder, 1) == bytes_of(folder, 2)
    assert all(torch.isfinite(tensor).all() for tensor in weights_of(folder).values())


# --- wrong use ---

FILES = {
    "TEXTS": [{"text": "once upon a time"}, {"text": "there was"}],
    "PROMPTS": [{"prompt": "a"}, {"prompt": "b"}],
    "UNMARKED": [{"prompt": "a", "completion": "#### 1"}, {"prompt": "b", "completion": "5"}],
    "LONG": [{"prompt": "word " * 30, "completion": str(i)} for i in range(2)],
    "EMPTY": [],
    "KEYS": [{"prompt": 3}]}


def test_a_resume_finds_the_reward_from_elsewhere_and_epsilon_takes_the_other_along(
        options, tmp_path, monkeypatch):
    (tmp_path / "OWN.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    folder = run(options, tmp_path, "--reward", "OWN.py:odd", "--steps", 1)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert train.main(["--resume", str(folder), "--steps", "2"]) == 0
    assert train.main(["--resume", str(folder), "--steps", "3", "--epsilon", "0.1",
                       "--allow-changes"]) == 0
    saved = json.loads((folder / "train_config.json").read_text())["options"]
    assert (saved["epsilon"], saved["epsilon_high"]) == (0.1, 0.1)


@pytest.mark.parametrize("more, parts", [
    (("--dropout", "0.1"), ["--dropout must be 0"]),
    (("--compile",), ["--compile", "left out"]),
    (("--data", "virtual"), ["--data virtual", "no questions"]),
    (("--group", "1"), ["--group: 1: the least is 2"]),
    (("--prompts", "0"), ["--prompts: 0: the least is 1"]),
    (("--temperature", "0"), ["--temperature"]),
    (("--updates", "0"), ["--updates"]),
    (("--kl", "-1"), ["--kl"]),
    (("--divisor", "token"), ["--divisor", "did you mean tokens?"]),
    (("--baseline", "median"), ["--baseline", "'mean', 'others'"]),
    (("--reward", "exakt"), ["--reward exakt", "did you mean exact?"]),
    (("--reward", "missing.py:f"), ["/missing.py:f: neither exact", "of a file that is there"]),
    (("--reward", "OWN.py"), ["FILE.py:function"]),
    (("--reward", "OWN.py:nothing"), ["OWN.py:nothing", "AttributeError", "nothing"]),
    (("--reward", "BROKEN.py:f"), ["BROKEN.py:f", "SyntaxError"]),
    (("--data", "PROMPTS", "--reward", "exact"), ["PROMPTS.jsonl:2", "needs an expected answer"]),
    (("--data", "PROMPTS", "--reward", "letters"), ["it is ''"]),
    (("--data", "UNMARKED", "--reward", "gsm8k"), [
        "UNMARKED.jsonl:2", "####", "a number", "it is '5'"]),
    (("--data", "TEXTS"), ["TEXTS.jsonl:1", "a text has no question"]),
    (("--data", "EMPTY"), ["empty, no example"]),
    (("--data", "KEYS"), ["KEYS.jsonl:1"]),
    (("--rendered",), ["no question", "give a prompt, or messages"]),
    (("--no-thinking",), ["--no-thinking", "cannot switch it off"]),
    (("--max-new-tokens", "60"), ["no prompt is left to answer"]),
    (("--max-new-tokens", "5000"), ["--max-new-tokens leaves no room for a prompt"]),
    (("--data", "LONG", "--too-long", "error"), ["LONG.jsonl:1"]),
    (("--too-long", "truncate"), ["--too-long"]),
    (("--method", "full"), ["--method full needs --quantize none"]),
    (("--target-modules", "q_proj,lm_head"), ["lm_head cannot be adapted"])])
def test_wrong_use_is_one_line_and_leaves_nothing(options, tmp_path, monkeypatch, more, parts):
    monkeypatch.chdir(tmp_path)
    for name, rows in FILES.items():
        write(tmp_path / f"{name}.jsonl", *rows)
    (tmp_path / "OWN.py").write_text(OWN)
    (tmp_path / "BROKEN.py").write_text("def f(:\n")
    more = [f"{tmp_path}/{word}.jsonl" if word in FILES else word for word in more]
    with refused(*parts):
        train.main([*options, *more, "--out", "run"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name, parts", [
    ("fails", ["data.jsonl:", "the reward function failed: KeyError", "nothing"]),
    ("none", ["data.jsonl:", "the reward function failed: TypeError", "NoneType"]),
    ("infinite", ["data.jsonl:", "must be a finite number, not inf"])])
def test_a_reward_that_fails_names_the_record(options, tmp_path, name, parts):
    """It is asked of answers that have ended, not before there are any."""
    with refused(*parts):
        run(options, tmp_path, *own(options, name))


@pytest.mark.parametrize("name", ["fails", "none"])
def test_a_reward_that_fails_at_once_leaves_no_folder(options, tmp_path, name):
    with refused("the reward function failed"):
        run(options, tmp_path, *own(options, name))
    assert not (tmp_path / "run").exists()


OWN_FILES = {
    "a dataclass": """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Weight:
    of: int

def reward(record, answer):
    return len(answer) % 2
""",
    "a helper beside it": """
from helper_of_mine import odd as reward
""",
    "a record that it changes": """
def reward(record, answer):
    assert record["messages"].pop()["content"] == record["expected"]
    return len(answer) % 2
"""}


@pytest.mark.parametrize("kind", OWN_FILES)
def test_files_of_ones_own(options, tmp_path, kind):
    data = write(tmp_path / "data.jsonl", *FORMATS["messages"][0])
    (tmp_path / "mine.py").write_text(OWN_FILES[kind])
    (tmp_path / "helper_of_mine.py").write_text("def odd(record, answer):\n    return 1\n")
    folder = run(options, tmp_path, "--data", data, "--reward", f"{tmp_path}/mine.py:reward",
                 "--batch-tokens", 600)
    assert len(lines(folder)) == 4


@pytest.mark.parametrize("thinks", [True, False])
def test_thinking_is_switched_off_where_the_template_can(options, tmp_path, thinks):
    model = copied_model(options, tmp_path / "model")
    file = model / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config["chat_template"] += (
        "{%- if add_generation_prompt and enable_thinking is defined and not enable_thinking -%}"
        "{{- 'NO' -}}{%- endif -%}")
    file.write_text(json.dumps(config))
    folder = run([*options, "--model", str(model)], tmp_path, *["--no-thinking"] * (not thinks))
    assert all(one["prompt"].endswith("assistant\n" + "NO" * (not thinks))
               for one in samples(folder))
    assert samples(folder)


def test_several_ranks_are_refused(options, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refused("on one process", "without torchrun"):
        train.main([*options, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_prompts_that_are_too_long_are_left_out_and_counted(options, tmp_path, capsys):
    data = write(tmp_path / "a.jsonl", *(
        {"prompt": "word " * (7 if i % 2 else 1) + str(i), "completion": f"{i}"}
        for i in range(8)))
    folder = run(options, tmp_path, "--data", data, "--max-new-tokens", 30, "--eval-data",
                 value_of(options, "--data"))
    text = capsys.readouterr().out
    assert re.search(r"left out: \d without a prompt, or with one of more than 34 tokens", text)
    assert samples(folder) and not any("word word" in one["prompt"] for one in samples(folder))


def test_a_dry_run_stops_before_it_writes(options, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for more, copied in (((), False), (("--kl", "0.1"), False),
                         (("--kl", "0.1", "--method", "full", *DENSE), True)):
        assert train.main([*options, *more, "--dry-run", "--out", "run"]) == 0
        text = capsys.readouterr().out
        assert ("reference   " in text) == bool(more) and ("reference model" in text) == copied
        assert "predicted peak" in text and f"{PROMPTS} prompts x {GROUP} answers" in text
        assert re.search(r"rollout     \d+ of 16 answers at a time: ", text)
    assert list(tmp_path.iterdir()) == []


def test_as_a_script_from_anywhere(options, tmp_path):
    script = "chapter-03/post_training/train_grpo.py"
    done = run_script(script, *options, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0 and "predicted peak" in done.stdout, done.stderr
    done = run_script(script, *options, "--groop", "4", cwd=tmp_path)
    assert done.returncode == 2 and "did you mean --group?" in done.stderr
    assert done.stderr.count("\n") == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method, tiny, real", [
    ("lora", 4e-3, 1e-5), ("vera", 2e-2, 2e-4), ("lora+", 1e-3, 1e-5), ("full", 2e-4, 1e-6)])
def test_the_learning_rate_follows_the_method(method, tiny, real):
    for model, data, lr, wide in (("tiny", "tiny", tiny, None), ("x/y", "x.jsonl", None, real)):
        words = ["--model", model, "--data", data, "--method", method, "--quantize", "none"]
        found = parse(train.Options, CHAPTER, "", train.TINY, train.REAL, words)
        assert (found.lr, found.lr_at_4096) == (lr, wide)


def test_on_a_gpu_auto_is_tiny_and_questions_alone_are_for_a_large_model(monkeypatch):
    pretend_gpu(monkeypatch)
    for typed, model, data in (((), "tiny", ["tiny"]),
                               (("--data", "x.jsonl"), "Qwen/Qwen3-0.6B", ["x.jsonl"])):
        found = parse(train.Options, CHAPTER, "", train.TINY, train.REAL, typed)
        assert (found.model, found.data) == (model, data)
        assert found.batch_tokens == (2048 if model == "tiny" else None)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_on_a_gpu_packs_are_chosen_and_the_rollouts_fill_what_is_left(
        options, tmp_path, monkeypatch, capsys, dtype):
    """A card of 0.1 GB has no room for all answers of 64 tokens at a time."""
    options = [*without(options, "--batch-tokens"), "--device", "cuda", "--dtype", dtype,
               "--prompts", "20", "--group", "5000", "--max-new-tokens", "40", "--dry-run"]
    rows = {}
    for size in (80, 0.1):
        pretend_gpu(monkeypatch, size)
        assert train.main([*options, "--out", str(tmp_path / "run")]) == 0
        text = capsys.readouterr().out
        assert "--batch-tokens " in text and "of the GPU's" in text and "predicted peak" in text
        rows[size] = int(re.search(r"rollout     (\d+) of 100000 answers at a time", text)[1])
    assert rows[80] == 100_000 > rows[0.1] > 1000
    assert not (tmp_path / "run").exists()
