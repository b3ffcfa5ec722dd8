"""Whole runs of train_dpo.py: on a model of 20 thousand parameters and pairs of a few words."""

import json
import math
import os
import random
import shutil
import signal
import sys
from types import SimpleNamespace

import pytest
import small_runs
import torch
from checks import assert_resume_is_bitwise, refused
from faults import Forked, forked
from helpers import ROOT, load, ranks_of, run_script
from safetensors.torch import load_file

from common.errors import run_main
from common.options import parse
from common.weights import read_config, save_weights

sys.path.append(str(ROOT / "tests" / "long"))
import kill

CHAPTER = "03-dpo"
train = load("chapter-03/post_training/train_dpo.py")
sft = load("chapter-03/train.py")
pairs = load("chapter-03/post_training/pairs.py")
preference = load("chapter-03/post_training/preference.py")
reference = load("chapter-03/post_training/reference.py")
quantized_model = load("chapter-03/quantized_model.py")
llama = load("chapter-03/modeling_llama.py")
DENSE = ("--quantize", "none")
FIRST = {  # the loss while policy and reference are the same, at --beta 0.1
    "hinge": 1.0, "ipo": 25.0, "apo-zero": 1.0, **dict.fromkeys(
        ("dpo", "cdpo", "robust", "dpo-norm"), math.log(2))}


@pytest.fixture(autouse=True)
def short_answers():
    with small_runs.short_answers(train), small_runs.short_answers(sft):
        yield


