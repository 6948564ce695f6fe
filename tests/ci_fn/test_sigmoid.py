"""Sigmoids: value and gradient in every region, for both signs of the incoming gradient."""

import math

import pytest
import torch

from spd_hydra.ci_fn.sigmoid import Sigmoid, causal_importance, lower, upper

A = 0.01  # slope of the leaks
POINTS = [-2.0, -1e-3, 0.0, 0.25, 1.0, 1.5, 3.0]
LOGISTIC = [1 / (1 + math.exp(-z)) for z in POINTS]
LOGISTIC_SLOPE = [g * (1 - g) for g in LOGISTIC]

LOWER_VALUES = {
    Sigmoid.leaky_hard: [0, 0, 0, 0.25, 1, 1, 1],
    Sigmoid.leaky_hard_paper: [-2 * A, -1e-3 * A, 0, 0.25, 1, 1, 1],
    Sigmoid.hard: [0, 0, 0, 0.25, 1, 1, 1],
    Sigmoid.sigmoid: LOGISTIC,
}
UPPER_VALUES = {
    Sigmoid.leaky_hard: [0, 0, 0, 0.25, 1, 1 + 0.5 * A, 1 + 2 * A],
    Sigmoid.leaky_hard_paper: [0, 0, 0, 0.25, 1, 1 + 0.5 * A, 1 + 2 * A],
    Sigmoid.hard: [0, 0, 0, 0.25, 1, 1, 1],
    Sigmoid.sigmoid: LOGISTIC,
}
# Factor on the incoming gradient, when it asks for a larger z (negative) and for a smaller one (positive).
LOWER_SLOPES = {
    Sigmoid.leaky_hard: ([A, A, A, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0, 0]),
    Sigmoid.leaky_hard_paper: ([A, A, 1, 1, 1, 0, 0], [A, A, 1, 1, 1, 0, 0]),
    Sigmoid.hard: ([0, 0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0, 0]),
    Sigmoid.sigmoid: (LOGISTIC_SLOPE, LOGISTIC_SLOPE),
}
UPPER_SLOPES = {
    Sigmoid.leaky_hard: [0, 0, 0, 1, 1, A, A],
    Sigmoid.leaky_hard_paper: [0, 0, 0, 1, 1, A, A],
    Sigmoid.hard: [0, 0, 0, 1, 1, 0, 0],
    Sigmoid.sigmoid: LOGISTIC_SLOPE,
}


def points() -> torch.Tensor:
    return torch.tensor(POINTS, dtype=torch.float64, requires_grad=True)


def numbers(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("kind", Sigmoid)
def test_lower_values(kind: Sigmoid) -> None:
    torch.testing.assert_close(lower(points(), kind).detach(), numbers(LOWER_VALUES[kind]))


@pytest.mark.parametrize("kind", Sigmoid)
def test_upper_values(kind: Sigmoid) -> None:
    torch.testing.assert_close(upper(points(), kind).detach(), numbers(UPPER_VALUES[kind]))


@pytest.mark.parametrize("incoming", [-3.0, 2.0])
@pytest.mark.parametrize("kind", Sigmoid)
def test_lower_gradients(kind: Sigmoid, incoming: float) -> None:
    z = points()
    (gradient,) = torch.autograd.grad(lower(z, kind), z, torch.full_like(z, incoming))
    slopes = LOWER_SLOPES[kind][0 if incoming < 0 else 1]
    torch.testing.assert_close(gradient, incoming * numbers(slopes))


@pytest.mark.parametrize("incoming", [-3.0, 2.0])
@pytest.mark.parametrize("kind", Sigmoid)
def test_upper_gradients(kind: Sigmoid, incoming: float) -> None:
    z = points()
    (gradient,) = torch.autograd.grad(upper(z, kind), z, torch.full_like(z, incoming))
    torch.testing.assert_close(gradient, incoming * numbers(UPPER_SLOPES[kind]))


def test_the_straight_through_leak_looks_at_each_entrys_own_gradient() -> None:
    z = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(lower(z), z, torch.tensor([-5.0, 5.0, 0.0]))
    assert gradient.tolist() == pytest.approx([-0.05, 0.0, 0.0])


def test_the_default_pair_is_leaky_hard() -> None:
    z = points()
    assert torch.equal(lower(z), lower(z, Sigmoid.leaky_hard))
    assert torch.equal(upper(z), upper(z, Sigmoid.leaky_hard))


@pytest.mark.parametrize("kind", Sigmoid)
def test_causal_importance_holds_both_functions_and_z(kind: Sigmoid) -> None:
    z = points()
    ci = causal_importance(z, kind)
    assert torch.equal(ci.lower, lower(z, kind))
    assert torch.equal(ci.upper, upper(z, kind))
    assert ci.z is z


@pytest.mark.parametrize("kind", [Sigmoid.hard, Sigmoid.sigmoid])
def test_kinds_without_a_leak_use_one_function_for_both_roles(kind: Sigmoid) -> None:
    z = points()
    assert torch.equal(lower(z, kind), upper(z, kind))


@pytest.mark.parametrize("kind", Sigmoid)
def test_a_replica_axis_can_be_mapped_over(kind: Sigmoid) -> None:
    z = torch.linspace(-2, 3, 24).reshape(2, 3, 4).requires_grad_()
    mapped = torch.vmap(lambda own: lower(own, kind) * torch.linspace(-1, 1, 4))(z)
    plain = lower(z, kind) * torch.linspace(-1, 1, 4)
    torch.testing.assert_close(mapped, plain)
    gradients = [torch.autograd.grad(out.sum(), z)[0] for out in (mapped, plain)]
    torch.testing.assert_close(*gradients)
