"""What a start lets through for a lone feature, against masks that are drawn."""

import copy

import torch
from benchmarks.start_noise import noise
from torch import nn

from spd_hydra.ci_fn.mlp import MLPCausalImportance
from spd_hydra.decomposition.config import Decomposition, SitePattern
from spd_hydra.decomposition.decomposed_model import DecomposedModel


def test_the_error_is_that_of_random_masks_on_all_subcomponents_but_the_best() -> None:
    generator = torch.Generator().manual_seed(0)
    target = nn.Sequential(nn.Linear(3, 2, bias=False))
    config = Decomposition(sites={"all": SitePattern(pattern="0", C=3)})
    model = DecomposedModel(copy.deepcopy(target), config, MLPCausalImportance(hidden=2), seed=0)
    pieces, x = model.pieces("0"), torch.eye(3)
    with torch.no_grad():
        pieces.V.copy_(torch.eye(3) + 0.1 * torch.randn(3, 3, generator=generator))
        pieces.U.copy_(torch.linalg.solve(pieces.V, target[0].weight.T))  # V U is W: nothing is left over
        found = noise(model, "0", x)
        for feature in range(3):
            masks = torch.rand(200_000, 3, generator=generator)
            masks[:, feature] = 1
            wrong = (masks - 1) * pieces.V[feature] @ pieces.U
            share = wrong.square().sum(1).mean() / target[0].weight[:, feature].square().sum()
            torch.testing.assert_close(found[feature], share, rtol=0.02, atol=0)
