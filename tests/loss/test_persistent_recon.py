"""The adversary that lasts: what its masks are, how it climbs, and what is kept of it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from spd_hydra import rng
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.decomposition.routing import Routing
from spd_hydra.loss.loss_set import LossSet
from spd_hydra.loss.objective import Objective
from spd_hydra.loss.persistent_recon import PersistentPGDRecon
from spd_hydra.precision import Precision
from spd_hydra.step import Ascent, Step

MakeModel = Callable[..., DecomposedModel]
NAME = "persistent_pgd_recon"


def objective(model: DecomposedModel, seed: int = 0, **term: Any) -> Objective:
    losses = LossSet(persistent_pgd_recon=PersistentPGDRecon(**{"coeff": 0.5} | term))
    return Objective(model, losses, precision=Precision.fp32, ci_threshold=0.1, seed=seed)


def step_of(own: Objective, x: Tensor, step: int = 0) -> tuple[Tensor, Tensor]:
    columns = own.columns(own.losses.active_terms())
    return x, rng.uniform(rng.key(0, "step", step), torch.arange(len(x), dtype=torch.int32), columns)


def rows(number: int = 16) -> Tensor:
    return torch.randn(number, 5, generator=torch.Generator().manual_seed(1))


def mse(masked: tuple[float, float]) -> float:
    """Mean squared distance from the target's output (3, 2) on x = (1, 1), see test_terms.py."""
    return ((masked[0] - 3) ** 2 + (masked[1] - 2) ** 2) / 2


def test_each_row_is_masked_with_the_set_that_its_draw_says(hand_made: MakeModel) -> None:
    own = objective(hand_made(), n_sources=2, routing=Routing.all)
    sources = own.adversary.of(NAME)
    with torch.no_grad():
        sources["a"].copy_(torch.tensor([[0.5, 0.25, 0.75], [0.0, 0.0, 0.0]]))
        sources["b"].copy_(torch.tensor([[0.5, 0.25], [1.0, 1.0]]))
    first = mse((5 / 8 * (3 / 4 + 25 / 16), 1 / 4 * 25 / 16))  # as in test_terms.py
    second = mse((1 / 2 + 3 / 4, 3 / 4))
    for draws, expected in (
        ([0.0, 0.4], first), ([0.5, 0.9], second), ([0.4, 0.6], (first + second) / 2),
    ):  # fmt: skip
        found = own(torch.ones(2, 2), torch.tensor(draws)[:, None], {})
        assert found.terms[NAME].item() == pytest.approx(expected)


def test_all_positions_of_a_row_have_the_set_of_its_first(hand_made: MakeModel) -> None:
    own = objective(hand_made(), n_sources=2, routing=Routing.all)
    with torch.no_grad():
        for value in own.adversary.of(NAME).values():
            value.copy_(torch.tensor([0.0, 1.0])[:, None])  # ones for masks and delta: the target itself
    draws = torch.tensor([[0.9, 0.0, 0.0], [0.0, 0.9, 0.9]])[..., None]
    found = own(torch.ones(2, 3, 2), draws, {}).terms[NAME].item()
    assert found == pytest.approx(mse((5 / 16, 0)) / 2)


def test_sources_start_uniform_by_the_seed_and_differ_between_sites_and_sets(chain: MakeModel) -> None:
    model = chain()
    first, again, other = (objective(model, seed, n_sources=50).adversary for seed in (0, 0, 1))
    values = torch.cat([value.flatten() for value in first.of(NAME).values()]).detach()
    assert values.numel() == values.unique().numel() == 50 * 21
    assert values.mean().item() == pytest.approx(0.5, abs=0.03)
    assert values.min() >= 0
    assert values.max() <= 1
    for name, tensor in first.state().items():
        assert torch.equal(again.state()[name], tensor)
        assert not torch.equal(other.state()[name], tensor)


def test_the_adversary_climbs_what_the_model_descends(chain: MakeModel) -> None:
    model = chain()
    own = objective(model, n_sources=2, routing=Routing.all, lr=0.05)
    step = Step(own, compile=False)
    terms = []
    for _ in range(40):  # the model stays as it is
        terms.append(step(*step_of(own, rows()), {}).terms[NAME].item())
        own.adversary.ascend()
        for value in own.adversary.parameters():
            assert value.min() >= 0
            assert value.max() <= 1
    assert terms[-1] > 1.5 * terms[0]
    corners = torch.cat([value.flatten() for value in own.adversary.parameters()])
    assert ((corners == 0) | (corners == 1)).float().mean() > 0.5


