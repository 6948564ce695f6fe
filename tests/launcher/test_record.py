"""sweep.json, and the folder that jobs unpickle from."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from spd_hydra.launcher.record import SweepJob, SweepRecord, log_paths, new_sweep_directory, submission_folder
from spd_hydra.section import ConfigError


def job(number: int, id: str | None = None) -> SweepJob:
    return SweepJob(
        number=number, overrides=[f"seed={number}"], experiment="tms_5-2", seed=number, steps=20, id=id
    )


def record(*jobs: SweepJob) -> SweepRecord:
    return SweepRecord(launcher="slurm", ranks=2, command="spd-run -m", code="abc", jobs=list(jobs))


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = record(job(0, "5_0"), job(1))
    written.write(tmp_path)
    assert SweepRecord.read(tmp_path) == written
    assert json.loads((tmp_path / "sweep.json").read_text())["jobs"][0] == {
        "number": 0, "overrides": ["seed=0"], "experiment": "tms_5-2", "seed": 0, "steps": 20, "id": "5_0",
        "launcher": None, "said_before": None,
    }  # fmt: skip


def test_jobs_take_the_place_of_those_with_their_number(tmp_path: Path) -> None:
    found = record(job(2), job(0)).with_jobs([job(1), job(2, "9")])
    assert [(item.number, item.id) for item in found.jobs] == [(0, None), (1, None), (2, "9")]


def test_jobs_that_go_on_elsewhere_say_so_and_the_others_keep_who_started_them() -> None:
    later = SweepRecord(launcher="local", ranks=1, command="spd-run resume=x", code="new", jobs=[job(1)])
    found = record(job(0, "5_0"), job(1, "5_1")).followed_by(later)
    assert (found.launcher, found.command) == ("local", "spd-run -m")
    assert [(item.id, found.launcher_of(item)) for item in found.jobs] == [("5_0", "slurm"), (None, "local")]


DAMAGED: dict[str, Any] = {
    "nothing": b"",
    "half": b'{"launcher": "slurm", "jo',
    "no text": b"\xff\xfe\x00",
    "a list": b"[]",
    "a word": b'"sweep"',
    "no jobs": b'{"launcher": "slurm", "ranks": 1, "command": "", "code": ""}',
    "jobs that are none": b'{"launcher": "slurm", "ranks": 1, "command": "", "code": "", "jobs": [5]}',
    "a job without a number": (
        b'{"launcher": "slurm", "ranks": 1, "command": "", "code": "", "jobs": [{"seed": 1}]}'
    ),
    "a job whose number is a path": (
        b'{"launcher": "slurm", "ranks": 1, "command": "", "code": "", "jobs": [{"number": "../0", '
        b'"overrides": [], "experiment": "a", "seed": 0, "steps": 1}]}'
    ),
    "an unknown key": b'{"launcher": "slurm", "ranks": 1, "command": "", "code": "", "jobs": [], "x": 1}',
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_record_is_told_with_its_path(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "sweep.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"sweep\.json is damaged: ") as caught:
        SweepRecord.read(tmp_path)
    assert str(caught.value).startswith(f"sweep: {tmp_path / 'sweep.json'}")


def test_a_directory_without_a_record_and_a_file_are_no_sweep(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        SweepRecord.read(tmp_path)
    assert str(caught.value) == (f"sweep: {tmp_path} is no directory of a sweep: it holds no sweep.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"sweep\.json cannot be read: Not a directory"):
        SweepRecord.read(tmp_path / "file")


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o777])
def test_only_its_owner_may_enter_the_folder_that_jobs_unpickle_from(tmp_path: Path, mask: int) -> None:
    before = os.umask(0o022)
    try:
        (tmp_path / "sweep").mkdir()
        os.umask(mask)
        folder = submission_folder(tmp_path / "sweep")
    finally:
        os.umask(before)
    assert folder == tmp_path / "sweep" / ".submitit"
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_others_could_enter_is_closed(tmp_path: Path) -> None:
    (tmp_path / ".submitit").mkdir(mode=0o777)
    (tmp_path / ".submitit").chmod(0o777)
    assert submission_folder(tmp_path).stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("target", ["there", "nowhere", "file"])
def test_a_link_or_a_file_in_its_place_is_refused(tmp_path: Path, target: str) -> None:
    (tmp_path / "there").mkdir(mode=0o755)
    (tmp_path / "sweep").mkdir()
    if target == "file":
        (tmp_path / "sweep" / ".submitit").write_text("")
    else:
        (tmp_path / "sweep" / ".submitit").symlink_to(tmp_path / target)
    with pytest.raises(ConfigError, match=r"\.submitit is a link, a file, or belongs to somebody else"):
        submission_folder(tmp_path / "sweep")
    assert (tmp_path / "there").stat().st_mode & 0o777 == 0o755
    assert not (tmp_path / "nowhere").exists()


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".submitit").mkdir(mode=0o755)
    monkeypatch.setattr(os, "getuid", lambda: (tmp_path / ".submitit").stat().st_uid + 1)
    with pytest.raises(ConfigError, match="belongs to somebody else; choose another out_dir"):
        submission_folder(tmp_path)
    assert (tmp_path / ".submitit").stat().st_mode & 0o777 == 0o755


def test_logs_lie_where_submitit_writes_them() -> None:
    out, err = log_paths(Path("/s/.submitit"), "5_1", rank=2)
    assert (str(out), str(err)) == ("/s/.submitit/5_1_2_log.out", "/s/.submitit/5_1_2_log.err")


def test_two_sweeps_never_share_a_directory(tmp_path: Path) -> None:
    names = {new_sweep_directory(str(tmp_path)) for _ in range(50)}
    assert len(names) == 50
    assert {path.parent for path in names} == {tmp_path / "sweeps"}
