"""What taking out one subcomponent does to the output: divergence by position, classes that fall and rise."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spd_hydra.decomposition.ablation import Chosen, chosen_indices, without
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.decomposition.inputs import as_batch, real_positions
from spd_hydra.decomposition.masks import SiteMask
from spd_hydra.explore.prompt import quoted
from spd_hydra.loss.divergence import Divergence, kl_by_position, log_normaliser
from spd_hydra.report.numbers import text_table

_NUMBERS_AT_ONCE = 2**24  # of outputs of one pass: 64 MiB in float32
_CLASSES = 5  # that fall, and that rise
_ROWS = 20  # of a table

Decode = Callable[[Sequence[int]], list[str]]


class ClassChange(NamedTuple):
    """The name of a token or class, its id, and the change of its log-probability without a subcomponent.

    Of the log-probability rather than the logit: what all logits have in common changes nothing.
    """

    name: str
    id: int
    change: float


@dataclasses.dataclass(frozen=True)
class Effect:
    """What is different without one subcomponent.

    Attributes:
        site: of the subcomponent.
        index: of it there.
        ci: its largest causal importance g in the batch.
        divergence: by position, 0 where there is padding: KL(target ‖ without it), or the squared error, mean
            over outputs.
        mean: of the divergence over positions that are no padding.
        falls: the classes whose log-probability falls most without it, which it speaks for; at most 5, empty
            where none falls and where outputs are no logits.
        rises: those whose log-probability rises most without it.
    """

    site: str
    index: int
    ci: float
    divergence: Float[Tensor, "*positions"] = dataclasses.field(repr=False)
    mean: float
    falls: list[ClassChange]
    rises: list[ClassChange]


@dataclasses.dataclass(frozen=True)
class JointEffect:
    """What is different without all of some subcomponents at once; for the rest see `Effect`.

    Attributes:
        subcomponents: their indices by site.
    """

    subcomponents: dict[str, list[int]]
    divergence: Float[Tensor, "*positions"] = dataclasses.field(repr=False)
    mean: float
    falls: list[ClassChange]
    rises: list[ClassChange]


@dataclasses.dataclass(frozen=True, repr=False)
class Effects:
    """Effects of subcomponents on one batch, the largest mean first; `effects[site, index]` is one of them.

    Attributes:
        kind: `kl` or `mse`.
        found: all of them.
    """

    kind: Divergence
    found: list[Effect]

    def __iter__(self) -> Iterator[Effect]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, key: tuple[str, int]) -> Effect:
        for effect in self.found:
            if (effect.site, effect.index) == key:
                return effect
        raise KeyError(f"{key}: was not taken out; name it: effects(batch, {{{key[0]!r}: [{key[1]}]}})")

    def table(self, n: int = _ROWS) -> str:
        """The `n` largest effects as text."""
        header = ["site", "c", "g", self.kind.name]
        has_logits = self.kind is Divergence.kl
        header += ["falls without it", "rises"] if has_logits else []
        rows = []
        for effect in self.found[:n]:
            rows.append([effect.site, str(effect.index), f"{effect.ci:.2f}", f"{effect.mean:.3g}"])
            if has_logits:
                rows[-1] += [_shown(effect.falls), _shown(effect.rises)]
        left = len(self.found) - n
        more = [f"… and {left} more; table(n) shows n of them"] if left > 0 else []
        return "\n".join([*text_table(header, rows, left=[0, 4, 5], indent=""), *more])

    def __repr__(self) -> str:
        return self.table()


def _shown(changes: Iterable[ClassChange], most: int = 3) -> str:
    return "  ".join(f"{quoted(one.name)} {one.change:+.2f}" for one in list(changes)[:most])


@torch.no_grad()
def ablation_effects(
    model: DecomposedModel,
    batch: Tensor | Mapping[str, Any],
    subcomponents: Mapping[str, Chosen] | None = None,
    *,
    kind: Divergence,
    threshold: float,
    names: Decode | None = None,
    at_once: int | None = None,
) -> Effects:
    """Take out one subcomponent at a time, everywhere in the batch, and compare with the target's own output.

    All else stays as it is, the weight delta included, so that with nothing taken out the output is the
    target's. Rows of the batch must not depend on each other.

    Args:
        model: the decomposed model.
        batch: its input.
        subcomponents: by site as `DecomposedModel.ablated` takes them; None: those with g above
            `threshold` anywhere in the batch.
        kind: `kl`, of logits, or `mse`, of other outputs.
        threshold: of g; the change of a log-probability is its mean over positions where g is above it, or
            over all where it is nowhere.
        names: of tokens, or of what else the logits are of; None: their numbers.
        at_once: subcomponents per pass; None: as many as make an output of 2²⁴ numbers.

    Raises:
        ValueError: there is no such site or subcomponent, or the target does not take the batch.
    """
    batch = as_batch(batch, model.target).to(model.device)
    importances = {site: ci.lower for site, ci in model.causal_importances(batch).items()}
    if subcomponents is None:
        chosen = {site: _above(g, threshold, batch) for site, g in importances.items()}
    else:
        chosen = chosen_indices(subcomponents, model.number_of)
    compare = _Comparison(model(batch), batch, kind, threshold, names)
    at_once = at_once or max(1, _NUMBERS_AT_ONCE // compare.target.numel())
    found = []
    for site, indices in chosen.items():
        g = importances[site]
        for begin in range(0, len(indices), at_once):
            part = indices[begin : begin + at_once]
            outputs = _without_each(model, batch, site, part, g)
            found += [compare.effect(site, c, own, g[..., c]) for c, own in zip(part, outputs, strict=True)]
    return Effects(kind, sorted(found, key=lambda effect: -effect.mean))


@torch.no_grad()
def joint_ablation_effect(
    model: DecomposedModel,
    batch: Tensor | Mapping[str, Any],
    subcomponents: Mapping[str, Chosen],
    *,
    kind: Divergence,
    threshold: float,
    names: Decode | None = None,
) -> JointEffect:
    """Take out all of some subcomponents at once, everywhere in the batch; else as `ablation_effects`.

    The change of a log-probability is its mean over positions where g of any of them is above the threshold.
    """
    batch = as_batch(batch, model.target).to(model.device)
    chosen = chosen_indices(subcomponents, model.number_of)
    importances = {site: ci.lower for site, ci in model.causal_importances(batch).items()}
    compare = _Comparison(model(batch), batch, kind, threshold, names)
    largest = [importances[site][..., own].amax(-1) for site, own in chosen.items() if own]
    return JointEffect(chosen, *compare.change(model.ablated(batch, chosen), largest))


def _above(g: Float[Tensor, "*positions C"], threshold: float, batch: Tensor) -> list[int]:
    """The subcomponents with g above a threshold at any position that is no padding."""
    valid = real_positions(batch, g.shape[:-1])
    values = g.flatten(0, -2) if valid is None else g[valid]
    return (values > threshold).any(0).nonzero().flatten().tolist()


def _without_each(
    model: DecomposedModel, batch: Tensor, site: str, part: Sequence[int], g: Float[Tensor, "*positions C"]
) -> Tensor:
    """The outputs without each of some subcomponents of a site, `[len(part), *output]`, in one pass."""
    like = model.pieces(site).V
    masks = [without([c], g.shape[-1], like).mask for c in part]
    of_rows = torch.stack([mask for mask in masks if mask is not None]).repeat_interleave(len(batch), dim=0)
    of_rows = of_rows.view(len(of_rows), *(1 for _ in g.shape[1:-1]), g.shape[-1])
    rows = batch.repeat(len(part), *(1 for _ in batch.shape[1:]))
    output = model(rows, {site: SiteMask(mask=of_rows, delta=like.new_ones(()))})
    return output.view(len(part), len(batch), *output.shape[1:])  # type: ignore[no-any-return]


class _Change(NamedTuple):
    divergence: Tensor
    mean: float
    falls: list[ClassChange]
    rises: list[ClassChange]


class _Comparison:
    """Compares outputs with the target's own, of one batch."""

    def __init__(
        self, output: Tensor, batch: Tensor, kind: Divergence, threshold: float, names: Decode | None
    ) -> None:
        self.target = _with_classes(output, batch)
        self._kind, self._threshold, self._names = kind, threshold, names
        positions = self.target.shape[:-1]
        valid = real_positions(batch, positions)
        self._valid: Bool[Tensor, "*positions"] = (
            torch.ones(positions, dtype=torch.bool, device=batch.device) if valid is None else valid
        )
        self._batch = batch
        self._normaliser = log_normaliser(self.target) if kind is Divergence.kl else None

    def effect(self, site: str, index: int, output: Tensor, g: Float[Tensor, "*positions"]) -> Effect:
        """The effect of a subcomponent, from the output without it and its causal importances."""
        real = real_positions(self._batch, g.shape)
        ci = float((g if real is None else g[real]).max())
        return Effect(site, index, ci, *self.change(output, [g]))

    def change(self, output: Tensor, importances: Sequence[Float[Tensor, "*positions"]]) -> "_Change":
        """What an output is different in, from what was taken out and its causal importances."""
        output = _with_classes(output, self._batch)
        falls: list[ClassChange] = []
        rises: list[ClassChange] = []
        if self._kind is Divergence.kl:
            divergence = kl_by_position(output, self.target, self._normaliser)
            falls, rises = self._changes(output, importances)
        else:
            divergence = (output.float() - self.target.float()).square().mean(-1)
        divergence = divergence.where(self._valid, 0)
        return _Change(divergence, float(divergence.sum() / self._valid.sum()), falls, rises)

    def _changes(
        self, output: Tensor, importances: Sequence[Float[Tensor, "*positions"]]
    ) -> tuple[list[ClassChange], list[ClassChange]]:
        active = torch.zeros_like(self._valid)
        for g in importances:
            if g.shape == active.shape:
                active |= self._valid & (g > self._threshold)
        where = active if bool(active.any()) else self._valid
        assert self._normaliser is not None, "outputs are logits"
        common = (log_normaliser(output[where]) - self._normaliser[where]).sum(-1).mean()
        change = (output[where].float() - self.target[where].float()).mean(0) - common
        change = change.where(~change.isnan(), 0)  # of classes that the target excludes by a logit of -inf
        return self._largest(change, -1), self._largest(change, 1)

    def _largest(self, change: Float[Tensor, " classes"], sign: int) -> list[ClassChange]:
        """The largest changes of one sign."""
        sizes, classes = (sign * change).topk(min(_CLASSES, len(change)))
        ids = classes[sizes > 0].tolist()
        names = [str(one) for one in ids] if self._names is None or not ids else self._names(ids)
        return [ClassChange(name, one, float(change[one])) for name, one in zip(names, ids, strict=True)]


def _with_classes(output: Tensor, batch: Tensor) -> Float[Tensor, "*positions d"]:
    """An output of one number per row as one of one class or element."""
    return output[:, None] if output.dim() == 1 and len(output) == len(batch) else output
