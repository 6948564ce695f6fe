"""What of a clean pass can be used again: inputs and outputs that stay, and quantities of roots.

Roots are sites whose input no other site influences.
"""

from typing import cast

import torch
from torch import Tensor, nn

from spd_hydra import rng
from spd_hydra.decomposition.clean_pass import CleanPass
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.decomposition.sites import unfit_sites
from spd_hydra.factored import Activation, dense
from spd_hydra.section import ConfigError


@torch.no_grad()
def require_values_that_stay(model: DecomposedModel, batch: Tensor) -> None:
    """Check that the target leaves its batch and its sites' inputs and outputs as they are.

    Masked passes read those of the clean pass, after the target has gone on with them. Needs no values.

    Raises:
        ConfigError: it changes some in place.
    """
    inputs: dict[str, tuple[Tensor, int]] = {}
    outputs: dict[str, tuple[Tensor, int]] = {}

    def at_site(name: str, layer: nn.Module, x: Activation) -> Activation:
        y = layer(x)
        for value, found in ((x, inputs), (y, outputs)):
            if isinstance(value, Tensor):
                found[name] = value, value._version  # views count with it
        return cast(Activation, y)

    before = batch._version
    model.patched.run(batch, at_site)
    if batch._version != before:  # before the inputs, which may be the batch
        raise ConfigError(
            "model: the target changes its batch in place (x += …, x[…] = …), and every pass would change it "
            "again; let its forward make a new tensor (x = x + …)"
        )
    for what, found in (("output", outputs), ("input", inputs)):
        if changed := [name for name, (value, version) in found.items() if value._version != version]:
            reason = f"whose {what} the target changes in place"
            raise unfit_sites(reason, changed, model.target, model.matrix_names)


@torch.no_grad()
def find_roots(model: DecomposedModel, batch: Tensor, clean: CleanPass) -> frozenset[str]:
    """The roots of a model, seen on a batch and its clean pass.

    Every site's output is disturbed at once; a site whose input is still bit-identical is a root.
    """
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
