"""Static shapes: the same documents, dummy ones after them, the same numbers out of the model."""

import numpy as np
import pytest
import torch
from helpers import load

packing = load("chapter-03/packing.py")
llama = load("chapter-03/modeling_llama.py")
StaticShape, collate = packing.StaticShape, packing.packed_sequence_collate_fn
FIELDS = ("input_ids", "labels", "position_ids", "cu_seqlens")


def documents(*lengths, vocabulary=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(ids, ids.clone()) for ids in
            (torch.randint(vocabulary, (n,), generator=generator) for n in lengths)]


def test_collate_by_hand():
    examples = [(torch.tensor(ids), torch.tensor(ids)) for ids in ([7, 8], [5], [9, 4, 6])]
    pack = collate(examples, StaticShape(tokens=8, documents=5, max_seqlen=4))
    assert pack["input_ids"].tolist() == [7, 8, 5, 9, 4, 6, 0, 0]
    assert pack["labels"].tolist() == [8, -100, -100, 4, 6, -100, -100, -100]
    assert pack["position_ids"].tolist() == [0, 1, 0, 0, 1, 2, 0, 1]
    assert pack["cu_seqlens"].tolist() == [0, 2, 3, 6, 8, 8]
    assert pack["max_seqlen"] == 4 and pack["labelled"].tolist() == [0, 3, 4]
    plain = collate(examples)
    assert plain["cu_seqlens"].tolist() == [0, 2, 3, 6] and plain["max_seqlen"] == 3


def test_without_a_shape_it_is_chapter_1():
    one = load("chapter-01/packing.py").packed_sequence_collate_fn(documents(3, 9, 1))
    three = collate(documents(3, 9, 1))
    assert {*one, "labelled"} == {*three} and one["max_seqlen"] == three["max_seqlen"]
    assert all(torch.equal(one[k], three[k]) and one[k].dtype == three[k].dtype for k in FIELDS)


@pytest.mark.parametrize("high, budget", [(60, 100), (5, 100), (60, 60), (2, 50)])
def test_every_pack_of_the_run_fits_the_shape_which_is_no_larger_than_needed(high, budget):
    random = np.random.default_rng(0)
    samplers = [packing.PackSampler(random.integers(1, high + 1, count), budget, seed)
                for count, seed in ((300, 1), (20, None))]
    packs = samplers[0].packs_in(3) - 2, samplers[1].packs_in(1)
    shape = StaticShape.of(*zip(samplers, packs))
    most = []
    for sampler, count in zip(samplers, packs):
        shapes = set()
        for index in range(count):
            chosen = [int(sampler.lengths[i]) for i in sampler.pack(index)]
            pack = collate(documents(*chosen), shape)
            shapes.add((*(tuple(pack[k].shape) for k in FIELDS), pack["max_seqlen"]))
            lengths = pack["cu_seqlens"].diff()
            assert lengths.max() <= shape.max_seqlen and lengths[:len(chosen)].tolist() == chosen
            assert (pack["labels"] != -100).sum() == sum(n - 1 for n in chosen)
            most.append(int((lengths > 0).sum()))
        assert shapes == {((budget,), (budget,), (budget,), (shape.documents + 1,), high)}
    assert shape.documents == max(most)


@pytest.mark.parametrize("shape", [(20, 9, 9), (40, 3, 16), (40, 9, 15)])
def test_what_does_not_fit_is_an_error(shape):  # too few tokens, documents, too short a limit
    collate(documents(5, 16, 2), StaticShape(40, 5, 16))
    with pytest.raises(ValueError, match="do not fit"):
        collate(documents(5, 16, 2), StaticShape(*shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_changes_nothing(dtype):
    torch.manual_seed(0)
    model = llama.LlamaForCausalLM(llama.LlamaConfig.from_dict(dict(
        model_type="qwen3", vocab_size=64, hidden_size=32, intermediate_size=48, head_dim=16,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, rope_theta=1e4,
        max_position_embeddings=64, tie_word_embeddings=True)))
    model.compute_dtype = dtype
    examples = documents(7, 1, 20, 2)
    results = []
    for shape in (None, StaticShape(30, 4, 30), StaticShape(64, 12, 20)):
        model.zero_grad()
        loss = model(**collate(examples, shape))
        loss.backward()
        inputs = {k: v for k, v in collate(examples, shape).items() if k != "labels"}
        results.append((loss, model(**inputs)[:30], [p.grad for p in model.parameters()]))
    for loss, logits, gradients in results[1:]:
        scale = 1e-6 if dtype == torch.float32 else 1e-2  # a product's rows may be cut otherwise
        assert abs(loss - results[0][0]) <= scale * results[0][0]
        assert (logits - results[0][1]).abs().max() <= scale * results[0][1].abs().max()
        for ours, plain in zip(gradients, results[0][2]):
            assert (ours - plain).norm() <= 10 * scale * plain.norm()
