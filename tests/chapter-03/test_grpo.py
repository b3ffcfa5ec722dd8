"""GRPO's losses: equal to TRL's, to the equations, and exact where theory says so."""

import itertools
import json
import math
from types import SimpleNamespace

import ch3_models
import pytest
import torch
from helpers import GOLDENS, load
from safetensors.torch import load_file

from common.adapters import peft
from common.weights import load_weights, read_config

grpo = load("chapter-03/post_training/grpo.py")
logprobs = load("chapter-03/post_training/logprobs.py")
loss_file = load("chapter-03/loss.py")
reference_file = load("chapter-03/post_training/reference.py")
rollout_file = load("chapter-03/post_training/rollout.py")
prompts_file = load("chapter-03/post_training/prompts.py")
train_grpo = load("chapter-03/post_training/train_grpo.py")
advantages, divisors, policy_loss = grpo.advantages, grpo.divisors, grpo.policy_loss
Answer = rollout_file.Answer

TRL = GOLDENS / "trl-rewards"
GRPO, ADVANTAGES = (json.loads((TRL / f"{name}.json").read_text())
                    for name in ("grpo", "advantages"))
DIVISORS = {"dapo": "tokens", "grpo": "answers", "dr_grpo": "constant"}
# TRL's default weights k3 by the ratio. That is another loss, which we do not have.
CASES = [name for name in GRPO["cases"] if "corrected" not in name]


def options(ratio="token", epsilon=0.2, epsilon_high=None, kl=0.0, kl_estimator="k3", **more):
    return SimpleNamespace(ratio=ratio, epsilon=epsilon, kl=kl, kl_estimator=kl_estimator,
                           epsilon_high=epsilon if epsilon_high is None else epsilon_high, **more)


def problem(prompt):
    return prompts_file.Problem(prompt, "", {"expected": ""}, "f:1")


# --- TRL ---

@pytest.fixture(scope="module")
def batch():
    """TRL's tensors; and its answers, each with the prompt before it and without padding."""
    stored = load_file(TRL / "grpo.safetensors")
    masks = [stored[f"{side}_mask"] == 1 for side in ("prompt", "completion")]
    stored["problems"] = [problem(ids[mask].tolist())
                          for ids, mask in zip(stored["prompt_ids"], masks[0])]
    stored["answers"] = [
        Answer(ids[mask].tolist(), old[mask].tolist(), [], False)
        for ids, old, mask in zip(stored["completion_ids"], stored["old_logps"], masks[1])]
    stored["mask"] = masks[1]
    return stored


@pytest.fixture(scope="module")
def policy():
    folder = GOLDENS / "trl/qwen3"
    model = ch3_models.llama.LlamaForCausalLM(
        ch3_models.llama.LlamaConfig.from_dict(read_config(folder)))
    load_weights(model, folder)
    peft.load_adapter(model, GOLDENS / "trl/qwen3-lora", ch3_models.lora)
    return model


def at_temperature(model, temperature):
    """The model gives log p of softmax(logits / temperature), as train_grpo.py has it."""
    model.loss = lambda hidden, *rest: logprobs.chunked_log_probs(hidden / temperature, *rest)
    return model


def packs_of(batch, divisor, parts=((0, 1, 2, 3, 4, 5),)):
    lengths = [len(one.ids) for one in batch["answers"]]
    assert sum(lengths) == 26
    shares = 1 / torch.tensor(divisors(lengths, 16, divisor), dtype=torch.float32)
    for part in map(list, parts):
        yield grpo.collate_answers(*([batch[name][i] for i in part] for name in (
            "problems", "answers")), (batch["advantages"] * shares)[part], shares[part])


def scored(case, policy, batch, **how):
    """(loss, gradients by name, tokens clipped, sum of KL) of TRL's batch, with its options."""
    given = GRPO["cases"][case]["options"]
    at_temperature(policy, given.get("temperature", 1.0))
    chosen = options(
        {"sequence": "sequence"}.get(given.get("importance_sampling_level"), "token"),
        given.get("epsilon", 0.2), given.get("epsilon_high"), given.get("beta", 0.0))
    totals = torch.zeros(3)
    for pack, beside in packs_of(batch, DIVISORS[given["loss_type"]], **how):
        log_p = policy(**pack)
        old = beside["sampled"] if GRPO["cases"][case]["old"] else log_p.detach()
        log_ref = reference_file.reference_log_probs(policy, pack) if chosen.kl else None
        loss, *counts = policy_loss(pack, beside, log_p, old, log_ref, chosen)
        loss.backward()
        totals += torch.stack((loss.detach(), *counts))
    gradients = {n: p.grad for n, p in policy.named_parameters() if p.requires_grad}
    policy.zero_grad(set_to_none=True)
    return totals[0], gradients, *totals[1:].tolist()


