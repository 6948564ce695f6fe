"""A subcomponent takes over what another does for its inputs, which leaves their sum as it is."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.decomposition.inputs import real_positions
from spd_hydra.decomposition.subcomponents import Subcomponents

_ON = 0.3  # a causal importance that counts as needed
_ENOUGH = 16  # positions that need both, to judge by
_TOGETHER = 0.3  # of the positions that need the one that is needed less, so many need the other too
_LEFT = 0.05  # of what both write, squared, so much may be left to the one that hands over
_HANDED = 0.01  # of what both write, squared, at least so much has to change hands
_NOISE = 3.0  # times as much as before may both write, squared, where they are not needed


class Join(NamedTuple):
    """The first subcomponent takes over what the second does for the inputs that need the first."""

    whole: int
    part: int


@torch.no_grad()
def join(model: DecomposedModel, batch: Tensor) -> dict[str, list[Join]]:
    """Where inputs need two subcomponents and one would do, let one do it: `join_site`, site by site.

    Two halves of a subcomponent are as good as the whole, and so is a subcomponent whose inputs need another
    one's as well: with g near 1 there is no noise in their masks, so that no gradient moves one into the
    other, while importance minimality counts both. Afterwards one of them does nothing for these inputs, and
    importance minimality takes it away there. Sites that are tied to others stay as they are.

    Args:
        model: V and U are changed in place.
        batch: input of the target, with many times 16 positions for each subcomponent that is to be judged;
            negative token ids are padding, which is passed over.

    Returns:
        By site, what was joined.
    """
    activations = model.activations(model.clean_pass(batch))
    positions = next(iter(activations.values())).inner.shape[:-1]
    valid = real_positions(batch, positions)
    importances = model.importances(activations, valid=valid)
    tied = {name for pair in model.config.tied.items() for name in pair}
    found: dict[str, list[Join]] = {}
    for name in model.site_names:
        if name in tied:
            continue
        g, h = importances[name].lower, activations[name].inner
        g, h = (x.flatten(0, -2) if valid is None else x[valid] for x in (g, h))
        pieces = model.pieces(name)
        assert isinstance(pieces, Subcomponents), "a site that is tied to no other has its own"
        if joins := join_site(pieces.V, pieces.U, needed=g > _ON, h=h):
            found[name] = joins
    return found


@torch.no_grad()
def join_site(
    V: Float[Tensor, "d_in C"],
    U: Float[Tensor, "C d_out"],
    *,
    needed: Bool[Tensor, "positions C"],
    h: Float[Tensor, "positions C"],
) -> list[Join]:
    """Change V and U of one site in place; no subcomponent takes part twice.

    Over the positions S that need a, h_b is about k h_a, with k = ⟨h_a h_b⟩ / ⟨h_a²⟩. With

        V_b ← V_b - k V_a,  U_a ← U_a + k U_b

    V U stays what it is, for S a does what both did, and where h_a is 0 nothing changes. b is a part of a if

    - at least 16 positions need both, and 0.3 of those that need the one that is needed less;
    - what is left to b is little: ⟨(h_b - k h_a)²⟩ |U_b|² ≤ 0.05 ⟨|h_a U_a + h_b U_b|²⟩, over S and over the
      positions that need both, and what is handed over, ⟨(k h_a)²⟩ |U_b|², more than 0.01 of it;
    - others hear little of it: the sum of ⟨h_a²⟩ |U_a|² over positions that do not need a, where its mask is
      random, and of b's over those that need neither, is at most three times what it was. A large k would
      pass on to b what a reads of other inputs.

    Of two that are a part of each other the one that more positions need becomes the whole. A subcomponent
    that reads both signs of a direction, beside one for the positive sign alone, is a whole if one will do
    for both; else a part, which keeps the negative sign.

    Args:
        V, U: of the site.
        needed: whether a position needs a subcomponent.
        h: inner activations, xᵀ V.
    """
    on, h = needed.double(), h.double()
    number = on.sum(dim=0)
    ratios, is_part = _parts(on, h, U.double())
    joins: list[Join] = []
    while is_part.any():
        whole, part = divmod(int(torch.where(is_part, number[:, None], -1).argmax()), len(number))
        is_part[whole, part] = False
        k = ratios[whole, part]
        free = torch.stack([1 - on[:, whole], (1 - on[:, whole]) * (1 - on[:, part])], dim=1)
        now, then = h[:, [whole, part]], torch.stack([h[:, whole], h[:, part] - k * h[:, whole]], dim=1)
        U_whole = U[whole] + k.to(U.dtype) * U[part]
        before, after = torch.stack([U[whole], U[part]]), torch.stack([U_whole, U[part]])
        if _noise(free, then, after) > _NOISE * _noise(free, now, before):
            continue
        V[:, part] -= k.to(V.dtype) * V[:, whole]
        U[whole] = U_whole
        is_part[[whole, part]] = is_part[:, [whole, part]] = False
        joins.append(Join(whole, part))
    return joins


def _parts(
    on: Float[Tensor, "positions C"], h: Float[Tensor, "positions C"], U: Float[Tensor, "C d_out"]
) -> tuple[Float[Tensor, "C C"], Bool[Tensor, "C C"]]:
    """k of each whole and part, and whether one is a part of the other, noise aside."""
    number, both, writes = on.sum(dim=0), on.T @ on, U @ U.T
    is_part = (both >= _ENOUGH) & (both >= _TOGETHER * torch.minimum(number[:, None], number))
    is_part.fill_diagonal_(False)
    needed = h * on
    ratios = (needed.T @ h) / needed.square().sum(dim=0)[:, None]  # over the positions that need the first
    sizes = writes.diagonal()
    over_first = (needed.square().T @ torch.ones_like(on), needed.T @ h, on.T @ h.square())
    over_both = (needed.square().T @ on, needed.T @ needed, on.T @ needed.square())
    for own, products, others in (over_first, over_both):
        left = (others - 2 * ratios * products + ratios.square() * own) * sizes
        both_write = own * sizes[:, None] + others * sizes + 2 * products * writes
        handed = ratios.square() * own * sizes
        is_part &= (left <= _LEFT * both_write) & (handed > _HANDED * both_write)
    return ratios, is_part


def _noise(free: Float[Tensor, "positions 2"], h: Float[Tensor, "positions 2"], U: Tensor) -> float:
    """Σ over both, and the positions at which their masks are free, of h² |U|²."""
    return float(((h * free).square() @ U.double().square().sum(dim=1)).sum())


def told(found: Mapping[str, list[Join]]) -> str:
    """`layers.1.mlp_in: 115 into 98, 110 into 61`."""
    sites = (
        f"{site}: " + ", ".join(f"{pair.part} into {pair.whole}" for pair in joins)
        for site, joins in found.items()
    )
    return "; ".join(sites)
