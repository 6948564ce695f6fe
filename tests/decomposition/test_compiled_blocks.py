"""Blocks that are compiled one by one compute what they compute as they are."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch._inductor.config
from tests.decomposition.random_weights import draw_weights
from torch import Tensor, nn
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch.utils.flop_counter import FlopCounterMode

from spd_hydra.ci_fn.shared_mlp import SharedMLPCausalImportance
from spd_hydra.decomposition.compiled_blocks import CompiledBlocks
from spd_hydra.decomposition.config import Decomposition, SitePattern
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.decomposition.routing import Routing
from spd_hydra.loss.ascent import Start
from spd_hydra.loss.importance_minimality import ImportanceMinimality
from spd_hydra.loss.loss_set import LossSet
from spd_hydra.loss.objective import Objective
from spd_hydra.loss.pgd_recon import PGDRecon
from spd_hydra.loss.recon import Recon
from spd_hydra.precision import Precision

WIDTH, C = 5, 3


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The code of what would be compiled, which runs as it was traced instead."""
    seen: list[str] = []

    def traced(gm: Any, inputs: Sequence[Any]) -> Any:
        seen.append(gm.code)
        return make_boxed_func(gm.forward)

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx_inner", traced)
    return seen


class Block(nn.Module):
    """A residual block of two matrices; `factor` is no tensor and differs where it is asked to."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.factor = factor

    def forward(self, x: Tensor, *, scale: float, hint: object = None) -> tuple[Tensor, None]:
        return x + scale * self.factor * self.down(torch.tanh(self.up(x))), None


class Stack(nn.Module):
    """Blocks in turn."""

    def __init__(self, factors: Sequence[float], hint: object = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(factor) for factor in factors)
        self.hint = hint
        draw_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x, _ = block(x, scale=0.5, hint=self.hint)
        return x


def objective(target: Stack, *, compiled: bool) -> Objective:
    sites = {"all": SitePattern(pattern="blocks.*.*", C=C)}
    model = DecomposedModel(target, Decomposition(sites=sites), SharedMLPCausalImportance(hidden=[4]), seed=0)
    model.compiled_blocks = CompiledBlocks() if compiled else None
    losses = LossSet(
        stochastic_recon=Recon(coeff=1.0),
        stochastic_recon_layerwise=Recon(coeff=1.0, routing=Routing.layerwise),
        stochastic_recon_subset=Recon(coeff=1.0, routing=Routing.uniform_k),
        importance_minimality=ImportanceMinimality(coeff=0.1),
    )
    return Objective(model, losses, precision=Precision.fp32, ci_threshold=0.1)


def losses_and_gradients(of: Objective, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    columns = len(of.columns(of.losses.active_terms()))
    batch, draws = torch.randn(7, WIDTH, generator=generator), torch.rand(7, columns, generator=generator)
    loss = of(batch, draws, {})
    named = {name: p for name, p in of.model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss.total, list(named.values()))
    return {**loss.terms, "total": loss.total.detach(), **dict(zip(named, gradients, strict=True))}


def require_close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_losses_and_gradients_are_those_of_blocks_that_run_as_they_are(compilations: list[str]) -> None:
    plain, compiled = (objective(Stack([1.0, 1.0, 1.0]), compiled=own) for own in (False, True))
    for seed in range(2):  # the second time from what is remembered
        require_close(losses_and_gradients(compiled, seed), losses_and_gradients(plain, seed))
    assert compilations


def test_equal_blocks_share_what_is_compiled_and_others_do_not(compilations: list[str]) -> None:
    numbers = {}
    for factors in [(1.0, 1.0, 1.0), (1.0, 1.0, 1.0, 1.0, 1.0), (1.0, 2.0, 1.0)]:
        compilations.clear()
        losses_and_gradients(objective(Stack(factors), compiled=True))
        assert len(set(compilations)) == len(compilations)
        numbers[factors] = len(compilations)
    assert numbers[1.0, 1.0, 1.0] == numbers[1.0, 1.0, 1.0, 1.0, 1.0]
    assert numbers[1.0, 2.0, 1.0] > numbers[1.0, 1.0, 1.0]


def test_a_second_step_compiles_nothing(compilations: list[str]) -> None:
    of = objective(Stack([1.0, 1.0]), compiled=True)
    losses_and_gradients(of, 0)
    compilations.clear()
    losses_and_gradients(of, 1)
    assert not compilations


def test_evaluations_compile_nothing(compilations: list[str]) -> None:
    of = objective(Stack([1.0, 1.0]), compiled=True)
    of.losses.pgd_recon = PGDRecon(coeff=1.0, n_steps=2)
    with torch.no_grad(), of.model.uncompiled():  # as `metric.evaluate` does: an ascent takes gradients
        columns = len(of.columns(of.losses.active_terms()))
        of(torch.ones(2, WIDTH), torch.rand(2, columns), {})
    assert not compilations


def adversarial(n_steps: int, *, compiled: bool, recompute: bool = False) -> Objective:
    of = objective(Stack([1.0, 1.0, 1.0]), compiled=compiled)
    of.losses = LossSet(pgd_recon=PGDRecon(coeff=1.0, n_steps=n_steps, step_size=0.1, start=Start.ones))
    of.recompute = recompute
    return of


def flops(of: Objective, n_rows: int) -> int:
    """Of a step that compiles nothing."""
    columns = len(of.columns(of.losses.active_terms()))
    batch, draws = torch.ones(n_rows, WIDTH), torch.ones(n_rows, columns)
    parameters = [p for p in of.model.parameters() if p.requires_grad]
    torch.autograd.grad(of(batch, draws, {}).total, parameters, allow_unused=True)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(of(batch, draws, {}).total, parameters, allow_unused=True)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("recompute", [False, True])
def test_an_ascent_takes_no_gradients_of_the_matrices(compilations: list[str], recompute: bool) -> None:
    two, three = (flops(adversarial(n, compiled=True, recompute=recompute), 7) for n in (2, 3))
    width, hidden = 2 * 7 * WIDTH * WIDTH, 2 * 7 * WIDTH * C  # x W; h = x V, and as much for h U
    forward = 6 * (width + 2 * hidden)  # three blocks of two sites
    backward = 6 * (width + 2 * hidden) - (width + hidden)  # to x and h; the first x is the input
    assert compilations
    assert three - two == (2 if recompute else 1) * forward + backward


def test_an_ascent_finds_what_it_finds_in_blocks_that_run_as_they_are(compilations: list[str]) -> None:
    for recompute in (False, True):
        plain, compiled = (adversarial(2, compiled=own, recompute=recompute) for own in (False, True))
        for seed in range(2):
            require_close(losses_and_gradients(compiled, seed), losses_and_gradients(plain, seed))
    assert compilations


def test_a_block_that_cannot_be_compiled_runs_as_it_is_and_a_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(gm: Any, inputs: Sequence[Any]) -> Any:
        raise NotImplementedError("no such operation\nand more")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx_inner", refuse)
    with caplog.at_level(logging.WARNING, logger="spd_hydra"):
        found = losses_and_gradients(objective(Stack([1.0, 1.0]), compiled=True))
    require_close(found, losses_and_gradients(objective(Stack([1.0, 1.0]), compiled=False)))
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("spd_hydra")]
    assert lines
    assert all("no such operation" in line and "\n" not in line for line in lines)


def test_a_block_whose_backward_pass_cannot_be_compiled_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(gm: Any, inputs: Sequence[Any]) -> Any:
        if "tangents" in gm.code:
            raise NotImplementedError("no such slope")
        return make_boxed_func(gm.forward)

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx_inner", refuse)
    with caplog.at_level(logging.WARNING, logger="spd_hydra"):
        found = losses_and_gradients(objective(Stack([1.0, 1.0]), compiled=True))
    require_close(found, losses_and_gradients(objective(Stack([1.0, 1.0]), compiled=False)))
    assert any("no such slope" in record.getMessage() for record in caplog.records)


def test_a_block_that_takes_all_memory_is_not_said_to_be_beyond_a_compiler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(gm: Any, inputs: Sequence[Any]) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx_inner", full)
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        losses_and_gradients(objective(Stack([1.0, 1.0]), compiled=True))


def test_a_block_with_other_arguments_than_tensors_and_numbers_runs_as_it_is_and_a_line_says_so(
    compilations: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="spd_hydra"):
        found = losses_and_gradients(objective(Stack([1.0, 1.0], hint=object()), compiled=True))
    require_close(found, losses_and_gradients(objective(Stack([1.0, 1.0]), compiled=False)))
    assert not compilations
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        f"blocks.{number} cannot be compiled and runs as it is, which is slower: "
        "it takes an argument of type object"
        for number in (0, 1)
    ]


class _Straight(torch.autograd.Function):
    """Rounding that a gradient passes through, doubled."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


