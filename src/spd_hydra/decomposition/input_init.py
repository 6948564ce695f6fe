"""`init=inputs`: subcomponents that begin by reading directions in which the data lie."""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.decomposition.inputs import real_positions
from spd_hydra.decomposition.subcomponents import Init, TiedSubcomponents
from spd_hydra.factored import dense
from spd_hydra.section import ConfigError

_ABOUT_AS_FAR = 0.15  # difference of |cosine| that does not count
_SAME = 0.9  # |cosine| of two vectors in one direction
_ROWS = 1024  # that are compared with all others at a time


def require_vectors(model: DecomposedModel) -> None:
    """Check that every site that is to start from its inputs has vectors as inputs, which needs no values.

    Raises:
        ConfigError: such a site is an embedding, whose inputs are tokens.
    """
    for name, shape in model.site_shapes().items():
        init = model.inits[name]
        if shape.embedding and init in {Init.inputs, Init.detectors}:
            raise ConfigError(
                f"decomposition.init: got {init.name}, but site {name!r} is an embedding, whose inputs are "
                "tokens; use normal or aligned, for that site alone by the init of its entry"
            )


@torch.no_grad()
def start_from_inputs(model: DecomposedModel, batch: Tensor) -> None:
    """Where `init` is `inputs`: let V be inputs of the site, far from each other, and U what sums to W.

    Of the clean inputs of a site, scaled to length 1, C are chosen one after another: of those about as far
    in angle from all before as any is, the one in whose direction most inputs lie. Then V U = Wᵀ on the span
    of V (`shares`). No answer is known here: a direction is chosen because inputs have it. With random
    vectors a feature that a site serves only weakly often ends shared among other features' subcomponents.

    Args:
        model: gets the new V and U; tied sites follow their sources.
        batch: input of the target, several times as many positions as the largest C; negative token ids are
            padding, which is passed over.

    Raises:
        ConfigError: a site is an embedding.
    """
    require_vectors(model)
    for name, inputs in inputs_of(model, batch, Init.inputs):
        pieces = model.pieces(name)
        V = spread_directions(inputs.float(), pieces.C, pieces.V.detach())
        pieces.V.copy_(V)
        pieces.U.copy_(shares(V, model.weight(name).T.float()))


def inputs_of(model: DecomposedModel, batch: Tensor, init: Init) -> Iterator[tuple[str, Tensor]]:
    """Clean inputs `[n, d_in]` of every site that starts so and is not tied to another, without padding."""
    for name, x in model.clean_pass(batch).inputs.items():
        if isinstance(model.pieces(name), TiedSubcomponents) or model.inits[name] is not init:
            continue
        x = dense(x)
        real = real_positions(batch, x.shape[:-1])
        yield name, x.flatten(0, -2) if real is None else x[real]


def spread_directions(
    inputs: Float[Tensor, "n d_in"], C: int, otherwise: Float[Tensor, "d_in C"]
) -> Float[Tensor, "d_in C"]:
    """C unit vectors along inputs, each far from those before and in a direction that many inputs have.

    Args:
        inputs: candidates; zero vectors are left out.
        C: how many to choose.
        otherwise: columns that stay, scaled to length 1, where there are fewer directions than C.
    """
    norms = inputs.norm(dim=1)
    candidates = inputs[norms > 0] / norms[norms > 0, None]
    V: Tensor = otherwise / otherwise.norm(dim=0)
    company = _company(candidates)
    nearest = torch.zeros(len(candidates), device=inputs.device)  # largest |cosine| to one that is chosen
    for c in range(min(C, len(candidates))):
        is_far = nearest <= nearest.min() + _ABOUT_AS_FAR
        index = torch.where(is_far, company, -1).argmax()
        V[:, c] = candidates[index]
        nearest = torch.maximum(nearest, (candidates @ candidates[index]).abs())
        nearest[index] = torch.inf
    return V


def shares(V: Float[Tensor, "d_in C"], weight: Float[Tensor, "d_in d_out"]) -> Float[Tensor, "C d_out"]:
    """U with V U = Wᵀ on the span of V, in which each subcomponent takes what those before it leave of Wᵀ.

    So one whose direction is a sum of others' begins with next to nothing, and they with all of theirs.

    Args:
        V: unit vectors.
        weight: Wᵀ.
    """
    # U_c + Σ_{b<c} (V_c · V_b) U_b = V_cᵀ Wᵀ
    U: Tensor = torch.linalg.solve_triangular(V.T @ V, V.T @ weight, upper=False, unitriangular=True)
    left = weight - V @ U  # V is not orthogonal
    rest: Tensor = torch.linalg.pinv(V) @ left
    return U + rest


def _company(units: Float[Tensor, "n d"]) -> Int[Tensor, " n"]:
    """How many of the vectors lie in the direction of each, or in the opposite one."""
    return torch.cat([((some @ units.T).abs() > _SAME).sum(1) for some in torch.split(units, _ROWS)])
