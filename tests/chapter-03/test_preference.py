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
                           nll=nll, needs_reference=loss not in preference.NO_REFERENCE, **more)


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


# --- the equations, in plain numbers ---

def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def expected_loss(how, pi, rho, n):
    """A pair's loss in Python's float64: `pi`, `rho` and `n` are of (chosen, rejected)."""
    beta, e = how.beta, how.label_smoothing
    r_w, r_l = (pi[i] - rho[i] for i in (0, 1))
    a_w, a_l = (pi[i] / n[i] for i in (0, 1))
    x = beta * (r_w - r_l)
    per_token = r_w / n[0] - r_l / n[1]
    odds = [math.log(math.exp(a)) - math.log(1 - math.exp(a)) for a in (a_w, a_l)]
    return how.nll * -a_w + {
        "dpo": lambda: -log_sigmoid(x),
        "cdpo": lambda: -(1 - e) * log_sigmoid(x) - e * log_sigmoid(-x),
        "robust": lambda: (-(1 - e) * log_sigmoid(x) + e * log_sigmoid(-x)) / (1 - 2 * e),
        "hinge": lambda: max(0.0, 1 - x),
        "ipo": lambda: (per_token - 1 / (2 * beta)) ** 2,
        "dpo-norm": lambda: -log_sigmoid(beta * per_token),
        "apo-zero": lambda: 1 - 1 / (1 + math.exp(-beta * r_w)) + 1 / (1 + math.exp(-beta * r_l)),
        "simpo": lambda: -log_sigmoid(beta * (a_w - a_l) - how.gamma),
        "orpo": lambda: -a_w - beta * log_sigmoid(odds[0] - odds[1]),
    }[how.loss]()


