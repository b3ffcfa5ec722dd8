"""Answers that a model draws itself: `generate`'s if it is greedy, from exactly the distribution
that is trained if not, and the same whatever else is drawn beside them."""

from types import SimpleNamespace

import ch3_models
import numpy as np
import pytest
import torch
from checks import refused
from helpers import load
from live_memory import LivePeak

from common.asking.generation import generate
from common.predict import Prediction

rollout_file = load("chapter-03/post_training/rollout.py")
batches_file = load("chapter-03/post_training/batches.py")
logprobs = load("chapter-03/post_training/logprobs.py")
nf4 = load("chapter-03/nf4.py")
rollout, draw, document = rollout_file.rollout, rollout_file.draw, batches_file.document

LIMIT, GROUP = 12, 3
PROMPTS = [torch.randint(96, (n,), generator=torch.Generator().manual_seed(n)).tolist()
           for n in (7, 2, 19, 1, 11)]


def build(*how):
    """A model surer of itself than those of other tests, and in which all that was said matters."""
    return ch3_models.build(*how, tie_word_embeddings=False, initializer_range=0.3)


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def stops(model):
    """Three stop ids with which some answers end and others are cut: what it writes often."""
    drawn = rollout(model, PROMPTS, GROUP, LIMIT, set(), seed=(9,))
    counts = np.bincount(sum((one.ids for one in drawn), []), minlength=96)
    return {*counts.argsort()[-3:].tolist()}


def ids_of(answers):
    return [one.ids for one in answers]


# --- against generate ---

@pytest.mark.parametrize("room", [2**62, 70])
def test_greedy_answers_are_generates_one_by_one(model, room):
    plain = [generate(model, [prompt], LIMIT)[0] for prompt in PROMPTS]
    assert all(len({*one}) > 3 for one in plain)
    stop_ids = {plain[0][3], plain[2][0], plain[4][6]}  # one ends at its first token
    found = rollout(model, PROMPTS, GROUP, LIMIT, stop_ids, temperature=0.0, room=room)
    assert len(found) == len(PROMPTS) * GROUP
    lengths = set()
    for n, prompt in enumerate(PROMPTS):
        expected, = generate(model, [prompt], LIMIT, stop_ids)
        for one in found[n * GROUP:(n + 1) * GROUP]:
            assert one.finished == (len(expected) < LIMIT)
            assert (one.ids[:-1] if one.finished else one.ids) == expected
            assert not one.finished or one.ids[-1] in stop_ids
        lengths.add(len(one.ids))
    assert len(lengths) > 2 and 1 in lengths and LIMIT in lengths


# --- against the training pass ---

CASES = [("dense", "full"), ("dense", "lora"), ("nf4", "full"), ("nf4", "lora"), ("dense", "pissa")]


def trained_log_probs(model, temperature, answers):
    """log p of the answers' tokens in one packed pass, as train_grpo.py computes it."""
    asked = [prompt for prompt in PROMPTS for _ in range(GROUP)]
    pack = ch3_models.packing.packed_sequence_collate_fn([*map(document, asked, ids_of(answers))])
    model.loss = lambda hidden, *rest: logprobs.chunked_log_probs(hidden / temperature, *rest)
    with torch.no_grad():
        logits = model(**ch3_models.inputs_of(pack))[pack["labelled"]]
        return model(**pack)[pack["labelled"]], logits


@pytest.mark.parametrize("temperature, dtype, bound", [
    (1.0, torch.float32, 1e-5), (0.7, torch.float64, 2e-6)])  # kept in float32 in any case
