"""The known answer of a toy model is found, with the preset as it is shipped."""

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