def random_pairs(count=40, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    tokens = torch.randint(1, 30, (count, 2)).to(dtype)
    policy = -tokens * (0.05 + 3 * torch.rand(count, 2, dtype=dtype))
    return PairLogProbs(policy, policy + 4 * torch.randn(count, 2, dtype=dtype), tokens)


@pytest.mark.parametrize("nll", [0.0, 0.3])
@pytest.mark.parametrize("loss", preference.LOSSES)
def test_every_loss_is_its_equation(loss, nll):
    pairs = random_pairs()
    for beta, e, gamma in ((0.1, 0.1, 1.0), (2.0, 0.3, 0.5), (0.7, 0.0, 0.0)):
        how = options(loss, beta, e, gamma, nll)
        losses, scores = preference_loss(pairs, how)
        expected = [expected_loss(how, *(one[i].tolist() for one in pairs))
                    for i in range(len(losses))]
        torch.testing.assert_close(losses, torch.tensor(expected).double(), rtol=1e-6, atol=1e-9)
        scores = means(scores, len(losses))
        s = (pairs.policy - pairs.reference).numpy()
        if loss in ("simpo", "orpo"):
            s = (pairs.policy / pairs.tokens).numpy()
        assert scores["reward_chosen"] == pytest.approx(beta * s[:, 0].mean())
        assert scores["reward_rejected"] == pytest.approx(beta * s[:, 1].mean())
        assert scores["margin"] == pytest.approx(beta * (s[:, 0] - s[:, 1]).mean())
        assert scores["pair_accuracy"] == pytest.approx((s[:, 0] > s[:, 1]).mean())
        assert scores["logp_rejected"] == pytest.approx(pairs.policy[:, 1].mean().item())
        assert scores["tokens_rejected"] == pytest.approx(pairs.tokens[:, 1].mean().item())
        assert torch.autograd.gradcheck(
            lambda policy: preference_loss(pairs._replace(policy=policy), how)[0],
            pairs.policy.clone().requires_grad_(), fast_mode=True)


def pair_of(policy, reference=(0.0, 0.0), tokens=(1, 1)):
    """PairLogProbs of one pair in float64, the policy's with a gradient."""
    policy, reference, tokens = (torch.tensor([one]).double()
                                 for one in (policy, reference, tokens))
    return PairLogProbs(policy.requires_grad_(), reference, tokens)


def slope(pairs, how):
    """The gradient along log π of the chosen and of the rejected answer."""
    return torch.autograd.grad(preference_loss(pairs, how)[0].sum(), pairs.policy)[0][0].tolist()


@pytest.mark.parametrize("margin", [-60.0, -3.0, 0.0, 0.5, 40.0])
def test_dpo_pulls_by_beta_times_the_probability_of_being_wrong(margin):
    beta = 0.3
    pairs = pair_of((-20.0 + margin, -7.0), (-20.0, -7.0), (5, 3))
    expected = beta / (1 + math.exp(beta * margin))  # β σ(-β Δ), equation 7's gradient
    assert slope(pairs, options(beta=beta)) == pytest.approx([-expected, expected], rel=1e-12)


def test_exchanged_members_have_the_margin_of_the_other_sign():
    pairs = random_pairs()
    exchanged = PairLogProbs(*(one.flip(1) for one in pairs))
    assert torch.equal(exchanged.delta, -pairs.delta)
    scores, others = (means(preference_loss(one, options())[1], 40) for one in (pairs, exchanged))
    assert others["margin"] == -scores["margin"] and scores["margin"]
    assert others["pair_accuracy"] == pytest.approx(1 - scores["pair_accuracy"])
    assert others["reward_chosen"] == scores["reward_rejected"]


@pytest.mark.parametrize("loss", ["dpo", "cdpo", "robust", "hinge", "dpo-norm", "ipo", "apo-zero"])
def test_two_answers_that_are_the_same_pull_at_nothing(loss):
    log_p = torch.tensor(-12.34, requires_grad=True)
    pairs = PairLogProbs(log_p.repeat(1, 2), torch.full((1, 2), -12.0), torch.full((1, 2), 7.0))
    losses, scores = preference_loss(pairs, options(loss))
    losses.sum().backward()
    assert log_p.grad == 0
    assert means(scores, 1)["pair_accuracy"] == 0.5  # a tie


def test_a_tie_is_half_a_pair():
    pairs = PairLogProbs(*torch.tensor([
        [[-1.0, -2], [-2, -1], [-3, -3], [-4, -4]], [[-1.0, -1], [-1, -1], [-1, -1], [-9, -9]],
        [[1.0, 1], [1, 1], [1, 1], [1, 1]]]))
    scores = preference_loss(pairs, options())[1]
    assert means(scores, 4)["pair_accuracy"] == (1 + 0 + 0.5 + 0.5) / 4


def test_hinge_is_flat_beyond_its_margin():
    beta = 0.1
    for delta, flat in ((9.9, False), (10.1, True), (500.0, True), (-5.0, False)):
        pairs = pair_of((delta - 1, -1.0), (-1.0, -1.0))
        losses, _ = preference_loss(pairs, options("hinge", beta))
        assert (losses.item() == 0) == flat
        assert slope(pairs, options("hinge", beta)) == ([0, 0] if flat else [-beta, beta])


def test_ipo_is_smallest_at_the_margin_that_it_asks_for():
    tau = 0.25  # per token, 1/(2τ) = 2
    at = [preference_loss(pair_of((-4.0, -3.0), (-4 - 3 * m, -3.0), (3, 5)),
                          options("ipo", tau))[0].item() for m in (1.9, 2.0, 2.1)]
    assert at[1] == 0 and min(at[0], at[2]) > 1e-3
    assert slope(pair_of((-4.0, -3.0), (-10.0, -3.0), (3, 5)), options("ipo", tau)) == [0, 0]


def test_smoothed_labels():
    deltas = torch.linspace(-30, 30, 121, dtype=torch.float64)
    pairs = PairLogProbs(torch.stack((deltas, torch.zeros_like(deltas)), 1),
                         torch.zeros(121, 2).double(), torch.ones(121, 2).double())
    even = preference_loss(pairs, options("cdpo", label_smoothing=0.5))[0]
    assert deltas[even.argmin()] == 0 and torch.allclose(even, even.flip(0))
    assert slope(pair_of((-4.0, -4.0)), options("cdpo", label_smoothing=0.5)) == [0, 0]
    smoothed = preference_loss(pairs, options("cdpo", label_smoothing=0.1))[0]
    assert deltas[smoothed.argmin()] == 22  # ln(0.9/0.1) / β
    for loss in ("cdpo", "robust"):
        for ours, dpo in zip(preference_loss(pairs, options(loss, label_smoothing=0.0)),
                             preference_loss(pairs, options())):
            assert torch.equal(ours, dpo)


@pytest.mark.parametrize("loss", preference.NO_REFERENCE)
def test_these_losses_do_not_know_the_reference(loss):
    pairs = random_pairs()
    with_one = preference_loss(pairs, options(loss))
    without = preference_loss(pairs._replace(reference=None), options(loss))
    assert all(map(torch.equal, with_one, without))


def test_nll_adds_the_chosen_answers_loss_per_token():
    pairs = pair_of((-12.0, -3.0), (-12.0, -3.0), (4, 2))
    assert preference_loss(pairs, options(nll=0.5))[0].item() == pytest.approx(math.log(2) + 1.5)
    with_nll, without = slope(pairs, options(nll=0.5)), slope(pairs, options())
    assert with_nll == pytest.approx([without[0] - 0.5 / 4, without[1]])


def test_orpo_is_finite_for_a_token_that_is_certain():
    for dtype in (torch.float32, torch.float64):
        a = torch.tensor([0.0, -1e-30, -1e-9, -1e-7, -1e-6, -2e-6, -1e-3, -5, -100], dtype=dtype)
        policy = torch.cartesian_prod(a, a).requires_grad_()
        losses, _ = preference_loss(PairLogProbs(policy, None, torch.ones_like(policy)),
                                    options("orpo"))
        gradient, = torch.autograd.grad(losses.sum(), policy)
        assert losses.isfinite().all() and gradient.isfinite().all()
    # From 2e-6 on nothing is held back.
    inner = policy.detach()[(policy <= -2e-6).all(1) & (policy > -100).all(1)]
    losses, _ = preference_loss(PairLogProbs(inner, None, torch.ones_like(inner)), options("orpo"))
    for found, (w, l) in zip(losses.tolist(), inner.tolist()):
        assert found == pytest.approx(expected_loss(options("orpo"), (w, l), (0, 0), (1, 1)),
                                      rel=1e-9)


# --- pairs in a pack, and a model ---

def documents(count=6, seed=1):
    """Pairs as the loop has them: a common prompt, answers of unlike length, trained to the end."""
    generator = torch.Generator().manual_seed(seed)

    def pair():
        prompt, *answers = (torch.randint(96, (n,), generator=generator) for n in torch.randint(
            1, 9, (3,), generator=generator).tolist())
        return tuple((torch.cat((prompt, answer)), torch.cat((torch.full_like(prompt, -100),
                                                              answer))) for answer in answers)

    return [pair() for _ in range(count)]


def policy_model(method="lora", base="dense", at_start=False, **changes):
    """A model with adapters whose numbers all matter, or that has not learned yet."""
    model = ch3_models.build(base, method, **changes)
    model.loss = logprobs.chunked_log_probs
    if at_start:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.zero_()
    return model


def scored(model, pack, how):
    """(PairLogProbs, losses, scores) of a pack, the reference being the model without adapters."""
    frozen = None
    if how.loss not in preference.NO_REFERENCE:
        frozen = reference_file.reference_log_probs(model, pack)
    pairs = PairLogProbs.of(pack, model(**pack), frozen)
    return pairs, *preference_loss(pairs, how)


def gradients(model, total):
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(wanted, torch.autograd.grad(total, wanted.values(), retain_graph=True)))


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_before_the_first_step_dpo_is_ln_2_and_pulls_the_answers_apart(base):
    beta = 0.1
    model = policy_model(base=base, at_start=True)
    pairs, losses, scores = scored(model, collate_pairs(documents()), options(beta=beta))
    assert not pairs.s.any()  # to the last bit
    assert torch.equal(losses, torch.full((6,), math.log(2)))
    assert means(scores, 6)["pair_accuracy"] == 0.5 and means(scores, 6)["margin"] == 0
    found = gradients(model, losses.sum())
    # -(β/2) (∇ log π(y_w) - ∇ log π(y_l))
    expected = gradients(model, -(beta / 2) * pairs.policy[:, 0].sum()
                         + (beta / 2) * pairs.policy[:, 1].sum())
    assert any(gradient.any() for gradient in found.values())
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name


