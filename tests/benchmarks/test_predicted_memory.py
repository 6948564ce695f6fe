"""The predicted peak of a compiled step is what such a step takes."""

import pytest
import torch
from benchmarks.predicted_memory import CASES, Peak, compare, config_of, row, section

from spd_hydra.compiling import can_compile
from spd_hydra.environment import describe_environment
from spd_hydra.estimate import Estimate, Way
from spd_hydra.simulation import Needs

MIB = 2**20


def peak() -> Peak:
    needs = Needs(trained=1, frozen=1, resident=MIB, peak=9 * MIB, flops=1, moved=1)
    made = Estimate(
        needs=needs, way=Way.whole, planned=3 * MIB, ranks=1, device=torch.device("cpu"), rates=None
    )
    return Peak(made, 4 * MIB)


def test_a_row_compares_prediction_and_measurement() -> None:
    assert row("toy", peak()) == ["toy", "a compiled step", "3.0", "4.0", "0.75", "9.0"]
    environment = describe_environment("cpu")
    text = section([row("toy", peak())], environment, "python -m benchmarks.predicted_memory")
    assert f"torch {environment['torch']}" in text
    assert "| toy | a compiled step | 3.0 | 4.0 | 0.75 | 9.0 |" in text


@pytest.mark.parametrize("name", CASES)
def test_every_case_is_compiled(name: str) -> None:
    training = config_of(name).train
    assert training.compile
    assert training.compile_blocks is (True if "blocks" in name else False if "whole" in name else None)


@pytest.mark.slow
@pytest.mark.skipif(not can_compile("cpu"), reason="needs a C++ compiler")
@pytest.mark.parametrize("name", ["tms_5-2", "resid_mlp1", "lm_tiny, blocks"])
def test_a_compiled_step_takes_what_was_predicted(name: str) -> None:
    found = compare(config_of(name))
    way = Way.blocks if "blocks" in name else Way.whole
    assert found.predicted.peak[1] is way
    assert found.ratio == pytest.approx(1, rel=0.2)
