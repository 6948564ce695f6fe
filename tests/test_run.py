"""One run from configuration to report: what it leaves behind, and how it says what went wrong."""

import csv
import dataclasses
import hashlib
import json
import logging
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cli.conftest import Call, spd_run  # noqa: F401 (a fixture)

from spd_hydra.build import assemble, device_of, untrained_target
from spd_hydra.composer import Composer
from spd_hydra.composition import compose
from spd_hydra.config import Device, RunConfig, Task
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.logger.base import Logger
from spd_hydra.metric import extra
from spd_hydra.metric.evaluation import Evaluation
from spd_hydra.metric.finding import Settings
from spd_hydra.model.obtain import TrainedTarget
from spd_hydra.preflight import preflight
from spd_hydra.report.numbers import number
from spd_hydra.result import Outcome, settings_of
from spd_hydra.run import RunError, run
from spd_hydra.saved_config import load_config, to_yaml
from spd_hydra.saved_run import read_target
from spd_hydra.section import ConfigError

Toy = Callable[..., RunConfig]
FILES = {
    "config.yaml",
    "environment.json",
    "metrics.jsonl",
    "report.html",
    "status.json",
    "summary.json",
    "target.safetensors",
}


def directory_of(outcome: Outcome) -> Path:
    assert outcome.run_dir is not None
    return outcome.run_dir


def files(directory: Path) -> dict[str, str]:
    """Digest of every file below a directory, hidden ones left out."""
    found = [path for path in directory.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(found)}


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


