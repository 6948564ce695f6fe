"""A real SLURM on this machine, and a plug-in with which runs fail in every way."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

SPD_RUN = Path(sys.executable).with_name("spd-run")
SLURM_UP = Path(__file__).with_name("slurm_up.sh")
PLUG_IN = Path(__file__).with_name("trouble.py")
NOT_ENDED = {"PENDING", "RUNNING", "COMPLETING"}
NEEDED = ("munged", "slurmctld", "slurmd", "srun", "sbatch")


class Cluster:
    """Four pretend nodes with two pretend GPUs each, and a folder to work in."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment
        self._of_others: set[str] = set()
        self._of_others = set(self.states())

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        """Call `spd-run` with a small run and some words, and go on."""
        launcher = ["launcher=slurm", "launcher.gpus=0", "launcher.poll_seconds=0.5"]
        if any(word.startswith("launcher=") for word in words):
            launcher = []
        return subprocess.Popen(
            [SPD_RUN, "debug=smoke", *launcher, *words],
            cwd=self.folder,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def spd_run(self, *words: str, code: int = 0, **environment: str) -> str:
        """The same, to its end; what it printed."""
        process = self.start(*words, **environment)
        out, _ = process.communicate(timeout=240)
        assert process.returncode == code, out
        return out

    def call(self, *words: str) -> str:
        """What a command of SLURM prints."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def states(self) -> dict[str, tuple[str, str]]:
        """State and exit code of every job of this test, by id."""
        rows = self.call("squeue", "-h", "-r", "-t", "all", "-O", "JobArrayID:30,State:20,exit_code:20")
        found = [row.split() for row in rows.splitlines()]
        return {row[0]: (row[1], row[2]) for row in found if row[0] not in self._of_others}

    def wait_until_idle(self) -> None:
        """Return when no job waits or runs any more."""
        wait_for(lambda: not {state for state, _ in self.states().values()} & NOT_ENDED)

    @property
    def sweep(self) -> Path:
        """The directory of the only sweep that was started here."""
        (found,) = self.folder.glob("outputs/sweeps/*")
        return found

    def status(self, job: int = 0) -> dict[str, Any]:
        """What the run of a job says of itself; empty if nothing yet."""
        path = self.sweep / str(job) / "status.json"
        return dict(json.loads(path.read_text())) if path.exists() else {}

    def rows(self, job: int = 0) -> list[dict[str, Any]]:
        """The metrics of a job."""
        path = self.sweep / str(job) / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def log(self, job_id: str, rank: int = 0) -> str:
        """Both logs of a job's rank."""
        names = (f"{job_id}_{rank}_log.out", f"{job_id}_{rank}_log.err")
        return "".join((self.sweep / ".submitit" / name).read_text() for name in names)


@pytest.fixture(name="wait_for")
def fixture_wait_for() -> Callable[..., None]:
    """Return when something has become true."""
    return wait_for


def wait_for(what: Callable[[], object], seconds: float = 90) -> None:
    """Return when something has become true."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Iterator[dict[str, str]]:
    """The environment of a cluster that this process started. Every worker has its own."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        needed = f"SLURM is not installed ({', '.join(missing)}): tests/slurm/slurm_up.sh install, as root"
        if os.environ.get("SPD_REQUIRE_SLURM"):
            pytest.fail(needed)
        pytest.skip(needed)
    number = int(worker_id.removeprefix("gw")) if worker_id != "master" else 0
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("SPD_", "WANDB_", "SLURM"))
    }
    root = tempfile.mkdtemp(prefix="spd_slurm_")  # not below pytest's folder, which munge may not enter
    Path(root).chmod(0o755)
    environment = kept | {
        "SLURM_TEST_ROOT": root,
        "SLURM_TEST_PORT": str(16900 + 40 * number),
    }
    subprocess.run([SLURM_UP, "start"], env=environment, check=True, timeout=120)
    try:
        # Without the sacct of the script: there is no accounting here, and none is needed.
        yield environment | {
            "SLURM_CONF": f"{root}/slurm.conf",
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "SPD_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        }
    finally:
        subprocess.run([SLURM_UP, "purge"], env=environment, check=True, timeout=120)


@pytest.fixture
def cluster(slurm: dict[str, str], tmp_path: Path) -> Iterator[Cluster]:
    """The cluster with an empty folder, and the plug-in `trouble` where every process finds it."""
    site = tmp_path / "site"
    entry = site / "trouble-1.dist-info"
    entry.mkdir(parents=True)
    shutil.copy(PLUG_IN, site)
    (entry / "METADATA").write_text("Metadata-Version: 2.1\nName: trouble\nVersion: 1\n")
    (entry / "entry_points.txt").write_text("[spd_hydra.plugins]\ntrouble = trouble\n")
    work = tmp_path / "work"
    work.mkdir()
    made = Cluster(work, slurm | {"PYTHONPATH": str(site)})
    yield made
    made.call("scancel", "--full", "--user", str(os.getuid()))
    made.wait_until_idle()
