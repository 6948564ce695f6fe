import math

import pytest
import torch
from benchmarks.roofline import (
    Bound,
    Rates,
    Work,
    activations,
    bound,
    bytes_moved,
    largest_shape,
    last_level_cache,
    matmul_flops,
    matmul_rate,
    measure_rates,
    work_of,
)
from benchmarks.step_cases import Case, example, make, parts_of

CPU = torch.device("cpu")


def test_the_flops_of_a_product_and_of_its_gradients_are_two_per_multiplication() -> None:
    a, b = torch.ones(3, 5), torch.ones(5, 7, requires_grad=True)
    assert matmul_flops(lambda: a @ b) == 2 * 3 * 5 * 7
    assert matmul_flops(lambda: (a @ b).sum().backward()) == 2 * (2 * 3 * 5 * 7)  # none for a
    assert matmul_flops(lambda: a * 2) == 0


@pytest.mark.parametrize(
    ("case", "overrides", "units"),
    [
        ("tms_5-2", ["decomposition.sites.unembed.C=20"], 2 * 20 * 16),
        ("tms_5-2-id", ["ci_fn.hidden=3", "decomposition.sites.hidden.C=4"], (20 + 20 + 4) * 3),
        ("resid_mlp2", ["ci_fn=shared_mlp", "ci_fn.hidden=[7,5]", "model.d_embed=9"], 4 * (7 + 5)),
        ("tms_5-2", ["ci_fn=vector_mlp", "ci_fn.hidden=6"], 2 * 20 * 6),
    ],
)
def test_every_hidden_unit_counts_once_forward_and_once_backward(
    case: str, overrides: list[str], units: int
) -> None:
    model = parts_of(Case.read(case).config(overrides), compiled=False).model
    assert activations(model, positions=10) == 2 * 10 * units


def test_the_bytes_are_those_of_adamw_and_of_what_is_drawn() -> None:
    # gradient written and read, parameter and two moments read and written; a drawn number written and read
    assert bytes_moved(n_parameters=3, n_inputs=0) == 3 * 4 * (2 + 3 * 2)
    assert bytes_moved(n_parameters=0, n_inputs=5) == 5 * 4 * 2


def test_the_work_of_a_step_by_hand() -> None:
    config = Case.read("tms_5-2-untied@8").config(
        ["decomposition.sites.embed.C=3", "decomposition.sites.unembed.C=4", "ci_fn.hidden=2",
         "loss.stochastic_recon.coeff=0"]
    )  # fmt: skip
    work = work_of(config, make("eager", config), example(config))
    subcomponents = (5 * 3 + 3 * 2) + (2 * 4 + 4 * 5)
    ci_fn = (3 + 4) * (3 * 2 + 1)
    assert work.bytes == 4 * (8 * (subcomponents + ci_fn) + 2 * 8 * (5 + (3 + 1) + (4 + 1)))
    assert work.activations == 2 * 8 * (3 + 4) * 2
    clean = 5 * 2 + 2 * 5  # embed, unembed
    inner = 2 * (5 * 3 + 2 * 4)  # x V at both, and the gradient of V
    embed_masked = 3 * (3 * 2) + 2 * (2 * 5)  # (h ⊙ m) U, with gradients of both; unembed, of its input
    unembed_masked = 3 * (4 * 5)  # (h ⊙ m) U; embed, which ran before, has its clean output
    assert work.matmul_flops == 2 * 8 * (clean + inner + embed_masked + unembed_masked)


def test_the_plain_step_has_more_matrix_products_and_as_many_activations() -> None:
    config = Case.read("tms_40-10@16").config()
    sample = example(config)
    ours, plain = (work_of(config, make(name, config), sample) for name in ("eager", "plain"))
    assert plain.matmul_flops > ours.matmul_flops > 0
    assert (plain.activations, plain.bytes) == (ours.activations, ours.bytes)


def test_products_and_activations_add_up_and_memory_counts_where_it_takes_longer() -> None:
    rates = Rates(matmul=1e9, activations=1e6, copy_memory=1e6, copy_cache=4e6, copied=1)
    found = bound(Work(matmul_flops=2_000_000, activations=3000, bytes=12_000), rates)
    assert found == Bound(matmul=pytest.approx(2), activations=pytest.approx(3), memory=pytest.approx(3))
    assert found.total == pytest.approx(5)
    assert bound(Work(matmul_flops=0, activations=1000, bytes=12_000), rates).total == pytest.approx(3)


def test_the_largest_product_is_that_of_the_site_with_the_largest_matrix_v() -> None:
    assert largest_shape(Case.read("resid_mlp1@64").config()) == (64, 1000, 100)


def test_rates_are_positive_and_finite() -> None:
    assert 0 < matmul_rate(CPU, 8, 8, 8) < math.inf
    assert last_level_cache(CPU) > 2**15


@pytest.mark.slow
def test_the_machine_is_measured_with_a_copy_larger_than_its_cache() -> None:
    rates = measure_rates(CPU, sizes=(64,))
    assert rates.copied >= min(4 * last_level_cache(CPU), 2**31)
    assert all(0 < value < math.inf for value in (rates.matmul, rates.activations, rates.copy_cache))
