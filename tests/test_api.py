"""A run directory opened from Python: its numbers, and the model at any checkpoint."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spd_hydra import decompose, load_run
from spd_hydra.api import Run, submit
from spd_hydra.config import RunConfig
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


def test_a_check_leaves_no_run_to_open(toy: Toy) -> None:
    with pytest.raises(ConfigError, match="task: got check, which makes no run directory"):
        decompose(toy("task=check"))


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path))):
        load_run(tmp_path)


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
