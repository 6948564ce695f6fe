"""Jobs side by side on this machine: so many at once, one's end is no other's, Ctrl-C saves all."""

import csv
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from spd_hydra.launcher import pool
from spd_hydra.launcher.job import RunJob
from spd_hydra.result import Outcome

Begin = Callable[..., subprocess.Popen[str]]
TROUBLE = ["debug=smoke", "+loss_term@loss.extra.trouble=trouble_schema", "loss.extra.trouble.coeff=1"]
PARALLEL = ["launcher=local_parallel", "launcher.poll_seconds=0.2"]


def running(folder: Path) -> int:
    """How many processes of jobs below a folder there are now, without their children."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if b"submitit.core._submit" in words and any(str(folder).encode() in word for word in words):
            parents[int(path.name)] = parent
    return sum(parent not in parents for parent in parents.values())


def sweep_in(folder: Path) -> Path:
    (found,) = (folder / "work").glob("outputs/sweeps/*")
    return found


def status(folder: Path, job: int) -> dict[str, Any]:
    path = sweep_in(folder) / str(job) / "status.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


@pytest.mark.slow
def test_never_more_run_at_once_than_asked_for_and_one_that_fails_fails_alone(
    begin: Begin, tmp_path: Path
) -> None:
    words = ["-m", *PARALLEL, "launcher.jobs=2", *TROUBLE, "loss.extra.trouble.seconds=0.05"]
    process = begin(*words, "loss.extra.trouble.how=none,raise,none")
    counts: list[int] = []
    while process.poll() is None:
        counts.append(running(tmp_path))
        time.sleep(0.05)
    said, _ = process.communicate()
    assert process.returncode == 3, said
    assert max(counts) == 2
    with (sweep_in(tmp_path) / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows] == ["done", "failed", "done"]
    assert "RuntimeError: trouble was asked for" in rows[1]["error"]
    assert 'raise RuntimeError("trouble was asked for")' in said  # the traceback
    assert (sweep_in(tmp_path) / ".submitit").stat().st_mode & 0o777 == 0o700
    record = json.loads((sweep_in(tmp_path) / "sweep.json").read_text())
    assert [job["id"] for job in record["jobs"]] == [row["id"] for row in rows]
    assert (record["launcher"], len({row["id"] for row in rows})) == ("local_parallel", 3)


@pytest.mark.slow
def test_a_single_job_runs_in_a_process_of_its_own_and_ends_with_0(begin: Begin, tmp_path: Path) -> None:
    said, _ = (process := begin("debug=smoke", *PARALLEL, "train.steps=5")).communicate(timeout=120)
    assert process.returncode == 0, said
    assert status(tmp_path, 0)["status"] == "done"
    assert (sweep_in(tmp_path) / "sweep.html").is_file()


@pytest.mark.slow
def test_a_run_goes_on_in_its_own_directory_and_the_sweep_shows_it(begin: Begin, tmp_path: Path) -> None:
    out, _ = (process := begin("debug=smoke", "train.steps=5")).communicate(timeout=120)
    assert process.returncode == 0, out
    (run,) = (tmp_path / "work").glob("outputs/tms_5-2/*")
    for steps in (9, 9):  # the second time there is nothing to do
        before = set((tmp_path / "work").glob("outputs/sweeps/*"))
        words = [f"resume={run}", *PARALLEL, f"train.steps={steps}"]
        out, _ = (process := begin(*words)).communicate(timeout=120)
        assert process.returncode == 0, out
        (sweep,) = set((tmp_path / "work").glob("outputs/sweeps/*")) - before
        assert (sweep / "0").resolve() == run.resolve()
        assert json.loads((run / "summary.json").read_text())["steps"] == 9
        with (sweep / "sweep.csv").open(newline="") as file:
            assert [row["state"] for row in csv.DictReader(file)] == ["done"]


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["spd-run alone", "all, twice, as a terminal does", "spd-run, by SIGTERM"])
def test_after_ctrl_c_every_job_has_saved_and_can_go_on(begin: Begin, tmp_path: Path, whom: str) -> None:
    long = ["train.steps=100000", "train.checkpoint_every=100000", "eval.every=100000", "train.log_every=1"]
    slow = [*TROUBLE, "loss.extra.trouble.seconds=0.05"]
    process = begin("-m", *PARALLEL, "launcher.jobs=2", *long, *slow, "seed=0,1,2")
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "work").glob("outputs/sweeps/*/[01]/metrics.jsonl"))) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    if whom == "spd-run alone":
        process.send_signal(signal.SIGINT)
    elif whom == "spd-run, by SIGTERM":
        process.send_signal(signal.SIGTERM)
    else:
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == (143 if "SIGTERM" in whom else 130), said
    assert "Traceback" not in said
    if whom == "spd-run alone":
        states = [line.split()[2] for line in said[said.index("job  setting") :].splitlines()[2:5]]
        assert states == ["stopped", "stopped", "missing"]
        assert (sweep_in(tmp_path) / "sweep.html").is_file()
    while running(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert status(tmp_path, 2) == {}
    for job in (0, 1):
        found = status(tmp_path, job)
        assert found["status"] == "stopped"
        assert (sweep_in(tmp_path) / str(job) / "checkpoints" / f"step_{found['step']}").is_dir()
        words = [
            f"resume={sweep_in(tmp_path)}/{job}",
            f"train.steps={found['step'] + 3}",
            "train.log_every=100",
        ]
        resumed = begin(*words)
        out, _ = resumed.communicate(timeout=120)
        assert resumed.returncode == 0, out
        assert f"going on from step {found['step']}" in out
        assert status(tmp_path, job)["status"] == "done"


@pytest.mark.slow
def test_when_spd_run_is_killed_its_jobs_save_and_end_and_their_ids_were_written_down(
    begin: Begin, tmp_path: Path
) -> None:
    long = ["train.steps=100000", "train.checkpoint_every=100000", "eval.every=100000", "train.log_every=1"]
    words = ["-m", *PARALLEL, *TROUBLE, "loss.extra.trouble.seconds=0.05", *long, "launcher.jobs=1"]
    process = begin(*words, "seed=0,1")
    deadline = time.monotonic() + 300
    while not list((tmp_path / "work").glob("outputs/sweeps/*/0/metrics.jsonl")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    jobs = json.loads((sweep_in(tmp_path) / "sweep.json").read_text())["jobs"]
    assert Path("/proc", jobs[0]["id"]).exists()
    assert jobs[1]["id"] is None
    process.kill()
    process.communicate(timeout=120)  # its jobs have the same streams
    assert running(tmp_path) == 0
    found = status(tmp_path, 0)
    assert found["status"] == "stopped"
    assert (sweep_in(tmp_path) / "0" / "checkpoints" / f"step_{found['step']}").is_dir()
    assert status(tmp_path, 1) == {}


@pytest.mark.parametrize(
    ("visible", "there", "each", "wanted"),
    [
        (None, 4, 2, [["0", "1"], ["2", "3"]]),
        (None, 4, 1, [["0"], ["1"], ["2"], ["3"]]),
        (None, 3, 2, [["0", "1"], ["2", "0"]]),
        (None, 1, 1, [["0"], ["0"]]),
        (None, 0, 1, [["0"], ["0"]]),
        (None, 4, 0, [[], []]),
        ("2,3", 2, 1, [["2"], ["3"], ["2"]]),
        ("3, GPU-5f,9", 2, 2, [["3", "GPU-5f"], ["3", "GPU-5f"]]),
    ],
)
def test_every_slot_has_gpus_of_its_own_as_long_as_there_are_enough(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, there: int, each: int, wanted: Sequence[list[str]]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: there > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: there)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [list(pool._gpus_of(slot, each)) for slot in range(len(wanted))] == wanted


def test_a_job_sees_the_gpus_that_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    seen: list[str | None] = []

    def outcome(job: RunJob) -> Outcome:
        seen.append(os.environ.get("CUDA_VISIBLE_DEVICES"))
        return Outcome(None, {})

    monkeypatch.setattr(RunJob, "outcome", outcome)
    for gpus in ("2,GPU-5f", "", None):
        RunJob(config={}, run_dir=None, command=[], gpus=gpus)()
    assert seen == ["2,GPU-5f", "", ""]
