"""`init=inputs`: V along inputs of the site, far apart; U the smallest that sums to the weights."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from spd_hydra.ci_fn.mlp import MLPCausalImportance
from spd_hydra.decomposition.config import Decomposition, SitePattern
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.decomposition.detector_init import start_as_detectors
from spd_hydra.decomposition.input_init import shares, spread_directions, start_from_inputs
from spd_hydra.decomposition.subcomponents import Init
from spd_hydra.model.resid_mlp import MLPLayer, ResidMLPModel
from spd_hydra.model.tms import TMSModel
from spd_hydra.section import ConfigError


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


STARTS: dict[str, Callable[[DecomposedModel, Tensor], None]] = {
    "inputs": start_from_inputs,
    "detectors": start_as_detectors,
}
either = pytest.mark.parametrize("init", STARTS)


def decomposed(
    target: nn.Module, tied: dict[str, str] | None = None, init: str = "inputs", **c: int
) -> DecomposedModel:
    sites = {name: SitePattern(pattern=name.replace("__", "."), C=C) for name, C in c.items()}
    config = Decomposition(sites=sites, tied=tied or {}, init=Init[init])
    return DecomposedModel(copy.deepcopy(target), config, MLPCausalImportance(hidden=2), seed=0)


def test_directions_are_chosen_far_from_those_before() -> None:
    inputs = torch.tensor([[0.0, 0, 0], [2, 0, 0], [3, 0.3, 0], [-1, 0, 0], [1, 1, 0], [0, 0, 5], [0, 4, 0]])
    V = spread_directions(inputs, 3, torch.ones(3, 3))
    # Three lie along the first axis; then one at a right angle to it; then one at right angles to both.
    assert V.T.tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 0]]


def test_of_directions_equally_far_the_one_that_most_inputs_have_is_chosen() -> None:
    sums = torch.tensor([[0.0, 1, 1, 0], [0, 1, -1, 0], [0, 0, 1, 1]])  # also at a right angle to the first
    alone = torch.eye(4).repeat_interleave(torch.tensor([5, 4, 3, 2]), dim=0) * draw(14, 1).sign()
    V = spread_directions(torch.cat([sums, alone]), 4, torch.ones(4, 4))
    assert torch.equal(V.abs(), torch.eye(4))


def test_no_input_is_chosen_twice() -> None:
    V = spread_directions(torch.tensor([[1.0, 0], [2, 0], [3, 0.1]]), 4, torch.eye(2, 4) + 3)
    assert sorted(round(float(y), 2) for y in V[1, :3]) == [0, 0, 0.03]
    torch.testing.assert_close(V[:, 3], torch.tensor([3.0, 3.0]) / 18**0.5)


def test_where_inputs_have_fewer_directions_the_other_columns_stay() -> None:
    V = spread_directions(torch.tensor([[0.0, 3.0]]), 3, torch.tensor([[9.0, 3.0, 0.0], [9.0, 4.0, 2.0]]))
    torch.testing.assert_close(V, torch.tensor([[0.0, 0.6, 0.0], [1.0, 0.8, 1.0]]))


def test_each_takes_what_those_before_it_leave() -> None:
    V = torch.tensor([[1.0, 0.0, 0.6], [0.0, 1.0, 0.8], [0.0, 0.0, 0.0]])  # the third is a sum of the others
    weight = torch.tensor([[3.0, 1.0], [-2.0, 4.0], [5.0, 5.0]])
    # Read by the first two as they are, nothing is left for the third, and nobody reads the last row.
    torch.testing.assert_close(shares(V, weight), torch.tensor([[3.0, 1.0], [-2.0, 4.0], [0.0, 0.0]]))


def test_what_one_pass_leaves_of_the_weights_is_shared_by_all() -> None:
    V = torch.tensor([[1.0, 0.6], [0.0, 0.8]])
    weight = torch.tensor([[1.0], [1.0]])
    # The first takes 1 and leaves (0, 1), the second 0.8 of that: (-0.48, 0.36) is left, V⁻¹ of it is shared.
    rest = torch.linalg.inv(V) @ torch.tensor([[-0.48], [0.36]])
    torch.testing.assert_close(shares(V, weight), torch.tensor([[1.0], [0.8]]) + rest)
    torch.testing.assert_close(V @ shares(V, weight), weight)


def test_every_lone_feature_gets_a_subcomponent_that_reads_it() -> None:
    layer = MLPLayer(draw(3, 12, seed=1), draw(12, 3, seed=2))
    W_E = torch.linalg.qr(draw(12, 5, seed=3))[0].T
    model = decomposed(ResidMLPModel(W_E, [layer]), layers__0__mlp_in=7, layers__0__mlp_out=4)
    start_from_inputs(model, torch.cat([torch.zeros(3, 5), -0.5 * torch.eye(5), draw(20, 5)]))
    pieces = model.pieces("layers.0.mlp_in")
    torch.testing.assert_close((W_E @ pieces.V).abs().amax(dim=1), torch.ones(5))
    # Seven directions span the five that inputs have: there V U is W.
    torch.testing.assert_close(W_E @ pieces.V @ pieces.U, W_E @ layer.mlp_in.weight.T, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.weight_delta("layers.0.mlp_out"), torch.zeros(12, 3), atol=1e-5, rtol=0)


@either
def test_tied_sites_follow_their_source(init: str) -> None:
    target = TMSModel(draw(2, 5), torch.zeros(5), 0)
    model = decomposed(target, {"unembed": "embed"}, init, embed=6, unembed=6)
    STARTS[init](model, torch.eye(5))
    torch.testing.assert_close(model.weight_delta("embed"), torch.zeros(2, 5), atol=1e-5, rtol=0)
    assert torch.equal(model.pieces("unembed").V, model.pieces("embed").U.T)


@either
def test_a_site_may_start_otherwise_than_the_rest(init: str) -> None:
    layer = MLPLayer(draw(3, 12, seed=1), draw(12, 3, seed=2))
    sites = {
        "mlp_in": SitePattern(pattern="layers.*.mlp_in", C=7, init=Init[init]),
        "mlp_out": SitePattern(pattern="layers.*.mlp_out", C=4),
    }
    target = ResidMLPModel(torch.linalg.qr(draw(12, 5, seed=3))[0].T, [layer])
    model = DecomposedModel(target, Decomposition(sites=sites), MLPCausalImportance(hidden=2), seed=0)
    before = {name: model.pieces(name).V.clone() for name in model.site_names}
    STARTS[init](model, draw(20, 5))
    assert not torch.equal(model.pieces("layers.0.mlp_in").V, before["layers.0.mlp_in"])
    assert torch.equal(model.pieces("layers.0.mlp_out").V, before["layers.0.mlp_out"])


@either
def test_tokens_are_no_directions(init: str) -> None:
    target = nn.Sequential(nn.Embedding(5, 3))
    config = Decomposition(sites={"all": SitePattern(pattern="0", C=4, init=Init[init])})
    model = DecomposedModel(target, config, MLPCausalImportance(), seed=0)
    with pytest.raises(ConfigError, match=f"decomposition.init: got {init}, but site '0' is an embedding"):
        STARTS[init](model, torch.arange(5))


@either
def test_padding_is_no_direction(init: str) -> None:
    class Target(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding.from_pretrained(torch.eye(4)), nn.Linear(4, 4)

        def forward(self, tokens: Tensor) -> Tensor:
            read: Tensor = self.out(self.embed(tokens.clamp(min=0)))  # padding is read as token 0
            return read

    model = decomposed(Target(), init=init, out=3)
    STARTS[init](model, torch.tensor([[3, -1], [-1, 1], [2, -1]]))
    # Token 0 is padding alone: detectors read it by what is left of the weights.
    torch.testing.assert_close(model.pieces("out").V[1:], torch.eye(4)[1:, [3, 1, 2]])
