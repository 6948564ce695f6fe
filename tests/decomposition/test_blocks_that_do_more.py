"""A block whose output is not all that it does runs in every pass, once, and no other block does for it."""

from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.decomposition.random_weights import draw_weights
from torch import Tensor, nn
from torch._functorch._aot_autograd.utils import make_boxed_func

from spd_hydra import rng
from spd_hydra.ci_fn.shared_mlp import SharedMLPCausalImportance
from spd_hydra.decomposition.clean_pass import Reuse
from spd_hydra.decomposition.compiled_blocks import CompiledBlocks
from spd_hydra.decomposition.config import Decomposition, SitePattern
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.decomposition.masks import SiteMask

WIDTH, ROWS, C = 5, 7, 3


class Cache:
    """Keeps all that it was ever given, as a cache of keys does, and tells the sum."""

    def __init__(self) -> None:
        self.layers: list[dict[str, Tensor]] = []

    def __setitem__(self, name: str, value: Tensor) -> None:
        self.layers.append({name: value})

    def __getitem__(self, name: str) -> Tensor:
        return torch.stack([layer[name] for layer in self.layers]).sum(0)


class Buffer:
    """Has room for what it is given, from the start."""

    def __init__(self) -> None:
        self.room = torch.zeros(ROWS, WIDTH)

    def __setitem__(self, name: str, value: Tensor) -> None:
        self.room += value

    def __getitem__(self, name: str) -> Tensor:
        return self.room


STORES: dict[str, Callable[[], Any]] = {
    "dictionary": dict,
    "UserDict": UserDict,
    "cache": Cache,
    "buffer": Buffer,
}


class Block(nn.Module):
    """A residual block that may put something into a store, read it from there, or change its input."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.write = nn.Linear(WIDTH, WIDTH)
        self.what = what
        self.runs = 0

    def forward(self, x: Tensor, store: Any) -> Tensor:
        self.runs += 1
        y = torch.tanh(self.write(x))
        if self.what == "puts":
            store["y"] = y
        if self.what in {"puts", "reads"}:
            y = y * store["y"]
        return x.add_(y) if self.what == "in place" else x + y


class Stack(nn.Module):
    """Blocks in turn, with a store of their own in every pass."""

    def __init__(self, blocks: list[str], store: Callable[[], Any]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(what) for what in blocks)
        self.store = store
        draw_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        store = self.store()
        for block in self.blocks:
            x = block(x, store)
        return x


def model(blocks: list[str], store: Callable[[], Any] = dict) -> DecomposedModel:
    sites = {"all": SitePattern(pattern="blocks.*.write", C=C)}
    ci_fn = SharedMLPCausalImportance(hidden=[4])
    return DecomposedModel(Stack(blocks, store), Decomposition(sites=sites), ci_fn, seed=0)


def masks(*blocks: int) -> dict[str, SiteMask]:
    generator = rng.generator(0, "masks")
    return {
        f"blocks.{n}.write": SiteMask(
            torch.rand(ROWS, C, generator=generator), torch.rand(ROWS, generator=generator)
        )
        for n in blocks
    }


def batch() -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=rng.generator(0, "batch"))


def reuse(of: DecomposedModel) -> Reuse:
    clean = of.clean_pass(batch())
    return Reuse(clean, of.activations(clean), products={})


def runs(of: DecomposedModel) -> list[int]:
    blocks = [module for module in of.patched.module.modules() if isinstance(module, Block)]
    found = [block.runs for block in blocks]
    for block in blocks:
        block.runs = 0
    return found


@pytest.mark.parametrize("store", STORES)
def test_a_block_that_later_ones_read_from_runs_and_those_that_read_do_not(store: str) -> None:
    of = model(["plain", "puts", "reads", "reads"], STORES[store])
    with torch.no_grad():
        for _ in range(2):  # a first batch and another
            kept = reuse(of)
            runs(of)
            found = of(batch(), masks(3), reuse=kept)
            assert runs(of) == [0, 1, 0, 1]
            assert torch.equal(found, of(batch(), masks(3)))


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("masked", [(1,), (2,), (0, 1, 2, 3)])
def test_gradients_of_recomputed_blocks_are_those_of_blocks_that_are_kept(
    store: str, masked: tuple[int, ...]
) -> None:
    found = []
    for recompute in (True, False):
        of = model(["plain", "puts", "reads", "reads"], STORES[store])
        kept = reuse(of) if recompute else None
        torch.autograd.backward(of(batch(), masks(*masked), reuse=kept, recompute=recompute).sum())
        found.append({name: p.grad for name, p in of.named_parameters() if p.grad is not None})
    assert {f"subcomponents.blocks/{n}/write.{matrix}" for n in masked for matrix in "VU"} == found[0].keys()
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient)


def test_a_block_that_puts_something_into_a_dictionary_does_so_where_blocks_are_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled: list[Any] = []

    def traced(gm: Any, inputs: Any) -> Any:  # what would be compiled runs as it was traced instead
        compiled.append(gm)
        return make_boxed_func(gm.forward)

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx_inner", traced)
    of = model(["plain", "puts", "reads", "plain"])
    of.compiled_blocks = CompiledBlocks()
    found = of(batch(), masks(0, 1, 2, 3), reuse=reuse(of))
    assert compiled
    torch.testing.assert_close(found, of(batch(), masks(0, 1, 2, 3)))


@pytest.mark.parametrize("store", ["dictionary", "cache"])
def test_a_block_that_could_change_what_it_is_given_and_does_not_is_replaced(store: str) -> None:
    def filled() -> Any:
        made = STORES[store]()
        made["y"] = torch.ones(WIDTH)
        return made

    of = model(["reads", "plain", "reads", "plain"], filled)
    kept = reuse(of)
    runs(of)
    of(batch(), masks(3), reuse=kept)
    assert runs(of) == [0, 0, 0, 1]


def test_an_output_that_what_follows_changes_in_place_is_not_taken_for_the_block() -> None:
    of = model(["plain", "in place", "plain", "plain"])
    with torch.no_grad():
        kept = reuse(of)
        runs(of)
        for _ in range(2):
            found = of(batch(), masks(3), reuse=kept)
            assert runs(of) == [1, 1, 0, 1]
            assert torch.equal(found, of(batch(), masks(3)))
            runs(of)
