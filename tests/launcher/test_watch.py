"""How a job stands, from what its directory and the scheduler say."""

import contextlib
import dataclasses
import errno
import io
import json
import os
import shlex
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml

from spd_hydra.command_word import command_word
from spd_hydra.composition import compose
from spd_hydra.launcher import watch
from spd_hydra.launcher.record import SweepJob, SweepRecord
from spd_hydra.launcher.slurm import SchedulerState
from spd_hydra.launcher.start import follow_up_lines
from spd_hydra.launcher_config import Slurm
from spd_hydra.report.sweep import SweepRow
from spd_hydra.run_dir import RunDirectory
from spd_hydra.saved_config import to_dict

SUMMARY = {"experiment": "toy", "seed": 3, "steps": 20, "solved": True, "objective": 0.25}
LEFT: dict[str, dict[str, Any] | None] = {
    "nothing": None,
    "running": {"status": "running", "step": 5},
    "stopped": {"status": "stopped", "step": 7, "error": "stopped by SIGUSR2, saved at step 7"},
    "failed": {"status": "failed", "step": 4, "error": "RuntimeError: oh", "traceback": "Trace\n  line\n"},
    "done": {"status": "done", "step": 20},
}

# What the directory says, what the scheduler says: how the job stands, and a piece of the reason.
TABLE: list[tuple[str, str | None, str, str | None]] = [
    ("nothing", "PENDING", "pending", None),
    ("nothing", "CONFIGURING", "pending", None),
    ("nothing", "RUNNING", "running", None),  # Python is still being started
    ("nothing", "COMPLETING", "running", None),
    ("nothing", "COMPLETED 0", "failed", "ended before it began (COMPLETED 0); log: "),
    ("nothing", "FAILED 1", "failed", "ended before it began (FAILED 1); log: "),
    ("nothing", "CANCELLED", "failed", "ended before it began (CANCELLED); log: "),
    ("nothing", "forgotten", "failed", "ended before it began (unknown to the scheduler); log: "),
    ("nothing", None, "pending", None),
    ("running", "PENDING", "requeued", None),
    ("running", "REQUEUED", "requeued", None),
    ("running", "REQUEUE_HOLD", "requeued", None),
    ("running", "RUNNING", "running", None),
    ("running", "SUSPENDED", "running", None),
    ("running", "COMPLETING", "running", None),
    ("running", "COMPLETED 0", "failed", "ended without a word (COMPLETED 0); log: "),
    ("running", "FAILED 9", "failed", "ended without a word (FAILED 9); log: "),
    ("running", "NODE_FAIL", "failed", "ended without a word (NODE_FAIL); log: "),
    ("running", "OUT_OF_MEMORY 0:125", "failed", "ended without a word (OUT_OF_MEMORY 0:125); log: "),
    ("running", "CANCELLED 0:15", "failed", "ended without a word (CANCELLED 0:15); log: "),
    ("running", "TIMEOUT", "failed", "ended without a word (TIMEOUT); log: "),
    ("running", "forgotten", "failed", "ended without a word (unknown to the scheduler); log: "),
    ("running", None, "running", None),
    ("stopped", "PENDING", "requeued", None),
    ("stopped", "RUNNING", "running", None),  # started again, and has not written yet
    ("stopped", "COMPLETING", "running", None),
    ("stopped", "COMPLETED 0", "failed", "stopped by SIGUSR2, saved at step 7; go on with spd-run resume="),
    ("stopped", "FAILED 1", "failed", "stopped by SIGUSR2, saved at step 7; go on with spd-run resume="),
    ("stopped", "forgotten", "failed", "stopped by SIGUSR2, saved at step 7; go on with spd-run resume="),
    ("stopped", None, "stopped", "stopped by SIGUSR2, saved at step 7"),
    ("failed", "PENDING", "requeued", None),
    ("failed", "RUNNING", "failed", "RuntimeError: oh"),
    ("failed", "COMPLETING", "failed", "RuntimeError: oh"),
    ("failed", "FAILED 1", "failed", "RuntimeError: oh (FAILED 1)"),
    ("failed", "COMPLETED 0", "failed", "RuntimeError: oh (COMPLETED 0)"),
    ("failed", "forgotten", "failed", "RuntimeError: oh (unknown to the scheduler)"),
    ("failed", None, "failed", "RuntimeError: oh"),
    ("done", "PENDING", "done", None),
    ("done", "RUNNING", "done", None),
    ("done", "COMPLETED 0", "done", None),
    ("done", "FAILED 1", "done", None),
    ("done", "CANCELLED", "done", None),
    ("done", "forgotten", "done", None),
    ("done", None, "done", None),
]