def apart(found, expected):
    """The largest difference, relative to the tensor's maximum."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_trls(case, policy, batch):
    expected = GRPO["cases"][case]
    stored = load_file(TRL / "grpo-gradients.safetensors")
    loss, gradients, clipped, kl = scored(case, policy, batch)
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-5, abs=5e-7)
    names = {key.removeprefix("base_model.model.").removesuffix(".weight"): key for key in stored}
    assert sorted(names) == sorted(gradients)
    number = GRPO["gradients"].index(case)
    for name, key in names.items():
        assert apart(gradients[name], stored[key][number]) <= 1e-5, name
    metrics = expected["metrics"]
    if "sequence" not in case:
        assert clipped / 26 == pytest.approx(metrics["clip_ratio/region_mean"], abs=1e-6)
    if "kl" in case:
        assert kl / 26 == pytest.approx(metrics["kl"], rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_two_packs_are_one(case, policy, batch):
    whole, parts = (scored(case, policy, batch, parts=parts) for parts in (
        ((0, 1, 2, 3, 4, 5),), ((4, 0, 3), (1, 5, 2))))
    assert apart(parts[0], whole[0]) < 2e-6 and parts[2] == whole[2]
    assert parts[3] == pytest.approx(whole[3], rel=1e-6)
    for name, gradient in whole[1].items():
        assert apart(parts[1][name], gradient) < 5e-6


def test_clipped_answers_are_trls(policy, batch):
    case = "sequence-grpo-old"
    clipped = [scored(case, policy, batch, parts=[[i]])[2] for i in range(6)]
    lengths = [len(one.ids) for one in batch["answers"]]
    assert all(count in (0, n) for count, n in zip(clipped, lengths))
    assert sum(map(bool, clipped)) / 6 == GRPO["cases"][case]["metrics"]["clip_ratio/region_mean"]


@pytest.mark.parametrize("temperature, suffix", [(1.0, ""), (0.7, "-temperature")])
@torch.no_grad()
def test_log_probs_and_entropies_are_trls(temperature, suffix, policy, batch):
    (pack, _), = packs_of(batch, "tokens")
    live = pack["labelled"]
    log_p = at_temperature(policy, temperature)(**pack)
    assert not log_p[pack["labels"] < 0].any()
    assert (log_p[live] - batch[f"logps{suffix}"][batch["mask"]]).abs().max() < 2e-5
    logits = policy(**ch3_models.inputs_of(pack))
    *_, entropies = rollout_file.draw(logits[live], temperature, torch.rand(len(live)))
    assert (entropies - batch[f"entropies{suffix}"][batch["mask"]]).abs().max() < 2e-5
    if temperature == 1:
        reference = reference_file.reference_log_probs(policy, pack)
        assert (reference[live] - batch["ref_logps"][batch["mask"]]).abs().max() < 2e-5


def test_advantages_are_trls():
    groups = torch.tensor(ADVANTAGES["rewards"]).view(-1, ADVANTAGES["num_generations"])
    for name, scale in (("group", True), ("none", False)):
        expected = torch.tensor(ADVANTAGES[name]).view_as(groups)
        torch.testing.assert_close(advantages(groups, scale=scale), expected, rtol=1e-5, atol=1e-6)
    live = grpo.live_groups(groups)
    assert 1 - live.float().mean() == ADVANTAGES["frac_reward_zero_std"]
    assert live.tolist() == [True, True, False, True]


# --- advantages ---

def random_rewards(prompts=6, group=5):
    return torch.rand(prompts, group, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("baseline", ["mean", "others"])
def test_advantages_are_the_equation(baseline, scale):
    """In plain numbers, each group by itself: rows are prompts."""
    rewards = random_rewards() + torch.arange(6)[:, None]  # groups that are far from each other
    found = advantages(rewards, baseline, scale)
    for row, group in zip(found.tolist(), rewards.tolist()):
        mean = sum(group) / 5
        std = (sum((r - mean) ** 2 for r in group) / 4) ** 0.5  # unbiased
        for i, r in enumerate(group):
            compared = mean if baseline == "mean" else (sum(group) - r) / 4
            assert row[i] == pytest.approx((r - compared) / (std + 1e-4 if scale else 1), abs=1e-12)
    assert found.sum(1).abs().max() < 1e-12
    assert (found.std(1) - 1).abs().max() < 0.3 if scale else True


def test_leave_one_out_is_larger_by_g_over_g_minus_1():
    rewards = random_rewards()
    torch.testing.assert_close(advantages(rewards, "others"), advantages(rewards) * (5 / 4))


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("baseline", ["mean", "others"])
def test_equal_rewards_give_exactly_nothing(baseline, scale):
    rewards = torch.tensor([[0.7] * 8, [1.0] * 7 + [0.0], [0.0] * 8, [1 / 3] * 8])
    assert (rewards - rewards.mean(1, keepdim=True))[0].any()  # as the mean is rounded
    found = advantages(rewards, baseline, scale)
    assert not found[[0, 2, 3]].any() and found[1].all()
    assert grpo.live_groups(rewards).tolist() == [False, True, False, False]
    near = torch.tensor([[0.5] * 7 + [0.5 + 5e-7], [0.5] * 7 + [0.51]])
    assert grpo.live_groups(near).tolist() == [False, True]


def test_divisors_are_the_table():
    assert divisors([3, 1, 4], 16, "tokens") == [8, 8, 8]
    assert divisors([3, 1, 4], 16, "constant") == [48, 48, 48]
    assert divisors([3, 1, 4], 16, "answers") == [9, 3, 12]


# --- the loss ---

def pack_like(lengths):
    """What `policy_loss` reads of a pack of documents in which all but the last position of each
    are trained on."""
    starts = [0, *itertools.accumulate(lengths)]
    labels = torch.zeros(starts[-1], dtype=torch.int64)
    labels[torch.tensor(starts[1:]) - 1] = -100
    return {"labels": labels, "labelled": (labels >= 0).nonzero()[:, 0],
            "cu_seqlens": torch.tensor(starts, dtype=torch.int32)}


def beside_like(pack, weights, share=1.0):
    """Weights by document, where a token is predicted."""
    live = (pack["labels"] >= 0).double()
    values = torch.as_tensor(weights).double().repeat_interleave(pack["cu_seqlens"].diff())
    return {"weight": values * live, "share": share * live, "sampled": torch.zeros_like(live)}


def made_up(seed=0, lengths=(4, 2, 7)):
    """(pack, log π, log π_old, log ρ), 0 where nothing is trained; float64."""
    pack = pack_like(lengths)
    live = (pack["labels"] >= 0).double()
    random = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(len(live), generator=random).double() * live
    log_p, log_ref = (old + 0.4 * torch.randn(len(live), generator=random).double() * live
                      for _ in range(2))
    return pack, log_p.requires_grad_(), old, log_ref


@pytest.mark.parametrize("estimator", ["k3", "k2"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_the_loss_is_its_equation(ratio, beta, estimator):
    """In plain numbers; TRL has no k2."""
    pack, log_p, old, log_ref = made_up()
    weights, chosen = [0.5, -1.5, 0.25], options(ratio, 0.2, 0.28, beta, estimator)
    beside = beside_like(pack, weights, 0.1)
    found, clipped, kl = policy_loss(pack, beside, log_p, old, log_ref, chosen)
    loss = count = kls = 0.0
    for n, (a, b) in enumerate(itertools.pairwise(pack["cu_seqlens"].tolist())):
        changes = (log_p - old)[a:b - 1].tolist()
        if ratio == "sequence":
            changes = [sum(changes) / len(changes)] * len(changes)
        for change, d in zip(changes, (log_ref - log_p)[a:b - 1].tolist()):
            w = math.exp(change)
            bounded = min(max(w, 0.8), 1.28)
            k3 = math.exp(d) - d - 1
            loss -= min(w * weights[n], bounded * weights[n])
            loss += beta * 0.1 * (k3 if estimator == "k3" else d * d / 2)
            count += w > 1.28 and weights[n] > 0 or w < 0.8 and weights[n] < 0
            kls += k3 * bool(beta)
    assert found.item() == pytest.approx(loss, rel=1e-12)
    assert clipped == count > 0 and kl.item() == pytest.approx(kls, rel=1e-12)
    assert not kl.requires_grad
    live = pack["labelled"]

    def of(values):
        return policy_loss(pack, beside, log_p.detach().index_put((live,), values), old, log_ref,
                           chosen)[0]
    assert torch.autograd.gradcheck(of, log_p.detach()[live].requires_grad_())


def test_the_clip_stops_what_goes_too_far_and_nothing_else():
    """At ratio 1.3 a good answer pulls no more, a bad one still pushes; at 0.7 the other way."""
    pack = pack_like([2])
    for ratio, weight, pulls in ((1.3, 1.0, False), (1.3, -1.0, True), (0.7, -1.0, False),
                                 (0.7, 1.0, True), (1.1, 1.0, True), (0.9, -1.0, True)):
        for kind in ("token", "sequence"):
            log_p = torch.tensor([ratio, 1], dtype=torch.float64).log().requires_grad_()
            loss, clipped, _ = policy_loss(pack, beside_like(pack, [weight]), log_p,
                                           torch.zeros(2).double(), None, options(kind, 0.2))
            found = torch.autograd.grad(loss, log_p)[0][0].item()
            assert found == pytest.approx(-ratio * weight, rel=1e-12) if pulls else found == 0
            assert clipped == (not pulls)
    # DAPO's clip is further from 1 above than below.
    log_p = torch.tensor([1.25, 1], dtype=torch.float64).log().requires_grad_()
    loss, clipped, _ = policy_loss(pack, beside_like(pack, [1.0]), log_p, torch.zeros(2).double(),
                                   None, options(epsilon=0.2, epsilon_high=0.28))
    assert clipped == 0 and torch.autograd.grad(loss, log_p)[0][0] == pytest.approx(-1.25)


def test_on_policy_the_gradient_is_a_weighted_cross_entropys_to_the_last_bit():
    """Along log p, and along the parameters of a model."""
    pack, beside, model, log_p = step_of_a_model()
    for chosen in (options(), options(epsilon=0.0), options(epsilon_high=0.28)):
        loss, clipped, _ = policy_loss(pack, beside, log_p, log_p.detach(), None, chosen)
        found, = torch.autograd.grad(loss, log_p, retain_graph=True)
        assert torch.equal(found, -beside["weight"]) and found.any() and clipped == 0
        assert loss.item() == pytest.approx(-beside["weight"].sum().item(), abs=1e-6)
        ours, theirs = (torch.autograd.grad(one, [*model.parameters()], retain_graph=True)
                        for one in (loss, -(beside["weight"] * log_p).sum()))
        for one, other in zip(ours, theirs):
            assert torch.equal(one, other) and one.any()


def step_of_a_model():
    """(pack, beside, model, its log p) of two groups of three answers."""
    model = at_temperature(ch3_models.build(), 1.0)
    rewards = torch.tensor([[1.0, 0, 0], [0.2, 0.9, 0.4]])
    asked, answers = some_answers([5, 5, 5, 8, 8, 8], [2, 4, 3, 1, 6, 2])
    (pack, beside), = grpo.make_packs(asked, answers, rewards, step_options())
    return pack, beside, model, model(**pack)


def some_answers(prompts, lengths, seed=0):
    """Problems with random prompts and Answers of these lengths."""
    random = torch.Generator().manual_seed(seed)

    def ids(count):
        return torch.randint(96, (count,), generator=random).tolist()
    answers = [Answer(ids(n), (-torch.rand(n, generator=random) - 0.1).tolist(), [0.5] * n, True)
               for n in lengths]
    return [problem(ids(n)) for n in prompts], answers


def step_options(**more):
    return options(**{**dict(
        max_new_tokens=8, divisor="tokens", baseline="mean", scale_rewards=False, group=3,
        batch_tokens=512, device="cpu"), **more})


def test_equal_weights_are_the_cross_entropy():
    """That of chapter 3's loss, which is another function: so not to the last bit."""
    pack, beside, model, log_p = step_of_a_model()
    beside = {**beside, "weight": (pack["labels"] >= 0).float()}
    loss = policy_loss(pack, beside, log_p, log_p.detach(), None, options())[0]
    ours = torch.autograd.grad(loss, [*model.parameters()])
    model.loss = loss_file.chunked_cross_entropy
    theirs = torch.autograd.grad(model(**pack), [*model.parameters()])
    for one, other in zip(ours, theirs):
        assert apart(one, other) < 1e-5


