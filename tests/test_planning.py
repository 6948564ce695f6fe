"""What the compiler's plan says of memory is what can be counted by hand."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from spd_hydra.compiling import Kernel, can_compile, compiled_by
from spd_hydra.planning import Planner

Planned = Callable[..., tuple[int, Any]]
N, A, B = 1000, 30, 50


@pytest.fixture
def planned() -> Iterator[Planned]:
    """Bytes that a compiled function needs, and its outputs."""
    planner = Planner()
    with FakeTensorMode(), compiled_by(planner):

        def plan(function: Callable[..., Any], *shapes: tuple[int, ...]) -> tuple[int, Any]:
            reached: list[int] = []
            planner.reach = reached.append
            outputs = Kernel(function)(*(torch.empty(shape) for shape in shapes))
            (size,) = reached
            return size, outputs

        yield plan


def test_what_is_between_pointwise_operations_is_never_in_memory(planned: Planned) -> None:
    size, output = planned(lambda x: torch.exp(torch.sin(x) * 2 + 1).cos(), (N, A))
    assert size == 4 * N * A
    assert output.shape == (N, A)


def test_a_sum_takes_no_memory_for_its_terms(planned: Planned) -> None:
    size, _ = planned(lambda x: (torch.sin(x) * x).sum(1), (N, A))
    assert size == 4 * N


def test_products_are_in_memory_until_they_are_read_last(planned: Planned) -> None:
    def three(x: Tensor, w: Tensor) -> Tensor:
        return ((x @ w) @ w) @ w

    size, _ = planned(three, (N, B), (B, B))
    assert size == 2 * 4 * N * B  # what a product reads and what it writes; the inputs are the caller's


def test_several_outputs_are_there_together(planned: Planned) -> None:
    size, outputs = planned(lambda x, w: (x @ w, x + 1, x.sum()), (N, A), (A, B))
    assert size == 4 * (N * B + N * A + 1)
    assert [tuple(output.shape) for output in outputs] == [(N, B), (N, A), ()]


def test_outputs_share_memory_as_those_of_the_function_do(planned: Planned) -> None:
    def views(x: Tensor) -> tuple[Tensor, ...]:
        y = torch.exp(x)
        return y, y.T, y[2:5, 1], y + 1

    size, (y, transposed, piece, other) = planned(views, (N, A))
    assert size == 2 * 4 * N * A
    storages = [tensor.untyped_storage()._cdata for tensor in (y, transposed, piece, other)]
    assert len(set(storages[:3])) == 1
    assert storages[3] != storages[0]
    assert (transposed.shape, transposed.stride()) == ((A, N), (1, A))
    assert (piece.shape, piece.stride(), piece.storage_offset()) == ((3,), (A,), 2 * A + 1)


def test_what_cannot_be_planned_is_told(planned: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    def other_version(*arguments: object) -> None:
        raise TypeError("another signature")

    monkeypatch.setattr("torch._inductor.memory.compute_memory_timeline", other_version)
    with pytest.raises(Exception, match="another signature"):
        planned(torch.exp, (N, A))


@pytest.mark.skipif(not can_compile("cpu"), reason="no compiler here")
def test_a_kernel_that_was_planned_computes_afterwards_and_is_planned_anew_by_another() -> None:
    kernel = Kernel(lambda x: (x * 2).sum())
    x = torch.arange(N, dtype=torch.float32)

    def plan() -> list[int]:
        planner, reached = Planner(), list[int]()
        planner.reach = reached.append
        with compiled_by(planner), FakeTensorMode() as fake:
            kernel(fake.from_tensor(x))
        return reached

    assert plan() == [4]
    assert plan() == [4]
    assert kernel(x).item() == N * (N - 1)
    assert plan() == [4]
