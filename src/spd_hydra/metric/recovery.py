"""MMCS and ML2R: do the subcomponents contain the columns of the target's matrix?"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

_NEARLY_BEST = 0.01


class Recovery(NamedTuple):
    """`mmcs`: mean max cosine. `ml2r_plain`: mean L2 ratio there; `ml2r`: at the largest nearly there."""

    mmcs: float
    ml2r: float
    ml2r_plain: float


def recovery(
    weight: Float[Tensor, "d_out d_in"],
    V: Float[Tensor, "d_in C"],
    U: Float[Tensor, "C d_out"],
    directions: Float[Tensor, "n_features d_in"],
) -> Recovery:
    """How well each feature's column of W is found in a single subcomponent, mean over features.

    Feature j has the column `W d_j`; subcomponent c offers `U_c ⟨V_c, d_j⟩`. MMCS takes the largest
    cosine over c; ML2R the ratio of norms, offered over wanted, at that c. Several subcomponents can
    point the same way, one of them a dead sliver: among those within 0.01 of the best cosine the one
    of largest norm counts, and the plain value is given beside it. Ranges: [-1, 1] and ≥ 0. Paper, §3.1.

    Args:
        weight: W of the site.
        V: reading vectors.
        U: writing vectors.
        directions: what each feature sends to the site; the identity for one-hot inputs.
    """
    wanted = directions @ weight.T  # [n, d_out]
    gain = directions @ V  # [n, C]
    norms = gain.abs() * U.norm(dim=1)  # [n, C], of U_c ⟨V_c, d_j⟩
    inner = gain * (wanted @ U.T)
    wanted_norm = wanted.norm(dim=1, keepdim=True)
    cosine = inner / (norms * wanted_norm).clamp_min(torch.finfo(norms.dtype).tiny)
    best, best_index = cosine.max(dim=1)
    nearly = norms.masked_fill(cosine < best[:, None] - _NEARLY_BEST, -1.0).amax(dim=1)
    ratio = nearly / wanted_norm[:, 0]
    plain = norms.gather(1, best_index[:, None])[:, 0] / wanted_norm[:, 0]
    return Recovery(float(best.mean()), float(ratio.mean()), float(plain.mean()))