# --- packs ---

def test_a_pack_has_each_answers_numbers_where_its_tokens_are_predicted():
    asked, answers = some_answers([3, 2], [2, 3])
    pack, beside = grpo.collate_answers(asked, answers, torch.tensor([0.5, -0.25]),
                                        torch.tensor([0.1, 0.2]))
    assert pack["input_ids"].tolist() == (
        asked[0].prompt + answers[0].ids + asked[1].prompt + answers[1].ids)
    assert pack["cu_seqlens"].tolist() == [0, 5, 10]
    a, b = answers
    # token 3 of document 0, its answer's first, is predicted at position 2
    assert pack["labels"].tolist() == [-100, -100, *a.ids, -100, -100, *b.ids, -100]
    assert beside["weight"].tolist() == [0, 0, 0.5, 0.5, 0, 0, -0.25, -0.25, -0.25, 0]
    torch.testing.assert_close(beside["share"], torch.tensor(
        [0, 0, 0.1, 0.1, 0, 0, 0.2, 0.2, 0.2, 0]))
    torch.testing.assert_close(beside["sampled"], torch.tensor(
        [0, 0, *a.log_probs, 0, 0, *b.log_probs, 0]))
    assert {one.dtype for one in beside.values()} == {torch.float32}


@pytest.mark.parametrize("divisor", ["tokens", "constant", "answers"])
def test_a_group_of_equal_rewards_is_left_out_but_counted(divisor):
    lengths = [2, 4, 3, 1, 6, 2, 5, 5, 1]
    asked, answers = some_answers([4] * 9, lengths)
    rewards = torch.tensor([[1.0, 0, 0], [0.7, 0.7, 0.7], [0.0, 1, 1]])
    how = step_options(divisor=divisor)
    (pack, beside), = grpo.make_packs(asked, answers, rewards, how)
    documents = [asked[n].prompt + answers[n].ids for n in (0, 1, 2, 6, 7, 8)]
    assert pack["input_ids"].tolist() == sum(documents, [])
    total = {"tokens": 29, "constant": 9 * 8}.get(divisor)
    A = [2 / 3, -1 / 3, -1 / 3, -2 / 3, 1 / 3, 1 / 3]
    live = [lengths[n] for n in (0, 1, 2, 6, 7, 8)]
    expected = [a / (total or 9 * n) for a, n in zip(A, live) for _ in range(n)]
    assert beside["weight"][pack["labelled"]].tolist() == pytest.approx(expected, rel=1e-6)
    assert beside["share"][pack["labelled"]].tolist() == pytest.approx(
        [1 / (total or 9 * n) for n in live for _ in range(n)])

    # The distance to the reference is that of all answers; the rewards still say nothing.
    (pack, beside), = grpo.make_packs(asked, answers, rewards, step_options(
        divisor=divisor, kl=0.1))
    assert len(pack["input_ids"]) == 9 * 4 + 29
    weights = beside["weight"][pack["labelled"]].split(lengths)
    assert [bool(one.any()) for one in weights] == [True] * 3 + [False] * 3 + [True] * 3
    assert (beside["share"][pack["labelled"]] > 0).all()