def leave(sweep: Path, job: int, left: str) -> None:
    """What a run leaves in its directory."""
    status = LEFT[left]
    if status is None:
        return
    directory = sweep / str(job)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text("name: toy\n")
    (directory / "status.json").write_text(json.dumps(status))
    rows = [
        {"step": 1, "split": "train", "loss/total": 2.0},
        {"step": 5, "split": "train", "loss/total": 0.5},
    ]
    (directory / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9, "sp'
    )
    if left == "done":
        (directory / "summary.json").write_text(json.dumps(SUMMARY))


def record(*ids: str | None, launcher: str = "slurm") -> SweepRecord:
    jobs = [
        SweepJob(number=number, overrides=["seed=3"], experiment="toy", seed=3, steps=20, id=id)
        for number, id in enumerate(ids)
    ]
    return SweepRecord(launcher=launcher, ranks=1, command="", code="", jobs=jobs)


def said(text: str | None) -> watch.States:
    if text is None:
        return None
    name, _, code = text.partition(" ")
    return {} if text == "forgotten" else {0: SchedulerState(name=name, exit_code=code)}


def test_the_commands_of_a_sweep_can_be_pasted_whatever_its_directory_is_called(tmp_path: Path) -> None:
    sweep_dir = tmp_path / "ü (1), it's = #2"
    leave(sweep_dir, 0, "stopped")
    (row,) = watch.look(sweep_dir, record("17"), said("FAILED 1"))
    resume = command_word("resume", sweep_dir / "0")
    assert f"go on with spd-run {resume} launcher=slurm (FAILED 1)" in row.reason
    assert follow_up_lines(record("17"), sweep_dir)[0].endswith(f" {command_word('sweep', sweep_dir)}")


def test_the_command_to_go_on_with_asks_for_the_job_as_it_was(tmp_path: Path) -> None:
    asked = Slurm(partition="gpu", gpus=2, setup=["module load cuda"], additional={"reservation": "mine"})
    (tmp_path / "launcher.yaml").write_text(yaml.safe_dump(to_dict(asked)))
    leave(tmp_path, 0, "stopped")
    (row,) = watch.look(tmp_path, record("17"), said("FAILED 1"))
    command = row.reason.partition("go on with ")[2].removesuffix(" (FAILED 1)")
    program, resume, *words = shlex.split(command)
    assert (program, resume) == ("spd-run", f"resume={tmp_path}/0")
    assert words[0] == "launcher=slurm"
    assert compose(words).launcher == asked


@pytest.mark.parametrize(("left", "scheduler", "state", "reason"), TABLE)
def test_a_job_stands_as_its_directory_and_the_scheduler_say_together(
    tmp_path: Path, left: str, scheduler: str | None, state: str, reason: str | None
) -> None:
    leave(tmp_path, 0, left)
    (row,) = watch.look(tmp_path, record("17"), said(scheduler))
    assert row.state == state
    assert (row.error is None) == (reason is None)
    if reason is not None:
        assert reason in row.reason
    if "log: " in (reason or ""):
        assert row.reason.endswith(f"log: {tmp_path}/.submitit/17_0_log.err")
    if "resume=" in (reason or ""):
        assert f"resume={tmp_path}/0" in row.reason
    assert (row.id, row.steps, row.seed) == ("17", 20, 3)
    if left != "nothing":
        assert (row.step, row.loss) == (5, 0.5)  # the newest whole row
    assert (row.traceback is not None) == (left == "failed")


def test_the_table_has_every_combination() -> None:
    scheduler = {"PENDING", "RUNNING", "COMPLETING", "COMPLETED 0", "forgotten", None}
    assert {(left, word) for left, word, *_ in TABLE} >= {
        (left, word) for left in LEFT for word in scheduler if (left, word) != ("done", "COMPLETING")
    }