@pytest.fixture(scope="module")  # made before the pictures are switched off
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that no test may change."""
    folder = tmp_path_factory.mktemp("finished")
    return directory_of(
        run(compose(["debug=smoke", f"out_dir={folder / 'runs'}", f"cache_dir={folder / 'cache'}"]))
    )


# ---- what a run leaves behind --------------------------------------------------------------------------


def test_a_run_directory_holds_what_was_promised_and_nothing_else(finished: Path) -> None:
    found = set(files(finished))
    checkpoint = {"manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"}
    assert {name for name in found if "/" not in name} == FILES
    assert {name for name in found if name.startswith("checkpoints/")} == {
        f"checkpoints/step_{step}/{name}" for step in (10, 20) for name in checkpoint
    }
    figures = found - FILES - {name for name in found if name.startswith("checkpoints/")}
    assert figures
    assert all(name.startswith("figures/") and name.endswith(".png") for name in figures)
    assert {path.name for path in finished.iterdir() if path.name.startswith(".")} == {".lock"}


def test_the_summary_has_the_promised_keys(finished: Path) -> None:
    summary = read_json(finished / "summary.json")
    promised = (
        "experiment seed steps solved strict checks thresholds mmcs ml2r alive l0 losses target seconds"
    )
    assert {*promised.split(), "seconds", "steps_per_second"} <= set(summary)
    assert (summary["experiment"], summary["seed"], summary["steps"]) == ("tms_5-2", 0, 20)
    assert set(summary["seconds"]) == {"target", "compile", "train", "eval", "total"}
    assert summary["restarts"] is None
    assert {(c["name"], c["site"], c["tolerance"], c["expected"]) for c in summary["checks"]} == {
        ("identity", site, tolerance, 5) for site in ("embed", "unembed") for tolerance in (0.1, 0.2)
    }
    assert set(summary["alive"]) == {"embed", "unembed"}
    assert set(summary["l0"]) == {"embed", "unembed", "total"}
    assert all(value is None or math.isfinite(value) for value in summary["losses"].values())
    assert summary["contributions"] == {}
    (finding,) = summary["diagnosis"]  # its target is hardly trained
    assert set(finding) == {"symptom", "advice", "site"}
    assert "leave out debug=smoke or target_steps" in finding["advice"]


def test_a_diagnosis_that_fails_loses_no_run(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*arguments: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("spd_hydra.result.diagnose", broken)
    with caplog.at_level(logging.WARNING):
        assert run(toy()).summary["diagnosis"] == []
    assert "no diagnosis could be made" in caplog.text


def settings_for(*words: str) -> tuple[RunConfig, Settings]:
    config = compose(list(words))
    parts = preflight(config)
    target = TrainedTarget(
        module=parts.model.target, seed=0, tries=1, loss=0.0, measurements=[], certified=True, cached=True,
        seconds=0.0,
    )  # fmt: skip
    assert set(parts.model.site_names) == set(settings_of(parts, target).sites)
    return config, settings_of(parts, target)


@pytest.mark.parametrize(
    ("layers", "tied"), [("tms_5-2", True), ("resid_mlp2", False), ("resid_mlp3", False)]
)
def test_advice_knows_the_keys_of_every_site(layers: str, tied: bool) -> None:
    config, settings = settings_for(f"experiment={layers}")
    for name, C in settings.sites.values():
        assert config.decomposition.sites[name].C == C
    assert bool(settings.tied) is tied
    assert settings.sparsity_coeff == config.loss.importance_minimality.coeff
    assert settings.adversary_coeff == {"tms_5-2": 0, "resid_mlp2": 0.8, "resid_mlp3": 0.5}[layers]
    assert not settings.anneals_late  # until 75 % of training


@pytest.mark.parametrize(("end", "late"), [(0.7, False), (0.8, True)])
def test_a_squeeze_in_the_last_quarter_moves_the_loss_late(end: float, late: bool) -> None:
    squeeze = f"{{squeeze:3.0,squeeze_from:{end - 0.02},squeeze_to:{end}}}"
    _, settings = settings_for("experiment=tms_5-2", f"loss.importance_minimality={squeeze}")
    assert settings.anneals_late is late


def test_advice_knows_which_term_asks_for_sparsity() -> None:
    smooth = ["loss.importance_minimality.coeff=0", "loss.smooth_l0.coeff=2e-3"]
    for words, expected in [([], ("importance_minimality", 6e-3)), (smooth, ("smooth_l0", 2e-3))]:
        _, settings = settings_for("experiment=tms_5-2", *words)
        assert (settings.sparsity_term, settings.sparsity_coeff) == expected


def test_the_summary_repeats_the_last_evaluation(finished: Path) -> None:
    summary = read_json(finished / "summary.json")
    last = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()][-1]
    assert (last["step"], last["split"]) == (20, "eval")
    assert {f"loss/{name}": value for name, value in summary["losses"].items()}.items() <= last.items()
    assert last["recovery/mmcs"] == summary["mmcs"]
    for check in summary["checks"]:
        assert last[f"recovery/{check['name']}_error_{check['tolerance']}/{check['site']}"] == check["error"]


def test_the_saved_configuration_is_that_of_the_run(finished: Path) -> None:
    saved = load_config(finished / "config.yaml")
    assert saved.train.steps == 20
    assert read_json(finished / "status.json")["status"] == "done"
    assert read_json(finished / "status.json")["step"] == 20


def test_the_kept_target_is_the_one_that_was_decomposed(finished: Path) -> None:
    config = load_config(finished / "config.yaml")
    target = read_target(config, finished, torch.device("cpu"))
    facts = read_json(finished / "summary.json")["target"]
    assert (target.seed, target.tries, target.certified) == (facts["seed"], facts["tries"], False)
    assert [m.name for m in target.measurements] == [m["name"] for m in facts["measurements"]]
    assert not any(parameter.requires_grad for parameter in target.module.parameters())


def test_an_uncertified_target_is_never_solved_and_said_to_be_unfit(
    toy: Toy, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        outcome = run(toy())
    assert (outcome.summary["solved"], outcome.summary["strict"]) == (False, False)
    assert outcome.summary["target"]["certified"] is False
    assert any("certified" in record.getMessage() for record in caplog.records)
    assert "not certified" in (directory_of(outcome) / "report.html").read_text()


def test_the_same_configuration_gives_the_same_numbers_in_another_directory(toy: Toy) -> None:
    config = toy()
    one, two = directory_of(run(config)), directory_of(run(config))
    assert one != two
    assert one.parent == two.parent
    ours, theirs = files(one), files(two)
    same = [n for n in ours if n.endswith((".safetensors", "metrics.jsonl")) and n != "target.safetensors"]
    assert len(same) == 5
    assert [ours[name] for name in same] == [theirs[name] for name in same]


def test_another_seed_gives_other_numbers(toy: Toy) -> None:
    losses = [run(toy(f"seed={seed}")).summary["losses"]["total"] for seed in (0, 1)]
    assert losses[0] != losses[1]


def test_training_lowers_the_loss(toy: Toy) -> None:
    outcome = run(toy("train.steps=200", "train.log_every=1", "train.faithfulness_warmup.steps=0"))
    rows = [json.loads(x) for x in (directory_of(outcome) / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss/total"] for row in rows if row["split"] == "train"]
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])


# ---- variants ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        ["ci_fn=vector_mlp"],
        ["ci_fn=shared_mlp"],
        ["ci_fn=global_transformer", "ci_fn.d_model=8", "ci_fn.d_mlp=8", "train.precision=bf16"],
        ["train.precision=bf16"],
        ["loss.importance_minimality={p_start:2.0,p_end:0.5}"],
        ["decomposition=tms_5-2-untied"],
        ["decomposition.use_delta=false", "decomposition.init=aligned"],
        ["decomposition.sites.unembed.C=7", "decomposition=tms_5-2-untied"],
        ["loss.stochastic_recon.masks=binomial", "loss.ci_masked_recon_layerwise.coeff=1"],
        ["model=tms_5-2-id", "decomposition=tms_5-2-id"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_a_variant_runs_to_its_end_with_finite_numbers(toy: Toy, overrides: list[str]) -> None:
    outcome = run(toy("train.steps=4", "eval.every=2", *overrides))
    assert outcome.summary["steps"] == 4
    assert all(math.isfinite(value) for value in outcome.summary["losses"].values())
    rows = [json.loads(x) for x in (directory_of(outcome) / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 4


@pytest.mark.slow
def test_a_residual_mlp_runs_to_its_end(toy: Toy) -> None:
    small = ["model.n_features=6", "model.d_embed=12", "model.d_mlp=4", "decomposition.sites.mlp_in.C=8"]
    words = ["experiment=resid_mlp1", "train.steps=3", "model.training.steps=3", "eval.figures=true"]
    outcome = run(toy(*words, *small))
    assert {check["site"] for check in outcome.summary["checks"]} == {"layers.0.mlp_in", "layers.0.mlp_out"}
    assert (directory_of(outcome) / "figures" / "neuron_contributions.png").exists()


WITHOUT_KNOWN_ANSWER = {"induction_heads", "lm_tiny"}
OF_NO_OWN_MODEL = {"none", "lm_hf"}


def shipped_experiments() -> list[str]:
    with Composer.open() as composer:
        return [name for name in composer.groups()["experiment"] if name not in OF_NO_OWN_MODEL]


@pytest.mark.parametrize("experiment", shipped_experiments())
def test_every_shipped_experiment_builds(experiment: str) -> None:
    config = compose([f"experiment={experiment}", "device=cpu"])
    parts = assemble(config, untrained_target(config), torch.device("cpu"))
    if experiment in WITHOUT_KNOWN_ANSWER:
        assert parts.known is None
        return
    assert parts.known is not None
    assert set(parts.known.identity) | set(parts.known.dense) == set(parts.model.site_names)
    ties = parts.config.decomposition.tied
    assert not ties or set(ties) <= set(parts.model.site_names)


# ---- other tasks ---------------------------------------------------------------------------------------


def test_check_says_how_large_it_is_and_leaves_nothing_behind(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spd_hydra.pipeline.obtain", lambda *arguments: pytest.fail("a target was trained"))
    outcome = run(toy("task=check"))
    assert outcome.run_dir is None
    assert not (tmp_path / "runs").exists()
    # Tied: V [5, 20] and U [20, 2] once; per site 20 private MLPs of 16 hidden units.
    trainable = 20 * (5 + 2) + 2 * 20 * (3 * 16 + 1)
    assert outcome.summary["experiment"] == "tms_5-2"
    assert outcome.summary["trainable_parameters"] == trainable
    said = capsys.readouterr().out
    assert f"parameters: {trainable:,} trained, 15 frozen" in said
    for what in ("memory: ", "arithmetic: ", "time: at least "):
        assert f"\n  {what}" in said
    assert "embed: 2 x 5, C = 20" in said
    assert "unembed: 5 x 2, C = 20" in said


def test_train_target_writes_the_target_and_what_it_measured(toy: Toy) -> None:
    outcome = run(toy("task=train_target"))
    directory = directory_of(outcome)
    assert set(files(directory)) == {
        "config.yaml",
        "environment.json",
        "status.json",
        "summary.json",
        "target.safetensors",
    }
    assert outcome.summary["target"]["measurements"]
    assert read_json(directory / "status.json")["status"] == "done"


@pytest.mark.slow
def test_analysing_again_gives_the_same_summary_and_pictures(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    # with state beside the model's
    config = toy("loss.persistent_pgd_recon.coeff=0.5", "eval.figures=true")
    first = run(config)
    directory = directory_of(first)
    before = files(directory)
    for path in (directory / "figures").iterdir():
        path.unlink()
    (directory / "report.html").unlink()
    monkeypatch.setattr("spd_hydra.pipeline.obtain", lambda *arguments: pytest.fail("a target was trained"))
    again = run(dataclasses.replace(config, task=Task.analyse, run=str(directory)))
    assert again.summary == first.summary
    after = files(directory)
    assert after.keys() == before.keys()
    assert {name for name in before if before[name] != after[name]} <= {"report.html"}


@pytest.mark.slow
def test_figures_that_were_not_asked_for_are_drawn_by_a_later_analysis(toy: Toy) -> None:
    config = toy()
    directory = directory_of(run(config))
    assert not (directory / "figures").exists()
    assert "<figure" not in (directory / "report.html").read_text()
    asked = dataclasses.replace(config.eval, figures=True)
    run(dataclasses.replace(config, task=Task.analyse, run=str(directory), eval=asked))
    drawn = {path.stem for path in (directory / "figures").iterdir()}
    assert {"losses", "causal_importance", "tms_polygon"} <= drawn
    assert (directory / "report.html").read_text().count("<figure") == len(drawn)


def test_a_stopped_run_can_be_analysed(toy: Toy) -> None:
    config = toy()
    directory = directory_of(run(config))
    (directory / "summary.json").unlink()
    again = run(dataclasses.replace(config, task=Task.analyse, run=str(directory)))
    assert again.summary["steps"] == 20
    assert 0 < again.summary["seconds"]["train"] < again.summary["seconds"]["total"]
    assert again.summary["steps_per_second"] > 0
    assert (directory / "summary.json").exists()


def test_an_analysis_never_replaces_results_by_those_of_an_earlier_step(toy: Toy) -> None:
    config = toy("train.checkpoint_every=10")
    directory = directory_of(run(config))
    (directory / "checkpoints" / "step_20" / "model.safetensors").write_bytes(b"")
    before = files(directory)
    with pytest.raises(ConfigError) as caught:
        run(dataclasses.replace(config, task=Task.analyse, run=str(directory)))
    assert str(caught.value) == (
        f"run: the newest whole checkpoint of {directory} is of step 10; its summary, which would be lost, "
        f"is of step 20. Go on from the checkpoint instead: spd-run resume={directory}"
    )
    assert files(directory) == before


def test_analysing_with_other_words_for_eval_measures_anew_and_is_saved(toy: Toy) -> None:
    first = run(toy())
    directory = directory_of(first)
    words = ["task=analyse", f"run={directory}", "eval.batches=3", "eval.ci_threshold=0.9"]
    again = run(compose(words))
    saved = load_config(directory / "config.yaml")
    assert (saved.eval.batches, saved.eval.ci_threshold, saved.task) == (3, 0.9, Task.decompose)
    assert dataclasses.replace(saved, eval=toy().eval) == toy()
    assert again.summary["losses"] != first.summary["losses"]
    assert read_json(directory / "summary.json")["losses"] == again.summary["losses"]


def eval_row(directory: Path, step: int) -> dict[str, Any]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if (row["step"], row["split"]) == (step, "eval")]
    assert isinstance(row, dict)
    return row


def test_an_analysis_takes_the_place_of_the_last_row_of_the_metrics_and_of_the_reports_table(
    toy: Toy,
) -> None:
    directory = directory_of(run(toy()))
    before = eval_row(directory, 20)
    summary = run(compose(["task=analyse", f"run={directory}", "eval.batches=3"])).summary
    row = eval_row(directory, 20)
    assert row["n_positions"] == 3 * toy().eval.batch_size != before["n_positions"]
    assert row["loss/total"] == summary["losses"]["total"] != before["loss/total"]
    shown = f'<code>loss/total</code></td><td class="text">eval</td><td>{number(row["loss/total"])}</td>'
    assert shown in (directory / "report.html").read_text()


def test_metrics_of_a_plug_in_are_in_the_summary_also_of_a_run_that_was_trained_without_it(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extra, "_measures", {})
    directory = directory_of(run(toy()))
    assert read_json(directory / "summary.json")["extra"] == {}

    @extra.metric("sites")
    def count(model: DecomposedModel, evaluation: Evaluation) -> dict[str, float]:
        return {"number": len(model.site_names)}

    again = run(compose(["task=analyse", f"run={directory}"]))
    assert again.summary["extra"] == {"sites/number": 2.0} == read_json(directory / "summary.json")["extra"]
    assert eval_row(directory, 20)["sites/number"] == 2.0
    assert "sites/number" in (directory / "report.html").read_text()
    assert directory_of(run(toy())).joinpath("summary.json").read_text().count("sites/number") == 1


def test_pictures_of_an_earlier_measurement_that_are_not_drawn_again_are_removed(toy: Toy) -> None:
    directory = directory_of(run(toy()))
    (directory / "figures").mkdir()
    for name in ("losses.png", "weights.png", "mine.png"):
        (directory / "figures" / name).write_bytes(b"old")
    run(compose(["task=analyse", f"run={directory}", "eval.figures=false"]))
    assert [path.name for path in (directory / "figures").iterdir()] == ["mine.png"]


@pytest.mark.slow
def test_a_sweep_analyses_each_run_as_it_was_trained(toy: Toy, spd_run: Call) -> None:  # noqa: F811
    places = [directory_of(run(toy(f"seed={seed}"))) for seed in (3, 4)]
    ended = spd_run("-m", "task=analyse", f"run={places[0]},{places[1]}", "eval.batches=3")
    assert ended.code == 0
    found = [load_config(place / "config.yaml") for place in places]
    assert [(config.seed, config.eval.batches) for config in found] == [(3, 3), (4, 3)]
    (page,) = places[0].parent.parent.glob("sweeps/*/sweep.csv")
    rows = list(csv.DictReader(page.read_text().splitlines()))
    summaries = [read_json(place / "summary.json") for place in places]
    assert [(row["state"], row["seed"], row["run"]) for row in rows] == [
        ("done", "3", str(places[0])),
        ("done", "4", str(places[1])),
    ]
    assert [float(row["loss"]) for row in rows] == [own["losses"]["total"] for own in summaries]
    assert "missing" not in ended.out


def test_a_run_that_may_go_on_keeps_how_it_is_measured(toy: Toy) -> None:
    config = toy()
    directory = directory_of(run(config))
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=40))
    (directory / "config.yaml").write_text(to_yaml(longer))  # as of a run that was stopped half-way
    measured = dataclasses.replace(longer.eval, batches=3)
    rows = (directory / "metrics.jsonl").read_bytes()
    run(dataclasses.replace(longer, eval=measured, task=Task.analyse, run=str(directory)))
    assert load_config(directory / "config.yaml") == longer
    assert (directory / "metrics.jsonl").read_bytes() == rows


def test_analysing_a_run_as_if_it_had_been_trained_otherwise_is_refused(toy: Toy) -> None:
    directory = directory_of(run(toy()))
    other = dataclasses.replace(toy("seed=7"), task=Task.analyse, run=str(directory))
    before = (directory / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"(?s)not done with these settings:\n  seed: 0 → 7\nOnly eval"):
        run(other)
    assert (directory / "config.yaml").read_text() == before


def test_analysing_needs_a_run_with_a_checkpoint(toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run: task=analyse needs the directory of a run"):
        toy("task=analyse")
    with pytest.raises(ConfigError, match=r"run: got there, which only task=analyse reads; .*resume="):
        toy("run=there")
    with pytest.raises(ConfigError, match=f"run: {tmp_path} is no run directory: it holds no config.yaml"):
        compose(["task=analyse", f"run={tmp_path}"])
    empty = directory_of(run(toy("task=train_target")))
    with pytest.raises(ConfigError, match="holds no checkpoint yet"):
        run(compose(["task=analyse", f"run={empty}"]))


# ---- what can go wrong ---------------------------------------------------------------------------------


@pytest.mark.parametrize("often", [1, 1000])
def test_a_run_that_diverges_says_why_and_keeps_its_directory(toy: Toy, tmp_path: Path, often: int) -> None:
    with pytest.raises(RunError, match=r"not finite|the loss ") as raised:
        run(toy("train.lr=1e30", f"eval.every={often}"))
    assert "train.lr (now 1e+30)" in str(raised.value)
    (directory,) = (tmp_path / "runs" / "tms_5-2").iterdir()
    status = read_json(directory / "status.json")
    assert status["status"] == "failed"
    assert str(raised.value) in status["error"]
    assert not (directory / "summary.json").exists()


def test_a_mistake_shows_before_anything_is_made(toy: Toy, tmp_path: Path) -> None:
    config = toy()
    config.decomposition.sites["embed"].pattern = "nowhere"
    with pytest.raises(ConfigError, match="nowhere"):
        run(config)
    assert not (tmp_path / "runs").exists()


def test_an_interrupted_run_says_so_in_its_status(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("spd_hydra.pipeline.obtain", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(toy())
    (directory,) = (tmp_path / "runs" / "tms_5-2").iterdir()
    status = read_json(directory / "status.json")
    assert (status["status"], status["error"]) == ("stopped", "interrupted by the user")


def test_a_tracker_is_ended_after_the_status_is_written_and_the_job_handed_over(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end may wait for a server, longer than a scheduler does."""
    told: list[str] = []

    def requeue(number: int, frame: Any) -> None:
        told.append("handed over")
        raise SystemExit(75)

    class Slow(Logger):
        def log(self, step: int, split: str, values: dict[str, float]) -> None:
            os.kill(os.getpid(), signal.SIGUSR2)

        def finish(self, summary: dict[str, Any] | None, exit_code: int) -> None:
            (path,) = (tmp_path / "runs").glob("*/*/status.json")
            told.append(f"tracker ended as {exit_code}, status {read_json(path)['status']}")

    monkeypatch.setattr("spd_hydra.logger.files.Files.start", lambda *arguments: Slow())
    before = signal.signal(signal.SIGUSR2, requeue)
    try:
        with pytest.raises(SystemExit):
            run(toy())
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert told == ["handed over", "tracker ended as 1, status stopped"]


def test_the_status_is_running_while_it_runs(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    from spd_hydra import run as module

    def spying(config: RunConfig, directory: Any, signals: Any, trackers: Any) -> Outcome:
        seen.append(read_json(directory.path / "status.json")["status"])
        return Outcome(directory.path, {"steps": 0})

    monkeypatch.setattr(module, "decompose", spying)
    run(toy())
    assert seen == ["running"]


def test_a_gpu_that_is_not_there_is_an_error_that_says_what_to_do(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"device: got cuda.*device=cpu"):
        run(toy("device=cuda"))
    assert device_of(dataclasses.replace(toy(), device=Device.auto)) == torch.device("cpu")


def test_a_home_folder_may_be_abbreviated(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = dataclasses.replace(toy("task=train_target"), out_dir="~/mine")
    assert directory_of(run(config)).parent == tmp_path / "mine" / "tms_5-2"
