"""How often and how strongly subcomponents are needed: L0, alive, mean, density, histogram."""

import dataclasses
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spd_hydra import distributed

BINS = 50
_MOST_COUNTED = 2**24  # at a time


class SiteActivity(NamedTuple):
    """Additive counts of one site: over all positions seen so far."""

    sum_ci: Float[Tensor, " C"]
    active: Float[Tensor, " C"]
    peak: Float[Tensor, " C"]
    histogram: Float[Tensor, " bins"]


@dataclasses.dataclass
class Activity:
    """Collects the lower causal importances of all positions of an evaluation.

    A subcomponent is *active* at a position if g > threshold, and *alive* if it is active anywhere in
    the evaluation data. L0 is the mean number of active subcomponents per position.
    """

    threshold: float
    positions: int = 0
    sites: dict[str, SiteActivity] = dataclasses.field(default_factory=dict)

    @torch.no_grad()
    def add(
        self, ci: dict[str, Float[Tensor, "*positions C"]], valid: Bool[Tensor, "*positions"] | None = None
    ) -> None:
        """Count one batch of lower causal importances, by site, without the positions that are not valid."""
        for site, values in ci.items():
            g = (values if valid is None else values[valid]).float().flatten(0, -2)
            new = SiteActivity(
                g.sum(0),
                (g > self.threshold).float().sum(0),
                g.amax(0) if len(g) else torch.full_like(g.sum(0), -torch.inf),
                _histogram(g),
            )
            old = self.sites.get(site)
            if old is not None:
                new = SiteActivity(
                    old.sum_ci + new.sum_ci,
                    old.active + new.active,
                    torch.maximum(old.peak, new.peak),
                    old.histogram + new.histogram,
                )
            self.sites[site] = new
        positions = next(iter(ci.values()))[..., 0].numel() if valid is None else int(valid.sum())
        self.positions += positions

    def over_ranks(self) -> "Activity":
        """The counts of all ranks together."""
        if distributed.world_size() == 1:
            return self
        added = [
            tensor for site in self.sites.values() for tensor in (site.sum_ci, site.active, site.histogram)
        ]
        positions = torch.tensor(float(self.positions), dtype=torch.float64, device=added[0].device)
        sums = iter(distributed.exact_sum([positions, *added]))
        peaks = iter(distributed.elementwise_largest([site.peak for site in self.sites.values()]))
        total = int(next(sums))
        sites = {
            name: SiteActivity(sum_ci=next(sums), active=next(sums), peak=next(peaks), histogram=next(sums))
            for name in self.sites
        }
        return Activity(self.threshold, total, sites)

    def l0(self) -> dict[str, float]:
        """Mean number of active subcomponents per position, by site."""
        return {name: float(site.active.sum()) / self.positions for name, site in self.sites.items()}

    def alive(self) -> dict[str, int]:
        """Number of subcomponents that are active anywhere in the data, by site."""
        return {name: int((site.peak > self.threshold).sum()) for name, site in self.sites.items()}


def _histogram(g: Float[Tensor, "positions C"]) -> Float[Tensor, " bins"]:
    """How many values are in each of `BINS` equal parts of [0, 1], whose ends count too.

    In parts, added in double precision: `torch.histc` counts in float32, in which 2²⁴ + 1 is 2²⁴.
    """
    parts = torch.split(g.clamp(0, 1).flatten(), _MOST_COUNTED)
    return torch.stack([torch.histc(part, bins=BINS, min=0, max=1).double() for part in parts]).sum(0)
