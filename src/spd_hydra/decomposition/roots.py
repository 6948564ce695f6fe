"""Roots: sites whose input no other site influences, so that quantities of the clean pass can be reused."""

import torch
from torch import Tensor, nn

from spd_hydra import rng
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.factored import Activation, dense


@torch.no_grad()
def find_roots(model: DecomposedModel, batch: Tensor) -> frozenset[str]:
    """The roots of a model, seen on a batch.

    Every site's output is disturbed at once; a site whose input is still bit-identical is a root.
    """
    clean = model.clean_pass(batch)
    seen: dict[str, bool] = {}

    def at_site(name: str, layer: nn.Module, x: Activation) -> Activation:
        seen[name] = bool(torch.equal(dense(x), dense(clean.inputs[name])))
        own = dense(clean.outputs[name])
        noise = torch.randn(own.shape, generator=rng.generator(0, f"roots/{name}")).to(own)
        return own + noise * (1 + own.abs().amax())

    model.patched.run(batch, at_site)
    return frozenset(name for name, untouched in seen.items() if untouched)


def roots_without_values(model: DecomposedModel, batch: Tensor) -> frozenset[str]:
    """What `find_roots` would find, on tensors that need have no values.

    A site whose input has no gradient from any site's output is a root.
    """
    found: set[str] = set()

    def at_site(name: str, layer: nn.Module, x: Activation) -> Activation:
        x = dense(x)
        if not x.requires_grad:
            found.add(name)
        with torch.no_grad():
            own = dense(layer(x))
        return own.requires_grad_()

    with torch.enable_grad():
        model.patched.run(batch, at_site)
    return frozenset(found)
