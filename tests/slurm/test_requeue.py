"""What a cluster does to a job that goes on: time runs out, others come first, nodes and processes die."""

import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

pytestmark = pytest.mark.slow

Cluster = Any
STEPS = 120
EVERY = 40
# Long enough to be hit in the middle: every step sleeps.
LONG = [
    f"train.steps={STEPS}", f"train.checkpoint_every={EVERY}", "train.log_every=1", "eval.every=1000",
    "+loss_term@loss.extra.trouble=trouble_schema", "loss.extra.trouble.coeff=1",
    "loss.extra.trouble.seconds=0.05",
]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(slurm: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run without a disturbance, in a process of its own: its directory."""
    import shutil
    import subprocess

    folder = tmp_path_factory.mktemp("undisturbed")
    shutil.copy(Path(__file__).with_name("trouble.py"), folder)
    (folder / "trouble-1.dist-info").mkdir()
    (folder / "trouble-1.dist-info" / "METADATA").write_text("Name: trouble\nVersion: 1\n")
    (folder / "trouble-1.dist-info" / "entry_points.txt").write_text(
        "[spd_hydra.plugins]\ntrouble = trouble\n"
    )
    quick = [word for word in LONG if "seconds" not in word]
    spd_run = Path(sys.executable).with_name("spd-run")
    environment = slurm | {"PYTHONPATH": str(folder), "PATH": os.environ["PATH"]}
    subprocess.run([spd_run, "debug=smoke", *quick], cwd=folder, env=environment, check=True)
    (directory,) = folder.glob("outputs/tms_5-2/*")
    return directory


def weights(run: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted((run / "checkpoints" / f"step_{STEPS}").glob("*.safetensors")):
        found |= {f"{file.stem}/{name}": value for name, value in safetensors.torch.load_file(file).items()}
    return found


def rows(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text().splitlines()


def assert_undisturbed(run: Path, undisturbed: Path) -> None:
    """Bit by bit: weights, the optimiser's moments, every row of the metrics."""
    wanted, found = weights(undisturbed), weights(run)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert rows(run) == rows(undisturbed)


def resumed_at(cluster: Cluster, id: str) -> list[int]:
    return [int(step) for step in re.findall(r"going on from step (\d+)", cluster.log(id))]


def at_step(cluster: Cluster, step: int) -> Callable[[], bool]:
    def reached() -> bool:
        begun = list(cluster.folder.glob("outputs/sweeps/*/0/metrics.jsonl"))
        return bool(begun) and bool(cluster.rows()) and cluster.rows()[-1]["step"] >= step

    return reached


def test_when_time_runs_out_a_job_saves_at_once_and_goes_on_where_it_was(
    cluster: Cluster, wait_for: Callable[..., None], undisturbed: Path
) -> None:
    waiting = cluster.start(*LONG)
    wait_for(at_step(cluster, 15))
    (id,) = cluster.states()
    before = cluster.rows()[-1]["step"]
    cluster.call("scancel", "--signal=USR2", id)
    wait_for(lambda: len(resumed_at(cluster, id)) == 1)
    wait_for(at_step(cluster, 60))
    again = cluster.rows()[-1]["step"]
    cluster.call("scancel", "--signal=USR2", id)
    wait_for(lambda: len(resumed_at(cluster, id)) == 2)
    for step, resumed in zip([before, again], resumed_at(cluster, id), strict=True):
        assert step <= resumed <= step + 3  # it took a step or so until it heard; none is lost
    said, _ = waiting.communicate(timeout=120)
    assert waiting.returncode == 0, said
    assert "requeued" in said
    assert_undisturbed(cluster.sweep / "0", undisturbed)


def test_a_job_that_is_asked_to_hand_over_while_python_starts_is_not_ended_by_that(
    cluster: Cluster, wait_for: Callable[..., None], undisturbed: Path
) -> None:
    waiting = cluster.start(*LONG)
    wait_for(lambda: [state for state, _ in cluster.states().values()] == ["RUNNING"])
    (id,) = cluster.states()
    cluster.call("scancel", "--signal=USR2", id)
    said, _ = waiting.communicate(timeout=120)
    assert waiting.returncode == 0, said
    assert_undisturbed(cluster.sweep / "0", undisturbed)


def test_a_script_of_ones_own_goes_on_in_the_directory_of_its_run(
    cluster: Cluster, wait_for: Callable[..., None], undisturbed: Path
) -> None:
    """As the guide shows it: SIGUSR1 saves, and the script puts itself back into the queue."""
    spd_run = Path(sys.executable).with_name("spd-run")
    words = " ".join(f"'{word}'" for word in LONG)
    script = cluster.folder / "own.sh"
    script.write_text(
        "#!/bin/bash\n"
        f"srun --ntasks=1 {spd_run} debug=smoke {words} run_dir=mine && exit 0\n"
        "scontrol requeue $SLURM_JOB_ID; sleep 30\n"
    )
    options = ["--requeue", "--open-mode=append", "--output=own.log", f"--chdir={cluster.folder}"]
    id = cluster.call("sbatch", "--parsable", *options, str(script)).strip()
    log, metrics = cluster.folder / "own.log", cluster.folder / "mine" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 15)
    cluster.call("scancel", "--signal=USR1", id)
    wait_for(lambda: "stopping after this step to save" in log.read_text())
    wait_for(lambda: "going on from step" in log.read_text(), 180)
    summary = cluster.folder / "mine" / "summary.json"
    wait_for(summary.exists, 120)
    wait_for(lambda: id not in cluster.states() or cluster.states()[id][0] == "COMPLETED")
    assert_undisturbed(cluster.folder / "mine", undisturbed)
    assert not (cluster.folder / "outputs").exists()


