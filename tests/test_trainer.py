"""The training loop: schedule, clipping, warmup, cadence, and how it stops."""

import dataclasses
import json
import math
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from benchmarks.lm_cases import LanguageModel, config
from benchmarks.step_cases import trainer_of
from torch import Tensor

from spd_hydra.checkpoint import load_newest
from spd_hydra.config import RunConfig
from spd_hydra.finite import TrainingError
from spd_hydra.loss.base import Loss, LossInputs, Statistics
from spd_hydra.metric.evaluation import Evaluation
from spd_hydra.stop import Stopped
from spd_hydra.trainer import Trainer

Toy = Callable[..., RunConfig]
Make = Callable[..., Trainer]
STEPS = 6


@dataclasses.dataclass(kw_only=True)
class Breaks(Loss):
    """0, until a fraction of training is done; from then on a loss or a gradient that is not finite."""

    loss_at: float = 2.0
    gradient_at: float = 2.0

    def scheduled(self, progress: float) -> dict[str, float]:
        loss = math.nan if progress >= self.loss_at else 0.0
        return {"loss": loss, "under_root": 0.0 if progress >= self.gradient_at else 1.0}

    def statistics(self, inputs: LossInputs) -> Statistics:
        site = inputs.model.site_names[0]
        nothing = 0 * inputs.model.pieces(site).V.square().sum()
        root = (inputs.schedule["under_root"] + nothing).sqrt() - inputs.schedule["under_root"]
        return {"sum": root + inputs.schedule["loss"], "count": torch.ones(())}


def rows(trainer: Trainer, split: str = "train") -> list[dict[str, Any]]:
    return [row for row in trainer.run.read_metrics() if row["split"] == split]


def values(parameters: Any) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def saved_steps(trainer: Trainer) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in trainer.run.checkpoints.glob("step_*"))


def first_gradients(trainer: Trainer) -> dict[str, float]:
    """Norms of the gradients that the optimiser saw in its first step: its mean is a tenth of them."""
    norms = {}
    for part, parameters in [("components", trainer.updates.components), ("ci_fn", trainer.updates.ci_fn)]:
        means = [trainer.updates.optimizer.state[p]["exp_avg"] * 10 for p in parameters]
        norms[part] = float(torch.cat([mean.flatten() for mean in means]).norm())
    return norms


# ---- one step ------------------------------------------------------------------------------------------


def test_the_learning_rate_follows_the_schedule_step_by_step(make: Make) -> None:
    trainer = make("train.lr=0.01", "train.lr_schedule.kind=cosine", "train.lr_schedule.final_fraction=0.1")
    trainer.fit()
    expected = [0.01 * (0.1 + 0.9 * (1 + math.cos(math.pi * t / (STEPS - 1))) / 2) for t in range(STEPS)]
    assert [row["lr"] for row in rows(trainer)] == pytest.approx(expected)


def test_the_first_update_moves_by_the_learning_rate(make: Make) -> None:
    # Adam's first step is lr · g / (|g| + 1e-8): at most lr, and nearly that where |g| is not tiny.
    trainer = make("train.lr=0.003", "train.lr_schedule.kind=constant")
    before = values(trainer.updates.components + trainer.updates.ci_fn)
    trainer.train_step()
    after = values(trainer.updates.components + trainer.updates.ci_fn)
    moved = [float((new - old).abs().max()) for new, old in zip(after, before, strict=True)]
    assert max(moved) == pytest.approx(0.003, rel=1e-3)


