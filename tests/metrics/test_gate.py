"""Gate metrics on matrices small enough to count by hand."""

import pytest
import torch

from timm_csg import metrics

GATE = torch.tensor([[1.0, 0.25, 0.0], [0.5, 1.0, 1.0]])


def test_density_owners_and_counts_by_hand():
    assert float(metrics.gate_density(GATE)) == pytest.approx(3.75 / 6)
    assert metrics.owners(GATE).tolist() == [0, 1, 1]
    assert metrics.filters_per_class(GATE, threshold=0.4).tolist() == [1, 3]
    assert metrics.classes_per_filter(GATE, threshold=0.4).tolist() == [2, 1, 1]


def test_agreement_is_the_share_of_filters_with_one_owner_by_both():
    information = torch.tensor([[0.2, 0.3, 0.0], [0.1, 0.1, 0.1]])
    assert float(metrics.owner_agreement(GATE, information)) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="the same shape"):
        metrics.owner_agreement(GATE, information[:1])


def test_binarity_is_one_for_zeros_and_ones_and_zero_for_halves():
    assert float(metrics.binarity(torch.eye(4))) == 1
    assert float(metrics.binarity(torch.ones(2, 3))) == 1
    assert float(metrics.binarity(torch.full((2, 3), 0.5))) == 0
    by_hand = 1 - 2 * (0 + 0.25 + 0 + 0.5 + 0 + 0) / 6
    assert float(metrics.binarity(GATE)) == pytest.approx(by_hand)


def test_counts_equal_a_loop_over_all_entries(random_gate):
    gate = random_gate(7, 20)
    counts = metrics.gate_counts(gate)
    entries = [float(entry) for entry in gate.flatten()]
    assert int(counts.owned) == sum(entry > 0.95 for entry in entries)
    assert int(counts.shared) == sum(entry > 0.5 for entry in entries)
    assert int(counts.between) == sum(0.05 < entry <= 0.95 for entry in entries)
    assert int(counts.exclusive) == sum(sum(float(entry) > 0.5 for entry in column) == 1 for column in gate.T)


def test_one_owner_for_each_filter_gives_the_counts_stated():
    counts = metrics.gate_counts(torch.nn.functional.one_hot(torch.arange(12) % 4).T.float())
    assert [int(count) for count in counts] == [12, 12, 0, 12]


def test_a_filter_that_serves_nobody_has_no_owner():
    assert metrics.owners(torch.tensor([[0.0, 0.5], [0.0, 0.0]])).tolist() == [-1, 0]
    peaks = metrics.Peaks(torch.ones(4, 2), torch.rand(4, 2, 2) * 32, torch.tensor([0, 0, 1, 1]), (32, 32))
    found = metrics.location_instability(peaks, torch.rand(4, 1, 2) * 32)
    own = found.by_owner(torch.tensor([-1, 1]))
    assert own[0].isnan()
    assert own[1] == found.per_filter[1, 1]


def test_pairs_with_nobodys_filter_are_neither_within_nor_across():
    similarity = torch.tensor([[1.0, 0.75, 0.25], [0.75, 1.0, 0.5], [0.25, 0.5, 1.0]])
    found = metrics.summarize_similarity(similarity, torch.tensor([-1, 0, 1]))
    assert (found.across, found.overall) == (0.5, 0.5)
    assert found.within != found.within
