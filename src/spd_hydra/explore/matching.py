"""Two decompositions of matrices of the same shape: which subcomponent of one is which of the other."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from jaxtyping import Float
from torch import Tensor

from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.report.numbers import text_table

Alive = Mapping[str, Sequence[int]]
"""Subcomponents by site."""


@dataclasses.dataclass(frozen=True, repr=False)
class Matching:
    """Pairs of subcomponents of one site.

    Attributes:
        own: indices in the first decomposition, ascending.
        other: the partner of each in the second.
        cosines: cos(V_c U_c, V'_d U'_d) of each pair as matrices, in [-1, 1].
        candidates: how many of each decomposition could have been matched; some of the larger number are not.
    """

    own: list[int]
    other: list[int]
    cosines: list[float]
    candidates: tuple[int, int]

    @property
    def mean(self) -> float:
        """Mean |cosine| of the pairs; NaN without any."""
        return sum(map(abs, self.cosines)) / len(self.cosines) if self.cosines else float("nan")

    def table(self) -> str:
        """All pairs as text."""
        pairs = zip(self.own, self.other, self.cosines, strict=True)
        rows = [[str(c), str(d), f"{cosine:.3f}"] for c, d, cosine in pairs]
        return "\n".join(text_table(["own", "other", "cosine"], rows, left=0, indent=""))

    def __repr__(self) -> str:
        own, other = self.candidates
        return f"Matching({len(self.own)} pairs of {own} and {other}, mean |cosine| {self.mean:.3f})"


def match_models(
    own: DecomposedModel, other: DecomposedModel, alive: Callable[[], tuple[Alive, Alive]]
) -> dict[str, Matching]:
    """The best matching at each site.

    Args:
        own: the first decomposition.
        other: the second, of the same sites, with matrices of the same shapes.
        alive: gives which subcomponents of each may be matched; is asked when the sites are the same.

    Raises:
        ValueError: sites or shapes differ.
    """
    if set(own.site_names) != set(other.site_names):
        raise ValueError(
            f"other: got a run of the sites {_few(other.site_names)}, must have those of this one, "
            f"{_few(own.site_names)}"
        )
    own_alive, other_alive = alive()
    found = {}
    for site in own.site_names:
        mine, its = own.pieces(site), other.pieces(site)
        shapes = [[pieces.U.shape[1], pieces.V.shape[0]] for pieces in (mine, its)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"other: at {site} its matrix is {shapes[1]}, here it is {shapes[0]}")
        of_all = cosines(*(each.detach().cpu() for each in (mine.V, mine.U, its.V, its.U)))
        found[site] = best_matching(of_all, own_alive[site], other_alive[site])
    return found


def cosines(
    V: Float[Tensor, "d_in C"],
    U: Float[Tensor, "C d_out"],
    other_V: Float[Tensor, "d_in D"],
    other_U: Float[Tensor, "D d_out"],
) -> Float[Tensor, "C D"]:
    """⟨V_c U_c, V'_d U'_d⟩ / (‖V_c U_c‖ ‖V'_d U'_d‖) of rank-one matrices, in float64; 0 where one is 0.

    The product of two small ones, cos(V_c, V'_d) cos(U_c, U'_d): no matrix of the size of W is formed.
    """
    reads: Tensor = _unit(V.double(), 0).T @ _unit(other_V.double(), 0)
    writes: Tensor = _unit(U.double(), 1) @ _unit(other_U.double(), 1).T
    return reads * writes


def _unit(vectors: Tensor, dim: int) -> Tensor:
    norm = vectors.norm(dim=dim, keepdim=True)
    unit: Tensor = vectors / norm.where(norm > 0, 1)
    return unit


def best_matching(
    cosines: Float[Tensor, "C D"], own: Sequence[int] | None = None, other: Sequence[int] | None = None
) -> Matching:
    """The pairs, each subcomponent in one at most, whose |cosines| sum to the most (Hungarian method).

    Args:
        cosines: of all subcomponents of one decomposition with all of another.
        own: which of the first may be matched, such as those that are alive; None: all.
        other: which of the second.
    """
    from scipy.optimize import linear_sum_assignment

    rows = list(range(cosines.shape[0])) if own is None else list(own)
    columns = list(range(cosines.shape[1])) if other is None else list(other)
    part = cosines.detach().cpu()[rows][:, columns]
    found_rows, found_columns = linear_sum_assignment(part.abs().numpy(), maximize=True)
    return Matching(
        own=[rows[row] for row in found_rows],
        other=[columns[column] for column in found_columns],
        cosines=[float(part[row, column]) for row, column in zip(found_rows, found_columns, strict=True)],
        candidates=(len(rows), len(columns)),
    )


def _few(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f", … ({len(names)} in all)" if len(names) > most else "")
