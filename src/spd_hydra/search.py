"""The search for the worst masks of a batch that is looked at in parts."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from spd_hydra import distributed
from spd_hydra.compiling import Kernel
from spd_hydra.loss.ascent import Sources, Values, worst_sources
from spd_hydra.loss.objective import Objective


class Search:
    """Finds the sources that all positions of a batch share, as if it were looked at as a whole.

    Divergence and gradient are sums over rows. So every point of an ascent is looked at part by part, each
    with a clean pass of its own, and ranks meet once for the sums.

    Args:
        objective: the loss.
        compile: trace and compile what is done with a part; otherwise run it as it is written.
    """

    def __init__(self, objective: Objective, *, compile: bool) -> None:
        self._objective = objective
        self._looks = {
            (name, wants_slopes): _Look(objective, name, wants_slopes, compile=compile)
            for name in objective.losses.searching_terms()
            for wants_slopes in (False, True)
        }

    def __call__(self, parts: Callable[[], Iterable[tuple[Tensor, Tensor]]]) -> dict[str, Sources]:
        """The worst sources of every searching term, by site.

        Args:
            parts: gives this rank's parts of the batch, each with its draws, as often as it is called.
        """
        return {name: self._of(name, parts) for name in self._objective.losses.searching_terms()}

    @torch.no_grad()
    def _of(self, name: str, parts: Callable[[], Iterable[tuple[Tensor, Tensor]]]) -> Sources:
        term = self._objective.losses.searching_terms()[name]
        _, draws = next(iter(parts()))
        start = self._objective.start_of_search(name, draws)

        def look(r: Sources, wants_slopes: bool) -> tuple[Values, Sources]:
            total: list[Tensor] = []
            for batch, draws in parts():
                own = self._looks[name, wants_slopes](batch, draws, r)
                total = [a + b for a, b in zip(total, own, strict=True)] if total else list(own)
            summed = distributed.global_sum(total)
            slopes = dict(zip(r, summed[len(r) :], strict=True)) if wants_slopes else {}
            return dict(zip(r, summed[: len(r)], strict=True)), slopes

        return worst_sources(look, start, n_steps=term.n_steps, step_size=term.step_size)


class _Look:
    """What a part contributes to the divergence of a term, and to its gradient, as a function of tensors."""

    def __init__(self, objective: Objective, term: str, wants_slopes: bool, *, compile: bool) -> None:
        self._module = _LookModule(objective, term, wants_slopes=wants_slopes)
        self._parameters = dict(self._module.named_parameters())
        self._sites = objective.model.site_names
        self._run = Kernel(self._flat) if compile else self._flat

    def __call__(self, batch: Tensor, draws: Tensor, r: Mapping[str, Tensor]) -> Sequence[Tensor]:
        """By site the divergences, then the gradients if they are wanted."""
        found: Sequence[Tensor] = self._run(
            batch, draws, *(r[site] for site in self._sites), *self._parameters.values()
        )
        return found

    def _flat(self, batch: Tensor, draws: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        r = dict(zip(self._sites, others, strict=False))
        values = (value.detach() for value in others[len(r) :])  # only sources are differentiated by
        parameters = dict(zip(self._parameters, values, strict=True))
        divergences, slopes = functional_call(self._module, parameters, (batch, draws, r))
        return *(divergences[site] for site in self._sites), *(slopes[site] for site in self._sites if slopes)


class _LookModule(nn.Module):
    """`Objective.look` as a module, so that parameters can be passed in."""

    def __init__(self, objective: Objective, term: str, *, wants_slopes: bool) -> None:
        super().__init__()
        self.model = objective.model
        self._objective, self._term, self._wants_slopes = objective, term, wants_slopes

    def forward(self, batch: Tensor, draws: Tensor, r: Sources) -> tuple[Values, Sources]:
        return self._objective.look(self._term, batch, draws, r, wants_slopes=self._wants_slopes)
