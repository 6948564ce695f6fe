"""The step on a language model that ours is compared with computes the same losses and gradients."""

import dataclasses

import pytest
from benchmarks.lm_cases import LanguageModel
from benchmarks.lm_step import TITLE, Case, Preset, made, require_equal, section
from benchmarks.plain_lm_step import PlainLanguageStep
from benchmarks.step_cases import Variant, parts_of

from spd_hydra.config import RunConfig
from spd_hydra.environment import describe_environment

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


@pytest.mark.slow
def test_blocks_that_are_compiled_one_by_one_have_them_too() -> None:
    run = tiny("llama")
    parts = parts_of(run, compiled=False)
    sample = parts.train_sampler()(0)
    plain = PlainLanguageStep(parts)
    reference = Variant(lambda given=None: plain.step(sample), plain.parameters, plain.device)
    require_equal("blocks", made("blocks", run, sample), reference, sample)


@pytest.mark.parametrize("words", [("loss=lm_tiny",), ("loss=delta", "loss.divergence=kl")])
def test_the_small_language_model_has_those_of_the_plain_step(words: tuple[str, ...]) -> None:
    small = ("train.batch_size=2", "model.context=8", "model.d_model=16", "model.d_mlp=24")
    run = Preset(name="lm_tiny", words=(*words, *small)).config(device="cpu", overrides=())
    parts = parts_of(run, compiled=False)
    sample = parts.train_sampler()(0)
    plain = PlainLanguageStep(parts)
    reference = Variant(lambda given=None: plain.step(sample), plain.parameters, plain.device)
    require_equal("eager", made("eager", run, sample), reference, sample)


def test_the_table_is_a_section_of_the_page() -> None:
    row = ["llama", "compiled", "5", "2.0", "70%", "12", "1.80", "0.40", "9"]
    text = section([row], describe_environment("cpu"), "python -m benchmarks.lm_step")
    assert text.startswith(f"## {TITLE}\n")
    assert "| llama | compiled | 5 | 2.0 | 70% | 12 | 1.80 | 0.40 | 9 |" in text


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
