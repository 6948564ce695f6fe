"""Importing the package."""

import os
import subprocess
import sys

import pytest


def spins(script: str, **environment: str) -> str:
    """How long libgomp's threads spin for each other in a process that does this, as libgomp says itself."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=ours | {"OMP_DISPLAY_ENV": "verbose"} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    said = [line for line in result.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    if not said:
        pytest.skip("this torch does not use libgomp")
    return said[0].split("=")[1].strip().strip("'")


def test_threads_do_not_spin_for_long_so_that_two_runs_share_the_cores() -> None:
    assert spins("import torch") == "300000"  # so the package is needed for it
    assert spins("import spd_hydra, torch") == "1000"


def test_how_long_threads_spin_is_left_to_who_says_so() -> None:
    assert spins("import spd_hydra, torch", GOMP_SPINCOUNT="7") == "7"
    assert spins("import spd_hydra, torch", OMP_WAIT_POLICY="passive") == "0"
