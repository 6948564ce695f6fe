"""Routing: which sites are masked where, and with what frequencies."""

from itertools import combinations

import pytest
import torch
from scipy import stats

from spd_hydra import rng
from spd_hydra.decomposition.routing import Routing, columns_needed, routes

SITES = ["a", "b", "c"]
N = 60_000


def draws(routing: Routing, n_sites: int = 3, n: int = N) -> torch.Tensor:
    columns = rng.columns("routing", columns_needed(routing, n_sites))
    return rng.uniform(rng.key(0, "routing"), torch.arange(n, dtype=torch.int32), columns)


def subset_masks(routing: Routing, *, sites: list[str] = SITES, probability: float = 0.5) -> torch.Tensor:
    """The only dictionary of a draw as `[positions, sites]`."""
    (found,) = routes(routing, sites, draws=draws(routing, len(sites)), probability=probability)
    assert list(found) == sites
    columns = [mask for mask in found.values() if mask is not None]
    return torch.stack(columns, dim=-1)


def test_all_routes_every_site_everywhere_in_one_pass() -> None:
    assert list(routes(Routing.all, SITES, draws=draws(Routing.all), probability=0.5)) == [
        {"a": None, "b": None, "c": None}
    ]


def test_layerwise_routes_one_site_per_pass() -> None:
    assert list(routes(Routing.layerwise, SITES, draws=draws(Routing.layerwise), probability=0.5)) == [
        {"a": None},
        {"b": None},
        {"c": None},
    ]


def test_columns_needed() -> None:
    assert {routing.name: columns_needed(routing, 5) for routing in Routing} == {
        "all": 0,
        "layerwise": 0,
        "uniform_k": 6,
        "static": 5,
    }


@pytest.mark.parametrize("n_sites", [1, 2, 3, 5, 7])
def test_uniform_k_draws_the_size_of_the_subset_uniformly_from_one_to_all(n_sites: int) -> None:
    chosen = subset_masks(Routing.uniform_k, sites=[str(i) for i in range(n_sites)])
    sizes = torch.bincount(chosen.sum(-1), minlength=n_sites + 1)
    assert sizes[0] == 0
    assert len(sizes) == n_sites + 1
    if n_sites > 1:
        assert stats.chisquare(sizes[1:].numpy()).pvalue > 1e-4


@pytest.mark.parametrize("n_sites", [3, 4])
def test_uniform_k_draws_every_subset_of_a_size_equally_often(n_sites: int) -> None:
    chosen = subset_masks(Routing.uniform_k, sites=[str(i) for i in range(n_sites)])
    codes = (chosen.long() * 2 ** torch.arange(n_sites)).sum(-1)
    for k in range(1, n_sites):
        subsets = [sum(2**i for i in subset) for subset in combinations(range(n_sites), k)]
        counts = [int((codes == code).sum()) for code in subsets]
        assert stats.chisquare(counts).pvalue > 1e-4


def test_static_routes_each_site_independently_with_its_probability() -> None:
    chosen = subset_masks(Routing.static, probability=0.3)
    codes = torch.bincount((chosen.long() * torch.tensor([1, 2, 4])).sum(-1), minlength=8)
    expected = [N * 0.3 ** bin(code).count("1") * 0.7 ** (3 - bin(code).count("1")) for code in range(8)]
    assert stats.chisquare(codes.numpy(), expected).pvalue > 1e-4


def test_static_with_probability_one_routes_everything() -> None:
    assert subset_masks(Routing.static, probability=1.0).all()


def test_subsets_of_different_positions_are_independent() -> None:
    chosen = subset_masks(Routing.uniform_k).float()
    correlation = torch.corrcoef(torch.stack([chosen[:-1, 0], chosen[1:, 0]]))[0, 1]
    assert abs(correlation) < 4.5 / N**0.5


def test_a_hand_made_draw_chooses_the_k_lowest_scores() -> None:
    given = torch.tensor(
        [
            [0.9, 0.1, 0.5, 0.0],  # k = 1 → b
            [0.9, 0.1, 0.5, 0.5],  # k = 2 → b, c
            [0.9, 0.1, 0.5, 0.99],  # k = 3 → all
        ]
    )
    (found,) = routes(Routing.uniform_k, SITES, draws=given, probability=0.5)
    assert {site: mask.tolist() for site, mask in found.items() if mask is not None} == {
        "a": [False, False, True],
        "b": [True, True, True],
        "c": [False, True, True],
    }


@pytest.mark.parametrize("n_sites", range(1, 40))
def test_the_largest_draw_still_gives_at_most_all_sites(n_sites: int) -> None:
    largest = torch.full((1,), 1 - 2**-24)
    assert 1 + (largest * n_sites).floor() == n_sites


def test_positions_may_have_any_shape() -> None:
    flat = draws(Routing.uniform_k)[:24]
    (found,) = routes(Routing.uniform_k, SITES, draws=flat.reshape(2, 3, 4, 4), probability=0.5)
    (expected,) = routes(Routing.uniform_k, SITES, draws=flat, probability=0.5)
    for site in SITES:
        assert torch.equal(found[site], expected[site].reshape(2, 3, 4))