def test_a_site_may_have_a_learning_rate_of_its_own(make: Make) -> None:
    trainer = make(
        "decomposition=tms_5-2-untied", "decomposition.sites.unembed.lr_factor=0.25", "train.lr=0.004",
        "train.lr_schedule.kind=constant",
    )  # fmt: skip
    parameters = {name: trainer.model.pieces(name) for name in ("embed", "unembed")}
    before = {name: values(own.parameters()) for name, own in parameters.items()} | {
        "ci_fn": values(trainer.updates.ci_fn)
    }
    trainer.train_step()
    after = {name: values(own.parameters()) for name, own in parameters.items()} | {
        "ci_fn": values(trainer.updates.ci_fn)
    }
    moved = {
        name: max(float((new - old).abs().max()) for new, old in zip(after[name], before[name], strict=True))
        for name in after
    }
    # The first update is the learning rate where the gradient is not tiny.
    assert moved == pytest.approx({"embed": 0.004, "unembed": 0.001, "ci_fn": 0.004}, rel=1e-3)
    assert trainer.lr == 0.004


@pytest.mark.parametrize(("clipped", "free"), [("components", "ci_fn"), ("ci_fn", "components")])
def test_components_and_ci_fn_are_clipped_apart(make: Make, clipped: str, free: str) -> None:
    plain, limited = make(), make(f"train.clip_{clipped}=1e-5")
    plain.train_step()
    limited.train_step()
    natural, seen = first_gradients(plain), first_gradients(limited)
    assert natural[clipped] > 2e-5
    assert seen[clipped] == pytest.approx(1e-5, rel=1e-2)
    assert seen[free] == pytest.approx(natural[free], rel=1e-5)


def test_a_limit_above_the_norm_changes_nothing(make: Make) -> None:
    plain, limited = make(), make("train.clip_components=1e6", "train.clip_ci_fn=1e6")
    plain.train_step()
    limited.train_step()
    assert first_gradients(limited) == pytest.approx(first_gradients(plain), rel=1e-6)


def test_logged_norms_are_those_before_clipping(make: Make) -> None:
    plain, limited = make(steps=1), make("train.clip_components=1e-5", "train.clip_ci_fn=1e-5", steps=1)
    plain.fit()
    limited.fit()
    for part, norm in first_gradients(plain).items():
        assert rows(plain)[0][f"grad_norm/{part}"] == pytest.approx(norm, rel=1e-4)
        assert rows(limited)[0][f"grad_norm/{part}"] == pytest.approx(norm, rel=1e-4)


def test_only_subcomponents_and_causal_importances_are_trained(make: Make) -> None:
    trainer = make()
    target_before = {name: value.clone() for name, value in trainer.model.target.state_dict().items()}
    trainable = dict(trainer.model.named_parameters())
    before = {name: value.detach().clone() for name, value in trainable.items()}
    trainer.train_step()
    for name, value in trainer.model.target.state_dict().items():
        assert torch.equal(value, target_before[name]), name
    assert all(parameter.grad is None for parameter in trainer.model.target.parameters())
    changed = {name for name, value in trainable.items() if not torch.equal(value, before[name])}
    assert changed == {name for name, value in trainable.items() if value.requires_grad}
    assert {name.partition(".")[0] for name in changed} == {"subcomponents", "ci_fn"}


def test_a_step_is_a_function_of_the_seed(make: Make) -> None:
    losses: list[list[float]] = []
    for _ in range(2):
        trainer = make()
        torch.manual_seed(len(losses))  # whatever state torch's own generator is in
        losses.append([float(trainer.train_step().total) for _ in range(3)])
    assert losses[0] == losses[1]


# ---- faithfulness warmup -------------------------------------------------------------------------------


def test_the_warmup_fits_the_weights_and_leaves_the_ci_fn_alone(make: Make) -> None:
    trainer = make("train.faithfulness_warmup={steps:50,lr:0.01,weight_decay:0.0}")
    ci_before = values(trainer.updates.ci_fn)

    def error() -> float:
        deltas = [trainer.model.weight_delta(site).detach() for site in trainer.model.site_names]
        return float(torch.cat([delta.flatten() for delta in deltas]).square().mean())

    before = error()
    trainer.updates.fit_weights()
    assert error() < before / 10
    for new, old in zip(trainer.updates.ci_fn, ci_before, strict=True):
        assert torch.equal(new, old)
    assert trainer.step == 0