def write_pairs(path, count=24, words=("yes", "no"), equal=False):
    """Pairs of unequal lengths, or, tell their numbers apart, of the same."""
    rows = [{"prompt": f"Is it {i + 10}?", "chosen": f"{words[0]} {i + 10}" * (equal or 1 + i % 3),
             "rejected": f"{words[1]} {i + 10}" * (equal or 1 + i % 2)} for i in range(count)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Of a run of 4 steps, on a model with weights."""
    folder = tmp_path_factory.mktemp("dpo")
    options = small_runs.write_inputs(folder)
    write_pairs(folder / "data.jsonl")
    return [*options, "--warmup", "0", "--batch-tokens", "300", "--steps",
            "4", "--rank", "2", "--log-every", "1"]


def run(options, folder, *more, name="run"):
    """A run in this process; gives its folder."""
    assert train.main([*options, *map(str, more), "--out", str(folder / name)]) == 0
    return folder / name


def lines(folder, kind="grad_norm"):
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if kind in line]


def weights_of(folder):
    (file,) = (folder / "final").glob("*model.safetensors")
    return load_file(file)


def assert_close(one, other, steps=4):
    """Two finished runs have done the same work, but for rounding."""
    assert len(lines(one)) == len(lines(other)) == steps
    for kind in ("grad_norm", "eval_loss"):
        for a, b in zip(lines(one, kind), lines(other, kind), strict=True):
            assert a["step"] == b["step"] and a.get("pairs") == b.get("pairs")
            assert a.keys() == b.keys()
            for name in a.keys() - {"step", *small_runs.TIMES}:
                if a[name] is None:
                    assert b[name] is None
                    continue
                assert a[name] == pytest.approx(b[name], rel=2e-5, abs=1e-6), (a["step"], name)
    first, second = weights_of(one), weights_of(other)
    assert first.keys() == second.keys()
    for name in first:
        gap = (first[name].float() - second[name].float()).norm()
        assert gap <= 1e-4 * first[name].float().norm() + 1e-7, name


# --- what a run says and leaves ---

def test_a_run_logs_all_scores_and_shows_what_matters(options, tmp_path, capsys):
    folder = run(options, tmp_path)
    text = capsys.readouterr().out
    for line in lines(folder):
        assert {*preference.SCORES, "pairs", "lr", "grad_norm", "tokens"} <= line.keys()
        assert all(math.isfinite(line[name]) for name in (*preference.SCORES, "pairs"))
        assert line["margin"] == pytest.approx(
            line["reward_chosen"] - line["reward_rejected"], abs=1e-5)
        assert 0 <= line["pair_accuracy"] <= 1 and line["pairs"] >= 1
        assert line["logp_chosen"] < 0 and line["tokens_chosen"] > 1
    first, *_, last = lines(folder)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert (first["margin"], first["pair_accuracy"]) == (0, 0.5)
    assert last["loss"] < first["loss"] and last["margin"] > 0
    assert [line["step"] for line in lines(folder, "eval_loss")] == [0, 2, 4]
    for line in lines(folder, "eval_loss"):
        assert {"margin", "pair_accuracy", "logp_chosen"} <= line.keys()
    for title in (" margin ", " won ", " log p chosen "):
        assert title in text
    assert "pairs: 24 pairs" in text and "held out: 1 of these pairs" in text
    assert "reference   the model itself, its adapters switched off" in text


def test_its_adapter_is_asked_and_merged(options, tmp_path, capsys):
    folder = run(options, tmp_path)
    model = options[options.index("--model") + 1]
    ask = ["--prompt", "Is it 10?", "--device", "cpu", "--dtype", "float32",
           "--max-new-tokens", "2"]
    load("chapter-03/generate.py").main(["--adapter", str(folder / "final"), *ask])
    load("chapter-03/merge.py").main(["--adapter", str(folder / "final"), "--out",
                                      str(tmp_path / "merged")])
    assert read_config(tmp_path / "merged")["hidden_size"] == read_config(model)["hidden_size"]
    again = run([str(tmp_path / "merged") if word == model else word for word in options],
                tmp_path, name="again")  # from where the first run has come to
    assert lines(again)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    capsys.readouterr()
    for other in (train, sft):
        with refused("an adapter, not a model", "merge it first (merge.py)"):
            other.main(["--data", options[options.index("--data") + 1], "--device", "cpu",
                        "--model", str(folder / "final")])


QUICK = "full", "lora", "pissa", "delta-lora"
METHODS = [*(pytest.param(method, DENSE, marks=[] if method in QUICK else pytest.mark.slow)
             for method in load("chapter-03/lora.py").METHODS),
           ("lora", ("--quantize", "nf4")),
           pytest.param("dora", ("--double-quant",), marks=pytest.mark.slow)]


@pytest.mark.parametrize("method, more", METHODS)
def test_every_method_begins_where_its_reference_is(options, tmp_path, method, more):
    """The loss is ln 2 at first, held out too, and less when the pairs are known."""
    lr = {"vera": "1e-1", "full": "2e-3", "delta-lora": "5e-3"}.get(method, "2e-2")
    folder = run(options, tmp_path, "--method", method, *more, "--lr", lr, "--steps", 8,
                 "--schedule", "constant", "--eval-every", 8, "--delta-start", 2, "--clip", 0)
    first, *_, last = lines(folder)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert lines(folder, "eval_loss")[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert last["loss"] < first["loss"] - 0.01 and last["margin"] > 0
    margins = [line["margin"] for line in lines(folder, "eval_loss")]
    assert margins[0] == 0 != margins[1]  # the policy's against what it was, there too
    assert (folder / "final/config.json").exists() == (method in ("full", "delta-lora"))


@pytest.mark.parametrize("method", ["full", "pissa", "lora", "delta-lora"])
def test_the_reference_stays_what_the_model_was(options, tmp_path, method, monkeypatch):
    seen, real = [], reference.reference_log_probs
    monkeypatch.setattr(reference, "reference_log_probs", lambda model, pack, copy: seen.append(
        (pack, real(model, pack, copy))) or seen[-1][1])
    run(options, tmp_path, "--method", method, *DENSE, "--lr", "2e-2", "--delta-start", 1,
        "--eval-every", 0)
    model, _ = quantized_model.load_model(
        options[options.index("--model") + 1], "cpu", torch.float32, base="none")
    model.loss = train.chunked_log_probs
    assert len(seen) >= 4
    for pack, found in seen:
        assert not found.requires_grad
        with torch.no_grad():
            torch.testing.assert_close(found, model(**pack), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss", preference.LOSSES)
def test_every_loss(options, tmp_path, loss):
    folder = run(options, tmp_path, "--loss", loss, "--beta", 0.1, "--steps", 3)
    first, *_, last = lines(folder)
    if loss in FIRST:
        assert first["loss"] == pytest.approx(FIRST[loss], rel=1e-6)
    assert all(math.isfinite(line[name]) for line in lines(folder) for name in preference.SCORES)
    assert last["loss"] < first["loss"] and last["margin"] > first["margin"]
    with_nll = run(options, tmp_path, "--loss", loss, "--beta", 0.1, "--steps", 1, "--nll", 2,
                   name="nll")
    more = lines(with_nll)[0]["loss"] - first["loss"]
    assert 2 * 3 < more < 2 * 10  # about ln 512 a token


def test_a_dry_run_stops_before_it_writes(options, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    what = {(): "its adapters switched off", ("--method", "full", *DENSE): "a frozen copy",
            ("--loss", "simpo"): None}
    for more, words in what.items():
        assert train.main([*options, *more, "--dry-run", "--out", "run"]) == 0
        text = capsys.readouterr().out
        assert ("reference   " in text) == (words is not None) and (words or "") in text
        assert "predicted peak" in text and ("reference model" in text) == ("--method" in more)
    assert list(tmp_path.iterdir()) == []
    assert train.main([*options, "--loss", "simpo", "--dry-run"]) == 0
    assert f"\nbeta{'':18} 2.0\n" in capsys.readouterr().out


def test_the_note_when_the_chosen_answers_become_less_likely(
        options, tmp_path, capsys, monkeypatch):
    real = train.evaluate
    for name, change in (("falls", -1.0), ("rises", 1.0)):
        calls = []

        def evaluate(*given):
            calls.append(1)
            scores = real(*given)
            return {**scores, "logp_chosen": -50 + change * len(calls)}
        monkeypatch.setattr(train, "evaluate", evaluate)
        run(options, tmp_path, name=name)
        text = capsys.readouterr().out
        assert text.count("have become less likely") == (name == "falls")
        assert ("log p was -51.00" in text and "--nll" in text) == (name == "falls")


def test_checkpointing_activations_changes_nothing(options, tmp_path):
    one = run(options, tmp_path, name="one")
    other = run(options, tmp_path, "--activation-checkpointing", "full", name="other")
    assert_close(one, other)


def test_a_step_that_is_not_finite_is_skipped(options, tmp_path, capsys, monkeypatch):
    real, calls = reference.preference_loss, []

    def broken(*given):
        losses, scores = real(*given)
        calls.append(1)
        bad = torch.is_grad_enabled() and len(saved) == 1 and math.nan or 1.0
        return losses * bad, scores * bad

    saved = []
    step = train.learning_rate
    monkeypatch.setattr(train, "learning_rate", lambda *given: saved.append(given) or step(*given))
    monkeypatch.setattr(reference, "preference_loss", broken)
    folder = run(options, tmp_path)
    assert capsys.readouterr().out.count("skipped (1 in a row, 1 in all)") == 1
    assert [line["loss"] is None for line in lines(folder)] == [False, True, False, False]
    assert all(torch.isfinite(tensor).all() for tensor in weights_of(folder).values())


def test_a_log_p_that_is_not_finite_at_first_ends_nothing(
        options, tmp_path, capsys, monkeypatch):
    real, values = train.evaluate, iter((math.nan, -1.0, -2.0))
    monkeypatch.setattr(train, "evaluate", lambda *given: {
        **real(*given), "logp_chosen": next(values)})
    folder = run(options, tmp_path)
    assert lines(folder, "eval_loss")[0]["logp_chosen"] is None
    assert "less likely" not in capsys.readouterr().out


def test_virtual_and_tiny_data(tmp_path, capsys, monkeypatch):
    common = ["--model", "tiny", "--device", "cpu", "--dtype", "float32", "--steps", "1"]
    folder = run([*common, "--data", "virtual", "--batch-tokens", "512"], tmp_path, "--nll", 0)
    assert lines(folder)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    monkeypatch.setattr(pairs, "PROMPTS", 12)
    monkeypatch.setattr(train.prepare, "SCORED", 2)
    folder = run([*common, "--data", "tiny"], tmp_path, name="own")
    text = capsys.readouterr().out
    assert "prompts (train) that the model gets wrong" in text and "prompts (eval)" in text
    assert "add skills, before training" in text and "base skills, after training" in text
    assert "mistakes" not in text
    scores = lines(folder, "exact_match_add")
    assert [line["step"] for line in scores] == [0, 1] and "exact_match_base" in scores[0]
    data = write_pairs(tmp_path / "a.jsonl", 6)
    run([*common, "--data", str(data)], tmp_path, name="mine")


# --- the same work in other pieces ---

@pytest.mark.parametrize("more", [(), pytest.param(("--method", "full", *DENSE, "--keep-best"),
                                                   marks=pytest.mark.slow)])
def test_resume_is_bitwise(options, tmp_path, more):
    assert_resume_is_bitwise(train, [*options, *more], tmp_path)
    for kind in ("pairs", "eval_loss"):
        whole, parts = (lines(tmp_path / name, kind) for name in ("whole", "parts"))
        for line in (*whole, *parts):
            for name in small_runs.TIMES:
                line.pop(name, None)
        assert whole == parts


def test_more_packs_are_one_larger_pack(options, tmp_path):
    """Pairs of the same length, so that the packs of a step hold the same ones."""
    folder = tmp_path / "data"
    folder.mkdir()
    data, held_out = (write_pairs(folder / f"{name}.jsonl", 24, equal=True) for name in "ab")
    options = [*options, "--data", str(data), "--eval-data", str(held_out)]
    line = lines(run(options, tmp_path, "--steps", 1, "--eval-every", 0))[0]
    length = line["tokens"] // line["pairs"]
    assert line["tokens"] == length * line["pairs"]
    runs = [run(options, tmp_path, "--batch-tokens", length * 12 // count, "--grad-accum", count,
                name=f"packs{count}") for count in (1, 3)]
    assert [line["pairs"] for line in lines(runs[1])] == [12] * 4
    assert_close(*runs)


def ranks(count, *arguments, patch=lambda: None):
    def action():
        patch()
        small_runs.train(arguments, CHAPTER)

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("BARELOOP_TIMEOUT_SECONDS", "60")
        processes = ranks_of(count, lambda: Forked(action))
    ended = [process.finish() for process in processes]
    printed = "".join(text for _, text in ended)
    assert not any(code for code, _ in ended), printed[-6000:]
    return printed


def test_another_loss_on_a_resume_brings_its_own_values(options, tmp_path, capsys):
    folder = run(options, tmp_path, "--loss", "simpo", "--steps", 1, "--schedule", "constant")
    for loss, values in (("robust", (0.1, 0.1, None)), ("simpo", (2.0, None, 1.0))):
        steps = 2 if loss == "robust" else 3
        assert train.main(["--resume", str(folder), "--loss", loss, "--steps", str(steps),
                           "--allow-changes"]) == 0
        saved = json.loads((folder / "train_config.json").read_text())["options"]
        assert tuple(saved[name] for name in ("beta", "label_smoothing", "gamma")) == values
        assert f"loss        {loss}, β {values[0]:g}, " in capsys.readouterr().out


@pytest.mark.parametrize("more", [
    (), ("--method", "full", *DENSE), *(pytest.param(more, marks=pytest.mark.slow) for more in (
        ("--method", "pissa", *DENSE), ("--method", "dora"), ("--loss", "simpo", "--nll", "1"),
        ("--method", "full", *DENSE, "--loss", "orpo")))])
def test_two_ranks_equal_one(options, tmp_path, more):
    for count in (1, 2):
        printed = ranks(count, *options, *more, "--grad-accum", 2 // count, "--out",
                        tmp_path / f"ranks{count}")
    assert_close(tmp_path / "ranks1", tmp_path / "ranks2")
    assert printed.count("pairs: ") == 1  # one rank speaks
    assert lines(tmp_path / "ranks2")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) or (
        "--loss" in more)


def no_odd_packs():
    """Every second pack is one of no pair; a real run has none of these."""
    real = train.PackSampler.pack

    def pack(self, index):
        return [] if self.seed is not None and index % 2 else real(self, index)
    train.PackSampler.pack = pack


@pytest.mark.parametrize("more", [(), pytest.param(("--method", "full", *DENSE),
                                                   marks=pytest.mark.slow)])
def test_a_rank_without_a_pair_adds_nothing_and_waits_for_nobody(options, tmp_path, more):
    for count in (1, 2):
        ranks(count, *options, *more, "--grad-accum", 2 // count, "--out",
              tmp_path / f"ranks{count}", patch=no_odd_packs)
    assert_close(tmp_path / "ranks1", tmp_path / "ranks2")
    everything = run(options, tmp_path, *more, "--grad-accum", 2, "--steps", 1)
    assert 0 < lines(tmp_path / "ranks2")[0]["pairs"] < lines(everything)[0]["pairs"]


# --- stopped and gone on with ---

@pytest.mark.parametrize("moments, changes", [(0, 1), pytest.param(4, 8, marks=pytest.mark.slow)])
def test_what_was_killed_becomes_what_it_would_have_been(tmp_path, monkeypatch, moments, changes):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = write_pairs(tmp_path / "pairs.jsonl")
    sweep = kill.Sweep(tmp_path / "sweep", CHAPTER, (
        "--data", str(data), "--rank", "2", "--batch-tokens", "200"))
    afters = kill.random_moments(sweep, moments, seed=1)
    afters += kill.every_change(sweep, lambda calls: random.Random(2).sample(
        range(len(calls)), changes))
    assert afters.total() == moments + changes


@pytest.mark.parametrize("more", [(), ("--method", "full", *DENSE)])
def test_a_signal_saves_and_the_run_goes_on(options, tmp_path, more):
    """The frozen copy, made anew, is again the model of the beginning; and so is the log p to which
    that of the end is compared."""
    more = (*more, "--keep", "9")
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
    assert f"python chapter-03/post_training/train_dpo.py --resume {tmp_path}/run" in text
    code, text = small_runs.start(["--resume", tmp_path / "run"], CHAPTER)
    assert code == 0 and "after step 3" in text, text
    small_runs.assert_equal(tmp_path / "run", whole, 4)
    states = [json.loads((folder / "step-000004/state.json").read_text()) for folder in (
        whole, tmp_path / "run")]
    assert "logp_chosen" in json.dumps(states[0]) and states[0] == states[1]


def test_what_may_not_change_on_a_resume(options, tmp_path):
    data = write_pairs(tmp_path / "a.jsonl")
    options = [str(data) if word == options[options.index("--data") + 1] else word
               for word in options]
    folder = run(options, tmp_path)
    with refused("alters the result", "beta"):
        train.main(["--resume", str(folder), "--beta", "0.2"])
    with refused("of chapter '03-dpo', not of '03'"):
        sft.main(["--resume", str(folder)])
    write_pairs(data, 25)
    with refused("the documents are not those that it began with"):
        train.main(["--resume", str(folder)])
    rows = [{"prompt": f"Say {i}.", "completion": f"{i}"} for i in range(9)]
    data.write_text("\n".join(map(json.dumps, rows)))
    assert sft.main([*options, "--out", str(tmp_path / "sft")]) == 0
    with refused("of chapter '03', not of '03-dpo'"):
        train.main(["--resume", str(tmp_path / "sft")])


# --- wrong use ---

@pytest.mark.parametrize("more, parts", [
    (("--dropout", "0.1"), ["--dropout must be 0"]),
    (("--compile",), ["--compile", "left out"]),
    (("--beta", "0"), ["--beta: 0.0: the least is 1e-09"]),
    (("--beta", "-1"), ["--beta: -1.0: the least is 1e-09"]),
    (("--beta", "nan"), ["--beta"]),
    (("--loss", "cdpo", "--label-smoothing", "0.5"), ["--label-smoothing must be below 0.5"]),
    (("--label-smoothing", "0.1"), ["--label-smoothing is for --loss cdpo or robust"]),
    (("--loss", "orpo", "--gamma", "1"), ["--gamma is for --loss simpo"]),
    (("--loss", "dppo"), ["did you mean dpo?"]),
    (("--method", "full"), ["--method full needs --quantize none"]),
    (("--target-modules", "q_proj,lm_head"), ["lm_head cannot be adapted"]),
    (("--rendered",), ["--rendered", "give messages"]),
    (("--columns", "prompt=prompt"), ["all keys of one format"]),
    (("--data", "EMPTY"), ["empty, no example"]),
    (("--data", "SFT"), ["no pair of answers", "'completion'"]),
    (("--data", "EQUAL"), ["no pair can be trained on", "whose answers are the same"]),
    (("--batch-tokens", "36"), ["no pair can be trained on", "--batch-tokens 36"]),
    (("--batch-tokens", "4"), ["no example can be trained on", "longer than 4 tokens"])])
def test_wrong_use_is_one_line_and_leaves_nothing(options, tmp_path, more, parts):
    files = {"EMPTY": "", "SFT": json.dumps({"prompt": "a", "completion": "b"}),
             "EQUAL": json.dumps({"prompt": "a", "chosen": "b", "rejected": "b"})}
    for name, text in files.items():
        (tmp_path / f"{name}.jsonl").write_text(text)
    more = [str(tmp_path / f"{word}.jsonl") if word in files else word for word in more]
    with refused(*parts):
        train.main([*options, *more, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_an_adapter_at_an_untied_head_is_refused_and_none_is_fine(options, tmp_path):
    config = {**small_runs.CONFIG, "tie_word_embeddings": False}
    shutil.copytree(options[options.index("--model") + 1], tmp_path / "model")
    torch.manual_seed(0)
    model = llama.LlamaForCausalLM(llama.LlamaConfig.from_dict(config))
    save_weights(model, config, tmp_path / "model", torch.float32)
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    options = [*options, "--model", str(tmp_path / "model")]
    for targets in ("q_proj,lm_head", "lm_head", ".*(q_proj|lm_head)"):
        with refused("--target-modules", "leave lm_head out"):
            run(options, tmp_path, "--target-modules", targets)
    assert not (tmp_path / "run").exists()
    for more in ((), ("--method", "full", *DENSE)):
        folder = run(options, tmp_path, *more, name=f"run{len(more)}")
        assert lines(folder)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert lines(folder)[-1]["loss"] < math.log(2)


def test_pairs_given_to_the_other_script(options, tmp_path):
    with refused("a pair of answers", "chapter-03/post_training/train_dpo.py", "--columns"):
        sft.main([*options, "--out", str(tmp_path / "run")])


def test_fewer_pairs_than_a_step_takes(options, tmp_path):
    data = write_pairs(tmp_path / "a.jsonl", 3)
    folder = run(options, tmp_path, "--data", data, "--grad-accum", 4)
    assert [line["pairs"] for line in lines(folder)] == [8] * 4  # both of them, again and again


def test_as_a_script_from_anywhere(options, tmp_path):
    done = run_script("chapter-03/post_training/train_dpo.py", *options, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0 and "predicted peak" in done.stdout, done.stderr
    done = run_script("chapter-03/post_training/train_dpo.py", *options, "--betta", "1",
                      cwd=tmp_path)
    assert done.returncode == 2 and "did you mean --beta?" in done.stderr
    assert done.stderr.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_the_best_loss_may_be_zero(options, tmp_path, monkeypatch):
    """A hinge's can: from then on no other one is better."""
    losses = iter((1.0, 0.0, 0.0, 0.5, 0.2))
    real = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *given: {**real(*given), "loss": next(losses)})
    folder = run(options, tmp_path, "--eval-every", 1, "--save-every", 1, "--keep-best")
    state = json.loads((folder / "step-000004" / "state.json").read_text())
    assert (state["best_loss"], state["best_step"]) == (0.0, 1)


