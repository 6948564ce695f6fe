"""From a command line to jobs in the queue, and from jobs to a table: on a real SLURM."""

import csv
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.slow

Cluster = Any
TROUBLE = ["+loss_term@loss.extra.trouble=trouble_schema", "loss.extra.trouble.coeff=1"]


def test_a_dry_run_prints_the_script_that_is_submitted_and_submits_nothing(cluster: Cluster) -> None:
    words = [
        "-m", "seed=3,4", f"hydra.sweep.dir={cluster.folder}/outputs/sweeps/mine", "launcher.partition=high",
        "launcher.time=0:30:00", "launcher.memory=1G", "launcher.cpus=2", "launcher.array_parallelism=1",
        "launcher.setup=[echo from the setup]", "++launcher.additional={comment:a note}",
        "launcher.exclude=127.0.0.4",
    ]  # fmt: skip
    shown = cluster.spd_run(*words, "launcher.dry_run=true")
    assert not cluster.states()
    assert not (cluster.folder / "outputs").exists()
    assert "#   0: debug=smoke seed=3\n#   1: debug=smoke seed=4\n" in shown
    assert "# accepted: " in shown
    cluster.spd_run(*words)
    (script,) = (cluster.sweep / ".submitit").glob("*_submission.sh")
    assert shown.startswith(script.read_text())
    for line in ["partition=high", "time=30", "mem=1G", "cpus-per-task=2", "array=0-1%1", "comment='a note'"]:
        assert f"#SBATCH --{line}\n" in shown
    cluster.wait_until_idle()
    assert {state for state, _ in cluster.states().values()} == {"COMPLETED"}
    assert "from the setup" in cluster.log(sorted(cluster.states())[0])
    assert oct((cluster.sweep / ".submitit").stat().st_mode)[-3:] == "700"


def test_a_dry_run_tells_when_the_cluster_would_refuse(cluster: Cluster) -> None:
    assert "# REFUSED: " in cluster.spd_run("launcher.partition=nowhere", "launcher.dry_run=true", code=2)


def test_a_job_that_asks_for_more_time_than_its_partition_gives_is_told_to_wait_in_vain(
    cluster: Cluster, wait_for: Callable[..., None]
) -> None:
    cluster.spd_run("launcher.partition=short", "launcher.time=2:00:00", "launcher.wait=false")
    (id,) = cluster.states()
    wait_for(lambda: "PartitionTimeLimit" in cluster.call("squeue", f"--jobs={id}", "--format=%r"))
    told = cluster.spd_run("task=sweep_status", f"sweep={cluster.sweep}")
    assert "pending (PartitionTimeLimit)" in told
    assert "PartitionTimeLimit: that is less than asked for; cancel, and ask for less with" in told
    cluster.call("scancel", id)


def test_what_the_cluster_refuses_is_told_and_leaves_nothing_behind(cluster: Cluster) -> None:
    said = cluster.spd_run("launcher.partition=nowhere", code=2)
    assert re.search(r"launcher: the cluster refuses the job: .*[Ii]nvalid partition", said)
    assert "Traceback" not in said
    assert not list(cluster.folder.glob("outputs/sweeps/*"))


def test_a_single_job_is_submitted_and_runs_in_the_partition_of_the_environment(cluster: Cluster) -> None:
    said = cluster.spd_run(SLURM_PARTITION="high")
    (id,) = cluster.states()
    assert "_" not in id  # no array
    assert f"job 0: {id}" in said
    assert "Partition=high" in cluster.call("scontrol", "show", "job", id)
    assert cluster.status()["status"] == "done"
    assert json.loads((cluster.sweep / "0" / "environment.json").read_text())["slurm"]["SLURM_JOB_ID"] == id


