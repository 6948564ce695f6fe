"""`shared_mlp`: one MLP per site from the site's input to all its subcomponents."""

import dataclasses
from collections.abc import Mapping

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from spd_hydra.ci_fn.base import CausalImportanceFn, SiteActivation, SiteShape
from spd_hydra.ci_fn.layers import gelu_mlp, site_key
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
        self.sites = nn.ModuleDict(
            {
                site_key(name): gelu_mlp([shape.d_in, *hidden, shape.C], generator, of_tokens=shape.embedding)
                for name, shape in sites.items()
            }
        )

    def forward(
        self, activations: Mapping[str, SiteActivation], valid: Bool[Tensor, "*positions"] | None = None
    ) -> dict[str, Tensor]:
        return {name: self.sites[site_key(name)](own.input) for name, own in activations.items()}
