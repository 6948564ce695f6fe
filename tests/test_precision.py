"""In which numbers a run computes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spd_hydra.config import RunConfig
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


def test_tf32_on_a_cpu_is_remarked(toy: Toy) -> None:
    said = "train.precision: tf32 is for GPUs; on a CPU it is the same as fp32"
    assert said in remarks(preflight(toy("train.precision=tf32", "device=cpu")))
    assert said not in remarks(preflight(toy("train.precision=fp32", "device=cpu")))
