"""In which numbers a run computes."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from spd_hydra import precision as precision_module
from spd_hydra.config import RunConfig
from spd_hydra.decomposition.subcomponents import weight_delta
from spd_hydra.finite import TrainingError
from spd_hydra.loss.objective import Objective
from spd_hydra.pipeline import remarks
from spd_hydra.precision import Precision, products_in
from spd_hydra.preflight import preflight
from spd_hydra.run import run

Toy = Callable[..., RunConfig]


@pytest.mark.parametrize(
    ("precision", "setting"),
    [(Precision.fp32, "highest"), (Precision.tf32, "high"), (Precision.bf16, "highest")],
)
def test_products_are_of_the_precision_inside_the_block_alone(precision: Precision, setting: str) -> None:
    before = torch.get_float32_matmul_precision()
    inside = []

    def fails() -> None:
        with products_in(precision):
            inside.append(torch.get_float32_matmul_precision())
            raise TrainingError("ends early")

    with pytest.raises(TrainingError):
        fails()
    assert inside == [setting]
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize("replicas", [1, 2])
def test_training_and_evaluation_are_in_tf32_and_the_target_is_not(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, replicas: int
) -> None:
    found: dict[str, set[str]] = {"loss": set(), "target": set()}

    def watched(name: str, owner: type, method: str) -> None:
        real = getattr(owner, method)

        def watch(*args: object, **kwargs: object) -> object:
            found[name].add(torch.get_float32_matmul_precision())
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, method, watch)

    steps = [
        "train.steps=2",
        "model.training.steps=20",
        "model.training.max_tries=1",
        f"train.replicas={replicas}",
    ]
    config = toy("train.precision=tf32", f"cache_dir={tmp_path / 'cache'}", *steps)
    watched("loss", Objective, "inputs")
    watched("target", type(config.model), "gradients")
    run(config)
    assert found == {"loss": {"high"}, "target": {"highest"}}


@pytest.fixture
def exact_blocks(monkeypatch: pytest.MonkeyPatch) -> list[Precision]:
    """The blocks of a precision that are entered."""
    entered: list[Precision] = []
    real = precision_module.products_in

    def watched(precision: Precision) -> AbstractContextManager[None]:
        entered.append(precision)
        return real(precision)

    monkeypatch.setattr(precision_module, "products_in", watched)
    return entered


@pytest.mark.parametrize("how", ["eager", "mapped", pytest.param("compiled", marks=pytest.mark.slow)])
def test_weight_deltas_are_exact_float32_while_other_products_are_not(
    exact_blocks: list[Precision], how: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 3), (3, 2), (2, 5)]
    W, V, U = (torch.randn(2, *shape, generator=generator, requires_grad=True) for shape in shapes)
    delta = {
        "eager": lambda W, V, U: torch.stack([weight_delta(*own) for own in zip(W, V, U, strict=True)]),
        "mapped": torch.vmap(weight_delta),
        "compiled": torch.compile(torch.vmap(weight_delta)),
    }[how]
    with products_in(Precision.tf32):
        found = delta(W, V, U)
        found.square().sum().backward()
    assert exact_blocks
    assert set(exact_blocks) == {Precision.fp32}
    expected = W.detach().double() - torch.einsum("rdc,rco->rod", V.detach().double(), U.detach().double())
    torch.testing.assert_close(found.detach().double(), expected, rtol=1e-6, atol=1e-6)
    gradient = 2 * expected
    wanted_V = -torch.einsum("rod,rco->rdc", gradient, U.detach().double())
    wanted_U = -torch.einsum("rod,rdc->rco", gradient, V.detach().double())
    assert V.grad is not None
    assert U.grad is not None
    torch.testing.assert_close(V.grad.double(), wanted_V, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(U.grad.double(), wanted_U, rtol=1e-5, atol=1e-5)


def test_in_float32_weight_deltas_are_plain_products(exact_blocks: list[Precision]) -> None:
    weight_delta(torch.ones(5, 3), torch.ones(3, 2), torch.ones(2, 5))
    assert not exact_blocks


def test_tf32_does_not_touch_what_cpus_do() -> None:
    cpu = getattr(torch.backends.mkldnn, "matmul")  # noqa: B009, which mypy does not know
    before = cpu.fp32_precision
    with products_in(Precision.tf32):
        assert cpu.fp32_precision == before


def test_tf32_on_a_cpu_is_remarked(toy: Toy) -> None:
    said = "train.precision: tf32 is for GPUs; on a CPU it is the same as fp32"
    assert said in remarks(preflight(toy("train.precision=tf32", "device=cpu")))
    assert said not in remarks(preflight(toy("train.precision=fp32", "device=cpu")))
