"""Replicas: each becomes what it would be alone, whatever happens to the others."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spd_hydra.api import decompose, load_run
from spd_hydra.checkpoint import CheckpointError, load_newest, save_checkpoint, steps_of
from spd_hydra.compiling import can_compile
from spd_hydra.composition import compose
from spd_hydra.config import RunConfig, Task
from spd_hydra.finite import TrainingError
from spd_hydra.loss.objective import StepLoss
from spd_hydra.metric.evaluation import Evaluation
from spd_hydra.replica_runs import _common_checkpoints
from spd_hydra.replicas import Replicas
from spd_hydra.restarts import begin_with_best
from spd_hydra.run import RunError, run
from spd_hydra.run_dir import RunDirectory
from spd_hydra.sampler import StackedSampler
from spd_hydra.saved_config import load_config
from spd_hydra.section import ConfigError
from spd_hydra.stop import Stopped
from spd_hydra.trainer import Trainer

Toy = Callable[..., RunConfig]
Make = Callable[..., Trainer]
CASES = {
    "tied": [],
    "untied, subsets": ["decomposition=tms_5-2-untied", "loss.stochastic_recon_subset.coeff=1"],
    "rates of their own": [
        "decomposition=tms_5-2-untied",
        "decomposition.sites.embed.lr_factor=0.1",
        "decomposition.sites.unembed.lr_factor=3",
    ],
    "paper": ["experiment=paper/tms_5-2", "train.faithfulness_warmup.steps=0"],
    "annealed, clipped": [
        "loss.importance_minimality={p_end:0.5,squeeze:3.0,squeeze_from:0.3,squeeze_to:0.6}",
        "train.clip_components=0.01",
        "train.clip_ci_fn=0.02",
    ],
    "identity, shared_mlp": ["experiment=tms_5-2-id", "ci_fn=shared_mlp", "ci_fn.hidden=[8]"],
    "an identity, which runs before the module that it comes after": [
        "+decomposition.identities.out={pattern: unembed, C: 4}"
    ],
    "frequency, vector_mlp": ["ci_fn=vector_mlp", "loss.importance_minimality.beta=0.5"],
    "global_mlp": ["experiment=tms_5-2-id", "ci_fn=global_mlp", "ci_fn.hidden=[8]"],
    "global_transformer": [
        "ci_fn=global_transformer",
        "ci_fn.d_model=8",
        "ci_fn.n_heads=2",
        "ci_fn.n_layers=1",
        "ci_fn.d_mlp=8",
    ],
    "adversary": [
        "loss.pgd_recon.coeff=1",
        "loss.stochastic_recon.coeff=0",
        "loss.stochastic_recon_layerwise.coeff=0",
    ],
    "adversaries": [
        "loss.pgd_recon={coeff:1.0,n_steps:2,step_size:0.4}",
        "loss.pgd_recon_layerwise={coeff:0.5,scope:per_datapoint,start:zeros}",
        "loss.pgd_recon_subset={coeff:0.5,scope:per_datapoint}",
    ],
    "attention on tokens, KL": [
        "experiment=induction_heads",
        "model.n_tokens=6",
        "model.length=8",
        "train.batch_size=4",
        "eval.batch_size=4",
        "ci_fn.hidden=[4]",
    ],
    "residual": [
        "experiment=resid_mlp1",
        "model.d_embed=20",
        "decomposition.sites.mlp_in.C=7",
        "decomposition.sites.mlp_out.C=6",
    ],
}


def together(make: Make, *words: str, seeds: range = range(3)) -> tuple[list[Trainer], Replicas]:
    trainers = [make(*words, f"seed={seed}") for seed in seeds]
    return trainers, Replicas(trainers)


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.model.trainable_state().items()}


def losses(trainer: Trainer) -> list[float]:
    return [row["loss/total"] for row in trainer.run.read_metrics() if row["split"] == "train"]


def train_l0(trainer: Trainer) -> list[dict[str, float]]:
    rows = [row for row in trainer.run.read_metrics() if row["split"] == "train"]
    return [{key: row[key] for key in row if key.startswith("l0/")} for row in rows]


def assert_close(own: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert own.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(own[name], value, rtol=1e-4, atol=1e-5)


def test_their_step_is_compiled_as_a_whole_also_where_one_alone_would_compile_blocks(make: Make) -> None:
    words = [*CASES["attention on tokens, KL"], "train.compile=true", "train.compile_blocks=true"]
    trainers = [make(*words, f"seed={seed}") for seed in range(2)]
    assert (trainers[0].model.compiled_blocks is not None) == can_compile("cpu")
    Replicas(trainers)
    assert all(trainer.model.compiled_blocks is None for trainer in trainers)


@pytest.mark.parametrize("words", CASES.values(), ids=CASES.keys())
def test_each_becomes_what_it_would_be_alone(make: Make, words: list[str]) -> None:
    trainers, replicas = together(make, *words)
    results = replicas.fit()
    for seed, (trainer, result) in enumerate(zip(trainers, results, strict=True)):
        alone = make(*words, f"seed={seed}")
        alone.fit()
        assert isinstance(result, Evaluation)
        assert_close(weights(trainer), weights(alone))
        assert losses(trainer) == pytest.approx(losses(alone), rel=1e-4)
        for own, wanted in zip(train_l0(trainer), train_l0(alone), strict=True):
            assert own == pytest.approx(wanted, abs=0.02)
        moments = trainer.state()[1], alone.state()[1]
        assert moments[0].keys() == moments[1].keys()
        for name, value in moments[1].items():
            torch.testing.assert_close(moments[0][name], value, rtol=1e-3, atol=1e-6)
        last, last_alone = trainer.run.read_metrics()[-1], alone.run.read_metrics()[-1]
        assert last.keys() == last_alone.keys()
    assert losses(trainers[0]) != losses(trainers[1])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["tied", "residual", "adversary"])
def test_compiled_replicas_become_what_they_would_be_alone(make: Make, case: str) -> None:
    words = [*CASES[case], "train.compile=true"]
    trainers, replicas = together(make, *words, seeds=range(2))
    replicas.fit()
    for seed, trainer in enumerate(trainers):
        alone = make(*words, f"seed={seed}")
        alone.fit()
        assert_close(weights(trainer), weights(alone))


def test_each_draws_what_it_would_draw_alone(make: Make) -> None:
    trainers = [make(f"seed={seed}") for seed in (3, 8)]
    batch, draws = StackedSampler([trainer.sampler for trainer in trainers], compile=False)(5)
    for number, trainer in enumerate(trainers):
        own_batch, own_draws = trainer.sampler(5)
        assert torch.equal(batch[number], own_batch)
        assert torch.equal(draws[number], own_draws)


def break_at(trainer: Trainer) -> None:
    with torch.no_grad():
        next(iter(trainer.updates.components)).fill_(torch.nan)


def test_one_that_breaks_drops_out_and_the_others_never_know(make: Make) -> None:
    whole, replicas = together(make)
    replicas.fit()
    trainers, replicas = together(make)
    break_at(trainers[1])
    results = replicas.fit()
    assert isinstance(results[1], TrainingError)
    assert "the loss is nan at step 0" in str(results[1])
    assert losses(trainers[1]) == []
    assert load_newest(trainers[1].run.checkpoints) is None
    for number in (0, 2):
        assert losses(trainers[number]) == losses(whole[number])
        assert all(
            torch.equal(value, weights(whole[number])[n]) for n, value in weights(trainers[number]).items()
        )


def test_one_whose_weights_overflow_before_it_is_measured_drops_out_alone(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, replicas = together(make, "eval.every=4")
    expected = replicas.fit()
    trainers, replicas = together(make, "eval.every=4")
    take = replicas._update

    def overflowing() -> None:
        take()
        if replicas.step == 3:
            break_at(trainers[1])

    monkeypatch.setattr(replicas, "_update", overflowing)
    results = replicas.fit()
    assert "the weights are not finite after step 4" in str(results[1])
    for number in (0, 2):
        result, wanted = results[number], expected[number]
        assert isinstance(result, Evaluation)
        assert isinstance(wanted, Evaluation)
        assert result.metrics == wanted.metrics
    assert load_newest(trainers[1].run.checkpoints) is None
    assert losses(trainers[0]) == losses(whole[0])


def test_initialisations_that_break_change_nothing_for_the_others(make: Make) -> None:
    words = ("train.restarts.number=4", "train.restarts.fraction=0.3")

    def begun(*broken: int) -> list[Trainer]:
        """Two trainers after the choice; of the second one these initialisations are broken."""
        trainers, replicas = together(make, *words, seeds=range(2))
        for trainer in trainers:
            trainer.evaluate = lambda step: Evaluation(
                step=step, n_positions=1, ci_threshold=0.1, metrics={"loss/total": 1.0}, sites={}
            )
        first = [weights(trainer) for trainer in trainers]

        def initial(trainer: int) -> Callable[[int], dict[str, Tensor]]:
            def state(number: int) -> dict[str, Tensor]:
                factor = torch.nan if trainer == 1 and number in broken else 1 + number / 10
                return {name: value * factor for name, value in first[trainer].items()}

            return state

        errors = begin_with_best(replicas, [initial(0), initial(1)])
        assert [error is not None for error in errors] == [False, broken == (0, 1, 2, 3)]
        replicas.leave_out({number: error for number, error in enumerate(errors) if error is not None})
        replicas.fit()
        return trainers

    whole = begun()[0].state()
    for broken in [(0,), (0, 1, 2), (0, 1, 2, 3)]:
        for own, wanted in zip(begun(*broken)[0].state(), whole, strict=True):
            assert own.keys() == wanted.keys()
            assert all(torch.equal(value, wanted[name]) for name, value in own.items())


@pytest.mark.parametrize("at", [2, 3, 5])  # in the middle of a part, at its end, in the middle of the last
def test_a_choice_that_is_stopped_is_gone_on_with_to_the_same_bits(make: Make, at: int) -> None:
    """Of the second one an initialisation breaks."""

    def begun(run: RunDirectory | None, stop_at: int) -> tuple[list[Trainer], list[int]]:
        words = ("train.restarts.number=2", "train.restarts.fraction=0.5")
        trainers, replicas = together(make, *words, seeds=range(2))
        first = [weights(trainer) for trainer in trainers]
        taken: list[int] = []
        take_step = replicas.train_step

        def step() -> Any:
            taken.append(replicas.step)
            if len(taken) == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return take_step()

        def initial(trainer: int) -> Callable[[int], dict[str, Tensor]]:
            def state(number: int) -> dict[str, Tensor]:
                factor = torch.nan if (trainer, number) == (1, 0) else 1 + number / 10
                return {name: value * factor for name, value in first[trainer].items()}

            return state

        replicas.train_step = step  # type: ignore[method-assign]
        run = trainers[0].run if run is None else run
        runs[:] = [run]
        with pytest.raises(Stopped) if stop_at else contextlib.nullcontext():
            assert begin_with_best(replicas, [initial(0), initial(1)], directory=run) == [None, None]
        return trainers, taken

    runs: list[RunDirectory] = []
    whole, all_steps = begun(None, 0)
    _, before = begun(None, at)
    assert len(before) == at
    trainers, after = begun(runs[0], 0)
    assert at + len(after) == len(all_steps)
    for own, wanted in zip(trainers, whole, strict=True):
        assert own.facts == wanted.facts
        for state, wanted_state in zip(own.state(), wanted.state(), strict=True):
            assert state.keys() == wanted_state.keys()
            assert all(torch.equal(value, wanted_state[name]) for name, value in state.items())
        assert losses(own) == losses(wanted)
        assert load_newest(own.run.checkpoints) is not None
    assert not (runs[0].path / "restarts").exists()


def test_when_all_break_no_further_step_is_taken(make: Make) -> None:
    trainers, replicas = together(make)
    for trainer in trainers:
        break_at(trainer)
    assert all(isinstance(result, TrainingError) for result in replicas.fit())
    assert replicas.step == 1


def test_each_chooses_among_its_own_initialisations(make: Make) -> None:
    words = ("train.restarts.number=2", "train.restarts.fraction=0.5")
    trainers, replicas = together(make, *words, seeds=range(2))
    first = [weights(trainer) for trainer in trainers]

    def initial(number_of_trainer: int) -> Callable[[int], dict[str, Tensor]]:
        return lambda number: {k: v * (1 + number / 10) for k, v in first[number_of_trainer].items()}

    measured = [iter([2.0, 1.0]), iter([1.0, 2.0])]
    for trainer, own in zip(trainers, measured, strict=True):
        trainer.evaluate = lambda step, own=own: Evaluation(  # type: ignore[misc]
            step=step, n_positions=1, ci_threshold=0.1, metrics={"loss/total": next(own)}, sites={}
        )
    assert begin_with_best(replicas, [initial(0), initial(1)]) == [None, None]
    assert [trainer.facts["restarts"]["chosen"] for trainer in trainers] == [1, 0]
    for chosen, trainer in zip([1, 0], trainers, strict=True):
        trainer.evaluate = lambda step: Evaluation(
            step=step, n_positions=1, ci_threshold=0.1, metrics={"loss/total": 0.0}, sites={}
        )
        assert trainer.step == 3, chosen
    replicas.fit()
    for seed, (chosen, trainer) in enumerate(zip([1, 0], trainers, strict=True)):
        alone = make(f"seed={seed}")
        alone.set_state({k: v * (1 + chosen / 10) for k, v in first[seed].items()}, {}, step=0)
        alone.fit()
        assert_close(weights(trainer), weights(alone))


# ---- runs ----------------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_every_replica_leaves_a_run_that_opens_alone(toy: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run(toy("train.replicas=2", "seed=5"))
    assert outcome.run_dir is not None
    assert "job  setting" in capsys.readouterr().out
    for number in range(2):
        opened = load_run(outcome.run_dir / str(number))
        assert (opened.config.seed, opened.config.train.replicas) == (5 + number, 1)
        assert opened.status["status"] == "done"
        assert opened.steps == [10, 20]
        assert (opened.summary["seed"], opened.summary["replicas"]) == (5 + number, 2)
        alone = decompose(dataclasses.replace(opened.config, out_dir=str(outcome.run_dir.parent / "alone")))
        assert_close(opened.model.trainable_state(), alone.model.trainable_state())
        assert opened.summary["losses"] == pytest.approx(alone.summary["losses"], rel=1e-3)
        assert opened.summary["target"]["seed"] == alone.summary["target"]["seed"]
    assert outcome.summary["replicas"] == 2
    assert outcome.summary["objective"] == pytest.approx(
        sum(read(outcome.run_dir / str(n) / "summary.json")["objective"] for n in range(2)) / 2
    )
    assert (outcome.run_dir / "sweep.csv").exists()
    with pytest.raises(ConfigError, match=r"holds 2 replicas, each of them a run: take .*/0 … .*/1"):
        load_run(outcome.run_dir)
    with pytest.raises(ConfigError, match=r"holds 2 replicas"):
        run(compose(["task=analyse", f"run={outcome.run_dir}"]))
    one = load_run(outcome.run_dir / "1")
    measured_again = dataclasses.replace(one.config, task=Task.analyse, run=str(outcome.run_dir / "1"))
    again = run(measured_again).summary
    kept = ("replicas", "seconds", "steps_per_second", "losses")
    assert [again[key] for key in kept] == [one.summary[key] for key in kept]
    assert "MMCS" in capsys.readouterr().out


class Killed(BaseException):
    """Ends a run as a signal that cannot be heard does."""


@pytest.mark.parametrize("moment", [(13, 0), (10, 1), (20, 1)])
def test_replicas_that_are_killed_and_resumed_end_with_the_same_bits(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, moment: tuple[int, int]
) -> None:
    """Killed before replica n records a step: at steps with a checkpoint, between the checkpoints of two."""
    whole = run(toy("train.replicas=2")).run_dir
    record = Trainer.record

    def killed(self: Trainer, loss: StepLoss) -> Evaluation | None:
        if (self.step, int(self.run.path.name)) == moment:
            raise Killed
        return record(self, loss)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "record", killed)
        config = toy("train.replicas=2")
        with pytest.raises(Killed):
            run(config)
    assert whole is not None
    broken = max(whole.parent.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert broken != whole
    resumed = dataclasses.replace(load_config(broken / "config.yaml"), resume=str(broken))
    assert run(resumed, saved=load_config(broken / "config.yaml")).run_dir == broken
    for number in ("0", "1"):
        own, wanted = (load_newest(path / number / "checkpoints") for path in (broken, whole))
        assert own is not None
        assert wanted is not None
        assert own.step == wanted.step == 20
        for group in ("model", "optimizer"):
            assert own.tensors[group].keys() == wanted.tensors[group].keys()
            assert all(
                torch.equal(value, wanted.tensors[group][k]) for k, value in own.tensors[group].items()
            )
        rows = [
            [row for row in load_run(path / number).metrics if row["split"] == "train"]
            for path in (broken, whole)
        ]
        assert rows[0] == rows[1]


@pytest.mark.parametrize("at", [4, 12])
def test_after_one_dropped_out_the_others_are_resumed(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Replica 1 breaks before or after its first checkpoint, and all are killed later."""
    alone = run(toy("seed=0")).run_dir
    assert alone is not None
    record = Trainer.record

    def spoiled(self: Trainer, loss: StepLoss) -> Evaluation | None:
        if self.run.path.name == "1" and self.step == at:
            break_at(self)
        if self.run.path.name == "0" and self.step == 17:
            raise Killed
        return record(self, loss)

    config = toy("train.replicas=2", "train.checkpoint_every=5")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "record", spoiled)
        with pytest.raises(Killed):
            run(config)
    (broken,) = (path for path in (Path(config.out_dir) / config.name).iterdir() if path != alone)
    saved = load_config(broken / "config.yaml")
    with pytest.raises(RunError, match=rf"1 of 2 replicas failed; replica 1: the loss is nan at step {at}"):
        run(dataclasses.replace(saved, resume=str(broken)), saved=saved)
    opened = load_run(broken / "0")
    assert (opened.status["status"], opened.summary["steps"]) == ("done", 20)
    assert_close(opened.model.trainable_state(), load_run(alone).model.trainable_state())


