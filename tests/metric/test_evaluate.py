"""One evaluation: additive over batches, honest about uncertified targets, complete in its numbers."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tests.language import hand_made, objective_of
from torch import Tensor

from spd_hydra.build import Parts, assemble, untrained_target
from spd_hydra.config import RunConfig
from spd_hydra.data.base import Batches
from spd_hydra.loss.base import LossInputs
from spd_hydra.metric import evaluate as module
from spd_hydra.metric.evaluate import evaluate
from spd_hydra.metric.evaluation import Evaluation
from spd_hydra.metric.known_answer import Verdict, compare
from spd_hydra.metric.recovery import Recovery
from spd_hydra.sampler import Sampler
from spd_hydra.section import ConfigError

BATCHES, ROWS = 3, 16


@pytest.fixture
def parts(toy: Callable[..., RunConfig]) -> Parts:
    config = toy("loss.importance_minimality.beta=0.5", f"eval.batch_size={ROWS}")
    return assemble(config, untrained_target(config), torch.device("cpu"))


def measured(parts: Parts, sampler: Sampler | None = None, **changes: Any) -> Evaluation:
    arguments: dict[str, Any] = {
        "step": 3,
        "progress": 0.1,
        "batches": BATCHES,
        "reference_positions": 64,
        "known": parts.known,
        "certified": True,
        "ideal_l0": parts.ideal_l0(),
    }
    return evaluate(parts.objective, sampler or parts.eval_sampler(), **arguments | changes)


def test_batches_are_accumulated_before_anything_is_finalised(parts: Parts) -> None:
    small = parts.eval_sampler()
    pairs = [small(number) for number in range(BATCHES)]
    together = torch.cat([batch for batch, _ in pairs]), torch.cat([draws for _, draws in pairs])

    class One(Sampler):
        def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
            assert step == 0
            return together

    one = One(
        parts.batches, seed=0, purpose="eval", rows=small.rows, rows_per_step=ROWS, columns=small.columns
    )
    in_parts, whole = measured(parts), measured(parts, one, batches=1)
    assert in_parts.n_positions == whole.n_positions == BATCHES * ROWS
    assert in_parts.metrics == pytest.approx(whole.metrics, rel=1e-5, nan_ok=True)
    for site, own in whole.sites.items():
        assert in_parts.sites[site].mean_ci == pytest.approx(own.mean_ci, rel=1e-5)
        assert in_parts.sites[site].density == pytest.approx(own.density)
        assert (in_parts.sites[site].histogram == own.histogram).all()


def test_the_frequency_factor_counts_real_positions_as_in_training(parts: Parts) -> None:
    """Half of the rows are padding, so a training batch of 64 has 32 real ones."""
    inputs_of, seen = parts.objective.inputs, []

    def half_padded(batch: torch.Tensor) -> LossInputs:
        inputs = dataclasses.replace(inputs_of(batch), valid=torch.arange(ROWS) < ROWS // 2)
        seen.append({site: ci.upper[: ROWS // 2] for site, ci in inputs.ci.items()})
        return inputs

    parts.objective.inputs = half_padded  # type: ignore[method-assign]
    found = measured(parts, known=None).metrics["loss/importance_minimality"]
    f = torch.cat([torch.cat([own[site] for own in seen]).mean(0) for site in seen[0]])
    assert found == pytest.approx(float((f * (1 + 0.5 * torch.log2(1 + 32 * f))).sum()), rel=1e-5)


def test_the_known_answer_is_compared_in_the_precision_of_training(toy: Callable[..., RunConfig]) -> None:
    config = toy("train.precision=bf16")
    parts = assemble(config, untrained_target(config), torch.device("cpu"))
    assert parts.known is not None
    for site, own in parts.objective.inputs(parts.known.probe).ci.items():
        g = measured(parts).sites[site].probe_lower
        assert g is not None
        for one, is_it in ((own, True), (parts.model.causal_importances(parts.known.probe)[site], False)):
            assert np.array_equal(g, one.lower.detach().float().numpy()) == is_it


def test_every_term_that_is_cheap_is_measured_whether_trained_on_or_not(parts: Parts) -> None:
    found = measured(parts).metrics
    terms = parts.config.loss.measured_terms()
    assert {name for name in found if name.startswith("loss/")} == {
        "loss/total",
        *(f"loss/{t}" for t in terms),
    }
    total = sum(term.coeff * found[f"loss/{name}"] for name, term in terms.items())
    assert found["loss/total"] == pytest.approx(total, rel=1e-6)
    assert any(term.coeff == 0 for term in terms.values())


def test_the_total_is_that_of_training_while_a_term_is_squeezed(toy: Callable[..., RunConfig]) -> None:
    config = toy("loss.importance_minimality={squeeze:3.0,squeeze_from:0.2,squeeze_to:0.4}")
    parts = assemble(config, untrained_target(config), torch.device("cpu"))
    before, within = (measured(parts, progress=progress).metrics for progress in (0.1, 0.3))
    name = "loss/importance_minimality"
    assert within[name] == pytest.approx(before[name], rel=1e-6)
    more = 2 * config.loss.importance_minimality.coeff * before[name]
    assert within["loss/total"] == pytest.approx(before["loss/total"] + more, rel=1e-6)
    assert more > 0.01 * before["loss/total"]


def test_sites_are_described_with_what_figures_need(parts: Parts) -> None:
    found = measured(parts)
    assert list(found.sites) == ["embed", "unembed"]
    for site, own in found.sites.items():
        C = parts.model.site_shapes()[site].C
        assert sorted(own.order) == list(range(C))
        assert own.mean_ci.shape == own.density.shape == (C,)
        assert own.probe_lower is not None
        assert own.probe_lower.shape == (5, C)
        assert own.histogram.sum() == BATCHES * ROWS * C
    assert found.sites["embed"].directions is not None
    assert found.sites["unembed"].directions is None
    assert found.metrics["l0/total"] == pytest.approx(found.metrics["l0/embed"] + found.metrics["l0/unembed"])
    assert found.metrics["l0_ideal/embed"] == pytest.approx(5 * 0.05)


def test_measuring_changes_nothing_and_needs_no_gradient(parts: Parts) -> None:
    before = {name: value.clone() for name, value in parts.model.state_dict().items()}
    first, second = measured(parts), measured(parts)
    assert first.metrics == pytest.approx(second.metrics, rel=0, abs=0, nan_ok=True)
    assert all(torch.equal(before[name], value) for name, value in parts.model.state_dict().items())
    assert all(parameter.grad is None for parameter in parts.model.parameters())


@pytest.mark.parametrize(
    ("certified", "errors", "solved", "strict"),
    [
        (True, (0, 0), True, True),
        (True, (1, 0), True, False),  # (strict tolerance, tolerance)
        (True, (1, 1), False, False),
        (False, (0, 0), False, False),
    ],
)
def test_solved_takes_a_certified_target_and_no_error(
    parts: Parts,
    monkeypatch: pytest.MonkeyPatch,
    certified: bool,
    errors: tuple[int, int],
    solved: bool,
    strict: bool,
) -> None:
    def found(*arguments: Any) -> Verdict:
        verdict = compare(*arguments)
        checks = [
            dataclasses.replace(check, error=errors[0 if check.tolerance == 0.1 else 1])
            for check in verdict.checks
        ]
        return dataclasses.replace(verdict, checks=checks, recovery=Recovery(1.0, 1.0, 1.0))

    monkeypatch.setattr(module, "compare", found)
    result = measured(parts, certified=certified)
    assert (result.solved, result.strict) == (solved, strict)


def test_without_a_known_answer_there_is_no_verdict(parts: Parts) -> None:
    found = measured(parts, known=None)
    assert (found.solved, found.strict, found.mmcs, found.ml2r, found.checks) == (None, None, None, None, [])
    assert not any(name.startswith("recovery/") for name in found.metrics)
    assert list(found.sites["embed"].order) == sorted(
        range(20), key=lambda c: -found.sites["embed"].mean_ci[c]
    )


def test_where_no_site_has_a_known_answer_there_is_no_verdict(toy: Callable[..., RunConfig]) -> None:
    config = toy(
        "~decomposition.sites.embed",
        "~decomposition.sites.unembed",
        "~decomposition.tied.unembed",
        "+decomposition.identities.x.pattern=unembed",
    )
    found = measured(assemble(config, untrained_target(config), torch.device("cpu")))
    assert (found.solved, found.strict, found.checks) == (None, None, [])


def test_a_term_that_is_measured_only_where_it_is_trained_on_is_measured_where_it_is_asked_for(
    toy: Callable[..., RunConfig],
) -> None:
    def found(*words: str) -> dict[str, float]:
        config = toy(f"eval.batch_size={ROWS}", *words)
        parts = assemble(config, untrained_target(config), torch.device("cpu"))
        return parts.evaluate(1, certified=True).metrics

    also = ["hidden_acts_recon", "smooth_l0", "pgd_recon"]
    plain, asked = found(), found(f"eval.also=[{','.join(also)}]")
    assert {f"loss/{name}" for name in also} == asked.keys() - plain.keys()
    assert {key: asked[key] for key in plain} == plain  # the total, which is that of training, too
    trained = found(*(f"loss.{name}.coeff=1" for name in also))
    assert {key: asked[key] for key in asked.keys() - plain.keys()} == pytest.approx(
        {f"loss/{name}": trained[f"loss/{name}"] for name in also}
    )


@pytest.mark.parametrize("name", ["hiden_acts_recon", "persistent_pgd_recon"])
def test_what_cannot_be_measured_without_training_on_it_is_refused(
    toy: Callable[..., RunConfig], name: str
) -> None:
    with pytest.raises(ConfigError, match=f"^eval.also: got {name}, must be loss terms among .*hidden_acts"):
        toy(f"eval.also=[{name}]")


class PaddingAlone(Batches):
    """Rows of four tokens that are none."""

    padded = True

    def __call__(self, key: Tensor, rows: Tensor) -> Tensor:
        return torch.full((len(rows), 4), -1)


def test_where_all_that_is_evaluated_on_is_padding_nothing_is_measured_and_the_data_are_named() -> None:
    objective = objective_of(hand_made())
    terms = objective.losses.measured_terms()
    sampler = Sampler(
        PaddingAlone(),
        seed=0,
        purpose="eval",
        rows=torch.arange(3, dtype=torch.int32),
        rows_per_step=3,
        columns=objective.columns(terms),
        position_shape=(4,),
    )
    with pytest.raises(ConfigError, match=r"^data: every position to evaluate on is padding"):
        evaluate(
            objective,
            sampler,
            step=0,
            progress=0.0,
            batches=2,
            reference_positions=12,
            known=None,
            certified=False,
            ideal_l0={},
        )