def test_looking_changes_nothing(tmp_path: Path) -> None:
    leave(tmp_path, 0, "running")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    watch.look(tmp_path, record("17", "18"), {})
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_job_in_this_process_is_running_as_long_as_somebody_writes_to_it(tmp_path: Path) -> None:
    with RunDirectory.at(tmp_path / "0"):
        leave(tmp_path, 0, "running")
        (row,) = watch.look(tmp_path, record(None, launcher="local"), None)
        assert (row.state, row.error) == ("running", None)
    (row,) = watch.look(tmp_path, record(None, launcher="local"), None)
    assert (row.state, row.error) == ("failed", "ended without a word: nobody writes to it any more")


@pytest.mark.parametrize(("host", "state"), [("elsewhere", "running"), (socket.gethostname(), "failed")])
def test_where_locks_do_not_work_a_job_counts_as_running_unless_its_process_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, state: str
) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    leave(tmp_path, 0, "running")
    (tmp_path / "0" / ".lock").write_text(json.dumps({"host": host, "pid": ended.pid, "token": "t"}))
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    (row,) = watch.look(tmp_path, record(None, launcher="local"), None)
    assert row.state == state
    told = "cannot be told where locks do not work" if state == "running" else "nobody writes to it any more"
    assert told in row.reason


def test_a_sweep_in_this_process_shows_jobs_that_were_not_planned_and_others_do_not(tmp_path: Path) -> None:
    leave(tmp_path, 0, "done")
    leave(tmp_path, 4, "done")
    assert [row.job for row in watch.look(tmp_path, record(None, launcher="local"), None)] == [0, 4]
    assert [row.job for row in watch.look(tmp_path, record("17"), None)] == [0]


def follow(sweep: Path, *answers: str | None, record: SweepRecord) -> tuple[list[str], list[list[str]]]:
    """States at the end, and at every look."""
    shown: list[list[str]] = []
    told = iter(answers)
    rows = watch.wait(
        sweep,
        lambda: record,
        lambda: said(next(told)),
        0.0,
        lambda rows: shown.append([row.state for row in rows]),
    )
    with contextlib.suppress(StopIteration):
        next(told)
        raise AssertionError("stopped looking too early")
    return [row.state for row in rows], shown


def test_an_end_without_words_is_believed_at_the_second_look(tmp_path: Path) -> None:
    leave(tmp_path, 0, "running")
    states, shown = follow(tmp_path, "RUNNING", "COMPLETED 0", "COMPLETED 0", record=record("1"))
    assert (states, shown) == (["failed"], [["running"], ["running"], ["failed"]])


def test_a_job_that_stopped_is_not_over_while_the_scheduler_is_silent(tmp_path: Path) -> None:
    leave(tmp_path, 0, "stopped")
    states, shown = follow(tmp_path, None, None, "PENDING", "FAILED 1", "FAILED 1", record=record("1"))
    assert states == ["failed"]
    assert shown == [["stopped"], ["stopped"], ["requeued"], ["running"], ["failed"]]


def test_jobs_that_are_done_need_no_scheduler(tmp_path: Path) -> None:
    leave(tmp_path, 0, "done")
    assert follow(tmp_path, None, record=record("1"))[0] == ["done"]


def row(job: int, state: str = "running", **values: Any) -> SweepRow:
    return SweepRow(job=job, state=state, **values)


def test_a_job_that_waits_in_vain_is_shown_with_the_reason_and_what_to_do(tmp_path: Path) -> None:
    states = {
        0: SchedulerState(name="PENDING", reason="PartitionTimeLimit"),
        1: SchedulerState(name="PENDING"),
    }
    rows = watch.look(tmp_path, record("7_0", "7_1"), states)
    assert [(row.state, row.waits_for) for row in rows] == [
        ("pending", "PartitionTimeLimit"),
        ("pending", None),
    ]
    assert "pending (PartitionTimeLimit)" in watch.live_table(rows)[2]
    assert watch.counts(rows) == "1 pending (PartitionTimeLimit), 1 pending"
    assert watch.hints(rows) == [
        "PartitionTimeLimit: that is less than asked for; cancel, and ask for less with launcher.time="
    ]
    assert watch.hints(rows[1:]) == []