def test_a_replica_that_has_gone_on_alone_is_never_set_back(toy: Toy) -> None:
    group = run(toy("train.replicas=2")).run_dir
    assert group is not None
    own = load_config(group / "0" / "config.yaml")
    longer = dataclasses.replace(own.train, steps=30)
    run(dataclasses.replace(own, resume=str(group / "0"), train=longer), saved=own)
    saved = load_config(group / "config.yaml")
    between = dataclasses.replace(saved, resume=str(group), train=dataclasses.replace(saved.train, steps=25))
    with pytest.raises(ConfigError, match=r"^train.steps: got 25, but the run has done 30; "):
        run(between, saved=saved)
    assert load_run(group / "0").steps[-1] == 30
    assert load_run(group / "0").summary["steps"] == 30


@pytest.mark.parametrize("kept", [2, 10])
def test_a_group_of_which_one_has_gone_on_alone_is_refused_and_nothing_is_changed(
    toy: Toy, kept: int
) -> None:
    """With more checkpoints kept there is a step that all have, and the later ones were removed once."""
    words = ("train.replicas=2", f"train.keep_checkpoints={kept}", "train.checkpoint_every=10")
    group = run(toy(*words)).run_dir
    assert group is not None
    own = load_config(group / "0" / "config.yaml")
    longer = dataclasses.replace(own.train, steps=50)
    run(dataclasses.replace(own, resume=str(group / "0"), train=longer), saved=own)
    before = files(group)
    saved = load_config(group / "config.yaml")
    all_on = dataclasses.replace(saved, resume=str(group), train=dataclasses.replace(saved.train, steps=80))
    with pytest.raises(ConfigError, match=rf"replica 0 has gone on alone to step 50; .*resume={group}/0$"):
        run(all_on, saved=saved)
    assert files(group) == before
    assert load_run(group / "0").steps == ([40, 50] if kept == 2 else [10, 20, 30, 40, 50])


