"""A subcomponent takes over what another does for its inputs; whatever else is on together stays."""

import copy

import pytest
import torch
from torch import Tensor, nn

from spd_hydra.ci_fn.mlp import MLPCausalImportance
from spd_hydra.decomposition.config import Decomposition, SitePattern
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.decomposition.joining import Join, join, join_site, told
from spd_hydra.model.tms import TMSModel

POSITIONS = 100
FIRST, SECOND = list(range(40)), list(range(40, 80))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def on(*columns: list[int]) -> Tensor:
    """The positions that need each subcomponent."""
    needed = torch.zeros(POSITIONS, len(columns), dtype=torch.bool)
    for column, positions in enumerate(columns):
        needed[positions, column] = True
    return needed


class Site:
    """A site whose inputs hold what each subcomponent reads, one input dimension for each of them.

    `wrote` and `writes`: what subcomponents wrote for the inputs before and write now, `[positions, C, d]`.
    """

    def __init__(self, needed: Tensor, h: Tensor, U: Tensor) -> None:
        self.x, self.V, self.U = h, torch.eye(h.shape[1]), U.clone()
        self.sum = self.V @ self.U
        self.wrote = self.writes
        self.joins = join_site(self.V, self.U, needed=needed, h=h.clone())

    @property
    def writes(self) -> Tensor:
        return (self.x @ self.V)[:, :, None] * self.U


def test_of_two_halves_one_does_the_work_of_both_and_the_sum_stays() -> None:
    x = draw(POSITIONS, 2)
    h = torch.stack([x[:, 0], -0.5 * x[:, 0] + 0.01 * x[:, 1], x[:, 1]], dim=1)
    site = Site(on(FIRST, FIRST, SECOND), h, draw(3, 4, seed=1))
    (found,) = site.joins
    assert {*found} == {0, 1}
    torch.testing.assert_close(site.V @ site.U, site.sum)
    both = site.wrote[FIRST][:, [0, 1]].sum(dim=1)
    assert (site.writes[FIRST][:, found.whole] - both).norm() < 0.02 * both.norm()
    assert site.writes[FIRST][:, found.part].norm() < 0.02 * both.norm()
    torch.testing.assert_close(site.writes[:, 2], site.wrote[:, 2])


def test_a_part_that_others_need_too_keeps_what_it_does_for_them() -> None:
    x = draw(POSITIONS, 1)[:, 0]
    is_first = torch.zeros(POSITIONS).index_fill(0, torch.tensor(FIRST), 1)
    h = torch.stack([x * is_first, 0.7 * x], dim=1)  # the second reads what the first does, and others
    site = Site(on(FIRST, FIRST + SECOND), h, draw(2, 4, seed=1))
    assert site.joins == [Join(whole=0, part=1)]
    torch.testing.assert_close(site.writes[FIRST, 0], site.wrote[FIRST].sum(dim=1))
    assert site.writes[FIRST, 1].abs().max() < 1e-6
    torch.testing.assert_close(site.writes[SECOND], site.wrote[SECOND])


def of_two_signs() -> tuple[Tensor, Tensor, Tensor]:
    """What needs and reads a direction of both signs, and the positive sign alone."""
    x = draw(POSITIONS, 1)[:, 0].abs().clamp(min=0.1)
    sign = torch.ones(POSITIONS).index_fill(0, torch.tensor(SECOND), -1)
    h = torch.stack([x * sign, x * (sign > 0)], dim=1)
    h[80:] = 0
    return on(FIRST + SECOND, FIRST), h, sign


def test_where_one_will_do_for_both_signs_it_takes_over() -> None:
    needed, h, _ = of_two_signs()
    for order in ([0, 1], [1, 0]):
        U = torch.tensor([[1.0, 0.0], [0.4, 0.1]])
        (found,) = Site(needed[:, order], h[:, order], U[order]).joins
        assert (order[found.whole], order[found.part]) == (0, 1)