def test_without_evaluations_there_is_none_at_the_beginning(options, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "evaluate", None)
    run(options, tmp_path, "--eval-every", 0)


def test_on_a_gpu_auto_is_tiny_and_pairs_alone_are_for_a_large_model(monkeypatch):
    card = SimpleNamespace(total_memory=80e9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    for typed, model, data in (((), "tiny", ["tiny"]),
                               (("--data", "x.jsonl"), "Qwen/Qwen3-0.6B", ["x.jsonl"])):
        found = parse(train.Options, CHAPTER, "", train.TINY, train.REAL, typed)
        assert (found.model, found.data) == (model, data)
        assert found.batch_tokens == (1024 if model == "tiny" else None)


@pytest.mark.parametrize("method, tiny, real", [
    ("lora", 1e-3, 2e-5), ("vera", 6e-3, 2e-4), ("lora+", 2e-4, 2e-5), ("full", 2e-4, 5e-7)])
def test_the_learning_rate_follows_the_method(method, tiny, real):
    for model, data, lr, wide in (("tiny", "tiny", tiny, None), ("x/y", "x.jsonl", None, real)):
        words = ["--model", model, "--data", data, "--method", method, "--quantize", "none"]
        found = parse(train.Options, CHAPTER, "", train.TINY, train.REAL, words)
        assert (found.lr, found.lr_at_4096) == (lr, wide)