@pytest.mark.parametrize("scale", [False, True])
def test_a_step_of_which_nothing_can_be_learned_has_no_packs(scale):
    asked, answers = some_answers([4] * 6, [2] * 6)
    rewards = torch.tensor([[0.7, 0.7, 0.7], [0.0, 0, 0]])
    assert grpo.make_packs(asked, answers, rewards, step_options(scale_rewards=scale)) == []
    packs = grpo.make_packs(asked, answers, rewards, step_options(scale_rewards=scale, kl=0.1))
    assert not any(beside["weight"].any() for _, beside in packs) and packs


@pytest.mark.parametrize("divisor", ["tokens", "constant", "answers"])
@pytest.mark.parametrize("kl", [0.0, 0.2])
def test_a_step_is_the_same_however_it_is_packed(divisor, kl):
    model = at_temperature(ch3_models.build(), 1.0)
    asked, answers = some_answers([5] * 3 + [9] * 3 + [2] * 3, [2, 7, 3, 1, 6, 2, 4, 8, 5])
    rewards = torch.tensor([[1.0, 0, 0], [0, 0.9, 0.4], [0.5, 0.5, 0.1]])
    found = []
    for batch_tokens, count in ((512, 1), (30, None), (16, None)):
        how = step_options(divisor=divisor, kl=kl, batch_tokens=batch_tokens, scale_rewards=True,
                           baseline="others", epsilon=0.9)
        packs = grpo.make_packs(asked, answers, rewards, how)
        assert len(packs) == count or count is None and len(packs) > 2
        assert all(len(pack["input_ids"]) <= batch_tokens for pack, _ in packs)
        losses = 0
        for pack, beside in packs:
            log_p = model(**pack)
            loss = policy_loss(pack, beside, log_p, log_p.detach() - 0.1 * (
                pack["labels"] >= 0), beside["sampled"], how)[0]
            loss.backward()
            losses += loss.item()
        found.append((losses, {n: p.grad for n, p in model.named_parameters()}))
        model.zero_grad(set_to_none=True)
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5, abs=1e-6)
        for name, gradient in gradients.items():
            assert apart(gradient, found[0][1][name]) < 1e-5