def test_without_waiting_the_sweep_can_be_looked_at_later(
    cluster: Cluster, wait_for: Callable[..., None]
) -> None:
    said = cluster.spd_run("-m", "seed=0,1", "launcher.wait=false", "++launcher.additional={hold:true}")
    ids = sorted(cluster.states())
    assert [f"job {number}: {id}  " in said for number, id in enumerate(ids)] == [True, True]
    assert f"scancel {ids[0].partition('_')[0]}" in said
    look = ["task=sweep_status", f"sweep={cluster.sweep}"]
    assert "spd-run " + " ".join(look) in said
    assert "pending" in cluster.spd_run(*look)
    cluster.call("scontrol", "release", ids[0].partition("_")[0])
    wait_for(lambda: cluster.status(0).get("status") == cluster.status(1).get("status") == "done")
    later = cluster.spd_run(*look)
    assert re.search(r"^  0 .* done .*\n  1 .* done ", later, re.MULTILINE)
    assert (cluster.sweep / "sweep.html").is_file()


def test_files_changed_while_a_job_waits_do_not_change_the_job(cluster: Cluster) -> None:
    own = cluster.folder / "mine" / "eval"
    own.mkdir(parents=True)
    (own / "own.yaml").write_text("defaults: [default, _self_]\nci_threshold: 0.25\n")
    words = ["--config-dir", str(own.parent), "eval=own", "++launcher.additional={hold:true}"]
    cluster.spd_run(*words, "launcher.wait=false")
    (id,) = cluster.states()
    (own / "own.yaml").write_text("defaults: [default, _self_]\nci_threshold: 0.75\n")
    cluster.call("scontrol", "release", id)
    cluster.wait_until_idle()
    config = yaml.safe_load((cluster.sweep / "0" / "config.yaml").read_text())
    assert config["eval"]["ci_threshold"] == 0.25


def test_all_that_is_wrong_with_any_job_is_told_before_one_is_submitted(cluster: Cluster) -> None:
    said = cluster.spd_run("-m", "train.lr=-1,1e-3", "decomposition.sites.embed.C=0,20", "sed=1", code=2)
    assert "train.lr: got -1.0, must be > 0" in said or "sed" in said
    said = cluster.spd_run(
        "-m", "train.lr=-1,1e-3", "decomposition.sites.embed.pattern=embed,nothing", code=2
    )
    assert "train.lr: got -1" in said
    assert "nothing" in said
    assert not cluster.states()


def test_every_end_of_a_job_is_named_and_the_others_go_on(cluster: Cluster) -> None:
    how = "loss.extra.trouble.how=none,raise,exit,kill,os_exit"
    said = cluster.spd_run("-m", *TROUBLE, how, code=3)
    with (cluster.sweep / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows] == ["done", "failed", "failed", "failed", "failed"]
    cluster.wait_until_idle()
    states = cluster.states()
    ended = [states[row["id"]] for row in rows]
    assert [state for state, _ in ended] == ["COMPLETED", "FAILED", "FAILED", "FAILED", "FAILED"]
    assert "RuntimeError: trouble was asked for" in rows[1]["error"]
    assert 'raise RuntimeError("trouble was asked for")' in said  # the traceback
    assert "trouble was asked for" in cluster.log(rows[1]["id"])
    assert "7" in rows[2]["error"] + rows[2]["exit"]
    for row in rows[3:]:
        assert "ended without a word (FAILED" in row["error"]
    assert (cluster.sweep / "0" / "report.html").is_file()
    assert "trouble was asked for" in (cluster.sweep / "sweep.html").read_text()


def test_a_job_that_is_cancelled_before_it_begins_is_told(
    cluster: Cluster, wait_for: Callable[..., None]
) -> None:
    waiting = cluster.start("++launcher.additional={hold:true}")
    wait_for(lambda: [state for state, _ in cluster.states().values()] == ["PENDING"])
    (id,) = cluster.states()
    cluster.call("scancel", id)
    said, _ = waiting.communicate(timeout=60)
    assert waiting.returncode == 3
    assert "job 0: ended before it began (CANCELLED" in said


def test_hydras_own_launcher_for_slurm_works(cluster: Cluster) -> None:
    cluster.spd_run("-m", "launcher=local", "hydra/launcher=submitit_slurm", "seed=0,1")
    cluster.wait_until_idle()
    assert [cluster.status(job)["status"] for job in (0, 1)] == ["done", "done"]
    assert {state for state, _ in cluster.states().values()} == {"COMPLETED"}
