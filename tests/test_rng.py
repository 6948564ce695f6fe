"""Counter-based random numbers: uniform, uncorrelated, a pure function of key and position, also compiled."""

import math

import pytest
import torch
from jaxtyping import Int32
from scipy import stats
from torch import Tensor

from spd_hydra import rng

BINS = 32
RECORDED = [[7803634, 11759922], [2084352, 3976135]]
WIDTHS = [1, 5, 16, 17, 20, 21, 200]  # what fills vectors of 8 and 16 lanes, and what leaves a tail


def rows(n: int, start: int = 0) -> Int32[Tensor, " n"]:
    return torch.arange(start, start + n, dtype=torch.int32)


def draw(n_rows: int, n_columns: int, seed: int = 0, purpose: str = "test", step: int = 0) -> Tensor:
    return rng.uniform(rng.key(seed, purpose, step), rows(n_rows), rng.columns("c", n_columns))


def chi2_p_values(numbers: Tensor) -> Tensor:
    """p-value of each row of numbers under U[0, 1), from a histogram."""
    bins = torch.nn.functional.one_hot((numbers * BINS).long(), BINS).sum(-2)
    return torch.tensor(stats.chisquare(bins.numpy(), axis=-1).pvalue)


def assert_p_values_are_uniform(p: Tensor) -> None:
    """No p-value is impossible among so many, and their distribution is itself U(0, 1)."""
    assert p.min() > 1e-3 / len(p)
    assert stats.kstest(p.numpy(), "uniform").pvalue > 1e-4


def assert_uncorrelated(a: Tensor, b: Tensor) -> None:
    """Correlation of two U(0, 1) samples of size n is N(0, 1/n) if they are independent."""
    n = a.numel()
    correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1].item()
    assert abs(correlation) * math.sqrt(n) < 4.5
    pairs = (a.flatten() * 8).long() * 8 + (b.flatten() * 8).long()
    assert stats.chisquare(torch.bincount(pairs, minlength=64).numpy()).pvalue > 1e-5


def test_numbers_lie_in_the_half_open_unit_interval_in_steps_of_2_to_the_minus_24() -> None:
    numbers = draw(2000, 200)
    assert numbers.dtype == torch.float32
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert torch.equal(numbers * 2**24, (numbers * 2**24).round())


def test_moments_are_those_of_the_uniform_distribution() -> None:
    numbers = draw(5000, 200).double()
    n = numbers.numel()
    for power in (1, 2, 3, 4):
        variance = 1 / (2 * power + 1) - 1 / (power + 1) ** 2
        error = (numbers**power).mean() - 1 / (power + 1)
        assert abs(error) < 4.5 * math.sqrt(variance / n)


@pytest.mark.parametrize("seed", [0, 1])
def test_every_column_is_uniform_over_rows(seed: int) -> None:
    assert_p_values_are_uniform(chi2_p_values(draw(4000, 200, seed).T))


@pytest.mark.parametrize("seed", [0, 1])
def test_every_row_is_uniform_over_columns(seed: int) -> None:
    assert_p_values_are_uniform(chi2_p_values(draw(200, 4000, seed)))


def test_one_position_is_uniform_over_steps() -> None:
    numbers = torch.stack([draw(2, 8, step=step) for step in range(1000)])
    assert_p_values_are_uniform(chi2_p_values(numbers.flatten(1).T))


def test_every_bit_is_set_half_of_the_time() -> None:
    words = (draw(5000, 100) * 2**24).int()
    n = words.numel()
    for bit in range(24):
        share = ((words >> bit) & 1).double().mean().item()
        assert abs(share - 0.5) < 4.5 * 0.5 / math.sqrt(n), f"bit {bit}"


@pytest.mark.parametrize("lag", [1, 2, 16, 256])
def test_rows_are_uncorrelated(lag: int) -> None:
    numbers = draw(2000, 100)
    assert_uncorrelated(numbers[:-lag], numbers[lag:])


@pytest.mark.parametrize("lag", [1, 2, 16, 100])
def test_columns_are_uncorrelated(lag: int) -> None:
    numbers = draw(1000, 200)
    assert_uncorrelated(numbers[:, :-lag], numbers[:, lag:])