def test_replicas_that_each_went_on_alone_to_the_same_step_go_on_together(toy: Toy) -> None:
    group = run(toy("train.replicas=2")).run_dir
    assert group is not None
    for number in ("0", "1"):
        own = load_config(group / number / "config.yaml")
        longer = dataclasses.replace(own.train, steps=30)
        run(dataclasses.replace(own, resume=str(group / number), train=longer), saved=own)
    saved = load_config(group / "config.yaml")
    all_on = dataclasses.replace(saved, resume=str(group), train=dataclasses.replace(saved.train, steps=40))
    assert run(all_on, saved=saved).summary["steps"] == 40


def files(directory: Path) -> dict[str, bytes]:
    """Every file but the locks, which say who held them last."""
    found = [path for path in directory.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path): path.read_bytes() for path in found}


def test_checkpoints_that_only_some_have_are_removed_before_they_go_on(tmp_path: Path) -> None:
    directories = [RunDirectory.create(tmp_path, "replica") for _ in range(2)]
    for own, steps in zip(directories, [(4, 8, 9), (4, 8)], strict=True):
        for step in steps:
            save_checkpoint(own.checkpoints, step, {"model": {"w": torch.ones(2)}}, {"step": step}, 3)
    assert [found.step for found in _common_checkpoints(directories) if found] == [8, 8]
    assert [steps_of(own.checkpoints) for own in directories] == [[4, 8], [4, 8]]
    (directories[0].checkpoints / "step_8" / "model.safetensors").write_bytes(b"damaged")
    assert [found.step for found in _common_checkpoints(directories) if found] == [4, 4]
    shutil.rmtree(directories[1].checkpoints)
    save_checkpoint(directories[0].checkpoints, 6, {"model": {"w": torch.ones(2)}}, {"step": 6}, 3)
    with pytest.raises(CheckpointError, match="no step of which all have a whole checkpoint"):
        _common_checkpoints(directories)
    for own in directories:
        own.close()


