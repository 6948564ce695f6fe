"""No secret is in any file that jobs leave."""

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

Cluster = Any
CANARIES = ["canary4711inKEY", "canary4711inTOKEN", "canary4711inWORDS"]
ENVIRONMENT = {"WANDB_API_KEY": CANARIES[0], "MY_SERVICE_TOKEN": CANARIES[1]}


def assert_clean(folder: Path, said: str) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    kinds = {path.suffix for path in files}
    assert {".pkl", ".out", ".err", ".yaml", ".json", ".csv", ".html"} <= kinds, "the files that are meant"
    for canary in CANARIES:
        assert not [str(path) for path in files if canary.encode() in path.read_bytes()]
        assert not [str(path) for path in folder.rglob("*") if canary in path.name]
        assert canary not in said


@pytest.mark.parametrize("launcher", ["slurm", "local_parallel"])
def test_a_secret_of_the_environment_or_of_the_words_is_in_no_file(cluster: Cluster, launcher: str) -> None:
    words = ["allow_extra=true", f"+api_key={CANARIES[2]}", f"+my.auth_token={CANARIES[2]}", "train.steps=10"]
    if launcher != "slurm":
        words.append(f"launcher={launcher}")
    said = cluster.spd_run("-m", *words, "seed=0,1", **ENVIRONMENT)
    assert [cluster.status(job)["status"] for job in (0, 1)] == ["done", "done"]
    assert_clean(cluster.folder, said)
    later = cluster.spd_run("launcher=local", "task=sweep_status", f"sweep={cluster.sweep}", **ENVIRONMENT)
    assert_clean(cluster.folder, later)
    assert (cluster.sweep / ".submitit").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("launcher", ["slurm", "local_parallel"])
def test_a_secret_is_in_no_file_of_a_job_that_fails(cluster: Cluster, launcher: str) -> None:
    words = ["+loss_term@loss.extra.trouble=trouble_schema", "loss.extra.trouble.coeff=1"]
    if launcher != "slurm":
        words.append(f"launcher={launcher}")
    extra = ["allow_extra=true", f"+api_key={CANARIES[2]}"]
    said = cluster.spd_run("-m", *words, *extra, "loss.extra.trouble.how=raise", code=3, **ENVIRONMENT)
    assert "trouble was asked for" in said
    assert_clean(cluster.folder, said)


def test_a_job_has_the_secrets_of_the_environment_it_was_submitted_from(cluster: Cluster) -> None:
    setup = "launcher.setup=['test -n \"$WANDB_API_KEY\" && echo has its key']"
    cluster.spd_run(setup, "train.steps=10", **ENVIRONMENT)
    (id,) = cluster.states()
    assert "has its key" in cluster.log(id)
    assert not [
        path
        for path in cluster.folder.rglob("*")
        if path.is_file() and CANARIES[0].encode() in path.read_bytes()
    ]