@pytest.mark.parametrize("how", CASES, ids="-".join)
def test_log_probs_are_those_of_the_training_pass(how, temperature, dtype, bound, stops):
    model = build(*how).to(dtype)
    model.compute_dtype = dtype
    answers = rollout(model, PROMPTS, GROUP, LIMIT, stops, temperature, (3,))
    lengths = [len(one.ids) for one in answers]
    assert 3 < len({*lengths}) and LIMIT in lengths  # so the cache has shrunk on the way
    log_p, logits = trained_log_probs(model, temperature, answers)
    kept = torch.tensor(sum((one.log_probs for one in answers), []))
    assert (log_p - kept).abs().max() <= bound
    truth = (logits.double() / temperature).log_softmax(-1)
    entropies = torch.tensor(sum((one.entropies for one in answers), []))
    assert (entropies + (truth.exp() * truth).sum(-1)).abs().max() <= bound
    other, _ = trained_log_probs(model, 1.3, answers)
    assert (other - kept).abs().max() > 0.1


def test_greedy_log_probs_are_those_at_temperature_1(model):
    answers = rollout(model, PROMPTS, GROUP, LIMIT, set(), temperature=0.0)
    kept = torch.tensor(sum((one.log_probs for one in answers), []))
    assert (trained_log_probs(model, 1.0, answers)[0] - kept).abs().max() <= 1e-5


# --- seeds ---

def test_the_same_seed_gives_the_same_answers_whatever_is_drawn_beside(stops):
    """In float64, as sums of a batch of another size are rounded differently: in float32 a draw
    that falls within 1e-6 of the border between two tokens may take the other one."""
    model = build().double()
    model.compute_dtype = torch.float64

    def answers(prompts, group=GROUP, **how):
        return ids_of(rollout(model, prompts, group, LIMIT, stops, **{"seed": (5, 1), **how}))
    expected = answers(PROMPTS)
    assert answers(PROMPTS) == expected
    for room in (1, 40, 61, 150, 300):
        assert answers(PROMPTS, room=room) == expected, room
    for count in range(1, len(PROMPTS)):
        assert answers(PROMPTS[:count]) == expected[:count * GROUP]
    assert answers(PROMPTS, 1) == expected[::GROUP]
    assert answers(PROMPTS[:2], 5)[:3] == expected[:3]
    for seed in ((5, 2), (6, 1), (5,)):
        others = answers(PROMPTS, seed=seed)
        assert sum(map(list.__ne__, others, expected)) > len(expected) / 2
    for n in range(0, len(expected), GROUP):  # nor are the answers of a group the same
        assert expected[n] != expected[n + 1] != expected[n + 2]
    same = answers([PROMPTS[0]] * 2)
    assert same[:GROUP] != same[GROUP:]


# --- where answers end ---

def test_the_stop_token_is_kept_and_trained_and_cut_answers_are_told(model, stops):
    answers = rollout(model, PROMPTS, 8, LIMIT, stops, seed=(2,))
    assert {one.ids[-1] for one in answers if one.finished} == stops
    for one in answers:
        assert one.finished == (one.ids[-1] in stops)
        assert not stops & {*one.ids[:-1]} and 1 <= len(one.ids) <= LIMIT
        assert one.finished or len(one.ids) == LIMIT
        assert len(one.ids) == len(one.log_probs) == len(one.entropies)
        assert all(log_p <= 0 < entropy for log_p, entropy in zip(one.log_probs, one.entropies))
    assert 4 < sum(one.finished for one in answers) < len(answers) - 4
    # One that ends with the last token that it may have is not cut.
    first = rollout(model, PROMPTS[:1], 1, 4, set(), temperature=0.0)[0].ids
    assert first[3] not in first[:3]
    last, = rollout(model, PROMPTS[:1], 1, 4, {first[3]}, temperature=0.0)
    assert last.ids == first and last.finished


def test_a_document_is_a_prompt_and_its_answer_which_alone_is_trained():
    ids, labels = document([5, 6, 7], [8, 2])
    assert ids.tolist() == [5, 6, 7, 8, 2] and labels.tolist() == [-100, -100, -100, 8, 2]
    pack = ch3_models.packing.packed_sequence_collate_fn([(ids, labels)])
    assert pack["labels"].tolist() == [-100, -100, 8, 2, -100]  # the stop token has one too


