"""packed_sequence_collate_fn and PackSampler."""

import numpy as np
import pytest
import torch
from helpers import load

packing = load("chapter-01/packing.py")


def test_collate_by_hand():
    documents = [([7, 8], [7, 8]), ([5], [5]), ([9, 4, 6], [-100, 4, 6])]
    pack = packing.packed_sequence_collate_fn(
        [(torch.tensor(ids), torch.tensor(labels)) for ids, labels in documents])
    assert pack["input_ids"].tolist() == [7, 8, 5, 9, 4, 6]
    assert pack["labels"].tolist() == [8, -100, -100, 4, 6, -100]
    assert pack["position_ids"].tolist() == [0, 1, 0, 0, 1, 2]
    assert pack["cu_seqlens"].tolist() == [0, 2, 3, 6]
    assert pack["max_seqlen"] == 3
    assert pack["cu_seqlens"].dtype == torch.int32
    assert all(pack[k].dtype == torch.int64 for k in ("input_ids", "labels", "position_ids"))


def test_incident_7_no_target_crosses_a_border():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 20, (50,), generator=generator).tolist()
    examples = [(torch.full((n,), i), torch.full((n,), i)) for i, n in enumerate(lengths)]
    pack = packing.packed_sequence_collate_fn(examples)
    ends = pack["cu_seqlens"][1:].long() - 1
    assert (pack["labels"][ends] == -100).all()
    trained = pack["labels"] != -100
    assert (pack["labels"] == pack["input_ids"])[trained].all()
    assert int(trained.sum()) == sum(n - 1 for n in lengths)


def sampler_of(seed=0, count=200, budget=100):
    lengths = np.random.default_rng(5).integers(1, 60, count)
    return lengths, packing.PackSampler(lengths, budget, seed)


def test_every_epoch_holds_every_document_once_within_the_budget():
    lengths, sampler = sampler_of()
    for epoch in range(3):
        packs = [sampler.pack(i)
                 for i in range(sampler.packs_in(epoch), sampler.packs_in(epoch + 1))]
        assert sorted(sum(packs, [])) == list(range(len(lengths)))
        assert all(lengths[pack].sum() <= 100 for pack in packs)
        # Nothing more would have fitted: a pack ends where the next document is too long.
        for pack, following in zip(packs, packs[1:]):
            assert lengths[pack].sum() + lengths[following[0]] > 100


def test_epochs_differ_and_the_seed_fixes_them():
    _, sampler = sampler_of()
    epochs = [[sampler.pack(sampler.packs_in(e) + i) for i in range(5)] for e in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] == [sampler_of()[1].pack(i) for i in range(5)]
    assert epochs[0] != [sampler_of(seed=1)[1].pack(i) for i in range(5)]


def test_incident_16_any_pack_can_be_asked_for_first():
    _, sampler = sampler_of()
    in_order = [sampler.pack(i) for i in range(400)]
    fresh = sampler_of()[1]
    assert fresh.pack(399) == in_order[399]
    assert [fresh.pack(i) for i in (0, 250, 3, 120)] == [in_order[i] for i in (0, 250, 3, 120)]


def test_without_a_seed_the_order_is_the_datas():
    sampler = packing.PackSampler([3, 4, 2, 5, 1], 8, seed=None)
    assert [sampler.pack(i) for i in range(sampler.packs_in(1))] == [[0, 1], [2, 3, 4]]


@pytest.mark.parametrize("lengths", [[], [3, 9]])
def test_sampler_refuses_what_it_cannot_pack(lengths):
    with pytest.raises(ValueError):
        packing.PackSampler(lengths, 8, seed=0)
