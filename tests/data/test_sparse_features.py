"""Sparse features: distribution, independence of slicing, refusal of targets they cannot feed."""

import pytest
import torch

from spd_hydra import rng
from spd_hydra.data.sparse_features import SparseFeatures
from spd_hydra.model.base import TargetSpec
from spd_hydra.model.tms import TMS
from spd_hydra.section import ConfigError

ROWS = torch.arange(200_000, dtype=torch.int32)


def test_values_and_activity_have_the_configured_distribution() -> None:
    batches = SparseFeatures(feature_probability=0.1, low=-2, high=4).bind(TMS(n_features=3))
    batch = batches(rng.key(0, "test"), ROWS)
    active = batch != 0
    assert batch.shape == (200_000, 3)
    # five standard deviations of each estimate
    assert active.float().mean(dim=0) == pytest.approx([0.1] * 3, abs=5 * (0.09 / 2e5) ** 0.5)
    values = batch[active]
    assert values.min() >= -2
    assert values.max() < 4
    assert values.mean() == pytest.approx(1, abs=5 * (3 / 6e4) ** 0.5)
    assert values.var() == pytest.approx(3, rel=0.02)


def test_features_are_active_independently_of_each_other_and_of_their_values() -> None:
    batches = SparseFeatures(feature_probability=0.5).bind(TMS(n_features=4))
    batch = batches(rng.key(3, "test"), ROWS)
    correlation = torch.corrcoef((batch != 0).float().T) - torch.eye(4)
    assert correlation.abs().max() < 5 / 2e5**0.5
    both = (batch[:, 0] != 0) & (batch[:, 1] != 0)
    assert torch.corrcoef(batch[both, :2].T)[0, 1].abs() < 5 / 5e4**0.5


def test_a_slice_of_rows_is_the_slice_of_the_whole() -> None:
    batches = SparseFeatures().bind(TMS())
    key = rng.key(1, "test", 7)
    assert torch.equal(batches(key, ROWS[300:450]), batches(key, ROWS[:1000])[300:450])


def test_the_same_key_gives_the_same_batch_and_another_step_another() -> None:
    batches = SparseFeatures().bind(TMS())
    first = batches(rng.key(1, "test", 0), ROWS[:100])
    assert torch.equal(first, batches(rng.key(1, "test", 0), ROWS[:100]))
    assert not torch.equal(first, batches(rng.key(1, "test", 1), ROWS[:100]))


def test_it_can_run_inside_a_compiled_step() -> None:
    assert SparseFeatures().bind(TMS()).traceable


def test_a_target_without_features_is_refused_with_what_to_do() -> None:
    with pytest.raises(
        ConfigError, match=r"cannot feed TargetSpec, which has no n_features; choose a toy model"
    ):
        SparseFeatures().bind(TargetSpec())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_probability": 0.0}, "feature_probability: got 0.0, must be > 0 and ≤ 1"),
        ({"low": 1.0, "high": 1.0}, r"high: got 1.0, must be > low \(1.0\)"),
        ({"low": float("nan")}, r"must be > low \(nan\)"),
    ],
)
def test_contradictory_options_are_named(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SparseFeatures(**options)