def test_the_optimiser_of_the_warmup_is_forgotten(make: Make) -> None:
    trainer = make("train.faithfulness_warmup.steps=3")
    trainer.updates.fit_weights()
    assert len(trainer.updates.optimizer.state) == 0
    assert all(parameter.grad is None for parameter in trainer.updates.components)


def test_subcomponents_that_start_as_detectors_are_not_warmed_up(make: Make) -> None:
    trainer = make(
        "train.faithfulness_warmup.steps=3",
        "~decomposition.tied.unembed",
        "decomposition.sites.embed.init=detectors",
    )
    before = {site: values(trainer.model.pieces(site).parameters()) for site in trainer.model.site_names}
    trainer.updates.fit_weights()
    for site, old in before.items():
        unchanged = map(torch.equal, trainer.model.pieces(site).parameters(), old)
        assert list(unchanged) == [site == "embed"] * 2
    assert all(parameter.grad is None for parameter in trainer.updates.components)


def test_nor_are_sites_that_are_tied_to_them(make: Make) -> None:
    trainer = make("train.faithfulness_warmup.steps=3", "decomposition.sites.embed.init=detectors")
    before = values(trainer.updates.components)
    trainer.updates.fit_weights()
    assert all(map(torch.equal, trainer.updates.components, before))


def test_without_warmup_training_starts_from_the_initial_values(make: Make) -> None:
    trainer = make("train.faithfulness_warmup.steps=0")
    before = values(trainer.updates.components)
    trainer.updates.fit_weights()
    for new, old in zip(trainer.updates.components, before, strict=True):
        assert torch.equal(new, old)