def test_where_one_will_not_do_each_keeps_a_sign() -> None:
    needed, h, _ = of_two_signs()
    site = Site(needed, h, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert site.joins == [Join(whole=1, part=0)]
    assert site.writes[FIRST, 0].abs().max() < 1e-6  # the negative sign's
    assert site.writes[SECOND, 1].abs().max() < 1e-6  # the positive sign's
    torch.testing.assert_close(site.writes.sum(dim=1), site.wrote.sum(dim=1))


def test_others_would_hear_too_much_of_what_a_large_ratio_hands_on() -> None:
    x = draw(POSITIONS, 1)[:, 0]
    needed, U = on(FIRST, FIRST + SECOND), torch.diag(torch.tensor([5.0, 1.0]))
    for noise, expected in ((0.01, [Join(0, 1)]), (0.5, [])):
        weak = torch.where(torch.arange(POSITIONS) < 40, 0.1 * x, noise * draw(POSITIONS, seed=2))
        assert Site(needed, torch.stack([weak, x], dim=1), U).joins == expected


@pytest.mark.parametrize(
    ("needed", "h"),
    [
        pytest.param(on(FIRST, FIRST), draw(POSITIONS, 2), id="no ratio"),
        pytest.param(on(FIRST, FIRST), torch.zeros(POSITIONS, 2), id="both do nothing"),
        pytest.param(on(FIRST, SECOND), draw(POSITIONS, 1).expand(-1, 2), id="not together"),
        pytest.param(  # 17 of 57
            on(list(range(60)), list(range(43, 100))), draw(POSITIONS, 1).expand(-1, 2), id="seldom together"
        ),
        pytest.param(on(FIRST[:15], FIRST[:15]), draw(POSITIONS, 1).expand(-1, 2), id="too few to judge by"),
    ],
)
def test_others_are_not_joined(needed: Tensor, h: Tensor) -> None:
    site = Site(needed, h, draw(2, 4, seed=1))
    assert site.joins == []
    assert torch.equal(site.writes, site.wrote)


def test_of_three_parts_two_are_joined_at_a_time_and_the_third_the_next_time() -> None:
    h = draw(POSITIONS, 1) * torch.tensor([1.0, 2.0, 3.0])
    needed, V, U = on(FIRST, FIRST, FIRST), torch.eye(3), draw(1, 4, seed=1).expand(3, -1).clone()
    found = [join_site(V, U, needed=needed, h=h @ V) for _ in range(3)]
    assert [len(joins) for joins in found] == [1, 1, 0]
    (first,), (second,), _ = found
    assert first.whole == second.whole
    assert {first.whole, first.part, second.part} == {0, 1, 2}


def test_one_that_writes_nothing_does_not_keep_others_from_being_joined() -> None:
    h = draw(POSITIONS, 1).expand(-1, 3)
    U = draw(1, 4, seed=1) * torch.tensor([[1.0], [1e-4], [1.0]])
    (found,) = Site(on(FIRST, FIRST, FIRST), h, U).joins
    assert {*found} == {0, 2}


def halved(target: nn.Module, site: str, tied: dict[str, str] | None = None) -> DecomposedModel:
    """A decomposition of which the first subcomponent of a site is in two halves, 0 and 1; all have g 1."""
    sites = {name.replace(".", "__"): SitePattern(pattern=name, C=4) for name in {site, *(tied or {})}}
    config = Decomposition(sites=sites, tied=tied or {})
    model = DecomposedModel(copy.deepcopy(target), config, MLPCausalImportance(hidden=2), seed=0)
    with torch.no_grad():
        pieces = model.pieces(site)
        pieces.V[:, 1], pieces.U[1] = pieces.V[:, 0], pieces.U[0]
        for parameter in model.ci_parameters():
            parameter.fill_(1)
    return model


def test_a_model_is_the_same_sum_after_and_says_what_was_joined() -> None:
    model = halved(nn.Sequential(nn.Linear(5, 3)), "0")
    before = model.weight_delta("0").detach().clone()
    found = join(model, draw(200, 5).abs())
    assert found == {"0": [Join(0, 1)]} or found == {"0": [Join(1, 0)]}
    torch.testing.assert_close(model.weight_delta("0"), before)
    (pair,) = found["0"]
    left = model.pieces("0").V[:, pair.part].norm() * model.pieces("0").U[pair.part].norm()
    assert left < 1e-5
    assert told(found) == f"0: {pair.part} into {pair.whole}"


def test_tied_sites_stay_as_they_are() -> None:
    model = halved(TMSModel(draw(2, 5), torch.zeros(5), 0), "embed", {"unembed": "embed"})
    assert join(model, draw(200, 5).abs()) == {}


def test_padding_is_passed_over() -> None:
    class Target(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding.from_pretrained(draw(4, 6)), nn.Linear(6, 4)

        def forward(self, tokens: Tensor) -> Tensor:
            read: Tensor = self.out(self.embed(tokens.clamp(min=0)))
            return read

    tokens = torch.arange(4).repeat(3, 1)
    model = halved(Target(), "out")
    assert join(model, torch.cat([tokens, torch.full((3, 20), -1)], dim=1)) == {}  # twelve are real
    assert join(model, tokens.repeat(1, 5)) != {}
