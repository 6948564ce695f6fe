"""A pass that masks one site takes clean outputs of the blocks before it, and none of those after it."""

from typing import Any

import pytest
import torch
from tests.decomposition.random_weights import draw_weights
from torch import Tensor, nn

from spd_hydra import rng
from spd_hydra.ci_fn.shared_mlp import SharedMLPCausalImportance
from spd_hydra.decomposition.clean_pass import Reuse
from spd_hydra.decomposition.config import Decomposition, SitePattern
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.decomposition.masks import SiteMask

WIDTH = 5


class Counted(nn.Module):
    """A residual block that counts its runs and has a property its owner asks for."""

    kind = "counted"

    def __init__(self) -> None:
        super().__init__()
        self.write = nn.Linear(WIDTH, WIDTH)
        self.runs = 0

    def forward(self, x: Tensor, *, scale: float) -> tuple[Tensor]:
        self.runs += 1
        return (x + scale * torch.tanh(self.write(x)),)


class Stack(nn.Module):
    """Four blocks in turn; `again` runs the first one a second time, before the last."""

    def __init__(self, *, again: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Counted() for _ in range(4))
        self.again = again
        draw_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        blocks = list(self.blocks)
        order = [*blocks[:3], *([blocks[0]] if self.again else []), blocks[3]]
        for block in order:
            assert block.kind == "counted"
            (x,) = block(x, scale=0.5)
        return x


def model(*, again: bool, first: int = 0) -> DecomposedModel:
    sites = {str(n): SitePattern(pattern=f"blocks.{n}.write", C=3) for n in range(first, 4)}
    ci_fn = SharedMLPCausalImportance(hidden=[4])
    return DecomposedModel(Stack(again=again), Decomposition(sites=sites), ci_fn, seed=0)


def mask() -> SiteMask:
    generator = rng.generator(0, "mask")
    return SiteMask(torch.rand(7, 3, generator=generator), torch.rand(7, generator=generator))


def runs(of: DecomposedModel) -> list[int]:
    counted = [module for module in of.patched.module.modules() if isinstance(module, Counted)]
    found = [block.runs for block in counted]
    for block in counted:
        block.runs = 0
    return found


def reuse(of: DecomposedModel, batch: Tensor) -> Reuse:
    clean = of.clean_pass(batch)
    return Reuse(clean, of.activations(clean), products={})


@pytest.mark.parametrize("masked", range(4))
def test_blocks_before_a_lone_masked_site_do_not_run_and_nothing_changes(masked: int) -> None:
    of, batch = model(again=False), torch.randn(7, WIDTH, generator=rng.generator(0, "batch"))
    masks = {f"blocks.{masked}.write": mask()}
    kept = reuse(of, batch)
    runs(of)
    found = of(batch, masks, reuse=kept)
    assert runs(of) == [0] * masked + [1] * (4 - masked)
    assert torch.equal(found, of(batch, masks))


def test_every_block_runs_where_several_sites_are_masked() -> None:
    of, batch = model(again=False), torch.randn(7, WIDTH, generator=rng.generator(0, "batch"))
    masks = {"blocks.1.write": mask(), "blocks.3.write": mask()}
    kept = reuse(of, batch)
    runs(of)
    found = of(batch, masks, reuse=kept)
    assert runs(of) == [1, 1, 1, 1]
    torch.testing.assert_close(found, of(batch, masks))


def test_a_block_that_runs_twice_is_never_replaced() -> None:
    of, batch = model(again=True, first=1), torch.randn(7, WIDTH, generator=rng.generator(0, "batch"))
    masks = {"blocks.3.write": mask()}
    kept = reuse(of, batch)
    runs(of)
    found = of(batch, masks, reuse=kept)
    assert runs(of) == [2, 0, 0, 1]
    torch.testing.assert_close(found, of(batch, masks))


class InParts(nn.Module):
    """Layers whose parts the target runs itself: a list, a dictionary or a sequence in a list."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.layers = nn.ModuleList(self.layer() for _ in range(2))
        draw_weights(self)

    def layer(self) -> nn.Module:
        parts = [nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)]
        if self.kind == "dictionary":
            return nn.ModuleDict({"0": parts[0], "1": parts[1]})
        return nn.ModuleList(parts) if self.kind == "list" else nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        layers: list[Any] = list(self.layers)
        for layer in layers:
            assert layer
            first, second = (layer["0"], layer["1"]) if self.kind == "dictionary" else list(layer)
            assert len(layer) == 2
            x = x + second(torch.tanh(first(x)))
        return x


@pytest.mark.parametrize("kind", ["list", "dictionary", "sequence"])
def test_a_target_may_run_the_parts_of_its_layers(kind: str) -> None:
    target, batch = InParts(kind), torch.randn(7, WIDTH, generator=rng.generator(0, "batch"))
    sites = {"all": SitePattern(pattern="layers.*", C=3)}
    of = DecomposedModel(target, Decomposition(sites=sites), SharedMLPCausalImportance(hidden=[4]), seed=0)
    kept = reuse(of, batch)
    assert len(of.site_names) == 4
    torch.testing.assert_close(kept.clean.output, target(batch))
    masks = {"layers.1.0": mask()}
    torch.testing.assert_close(of(batch, masks, reuse=kept), of(batch, masks))


def test_gradients_are_those_of_whole_passes() -> None:
    batch = torch.randn(7, WIDTH, generator=rng.generator(0, "batch"))
    gradients = []
    for shares in (True, False):
        of = model(again=False)
        kept = reuse(of, batch) if shares else None
        torch.autograd.backward(of(batch, {"blocks.2.write": mask()}, reuse=kept).square().sum())
        gradients.append({name: p.grad for name, p in of.named_parameters() if p.grad is not None})
    assert (
        gradients[0].keys()
        == gradients[1].keys()
        == {f"subcomponents.blocks/2/write.{matrix}" for matrix in "VU"}
    )
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


def test_the_target_itself_is_left_as_it_was() -> None:
    of, batch = model(again=False), torch.randn(7, WIDTH, generator=rng.generator(0, "batch"))
    assert all(type(block) is Counted for block in of.target.blocks)
    assert torch.equal(of(batch), of.clean_pass(batch).output)
