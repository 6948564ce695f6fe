"""`global_mlp`: one MLP from the inputs of all sites to all their subcomponents."""

import dataclasses
from collections.abc import Mapping

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from spd_hydra.ci_fn.base import CausalImportanceFn, SiteActivation, SiteShape
from spd_hydra.ci_fn.layers import HIDDEN_GAIN, ConcatenatedInputs, gelu_mlp
from spd_hydra.section import option, register


@register("ci_fn", "global_mlp")
@dataclasses.dataclass(kw_only=True)
class GlobalMLPCausalImportance(CausalImportanceFn):
    """z = MLP(x of all sites, concatenated): one `Σ d_in → hidden… → Σ C` GELU network, split by site."""

    hidden: list[int] = option(
        default_factory=lambda: [512], help="widths of the hidden layers, e.g. [512,256]", ge=1
    )

    def build(self, sites: Mapping[str, SiteShape], generator: torch.Generator) -> nn.Module:
        return _GlobalMLP(sites, self.hidden, generator)


class _GlobalMLP(nn.Module):
    def __init__(self, sites: Mapping[str, SiteShape], hidden: list[int], generator: torch.Generator) -> None:
        super().__init__()
        self.C = {name: shape.C for name, shape in sites.items()}
        widths = [*hidden, sum(self.C.values())]
        gain = HIDDEN_GAIN if hidden else 1.0
        self.first = ConcatenatedInputs(sites, widths[0], gain=gain, generator=generator)
        self.others = nn.Sequential(*([nn.GELU(), *gelu_mlp(widths, generator)] if hidden else []))

    def forward(
        self, activations: Mapping[str, SiteActivation], valid: Bool[Tensor, "*positions"] | None = None
    ) -> dict[str, Tensor]:
        z = self.others(self.first({name: activations[name].input for name in self.C}))
        return dict(zip(self.C, z.split(list(self.C.values()), dim=-1), strict=True))
