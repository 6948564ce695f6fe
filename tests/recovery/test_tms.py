"""A toy model is solved by its preset as it is shipped; with a spoiled one the run says why it is not."""

from collections.abc import Callable
from pathlib import Path

import pytest

from spd_hydra.composition import compose
from spd_hydra.run import run


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_tms_5_2_is_solved(
    seed: int, tmp_path: Path, target_cache: Path, record_property: Callable[[str, object], None]
) -> None:
    places = [f"out_dir={tmp_path}", f"cache_dir={target_cache}"]
    summary = run(compose(["experiment=tms_5-2", f"seed={seed}", "device=cpu", *places])).summary
    record_property("strict", summary["strict"])
    print(f"seed {seed}: strict {summary['strict']}, MMCS {summary['mmcs']:.4f}, ML2R {summary['ml2r']:.4f}")
    assert summary["target"]["certified"]
    assert summary["solved"], summary["checks"]
    assert summary["mmcs"] >= 0.99
    assert abs(summary["ml2r"] - 1) <= 0.05
    assert summary["alive"] == {"embed": 5, "unembed": 5}
    assert {check["error"] for check in summary["checks"] if check["tolerance"] == 0.2} == {0}


@pytest.mark.slow
def test_a_coefficient_thirty_times_too_high_is_recognised(tmp_path: Path, target_cache: Path) -> None:
    places = [f"out_dir={tmp_path}", f"cache_dir={target_cache}"]
    spoiled = ["train.steps=1500", "train.restarts.number=1", "loss.importance_minimality.coeff=9e-2"]
    summary = run(compose(["experiment=tms_5-2", "device=cpu", *places, *spoiled])).summary
    assert not summary["solved"]
    assert "loss.importance_minimality.coeff=0.009 (now 0.09)" in summary["diagnosis"][0]["advice"]
