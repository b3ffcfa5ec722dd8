"""Losses of pairs of answers: equal to TRL's, to the equations, and however pairs are packed."""

import json
import math
from types import SimpleNamespace

import ch3_models
import pytest
import torch
from helpers import GOLDENS, load
from safetensors.torch import load_file

from common.adapters import peft
from common.data.chat import Chat
from common.data.encode import encode
from common.errors import UserError
from common.weights import load_weights, read_config

logprobs = load("chapter-03/post_training/logprobs.py")
preference = load("chapter-03/post_training/preference.py")
reference_file = load("chapter-03/post_training/reference.py")
pairs_file = load("chapter-03/post_training/pairs.py")
PairLogProbs, collate_pairs = preference.PairLogProbs, preference.collate_pairs
preference_loss, SCORES = preference.preference_loss, preference.SCORES

TRL = GOLDENS / "trl"
RECORDS, TOKENS, ANSWERS = (json.loads((TRL / f"{name}.json").read_text())
                            for name in ("records", "tokens", "answers"))
SETTINGS = [(name, setting) for name in TOKENS for setting in ("dense", "lora")]
NAMES = {"sigmoid": "dpo", "sigmoid-beta-0.5": "dpo", "ipo": "ipo", "hinge": "hinge",
         "robust": "robust", "sigmoid_norm": "dpo-norm", "apo_zero": "apo-zero", "sft": "dpo",
         "sigmoid+sft": "dpo"}
SFT = 0.7  # the weight of sft in sigmoid+sft
ROUNDED = 2**-15  # to this TRL's sums of log p, up to 493, are rounded: β 0.5 shows it
METRICS = {"rewards/chosen": "reward_chosen", "rewards/rejected": "reward_rejected",
           "rewards/accuracies": "pair_accuracy", "rewards/margins": "margin",
           "logps/chosen": "logp_chosen", "logps/rejected": "logp_rejected"}


def options(loss="dpo", beta=0.1, label_smoothing=0.1, gamma=1.0, nll=0.0, **more):
    return SimpleNamespace(loss=loss, beta=beta, label_smoothing=label_smoothing, gamma=gamma,
                           nll=nll, **more)


def means(scores, count):
    return dict(zip(SCORES, (scores / count).tolist()))


# --- TRL ---

def trl_pairs(name):
    """Its token ids, and its masks as labels."""
    def document(record, side):
        ids = torch.tensor(record["prompt"] + record[side])
        return ids, ids.where(torch.tensor(record[f"{side}_mask"]) == 1, -100)

    return [(document(one, "chosen"), document(one, "rejected")) for one in TOKENS[name]]


def trl_models(name, setting):
    """(policy, reference or None), their loss log p."""
    def base():
        config = ch3_models.llama.LlamaConfig.from_dict(read_config(TRL / name))
        model = ch3_models.llama.LlamaForCausalLM(config)
        load_weights(model, TRL / name)
        model.loss = logprobs.chunked_log_probs
        return model

    policy = base()
    if setting == "lora":
        peft.load_adapter(policy, TRL / f"{name}-lora", ch3_models.lora)
        return policy, None
    parameters = dict(policy.named_parameters())
    for key, value in load_file(TRL / f"{name}-dense.safetensors").items():
        parameters[key].data.copy_(value)
    return policy, base()


@pytest.fixture(scope="module", params=SETTINGS, ids="-".join)
def trl(request):
    """(name, setting, policy, its PairLogProbs, TRL's answers)."""
    policy, reference = trl_models(*request.param)
    pack = collate_pairs(trl_pairs(request.param[0]))
    frozen = reference_file.reference_log_probs(policy, pack, reference)
    pairs = PairLogProbs.of(pack, policy(**pack), frozen)
    return *request.param, policy, pairs, ANSWERS[request.param[0]][request.param[1]]


def trl_options(case, given):
    return options(NAMES[case], given["beta"], given.get("label_smoothing", 0.1),
                   nll=SFT if case == "sigmoid+sft" else 0.0)


def close(found, expected, tolerance=1e-5):
    """To `tolerance`, relative for numbers above 1."""
    torch.testing.assert_close(torch.as_tensor(found).detach(), torch.as_tensor(expected),
                               rtol=tolerance, atol=tolerance)


def test_log_probs_of_answers_are_trls(trl):
    *_, pairs, expected = trl
    assert pairs.tokens.tolist() == expected["tokens"]
    for ours, theirs in ((pairs.policy, "logps"), (pairs.reference, "ref_logps")):
        assert (ours.detach() - torch.tensor(expected[theirs])).abs().max() < 1e-4


