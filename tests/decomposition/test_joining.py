"""Two parts of one subcomponent are found and joined; whatever else is on together stays."""

import copy

import pytest
import torch
from torch import Tensor, nn

from spd_hydra.ci_fn.mlp import MLPCausalImportance
from spd_hydra.decomposition.config import Decomposition, SitePattern
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.decomposition.joining import Pair, join, joined, parts_of_one, told
from spd_hydra.decomposition.subcomponents import Init, Subcomponents
from spd_hydra.model.tms import TMSModel

POSITIONS = 100


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def on(*columns: list[int]) -> Tensor:
    """Causal importances: 1 at the positions named for each subcomponent."""
    g = torch.zeros(POSITIONS, len(columns))
    for column, positions in enumerate(columns):
        g[positions, column] = 1
    return g


FIRST, SECOND = list(range(40)), list(range(40, 80))


def test_what_is_on_together_in_one_ratio_is_one() -> None:
    x = draw(POSITIONS, 2)
    strengths = torch.stack([x[:, 0], -0.5 * x[:, 0], x[:, 1]], dim=1)
    assert parts_of_one(on(FIRST, FIRST, SECOND), strengths) == [Pair(whole=0, part=1)]


def test_the_part_is_the_one_that_fewer_positions_need() -> None:
    x = draw(POSITIONS, 1)
    strengths = torch.cat([0.2 * x, x], dim=1)
    assert parts_of_one(on(FIRST + SECOND, FIRST), strengths) == [Pair(whole=0, part=1)]
    assert parts_of_one(on(FIRST, FIRST + SECOND), strengths) == [Pair(whole=1, part=0)]


@pytest.mark.parametrize(
    ("needs", "reads"),
    [
        pytest.param(on(FIRST, FIRST), draw(POSITIONS, 2), id="no ratio"),
        pytest.param(
            on(FIRST, FIRST), draw(POSITIONS, 2) * torch.tensor([1, 0.01]), id="no ratio, and small"
        ),
        pytest.param(on(FIRST, FIRST), draw(POSITIONS, 1) * torch.tensor([1, 0]), id="one does nothing"),
        pytest.param(on(FIRST, SECOND), draw(POSITIONS, 1).expand(-1, 2), id="not together"),
        pytest.param(on(FIRST[:30], FIRST[15:]), draw(POSITIONS, 1).expand(-1, 2), id="seldom together"),
        pytest.param(on(FIRST[:15], FIRST[:15]), draw(POSITIONS, 1).expand(-1, 2), id="too few to judge by"),
    ],
)
def test_others_are_not(needs: Tensor, reads: Tensor) -> None:
    assert parts_of_one(needs, reads) == []


def test_of_three_parts_two_are_joined_at_a_time() -> None:
    strengths = draw(POSITIONS, 1) * torch.tensor([1.0, 2.0, 3.0])
    (pair,) = parts_of_one(on(FIRST, FIRST, FIRST), strengths)
    assert len({*pair}) == 2


def test_joined_the_first_does_the_work_of_both_and_the_sum_stays() -> None:
    pieces = Subcomponents(torch.zeros(4, 6), 3, Init.normal, torch.Generator().manual_seed(0))
    with torch.no_grad():
        pieces.V[:, 1] = -0.7 * pieces.V[:, 0] + 0.01 * pieces.V[:, 1]
    x = draw(POSITIONS, 6)
    V, U = pieces.V.detach().clone(), pieces.U.detach().clone()
    g = on(FIRST, FIRST, SECOND)
    with torch.no_grad():
        joined(pieces, x @ V, g, [Pair(0, 1)])
    torch.testing.assert_close(pieces.V @ pieces.U, V @ U)
    assert torch.equal(pieces.V[:, 2], V[:, 2])
    assert torch.equal(pieces.U[2], U[2])
    wanted = x[FIRST] @ V[:, :2] @ U[:2]
    parts = [x[FIRST] @ pieces.V[:, [c]] @ pieces.U[[c]] for c in (0, 1)]
    assert (parts[0] - wanted).norm() < 0.02 * wanted.norm()
    assert parts[1].norm() < 0.02 * wanted.norm()


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
    assert found == {"0": [Pair(0, 1)]} or found == {"0": [Pair(1, 0)]}
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
