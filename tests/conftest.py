"""Small runs for the tests of what lies above the loss."""

from collections.abc import Callable
from pathlib import Path

import pytest

from spd_hydra.composition import compose
from spd_hydra.config import RunConfig

Toy = Callable[..., RunConfig]


@pytest.fixture(scope="session")
def target_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the targets of all small runs are kept."""
    return tmp_path_factory.mktemp("targets")


@pytest.fixture
def toy(tmp_path: Path, target_cache: Path) -> Toy:
    """Compose `debug=smoke`, a run of 20 uncompiled steps into `<tmp>/runs`, with further overrides."""

    def make(*overrides: str) -> RunConfig:
        places = [f"out_dir={tmp_path / 'runs'}", f"cache_dir={target_cache}"]
        return compose(["debug=smoke", *places, "model.training.batch_size=64", *overrides])

    return make
