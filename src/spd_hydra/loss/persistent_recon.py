"""Adversarial reconstruction with lasting sources: a few sets of masks, trained against the model."""

import dataclasses
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spd_hydra import rng
from spd_hydra.ci_fn.sigmoid import CausalImportance
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.decomposition.masks import SiteMask, mask_from_sources
from spd_hydra.decomposition.routing import Routing
from spd_hydra.loss.base import LossInputs, Statistics
from spd_hydra.loss.recon import RoutedRecon, masked_divergence
from spd_hydra.optimizer import load_state_tensors, state_tensors
from spd_hydra.section import option

_STATE = "adversary."
_EPS = 1e-16
"""Of Adam: small, as gradients are those of a mean, times a coefficient, on which no step should depend."""


@dataclasses.dataclass(kw_only=True)
class PersistentPGDRecon(RoutedRecon):
    """Mean divergence between the target's output and that of passes with the adversary's masks.

    Masks are m = g + (1 - g)·r with one of `n_sources` sets of sources r (and δ of the weight delta). A set
    is the same for all inputs; each row of the batch gets one at random. The sets start from U(0, 1), last
    over the training, and climb the divergence by Adam of their own, clamped to [0, 1]: `ascents` times per
    step, the last time with the gradient of the step's own backward pass, before that with passes of their
    own on the same batch. Mean over sites if layerwise, and over what the divergence averages. Range: ≥ 0.
    Later practice.

    Evaluations measure it under the sets as they are, and only where it is trained on.
    """

    always_measured = False  # without training there are no sources

    routing: Routing = option(
        Routing.uniform_k, "all | layerwise | uniform_k | static: sites masked together"
    )
    n_sources: int = option(8, "sets of sources, each shared by all inputs", ge=1)
    ascents: int = option(1, "updates of the sources per training step", ge=1)
    lr: float = option(0.1, "learning rate of the sources, which lie in [0, 1]", gt=0)
    beta_1: float = option(0.9, "decay of Adam's mean of the gradient", ge=0, lt=1)
    beta_2: float = option(0.99, "decay of Adam's mean of its square", ge=0, lt=1)

    def columns(self, model: DecomposedModel) -> int:
        return self.route_columns(model) + 1

    @property
    def is_mean(self) -> bool:
        return True

    def statistics(self, inputs: LossInputs) -> Statistics:
        chosen = self._of_rows(inputs.draws[..., -1])

        def make(site: str, ci: CausalImportance) -> SiteMask:
            with torch.autocast(chosen.device.type, enabled=False):  # a choice, not arithmetic
                own = chosen @ inputs.sources[site]
            return mask_from_sources(ci, own, use_delta=inputs.model.config.use_delta)

        total = inputs.draws.new_zeros(())
        count: Tensor | int = 0
        for route in self.routes(inputs.model, inputs.draws[..., :-1]):
            own = [inputs.sources[site] for site in route]
            divergence, size = masked_divergence(inputs, make, route, own)
            total = total + divergence
            count = count + size
        return {"sum": total, "count": total.new_zeros(()) + count}

    def _of_rows(self, draws: Float[Tensor, "*positions"]) -> Float[Tensor, "*#positions n_sources"]:
        """Each row's set of sources, one-hot."""
        of_row = draws[(slice(None), *[slice(1)] * (draws.dim() - 1))]  # its first position decides
        chosen = (of_row * self.n_sources).floor()
        return (chosen[..., None] == torch.arange(self.n_sources, device=draws.device)).float()


class Adversary(nn.Module):
    """The lasting sources of all terms that have some, and their optimisers.

    Their gradients come with those of the model, from the backward pass of the step, and they climb where the
    model descends.

    Args:
        model: the decomposed model.
        terms: those that have some.
        seed: where the sources start.
    """

    def __init__(self, model: DecomposedModel, terms: Mapping[str, PersistentPGDRecon], *, seed: int) -> None:
        super().__init__()
        self.terms = dict(terms)
        self._shapes = {site: shape.C + 1 for site, shape in model.site_shapes().items()}
        self._seed = seed
        self.values = nn.ParameterDict()
        for name, term in self.terms.items():
            for site, width in self._shapes.items():
                self.values[_key(name, site)] = nn.Parameter(
                    torch.empty(term.n_sources, width, device=model.device)
                )
        self._optimizers = {
            name: torch.optim.Adam(
                self.of(name).values(),
                lr=term.lr,
                betas=(term.beta_1, term.beta_2),
                eps=_EPS,
                maximize=True,
                fused=model.device.type != "meta",
            )
            for name, term in self.terms.items()
        }
        self.set_state({})

    def of(self, term: str) -> dict[str, Tensor]:
        """The sources of a term by site, `[n_sources, C + 1]`; none for a term that has none."""
        if term not in self.terms:
            return {}
        return {site: self.values[_key(term, site)] for site in self._shapes}

    @property
    def extra_ascents(self) -> int:
        """How many ascents of a step need passes of their own."""
        return max((term.ascents for term in self.terms.values()), default=1) - 1

    @torch.no_grad()
    def ascend(self, left: int = 0) -> None:
        """Let the sources climb their gradients, and keep them in [0, 1].

        Args:
            left: how many ascents of this step come after this one; a term that has fewer waits.
        """
        for name, optimizer in self._optimizers.items():
            if self.terms[name].ascents > left:
                optimizer.step()
                for own in self.of(name).values():
                    own.clamp_(0, 1)

    def state(self) -> dict[str, Tensor]:
        """Sources and moments by name, as the adversary goes on changing them."""
        found = {f"sources.{name}": value.detach() for name, value in self.values.items()}
        for optimizer in self._optimizers.values():
            found |= state_tensors(optimizer, list(self.values.items()))
        return {_STATE + name: value for name, value in sorted(found.items())}

    @torch.no_grad()
    def set_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Set what `state` gave; without any, sources and moments of the start.

        Args:
            tensors: as `state` names them; others are passed over.

        Raises:
            ValueError: they are of other sources.
        """
        own = {key.removeprefix(_STATE): v for key, v in tensors.items() if is_adversarys(key)}
        for key, value in self.values.items():
            if not own:
                value.copy_(torch.rand(value.shape, generator=rng.generator(self._seed, f"adversary/{key}")))
            elif f"sources.{key}" not in own:
                raise ValueError(f"saved adversaries do not fit this loss: there are no sources {key!r}")
            else:
                value.copy_(own[f"sources.{key}"])
        for term, optimizer in self._optimizers.items():
            named = [(key, self.values[key]) for key in (_key(term, site) for site in self._shapes)]
            keys = {key for key, _ in named}
            optimizer.state.clear()
            moments = {k: v for k, v in own.items() if not k.startswith("sources.")}
            load_state_tensors(
                optimizer, named, {k: v for k, v in moments.items() if k.partition(".")[2] in keys}
            )


def is_adversarys(name: str) -> bool:
    """Whether a tensor of this name is of `Adversary.state`."""
    return name.startswith(_STATE)


def _key(term: str, site: str) -> str:
    """Name of a term's sources at a site; a name in ParameterDict has no dots."""
    return f"{term}/{site}".replace(".", "/")
