"""A decomposed pair of 2x2 matrices whose every number is set by hand, for the tests of the loss."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from spd_hydra.ci_fn.mlp import MLPCausalImportance
from spd_hydra.decomposition.config import Decomposition, SitePattern
from spd_hydra.decomposition.decomposed_model import DecomposedModel

MakeModel = Callable[..., DecomposedModel]


def matrix(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32)


@pytest.fixture
def hand_made() -> MakeModel:
    """Target y = B A x with A = diag(1, 2) and B = [[1, 1], [0, 1]]; V, U and z are set by hand.

    At `a`: V = I, U = diag(1, 1): A is missed by diag(0, 1). At `b`: C = 1, V = (1, 1), U = (1, 0):
    B is missed by [[0, 0], [0, 1]]. z does not depend on the input: (1/2, 3/4) at `a`, (1/4) at `b`.
    """

    def make(*, use_delta: bool = True) -> DecomposedModel:
        target = nn.Sequential()
        target.add_module("a", nn.Linear(2, 2, bias=False))
        target.add_module("b", nn.Linear(2, 2, bias=False))
        config = Decomposition(
            sites={"a": SitePattern(pattern="a", C=2), "b": SitePattern(pattern="b", C=1)},
            use_delta=use_delta,
        )
        model = DecomposedModel(target, config, MLPCausalImportance(hidden=1), seed=0)
        values = {
            "target.a.weight": matrix((1, 0), (0, 2)),
            "target.b.weight": matrix((1, 1), (0, 1)),
            "subcomponents.a.V": matrix((1, 0), (0, 1)),
            "subcomponents.a.U": matrix((1, 0), (0, 1)),
            "subcomponents.b.V": matrix((1,), (1,)),
            "subcomponents.b.U": matrix((1, 0)),
            "ci_fn.sites.a.w_out": matrix((0,), (0,)),
            "ci_fn.sites.b.w_out": matrix((0,)),
            "ci_fn.sites.a.b_out": torch.tensor([0.5, 0.75]),
            "ci_fn.sites.b.b_out": torch.tensor([0.25]),
        }
        with torch.no_grad():
            for name, value in values.items():
                model.get_parameter(name).copy_(value)
        return model

    return make


class Chain(nn.Module):
    """Three matrices with unlike shapes, biases and nonlinearities."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(5, 7), nn.Linear(7, 4, bias=False), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.third(torch.relu(self.second(torch.relu(self.first(x)))))
        return y


@pytest.fixture
def chain() -> MakeModel:
    """A random model with three sites of unequal C."""

    def make(*, use_delta: bool = True) -> DecomposedModel:
        target, generator = Chain(), torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in target.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        patterns = {
            name: SitePattern(pattern=name, C=C) for name, C in (("first", 6), ("second", 3), ("third", 9))
        }
        config = Decomposition(sites=patterns, use_delta=use_delta)
        return DecomposedModel(target, config, MLPCausalImportance(hidden=4), seed=0)

    return make
