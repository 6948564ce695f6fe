"""`init=detectors`: each subcomponent reads one direction of the inputs; together they are the weights."""

import copy

import pytest
import torch
from torch import Tensor, nn

from spd_hydra.ci_fn.mlp import MLPCausalImportance
from spd_hydra.decomposition.config import Decomposition, SitePattern
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.decomposition.detector_init import detectors, spread_pieces, start_as_detectors
from spd_hydra.decomposition.subcomponents import Init
from spd_hydra.model.resid_mlp import MLPLayer, ResidMLPModel


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decomposed(target: nn.Module, **c: int) -> DecomposedModel:
    sites = {name: SitePattern(pattern=name.replace("__", "."), C=C) for name, C in c.items()}
    config = Decomposition(sites=sites, init=Init.detectors)
    return DecomposedModel(copy.deepcopy(target), config, MLPCausalImportance(hidden=2), seed=0)


def test_directions_are_chosen_far_from_those_before() -> None:
    inputs = torch.tensor([[0.0, 0, 0], [2, 0, 0], [3, 0.3, 0], [-1, 0, 0], [1, 1, 0], [0, 0, 5], [0, 4, 0]])
    directions = spread_pieces(inputs, torch.eye(3), torch.ones(3, 3))
    # Three lie along the first axis; then one at a right angle to it; then one at right angles to both.
    assert directions.T.tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 0]]


def test_of_directions_equally_far_the_one_that_most_inputs_have_is_chosen() -> None:
    sums = torch.tensor([[0.0, 1, 1, 0], [0, 1, -1, 0], [0, 0, 1, 1]])  # also at a right angle to the first
    alone = torch.eye(4).repeat_interleave(torch.tensor([5, 4, 3, 2]), dim=0) * draw(14, 1).sign()
    directions = spread_pieces(torch.cat([sums, alone]), torch.eye(4), torch.ones(4, 4))
    assert torch.equal(directions.abs(), torch.eye(4))


def test_of_near_inputs_both_are_chosen_if_the_weights_make_different_things_of_them() -> None:
    # 2 and 3 have a cosine of 0.6 with 1. W makes the same of 1 and 2, up to a factor, and the opposite of 3.
    inputs = torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [0.6, 0.8, 0], [0.6, 0, 0.8]])
    weight = torch.tensor([[1.0], [1], [-2]])
    directions = spread_pieces(inputs, weight, torch.ones(3, 2))
    torch.testing.assert_close(directions.T, torch.tensor([[1.0, 0, 0], [0.6, 0, 0.8]]))


def test_an_input_and_its_opposite_are_one_direction() -> None:
    inputs = torch.tensor([[1.0, 0], [-1, 0], [-2, 0], [0.8, 0.6]])
    directions = spread_pieces(inputs, torch.eye(2), torch.ones(2, 2))
    torch.testing.assert_close(directions[:, 1], torch.tensor([0.8, 0.6]))


def test_no_input_is_chosen_of_which_the_weights_make_nothing() -> None:
    directions = spread_pieces(torch.eye(2), torch.tensor([[0.0], [1]]), torch.tensor([[3.0, 3], [4, 4]]))
    torch.testing.assert_close(directions, torch.tensor([[0.0, 0.6], [1.0, 0.8]]))


def test_no_input_is_chosen_twice() -> None:
    inputs = torch.tensor([[1.0, 0], [2, 0], [3, 0.1]])
    directions = spread_pieces(inputs, torch.eye(2), torch.eye(2, 4) + 3)
    assert sorted(round(float(y), 2) for y in directions[1, :3]) == [0, 0, 0.03]
    torch.testing.assert_close(directions[:, 3], torch.tensor([3.0, 3.0]) / 18**0.5)


def test_where_inputs_have_fewer_directions_the_other_columns_stay() -> None:
    otherwise = torch.tensor([[9.0, 3.0, 0.0], [9.0, 4.0, 2.0]])
    directions = spread_pieces(torch.tensor([[0.0, 3.0]]), torch.eye(2), otherwise)
    torch.testing.assert_close(directions, torch.tensor([[0.0, 0.6, 0.0], [1.0, 0.8, 1.0]]))


def test_a_direction_that_is_a_sum_of_others_begins_with_nothing() -> None:
    lone = torch.eye(2).repeat(50, 1)
    inputs = torch.cat([lone, -lone, torch.tensor([[1.0, 1], [1, -1]])])  # sums are rare, so they come last
    V, U = detectors(inputs, torch.ones(2, 3), torch.tensor([[3.0, 1.0], [-2.0, 4.0]]))
    strengths = V.norm(dim=0) * U.norm(dim=1)
    assert float(strengths[2]) < 0.1 * float(strengths[:2].min())


