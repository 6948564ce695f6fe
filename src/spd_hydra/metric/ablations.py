"""What is left of the target when its sites are ablated: cross-entropy and divergence by kind of mask."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from spd_hydra import distributed
from spd_hydra.ci_fn.sigmoid import CausalImportance
from spd_hydra.decomposition.config import Decomposition
from spd_hydra.decomposition.masks import MaskSource, SiteMask, columns_needed, draw_mask
from spd_hydra.loss.base import LossInputs
from spd_hydra.loss.divergence import Divergence, divergence_sum
from spd_hydra.loss.objective import Objective
from spd_hydra.loss.pgd_recon import PGDRecon

Numbers = Callable[[str, int], Float[Tensor, "*positions number"]]
"""Random numbers per position, of a purpose, so many."""

TARGET, ZERO = "target", "zero"
LEAST_ROOM = 1e-3  # of the target's CE: below, rounding and chance would decide the share of it
_NO_TARGET = -100  # cross_entropy's own sign for positions that do not count


class MaskKind(NamedTuple):
    """One way to mask every site: from causal importances and `columns(C)` random numbers per position."""

    make: Callable[[CausalImportance, Float[Tensor, "*positions columns"]], SiteMask]
    columns: Callable[[int], int] = lambda C: 0


def mask_kinds(config: Decomposition, rounded: Sequence[float] = ()) -> dict[str, MaskKind]:
    """Every kind of mask that is measured, by name.

    `unmasked`: m = 1. `stochastic`: as in training, the weight delta among it if it is used there. `ci`:
    m = g. `rounded_<t>`: m = 1 where g > t, else 0. `random`: m ~ U(0, 1), whatever g is. `zero`: m = 0.
    All but `stochastic` leave the weight delta out.

    Args:
        config: says how stochastic masks are drawn.
        rounded: the thresholds t.
    """

    def stochastic(ci: CausalImportance, draws: Tensor) -> SiteMask:
        return draw_mask(
            MaskSource.stochastic, ci, draws=draws, use_delta=config.use_delta, sigmoid=config.sigmoid
        )

    return {
        "unmasked": MaskKind(lambda ci, draws: SiteMask()),
        "stochastic": MaskKind(stochastic, partial(columns_needed, MaskSource.stochastic)),
        "ci": MaskKind(lambda ci, draws: SiteMask(mask=ci.lower)),
        **{rounded_name(t): MaskKind(partial(_rounded, threshold=t)) for t in rounded},
        "random": MaskKind(lambda ci, draws: SiteMask(mask=draws), lambda C: C),
        ZERO: MaskKind(lambda ci, draws: SiteMask(mask=torch.zeros_like(ci.lower))),
    }


def rounded_name(threshold: float) -> str:
    """The name of the masks g > threshold; as many digits as tell it from others."""
    short = f"{threshold:g}"
    return f"rounded_{short if float(short) == threshold else repr(threshold)}"


def _rounded(ci: CausalImportance, draws: Tensor, threshold: float) -> SiteMask:
    return SiteMask(mask=(ci.lower > threshold).to(ci.lower.dtype))


def cross_entropy_sum(
    logits: Float[Tensor, "batch length vocabulary"], tokens: Int[Tensor, "batch length"]
) -> tuple[Float[Tensor, ""], int]:
    """Cross-entropy of the next token, in nats, summed over positions, and the number of positions.

    The logits at position t are for token t + 1: the last position of a row has none. Positions that are
    padding, which negative tokens are, do not count, nor do those whose next token is padding.
    """
    following = tokens[:, 1:].masked_fill((tokens[:, 1:] < 0) | (tokens[:, :-1] < 0), _NO_TARGET)
    # Row by row: logits of a whole batch in float32 may be more than there is room for.
    rows = [
        cross_entropy(own.float(), wanted, ignore_index=_NO_TARGET, reduction="sum")
        for own, wanted in zip(logits[:, :-1], following, strict=True)
    ]
    total = torch.stack(rows).sum() if rows else logits.new_zeros(())
    return total, int((following != _NO_TARGET).sum())


def masked_cross_entropy_sum(
    logits: Float[Tensor, "batch length vocabulary"], answers: Int[Tensor, "batch length"]
) -> tuple[Float[Tensor, ""], int]:
    """Cross-entropy of what mask tokens stand for, in nats, summed over them, and their number.

    `answers` are token ids at positions with a mask token, and negative at all others, which do not count.
    """
    hidden = answers >= 0
    return cross_entropy(logits[hidden].float(), answers[hidden], reduction="sum"), int(hidden.sum())


@dataclasses.dataclass(frozen=True, kw_only=True)
class AblationSettings:
    """What to measure.

    Attributes:
        next_token: the output are logits of the next token, so that there is a cross-entropy; the
            divergence is then KL whatever training uses.
        fills_masks: the output are logits of the tokens that mask tokens stand for; likewise.
        rounded: thresholds of rounded masks.
        groups: sites by a name of the user's; of several, each is also masked alone.
        adversaries: adversarial terms by the name of their metric.
        masks: whether to measure kinds of masks and groups at all, or adversaries alone.
    """

    next_token: bool
    fills_masks: bool = False
    rounded: Sequence[float] = ()
    groups: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    adversaries: Mapping[str, PGDRecon] = dataclasses.field(default_factory=dict)
    masks: bool = True


class Ablations:
    """Adds up what masked passes lose against the target, over batches and ranks.

    For every kind of mask, at all sites at once: `kl/<kind>` or `mse/<kind>`, the divergence from the
    target's output, as in training. For models that predict the next token, or masked
    ones, also `ce/<kind>`, the cross-entropy in nats, `ce/target`, and

        ce_recovered/<kind> = (CE of zero - CE of the kind) / (CE of zero - CE of the target),

    which is 0 where nothing is left of the sites and 1 where the target is as good as before. There is no
    such share, and no metric, where the denominator is not above LEAST_ROOM times the CE of the target: the
    sites of random or tiny models may do nothing, or harm. For every group of sites, masked by their causal
    importances while the others are the target's own: `kl_subset/<group>` and `ce_subset/<group>`. For
    every adversary, its divergence. Means over positions without padding.

    Args:
        objective: model, precision and divergence.
        settings: what to measure.
    """

    def __init__(self, objective: Objective, settings: AblationSettings) -> None:
        self._objective, self._settings = objective, settings
        self.kinds = mask_kinds(objective.model.config, settings.rounded) if settings.masks else {}
        predicts = settings.next_token or settings.fills_masks
        self._divergence = Divergence.kl if predicts else objective.losses.divergence
        self._answers: Tensor | None = None
        self.sums: dict[str, Float[Tensor, " 2"]] = {}  # sum and count, by the name of the metric

    @torch.no_grad()
    def add(self, inputs: LossInputs, numbers: Numbers, answers: Tensor | None = None) -> None:
        """Measure one batch.

        Args:
            inputs: the batch with its clean pass and causal importances.
            numbers: gives random numbers for the positions of the batch.
            answers: what its mask tokens stand for, see `masked_cross_entropy_sum`; None: it has none.
        """
        self._answers = answers if self._settings.fills_masks else None
        inputs = dataclasses.replace(inputs, divergence=self._divergence)
        if self._settings.masks:
            self._add_masks(inputs, numbers)
        for name, term in self._settings.adversaries.items():
            draws = numbers(name, term.columns(inputs.model))
            found = self._objective.statistics(inputs, {name: term}, draws, {})[name]
            self._count(name, found["sum"], found["count"])

    def _add_masks(self, inputs: LossInputs, numbers: Numbers) -> None:
        shapes, divergence = self._objective.model.site_shapes(), self._divergence.value
        self._count_ce(f"ce/{TARGET}", inputs.clean.output, inputs)
        for name, kind in self.kinds.items():
            masks = {
                site: kind.make(ci, numbers(f"ablation/{name}/{site}", kind.columns(shapes[site].C)))
                for site, ci in inputs.ci.items()
            }
            self._measure(inputs, masks, f"ce/{name}", f"{divergence}/{name}")
        if len(self._settings.groups) > 1:
            for name, sites in self._settings.groups.items():
                masks = {site: SiteMask(mask=inputs.ci[site].lower) for site in sites}
                self._measure(inputs, masks, f"ce_subset/{name}", f"{divergence}_subset/{name}")

    def _measure(self, inputs: LossInputs, masks: Mapping[str, SiteMask], ce: str, divergence: str) -> None:
        output = self._objective.output(inputs, masks)
        self._count_ce(ce, output, inputs)
        found = divergence_sum(self._divergence, output, inputs.clean.output, inputs.valid)
        self._count(divergence, *found)

    def _count_ce(self, name: str, output: Tensor, inputs: LossInputs) -> None:
        if self._settings.next_token:
            self._count(name, *cross_entropy_sum(output, inputs.batch))
        elif self._answers is not None:
            self._count(name, *masked_cross_entropy_sum(output, self._answers))

    def _count(self, name: str, total: Tensor, count: Tensor | int) -> None:
        new = torch.stack([total.double(), torch.as_tensor(count, device=total.device).double()])
        self.sums[name] = self.sums[name] + new if name in self.sums else new

    def metrics(self) -> dict[str, float]:
        """All numbers, from what every rank has added; each rank has to ask."""
        sums = distributed.exact_sum(list(self.sums.values()))
        found = {name: float(own[0] / own[1]) for name, own in zip(self.sums, sums, strict=True)}
        if f"ce/{TARGET}" in found:
            found |= _recovered(found, self.kinds)
        return found


def _recovered(found: Mapping[str, float], kinds: Iterable[str]) -> dict[str, float]:
    """The share of cross-entropy recovered by each kind of mask; nothing where all off loses next to none."""
    zero, target = found[f"ce/{ZERO}"], found[f"ce/{TARGET}"]
    room = zero - target
    if not room > LEAST_ROOM * target:  # nor where there was no position and all is NaN
        return {}
    return {f"ce_recovered/{name}": (zero - found[f"ce/{name}"]) / room for name in kinds if name != ZERO}