def test_a_pair_is_what_its_answers_are_alone():
    """Log p by hand: the tokens of the answer, each given those before it, in its own document."""
    model = policy_model()
    pairs, *_ = scored(model, collate_pairs(documents()), options())
    for row, pair in enumerate(documents()):
        for column, (ids, labels) in enumerate(pair):
            alone = ch3_models.packing.packed_sequence_collate_fn([(ids, ids)])
            logits = model(**ch3_models.inputs_of(alone)).double().log_softmax(-1)
            places = (labels >= 0).nonzero()[:, 0]
            expected = logits[places - 1, ids[places]].sum()
            close(pairs.policy[row, column].double(), expected.detach())
            assert pairs.tokens[row, column] == len(places)


def test_a_pair_of_the_same_answer_twice_pulls_at_nothing():
    model, (answer, _) = policy_model(), documents(1)[0]
    pairs, losses, _ = scored(model, collate_pairs([(answer, answer)]), options())
    found, alone = gradients(model, losses.sum()), gradients(model, 0.05 * pairs.policy[0, 0])
    for name, gradient in found.items():  # the two halves meet in sums, whose order is not the same
        assert gradient.abs().max() <= 1e-6 * alone[name].abs().max()


def test_collated_pairs_stand_next_to_each_other():
    (c0, r0), (c1, r1) = documents(2)
    pack = collate_pairs([(c0, r0), (c1, r1)])
    lengths = [len(ids) for ids, _ in (c0, r0, c1, r1)]
    assert pack["cu_seqlens"].diff().tolist() == lengths
    assert torch.equal(pack["input_ids"], torch.cat([ids for ids, _ in (c0, r0, c1, r1)]))


