"""`init=inputs`: subcomponents that begin by reading directions in which the data lie."""

import torch
from jaxtyping import Float
from torch import Tensor

from spd_hydra.decomposition.decomposed_model import DecomposedModel, real_positions
from spd_hydra.decomposition.subcomponents import TiedSubcomponents
from spd_hydra.factored import dense
from spd_hydra.section import ConfigError


def require_vectors(model: DecomposedModel) -> None:
    """Check that every site has vectors as inputs, which needs no values.

    Raises:
        ConfigError: a site is an embedding, whose inputs are tokens.
    """
    for name, shape in model.site_shapes().items():
        if shape.embedding:
            raise ConfigError(
                f"decomposition.init: got inputs, but site {name!r} is an embedding, whose inputs are "
                "tokens; use normal or aligned"
            )


@torch.no_grad()
def start_from_inputs(model: DecomposedModel, batch: Tensor) -> None:
    """Let V be inputs of each site, far from each other, and U what makes them sum to W.

    Of the clean inputs of a site, scaled to length 1, C are chosen one after another, each as far as possible
    in angle from those before; U = V⁺ Wᵀ is the smallest with V U = Wᵀ on the span of V. No answer is known
    here: a direction is chosen because inputs have it. With random vectors a feature that a site serves only
    weakly often ends shared among other features' subcomponents.

    Args:
        model: gets the new V and U; tied sites follow their sources.
        batch: input of the target, several times as many positions as the largest C; negative token ids are
            padding, which is passed over.

    Raises:
        ConfigError: a site is an embedding.
    """
    require_vectors(model)
    for name, x in model.clean_pass(batch).inputs.items():
        pieces = model.pieces(name)
        if isinstance(pieces, TiedSubcomponents):
            continue
        x = dense(x)
        real = real_positions(batch, x.shape[:-1])
        inputs = x.flatten(0, -2) if real is None else x[real]
        V = spread_directions(inputs.float(), pieces.C, pieces.V.detach())
        pieces.V.copy_(V)
        pieces.U.copy_(torch.linalg.pinv(V) @ model.weight(name).T.float())


def spread_directions(
    inputs: Float[Tensor, "n d_in"], C: int, otherwise: Float[Tensor, "d_in C"]
) -> Float[Tensor, "d_in C"]:
    """C unit vectors along inputs, each the one with the smallest largest |cosine| to those before.

    Args:
        inputs: candidates; zero vectors are left out. The first of the others is chosen first.
        C: how many to choose.
        otherwise: columns that stay, scaled to length 1, where there are fewer directions than C.
    """
    norms = inputs.norm(dim=1)
    candidates = inputs[norms > 0] / norms[norms > 0, None]
    V: Tensor = otherwise / otherwise.norm(dim=0)
    nearest = torch.zeros(len(candidates), device=inputs.device)
    for c in range(min(C, len(candidates))):
        chosen = candidates[nearest.argmin()]
        V[:, c] = chosen
        nearest = torch.maximum(nearest, (candidates @ chosen).abs())
    return V
