"""Sweepers that choose as they go get what a run came to."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hydra_plugins.spd_hydra import require_results
from spd_hydra.build import Parts, assemble, untrained_target
from spd_hydra.composition import compose
from spd_hydra.config import RunConfig
from spd_hydra.launcher_config import Slurm
from spd_hydra.preflight import preflight
from spd_hydra.section import ConfigError

Toy = Callable[..., RunConfig]
PROGRAM = Path(__file__).with_name("two_rounds.py")


def sweep(folder: Path, cache: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            PROGRAM,
            "-m",
            "debug=smoke",
            "hydra/sweeper=two_rounds",
            "eval.figures=false",
            *words,
        ],
        cwd=folder,
        env=os.environ | {"SPD_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "objective", "group"),
    [("local", "loss/total", "losses"), ("local_parallel", "l0/total", "l0")],
)
def test_a_sweeper_gets_the_objective_of_every_run_and_chooses_by_it(
    tmp_path: Path, target_cache: Path, launcher: str, objective: str, group: str
) -> None:
    done = sweep(tmp_path, target_cache, f"launcher={launcher}", f"objective={objective}", "seed=5")
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "told.json").read_text())
    (directory,) = tmp_path.glob("outputs/sweeps/*")
    summaries = [json.loads((directory / str(job) / "summary.json").read_text()) for job in range(4)]
    assert [value for _, value in told] == [summary[group]["total"] for summary in summaries]
    assert all(math.isfinite(value) for _, value in told)
    better = min(told[:2], key=lambda item: item[1])[0]
    assert [rate for rate, _ in told] == [1e-4, 1e-1, better / 3, better * 3]
    table = (directory / "sweep.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in table[1:]] == ["0", "1", "2", "3"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["local", "local_parallel"])
def test_a_run_that_fails_has_no_objective_and_the_sweep_ends_with_3(
    tmp_path: Path, target_cache: Path, launcher: str
) -> None:
    done = sweep(tmp_path, target_cache, f"launcher={launcher}", "hydra.sweeper.first=[1e-2,1e30]")
    assert done.returncode == 3, done.stderr
    told = [value for _, value in json.loads((tmp_path / "told.json").read_text())]
    assert [math.isfinite(value) for value in told] == [True, False, True, True]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["local", "local_parallel"])
def test_values_that_a_sweeper_may_not_choose_are_told(
    tmp_path: Path, target_cache: Path, launcher: str
) -> None:
    done = sweep(tmp_path, target_cache, f"launcher={launcher}", "hydra.sweeper.first=[1e-2,-1]")
    assert "train.lr: got -1" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == (2 if launcher == "local_parallel" else 3)


def test_an_objective_that_no_evaluation_measures_is_refused_with_the_names_that_there_are(toy: Toy) -> None:
    with pytest.raises(ConfigError) as caught:
        preflight(toy("objective=loss/totl"))
    message = str(caught.value)
    start = "objective: got loss/totl, which no evaluation of this run measures; choose one of "
    assert message.startswith(start)
    names = message.removeprefix(start).split(", ")
    assert {"loss/total", "l0/total", "l0/embed", "alive/unembed", "recovery/mmcs"} <= set(names)
    assert names == sorted(names)


@pytest.mark.parametrize("experiment", ["tms_5-2", "tms_40-10-id", "resid_mlp1", "resid_mlp2", "none"])
def test_every_metric_of_a_run_may_be_its_objective(experiment: str) -> None:
    words = [f"experiment={experiment}", "device=cpu", *(["name=x"] if experiment == "none" else [])]
    config = compose([*words, "eval.batches=1", "eval.batch_size=4"])
    metrics = (
        assemble(config, untrained_target(config), torch.device("cpu")).evaluate(0, certified=False).metrics
    )
    for name in list(metrics)[::5]:
        config.objective = name
        preflight(config)
    config.objective = "recovery"
    with pytest.raises(ConfigError, match="objective: got recovery, "):
        preflight(config)


def test_the_default_objective_is_not_measured_to_be_checked(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Parts, "evaluate", lambda *arguments, **others: pytest.fail("was measured"))
    preflight(toy())


@pytest.mark.parametrize(("wait", "sweeper"), [(True, "a.b.Adaptive"), (False, "x.y.BasicSweeper")])
def test_results_are_there_for_sweepers_that_choose_by_them(wait: bool, sweeper: str) -> None:
    require_results(sweeper, Slurm(wait=wait))


def test_a_sweeper_that_chooses_by_results_must_wait_for_them() -> None:
    with pytest.raises(ConfigError, match=r"launcher\.wait: got false, but Adaptive chooses .* leave it out"):
        require_results("a.b.Adaptive", Slurm(wait=False))
