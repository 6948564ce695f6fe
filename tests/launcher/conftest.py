"""`spd-run` as a process of its own, with the plug-in `trouble` where every process finds it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SPD_RUN = Path(sys.executable).with_name("spd-run")
PLUG_IN = Path(__file__).parents[1] / "slurm" / "trouble.py"


@pytest.fixture
def begin(
    tmp_path: Path, target_cache: Path, work_without_figures: Callable[[Path], Path]
) -> Callable[..., subprocess.Popen[str]]:
    """Call `spd-run` with some words in an empty folder, and go on."""
    entry = tmp_path / "site" / "trouble-1.dist-info"
    entry.mkdir(parents=True)
    shutil.copy(PLUG_IN, tmp_path / "site")
    (entry / "METADATA").write_text("Metadata-Version: 2.1\nName: trouble\nVersion: 1\n")
    (entry / "entry_points.txt").write_text("[spd_hydra.plugins]\ntrouble = trouble\n")
    work_without_figures(tmp_path / "work")
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("SPD_", "WANDB_", "SLURM"))
    }

    def call(*words: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [SPD_RUN, *words],
            cwd=tmp_path / "work",
            env=kept
            | {
                "PYTHONPATH": str(tmp_path / "site"),
                "SPD_CACHE_DIR": str(target_cache),
                "OMP_NUM_THREADS": "1",
            }
            | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    return call
