"""`resume=<sweep>`: what is left of a sweep is done, what is done is left alone."""

import csv
import hashlib
import json
import os
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from spd_hydra import metrics_log
from spd_hydra.lock import FileLock
from spd_hydra.run import RunError

Call = Callable[..., Any]
WORDS = [
    "debug=smoke", "train.steps=6", "train.log_every=2", "train.checkpoint_every=2", "train.compile=false",
    "model.training.batch_size=64",
]  # fmt: skip
THREE = ["-m", *WORDS, "seed=0,1,2"]


def states(sweep: Path) -> list[str]:
    with (sweep / "sweep.csv").open(newline="") as file:
        return [row["state"] for row in csv.DictReader(file)]


def weights(sweep: Path) -> list[str]:
    paths = [sweep / str(job) / "checkpoints" / "step_6" / "model.safetensors" for job in range(3)]
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


@pytest.fixture
def at_step_4(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """Let something happen once, when the run of a job writes the row of step 4."""
    append_row = metrics_log.append_row

    def happens(job: int, what: Callable[[], None]) -> None:
        left = [what]

        def patched(path: Path, row: dict[str, Any]) -> None:
            append_row(path, row)
            if left and path.parent.name == str(job) and row["step"] == 4:
                left.pop()()

        monkeypatch.setattr(metrics_log, "append_row", patched)

    return happens


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def fails() -> None:
    raise RunError("trouble was asked for")


def test_a_sweep_that_was_interrupted_ends_with_the_same_bits_as_one_that_was_not(
    spd_run: Call, tmp_path: Path, at_step_4: Callable[..., None]
) -> None:
    assert spd_run(*THREE, "hydra.sweep.dir=whole").code == 0
    at_step_4(0, ctrl_c)
    ended = spd_run(*THREE, "hydra.sweep.dir=cut")
    cut = tmp_path / "cut"
    assert (ended.code, states(cut)) == (130, ["stopped", "missing", "missing"])
    line = f"spd-run resume={cut}"
    assert ended.out.splitlines()[-1] == f"  3 jobs not done; go on with: {line}"
    assert line in spd_run("task=sweep_status", "sweep=cut").out
    ended = spd_run(*shlex.split(line)[1:])
    assert ended.code == 0, ended.err
    assert "going on with 3 jobs: 0, 1, 2; 0 done" in ended.out
    assert "going on from step 4" in ended.err + ended.out
    assert states(cut) == ["done"] * 3
    assert weights(cut) == weights(tmp_path / "whole")
    assert [path.name for path in tmp_path.iterdir() if path.name not in {"whole", "cut"}] == []


def test_of_a_sweep_with_a_job_that_failed_this_job_alone_goes_on(
    spd_run: Call, tmp_path: Path, at_step_4: Callable[..., None]
) -> None:
    at_step_4(1, fails)
    ended = spd_run(*THREE, "hydra.sweep.dir=cut")
    cut = tmp_path / "cut"
    assert (ended.code, states(cut)) == (3, ["done", "failed", "done"])
    assert f"  1 job not done; go on with: spd-run resume={cut}\n" in ended.out
    done = {path: path.stat().st_mtime_ns for job in "02" for path in (cut / job).rglob("*")}
    ended = spd_run("resume=cut")
    assert ended.code == 0, ended.err
    assert "going on with 1 job: 1; 2 done" in ended.out
    assert states(cut) == ["done"] * 3
    assert {path: path.stat().st_mtime_ns for path in done} == done
    ended = spd_run("resume=cut")
    assert (ended.code, ended.err) == (0, "")
    assert "all 3 jobs done: nothing left to do" in ended.out
    assert "not done" not in ended.out


@pytest.mark.parametrize("whose", ["the sweep", "its first job"])
def test_a_job_that_somebody_runs_is_left_alone(
    spd_run: Call, tmp_path: Path, at_step_4: Callable[..., None], whose: str
) -> None:
    at_step_4(0, ctrl_c)
    assert spd_run(*THREE, "hydra.sweep.dir=cut").code == 130
    cut = tmp_path / "cut"
    place = cut if whose == "the sweep" else cut / "0"
    if whose != "the sweep":
        status = json.loads((place / "status.json").read_text())
        (place / "status.json").write_text(json.dumps(status | {"status": "running"}))
    lock = FileLock(place / ".lock")
    try:
        shown = spd_run("task=sweep_status", "sweep=cut")
        ended = spd_run("resume=cut")
    finally:
        lock.release()
    if whose == "the sweep":
        assert ended.code == 2
        assert f"resume: the jobs of {cut} are run by process {os.getpid()} on " in ended.err
        assert states(cut) == ["stopped", "pending", "pending"]
        assert "go on with" not in shown.out
    else:
        assert ended.code == 0, ended.err
        assert "left alone, since they wait or run: 1 job 0 (running)" in ended.out
        assert states(cut) == ["running", "done", "done"]


def test_what_was_composed_goes_on_however_files_and_the_working_directory_change(
    spd_run: Call, tmp_path: Path, at_step_4: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = tmp_path / "my_conf" / "loss" / "gentle.yaml"
    preset.parent.mkdir(parents=True)
    text = "defaults: [delta, _self_]\nimportance_minimality: {coeff: %s}\n"
    preset.write_text(text % 1e-3)
    at_step_4(0, ctrl_c)
    words = ["--config-dir", "my_conf", "loss=gentle", "hydra.sweep.dir=cut"]
    assert spd_run("-m", *WORDS, "seed=0,1", *words).code == 130
    preset.write_text(text % 7e-3)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert spd_run("resume=../cut").code == 0
    saved = [yaml.safe_load((tmp_path / "cut" / job / "config.yaml").read_text()) for job in "01"]
    assert [config["loss"]["importance_minimality"]["coeff"] for config in saved] == [1e-3, 1e-3]
    assert [config["seed"] for config in saved] == [0, 1]


@pytest.fixture
def cut(spd_run: Call, tmp_path: Path, at_step_4: Callable[..., None]) -> Path:
    """A sweep of two jobs of which none is done."""
    at_step_4(0, ctrl_c)
    assert spd_run("-m", *WORDS, "seed=0,1", "hydra.sweep.dir=cut").code == 130
    return tmp_path / "cut"


def test_words_that_would_make_it_another_sweep_are_refused(spd_run: Call, cut: Path) -> None:
    for words, message in (
        (["train.steps=9"], f"resume={cut}: a sweep goes on as it was planned, so it takes words of the"),
        (["-m"], f"-m: resume={cut} is a sweep, which has its jobs already; leave it out"),
        (["launcher.jobs=3"], "launcher.jobs: "),
        (["launcher=nowhere"], "launcher: got nowhere; must be one of "),
    ):
        ended = spd_run("resume=cut", *words)
        assert (ended.code, message in ended.err) == (2, True), ended.err
    assert states(cut) == ["stopped", "missing"]


def test_a_sweep_that_says_nothing_of_its_jobs_is_refused_job_by_job(spd_run: Call, cut: Path) -> None:
    (cut / "configs.json").unlink()
    ended = spd_run("resume=cut")
    assert ended.code == 2
    assert f"job 1: resume: {cut} does not say how this job was composed" in ended.err
    assert "job 0" not in ended.err  # it has begun, and says it itself
    (cut / "sweep.json").unlink()
    ended = spd_run("resume=cut")
    assert (ended.code, "resume: cut is no run directory: it holds runs, 0" in ended.err) == (2, True)


def test_a_sweep_from_somebody_else_runs_no_command_and_writes_nothing_outside(
    spd_run: Call, cut: Path, tmp_path: Path
) -> None:
    record = json.loads((cut / "sweep.json").read_text())

    def refused(message: str, *words: str) -> None:
        ended = spd_run("resume=cut", *words)
        assert (ended.code, message in ended.err) == (2, True), ended.err + ended.out

    setup = {"_kind_": "launcher/slurm", "setup": ["touch /tmp/owned"]}
    (cut / "launcher.yaml").write_text(yaml.safe_dump(setup))
    refused("launcher.setup: the sweep had one, which can run any command and is not taken from ")
    for values in ({"partition": "a\ntouch b"}, {"partition": "${oc.env:HOME}"}, {"_kind_": "data/tms"}):
        (cut / "launcher.yaml").write_text(yaml.safe_dump({"_kind_": "launcher/slurm"} | values))
        refused("launcher.yaml is damaged; choose a launcher, e.g. launcher=local")
    (tmp_path / "outside").mkdir()
    (cut / "1").symlink_to(tmp_path / "outside")
    refused(f"job 1: resume: {cut}/1 is a link, which may lead out of the sweep", "launcher=local")
    (cut / "1").unlink()
    record["jobs"][1]["number"] = "../outside"
    (cut / "sweep.json").write_text(json.dumps(record))
    refused("sweep.json is damaged: the number of a job is none", "launcher=local")
    assert list((tmp_path / "outside").iterdir()) == []
