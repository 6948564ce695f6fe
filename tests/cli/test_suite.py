"""`suite=` on the command line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spd_hydra import cli_task
from spd_hydra.config import RunConfig
from spd_hydra.result import Outcome
from spd_hydra.run import RunError

Call = Callable[..., Any]
TOYS = ["tms_5-2", "tms_5-2-id", "tms_40-10", "tms_40-10-id", "resid_mlp1", "resid_mlp2", "resid_mlp3"]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the configurations that would have been run; resid_mlp3 fails."""
    called: list[str] = []

    def run(config: RunConfig, **others: Any) -> Outcome:
        called.append(config.name)
        if config.name == "resid_mlp3":
            raise RunError("no room")
        return Outcome(None, {})

    monkeypatch.setattr(cli_task, "run", run)
    return called


@pytest.mark.parametrize("multirun", [[], ["-m"]])
def test_a_suite_is_a_sweep_with_and_without_m(
    spd_run: Call, names: list[str], tmp_path: Path, multirun: list[str]
) -> None:
    ended = spd_run(*multirun, "suite=paper")
    assert ended.code == 0
    assert names == [f"paper/{toy}" for toy in TOYS]
    (sweep,) = (tmp_path / "outputs" / "sweeps").iterdir()
    assert "spd-run" in (sweep / "sweep.json").read_text()
    assert '"experiment=paper/tms_40-10-id"' in (sweep / "sweep.json").read_text()


def test_a_failed_job_of_a_suite_ends_with_3(spd_run: Call, names: list[str]) -> None:
    assert spd_run("suite=toys").code == 3
    assert names == TOYS


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["suite=papre"], "suite: got papre; did you mean paper? Choose one of none, paper, toys"),
        (
            ["-m", "suite=toys", "experiment=tms_5-2"],
            "experiment: got tms_5-2 beside suite=toys, which runs ",
        ),
        (["-m", "suite=toys", "seed=0,-1"], "jobs 1 (experiment=tms_5-2 seed=-1), 3 "),
        (["--cfg", "job", "suite=toys"], "suite: stands for several configurations, and one can be shown"),
    ],
)
def test_a_mistake_ends_with_2_before_anything_starts(
    spd_run: Call, names: list[str], tmp_path: Path, words: list[str], line: str
) -> None:
    ended = spd_run(*words)
    assert ended.code == 2
    assert ended.err.splitlines()[1].startswith(f"  {line}")
    assert (len(ended.err.splitlines()), names, list(tmp_path.iterdir())) == (3, [], [])


def test_a_dry_run_on_a_cluster_lists_the_experiments(
    spd_run: Call, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    words = ["suite=toys", "seed=3", "launcher=slurm", "launcher.dry_run=true", "launcher.gpus=0"]
    ended = spd_run(*words)
    assert ended.code == 0
    jobs = [f"#   {job}: experiment={toy} seed=3" for job, toy in enumerate(TOYS)]
    assert ended.out.splitlines()[-9:-2] == jobs
    assert "#SBATCH --array=0-6%7" in ended.out
    assert names == []


def test_help_names_the_suites(spd_run: Call) -> None:
    text = spd_run("--help").out
    assert any(line.split() == ["suite", "none,", "paper,", "toys"] for line in text.splitlines())
    assert "spd-run -m suite=paper 'seed=range(5)'" in text


def test_tab_completes_the_suites(spd_run: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMP_LINE", "spd-run suite=")
    monkeypatch.setenv("COMP_POINT", "14")
    assert spd_run("-sc", "query=bash").out.split() == ["suite=none", "suite=paper", "suite=toys"]