def test_scores_of_a_step():
    answers = [Answer([1] * n, [-1.0] * n, [0.25 * n] * n, end) for n, end in (
        (1, True), (2, False), (3, True), (2, True), (4, False), (4, True), (1, True), (1, True))]
    rewards = torch.tensor([[1.0, 1], [0, 0], [0.25, 0.75], [-1, -1]])
    found = train_grpo.summary(rewards, answers)
    tokens = 1 + 2 + 3 + 2 + 4 + 4 + 1 + 1
    assert found == pytest.approx({
        "reward": 1 / 8, "reward_std": (0.125**0.5) / 4, "degenerate": 3 / 4, "all_right": 1 / 4,
        "all_wrong": 2 / 4, "answer_tokens": tokens / 8, "truncated": 2 / 8,
        "entropy": sum(0.25 * len(one.ids)**2 for one in answers) / tokens})


def test_a_group_that_got_half_of_the_reward_is_not_right():
    """A reward of 1 is solved (rewards.py); shaped rewards are often alike and below it."""
    answers = [Answer([1], [-1.0], [0.5], True)] * 6
    found = train_grpo.summary(torch.tensor([[0.5, 0.5], [1.0, 1.0], [0.0, 0.0]]), answers)
    assert found["degenerate"] == 1 and found["all_right"] == pytest.approx(1 / 3)