def test_one_ascent_is_a_step_of_adam_upwards(chain: MakeModel) -> None:
    own = objective(chain(), n_sources=1, routing=Routing.all, lr=0.05)
    before = [value.detach().clone() for value in own.adversary.parameters()]
    Step(own, compile=False)(*step_of(own, rows()), {})
    own.adversary.ascend()
    for old, value in zip(before, own.adversary.parameters(), strict=True):
        assert value.grad is not None
        # Adam's first step is lr · g / (|g| + ε)
        wanted = (old + 0.05 * value.grad.sign()).clamp(0, 1)
        torch.testing.assert_close(value.detach(), wanted, rtol=1e-5, atol=1e-5)


def test_how_far_the_adversary_climbs_does_not_depend_on_the_coefficient(chain: MakeModel) -> None:
    ends = []
    for coeff in (1.0, 1e-6):
        own = objective(chain(), n_sources=2, coeff=coeff)
        for step in range(5):
            Step(own, compile=False)(*step_of(own, rows(), step), {})
            own.adversary.ascend()
        ends.append([value.detach() for value in own.adversary.parameters()])
    for large, small in zip(*ends, strict=True):
        torch.testing.assert_close(large, small, rtol=1e-3, atol=1e-3)


def test_the_gradient_of_an_extra_ascent_is_that_of_the_step(chain: MakeModel) -> None:
    model = chain()
    own = objective(model, ascents=2)
    Step(own, compile=False)(*step_of(own, rows()), {})
    of_step = [value.grad for value in own.adversary.parameters()]
    trained = {name: p.grad for name, p in model.named_parameters()}
    Ascent(own, compile=False)([step_of(own, rows())])
    for value, wanted in zip(own.adversary.parameters(), of_step, strict=True):
        assert value.grad is not None
        assert wanted is not None
        assert wanted.any()
        torch.testing.assert_close(value.grad, wanted)
    assert all(p.grad is trained[name] for name, p in model.named_parameters())


def test_a_term_of_fewer_ascents_waits(chain: MakeModel) -> None:
    losses = LossSet(
        persistent_pgd_recon=PersistentPGDRecon(coeff=1.0, ascents=3),
        extra={"once": PersistentPGDRecon(coeff=1.0)},
    )
    own = Objective(chain(), losses, precision=Precision.fp32, ci_threshold=0.1)
    adversary = own.adversary
    assert adversary.extra_ascents == 2
    moved = []
    for left in (2, 1, 0):
        Ascent(own, compile=False)([step_of(own, rows())])
        before = {name: [v.detach().clone() for v in adversary.of(name).values()] for name in adversary.terms}
        adversary.ascend(left)
        moved.append({
            name: any(not torch.equal(a, b) for a, b in zip(old, adversary.of(name).values(), strict=True))
            for name, old in before.items()
        })  # fmt: skip
    assert moved == [{NAME: True, "once": False}] * 2 + [{NAME: True, "once": True}]


def test_what_is_kept_restores_sources_and_moments(chain: MakeModel) -> None:
    model = chain()
    own, other = objective(model), objective(model, seed=1)
    step = Step(own, compile=False)
    for number in range(3):
        step(*step_of(own, rows(), number), {})
        own.adversary.ascend()
    kept = {name: tensor.clone() for name, tensor in own.adversary.state().items()}
    other.adversary.set_state(kept | {"exp_avg.of.the.model": torch.zeros(1)})
    for each in (own, other):
        Step(each, compile=False)(*step_of(each, rows(), 3), {})
        each.adversary.ascend()
    mine, theirs = own.adversary.state(), other.adversary.state()
    assert mine.keys() == theirs.keys() == kept.keys()
    assert len(mine) == 3 * 4  # by site: sources, two moments, a count
    assert all(torch.equal(theirs[name], tensor) for name, tensor in mine.items())
    own.adversary.set_state({})  # an adversary that has not begun
    fresh = objective(model).adversary.state()
    assert own.adversary.state().keys() == fresh.keys()
    assert all(torch.equal(own.adversary.state()[name], tensor) for name, tensor in fresh.items())


def test_what_is_kept_of_other_sources_is_refused(chain: MakeModel) -> None:
    adversary = objective(chain()).adversary
    kept = adversary.state()
    kept.pop("adversary.sources.persistent_pgd_recon/second")
    with pytest.raises(ValueError, match="no sources 'persistent_pgd_recon/second'"):
        adversary.set_state(kept)


def test_a_term_that_is_off_has_no_adversary_and_is_not_measured(chain: MakeModel) -> None:
    own = Objective(chain(), LossSet(), precision=Precision.fp32, ci_threshold=0.1)
    assert not own.adversary.state()
    assert own.adversary.extra_ascents == 0
    assert NAME not in own.losses.measured_terms()


@pytest.mark.slow
def test_compiled_gradients_of_the_adversary_equal_the_eager_ones(chain: MakeModel) -> None:
    model = chain()
    own = objective(model, ascents=2)
    found = []
    for compile in (False, True):
        Step(own, compile=compile)(*step_of(own, rows()), {})
        found.append([value.grad for value in [*own.adversary.parameters(), *model.component_parameters()]])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