def test_of_several_replicas_the_one_that_has_come_least_far_is_shown(tmp_path: Path) -> None:
    for replica, steps in ((0, [100, 200]), (1, [100])):
        folder = tmp_path / "0" / str(replica)
        folder.mkdir(parents=True)
        lines = [json.dumps({"step": step, "loss/total": 1 / step}) for step in steps]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (row,) = watch.look(tmp_path, record("7"), {0: SchedulerState(name="RUNNING")})
    assert (row.state, row.step, row.loss) == ("running", 100, 0.01)


def test_a_job_that_chooses_among_initialisations_shows_how_far_these_are(tmp_path: Path) -> None:
    for steps in (300, 600):
        (tmp_path / "0" / "restarts" / f"step_{steps}").mkdir(parents=True)
    (row,) = watch.look(tmp_path, record("7"), {0: SchedulerState(name="RUNNING")})
    assert (row.state, row.step, row.choice_steps) == ("running", None, 600)
    assert "choice 600" in watch.live_table([row])[2]
    (tmp_path / "0" / "metrics.jsonl").write_text(json.dumps({"step": 100, "loss/total": 0.5}) + "\n")
    (row,) = watch.look(tmp_path, record("7"), {0: SchedulerState(name="RUNNING")})
    assert (row.step, row.choice_steps) == (100, None)


def test_the_live_table_shows_id_state_step_loss_and_verdict() -> None:
    rows = [
        row(0, "done", id="5_0", step=20_000, steps=20_000, loss=0.25, solved=True),
        row(1, id="5_1", step=1_500, steps=20_000, loss=1.5),
        row(10, "pending"),
    ]
    lines = [line.split() for line in watch.live_table(rows)]
    assert lines[0] == ["job", "id", "state", "step", "loss", "verdict"]
    assert lines[-3] == ["0", "5_0", "done", "20,000/20,000", "0.2500", "solved"]
    assert lines[-2] == ["1", "5_1", "running", "1,500/20,000", "1.5000", "–"]
    assert lines[-1] == ["10", "–", "pending", "–", "–", "–"]
    assert watch.counts(rows) == "1 done, 1 running, 1 pending"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@contextlib.contextmanager
def screen(columns: int, lines: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", str(lines))
    yield Terminal()


def drawn(text: str) -> list[str]:
    """What a terminal shows that knows `up n lines and clear below`."""
    found: list[str] = []
    for piece in text.split("\x1b[J"):
        body, escape, up = piece.partition("\x1b[")
        found += body.split("\n")[:-1]
        if escape:
            found = found[: len(found) - int(up.rstrip("F"))]
    return found


def test_on_a_terminal_the_table_is_drawn_in_its_own_place_and_is_gone_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "time", type("Clock", (), {"sleep": lambda s: None, "monotonic": lambda: 0.0}))
    leave(tmp_path, 0, "running")
    told = iter(["PENDING", "RUNNING", "COMPLETED 0", "COMPLETED 0"])
    with screen(100, 40, monkeypatch) as terminal:
        watch.follow(tmp_path, lambda: record("1"), lambda: said(next(told)), 0.0, terminal)
    assert terminal.getvalue().count("requeued") == 1
    assert drawn(terminal.getvalue()) == []


def test_more_jobs_than_lines_are_cut_to_one_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    states = {3: "failed", 30: "running", 31: "running", 40: "requeued"}
    rows = [row(job, states.get(job, "done" if job < 30 else "pending"), id="x" * 200) for job in range(100)]
    lines = watch._fitting(rows, os.terminal_size((60, 12)))
    assert len(lines) < 12
    assert all(len(line) < 60 for line in lines)
    shown = [line.split()[0] for line in lines if line.split() and line.split()[0].isdigit()]
    assert {"3", "30", "31", "40"} <= set(shown)
    assert shown == sorted(shown, key=int)
    assert lines[-1].startswith("  … and 93 more; all together: 29 done, 1 failed")


def test_without_a_terminal_a_line_comes_with_every_change(tmp_path: Path) -> None:
    leave(tmp_path, 0, "running")
    told = iter(["PENDING", "RUNNING", "RUNNING", "RUNNING", "COMPLETED 0", "COMPLETED 0"])
    log = io.StringIO()
    watch.follow(tmp_path, lambda: record("1"), lambda: said(next(told)), 0.0, log)
    assert log.getvalue().splitlines() == [
        "jobs: 1 requeued",
        "jobs: 1 running; job 0 5/20",
        "jobs: 1 failed",
    ]