def test_a_gradient_that_somebody_defined_stays_theirs(compilations: list[str]) -> None:
    straight: Callable[[Tensor], Tensor] = _Straight.apply
    x = torch.tensor([0.2, 1.7], requires_grad=True)
    y = CompiledBlocks()("round", lambda given: 3 * straight(given["x"]), {"x": x})
    torch.testing.assert_close(y, torch.tensor([0.0, 6.0]))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, torch.tensor([6.0, 6.0]))
    assert compilations


@pytest.mark.slow
def test_gradients_are_right_where_the_compiler_pads_as_on_a_gpu() -> None:
    generator = torch.Generator().manual_seed(0)
    wide = 1100  # above 1,024 and no multiple of 32
    shapes = {"x": (40, 8), "V": (8, wide), "U": (wide, 8), "mask": (40, wide)}
    given = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    def masked(own: dict[str, Tensor]) -> Tensor:
        return own["x"] + ((own["x"] @ own["V"]) * own["mask"]) @ own["U"]

    def gradients(run: Callable[[dict[str, Tensor]], Tensor]) -> tuple[Tensor, ...]:
        leaves = {name: own.clone().requires_grad_() for name, own in given.items()}
        return torch.autograd.grad(run(leaves).square().sum(), list(leaves.values()))

    blocks = CompiledBlocks()
    with torch._inductor.config.patch(disable_padding_cpu=False):
        compiled = gradients(lambda own: blocks("wide", masked, own))
    for found, wanted in zip(compiled, gradients(masked), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-2)


@pytest.mark.slow
def test_compiled_blocks_have_the_losses_and_gradients_of_blocks_that_run_as_they_are() -> None:
    plain, compiled = (objective(Stack([1.0, 1.0]), compiled=own) for own in (False, True))
    require_close(losses_and_gradients(compiled), losses_and_gradients(plain))
