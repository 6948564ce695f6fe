"""Calls with other tensors: each place has the right one during the call, and its own one after it."""

import torch
from torch import Tensor, nn

from spd_hydra.places import call, places


class Net(nn.Module):
    """One layer at two places, and two layers with one weight."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2, bias=False)
        self.again = self.first
        self.tied = nn.Linear(2, 2)
        self.tied.weight = self.first.weight
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.scale * self.again(self.tied(self.first(x)))
        return y


def test_each_place_counts_once_and_has_the_name_of_the_tensors_first() -> None:
    assert places(Net()) == {
        "scale": "scale",
        "first.weight": "first.weight",
        "tied.weight": "first.weight",
        "tied.bias": "tied.bias",
    }


def test_every_place_has_the_tensors_of_the_call_and_afterwards_its_own() -> None:
    net, x = Net(), torch.tensor([1.0, 3.0])
    before = [net.first.weight, net.tied.weight, net.tied.bias, net.scale]
    weights = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(0))

    def one(weight: Tensor) -> Tensor:
        y: Tensor = call(net, {"first.weight": weight, "scale": torch.tensor(5.0)}, (x,))
        return y

    found = torch.vmap(one)(weights)
    for weight, own in zip(weights, found, strict=True):
        wanted = 5 * (weight @ (weight @ (weight @ x) + net.tied.bias))
        torch.testing.assert_close(own, wanted)
    after = [net.first.weight, net.tied.weight, net.tied.bias, net.scale]
    assert all(own is kept for own, kept in zip(after, before, strict=True))