def test_the_warmup_is_not_repeated_after_a_resume(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make("train.checkpoint_every=3")
    first.fit()
    again = make(steps=STEPS + 2)
    checkpoint = load_newest(first.run.checkpoints)
    assert checkpoint is not None
    again.restore(checkpoint)
    monkeypatch.setattr(again.updates, "fit_weights", lambda: pytest.fail("warmed up a second time"))
    again.fit()
    assert again.step == STEPS + 2


# ---- cadence -------------------------------------------------------------------------------------------


def test_everything_happens_at_its_steps_and_at_the_last(make: Make) -> None:
    trainer = make(
        "train.log_every=3", "eval.every=4", "train.checkpoint_every=5", "train.keep_checkpoints=9", steps=11
    )
    trainer.fit()
    assert [row["step"] for row in rows(trainer, "train")] == [3, 6, 9, 11]
    assert [row["step"] for row in rows(trainer, "eval")] == [4, 8, 11]
    assert saved_steps(trainer) == [5, 10, 11]
    logged = [(row["step"], row["split"]) for row in trainer.run.read_metrics()]
    assert vars(trainer.tracker)["rows"] == logged


def test_the_last_evaluation_is_returned_and_made_once(make: Make) -> None:
    trainer = make("eval.every=2")
    assert trainer.fit().step == STEPS
    assert [row["step"] for row in rows(trainer, "eval")] == [2, 4, 6]


def test_figures_are_drawn_in_between_at_their_steps(make: Make) -> None:
    trainer = make("eval.every=2", "eval.figures_every=4", "eval.figures=true", steps=12)
    drawn: list[int] = []
    trainer.on_figures = lambda evaluation: drawn.append(evaluation.step)
    trainer.fit()
    assert drawn == [4, 8]  # those of the last step are drawn with the report


def test_without_figures_none_are_drawn_in_between(make: Make) -> None:
    trainer = make("eval.every=2", "eval.figures_every=4", "eval.figures=false", steps=12)
    trainer.on_figures = lambda evaluation: pytest.fail("a figure was drawn")
    assert trainer.fit().step == 12


def test_only_the_newest_checkpoints_are_kept(make: Make) -> None:
    trainer = make("train.checkpoint_every=1", "train.keep_checkpoints=2")
    trainer.fit()
    assert saved_steps(trainer) == [5, 6]


def test_rows_hold_every_active_term_sparsity_norms_and_rate(make: Make) -> None:
    trainer = make(steps=1)
    trainer.fit()
    terms = trainer.objective.losses.active_terms()
    expected = {"step", "split", "lr", "loss/total", "grad_norm/components", "grad_norm/ci_fn"}
    expected |= {f"loss/{name}" for name in terms} | {"l0/total", "l0/embed", "l0/unembed"}
    (row,) = rows(trainer)
    assert set(row) == expected
    total = sum(term.coeff * row[f"loss/{name}"] for name, term in terms.items())
    assert row["loss/total"] == pytest.approx(total, rel=1e-5)


def test_time_spent_is_counted_by_what_it_was_spent_on(make: Make) -> None:
    trainer = make()
    trainer.fit()
    assert trainer.stopwatch.seconds["train"] > 0
    assert trainer.stopwatch.seconds["compile"] == 0  # the small runs are not compiled
    assert set(trainer.stopwatch.seconds) == {"compile", "train", "eval"}


# ---- stopping ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "names"), [("loss_at", "broken"), ("gradient_at", "components")])
def test_numbers_that_are_not_finite_stop_the_run_before_they_do_harm(
    make: Make, kind: str, names: str
) -> None:
    broken = Breaks(coeff=1.0, **{kind: 0.5})  # from step 3 of 6 on
    trainer = make("train.checkpoint_every=1", extra={"broken": broken})
    with pytest.raises(TrainingError, match=rf"at step 3, in: {names}\.") as raised:
        trainer.fit()
    assert "train.lr" in str(raised.value)
    assert trainer.step == 3
    assert saved_steps(trainer) == [2, 3]
    checkpoint = load_newest(trainer.run.checkpoints)
    assert checkpoint is not None
    for name, parameter in trainer.model.trainable_state().items():
        assert torch.equal(parameter, checkpoint.tensors["model"][name])
        assert parameter.isfinite().all()
    assert [row["step"] for row in rows(trainer)] == [1, 2, 3]


def test_a_gradient_that_breaks_between_records_never_reaches_a_checkpoint(make: Make) -> None:
    broken = Breaks(coeff=1.0, gradient_at=0.5)
    trainer = make("train.log_every=10", "eval.every=10", "train.checkpoint_every=5", extra={"b": broken})
    with pytest.raises(TrainingError):
        trainer.fit()
    assert saved_steps(trainer) == []


@pytest.mark.parametrize("due", ["eval.every", "train.checkpoint_every"])
def test_weights_that_an_update_breaks_are_neither_measured_nor_saved(
    make: Make, monkeypatch: pytest.MonkeyPatch, due: str
) -> None:
    often = {"eval.every": 100, "train.checkpoint_every": 100, due: 3}
    trainer = make(*(f"{key}={steps}" for key, steps in often.items()))
    take = trainer.updates.optimizer.step

    def overflowing() -> None:
        take()
        if trainer.step == 2:
            next(iter(trainer.updates.components)).data[0] = math.inf

    monkeypatch.setattr(trainer.updates.optimizer, "step", overflowing)
    with pytest.raises(TrainingError, match=r"^the weights are not finite after step 3\. Checkpoints in"):
        trainer.fit()
    assert saved_steps(trainer) == []
    assert rows(trainer, "eval") == []


def test_a_loss_that_overflows_on_held_out_data_stops_the_run(make: Make) -> None:
    trainer = make("eval.every=3", "train.checkpoint_every=3")
    measure = trainer.evaluate

    def overflowing(step: int) -> Evaluation:
        found = measure(step)
        return dataclasses.replace(found, metrics=found.metrics | {"loss/total": math.inf})

    trainer.evaluate = overflowing
    with pytest.raises(TrainingError, match=r"^the loss on held-out data is inf after step 3\. "):
        trainer.fit()
    assert saved_steps(trainer) == []


def test_ctrl_c_saves_after_the_step_that_is_running(make: Make) -> None:
    trainer = make("train.checkpoint_every=100", steps=50)
    step = trainer.train_step

    def interrupted() -> Any:
        if trainer.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step()

    trainer.train_step = interrupted  # type: ignore[method-assign]
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped):
        trainer.fit()
    assert signal.getsignal(signal.SIGINT) is before
    assert trainer.step == 4
    assert saved_steps(trainer) == [4]
    assert [row["step"] for row in rows(trainer)] == [1, 2, 3, 4]