# --- what theory says, by enumeration ---

LIMIT, VOCABULARY, STOP = 2, 3, 0
WRITTEN = [(0,), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]  # all answers there are
REWARDS = torch.tensor([0.3, 1.0, -0.5, 0.25, 0.0, 0.8, -1.0]).double()


def log_p_of(theta, answer):
    """log p of each token; theta (1 + V, V): logits of the first, and after each first token."""
    table = theta.log_softmax(-1)
    return [table[0 if t == 0 else 1 + answer[0], token] for t, token in enumerate(answer)]


def expected_gradient(theta, baseline, divisor, group=3):
    """The expectation of a step's gradient over all groups of answers, each as probable as the
    policy makes it."""
    log_p = [log_p_of(theta, answer) for answer in WRITTEN]
    chances = torch.stack([sum(one).exp() for one in log_p]).detach()
    total = torch.zeros_like(theta)
    for drawn in itertools.product(range(len(WRITTEN)), repeat=group):
        lengths = [len(WRITTEN[n]) for n in drawn]
        A = advantages(REWARDS[list(drawn)][None], baseline)[0]
        weights = A / torch.tensor(divisors(lengths, LIMIT, divisor)).double()
        pack = pack_like([n + 1 for n in lengths])
        zero = theta.new_zeros(())
        found = torch.stack([x for n in drawn for x in (*log_p[n], zero)])
        loss = policy_loss(pack, beside_like(pack, weights), found, found.detach(), None,
                           options())[0]
        gradient, = torch.autograd.grad(loss, theta, retain_graph=True)
        total -= chances[list(drawn)].prod() * gradient
    return total


def test_leave_one_out_with_the_constant_divisor_is_the_gradient_of_the_expected_reward():
    torch.manual_seed(0)
    theta = torch.randn(1 + VOCABULARY, VOCABULARY).double().requires_grad_()
    chances = torch.stack([sum(log_p_of(theta, answer)).exp() for answer in WRITTEN])
    assert chances.sum().item() == pytest.approx(1)
    truth, = torch.autograd.grad((chances * REWARDS).sum(), theta)
    truth = truth / LIMIT  # by which the constant divides
    assert (expected_gradient(theta, "others", "constant") - truth).abs().max() < 1e-10
    # Against the group's own mean it is (G-1)/G of that; the other divisors are another direction.
    assert (expected_gradient(theta, "mean", "constant") - truth * 2 / 3).abs().max() < 1e-10
    for divisor in ("tokens", "answers"):
        other = expected_gradient(theta, "others", divisor)
        assert torch.cosine_similarity(other.flatten(), truth.flatten(), 0) < 0.9999


