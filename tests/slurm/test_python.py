"""Submitting from Python, on a real SLURM."""

import json
import subprocess
import sys
from typing import Any

import pytest

pytestmark = pytest.mark.slow

Cluster = Any
SMALL = ["debug=smoke", "train.steps=10"]
TROUBLE = ["+loss_term@loss.extra.trouble=trouble_schema", "loss.extra.trouble.coeff=1"]


def python(cluster: Cluster, program: str, *words: Any) -> dict[str, Any]:
    """Run a program that prints a line of JSON at its end."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import json, sys\nwords = json.loads(sys.argv[1])\n" + program,
            json.dumps(words),
        ],
        cwd=cluster.folder,
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_submitted_runs_can_be_looked_at_waited_for_and_opened(cluster: Cluster) -> None:
    program = """
from spd_hydra.api import submit
runs = submit(words[0], partition="high", time="0:10:00", memory="1G", gpus=0, poll_seconds=0.5,
              additional={"comment": "a note"})
before = [run.state() for run in runs]
results = [run.result(0.5) for run in runs]
print(json.dumps({
    "ids": [run.job_id for run in runs], "dirs": [str(run.run_dir) for run in runs], "before": before,
    "after": [run.state() for run in runs], "seeds": [result.config.seed for result in results],
    "steps": [result.summary["steps"] for result in results],
    "paths": [str(result.path) for result in results],
    "loss": [run.row().loss for run in runs],
}))
"""
    found = python(cluster, program, [*SMALL, "seed=4,7"])
    assert sorted(found["ids"]) == sorted(cluster.states())
    assert [id.partition("_")[2] for id in found["ids"]] == ["0", "1"]
    assert found["dirs"] == found["paths"] == [str(cluster.sweep / "0"), str(cluster.sweep / "1")]
    assert set(found["before"]) <= {"pending", "running"}
    assert found["after"] == ["done", "done"]
    assert (found["seeds"], found["steps"]) == ([4, 7], [10, 10])
    assert all(loss > 0 for loss in found["loss"])
    (script,) = (cluster.sweep / ".submitit").glob("*_submission.sh")
    lines = script.read_text().splitlines()
    for line in ["partition=high", "time=10", "mem=1G", "comment='a note'"]:
        assert f"#SBATCH --{line}" in lines


def test_a_submitted_run_that_fails_raises_with_its_traceback(cluster: Cluster) -> None:
    program = """
from spd_hydra.api import JobFailed, submit
(run,) = submit(words[0], gpus=0)
try:
    run.result(0.5)
except JobFailed as error:
    print(json.dumps({"id": run.job_id, "error": str(error), "state": run.state()}))
"""
    found = python(cluster, program, ["debug=smoke", *TROUBLE, "loss.extra.trouble.how=raise"])
    assert found["state"] == "failed"
    assert found["error"].startswith(f"job {found['id']} failed: RuntimeError: trouble was asked for")
    assert 'raise RuntimeError("trouble was asked for")' in found["error"]
    assert "Traceback (most recent call last)" in found["error"]


def test_what_the_cluster_refuses_is_an_error_and_leaves_nothing_behind(cluster: Cluster) -> None:
    program = """
from spd_hydra.api import submit
from spd_hydra.section import ConfigError
found = {}
for name, options in {"nowhere": {"partition": "nowhere"}, "unknown": {"partitoin": "high"},
                      "range": {"nodes": 0}, "dry": {"dry_run": True}}.items():
    try:
        submit(words[0], gpus=0, **options)
    except ConfigError as error:
        found[name] = str(error)
print(json.dumps(found))
"""
    found = python(cluster, program, SMALL)
    assert "launcher: the cluster refuses the job: " in found["nowhere"]
    assert found["unknown"].startswith(
        "launcher.partitoin: there is no such key; did you mean launcher.partition?"
    )
    assert found["range"] == "launcher.nodes: got 0, must be ≥ 1"
    assert found["dry"].startswith("launcher.dry_run: got true, but submit() submits; ")
    assert not cluster.states()
    assert not list(cluster.folder.glob("outputs/sweeps/*"))
