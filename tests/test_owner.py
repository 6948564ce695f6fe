"""One writer per run directory, also where a cluster started a job again while its first process goes on."""

import errno
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
from tests.ranks import begin, directory_in, ends, rows_of, status_of, wait_until

from spd_hydra import lock
from spd_hydra.checkpoint import save_checkpoint
from spd_hydra.figure.base import draw_all
from spd_hydra.lock import FileLock, LockedError, Owner, TakenOverError
from spd_hydra.metric.evaluation import Evaluation
from spd_hydra.run_dir import RunDirectory, RunDirectoryError, Status
from spd_hydra.trainer import Trainer

Make = Callable[..., Trainer]


def content(path: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Let this process be the n-th start of a job."""
    monkeypatch.setattr(lock, "_WAIT_SECONDS", 0.2)

    def be(job: str, number: int) -> None:
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(number))

    return be


def test_only_a_later_start_of_the_same_job_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    alone, also_alone = Owner.here(), Owner.here()
    assert alone.token != also_alone.token
    assert not also_alone.follows(alone)
    one = Owner("a", "/7", 1)
    assert Owner("b", "/7", 2).follows(one)
    assert not Owner("b", "/7", 1).follows(one)
    assert not Owner("b", "/8", 2).follows(one)
    assert not Owner("b", "/7", 2).follows(None)
    assert not Owner("b", "/7", 2).follows(alone)


def test_the_job_of_an_array_is_its_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "10")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    assert (Owner.here().job, Owner.here().start) == ("/10_2", 3)


def test_a_writer_that_was_followed_publishes_nothing(
    make: Make, start: Callable[[str, int], None], caplog: pytest.LogCaptureFixture
) -> None:
    start("7", 0)
    trainer = make("train.checkpoint_every=3")
    stale = trainer.run
    stale.write_config("seed: 1\n")
    trainer.train_step()
    trainer.save()
    start("7", 1)
    with RunDirectory.open(stale.path) as new:
        assert "taking over" in caplog.text
        new.write_status(Status.running, 1)
        before = content(stale.path)
        evaluation = Evaluation(step=1, n_positions=1, ci_threshold=0.1, metrics={}, sites={})
        checkpoints, guard = stale.checkpoints, stale.require_ownership
        attempts: list[Callable[[], object]] = [
            lambda: stale.append_metrics(2, "train", {"loss/total": 1.0}),
            lambda: stale.truncate_metrics(0),
            lambda: stale.write_status(Status.failed, 2),
            lambda: stale.write_summary({}),
            lambda: stale.write_config("seed: 2\n"),
            lambda: stale.write_environment({}),
            lambda: save_checkpoint(checkpoints, 2, {}, {}, 1, guard),
            lambda: draw_all(evaluation, [], stale.figures, guard),
            trainer.save,
        ]
        for attempt in attempts:
            with pytest.raises(RunDirectoryError, match=rf"was taken over by process {os.getpid()} on"):
                attempt()
        assert RunDirectory.follow(stale.path, stale.token).write_rank_error(1, "trace") is None
        assert content(stale.path) == before
        assert not stale.figures.exists()
        new.append_metrics(2, "train", {"loss/total": 1.0})


@pytest.mark.parametrize(("job", "number"), [("7", 0), ("7", 1), ("8", 2)])
def test_nobody_else_takes_a_directory_over(
    start: Callable[[str, int], None], tmp_path: Path, job: str, number: int
) -> None:
    start("7", 1)
    with RunDirectory.create(tmp_path, "a") as directory:
        directory.write_config("seed: 1\n")
        start(job, number)
        began = time.monotonic()
        with pytest.raises(RunDirectoryError, match="is being written by process"):
            RunDirectory.open(directory.path)
        assert time.monotonic() - began < 5
        directory.write_status(Status.running, 1)


def test_whoever_took_over_holds_the_lock_once_the_other_has_ended(
    start: Callable[[str, int], None], tmp_path: Path
) -> None:
    start("7", 0)
    stale = FileLock(tmp_path / ".lock")
    start("7", 1)
    new = FileLock(tmp_path / ".lock")
    stale.release()
    assert not FileLock.is_held(tmp_path / ".lock")
    new.require_ours()
    assert FileLock.is_held(tmp_path / ".lock")
    new.release()


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS without its lock daemon."""
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))


