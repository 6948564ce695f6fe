"""L0, alive, histogram and density, counted by hand; additive over batches."""

import pytest
import torch

from spd_hydra.metric.activity import BINS, Activity

G = torch.tensor([[0.0, 0.1, 0.05], [1.0, 0.1, 0.2], [0.5, 0.0, 0.0], [0.0, 0.0, 0.3]])


def counted(*batches: torch.Tensor, threshold: float = 0.1) -> Activity:
    activity = Activity(threshold)
    for batch in batches:
        activity.add({"site": batch})
    return activity


def test_active_means_strictly_above_the_threshold() -> None:
    activity = counted(G)
    assert activity.positions == 4
    assert activity.sites["site"].active.tolist() == [2.0, 0.0, 2.0]
    assert activity.l0() == {"site": 1.0}
    assert activity.alive() == {"site": 2}


def test_threshold_zero_counts_everything_that_is_not_zero() -> None:
    activity = counted(G, threshold=0.0)
    assert activity.l0() == {"site": 7 / 4}
    assert activity.alive() == {"site": 3}


def test_sums_peaks_and_histogram_are_those_of_the_data() -> None:
    site = counted(G).sites["site"]
    assert site.sum_ci.tolist() == pytest.approx([1.5, 0.2, 0.55])
    assert site.peak.tolist() == pytest.approx([1.0, 0.1, 0.3])
    by_hand = [0] * BINS
    for g in G.flatten().tolist():
        by_hand[min(int(g * BINS + 1e-6), BINS - 1)] += 1
    assert site.histogram.tolist() == by_hand
    assert site.histogram.sum() == G.numel()


def test_batches_add_up_to_one_large_batch() -> None:
    whole, parts = counted(G), counted(G[:1], G[1:3], G[3:])
    assert parts.positions == whole.positions
    for total, added in zip(whole.sites["site"], parts.sites["site"], strict=True):
        torch.testing.assert_close(added, total)
    assert parts.l0() == whole.l0()
    assert parts.alive() == whole.alive()


def test_positions_may_have_several_dimensions() -> None:
    flat, shaped = counted(G), counted(G.view(2, 2, 3))
    assert shaped.positions == 4
    assert shaped.l0() == flat.l0()
    assert torch.equal(shaped.sites["site"].sum_ci, flat.sites["site"].sum_ci)


def test_padding_is_not_counted() -> None:
    padded = torch.cat([G, torch.ones(2, G.shape[1])])
    activity = Activity(0.1)
    activity.add({"site": padded}, torch.tensor([True] * len(G) + [False] * 2))
    assert activity.positions == len(G)
    for ours, theirs in zip(activity.sites["site"], counted(G).sites["site"], strict=True):
        assert torch.equal(ours, theirs)


def test_a_batch_of_nothing_but_padding_counts_nothing() -> None:
    activity = counted(G)
    activity.add({"site": torch.ones(2, 3)}, torch.tensor([False, False]))
    assert activity.positions == len(G)
    assert activity.alive() == counted(G).alive()
    alone = Activity(0.1)
    alone.add({"site": torch.ones(2, 3)}, torch.tensor([False, False]))
    assert alone.positions == 0
    assert alone.alive() == {"site": 0}
    assert not alone.sites["site"].histogram.any()


def test_sites_are_counted_apart_and_may_differ_in_size() -> None:
    activity = Activity(0.1)
    activity.add({"a": G, "b": torch.ones(4, 2)})
    assert activity.positions == 4
    assert activity.l0() == {"a": 1.0, "b": 2.0}


def test_importances_outside_the_unit_interval_fall_into_the_outer_bins() -> None:
    histogram = counted(torch.tensor([[-0.01, 1.02]])).sites["site"].histogram
    assert histogram[0] == 1
    assert histogram[-1] == 1


def test_the_histogram_counts_more_values_than_float32_can() -> None:
    n = 2**24 + 3
    histogram = counted(torch.zeros(1, 1).expand(n, 1)).sites["site"].histogram
    assert histogram[0] == n