def test_losses_and_scores_are_trls(trl):
    *_, pairs, expected = trl
    for case, values in expected["losses"].items():
        losses, scores = preference_loss(pairs, trl_options(case, values["options"]))
        if case == "sft":  # ours is a term beside a loss: λ = 1
            losses = preference_loss(pairs, options(nll=1.0))[0] - losses
        # TRL's sft is a mean over tokens, so that in a batch a long answer weighs more; ours is a
        # mean over pairs of each answer's mean. They are the same in batches of one.
        beta = values["options"]["beta"]
        tolerance = max(1e-5, 2 * ROUNDED * beta)
        close(losses, values["pairs"], tolerance)
        if "sft" not in case:
            close(losses.mean(), values["loss"], tolerance)
            assert scores[0] == losses.detach().sum()
        scores = means(scores, len(losses))
        for theirs, ours in METRICS.items():
            assert scores[ours] == pytest.approx(values["metrics"][theirs], rel=1e-5, abs=3e-5)
    assert len(expected["losses"]) == len(NAMES)
    assert scores["tokens_chosen"] == pairs.tokens[:, 0].mean()


def test_gradients_are_trls(trl):
    name, setting, policy, pairs, expected = trl
    stored = load_file(TRL / f"{name}-{setting}-gradients.safetensors")
    parameters = {key: p for key, p in policy.named_parameters() if p.requires_grad}
    keys = {key: key.removeprefix("base_model.model.").removesuffix(".weight" * ("lora" in key))
            for key in stored}
    assert setting == "dense" or sorted(keys.values()) == sorted(parameters)
    for number, case in enumerate(expected["gradients"]):
        how = trl_options(case, expected["losses"][case]["options"])
        if "sft" in case:  # the token mean of the batch: each answer's mean, weighted by length
            lengths = pairs.tokens[:, 0]
            how.nll = SFT * lengths / lengths.mean()
        losses = preference_loss(pairs, how)[0]
        close(losses.mean(), expected["losses"][case]["loss"])
        gradients = dict(zip(parameters, torch.autograd.grad(
            losses.mean(), parameters.values(), retain_graph=True)))
        for key, theirs in stored.items():
            ours, theirs = gradients[keys[key]], theirs[number]
            ours = ours[::20] if "embed_tokens" in key else ours
            assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max(), (case, key)


def test_simpo_and_orpo_are_trls(trl):
    *_, pairs, expected = trl
    check_simpo_and_orpo(pairs, expected)


def test_simpo_and_orpo_of_extreme_answers_are_trls():
    extremes = ANSWERS["extremes"]
    a = torch.tensor(extremes["inputs"])
    check_simpo_and_orpo(PairLogProbs(a, None, torch.ones_like(a)), extremes)


def check_simpo_and_orpo(pairs, expected):
    close(preference_loss(pairs, options("simpo", beta=2.0))[0], expected["simpo"])
    # TRL gives ORPO's odds ratio alone, and subtracts it from the cross-entropy of the batch.
    odds = preference_loss(pairs, options("orpo"))[0] + pairs.a[:, 0]
    close(-odds, expected["orpo"])


@pytest.mark.parametrize("name", TOKENS)
def test_tokens_and_masks_are_trls(name, tmp_path):
    """From our templates and masks: TRL encodes prompt and answer together, as we do. It also
    trains what stands behind the end-of-turn token, which a model is never asked to write."""
    chat = Chat.load(GOLDENS / "chat" / name)
    records = [one for value in RECORDS for one in pairs_file.members(value, "here", {})]
    encoded = encode(records, chat, 512)
    assert len(encoded) == 2 * len(RECORDS)
    theirs = [document for pair in trl_pairs(name) for document in pair]
    several = 0
    for i, (record, (ids, labels)) in enumerate(zip(records, theirs)):
        ours, trained = map(torch.tensor, chat.encode_messages(record["messages"]))
        assert torch.equal(ours, ids) and torch.equal(encoded[i][0], ids)
        stop = max(n for n, id in enumerate(ids.tolist()) if id in chat.stop_ids)
        assert chat.decode(ids[stop + 1:], skip_special=False) == ("\n" if name == "qwen3" else "")
        expected = torch.where(torch.arange(len(ids)) <= stop, labels, -100)
        assert torch.equal(encoded[i][1], expected)
        assert torch.equal(ids.where(trained, -100), expected)
        # What is trained begins where the prompt ends, at the last turn, and nowhere before.
        border = len(TOKENS[name][i // 2]["prompt"])
        assert not trained[:border].any() and trained[border:stop + 1].all()
        several += sum(message["role"] == "assistant" for message in record["messages"]) > 1
    assert several == 4  # so many have earlier answers
