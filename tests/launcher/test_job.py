"""What runs in a process of its own."""

import dataclasses
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spd_hydra.config import RunConfig
from spd_hydra.environment import code_digest
from spd_hydra.launcher import job as module
from spd_hydra.launcher.job import RunJob
from spd_hydra.result import Outcome
from spd_hydra.saved_config import load_config, to_dict, to_yaml
from spd_hydra.section import ConfigError

Toy = Callable[..., RunConfig]
CHANGED = "The code of spd_hydra has changed since this job was submitted"


def made(config: RunConfig, run_dir: Path, **others: Any) -> RunJob:
    return RunJob(config=to_dict(config), run_dir=str(run_dir), command=["spd-run", "seed=3"], **others)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Stands in for the run: how it was called."""
    found: list[dict[str, Any]] = []

    def run(config: RunConfig, **others: Any) -> Outcome:
        found.append({"config": config, "argv": list(sys.argv), **others})
        return Outcome(None, {"steps": 20})

    monkeypatch.setattr(module, "run", run)
    return found


def test_a_job_is_the_same_after_a_way_through_json_and_through_a_pickle(toy: Toy, tmp_path: Path) -> None:
    job = made(toy("seed=3"), tmp_path / "0", saved=to_dict(toy()), code="abc", ranks=2)
    assert RunJob.from_json(job.to_json()) == job
    assert json.loads(job.to_json())["config"]["seed"] == 3
    assert pickle.loads(pickle.dumps(job)) == job  # noqa: S301


def test_a_job_carries_every_value_and_none_of_them_is_a_class_of_ours(toy: Toy, tmp_path: Path) -> None:
    job = made(toy("seed=3", "train.lr=0.125"), tmp_path)
    assert type(job.config["train"]) is dict
    assert job.config["train"]["lr"] == 0.125
    assert "launcher" not in job.config


def test_a_job_begins_with_its_configuration_and_the_command_that_was_typed(
    toy: Toy, tmp_path: Path, calls: list[dict[str, Any]]
) -> None:
    config, before = toy("seed=3"), list(sys.argv)
    assert made(config, tmp_path / "0")() == {"steps": 20}
    assert calls == [
        {"config": config, "argv": ["spd-run", "seed=3"], "run_dir": tmp_path / "0", "saved": None}
    ]
    assert sys.argv == before


def test_a_job_that_finds_its_run_goes_on_with_it(
    toy: Toy, tmp_path: Path, calls: list[dict[str, Any]]
) -> None:
    config = toy("seed=3")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    made(config, tmp_path)()
    assert calls[0]["config"] == dataclasses.replace(config, resume=str(tmp_path))
    assert calls[0].get("saved") is None  # what the directory holds is compared with the job


def test_a_job_that_finds_another_run_in_its_place_is_refused_and_changes_nothing(
    toy: Toy, tmp_path: Path
) -> None:
    made(toy("train.steps=4"), tmp_path / "0")()
    before = {path: path.read_bytes() for path in (tmp_path / "0").rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"would make it another run:\n  seed: 0 → 5"):
        made(toy("train.steps=4", "seed=5"), tmp_path / "0")()
    assert {path: path.read_bytes() for path in (tmp_path / "0").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("is_made", [False, True])  # Hydra's own launcher makes a folder for each job
def test_a_job_that_goes_on_with_a_run_leaves_a_link_to_it_and_does_so_again_after_a_requeue(
    toy: Toy, tmp_path: Path, calls: list[dict[str, Any]], is_made: bool
) -> None:
    if is_made:
        (tmp_path / "sweep" / "0").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    saved = toy("seed=3")
    config = dataclasses.replace(saved, resume=str(tmp_path / "run"))
    job = made(config, tmp_path / "sweep" / "0", saved=to_dict(saved))
    job()
    job()
    for call in calls:
        assert (call["config"], call["saved"], call.get("run_dir")) == (config, saved, None)
    assert (tmp_path / "sweep" / "0").readlink() == tmp_path / "run"


def test_a_job_that_is_queued_again_is_the_same_job(toy: Toy, tmp_path: Path) -> None:
    job = made(toy(), tmp_path)
    assert job.checkpoint().function == job


@pytest.mark.parametrize(("code", "warns"), [("other", True), ("same", False), (None, False)])
def test_a_job_warns_when_the_code_has_changed_and_only_then(
    toy: Toy,
    tmp_path: Path,
    calls: list[dict[str, Any]],
    caplog: pytest.LogCaptureFixture,
    code: str | None,
    warns: bool,
) -> None:
    given = code_digest() if code == "same" else code
    with caplog.at_level(logging.WARNING):
        made(toy(), tmp_path / "0", code=given)()
    assert (CHANGED in caplog.text) is warns
    assert len(calls) == 1


def test_a_job_with_a_configuration_that_is_none_is_refused_before_a_directory_is_made(
    toy: Toy, tmp_path: Path
) -> None:
    job = made(toy(), tmp_path / "0")
    for key, value, text in [
        ("seed", -1, "seed: got -1"),
        ("hydra", {}, "hydra"),
        ("launcher", {}, "launcher"),
    ]:
        with pytest.raises(ConfigError, match=text):
            dataclasses.replace(job, config=job.config | {key: value})()
    assert not (tmp_path / "0").exists()


def test_as_many_threads_as_the_cluster_gave_cpus(
    toy: Toy, tmp_path: Path, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", given.append)
    made(toy(), tmp_path / "0")()
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
    made(toy(), tmp_path / "0")()
    assert given == [3]


@pytest.mark.parametrize(
    ("given", "device", "warned"), [("0", "auto", True), ("0", "cpu", False), (None, "auto", False)]
)
def test_gpus_that_were_given_and_are_not_seen_are_told(
    toy: Toy,
    tmp_path: Path,
    calls: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    given: str | None,
    device: str,
    warned: bool,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("SLURM_JOB_GPUS", raising=False)
    if given is not None:
        monkeypatch.setenv("SLURM_JOB_GPUS", given)
    made(toy(f"device={device}"), tmp_path / "0")()
    assert ("SLURM gave this job GPUs, but torch sees none" in caplog.text) is warned


def start(job: RunJob) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "spd_hydra.launcher.job"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdin is not None
    process.stdin.write(job.to_json().decode())
    process.stdin.close()
    process.stdin = None
    return process


def wait_for(what: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.mark.slow
def test_a_killed_job_goes_on_from_its_checkpoint_and_a_finished_one_does_nothing(
    toy: Toy, tmp_path: Path
) -> None:
    words = ["train.steps=3000", "train.checkpoint_every=100", "train.log_every=100", "eval.every=100000"]
    directory = tmp_path / "0"
    job = made(toy(*words), directory)
    process = start(job)
    wait_for(lambda: (directory / "checkpoints" / "step_200").exists() or process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    newest = max(int(path.name.removeprefix("step_")) for path in (directory / "checkpoints").glob("step_*"))
    out, _ = (process := start(job)).communicate(timeout=240)
    assert process.returncode == 0, out
    assert f"going on from step {newest}\n" in out
    assert json.loads((directory / "status.json").read_text())["status"] == "done"
    assert json.loads((directory / "summary.json").read_text())["steps"] == 3000
    assert load_config(directory / "config.yaml").resume is None
    files = {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.name != ".lock"}
    out, _ = (process := start(job)).communicate(timeout=60)
    assert process.returncode == 0, out
    assert "has finished its 3000 steps: nothing to do" in out
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.name != ".lock"} == files


@pytest.mark.slow
def test_a_job_that_is_asked_to_stop_saves_and_ends_with_the_signal_s_code(toy: Toy, tmp_path: Path) -> None:
    job = made(
        toy("train.steps=100000", "train.log_every=1", "train.checkpoint_every=100000"), tmp_path / "0"
    )
    process = start(job)
    wait_for(lambda: (tmp_path / "0" / "metrics.jsonl").exists() or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, out
    status = json.loads((tmp_path / "0" / "status.json").read_text())
    assert status["status"] == "stopped"
    assert (tmp_path / "0" / "checkpoints" / f"step_{status['step']}").is_dir()
