"""Processes that share one run, as a test starts them."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# The command line, without pictures, which take longest, and with a disturbance that a test may ask for.
DRIVER = """
import os, sys
import spd_hydra.result, spd_hydra.run
from spd_hydra.cli import main
from spd_hydra.trainer import Trainer
spd_hydra.run.draw_all = spd_hydra.result.draw_all = lambda *arguments: []
rank = int(os.environ.get("RANK", "0"))
exec(os.environ.get("DISTURB", ""))
sys.argv[0] = "spd-run"
sys.exit(main())
"""

# `at(step, act)`: act(trainer) on the given rank before a training step.
AT_STEP = """
take_step = Trainer.train_step
def disturbed_step(self):
    if rank == {rank} and self.step == {step}:
        {act}
    return take_step(self)
Trainer.train_step = disturbed_step
"""


class Ended(NamedTuple):
    """What a process came to."""

    code: int
    out: str
    err: str


def at_step(rank: int, step: int, act: str) -> str:
    """A disturbance: a statement that runs on one rank before one of its steps."""
    return AT_STEP.format(rank=rank, step=step, act=act)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def begin(
    folder: Path,
    words: list[str],
    *,
    size: int = 2,
    disturb: str = "",
    own_session: bool = False,
    **more: str,
) -> list[subprocess.Popen[str]]:
    """Start the ranks of one run in a folder."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SPD_", "SLURM_"))}
    shared = {
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    return [
        subprocess.Popen(
            [sys.executable, "-c", DRIVER, *words],
            cwd=folder,
            env=kept
            | {"OMP_NUM_THREADS": "1", "DISTURB": disturb, **more}
            | (shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if size > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=own_session,
        )
        for rank in range(size)
    ]


def ends(processes: list[subprocess.Popen[str]], timeout: float = 120) -> list[Ended]:
    """Wait for the ranks, all of which must end."""
    try:
        told = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [Ended(p.returncode, out, err) for p, (out, err) in zip(processes, told, strict=True)]


def wait_until(
    condition: Callable[[], Any], processes: list[subprocess.Popen[str]], seconds: float = 60
) -> None:
    """Wait for something that running processes will do."""
    deadline = time.monotonic() + seconds
    while not condition():
        ended = [p.communicate() for p in processes if p.poll() is not None]
        assert not ended, f"ended before it came to that: {ended}"
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.02)


def directory_in(folder: Path) -> Path:
    """The only run directory below a folder."""
    (path,) = folder.glob("outputs/*/*/config.yaml")
    return path.parent


def status_of(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "status.json").read_text())
    return found


def rows_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