def test_mirrored_positions_are_uncorrelated() -> None:
    # Row and column enter in a similar way; (i, j) and (j, i) must not be related for it.
    key = rng.key(0, "test")
    numbers = rng.uniform(key, rows(500), rows(500))
    above = torch.ones(500, 500, dtype=torch.bool).triu(1)
    assert_uncorrelated(numbers[above], numbers.T[above])


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"purpose": "other"}, {"step": 1}, {"seed": -1}, {"step": 2**31}]
)
def test_keys_are_uncorrelated(other: dict[str, int | str]) -> None:
    assert_uncorrelated(draw(1000, 200), draw(1000, 200, **other))


def test_keys_of_different_seed_purpose_or_step_differ() -> None:
    keys = {
        tuple(rng.key(seed, purpose, step).tolist())
        for seed in range(10)
        for purpose in ("data", "masks", "eval")
        for step in range(100)
    }
    assert len(keys) == 10 * 3 * 100


def test_seed_and_step_do_not_run_into_each_other() -> None:
    assert not torch.equal(rng.key(1, "a", 11), rng.key(11, "a", 1))
    assert not torch.equal(rng.key(1, "1/a", 0), rng.key(1, "a", 10))


def test_the_same_arguments_give_the_same_numbers_for_ever() -> None:
    # Recorded once: a change of these numbers changes every run's result.
    numbers = rng.uniform(rng.key(0, "record", 7), rows(2), rng.columns("record", 2))
    assert (numbers * 2**24).int().tolist() == RECORDED


def test_numbers_are_those_of_the_hash_written_out_in_plain_integers() -> None:
    def mix(word: int) -> int:
        word = (word ^ word >> 16) * 0x7FEB352D % 2**32
        word = (word ^ word >> 15) * 0x846CA68B % 2**32
        return word ^ word >> 16

    key = rng.key(3, "plain", 5)
    k0, k1 = (word % 2**32 for word in key.tolist())
    found = rng.uniform(key, rows(6, start=2**31 - 6), torch.tensor([-(2**31), -1, 0, 7], dtype=torch.int32))
    for i, row in enumerate(range(2**31 - 6, 2**31)):
        for j, column in enumerate([2**31, 2**32 - 1, 0, 7]):
            row_word = mix((mix(row ^ k0) + k1) % 2**32)
            column_word = mix((mix(column ^ k1) + k0) % 2**32)
            assert found[i, j].item() == (mix(row_word ^ column_word) >> 8) / 2**24


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (5, 20), (37, 100), (99, 100)])
def test_a_slice_of_rows_is_the_slice_of_the_whole(start: int, stop: int) -> None:
    key, columns = rng.key(0, "test", 3), rng.columns("c", 21)
    whole = rng.uniform(key, rows(100), columns)
    assert torch.equal(rng.uniform(key, rows(stop - start, start), columns), whole[start:stop])


def test_rows_may_have_any_shape_and_order() -> None:
    key, columns = rng.key(0, "test"), rng.columns("c", 5)
    whole = rng.uniform(key, rows(24), columns)
    assert torch.equal(rng.uniform(key, rows(24).reshape(2, 3, 4), columns), whole.reshape(2, 3, 4, 5))
    assert torch.equal(rng.uniform(key, rows(24).flip(0), columns), whole.flip(0))


def test_columns_of_a_purpose_do_not_depend_on_what_else_is_drawn() -> None:
    key = rng.key(0, "masks")
    alone = rng.uniform(key, rows(50), rng.columns("a", 7))
    both = rng.uniform(key, rows(50), torch.cat([rng.columns("b", 9), rng.columns("a", 7)]))
    assert torch.equal(both[:, 9:], alone)
    assert torch.equal(rng.uniform(key, rows(50), rng.columns("a", 20))[:, :7], alone)


def test_purposes_have_columns_of_their_own() -> None:
    names = [
        "faithfulness",
        "importance_minimality",
        "stochastic_recon",
        "stochastic_recon_layerwise",
        "stochastic_recon_subset",
        "ci_masked_recon",
        "ci_masked_recon_layerwise",
        "ci_masked_recon_subset",
        "unmasked_recon",
    ]
    columns = torch.cat([rng.columns(name, 100_000) for name in names])
    assert len(set(columns.tolist())) == columns.numel()


