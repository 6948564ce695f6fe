"""`init=detectors`: subcomponents that begin by detecting one direction each of what a site's inputs hold."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.decomposition.input_init import inputs_of, require_vectors
from spd_hydra.decomposition.subcomponents import Init

_ABOUT_AS_FAR = 0.15  # difference of nearness that does not count
_SAME = 0.9  # nearness of two pieces that are one
_ROWS = 1024  # that are compared with all others at a time
_CANDIDATES = 32  # inputs per subcomponent from which directions are chosen
_MOST_WEIGHT = 8.0  # of a direction of which W makes little; the median one has 1
_UNREAD = 1e-5  # of the most that W makes of a direction: it makes nothing of it
_UNSEEN = 1e-6  # of the largest variance: a direction with less is outside the span of the inputs


@torch.no_grad()
def start_as_detectors(model: DecomposedModel, batch: Tensor) -> None:
    """Where `init` is `detectors`, let V and U be those of `detectors` of the site's clean inputs.

    Args:
        model: gets the new V and U; tied sites follow their sources.
        batch: input of the target, many times as many positions as the inputs of a site have dimensions;
            negative token ids are padding, which is passed over.

    Raises:
        ConfigError: a site is an embedding.
    """
    require_vectors(model)
    for name, inputs in inputs_of(model, batch, Init.detectors):
        if inputs.any():
            pieces = model.pieces(name)
            V, U = detectors(inputs, pieces.V.detach(), model.weight(name).T)
            pieces.V.copy_(V)
            pieces.U.copy_(U)


def detectors(
    inputs: Float[Tensor, "n d_in"], otherwise: Float[Tensor, "d_in C"], weight: Float[Tensor, "d_in d_out"]
) -> tuple[Float[Tensor, "d_in C"], Float[Tensor, "C d_out"]]:
    """V that each read one direction of the inputs, and of all else little, and U that sum to W with them.

    With Σ the mean of x xᵀ over inputs, directions r_c of r_cᵀ Σ⁻¹ r_c = 1 are chosen by `spread_pieces`, and

        V_c ∝ (Σ_b w_b r_b r_bᵀ + C ⟨w x̂ x̂ᵀ⟩ + Σ)⁻¹ r_c,  V_c · r_c = 1,
        U_c = W r_c - Σ_{b<c} (V_b · r_c) U_b,

    a matched filter: of all vectors that read r_c as strongly, V_c reads least of the other directions, of
    inputs as they come, scaled to x̂ᵀ Σ⁻¹ x̂ = 1, and of the inputs as a whole. w is m² / |W r|², at most 8, m
    the median of |W r| over directions, and over inputs for these: what is written in error for one counts by
    what should be written for it. V along r_c itself would read what r_c shares with others too, such as what
    a layer before adds for all of them. U_c takes what those before leave of W: a direction that is a sum of
    others begins with next to nothing, and they with all of theirs. What is left then goes into V by the
    least change that makes up for it, first where inputs lie, then elsewhere: V U = Wᵀ if C is at least
    d_out.

    No answer is known here: a direction is chosen because inputs have it.

    Args:
        inputs: of the site; all of them make Σ, directions are taken from the first 32 for each of C.
        otherwise: directions where inputs have fewer than C, as seen in the inputs' span.
        weight: Wᵀ.
    """
    x, W = inputs.double(), weight.double()
    variances, axes = torch.linalg.eigh(x.T @ x / len(x))
    is_seen = variances > _UNSEEN * variances[-1]
    scales, axes = variances[is_seen].sqrt(), axes[:, is_seen]
    whiten, undo = axes / scales, axes * scales  # to where Σ is the unit matrix, and back
    C, W_seen = otherwise.shape[1], undo.T @ W
    seen = x[x.any(dim=1)] @ whiten
    directions = spread_pieces(seen[: _CANDIDATES * C], W_seen, undo.T @ otherwise.double())
    common = _weighted(nn.functional.normalize(seen, dim=1).T, W_seen) * (C / len(seen))
    noise = _weighted(directions, W_seen) + common + torch.eye(len(scales)).to(x)
    V = torch.linalg.solve(noise, directions)
    V = V / (V * directions).sum(dim=0)
    reads = (directions.T @ V).tril()  # of each direction, by its own subcomponent and those before
    U = torch.linalg.solve_triangular(reads, directions.T @ W_seen, upper=False, unitriangular=True)
    V = whiten @ (V + _least_change(V, U, W_seen))
    norms = V.norm(dim=0)
    V, U = V / norms, U * norms[:, None]
    V = V + _least_change(V, U, W)
    return V.to(weight.dtype), U.to(weight.dtype)


def _weighted(r: Float[Tensor, "d n"], weight: Float[Tensor, "d d_out"]) -> Float[Tensor, "d d"]:
    """Σ w r rᵀ over unit vectors r, with w = (m / |W r|)², at most 8; m the median of |W r| > 0."""
    writes = (r.T @ weight).norm(dim=1)
    read = writes[writes > _UNREAD * writes.max()]
    typical = read.median() if len(read) else writes.new_ones(())
    weights = (typical / writes.clamp(min=torch.finfo(r.dtype).tiny)).square().clamp(max=_MOST_WEIGHT)
    products: Tensor = (r * weights) @ r.T
    return products


def _least_change(
    V: Float[Tensor, "d_in C"], U: Float[Tensor, "C d_out"], weight: Float[Tensor, "d_in d_out"]
) -> Float[Tensor, "d_in C"]:
    """The smallest change of V with which V U is Wᵀ, or as near as U allows."""
    inverse: Tensor = torch.linalg.pinv(U)
    return (weight - V @ U) @ inverse


def spread_pieces(
    inputs: Float[Tensor, "n d_in"], weight: Float[Tensor, "d_in d_out"], otherwise: Float[Tensor, "d_in C"]
) -> Float[Tensor, "d_in C"]:
    """C unit vectors r along inputs, of which the pieces (W r) rᵀ are far from each other, and common.

    One after another is chosen: of those about as far from all before as any is, the one whose piece most
    inputs have. Two pieces are as near as the cosine of the vectors times that of what W makes of them. So
    a direction and its opposite are one, and an input for which W does something else with a direction that
    it shares is another.

    Args:
        inputs: candidates; those of which W makes nothing are left out.
        weight: Wᵀ.
        otherwise: columns that stay, scaled to length 1, where there are fewer directions than C.
    """
    outputs = inputs @ weight
    is_read = outputs.norm(dim=1) > 0
    reads = nn.functional.normalize(inputs[is_read], dim=1)
    writes = nn.functional.normalize(outputs[is_read], dim=1)
    directions = nn.functional.normalize(otherwise, dim=0)
    company = _company(reads, writes)
    nearest = reads.new_zeros(len(reads))  # largest nearness to one that is chosen
    for c in range(min(otherwise.shape[1], len(reads))):
        is_far = nearest <= nearest.min() + _ABOUT_AS_FAR
        index = torch.where(is_far, company, -1).argmax()
        directions[:, c] = reads[index]
        nearest = torch.maximum(nearest, (reads @ reads[index]) * (writes @ writes[index]))
        nearest[index] = torch.inf
    return directions


def _company(reads: Float[Tensor, "n d"], writes: Float[Tensor, "n d_out"]) -> Int[Tensor, " n"]:
    """How many pieces are nearly the same as each."""
    parts = zip(torch.split(reads, _ROWS), torch.split(writes, _ROWS), strict=True)
    return torch.cat([((some @ reads.T) * (made @ writes.T) > _SAME).sum(1) for some, made in parts])
