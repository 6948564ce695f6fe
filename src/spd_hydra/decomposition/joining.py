"""Subcomponents that are two parts of one are joined, which leaves their sum as it is."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.decomposition.inputs import real_positions
from spd_hydra.decomposition.subcomponents import Subcomponents

_ON = 0.3  # a causal importance that counts as needed
_TOGETHER = 0.8  # of the positions that need the part, so many need the whole too
_ENOUGH = 16  # positions that need the part, to judge by
_RATIO = 0.9  # squared cosine of the inner activations of the two, at least


class Pair(NamedTuple):
    """Two subcomponents, of which the first becomes both."""

    whole: int
    part: int


@torch.no_grad()
def join(model: DecomposedModel, batch: Tensor) -> dict[str, list[Pair]]:
    """Join what are two parts of one subcomponent, at every site that is not tied to another.

    Two halves of a subcomponent are on for the same inputs, and as good as the whole: with g near 1 there is
    no noise in their masks, so that no gradient moves one into the other, while importance minimality counts
    both. They are known by their inner activations, which keep one ratio. After `joined` the first does the
    work of both, the second does nothing for these inputs, and importance minimality takes it away.

    Args:
        model: V and U are changed in place.
        batch: input of the target, with at least 16 positions for each subcomponent; negative token ids are
            padding, which is passed over.

    Returns:
        By site, what was joined.
    """
    activations = model.activations(model.clean_pass(batch))
    positions = next(iter(activations.values())).inner.shape[:-1]
    valid = real_positions(batch, positions)
    importances = model.importances(activations, valid=valid)
    tied = {name for pair in model.config.tied.items() for name in pair}
    found: dict[str, list[Pair]] = {}
    for name in model.site_names:
        if name in tied:
            continue
        g, h = importances[name].lower, activations[name].inner
        g, h = (x.flatten(0, -2) if valid is None else x[valid] for x in (g, h))
        pieces = model.pieces(name)
        assert isinstance(pieces, Subcomponents), "a site that is tied to no other has its own"
        if pairs := parts_of_one(g.float(), h.float() * pieces.U.norm(dim=1)):
            joined(pieces, h.float(), g.float(), pairs)
            found[name] = pairs
    return found


def parts_of_one(g: Float[Tensor, "positions C"], strengths: Float[Tensor, "positions C"]) -> list[Pair]:
    """Pairs that are on together and of which the strengths keep one ratio, no subcomponent in two of them.

    The part is the one that fewer positions need; of two that as many need, the weaker one.

    The ratio is kept where over the positions that need either the squared cosine of the two is at least 0.9.

    Args:
        g: causal importances.
        strengths: inner activations times the norms of U.
    """
    on = g > _ON
    both = on.float().T @ on.float()
    number, size = on.sum(dim=0).tolist(), (strengths.square() * on).sum(dim=0).tolist()
    pairs: list[Pair] = []
    used: set[int] = set()
    for part in sorted(range(len(number)), key=lambda c: (number[c], size[c])):
        if number[part] < _ENOUGH or part in used:
            continue
        whole = int(both[part].index_fill(0, torch.tensor(part, device=g.device), -1).argmax())
        if whole in used or both[part, whole] < _TOGETHER * number[part]:
            continue
        two = [whole, part]
        products = _products(strengths[:, two], on[:, two])
        if products[0, 1] ** 2 >= _RATIO * products[0, 0] * products[1, 1] > 0:
            pairs.append(Pair(whole, part))
            used.update(two)
    return pairs


def joined(
    pieces: Subcomponents,
    h: Float[Tensor, "positions C"],
    g: Float[Tensor, "positions C"],
    pairs: list[Pair],
) -> None:
    """Turn the two of each pair, so that the first reads all that they read where either is on.

    With sizes s = |U| and the strengths h s of the two, P has the principal axes of their mean products as
    columns: V ← V s P / s̄ and U ← s̄ Pᵀ U / s, with s̄ the mean of both sizes, so that V U is what it was.
    """
    for pair in pairs:
        two = list(pair)
        s = pieces.U[two].norm(dim=1)
        axes = torch.linalg.eigh(_products(h[:, two] * s, g[:, two] > _ON))[1].flip(1)
        axes = axes.to(s.dtype)
        V = (pieces.V[:, two] * s) @ axes / s.mean()
        U = axes.T @ (pieces.U[two] / s[:, None]) * s.mean()
        pieces.V[:, two], pieces.U[two] = V, U


def _products(strengths: Float[Tensor, "positions 2"], on: Tensor) -> Float[Tensor, "2 2"]:
    """Mean products of two strengths over the positions that need either of them."""
    needed = strengths[on.any(dim=1)].double()
    return needed.T @ needed / len(needed)


def told(found: Mapping[str, list[Pair]]) -> str:
    """`layers.1.mlp_in: 115 into 98, 110 into 61`."""
    sites = (
        f"{site}: " + ", ".join(f"{pair.part} into {pair.whole}" for pair in pairs)
        for site, pairs in found.items()
    )
    return "; ".join(sites)
