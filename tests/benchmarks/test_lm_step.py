"""The step on a language model that ours is compared with computes the same losses and gradients."""

import dataclasses

import pytest
from benchmarks.lm_cases import LanguageModel
from benchmarks.lm_step import Case, made, require_equal
from benchmarks.plain_lm_step import PlainLanguageStep
from benchmarks.step_cases import Variant, parts_of

from spd_hydra.config import RunConfig

BETA = ("loss.importance_minimality.beta=0.5",)


def tiny(family: str) -> RunConfig:
    target = LanguageModel(family=family, layers=2, width=12, heads=2, vocabulary=29)
    case = Case(name=family, target=target, C=5, length=6, batch_size=3, hidden=4)
    return case.config(device="cpu", overrides=BETA)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_way_has_the_losses_and_gradients_of_the_plain_step(family: str) -> None:
    run = tiny(family)
    parts = parts_of(run, compiled=False)
    sample = parts.train_sampler()(0)
    plain = PlainLanguageStep(parts)
    reference = Variant(lambda given=None: plain.step(sample), plain.parameters, plain.device)
    require_equal("eager", made("eager", run, sample), reference, sample)
    require_equal("recomputed", made("eager+recomputed", run, sample), reference, sample)


def test_a_step_that_differs_is_refused() -> None:
    run = tiny("llama")
    parts = parts_of(run, compiled=False)
    sample = parts.train_sampler()(0)
    plain = PlainLanguageStep(parts)
    reference = Variant(lambda given=None: plain.step(sample), plain.parameters, plain.device)
    minimality = dataclasses.replace(run.loss.importance_minimality, beta=0.6)
    other = dataclasses.replace(run, loss=dataclasses.replace(run.loss, importance_minimality=minimality))
    with pytest.raises(ValueError, match="eager and plain: the loss"):
        require_equal("eager", made("eager", other, sample), reference, sample)
