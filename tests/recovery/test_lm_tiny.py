"""A small language model is decomposed by its preset as it is shipped."""

from pathlib import Path

import pytest

from spd_hydra.composition import compose
from spd_hydra.run import run


@pytest.mark.recovery
def test_few_subcomponents_recover_the_cross_entropy_of_lm_tiny(tmp_path: Path) -> None:
    places = [f"out_dir={tmp_path}", f"cache_dir={tmp_path / 'cache'}", "device=cpu"]
    summary = run(compose(["experiment=lm_tiny", *places])).summary
    found, alive = summary["ablations"], sum(summary["alive"].values())
    target, none = found["target"]["ce"], found["zero"]["ce"]
    recovered = (none - found["ci"]["ce"]) / (none - target)
    print(
        f"recovered {recovered:.3f}, L0 {summary['l0']['total']:.0f} of {alive} alive, {summary['seconds']}"
    )
    print({kind: measured["ce"] for kind, measured in found.items()})
    assert recovered >= 0.9
    assert summary["l0"]["total"] <= 0.4 * alive
    assert found["unmasked"]["ce"] == pytest.approx(target, rel=0.01)
