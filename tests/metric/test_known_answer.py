"""The verdict on hand-made decompositions of a TMS target whose answer is known."""

import dataclasses
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from spd_hydra.ci_fn.base import CausalImportanceFn, SiteActivation, SiteShape
from spd_hydra.decomposition.config import Decomposition, SitePattern
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.metric.known_answer import STRICT_TOLERANCE, TOLERANCE, Verdict, compare
from spd_hydra.model.base import KnownAnswer
from spd_hydra.model.tms import TMSModel

N = 3
WEIGHT = torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 1.0]])
PROBE = 0.75 * torch.eye(N)


@dataclasses.dataclass(kw_only=True)
class Scripted(CausalImportanceFn):
    """z is the site's input times a matrix: whatever importance is wanted on each feature alone."""

    importance: dict[str, Tensor]

    def build(self, sites: Mapping[str, SiteShape], generator: torch.Generator) -> nn.Module:
        importance = self.importance

        class Module(nn.Module):
            def forward(
                self, activations: Mapping[str, SiteActivation], valid: Tensor | None = None
            ) -> dict[str, Tensor]:
                return {
                    site: activation.input @ torch.linalg.lstsq(probes[site], importance[site]).solution
                    for site, activation in activations.items()
                }

        probes = {"embed": PROBE, "unembed": PROBE @ WEIGHT.T}
        return Module()


def decomposed(sites: list[str], importance: Mapping[str, Tensor], scale: float = 1.0) -> DecomposedModel:
    """The target's own columns as subcomponents, scaled, and two idle ones; importances as told."""
    model = DecomposedModel(
        TMSModel(WEIGHT.clone(), torch.zeros(N), 0),
        Decomposition(sites={site: SitePattern(pattern=site, C=N + 2) for site in sites}),
        Scripted(importance=dict(importance)),
        seed=0,
    )
    with torch.no_grad():
        for parameter in model.component_parameters():
            parameter.zero_()
        if "embed" in sites:
            model.pieces("embed").V[:, :N] = torch.eye(N)
            model.pieces("embed").U[:N] = scale * WEIGHT.T
    return model


def known(cosine_decides: bool = True, **changes: dict[str, int]) -> KnownAnswer:
    answer = KnownAnswer(
        probe=PROBE,
        identity={"embed": N},
        dense={},
        directions={"embed": torch.eye(N)},
        cosine_decides=cosine_decides,
        expected_alive={"embed": N},
    )
    return dataclasses.replace(answer, **changes)


def on_embed(off_diagonal: float = 0.0, scale: float = 1.0, cosine_decides: bool = True) -> Verdict:
    importance = torch.cat([torch.eye(N), torch.zeros(N, 2)], dim=1)
    importance[0, 4] = off_diagonal
    return compare(decomposed(["embed"], {"embed": importance}, scale), known(cosine_decides))


def test_the_known_answer_is_recognised() -> None:
    verdict = on_embed()
    assert [(c.name, c.site, c.tolerance, c.error, c.expected) for c in verdict.checks] == [
        ("identity", "embed", STRICT_TOLERANCE, 0, N),
        ("identity", "embed", TOLERANCE, 0, N),
    ]
    assert verdict.recovery == pytest.approx((1.0, 1.0, 1.0))
    assert verdict.holds(TOLERANCE)
    assert verdict.holds(STRICT_TOLERANCE)
    assert list(verdict.order["embed"][:N]) == [0, 1, 2]


def test_an_entry_between_the_tolerances_is_solved_but_not_strictly() -> None:
    verdict = on_embed(off_diagonal=0.15)
    assert verdict.holds(TOLERANCE)
    assert not verdict.holds(STRICT_TOLERANCE)


def test_an_entry_beyond_the_tolerance_is_not_solved() -> None:
    assert not on_embed(off_diagonal=0.25).holds(TOLERANCE)


@pytest.mark.parametrize(("scale", "holds"), [(0.96, True), (0.94, False), (1.04, True), (1.06, False)])
def test_sizes_may_be_off_by_five_percent_where_they_decide(scale: float, holds: bool) -> None:
    assert on_embed(scale=scale).holds(TOLERANCE) is holds
    assert on_embed(scale=scale, cosine_decides=False).holds(TOLERANCE)


def test_sites_that_are_not_decomposed_are_not_asked_for() -> None:
    answer = known(identity={"embed": N, "unembed": N})
    importance = torch.cat([torch.eye(N), torch.zeros(N, 2)], dim=1)
    verdict = compare(decomposed(["embed"], {"embed": importance}), answer)
    assert {check.site for check in verdict.checks} == {"embed"}


def test_nothing_is_solved_where_no_site_with_a_known_answer_is_decomposed() -> None:
    rank_two = torch.tensor([[1.0, 0], [0, 1], [0, 0]]) @ torch.ones(2, N + 2)
    verdict = compare(
        decomposed(["unembed"], {"unembed": rank_two}), known(cosine_decides=False, identity={"embed": N})
    )
    assert verdict.checks == []
    assert not verdict.holds(TOLERANCE)


def test_where_no_site_with_known_directions_is_decomposed_the_checks_alone_decide() -> None:
    two_needed = WEIGHT.T @ torch.tensor([[1.0, 0, 0, 0, 0], [0, 0.5, 0, 0, 0]])
    model = decomposed(["unembed"], {"unembed": two_needed})
    for expected in (2, 3):
        verdict = compare(model, known(identity={}, dense={"unembed": expected}))
        assert verdict.recovery is None
        assert verdict.holds(TOLERANCE) is (expected == 2)


def test_dense_sites_are_checked_for_their_number() -> None:
    importance = torch.zeros(N, N + 2)
    importance[:, 1:3] = 1
    model = decomposed(["embed"], {"embed": importance})
    for expected, error in [(2, 0), (1, N), (3, 1)]:
        verdict = compare(model, known(identity={}, dense={"embed": expected}))
        assert [(c.name, c.error, c.expected) for c in verdict.checks] == [("dense", error, expected)] * 2
