"""A run directory opened from Python: its numbers, and the model at any checkpoint."""

import dataclasses
import re
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import spd_hydra
from spd_hydra import decompose, load_run
from spd_hydra.api import Run, submit
from spd_hydra.config import RunConfig
from spd_hydra.loss.recon import Recon
from spd_hydra.result import Outcome
from spd_hydra.run_dir import RunDirectoryError
from spd_hydra.section import ConfigError

Toy = Callable[..., RunConfig]


@pytest.fixture
def done(toy: Toy) -> Run:
    """20 steps with checkpoints at 10 and 20."""
    return decompose(toy())


def test_numbers_are_those_of_the_files(done: Run) -> None:
    assert done.status["status"] == "done"
    assert done.summary["steps"] == 20
    assert {row["step"] for row in done.metrics if row["split"] == "eval"} == {10, 20}
    assert done.steps == [10, 20]


@pytest.mark.parametrize("step", [10, 20])
def test_the_model_at_a_step_has_the_weights_of_its_checkpoint(done: Run, step: int) -> None:
    saved = load_file(done.path / "checkpoints" / f"step_{step}" / "model.safetensors")
    found = done.model_at(step).trainable_state()
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], saved[name]) for name in saved)


def test_the_model_is_the_newest_and_gives_outputs_and_causal_importances(done: Run) -> None:
    newest = done.model_at(20).trainable_state()
    assert all(torch.equal(done.model.trainable_state()[name], value) for name, value in newest.items())
    batch = torch.rand(3, 5)
    torch.testing.assert_close(done.model(batch), done.model.target(batch))
    assert done.model.causal_importances(batch)["embed"].lower.shape == (3, 20)


def test_a_step_without_a_checkpoint_is_named_with_those_that_exist(done: Run) -> None:
    with pytest.raises(ConfigError, match=re.escape("step: got 15;") + r".*steps \[10, 20\]"):
        done.model_at(15)


def test_a_run_without_a_checkpoint_says_so(toy: Toy) -> None:
    run = decompose(toy("task=train_target"))
    with pytest.raises(RunDirectoryError, match="holds no checkpoint yet"):
        _ = run.model


@pytest.mark.parametrize("task", ["decompose", "train_target"])
def test_what_only_building_shows_is_refused_before_anything_is_trained_or_made(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    monkeypatch.setattr("spd_hydra.pipeline.obtain", lambda *arguments: pytest.fail("a target was trained"))
    config = toy(f"task={task}", "decomposition.sites.embed.pattern=embedd")  # compose builds nothing
    with pytest.raises(ConfigError, match=r"sites\.embed\.pattern: 'embedd' .*Did you mean 'embed'\?"):
        decompose(config)
    assert not (tmp_path / "runs").exists()


def test_a_run_is_measured_again_with_its_own_configuration_and_other_words_for_eval(done: Run) -> None:
    before = done.summary
    again = decompose(["task=analyse", f"run={done.path}", "eval.batches=3"])
    assert again.path == done.path
    assert again.config == dataclasses.replace(
        done.config, eval=dataclasses.replace(done.config.eval, batches=3)
    )
    assert again.summary["steps"] == before["steps"] == 20
    assert again.summary["losses"] != before["losses"]


def test_a_run_goes_on_with_its_own_configuration(done: Run) -> None:
    longer = decompose([f"resume={done.path}", "train.steps=30"])
    assert longer.path == done.path
    assert longer.summary["steps"] == 30
    steps = dataclasses.replace(done.config.train, steps=30)
    assert longer.config == dataclasses.replace(done.config, train=steps)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task=analyse", "run={run}", "seed=7"], "takes task, run, eval, device, .* only; leave out seed=7"),
        (["resume={run}", "seed=7"], r"(?s)would make it another run:\n  seed: 0 → 7\nOnly train\.steps"),
        (["task=analyse", "run={run}/checkpoints"], "run: .*checkpoints is no run directory"),
        (["resume={run}/checkpoints"], "resume: .*checkpoints is no run directory"),
    ],
)
def test_from_python_too_a_saved_run_stays_what_it_is(done: Run, words: list[str], message: str) -> None:
    before = (done.path / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=message):
        decompose([word.format(run=done.path) for word in words])
    assert (done.path / "config.yaml").read_text() == before