def test_of_a_traceback_the_end_is_shown_and_only_of_jobs_that_failed() -> None:
    long = "\n".join(f"line {number}" for number in range(100))
    rows = [row(0, "failed", traceback=long), row(1, "done", traceback="x"), row(2, "failed")]
    (text,) = watch.traces(rows)
    lines = text.splitlines()
    assert lines[:2] == ["  job 0:", "      …"]
    assert lines[2:] == [f"    line {number}" for number in range(75, 100)]
    (whole,) = watch.traces([row(4, "failed", traceback="one\ntwo\n")])
    assert whole == "  job 4:\n    one\n    two"


def test_a_job_on_this_machine_that_was_killed_with_spd_run_is_no_longer_running(tmp_path: Path) -> None:
    leave(tmp_path, 0, "running")
    (row,) = watch.look(tmp_path, record("4711", launcher="local_parallel"), None)
    assert (row.state, row.error) == ("failed", "ended without a word: nobody writes to it any more")


@pytest.mark.parametrize("left", ["done", "stopped", "failed", "running"])
@pytest.mark.parametrize(
    ("scheduler", "state"), [("PENDING", "pending"), ("RUNNING", "running"), (None, "pending")]
)
def test_a_run_that_goes_on_is_not_judged_by_what_it_said_before(
    tmp_path: Path, left: str, scheduler: str | None, state: str
) -> None:
    leave(tmp_path / "elsewhere", 7, left)
    path = tmp_path / "elsewhere" / "7" / "status.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"updated": "2020-01-01T00:00:00+00:00"}))
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "0").symlink_to(tmp_path / "elsewhere" / "7")
    (row,) = watch.look(tmp_path / "sweep", record("17"), said(scheduler))
    assert (row.state, row.error) == (state, None)
    (row,) = watch.look(tmp_path / "sweep", record("17"), said("FAILED 1"))
    assert row.state == ("done" if left == "done" else "failed")  # it had nothing to do
    path.write_text(json.dumps(json.loads(path.read_text()) | {"updated": "2120-01-01T00:00:00+00:00"}))
    (row,) = watch.look(tmp_path / "sweep", record("17"), said("COMPLETED 0"))
    assert row.state == ("done" if left == "done" else "failed")


@pytest.mark.parametrize("left", ["stopped", "failed", "running"])
def test_a_job_that_was_started_again_in_its_directory_is_not_judged_by_what_it_said_before(
    tmp_path: Path, left: str
) -> None:
    leave(tmp_path, 0, left)
    path = tmp_path / "0" / "status.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"updated": "2020-01-01T00:00:00+00:00"}))
    (job,) = record("17").jobs
    again = dataclasses.replace(job, said_before="2020-01-01T00:00:00+00:00")
    now = dataclasses.replace(record("17"), jobs=[again])
    for scheduler, state in (("PENDING", "pending"), ("RUNNING", "running"), (None, "pending")):
        (row,) = watch.look(tmp_path, now, said(scheduler))
        assert (row.state, row.error) == (state, None)
    (row,) = watch.look(tmp_path, now, said("FAILED 1"))
    assert (row.state, str(row.error).partition(";")[0]) == ("failed", "ended before it began (FAILED 1)")
    # What it says anew counts, also where the clock of its machine is behind.
    new = {"status": "failed", "error": "RuntimeError: oh", "updated": "2019-12-31T23:59:59+00:00"}
    path.write_text(json.dumps(json.loads(path.read_text()) | new))
    (row,) = watch.look(tmp_path, now, said("FAILED 1"))
    assert (row.state, row.error) == ("failed", "RuntimeError: oh")


def test_in_a_sweep_that_went_on_elsewhere_the_scheduler_is_asked_of_its_own_jobs_alone(
    tmp_path: Path,
) -> None:
    leave(tmp_path, 1, "failed")
    jobs = record("17", "18").jobs
    here = dataclasses.replace(jobs[1], id=None, launcher="local")
    found = watch.look(tmp_path, dataclasses.replace(record("17"), jobs=[jobs[0], here]), said("PENDING"))
    assert [(row.state, row.error) for row in found] == [("pending", None), ("failed", "RuntimeError: oh")]