@pytest.mark.parametrize("how", [options(), options(nll=1.0), options("ipo"), options("orpo")],
                         ids=["dpo", "nll", "ipo", "orpo"])
def test_neither_the_packs_nor_the_order_matter(how):
    """The loop's formula: the sum over a pack's pairs, divided by the pairs of the step."""
    model, pairs = policy_model(), documents()

    def step(*packs):
        count, total = sum(map(len, packs)), 0
        model.zero_grad(set_to_none=True)
        for pack in packs:
            _, losses, scores = scored(model, collate_pairs(pack), how)
            (losses.sum() / count).backward()
            total += scores / count
        return total, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    scores, grads = step(pairs)
    for packs in ((pairs[:4], pairs[4:]), (pairs[:1], [], pairs[1:]), (pairs[::-1],)):
        others, other_grads = step(*packs)
        torch.testing.assert_close(others, scores, rtol=1e-5, atol=1e-5)
        for name, grad in grads.items():
            assert (other_grads[name] - grad).abs().max() < 1e-5 * grad.abs().max(), name
    unlike, _ = step(pairs[:5])
    assert not torch.allclose(unlike, scores, rtol=1e-3)


def test_a_pack_without_a_pair_pulls_at_nothing():
    for how in (options(), options(nll=1.0), options("orpo"), options("ipo")):
        model = policy_model()
        pairs, losses, scores = scored(model, collate_pairs([]), how)
        assert pairs.policy.shape == (0, 2) and losses.shape == (0,)
        assert scores.shape == (len(SCORES),) and not scores.any()
        (losses.sum() / 6).backward()
        assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_a_step_divides_by_all_of_its_pairs(tmp_path):
    """Three pairs as one pack, or as packs of two and of one: the same loss and gradient norm."""
    train_dpo = load("chapter-03/post_training/train_dpo.py")

    def record(n):
        return {"prompt": f"Say {n}.", "chosen": f"It is {n}.", "rejected": f"No, {n}!"}

    for name, numbers in (("data", (1, 2, 3)), ("held", (4,))):
        (tmp_path / f"{name}.jsonl").write_text("".join(
            json.dumps(record(n)) + "\n" for n in numbers))

    def first_step(run, *more):
        train_dpo.main([
            "--model", "tiny", "--data", str(tmp_path / "data.jsonl"), "--eval-data",
            str(tmp_path / "held.jsonl"), "--device", "cpu", "--dtype", "float32", "--steps", "1",
            "--eval-every", "0", "--save-every", "0", "--warmup", "0", "--nll", "1", "--out",
            str(tmp_path / run), *more])
        lines = map(json.loads, (tmp_path / run / "metrics.jsonl").read_text().splitlines())
        return next(line for line in lines if "grad_norm" in line)

    one = first_step("one", "--batch-tokens", "256")
    tokens = one["tokens"] // 3
    several = first_step("several", "--batch-tokens", str(2 * tokens + 1), "--grad-accum", "2")
    assert one["pairs"] == several["pairs"] == 3 and several["tokens"] == one["tokens"]
    for name in ("loss", "grad_norm", *SCORES[1:]):
        assert several[name] == pytest.approx(one[name], rel=1e-4), name