# --- drawing ---

def table(rows=4, vocabulary=50, spread=3.0):
    torch.manual_seed(0)
    return spread * torch.randn(rows, vocabulary)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_tokens_are_drawn_from_exactly_the_softmax(temperature):
    """Of draws that are evenly spread over [0, 1) each token gets its share, to one draw."""
    count = 2**14
    for logits in table():
        u = (torch.arange(count) + 0.5) / count
        tokens, log_p, entropy = draw(logits.expand(count, -1), temperature, u)
        truth = (logits.double() / temperature).log_softmax(-1)
        shares = torch.bincount(tokens, minlength=50).double()
        assert (shares - count * truth.exp()).abs().max() < 1.01
        assert (log_p - truth[tokens]).abs().max() < 1e-5
        assert (entropy + (truth.exp() * truth).sum()).abs().max() < 1e-5
        assert (tokens.diff() >= 0).all()  # running sums of the vocabulary's own order


def test_each_row_is_drawn_with_its_own_draw_however_many_there_are():
    """More rows of a large vocabulary than are taken at a time."""
    logits = table(9, 300_000, 1.0)
    u = torch.rand(9, generator=torch.Generator().manual_seed(1))
    tokens, log_p, entropies = draw(logits, 0.9, u)
    truth = (logits.double() / 0.9).log_softmax(-1)
    sums = truth.exp().cumsum(-1)
    for n in range(9):
        token = tokens[n]
        assert sums[n, token] - truth[n, token].exp() - 1e-5 < u[n] < sums[n, token] + 1e-5
        assert log_p[n].item() == pytest.approx(truth[n, token].item(), abs=1e-5)
        assert entropies[n].item() == pytest.approx(-(truth[n].exp() * truth[n]).sum().item(),
                                                    abs=1e-4)
    alone = [one.item() for one in draw(logits[4:5], 0.9, u[4:5])]
    assert alone == pytest.approx([tokens[4].item(), log_p[4].item(), entropies[4].item()])


