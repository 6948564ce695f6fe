"""A run that begins with what another has learned: exactly where that was, or with its parameters alone."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

from spd_hydra import pipeline
from spd_hydra.api import load_run
from spd_hydra.checkpoint import load_checkpoint
from spd_hydra.composer import Composer
from spd_hydra.composition import compose
from spd_hydra.config import RunConfig
from spd_hydra.launcher.job import begin_or_go_on
from spd_hydra.plan import make_plan
from spd_hydra.preflight import preflight
from spd_hydra.run import run
from spd_hydra.run_dir import RunDirectory
from spd_hydra.saved_config import load_config
from spd_hydra.section import ConfigError

Toy = Callable[..., RunConfig]

CADENCE = ["train.checkpoint_every=4", "train.keep_checkpoints=9", "train.log_every=2", "eval.every=4"]


def path_of(config: RunConfig) -> Path:
    path = run(config).run_dir
    assert path is not None
    return path


def assert_same_end(one: Path, other: Path, step: int) -> None:
    for name in ("model", "optimizer"):
        expected = load_file(one / "checkpoints" / f"step_{step}" / f"{name}.safetensors")
        found = load_file(other / "checkpoints" / f"step_{step}" / f"{name}.safetensors")
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(found[key], tensor), key


@pytest.fixture
def trained(toy: Toy) -> Path:
    """A run of 12 steps with a checkpoint every 4."""
    return path_of(toy("train.steps=12", *CADENCE))


@pytest.mark.parametrize(
    "lasting", [(), ("loss.persistent_pgd_recon.coeff=0.5",)], ids=["plain", "adversary"]
)
def test_with_nothing_changed_it_ends_with_the_bits_of_the_run_that_it_branches_off(
    toy: Toy, lasting: tuple[str, ...]
) -> None:
    words = ["train.steps=12", *CADENCE, *lasting]
    whole = path_of(toy(*words))
    branch = path_of(toy(*words, f"start_from={whole / 'checkpoints' / 'step_4'}"))
    assert branch != whole
    assert_same_end(whole, branch, 12)
    assert load_config(branch / "config.yaml").start_from == str(whole / "checkpoints" / "step_4")


def test_what_is_changed_takes_effect_from_the_step_of_the_checkpoint_on(toy: Toy, trained: Path) -> None:
    changed = toy(
        "train.steps=12",
        *CADENCE,
        f"start_from={trained}/checkpoints/step_8",
        "loss.importance_minimality.coeff=1",
    )
    branch = path_of(changed)
    begun, there = (load_checkpoint(path / "checkpoints" / "step_8") for path in (branch, trained))
    for key, tensor in there.tensors["model"].items():
        assert torch.equal(begun.tensors["model"][key], tensor)
    ends = [load_file(p / "checkpoints" / "step_12" / "model.safetensors") for p in (branch, trained)]
    assert any(not torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_a_run_begins_with_the_newest_checkpoint_of_one_that_has_ended_if_it_is_to_go_further(
    toy: Toy, trained: Path
) -> None:
    further = path_of(toy("train.steps=16", *CADENCE, f"start_from={trained}"))
    resumed = path_of(dataclasses.replace(toy("train.steps=16", *CADENCE), resume=str(trained)))
    assert resumed == trained
    assert_same_end(trained, further, 16)


def test_anew_it_begins_at_step_0_with_the_parameters_alone_without_warmup_and_choice(
    toy: Toy, trained: Path
) -> None:
    fresh = path_of(
        toy(
            "train.steps=4",
            *CADENCE,
            f"start_from={trained}",
            "start_anew=true",
            "train.faithfulness_warmup.steps=50",
            "train.restarts={number:3,fraction:0.5}",
            "train.lr=1e-30",
        )
    )
    begun = load_checkpoint(fresh / "checkpoints" / "step_0")
    assert not begun.tensors["optimizer"]
    expected = load_file(trained / "checkpoints" / "step_12" / "model.safetensors")
    found = load_file(fresh / "checkpoints" / "step_4" / "model.safetensors")
    for (
        key,
        tensor,
    ) in expected.items():  # with such a rate nothing moves, but in a warmup or from another start all would
        assert torch.equal(found[key], tensor), key


def test_the_target_is_that_of_the_other_run_also_with_another_seed(toy: Toy, trained: Path) -> None:
    branch = path_of(toy("train.steps=16", *CADENCE, f"start_from={trained}", "seed=5"))
    theirs, own = (load_file(path / "target.safetensors") for path in (trained, branch))
    assert theirs.keys() == own.keys()
    assert all(torch.equal(theirs[key], own[key]) for key in theirs)


def test_it_goes_on_without_the_run_that_it_began_with(toy: Toy, trained: Path) -> None:
    words = ["train.steps=16", *CADENCE]
    branch = path_of(toy(*words, f"start_from={trained}"))
    shutil.rmtree(branch / "checkpoints" / "step_16")
    (branch / "summary.json").unlink()
    expected = path_of(toy("train.steps=16", *CADENCE, f"start_from={trained}"))
    shutil.rmtree(trained)
    saved = load_config(branch / "config.yaml")
    run(dataclasses.replace(saved, resume=str(branch)), saved=saved)
    assert_same_end(expected, branch, 16)


def test_a_job_that_was_requeued_goes_on_where_it_is_and_not_where_it_began(toy: Toy, trained: Path) -> None:
    place = str(trained.parent / "job")
    config = toy("train.steps=16", *CADENCE, f"start_from={trained}")
    begin_or_go_on(config, place, None)
    expected = load_file(Path(place, "checkpoints", "step_16", "model.safetensors"))
    shutil.rmtree(Path(place, "checkpoints", "step_16"))
    Path(place, "summary.json").unlink()
    begin_or_go_on(config, place, None)
    found = load_file(Path(place, "checkpoints", "step_16", "model.safetensors"))
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_it_begins_also_if_the_other_run_removes_its_checkpoint_meanwhile(
    toy: Toy, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = path_of(toy("train.steps=16", *CADENCE, f"start_from={trained}"))
    prepare = pipeline.prepare

    def then_gone(*arguments: Any) -> Any:
        shutil.rmtree(trained)
        return prepare(*arguments)

    monkeypatch.setattr(pipeline, "prepare", then_gone)
    branch = path_of(toy("train.steps=16", *CADENCE, f"start_from={trained}"))
    assert_same_end(expected, branch, 16)
    assert not list(branch.glob(".start*"))


def test_a_begin_that_was_killed_is_begun_again_in_its_directory(
    toy: Toy, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = str(trained.parent / "job")
    config = toy("train.steps=16", *CADENCE, f"start_from={trained}")
    for at in ("write_config", "write_environment", "write_summary"):
        with monkeypatch.context() as killed:
            killed.setattr(RunDirectory, at, Mock(side_effect=KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                begin_or_go_on(config, place, None)
    assert begin_or_go_on(config, place, None).summary["steps"] == 16
    assert not list(Path(place).glob(".start*"))


def test_what_was_fetched_does_not_outlive_a_kill_right_after_the_first_checkpoint(
    toy: Toy, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = str(trained.parent / "job")
    config = toy("train.steps=16", *CADENCE, f"start_from={trained}")
    with monkeypatch.context() as killed:
        killed.setattr(pipeline, "forget_start", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            begin_or_go_on(config, place, None)
    assert Path(place, "checkpoints", "step_12").is_dir()
    assert Path(place, ".start").is_dir()
    assert begin_or_go_on(config, place, None).summary["steps"] == 16
    assert not list(Path(place).glob(".start*"))


def test_a_run_with_another_target_than_that_of_its_steps_is_none_to_begin_with(
    toy: Toy, trained: Path
) -> None:
    other = path_of(toy("train.steps=12", *CADENCE, "seed=5"))
    shutil.copyfile(other / "target.safetensors", trained / "target.safetensors")
    with pytest.raises(ConfigError, match=r"target\.safetensors: the target is not that of .*step_12"):
        run(toy("train.steps=16", *CADENCE, f"start_from={trained}"))
    with pytest.raises(ConfigError, match=r"target\.safetensors: the target is not that of step_12"):
        load_run(trained).model  # noqa: B018


def test_jobs_of_a_sweep_begin_with_one_checkpoint(toy: Toy, trained: Path) -> None:
    with Composer.open() as composer:
        words = [
            "debug=smoke",
            "model.training.batch_size=64",
            "train.steps=30",
            "seed=0,1",
            f"start_from={trained}",
        ]
        plan = make_plan(composer, words, multirun=True)
    assert [job.config.start_from for job in plan.jobs] == [str(trained / "checkpoints" / "step_12")] * 2


def test_in_a_directory_of_its_own_it_needs_the_other_run_no_more_and_takes_no_other(
    toy: Toy, trained: Path
) -> None:
    place = trained.parent / "job"
    begin_or_go_on(toy("train.steps=16", *CADENCE, f"start_from={trained}"), str(place), None)
    shutil.copytree(trained, trained.parent / "other")
    other = toy("train.steps=20", *CADENCE, f"start_from={trained.parent / 'other'}", f"run_dir={place}")
    with pytest.raises(ConfigError, match=r"another run:\n  start_from: "):
        begin_or_go_on(other, str(place), None)
    shutil.rmtree(trained)
    again = toy("train.steps=20", *CADENCE, f"start_from={trained}", f"run_dir={place}")
    assert preflight(again).config.train.steps == 20
    assert begin_or_go_on(again, str(place), None).summary["steps"] == 20


def test_a_directory_with_a_run_of_another_task_is_not_gone_on_with(toy: Toy, tmp_path: Path) -> None:
    place = str(tmp_path / "mine")
    begin_or_go_on(toy("task=train_target"), place, None)
    with pytest.raises(ConfigError, match=r"task: got decompose, but .*mine holds a run of task="):
        begin_or_go_on(toy(), place, None)


def test_of_several_replicas_one_is_named(toy: Toy, tmp_path: Path) -> None:
    several = path_of(toy("train.steps=4", *CADENCE, "train.replicas=2", "train.restarts.number=1"))
    with pytest.raises(ConfigError, match=r"has no checkpoint; take one of its replicas, e\.g\. .*/0$"):
        run(toy("train.steps=16", *CADENCE, f"start_from={several}"))
    branch = path_of(toy("train.steps=8", *CADENCE, f"start_from={several / '0'}"))
    assert load_run(branch).summary["steps"] == 8


def test_adversaries_that_last_begin_anew_where_the_loss_has_others(toy: Toy, trained: Path) -> None:
    words = ["train.steps=16", *CADENCE, f"start_from={trained}", "loss.persistent_pgd_recon.coeff=0.5"]
    branch = path_of(toy(*words))
    begun = load_checkpoint(branch / "checkpoints" / "step_12").tensors["optimizer"]
    there = load_checkpoint(trained / "checkpoints" / "step_12").tensors["optimizer"]
    assert begun.keys() == there.keys()
    assert any(
        name.startswith("adversary")
        for name in load_file(branch / "checkpoints" / "step_16" / "optimizer.safetensors")
    )


def test_it_says_what_it_begins_with_and_what_is_other_than_there(
    toy: Toy, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    path_of(toy("train.steps=16", *CADENCE, f"start_from={trained}", "train.lr=0.5"))
    out = capsys.readouterr().out
    assert (
        f"begins at step 12 with the subcomponents of {trained}/checkpoints/step_12; other than there:" in out
    )
    told = out[out.index("begins at") :].splitlines()[1:3]
    assert sorted(told) == ["  train.lr: 0.002 → 0.5", "  train.steps: 12 → 16"]
    assert "going on" not in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["start_from=nowhere"], "must be the directory of a run or one of its checkpoints"),
        (
            ["start_from={run}"],
            r"train\.steps: got 12, but .*step_12 has done 12; give more, or start_anew=true",
        ),
        (["start_from={run}/checkpoints/step_5"], r"step_5 does not exist; .* has step_4, step_8, step_12"),
        (
            [
                "start_from={run}",
                "start_anew=true",
                "decomposition.sites.embed.C=7",
                "decomposition.sites.unembed.C=7",
            ],
            r"does not fit .*:\n  ci_fn\.sites\.embed\.b_in: \(20, 16\) there, \(7, 16\) here",
        ),
        (["start_from={run}", "start_anew=true", "ci_fn=vector_mlp"], "does not fit decomposition and ci_fn"),
        (
            ["start_from={run}", "start_anew=true", "model.training.lr=0.5"],
            r"the target is that of .*, so what describes it .*:\n  model\.training\.lr: 0\.005 → 0\.5$",
        ),
    ],
)
def test_what_cannot_be_begun_with_is_refused_before_anything_is_made(
    toy: Toy, trained: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    config = toy("train.steps=12", *CADENCE, *(word.format(run=trained) for word in words))
    with pytest.raises(ConfigError, match=message):
        run(config)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_checkpoint_is_named(toy: Toy, trained: Path) -> None:
    file = trained / "checkpoints" / "step_12" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ConfigError, match=r"start_from: checkpoint .*step_12 is damaged"):
        run(toy("train.steps=16", *CADENCE, f"start_from={trained}/checkpoints/step_12"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["start_anew=true"], "start_anew: got true without start_from="),
        (["start_from=x", "train.replicas=2"], r"train\.replicas: got 2 with start_from, must be 1"),
        (["start_from=x", "task=train_target"], "start_from: got x with task=train_target"),
    ],
)
def test_a_start_that_contradicts_other_keys_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(words)
