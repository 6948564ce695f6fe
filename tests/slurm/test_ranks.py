"""One run on several processes and nodes of a cluster."""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.slow

Cluster = Any
TROUBLE = [
    "+loss_term@loss.extra.trouble=trouble_schema", "loss.extra.trouble.coeff=1", "train.log_every=1",
]  # fmt: skip


def losses(cluster: Cluster, job: int) -> list[float]:
    return [row["loss/total"] for row in cluster.rows(job) if row["split"] == "train"]


def test_two_nodes_with_two_ranks_each_do_the_run_that_one_process_does(cluster: Cluster) -> None:
    cluster.spd_run("train.steps=100", "train.log_every=1", "launcher=local")
    (alone,) = cluster.folder.glob("outputs/tms_5-2/*")
    cluster.spd_run("train.steps=100", "train.log_every=1", "launcher.nodes=2", "launcher.ranks_per_node=2")
    wanted = [json.loads(line) for line in (alone / "metrics.jsonl").read_text().splitlines()]
    found = cluster.rows()
    assert [(row["step"], row["split"]) for row in found] == [(row["step"], row["split"]) for row in wanted]
    for row, other in zip(found, wanted, strict=True):
        assert math.isclose(row["loss/total"], other["loss/total"], rel_tol=1e-5)
        assert math.isclose(row["l0/total"], other["l0/total"], rel_tol=1e-5)
    environment = json.loads((cluster.sweep / "0" / "environment.json").read_text())["slurm"]
    assert environment["SLURM_NTASKS"] == "4"
    (id,) = cluster.states()
    assert "step 100/100" in cluster.log(id, rank=0)
    assert "step 100/100" not in cluster.log(id, rank=3)  # rank 0 alone speaks


@pytest.mark.parametrize(
    ("how", "rank", "named"),
    [
        ("raise", 1, "rank 1 failed: RuntimeError: trouble was asked for"),
        ("exit", 1, "rank 1 failed: ended itself with exit code 7"),
        ("kill", 1, "rank 1 died without a word"),
        ("raise", 0, "RuntimeError: trouble was asked for"),
        ("kill", 0, "ended without a word (FAILED"),
        ("nan", 1, "the loss is nan at step 7, in: trouble"),
    ],
)
def test_when_one_rank_ends_all_end_and_the_one_is_named(
    cluster: Cluster, how: str, rank: int, named: str
) -> None:
    trouble = [f"loss.extra.trouble.how={how}", f"loss.extra.trouble.rank={rank}"]
    said = cluster.spd_run(*TROUBLE, *trouble, "launcher.nodes=2", code=3)
    assert named in said
    cluster.wait_until_idle()
    ((state, _),) = cluster.states().values()
    assert state == "FAILED"
    assert not list((cluster.sweep / "0" / "checkpoints").glob("step_1*"))  # nothing was saved after it


def test_ranks_stop_at_the_same_step_and_go_on_together(
    cluster: Cluster, wait_for: Callable[..., None]
) -> None:
    long = [*TROUBLE, "train.steps=100", "loss.extra.trouble.seconds=0.05", "train.checkpoint_every=1000"]
    waiting = cluster.start(*long, "launcher.nodes=2")
    wait_for(
        lambda: list(cluster.folder.glob("outputs/sweeps/*/0/metrics.jsonl")) and len(cluster.rows()) > 20
    )
    (id,) = cluster.states()
    cluster.call("scancel", "--signal=USR2", id)
    said, _ = waiting.communicate(timeout=180)
    assert waiting.returncode == 0, said
    assert "going on from step" in cluster.log(id)
    steps = [row["step"] for row in cluster.rows() if row["split"] == "train"]
    assert steps == list(range(1, 101))
