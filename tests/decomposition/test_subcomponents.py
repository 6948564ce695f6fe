"""Subcomponents: shapes, how they start, how ties share them, lookup and weight delta."""

import copy

import pytest
import torch

from spd_hydra import rng
from spd_hydra.decomposition.subcomponents import (
    Init,
    Subcomponents,
    TiedSubcomponents,
    inner_activation,
    weight_delta,
)


def make(
    d_in: int = 6, d_out: int = 4, C: int = 5, init: Init = Init.normal, seed: int = 0
) -> tuple[torch.Tensor, Subcomponents]:
    weight = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(9))
    return weight, Subcomponents(weight, C, init, rng.generator(seed, "test"))


@pytest.mark.parametrize("init", Init)
@pytest.mark.parametrize("C", [1, 4, 50])  # below, at and above the rank
def test_shapes(init: Init, C: int) -> None:
    _, pieces = make(C=C, init=init)
    assert pieces.V.shape == (6, C)
    assert pieces.U.shape == (C, 4)
    assert pieces.C == C
    assert [name for name, _ in pieces.named_parameters()] == ["V", "U"]


def test_normal_start_has_variance_one_over_fan_in() -> None:
    _, pieces = make(d_in=200, d_out=300, C=500)
    for drawn, variance in ((pieces.V, 1 / 200), (pieces.U, 1 / 500)):
        scaled, n = drawn.detach() / variance**0.5, drawn.numel()
        assert abs(scaled.mean()) < 4.5 / n**0.5
        assert abs(scaled.square().mean() - 1) < 4.5 * (2 / n) ** 0.5
        assert abs(scaled.pow(4).mean() - 3) < 4.5 * (96 / n) ** 0.5


def test_aligned_start_is_unit_vectors_scaled_by_their_overlap_with_the_weight() -> None:
    weight, pieces = make(init=Init.aligned)
    generator = rng.generator(0, "test")
    V, U = torch.randn(6, 5, generator=generator), torch.randn(5, 4, generator=generator)
    for c in range(5):
        v, u = V[:, c] / V[:, c].norm(), U[c] / U[c].norm()
        torch.testing.assert_close(pieces.V[:, c].detach(), v)
        overlap = sum(weight[o, i] * u[o] * v[i] for o in range(4) for i in range(6))
        torch.testing.assert_close(pieces.U[c].detach(), overlap * u)


def test_the_start_depends_on_the_generator_alone() -> None:
    torch.manual_seed(1)
    first = make()[1]
    torch.manual_seed(2)
    again, other = make()[1], make(seed=1)[1]
    assert torch.equal(first.V, again.V)
    assert torch.equal(first.U, again.U)
    assert not torch.equal(first.V, other.V)


def test_a_tied_site_reads_and_writes_the_transposes() -> None:
    _, source = make()
    tied = TiedSubcomponents(source)
    assert tied.C == 5
    assert torch.equal(tied.V, source.U.T)
    assert torch.equal(tied.U, source.V.T)
    # so that its matrix is the transpose of the source's
    torch.testing.assert_close((tied.V @ tied.U).T, source.V @ source.U)


def test_a_tie_has_one_parameter_one_gradient_and_one_optimiser_slot() -> None:
    _, source = make()
    tied = TiedSubcomponents(source)
    both = torch.nn.ModuleDict({"a": source, "b": tied})
    assert [name for name, _ in both.named_parameters()] == ["a.V", "a.U"]
    optimiser = torch.optim.AdamW(both.parameters(), lr=0.1, weight_decay=0)
    a, b = torch.randn(6, 5), torch.randn(5, 6)
    # The sum of a use at the source and a use at the tied site: one gradient, A + Bᵀ.
    torch.autograd.backward((source.V * a).sum() + (tied.U * b).sum() + 0 * source.U.sum())
    torch.testing.assert_close(source.V.grad, a + b.T)
    before = source.V.detach().clone()
    optimiser.step()
    assert len(optimiser.state) == 2
    # The first step of Adam moves by the learning rate against the sign, once and not twice.
    torch.testing.assert_close(before - source.V.detach(), 0.1 * (a + b.T).sign())
    assert torch.equal(tied.U, source.V.T)


def test_a_copy_of_a_tie_is_tied_to_the_copy() -> None:
    _, source = make()
    both = torch.nn.ModuleDict({"a": source, "b": TiedSubcomponents(source)})
    clone = copy.deepcopy(both)
    with torch.no_grad():
        clone.get_parameter("a.V").fill_(7)
    assert torch.equal(clone["b"].U, torch.full((5, 6), 7.0))
    assert not torch.equal(both["b"].U, torch.full((5, 6), 7.0))


def test_inner_activation_is_x_times_v() -> None:
    x, V = torch.randn(2, 3, 6), torch.randn(6, 5)
    expected = torch.zeros(2, 3, 5)
    for i in range(6):
        expected += x[..., i, None] * V[i]
    torch.testing.assert_close(inner_activation(x, V, embedding=False), expected)


def test_inner_activation_of_tokens_looks_rows_of_v_up() -> None:
    tokens, V = torch.tensor([[3, 0, 3], [5, 1, 2]]), torch.randn(6, 5)
    h = inner_activation(tokens, V, embedding=True)
    assert h.shape == (2, 3, 5)
    for b in range(2):
        for t in range(3):
            assert torch.equal(h[b, t], V[tokens[b, t]])
    one_hot = torch.nn.functional.one_hot(tokens, 6).float()
    torch.testing.assert_close(h, inner_activation(one_hot, V, embedding=False))


def test_weight_delta_is_what_the_rank_one_pieces_do_not_sum_to() -> None:
    weight, pieces = make()
    total = torch.zeros(4, 6)
    for c in range(5):
        total += torch.outer(pieces.U[c].detach(), pieces.V[:, c].detach())
    torch.testing.assert_close(weight_delta(weight, pieces.V, pieces.U).detach(), weight - total)