def test_a_job_that_is_requeued_by_hand_or_preempted_loses_at_most_what_was_not_saved(
    cluster: Cluster, wait_for: Callable[..., None], undisturbed: Path
) -> None:
    waiting = cluster.start(*LONG, "launcher.partition=main", "++launcher.additional={nodelist:127.0.0.2}")
    wait_for(at_step(cluster, EVERY + 5))
    (id,) = cluster.states()
    cluster.call("scontrol", "requeue", id)
    wait_for(lambda: len(resumed_at(cluster, id)) == 1)
    assert resumed_at(cluster, id)[0] >= EVERY
    wait_for(at_step(cluster, 80))
    cluster.call("srun", "--partition=high", "--nodelist=127.0.0.2", "--exclusive", "true")
    said, _ = waiting.communicate(timeout=120)
    assert waiting.returncode == 0, said
    assert len(resumed_at(cluster, id)) == 2
    assert resumed_at(cluster, id)[1] >= 80
    assert_undisturbed(cluster.sweep / "0", undisturbed)


def test_a_job_that_may_not_be_requeued_again_fails_and_says_how_to_go_on(
    cluster: Cluster, wait_for: Callable[..., None]
) -> None:
    waiting = cluster.start(*LONG, "launcher.max_requeues=0", "launcher.time=5")
    wait_for(at_step(cluster, 10))
    (id,) = cluster.states()
    cluster.call("scancel", "--signal=USR2", id)
    said, _ = waiting.communicate(timeout=120)
    assert waiting.returncode == 3
    assert re.search(r"job 0: stopped by SIGUSR2, saved at step \d+; go on with spd-run resume=\S+/0", said)
    cluster.wait_until_idle()
    assert cluster.states()[id][0] == "FAILED"


def test_a_finished_run_that_is_requeued_does_nothing(cluster: Cluster) -> None:
    cluster.spd_run("train.steps=10")
    cluster.wait_until_idle()
    (id,) = cluster.states()
    files = {path: path.stat().st_mtime_ns for path in (cluster.sweep / "0").rglob("*") if path.is_file()}
    cluster.call("scontrol", "requeue", id)
    cluster.wait_until_idle()
    assert "has finished its 10 steps: nothing to do" in cluster.log(id)
    after = {path: path.stat().st_mtime_ns for path in (cluster.sweep / "0").rglob("*") if path.is_file()}
    changed = {path.name for path in files if files[path] != after[path]}
    assert changed <= {".lock"}


def test_a_job_whose_node_is_lost_goes_on_elsewhere_and_the_process_left_behind_publishes_nothing(
    fragile: Cluster, wait_for: Callable[..., None], undisturbed: Path
) -> None:
    waiting = fragile.start(*LONG, f"loss.extra.trouble.slow_at={EVERY + 5}")
    wait_for(at_step(fragile, EVERY + 2))
    (id,) = fragile.states()
    node = re.search(r" NodeList=(\S+)", fragile.call("scontrol", "show", "job", id))
    assert node is not None
    pids = Path(fragile.environment["SLURM_TEST_ROOT"], "pids").read_text()
    daemons = dict(line.split()[:2] for line in pids.splitlines())
    os.kill(int(daemons[f"slurmd.{node[1].rpartition('.')[2]}"]), signal.SIGKILL)
    orphan = fragile.status()["pid"]
    wait_for(lambda: "going on from step" in fragile.log(id), seconds=120)
    assert fragile.status()["pid"] != orphan
    said, _ = waiting.communicate(timeout=240)
    assert waiting.returncode == 0, said
    assert "was taken over by" in fragile.log(id)
    assert_undisturbed(fragile.sweep / "0", undisturbed)


def test_a_requeued_run_keeps_its_wandb_run(cluster: Cluster, wait_for: Callable[..., None]) -> None:
    waiting = cluster.start(*LONG, "logger=wandb", "logger.mode=offline")
    wait_for(at_step(cluster, 10))
    (id,) = cluster.states()
    cluster.call("scancel", "--signal=USR2", id)
    said, _ = waiting.communicate(timeout=180)
    assert waiting.returncode == 0, said
    records = list((cluster.sweep / "0").rglob("offline-run-*"))
    ids = {record.name.rpartition("-")[2] for record in records}
    assert len(records) == 2
    assert len(ids) == 1