def test_a_replica_that_fails_says_so_and_the_others_have_their_results(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = Replicas.fit

    def broken(self: Replicas) -> list[Evaluation | TrainingError]:
        break_at(self.trainers[1])
        return fit(self)

    monkeypatch.setattr(Replicas, "fit", broken)
    config = toy("train.replicas=2", "train.faithfulness_warmup.steps=0")
    with pytest.raises(RunError, match="1 of 2 replicas failed; replica 1: the loss is nan at step 0"):
        run(config)
    (directory,) = (Path(config.out_dir) / config.name).iterdir()
    assert read(directory / "status.json")["status"] == "failed"
    assert [read(directory / n / "status.json")["status"] for n in ("0", "1")] == ["done", "failed"]
    assert load_run(directory / "0").summary["steps"] == 20


def test_what_replicas_cannot_do_is_refused(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match=r"train.keep_checkpoints: got 1, must be ≥ 2 with train.replicas=2"
    ):
        toy("train.replicas=2", "train.keep_checkpoints=1")
    with pytest.raises(ConfigError, match=r"train.replicas: got 2 with 3 ranks; replicas share one process"):
        toy("train.replicas=2", "launcher.ranks_per_node=3")
    monkeypatch.setenv("WORLD_SIZE", "4")  # as torchrun does
    with pytest.raises(ConfigError, match=r"train.replicas: got 2 with 4 ranks; replicas share one process"):
        toy("train.replicas=2")
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(ConfigError, match=r"train.replicas: got 2, but decompose\(\) returns one run"):
        decompose(toy("train.replicas=2"))