@pytest.mark.parametrize(
    ("task", "instead"),
    [
        ("check", "call spd_hydra.run.run(config), or spd-run task=check"),
        ("prefetch", "call spd_hydra.run.run(config), or spd-run task=prefetch"),
        ("sweep_status", "call spd-run task=sweep_status sweep=<directory>"),
    ],
)
def test_a_task_that_leaves_no_run_to_open_is_refused_before_it_is_done(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, task: str, instead: str
) -> None:
    monkeypatch.setattr("spd_hydra.api.run", lambda config: pytest.fail("it was done"))
    with pytest.raises(ConfigError) as caught:
        decompose(toy(f"task={task}"))
    assert str(caught.value) == (
        f"task: got {task}, which makes no run directory that decompose() could return; {instead}"
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train.steps": -3}, "train.steps: got -3, must be ≥ 1"),
        ({"train.lr": -1.0}, "train.lr: got -1.0, must be > 0"),
        ({"train.steps": "5"}, "train.steps: got '5', must be 5"),
        ({"train.steps": 5.0}, "train.steps: got 5.0, must be a whole number ≥ 1"),
        ({"decomposition.C": 0}, "decomposition.C: got 0, must be ≥ 1"),
        (
            {"decomposition.sigmoid": "foo"},
            "decomposition.sigmoid: got 'foo', must be one of leaky_hard, leaky_hard_paper, hard, sigmoid",
        ),
        (
            {"decomposition.sigmoid": "leaky_hard"},
            "decomposition.sigmoid: got 'leaky_hard', must be Sigmoid.leaky_hard",
        ),
        ({"decomposition.tied": {"a": 1}}, "decomposition.tied: got {'a': 1}, must be {'a': '1'}"),
        (
            {"decomposition.sites": {"a": 5}},
            "decomposition.sites: got {'a': 5}, must be a dict of SitePattern by name",
        ),
        ({"model": "tms"}, "model: got 'tms', must be a TargetSpec"),
        ({"name": "${oc.env:HOME}"}, "name: got '${oc.env:HOME}', must be a value, not a reference"),
        (
            {"loss.extra": {"mine": Recon(coeff=1.0)}},  # of a class that no group has
            "the configuration could not be read back from its directory: Key 'routing' not in 'Loss'",
        ),
        (  # what is not saved too, and all at once
            {"train.lr": "a", "seed": None, "trust_remote_code": 1},
            "seed: got null, must be a whole number ≥ 0\n"
            "trust_remote_code: got 1, must be True\n"
            "train.lr: got 'a', must be a number > 0",
        ),
        (
            {"train.lr": 0.0, "seed": -1},
            "seed: got -1, must be ≥ 0\ntrain.lr: got 0.0, must be > 0",
        ),
    ],
)
def test_what_was_set_in_python_is_refused_before_anything_is_made(
    toy: Toy, tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    config = toy()
    for key, value in values.items():
        section, _, name = f"config.{key}".rpartition(".")
        setattr(attrgetter(section)(SimpleNamespace(config=config)), name, value)
    with pytest.raises(ConfigError) as caught:
        decompose(config)
    assert str(caught.value) == message
    assert not (tmp_path / "runs").exists()


def test_what_was_set_in_python_counts_as_if_it_had_been_typed(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[RunConfig] = []

    def begin(config: RunConfig) -> Outcome:
        started.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr("spd_hydra.api.run", begin)
    config = toy()
    config.train.lr = 1  # a whole number is a number
    config.target_steps = 7
    with pytest.raises(KeyboardInterrupt):
        decompose(config)
    assert started == [toy("train.lr=1", "target_steps=7")]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path))):
        load_run(tmp_path)


def test_for_a_folder_of_runs_these_are_named(done: Run, tmp_path: Path) -> None:
    folder = done.path.parent
    with pytest.raises(ConfigError) as caught:
        load_run(folder)
    assert str(caught.value) == (
        f"{folder} is no run directory: it holds runs, {done.path.name}: take one of them, e.g. {done.path}"
    )


def test_the_package_lists_what_may_be_called() -> None:
    names = [name for name in dir(spd_hydra) if not name.startswith("_")]
    assert names == ["JobFailed", "Run", "Sweep", "compose", "decompose", "load_run", "load_sweep", "submit"]


def test_where_there_is_no_slurm_submit_says_so_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="launcher=slurm: found no sbatch or srun or squeue here"):
        submit(["debug=smoke", f"out_dir={tmp_path / 'runs'}", "seed=0,1"], gpus=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"partitoin": "gpu"}, "launcher.partitoin: there is no such key; did you mean launcher.partition?"),
        ({"time": "soon"}, "launcher.time: got soon, must be minutes, mm:ss, hh:mm:ss, d-hh or d-hh:mm:ss"),
        ({"nodes": 0}, "launcher.nodes: got 0, must be ≥ 1"),
        (
            {"dry_run": True},
            "launcher.dry_run: got true, but submit() submits; look at the script with spd-run",
        ),
        ({"additional": {"mem": "1G"}}, "launcher.additional.mem: has a key of its own: launcher.memory"),
        ({"setup": ["export HF_TOKEN=abcdefgh4711"]}, "launcher.setup: looks like a secret"),
    ],
)
def test_options_of_submit_are_checked_as_on_the_command_line(
    options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spd_hydra.launcher.slurm.require_sbatch", lambda: None)
    with pytest.raises(ConfigError) as caught:
        submit(["debug=smoke", f"out_dir={tmp_path / 'runs'}"], **options)
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_submit_wants_a_list_of_texts_and_says_so_once() -> None:
    with pytest.raises(ConfigError) as caught:
        submit("debug=smoke")
    assert str(caught.value) == (
        "overrides: got 'debug=smoke', must be a list of texts, e.g. submit(['debug=smoke'])"
    )