def test_a_second_ctrl_c_stops_at_once(make: Make) -> None:
    trainer = make("train.checkpoint_every=100", steps=50)

    def interrupted() -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("went on after the second Ctrl-C")

    trainer.train_step = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt) as raised:
        trainer.fit()
    assert not isinstance(raised.value, Stopped)
    assert saved_steps(trainer) == []


def test_ctrl_c_during_the_last_step_lets_the_run_end(make: Make) -> None:
    trainer = make()
    step = trainer.train_step

    def interrupted() -> Any:
        if trainer.step == STEPS - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step()

    trainer.train_step = interrupted  # type: ignore[method-assign]
    assert trainer.fit().step == STEPS


# ---- going on ------------------------------------------------------------------------------------------


def test_going_on_from_a_checkpoint_ends_with_the_same_bits(make: Make) -> None:
    whole = make("train.checkpoint_every=3", "train.keep_checkpoints=5")
    whole.fit()
    resumed = make("train.checkpoint_every=3")
    (whole.run.checkpoints / "step_6").rename(whole.run.checkpoints / ".step_6")
    half = load_newest(whole.run.checkpoints)
    assert half is not None
    assert half.step == 3
    resumed.restore(half)
    resumed.fit()
    for name, parameter in whole.model.trainable_state().items():
        assert torch.equal(parameter, resumed.model.trainable_state()[name])
    assert rows(resumed) == rows(whole)[3:]


def test_a_run_that_was_stopped_after_its_last_checkpoint_is_measured_without_another_row(make: Make) -> None:
    trainer = make()
    trainer.fit()
    checkpoint = load_newest(trainer.run.checkpoints)
    assert checkpoint is not None
    before = trainer.run.read_metrics()
    trainer.restore(checkpoint)
    assert trainer.fit().step == STEPS
    assert trainer.run.read_metrics() == before


def test_the_status_file_tells_the_step_of_the_last_checkpoint(make: Make) -> None:
    trainer = make("train.checkpoint_every=4")
    trainer.fit()
    status = json.loads((trainer.run.path / "status.json").read_text())
    assert (status["status"], status["step"]) == ("running", STEPS)


# ---- what is compiled ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "blocks"),
    [
        ((), True),  # 22 passes through 3 blocks
        (("loss.stochastic_recon_layerwise.coeff=0",), False),
        (("loss.stochastic_recon_layerwise.coeff=0", "train.compile_blocks=true"), True),
        (("train.compile_blocks=false",), False),
    ],
)
def test_blocks_are_compiled_one_by_one_where_a_whole_step_would_be_large(
    monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], blocks: bool
) -> None:
    monkeypatch.setattr("spd_hydra.trainer.can_compile", lambda device: True)
    target = LanguageModel(layers=3, width=12, heads=2, vocabulary=29)
    trainer = trainer_of(config(target, C=3, length=6, overrides=("train.batch_size=2", *words)))
    assert (trainer.model.compiled_blocks is not None) is blocks
    assert trainer.loss_and_gradients.is_compiled is not blocks


def test_a_target_without_blocks_is_compiled_as_a_whole(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spd_hydra.trainer.can_compile", lambda device: True)
    trainer = make("train.compile=true", "train.compile_blocks=true")
    assert trainer.model.compiled_blocks is None
    assert trainer.loss_and_gradients.is_compiled
