"""The ascent on sources, on functions whose worst point is known."""

import pytest
import torch
from torch import Tensor

from spd_hydra.compiling import Kernel
from spd_hydra.loss.ascent import Scope, Sources, _uniform_of_first_position, look_at, worst_sources


class Divergence:
    """Σ -(r - top)² of each row, and where it was asked for."""

    def __init__(self, top: Tensor) -> None:
        self.top = top
        self.seen: list[Tensor] = []

    def __call__(self, sources: Sources) -> Tensor:
        self.seen.append(sources["a"].detach())
        return -(sources["a"] - self.top).square().sum(1)


def found(divergence: Divergence, start: Tensor, scope: Scope, n_steps: int, step_size: float) -> Tensor:
    return worst_sources(look_at(divergence, scope), {"a": start}, n_steps=n_steps, step_size=step_size)["a"]


def test_steps_are_signs_of_the_gradient_clamped_to_the_unit_interval() -> None:
    divergence = Divergence(torch.tensor([[0.55, 2.0]]))
    worst = found(divergence, torch.tensor([[0.0, 0.5]]), Scope.shared, 3, 0.25)
    expected = [[0.0, 0.5], [0.25, 0.75], [0.5, 1.0], [0.75, 1.0]]
    torch.testing.assert_close(torch.cat(divergence.seen), torch.tensor(expected))
    torch.testing.assert_close(worst, torch.tensor([[0.5, 1.0]]))


def test_the_worst_point_seen_counts_and_not_the_last() -> None:
    start = torch.tensor([[0.0]])
    assert found(Divergence(torch.tensor([[0.3]])), start, Scope.shared, 1, 1.0) == 0  # a step goes too far
    assert found(Divergence(torch.tensor([[0.8]])), start, Scope.shared, 1, 1.0) == 1
    assert found(Divergence(torch.tensor([[0.3]])), start, Scope.shared, 2, 0.25) == 0.25


def test_each_datapoint_has_its_own_worst_point() -> None:
    divergence = Divergence(torch.tensor([[0.3], [0.8]]))
    worst = found(divergence, torch.zeros(2, 1), Scope.per_datapoint, 1, 1.0)
    assert worst.tolist() == [[0.0], [1.0]]


def test_shared_sources_follow_the_sum_over_rows() -> None:
    # one row pulls a little to the left, two to the right: signs that are averaged would go the same way,
    # a sum of gradients does not
    divergence = Divergence(torch.tensor([[-2.0], [0.7], [0.7]]))
    worst = found(divergence, torch.tensor([[0.5]]), Scope.shared, 1, 0.25)
    assert worst.tolist() == [[0.25]]


def test_each_pass_has_its_own_worst_point() -> None:
    # two passes, one for each site: a step takes the first too far and the second to its top
    def look(r: Sources, wants_slopes: bool) -> tuple[dict[str, Tensor], Sources]:
        tops = {"a": 0.3, "b": 0.8}
        values = {site: -(r[site] - top).square().sum() for site, top in tops.items()}
        return values, {site: 2 * (top - r[site]) for site, top in tops.items()} if wants_slopes else {}

    worst = worst_sources(look, {"a": torch.zeros(1), "b": torch.zeros(1)}, n_steps=1, step_size=1.0)
    assert (worst["a"].item(), worst["b"].item()) == (0.0, 1.0)


@pytest.mark.parametrize("scope", Scope)
def test_without_steps_the_start_is_returned(scope: Scope) -> None:
    start = torch.tensor([[0.25]])
    divergence = Divergence(torch.tensor([[0.3]]))
    assert found(divergence, start, scope, 0, 1.0) is start
    assert not divergence.seen


def test_a_value_that_is_no_number_leaves_the_start() -> None:
    def broken(sources: Sources) -> Tensor:
        return sources["a"].sum(1) * torch.nan

    start = torch.tensor([[0.25]])
    worst = worst_sources(look_at(broken, Scope.shared), {"a": start}, n_steps=2, step_size=0.5)["a"]
    assert torch.equal(worst, start)


def test_nothing_but_the_sources_gets_a_gradient_also_where_none_are_recorded() -> None:
    weight = torch.nn.Parameter(torch.tensor(2.0))

    def divergence(sources: Sources) -> Tensor:
        return (weight * sources["a"]).sum(1)

    for recorded in (True, False):
        with torch.set_grad_enabled(recorded):
            start = {"a": torch.tensor([[0.25]])}
            worst = worst_sources(look_at(divergence, Scope.shared), start, n_steps=1, step_size=0.5)["a"]
        assert worst.item() == 0.75
        assert not worst.requires_grad
        assert weight.grad is None


@pytest.mark.slow
def test_replicas_start_where_each_would_alone_also_when_compiled() -> None:
    draws = torch.rand(2, 3, 2, generator=torch.Generator().manual_seed(0))
    alone = torch.stack([_uniform_of_first_position(own, 5) for own in draws])
    mapped = torch.vmap(lambda own: _uniform_of_first_position(own, 5))
    assert torch.equal(mapped(draws), alone)
    assert torch.equal(Kernel(mapped)(draws), alone)
