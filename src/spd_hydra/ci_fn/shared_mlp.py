"""`shared_mlp`: one MLP per site from the site's input to all its subcomponents."""

import dataclasses
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from spd_hydra.ci_fn.base import CausalImportanceFn, SiteActivation, SiteShape, kaiming_normal
from spd_hydra.ci_fn.vector_mlp import refuse_embeddings
from spd_hydra.section import option, register


@register("ci_fn", "shared_mlp")
@dataclasses.dataclass(kw_only=True)
class SharedMLPCausalImportance(CausalImportanceFn):
    """z = MLP(x): one `d_in → hidden… → C` GELU network per site."""

    hidden: list[int] = option(
        default_factory=lambda: [256], help="widths of the hidden layers, e.g. [256,128]", ge=1
    )

    def build(self, sites: Mapping[str, SiteShape], generator: torch.Generator) -> nn.Module:
        return _SharedMLP(sites, self.hidden, generator)


class _SharedMLP(nn.Module):
    def __init__(self, sites: Mapping[str, SiteShape], hidden: list[int], generator: torch.Generator) -> None:
        super().__init__()
        refuse_embeddings(sites, "shared_mlp")
        self.sites = nn.ModuleDict(
            {
                name.replace(".", "/"): gelu_mlp([shape.d_in, *hidden, shape.C], generator)
                for name, shape in sites.items()
            }
        )

    def forward(self, activations: Mapping[str, SiteActivation]) -> dict[str, Tensor]:
        return {
            name: self.sites[name.replace(".", "/")](activation.input)
            for name, activation in activations.items()
        }


def gelu_mlp(widths: list[int], generator: torch.Generator) -> nn.Sequential:
    """Linear layers of the given widths with exact GELU between them, Kaiming-normal weights, zero biases."""
    layers: list[nn.Module] = []
    for index, (d_in, d_out) in enumerate(pairwise(widths)):
        is_last = index == len(widths) - 2
        linear = nn.Linear(d_in, d_out, device="meta")
        gain = 1.0 if is_last else 2**0.5
        linear.weight = kaiming_normal((d_out, d_in), fan_in=d_in, gain=gain, generator=generator)
        linear.bias = nn.Parameter(torch.zeros(d_out))
        layers += [linear] if is_last else [linear, nn.GELU()]
    return nn.Sequential(*layers)