@pytest.mark.parametrize("temperature", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_impossible_token_is_never_drawn(temperature, dtype):
    """At either end of the vocabulary and within it; and such a one makes no number NaN."""
    logits = table(1, 40)[0]
    impossible = torch.tensor([0, 1, 7, 20, 21, 22, 38, 39])
    logits[impossible] = -torch.inf
    u = torch.cat((torch.tensor([0.0, 2**-24, 1 - 2**-24, 1 - 2**-23]), torch.rand(2000)))
    tokens, log_p, entropy = draw(logits.to(dtype).expand(len(u), -1), temperature, u)
    assert not torch.isin(tokens, impossible).any()
    assert log_p.isfinite().all() and entropy.isfinite().all()
    truth = (logits.to(dtype).double() / (temperature or 1)).log_softmax(-1)
    assert (log_p - truth[tokens]).abs().max() < 1e-5
    assert (entropy + (truth.exp() * truth).nansum()).abs().max() < 1e-5
    assert log_p.dtype == torch.float32


def test_a_certain_token_is_always_drawn_and_nothing_is_left_to_chance():
    logits = torch.full((3, 30), -torch.inf)
    logits[range(3), [0, 13, 29]] = torch.tensor([-5.0, 0, 200])
    for u in (0.0, 0.5, 1 - 2**-24):
        tokens, log_p, entropies = draw(logits, 1.0, torch.full((3,), u))
        assert tokens.tolist() == [0, 13, 29] and not log_p.any() and not entropies.any()
    large = table(3, 30) * 1e4  # p of the others is 0 in float32, their log p is not
    tokens, log_p, entropies = draw(large, 1.0, torch.full((3,), 1 - 2**-24))
    assert torch.equal(tokens, large.argmax(-1)) and not entropies.any()


def test_temperature_0_takes_the_likeliest():
    logits = table()
    tokens, log_p, entropies = draw(logits, 0.0, torch.rand(4))
    truth = logits.double().log_softmax(-1)
    assert torch.equal(tokens, logits.argmax(-1))
    assert (log_p - truth.amax(-1)).abs().max() < 1e-5
    assert (entropies + (truth.exp() * truth).sum(-1)).abs().max() < 1e-5


# --- the model ---

def test_dropout_is_off_meanwhile_and_on_again_afterwards():
    model = ch3_models.build()
    ch3_models.lora.apply_adapter(model, ch3_models.lora.AdapterConfig(
        "lora", rank=4, alpha=64.0, dropout=0.5))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.train()
    answers = rollout(model, PROMPTS, GROUP, LIMIT, set(), seed=(1,))
    assert model.training and all(module.training for module in model.modules())
    kept = torch.tensor(sum((one.log_probs for one in answers), []))
    assert (trained_log_probs(model, 1.0, answers)[0] - kept).abs().max() > 0.1
    model.eval()
    assert (trained_log_probs(model, 1.0, answers)[0] - kept).abs().max() <= 1e-5
    assert ids_of(rollout(model, PROMPTS, GROUP, LIMIT, set(), seed=(1,))) == ids_of(answers)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored_after_an_error_too(training):
    model, calls = ch3_models.build().train(training), []

    def fail(*_):
        calls.append(model.training)
        if len(calls) == 3:
            raise KeyboardInterrupt
    model.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        rollout(model, PROMPTS, GROUP, LIMIT, set())
    assert calls == [False] * 3 and torch.is_grad_enabled()
    assert all(module.training == training for module in model.modules())


def test_no_gradient_is_kept(model):
    seen = []
    handle = model.register_forward_hook(lambda *a: seen.append(a[-1].requires_grad))
    rollout(model, PROMPTS, GROUP, LIMIT, set())
    handle.remove()
    assert len(seen) == LIMIT and not any(seen)


def test_what_does_not_fit_the_model_is_one_line(model):
    longest = model.config.max_position_embeddings
    assert longest == 128
    rollout(model, [PROMPTS[0] * 17 + [1]], 2, 8, set())  # 120 + 8
    with refused("129 tokens, more than the model takes", "--max-new-tokens"):
        rollout(model, [PROMPTS[1], PROMPTS[0] * 17 + [1, 2]], 2, 8, set())


@pytest.mark.parametrize("temperature", [1.0, 0.0])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_are_one_line(temperature, value):
    model = ch3_models.build()
    model.train()
    model.model.norm.weight.data.fill_(value)
    with refused("logits are not finite numbers", "--dtype float32"):
        rollout(model, PROMPTS, GROUP, LIMIT, set(), temperature)
    assert model.training


# --- how many at a time ---

def test_batches_hold_every_row_once_and_fit():
    random = np.random.default_rng(0)
    for _ in range(300):
        count, group, limit = random.integers(1, 9), random.integers(1, 6), random.integers(1, 20)
        lengths = random.integers(1, 30, count).tolist()
        room = int(random.integers(1, 400))
        found = batches_file.batches(lengths, group, limit, room)
        assert sorted(sum(found, [])) == list(range(count * group)) and all(found)
        longest = [max(lengths[row // group] for row in rows) + limit for rows in found]
        assert all(len(rows) == 1 or len(rows) * most <= room
                   for rows, most in zip(found, longest))
        # None ends early: its successor's first row would not have fitted.
        for rows, (after, *_) in zip(found, found[1:]):
            assert (len(rows) + 1) * (lengths[after // group] + limit) > room
        assert longest == sorted(longest)  # prompts of like length together
    assert batches_file.batches([3, 5], 2, 4, 2**62) == [[0, 1, 2, 3]]
    assert batches_file.batches([9, 1, 9], 2, 1, 20) == [[2, 3], [0, 1], [4, 5]]


class Seen(rollout_file.KVCache):
    """A cache that notes the most bytes of its keys and values, with the rows that it has then."""

    most = (0, 0, 0)

    def keep(self, rows):
        super().keep(rows)
        size = sum(one.nbytes for both in self.layers.values() for one in both)
        Seen.most = max(Seen.most, (size, self.documents, self.room))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_room_is_counted_as_the_caches_tensors_are(dtype, monkeypatch, capsys):
    """The bytes of real caches: in each layer keys and values of the whole of every row."""
    monkeypatch.setattr(rollout_file, "KVCache", Seen)
    Seen.most = (0, 0, 0)
    model = ch3_models.build()
    model.compute_dtype = dtype
    longest = 19 + LIMIT
    rollout(model, PROMPTS, GROUP, LIMIT, set())
    size, rows, room = Seen.most
    assert (rows, room) == (len(PROMPTS) * GROUP, longest)
    layers = model.config.num_hidden_layers
    row = size // rows * (layers + 1) // layers + dtype.itemsize * model.config.vocab_size
    options = SimpleNamespace(device="cpu", dtype=str(dtype).removeprefix("torch."))

    def asked(free, answers, **more):
        predicted = Prediction({"weights": 5000, "optimizer moments": 700, **more,
                                "activations": free - 100, "gradients": 100})
        found = batches_file.add_rollout(predicted, model.config, options, answers, longest)
        return found, predicted.pop("KV cache beyond a step", 0), predicted.peak
    for fit, free in ((4, 4 * row), (3, 4 * row - 1), (4, 5 * row - 1)):
        assert asked(free, 100) == (fit * longest, 0, 5700 + free)
    assert asked(50 * row, 15) == (15 * longest, 0, 5700 + 50 * row)  # there are no more
    assert asked(row - 40, 100)[:2] == (longest, 40)  # a single one needs more than a step
    assert asked(4 * row, 100, **{"reference model": 10**6})[:2] == (4 * longest, 0)
    assert "4 of 100 answers at a time" in capsys.readouterr().out


def test_a_teacher_leaves_its_memory_to_nobody():
    """train_distill.py adds "teacher" to what is predicted, and it is there during a rollout."""
    config = ch3_models.build().config
    options = SimpleNamespace(device="cpu", dtype="float32")
    found = [batches_file.add_rollout(Prediction({
        "weights": 5000, "activations": 10**5, name: 10**6}), config, options, 100, 20)
        for name in ("reference model", "teacher")]
    assert found[0] == found[1]


@pytest.mark.parametrize("count", [4, 15])
def test_a_rollout_needs_no_more_than_predicted(count):
    """All that is alive meanwhile; answers are long, so that the cache is the most of it."""
    model = ch3_models.build(max_position_embeddings=2048)
    options = SimpleNamespace(device="cpu", dtype="float32")
    limit, prompts = 250, [one * 3 for one in PROMPTS]
    longest = max(map(len, prompts)) + limit
    row = 2 * 2 * 16 * 4 * (3 + 1) * longest + 4 * 96
    room = batches_file.add_rollout(Prediction({"activations": count * row}), model.config, options,
                                 15, longest)
    assert room == count * longest
    stops = {5, 40, 77}  # a few end, and the cache is copied
    with LivePeak() as live:
        rollout(model, prompts, GROUP, limit, stops, room=room)
    assert 0.5 * count * row < live.grown < 1.05 * count * row


def test_weights_are_kept_where_a_quarter_of_a_steps_memory_holds_them():
    shapes = ch3_models.build("nf4", "lora")
    whole = 2 * sum(layer.shape.numel() for layer in shapes.modules()
                    if isinstance(layer, nf4.NF4Linear))
    options = SimpleNamespace(dtype="bfloat16")
    for free, kept in ((4 * whole, whole), (4 * whole - 1, 0)):
        predicted = Prediction({"weights": 7, "optimizer moments": 5, "activations": free})
        assert batches_file.keeps_weights(predicted, shapes, options) == kept
    dense = ch3_models.build("dense", "lora")
    assert batches_file.keeps_weights(predicted, dense, options) == 0
