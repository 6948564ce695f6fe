"""A real SLURM on this machine, and a plug-in with which runs fail in every way."""

import contextlib
import json
import os
import random
import shutil
import socket
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


@contextlib.contextmanager
def running(**knobs: str) -> Iterator[dict[str, str]]:
    """A cluster of this process alone: the environment in which its commands find it."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        needed = f"SLURM is not installed ({', '.join(missing)}): tests/slurm/slurm_up.sh install, as root"
        if os.environ.get("SPD_REQUIRE_SLURM"):
            pytest.fail(needed)
        pytest.skip(needed)
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("SPD_", "WANDB_", "SLURM"))
    }
    root = tempfile.mkdtemp(prefix="spd_slurm_")  # not below pytest's folder, which munge may not enter
    Path(root).chmod(0o755)
    environment = kept | {"SLURM_TEST_ROOT": root, "SLURM_TEST_PORT": str(_free_ports())} | knobs
    subprocess.run([SLURM_UP, "start"], env=environment, check=True, timeout=120)
    try:
        # Without the sacct of the script: there is no accounting here, and none is needed.
        yield environment | {
            "SLURM_CONF": f"{root}/slurm.conf",
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        }
    finally:
        subprocess.run([SLURM_UP, "purge"], env=environment, check=True, timeout=120)


def _free_ports() -> int:
    """A port from which on those that a cluster needs are free."""
    while True:
        first = random.SystemRandom().randrange(15000, 30000)
        try:
            for port in (first, *range(first + 11, first + 15)):
                with socket.socket() as free:
                    free.bind(("", port))
        except OSError:
            continue
        return first


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a cluster for all tests of this process; every process has its own."""
    with running() as environment:
        yield environment | {"SPD_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}


@pytest.fixture
def fragile(
    tmp_path: Path, plug_in_site: Path, work_without_figures: Callable[[Path], Path]
) -> Iterator[Cluster]:
    """A cluster of this test's own that counts a node as lost after a few seconds of silence."""
    with running(SLURM_TEST_SLURMD_TIMEOUT="5") as environment:
        work = work_without_figures(tmp_path / "work")
        made = {"PYTHONPATH": str(plug_in_site), "SPD_CACHE_DIR": str(tmp_path / "cache")}
        yield Cluster(work, environment | made)


@pytest.fixture
def plug_in_site(tmp_path: Path) -> Path:
    """A folder where every process finds the plug-in `trouble`, if it is among its paths."""
    site = tmp_path / "site"
    entry = site / "trouble-1.dist-info"
    entry.mkdir(parents=True)
    shutil.copy(PLUG_IN, site)
    (entry / "METADATA").write_text("Metadata-Version: 2.1\nName: trouble\nVersion: 1\n")
    (entry / "entry_points.txt").write_text("[spd_hydra.plugins]\ntrouble = trouble\n")
    return site


@pytest.fixture
def cluster(
    slurm: dict[str, str],
    tmp_path: Path,
    plug_in_site: Path,
    work_without_figures: Callable[[Path], Path],
) -> Iterator[Cluster]:
    """The cluster with an empty folder, and the plug-in."""
    work = work_without_figures(tmp_path / "work")
    made = Cluster(work, slurm | {"PYTHONPATH": str(plug_in_site)})
    yield made
    made.call("scancel", "--full", "--user", str(os.getuid()))
    made.wait_until_idle()