def signed(path: Path, **holder: object) -> None:
    """A lock file that another process has signed."""
    before = {"pid": 1, "host": "elsewhere", "since": "now", "token": "other", "job": None, "start": 0}
    path.write_text(json.dumps(before | holder))


@pytest.mark.usefixtures("without_locks")
def test_where_locks_do_not_work_a_second_opener_is_refused_until_the_first_has_signed_off(
    tmp_path: Path,
) -> None:
    first = RunDirectory.create(tmp_path, "a")
    first.write_config("seed: 1\n")
    assert first.is_being_written() is None
    with pytest.raises(RunDirectoryError, match=rf"is being written by process {os.getpid()} on .* remove "):
        RunDirectory.open(first.path)
    first.write_status(Status.running, 1)
    first.close()
    assert first.is_being_written() is False
    RunDirectory.open(first.path).close()


@pytest.mark.usefixtures("without_locks")
@pytest.mark.parametrize(
    ("host", "silent", "is_refused"),
    [("elsewhere", 0, True), ("elsewhere", 7200, False), (socket.gethostname(), 0, False)],
)
def test_where_locks_do_not_work_a_run_that_was_killed_can_be_opened_again(
    tmp_path: Path, host: str, silent: float, is_refused: bool
) -> None:
    """At once on its own machine, where its process is known to be gone; on another after a long silence."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    path = tmp_path / ".lock"
    signed(path, host=host, pid=ended.pid)
    os.utime(path, (time.time() - silent, time.time() - silent))
    if is_refused:
        with pytest.raises(
            LockedError, match=rf"process {ended.pid} on elsewhere since now.*remove {path}\)$"
        ):
            FileLock(path)
        path.unlink()
    lock_of_ours = FileLock(path)
    lock_of_ours.require_ours()
    lock_of_ours.release()


@pytest.mark.usefixtures("without_locks")
def test_where_locks_do_not_work_an_owner_that_writes_is_never_silent(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    held = FileLock(path)
    os.utime(path, (0, 0))
    held.require_ours()
    assert time.time() - path.stat().st_mtime < 60
    held.release()


@pytest.mark.usefixtures("without_locks")
def test_where_locks_do_not_work_a_later_start_of_the_job_takes_over_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / ".lock"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    stale = FileLock(path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    began = time.monotonic()
    new = FileLock(path)
    assert time.monotonic() - began < 5
    with pytest.raises(TakenOverError, match="a later start of the same job"):
        stale.require_ours()
    stale.release()  # signs nothing off that is no longer its own
    new.require_ours()
    new.release()


@pytest.mark.usefixtures("without_locks")
def test_whoever_lost_its_directory_to_another_run_is_told_so(tmp_path: Path) -> None:
    lost = FileLock(tmp_path / ".lock")
    signed(tmp_path / ".lock")
    with pytest.raises(
        TakenOverError, match=r"^process 1 on elsewhere .*which opened it too, where locks do not"
    ):
        lost.require_ours()
    lost.release()


@pytest.mark.slow
def test_a_run_whose_job_was_started_again_ends_and_leaves_the_directory_alone(
    tmp_path: Path, target_cache: Path
) -> None:
    words = ["debug=smoke", f"cache_dir={target_cache}", "train.checkpoint_every=50", "train.log_every=1"]
    job = {"SLURM_JOB_ID": "7"}
    old = begin(tmp_path, [*words, "train.steps=100000", "eval.every=100000"], size=1, **job)
    wait_until(lambda: list(tmp_path.glob("outputs/*/*/checkpoints/step_*/manifest.json")), old)
    directory = directory_in(tmp_path)
    (again,) = ends(begin(tmp_path, [f"resume={directory}"], size=1, **job), timeout=30)
    assert again.code == 1
    assert "is being written by process" in again.err
    new = begin(tmp_path, [f"resume={directory}"], size=1, SLURM_RESTART_COUNT="1", **job)
    (ended,) = ends(old, timeout=60)
    assert ended.code == 1
    assert "was taken over by process" in ended.err
    pid = new[0].pid
    wait_until(lambda: status_of(directory)["pid"] == pid and status_of(directory)["step"] > 0, new)
    steps = [row["step"] for row in rows_of(directory) if row["split"] == "train"]
    assert steps == list(range(1, len(steps) + 1)), "no row of the first process among those of the second"
    new[0].terminate()
    (stopped,) = ends(new)
    assert stopped.code == 143
    shutil.rmtree(directory)
