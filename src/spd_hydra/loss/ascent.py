"""The search for the worst masks: projected gradient ascent on the sources r of m = g + (1 - g)·r."""

from collections.abc import Callable
from enum import Enum

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spd_hydra import distributed, rng
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.loss.at_once import is_mapped

Sources = dict[str, Float[Tensor, "*#positions columns"]]
"""By site: r of each of the C subcomponents, then δ, in [0, 1]; axes of length 1 are shared along."""

Values = dict[str, Float[Tensor, "*rows"]]
"""By site: the divergence of the pass in which it is masked, of each row or of all together."""

Look = Callable[[Sources, bool], tuple[Values, Sources]]
"""The divergence at some sources; and the gradient of its sum if it is asked for, else nothing."""

_KEY_COLUMNS = 2
_BITS = 24  # of one draw


class Scope(Enum):
    """`shared`: one set of sources for all positions of the global batch. `per_datapoint`: one for each."""

    shared = "shared"
    per_datapoint = "per_datapoint"


class Start(Enum):
    """Where the sources begin: `random` from U(0, 1), `ones` (all subcomponents on) or all `zeros` (m = g).

    The weight delta begins off in the last two: with all on the output is the target's, and nothing climbs.
    """

    random = "random"
    ones = "ones"
    zeros = "zeros"


def columns_needed(model: DecomposedModel, start: Start, scope: Scope) -> int:
    """Random numbers per position that `start_sources` takes."""
    if start is not Start.random:
        return 0
    if scope is Scope.shared:
        return _KEY_COLUMNS
    return sum(shape.C + 1 for shape in model.site_shapes().values())


def start_sources(
    model: DecomposedModel, start: Start, scope: Scope, draws: Float[Tensor, "*positions columns"]
) -> Sources:
    """The sources that an ascent begins with, the same on every rank where they are shared."""
    widths = {site: shape.C + 1 for site, shape in model.site_shapes().items()}
    total = sum(widths.values())
    positions = draws.shape[:-1]
    if scope is Scope.shared:
        positions = torch.Size([1] * len(positions))
    if start is not Start.random:
        r, off = float(start is Start.ones), draws.new_zeros((*positions, 1))
        return {
            site: torch.cat([draws.new_full((*positions, width - 1), r), off], dim=-1)
            for site, width in widths.items()
        }
    if scope is Scope.shared:
        whole = _uniform_of_first_position(draws, total).view(*positions, total)
    else:
        whole = draws
    return dict(zip(widths, torch.split(whole, list(widths.values()), dim=-1), strict=True))


def _uniform_of_first_position(draws: Float[Tensor, "*positions 2"], number: int) -> Float[Tensor, " number"]:
    """Draws from U(0, 1) that follow from those of the first position of the global batch.

    So sources that are shared need two random numbers per position and not one for each subcomponent.
    """
    flat = draws.flatten(0, -2)
    first = flat[0] if distributed.rank() == 0 else flat.new_zeros(_KEY_COLUMNS)
    (first,) = distributed.global_sum([first])
    key = (first * 2**_BITS).to(torch.int32)
    places = torch.arange(number, dtype=torch.int32, device=draws.device)
    # One row, not a row without axes: mapped over replicas, the compiler rounds whole numbers that are
    # multiplied with a tensor without axes to float32. Seen with torch 2.13.
    return rng.uniform(key, key.new_zeros(1), places)[0]


def worst_sources(look: Look, start: Sources, *, n_steps: int, step_size: float) -> Sources:
    """The worst sources on the way of a projected ascent: r ← clamp(r + step_size · sign(∂D/∂r), 0, 1).

    The best of the n_steps + 1 points seen, so that the divergence is never below that of the start: for all
    rows of the global batch together if the sources are shared, else for each row, which does not depend on
    how rows are cut into ranks. Only the sources are differentiated by, and nothing is left in any `.grad`.

    Args:
        look: says what the divergence is at sources.
        start: where to begin.
        n_steps: steps, each a forward and a backward pass; one forward pass more looks at the last point.
        step_size: length of a step.
    """
    best = r = start
    highest: Values = {}
    for step in range(n_steps + 1 if n_steps else 0):
        values, slopes = look(r, step < n_steps)
        if not highest:
            highest = values
        else:
            higher = {site: value > highest[site] for site, value in values.items()}
            highest = {
                site: torch.where(higher[site], value, highest[site]) for site, value in values.items()
            }
            best = {site: torch.where(_along(higher[site], own), own, best[site]) for site, own in r.items()}
        r = {site: (r[site] + step_size * own.sign()).clamp(0, 1) for site, own in slopes.items()}
    return best


def look_at(divergence: Callable[[Sources], Float[Tensor, " rows"]], scope: Scope) -> Look:
    """A look at a divergence of sources in which all of them take part: by row, or of the global batch.

    Args:
        divergence: of each row; it must not depend on anything that is trained through a graph made before.
        scope: whose sources they are.
    """

    def look(r: Sources, wants_slopes: bool) -> tuple[Values, Sources]:
        if wants_slopes:
            value, slopes = _value_and_slope(divergence, r)
        else:
            with torch.no_grad():
                value, slopes = divergence(r), {}
        if scope is Scope.shared:
            (value, *summed) = distributed.global_sum([value.sum(), *slopes.values()])
            slopes = dict(zip(slopes, summed, strict=True))
        return dict.fromkeys(r, value), slopes

    return look


def _value_and_slope(
    divergence: Callable[[Sources], Float[Tensor, " rows"]], r: Sources
) -> tuple[Float[Tensor, " rows"], Sources]:
    """Divergence by row and the gradient of its sum, also where nothing is recorded for gradients."""
    if is_mapped():  # mapped over replicas
        return _mapped_value_and_slope(divergence, r)
    with torch.enable_grad():
        leaves = {site: own.detach().requires_grad_() for site, own in r.items()}
        value = divergence(leaves)
        gradients = torch.autograd.grad(
            value.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True
        )
    return value.detach(), dict(zip(r, gradients, strict=True))


def _mapped_value_and_slope(
    divergence: Callable[[Sources], Float[Tensor, " rows"]], r: Sources
) -> tuple[Float[Tensor, " rows"], Sources]:
    """The same inside `torch.vmap`, where only transforms can differentiate."""

    def total(r: Sources) -> tuple[Tensor, Tensor]:
        value = divergence(r)
        return value.sum(), value

    with torch.no_grad():
        gradients, (_, value) = torch.func.grad_and_value(total, has_aux=True)(r)
    return value, gradients


def _along(rows: Bool[Tensor, "*rows"], like: Tensor) -> Bool[Tensor, "*#any"]:
    """One decision per row, or one for all, in the shape of the sources."""
    return rows.view(*rows.shape, *[1] * (like.dim() - rows.dim()))