def kl_losses(estimator, share):
    """The KL part of the loss on every token once, with `share` as its weight; the gradient along
    the policy's logits; π and ρ's log p."""
    torch.manual_seed(1)
    theta, rho = torch.randn(2, 5).double()
    theta.requires_grad_()
    log_p, log_ref = theta.log_softmax(-1), rho.log_softmax(-1)
    beside = {"weight": torch.zeros(5).double(), "share": share(log_p)}
    pack = {"labels": torch.arange(5)}
    loss, _, kl = policy_loss(pack, beside, log_p, log_p.detach(), log_ref,
                              options(kl=1.0, kl_estimator=estimator))
    gradient, = torch.autograd.grad(loss, theta, retain_graph=True)
    return loss, gradient, theta, log_p, log_ref


def test_the_expectations_of_the_estimators_and_of_their_gradients():
    def chances(log_p):
        return log_p.detach().exp()
    found = {name: kl_losses(name, chances) for name in ("k2", "k3")}
    loss, _, theta, log_p, log_ref = found["k3"]
    reverse = (log_p.exp() * (log_p - log_ref)).sum()
    forward = (log_ref.exp() * (log_ref - log_p)).sum()
    assert loss.item() == pytest.approx(reverse.item(), rel=1e-12)  # k3 is unbiased, as k1 is
    assert found["k2"][0].item() == pytest.approx(
        (log_p.exp() * (log_p - log_ref) ** 2).sum().item() / 2, rel=1e-12)
    forward, = torch.autograd.grad(forward, theta, retain_graph=True)
    assert (found["k3"][1] - forward).abs().max() < 1e-14
    loss, gradient, theta, log_p, log_ref = found["k2"]
    reverse, = torch.autograd.grad((log_p.exp() * (log_p - log_ref)).sum(), theta)
    assert (gradient - reverse).abs().max() < 1e-14
    assert (forward - reverse).abs().max() > 0.05  # they are not the same


@pytest.mark.parametrize("estimator", ["k3", "k2"])
def test_the_kl_on_the_screen_is_k3_whatever_is_trained(estimator):
    """Of 8 tokens that are drawn as often as π says, the mean is KL(π‖ρ)."""
    log_p, log_ref = (torch.tensor(one, dtype=torch.float64).log() for one in (
        [1 / 8, 3 / 8, 4 / 8], [0.5, 0.3, 0.2]))
    drawn = torch.tensor([0] + [1] * 3 + [2] * 4)
    pack = {"labels": drawn}
    beside = {"weight": torch.zeros(8).double(), "share": torch.ones(8).double()}
    *_, kl = policy_loss(pack, beside, log_p[drawn], log_p[drawn], log_ref[drawn],
                         options(kl=0.3, kl_estimator=estimator))
    truth = (log_p.exp() * (log_p - log_ref)).sum()
    assert kl.item() / 8 == pytest.approx(truth.item(), rel=1e-12)


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_bandit_finds_the_best_arm(seed, scale):
    """Ten arms, of which one is worth 1 and one a half; 8 groups of 8 draws a step."""
    random = torch.Generator().manual_seed(seed)
    worth = torch.tensor([0.0, 0.5, 0, 0, 0, 0, 0, 1.0, 0, 0])
    theta = torch.zeros(10, requires_grad=True)
    for _ in range(300):
        table = theta.log_softmax(0)
        arms = torch.multinomial(table.detach().exp(), 64, True, generator=random)
        weights = advantages(worth[arms].view(8, 8), "others", scale).flatten()
        beside = {"weight": weights / torch.tensor(divisors([1] * 64, 1, "tokens"))}
        log_p = table[arms]
        loss = policy_loss({"labels": arms}, beside, log_p, log_p.detach(), None, options())[0]
        gradient, = torch.autograd.grad(loss, theta)
        theta.data -= 0.5 * gradient
    assert theta.softmax(0)[7] >= 0.99
