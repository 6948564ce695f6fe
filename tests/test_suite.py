"""A suite is the sweep over its experiments, and nothing else."""

from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest

from spd_hydra.api import submit
from spd_hydra.composer import Composer
from spd_hydra.composition import compose
from spd_hydra.plan import make_plan
from spd_hydra.section import ConfigError
from spd_hydra.suite import expanded, require_none

SUITES = sorted(path.stem for path in (Path(str(resources.files("spd_hydra.conf"))) / "suite").glob("*.yaml"))
TOYS = ["tms_5-2", "tms_5-2-id", "tms_40-10", "tms_40-10-id", "resid_mlp1", "resid_mlp2", "resid_mlp3"]
EXPERIMENTS = {"none": ["tms_5-2"], "paper": [f"paper/{toy}" for toy in TOYS], "toys": TOYS}


@pytest.fixture(scope="module")
def composer() -> Iterator[Composer]:
    with Composer.open() as opened:
        yield opened


def error(composer: Composer, *words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        make_plan(composer, words, multirun=False)
    return str(caught.value)


@pytest.mark.parametrize("suite", SUITES)
def test_every_job_of_a_shipped_suite_is_composed_and_built_and_they_are_exactly_its_experiments(
    composer: Composer, suite: str
) -> None:
    plan = make_plan(composer, [f"suite={suite}"], multirun=False)
    assert [job.config.name for job in plan.jobs] == EXPERIMENTS[suite]
    assert plan.is_sweep == (suite != "none")


def test_the_jobs_are_those_of_the_same_sweep_typed_in_full(composer: Composer) -> None:
    words = expanded(composer, ["debug=smoke", "suite=paper", "seed=range(2)"])
    assert words == ["debug=smoke", f"experiment={','.join(EXPERIMENTS['paper'])}", "seed=range(2)"]
    jobs = composer.jobs(words)
    assert jobs[:3] == [
        ["debug=smoke", "experiment=paper/tms_5-2", "seed=0"],
        ["debug=smoke", "experiment=paper/tms_5-2", "seed=1"],
        ["debug=smoke", "experiment=paper/tms_5-2-id", "seed=0"],
    ]
    assert len(jobs) == 14


def test_a_suite_goes_through_every_launcher_as_other_sweeps_do(composer: Composer) -> None:
    plan = make_plan(composer, ["suite=toys", "launcher=local_parallel", "launcher.jobs=3"], multirun=False)
    assert [job.config.name for job in plan.jobs] == TOYS
    assert {job.config.launcher.kind for job in plan.jobs} == {"local_parallel"}


def test_an_unknown_suite_is_told_with_those_there_are(composer: Composer) -> None:
    assert error(composer, "suite=papre", "seed=1") == (
        "suite: got papre; did you mean paper? Choose one of none, paper, toys"
    )
    assert error(composer, "suite=all") == "suite: got all; must be one of none, paper, toys"


@pytest.mark.parametrize("own", ["experiment=tms_5-2", "experiment=tms_5-2,resid_mlp1", "~experiment"])
def test_an_experiment_beside_a_suite_is_refused(composer: Composer, own: str) -> None:
    given = own.removeprefix("experiment=")
    assert error(composer, own, "suite=toys") == (
        f"experiment: got {given} beside suite=toys, which runs {', '.join(TOYS)}; leave out suite=toys or "
        f"{own}"
    )


def test_two_suites_in_one_sweep_are_refused(composer: Composer) -> None:
    assert error(composer, "suite=paper,toys") == (
        "suite: got paper,toys, must be one of none, paper, toys; start a sweep for each"
    )


def test_of_two_words_the_last_suite_counts(composer: Composer) -> None:
    listed = f"experiment={','.join(TOYS)}"
    assert expanded(composer, ["suite=paper", "seed=1", "suite=toys"]) == ["seed=1", listed]
    assert expanded(composer, ["suite=toys", "suite=toys"]) == [listed]
    assert expanded(composer, ["seed=1", "not an override"]) == ["seed=1", "not an override"]


def test_a_mistake_in_one_job_of_a_suite_is_told_with_the_job(composer: Composer) -> None:
    text = error(composer, "suite=toys", "decomposition.sites.embed.C=7")
    assert "job 4 (experiment=resid_mlp1)" in text  # the TMS have that site, the residual MLPs do not
    assert "decomposition.sites has no entry embed, only mlp_in, mlp_out" in text


def test_suites_of_ones_own_come_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "suite").mkdir()
    (tmp_path / "suite" / "mine.yaml").write_text("experiments: [tms_5-2-untied]\n")
    (tmp_path / "suite" / "empty.yaml").write_text("experiments: []\n")
    with Composer.open(tmp_path) as composer:
        plan = make_plan(composer, ["suite=mine", "seed=4"], multirun=False, config_dir=tmp_path)
        assert [(job.config.name, job.config.seed) for job in plan.jobs] == [("tms_5-2-untied", 4)]
        assert plan.is_sweep
        assert error(composer, "suite=empty") == (
            "suite: got empty, which names no experiment; list some in its YAML file, e.g. experiments: "
            "[tms_5-2, resid_mlp1]"
        )


def test_where_one_configuration_is_asked_for_a_suite_is_refused(composer: Composer) -> None:
    with pytest.raises(ConfigError, match=r"^suite: got tms_5-2, .* must be none for a single run; give one"):
        compose(["suite=toys"])
    with pytest.raises(ConfigError, match=r"^suite: stands for several configurations, and one can be shown"):
        require_none(composer, ["suite=toys"])
    require_none(composer, ["suite=none", "experiment=tms_5-2"])


def test_a_suite_can_be_submitted_from_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="sbatch"):  # all jobs were sound, and there is no cluster here
        submit(["suite=toys", "debug=smoke"])