def test_each_reads_its_own_direction_and_no_other() -> None:
    # Lone features along independent directions, all with a large common part, as a layer's bias would add.
    features = draw(5, 9) + 3 * draw(9, seed=1)
    inputs = draw(4000, 1, seed=2) * features[torch.arange(4000) % 5]
    V, _ = detectors(inputs, draw(9, 5, seed=3), draw(9, 2, seed=4))
    read = (features @ V).abs()
    own = read.argmax(dim=1)
    assert sorted(own.tolist()) == [0, 1, 2, 3, 4]
    others = read.scatter(1, own[:, None], 0)
    assert bool((others.amax(dim=1) < 1e-4 * read.amax(dim=1)).all())


def test_what_the_weights_make_little_of_is_read_least_by_others() -> None:
    angles = torch.tensor([0, 60, 120]).deg2rad()  # each as far from the two others: all can not be avoided
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    inputs = draw(6000, 1, seed=2) * features[torch.arange(6000) % 3]
    across = torch.tensor([-features[2, 1], features[2, 0]])
    weight = torch.outer(across, torch.tensor([1.0, 2])) + 0.05 * torch.outer(features[2], torch.ones(2))
    V, _ = detectors(inputs, draw(2, 3, seed=3), weight)
    read = (features @ V).abs()
    first = read[:, read[0].argmax()]
    assert float(first[2]) < 0.5 * float(first[1])


def test_a_difference_of_which_the_weights_make_nothing_does_not_make_two_directions_one() -> None:
    alone = torch.eye(2).repeat(100, 1) * draw(200, 1, seed=2).abs().clamp(min=0.1)
    difference = torch.tensor([[0.9, -1.0]]).repeat(4, 1)
    V, U = detectors(torch.cat([alone, difference]), draw(2, 3, seed=3), torch.tensor([[1.0], [0.9]]))
    written = V.abs() * U.norm(dim=1)  # for each direction alone
    assert written.argmax(dim=1).unique().numel() == 2
    assert float(written.amax(dim=1).min()) > 0.8


@pytest.mark.parametrize("C", [3, 5, 9])
def test_together_they_are_the_weights_also_where_no_input_lies(C: int) -> None:
    inputs = draw(500, 4) @ draw(4, 7, seed=1)  # four of seven dimensions
    weight = draw(7, 3, seed=2)
    V, U = detectors(inputs, draw(7, C, seed=3), weight)
    torch.testing.assert_close(V @ U, weight, atol=1e-5, rtol=1e-4)


def test_with_fewer_subcomponents_than_outputs_they_come_as_close_as_their_u_allow() -> None:
    weight = draw(6, 4, seed=2)
    V, U = detectors(draw(500, 6), draw(6, 2, seed=3), weight)
    left = weight - V @ U
    torch.testing.assert_close(left @ U.T, torch.zeros(6, 2), atol=1e-5, rtol=0)  # nothing along U


def test_every_lone_feature_gets_a_subcomponent_that_reads_it() -> None:
    layer = MLPLayer(draw(3, 12, seed=1), draw(12, 3, seed=2))
    W_E = torch.linalg.qr(draw(12, 5, seed=3))[0].T
    model = decomposed(ResidMLPModel(W_E, [layer]), layers__0__mlp_in=7, layers__0__mlp_out=4)
    start_as_detectors(model, torch.cat([torch.zeros(3, 5), torch.eye(5).repeat(20, 1) * draw(100, 1)]))
    V = model.pieces("layers.0.mlp_in").V
    read = (W_E @ V).abs() / (W_E @ V).norm(dim=0)  # of each subcomponent, by feature
    assert bool((read.amax(dim=1) > 0.9).all())
    for site in model.site_names:
        torch.testing.assert_close(
            model.weight_delta(site), torch.zeros_like(model.weight(site)), atol=1e-5, rtol=0
        )


def test_a_site_that_no_input_reaches_starts_as_it_would_else() -> None:
    model = decomposed(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)), **{"2": 4})
    nn.init.constant_(model.target[0].bias, -100)
    before = model.pieces("2").V.clone()
    start_as_detectors(model, draw(20, 3))
    assert torch.equal(model.pieces("2").V, before)