def test_columns_of_two_purposes_are_uncorrelated() -> None:
    key = rng.key(0, "masks")
    assert_uncorrelated(
        rng.uniform(key, rows(1000), rng.columns("a", 200)),
        rng.uniform(key, rows(1000), rng.columns("b", 200)),
    )


def test_columns_wrap_around_at_32_bits_without_repeating() -> None:
    columns = rng.columns("stochastic_recon", 5)
    assert columns.dtype == torch.int32
    assert len(set(columns.tolist())) == 5
    assert rng.columns("anything", 0).shape == (0,)


def test_torchs_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = draw(10, 10), torch.randn(3, generator=rng.generator(0, "weights"))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = draw(10, 10), torch.randn(3, generator=rng.generator(0, "weights"))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_derived_seeds_fit_torch_and_differ() -> None:
    seeds = {
        rng.derived_seed(seed, purpose, number)
        for seed in range(20)
        for purpose in "ab"
        for number in range(20)
    }
    assert len(seeds) == 800
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.slow
def test_a_compiled_draw_equals_the_eager_one_bit_for_bit() -> None:
    # The compiler sees the ranges of the indices here: their overflow must not mislead it.
    def drawn(key: Tensor) -> list[Tensor]:
        indices = torch.arange(67, dtype=torch.int32)
        return [rng.uniform(key, indices, torch.arange(n, dtype=torch.int32)) for n in WIDTHS]

    compiled = torch.compile(drawn, fullgraph=True, dynamic=False)
    for step in range(3):
        key = rng.key(0, "masks", step)
        for n, fused, eager in zip(WIDTHS, compiled(key), drawn(key), strict=True):
            assert torch.equal(fused, eager), f"{n} columns"


@pytest.mark.slow
def test_a_compiled_draw_in_given_rows_and_columns_equals_the_eager_one() -> None:
    def drawn(key: Tensor, row_indices: Tensor, columns: list[Tensor]) -> list[Tensor]:
        return [rng.uniform(key, row_indices, own) for own in columns]

    compiled = torch.compile(drawn, fullgraph=True, dynamic=False)
    for purpose in ("stochastic_recon", "unmasked_recon"):
        columns = [rng.columns(purpose, n) for n in (5, 21, 200)]
        for start in (0, 2**31 - 100):
            arguments = (rng.key(0, "masks", 2), rows(100, start), columns)
            for n, fused, eager in zip((5, 21, 200), compiled(*arguments), drawn(*arguments), strict=True):
                assert torch.equal(fused, eager), f"{n} columns"


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 65, 1000])
def test_a_permutation_has_every_place_exactly_once(size: int) -> None:
    places = torch.arange(size)
    images = rng.permuted(rng.key(0, "order"), places, size, torch.full_like(places, 3))
    assert images.sort().values.tolist() == list(range(size))


def test_a_place_is_permuted_as_among_all_of_them() -> None:
    key, places = rng.key(0, "order"), torch.arange(1000)
    whole = rng.permuted(key, places, 1000, torch.zeros_like(places))
    assert torch.equal(
        rng.permuted(key, places[300:310], 1000, torch.zeros(10, dtype=torch.int64)), whole[300:310]
    )


def test_permutations_put_every_place_everywhere_equally_often() -> None:
    places = torch.arange(10)
    rounds = torch.arange(4000)[:, None].expand(-1, 10)
    images = rng.permuted(rng.key(0, "order"), places.expand(4000, -1), 10, rounds)
    counts = torch.stack([(images == image).sum(dim=0) for image in range(10)]).double()
    assert (counts - 400).abs().max() < 5 * (4000 * 0.1 * 0.9) ** 0.5


def test_a_permutation_of_more_places_than_32_bits_hold_stays_in_range_and_repeats_nothing() -> None:
    size = 3 * 2**40
    places = torch.cat([torch.arange(1000), size - 1 - torch.arange(1000)])
    images = rng.permuted(rng.key(0, "order"), places, size, torch.zeros_like(places))
    assert len(images.unique()) == 2000
    assert images.min() >= 0
    assert images.max() < size
