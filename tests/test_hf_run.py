"""Whole decompositions of models from Hugging Face: compiled, saved, opened again."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.hub_cache import cached_model
from tests.model.tiny_hf import LENGTH, MODELS, VOCAB, saved_model, tokens
from torch import Tensor

from spd_hydra import rng
from spd_hydra.api import load_run
from spd_hydra.build import Parts, assemble
from spd_hydra.composition import compose
from spd_hydra.config import RunConfig
from spd_hydra.data.base import Batches, DataSource
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.decomposition.masks import SiteMask
from spd_hydra.metric.evaluation import Evaluation
from spd_hydra.model.base import TargetSpec
from spd_hydra.model.hf import HuggingFace
from spd_hydra.model.weights import WeightsError
from spd_hydra.pipeline import remarks
from spd_hydra.preflight import preflight
from spd_hydra.run import run
from spd_hydra.saved_run import TARGET_FILE
from spd_hydra.section import ConfigError, register
from spd_hydra.step import Step
from spd_hydra.trainer import Trainer

Make = Callable[..., RunConfig]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomTokens(Batches):
    """Random texts, of which some end early."""

    padded: bool

    def __call__(self, key: Tensor, rows: Tensor) -> Tensor:
        places = torch.arange(LENGTH, dtype=torch.int32, device=rows.device)
        draws = rng.uniform(key, rows, places)
        found = 4 + (draws * (VOCAB - 4)).to(torch.int64)
        ends = LENGTH - (4 * draws[:, :1]).to(torch.int32)
        return found.where(places < ends, -1) if self.padded else found


@register("data", "random_tokens_of_a_test")
@dataclasses.dataclass(kw_only=True)
class RandomTexts(DataSource):
    padded: bool = True

    def bind(self, target: TargetSpec) -> RandomTokens:
        return RandomTokens(padded=self.padded)


@pytest.fixture
def tiny(tmp_path: Path) -> Make:
    """The configuration of a short decomposition of a tiny model."""

    def make(model: str, *overrides: str, padded: bool = True) -> RunConfig:
        directory = tmp_path / model
        if not directory.exists():
            saved_model(model, directory)
        config = compose(
            [
                *("experiment=none", f"name={model}", "device=cpu", f"out_dir={tmp_path / 'runs'}"),
                *("model=hf", f"model.name={directory}", f"model.auto_class={MODELS[model][0]}"),
                *("decomposition=blocks", "decomposition.C=6", "ci_fn=mlp"),
                *("ci_fn.hidden=4", "loss.divergence=kl", "train.steps=50", "train.batch_size=4"),
                *("train.compile=false", "train.restarts.number=1", "train.checkpoint_every=50"),
                *("train.faithfulness_warmup.steps=2", "eval.batches=1", "eval.batch_size=4"),
                *overrides,
            ]
        )
        return dataclasses.replace(config, data=RandomTexts(padded=padded))

    return make


def built(config: RunConfig) -> Parts:
    target = config.model.build(rng.generator(0, "unused"))
    return assemble(config, target, torch.device("cpu"))


def some_masks(model: DecomposedModel) -> dict[str, SiteMask]:
    """Masks and deltas between 0 and 1 at every site, the same for each model of these sites."""
    generator, shape = torch.Generator().manual_seed(7), tokens().shape
    sizes = {site: own.C for site, own in model.site_shapes().items()}
    return {
        site: SiteMask(
            mask=torch.rand(*shape, C, generator=generator), delta=torch.rand(shape, generator=generator)
        )
        for site, C in sizes.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gpt2", "llama", "bert", "falcon"])
def test_a_decomposed_model_is_the_same_when_its_run_is_opened_again_without_its_files(
    tiny: Make, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(model)
    original = config.model.build(rng.generator(0, "unused"))(tokens())
    trained: list[DecomposedModel] = []
    fit = Trainer.fit

    def kept(trainer: Trainer) -> Evaluation:
        trained.append(trainer.model)
        return fit(trainer)

    monkeypatch.setattr(Trainer, "fit", kept)
    outcome = run(config)
    (before,) = trained
    assert outcome.run_dir is not None
    assert isinstance(config.model, HuggingFace)
    shutil.rmtree(config.model.name)
    opened = load_run(outcome.run_dir)
    for after in (opened.model, opened.model_at(50)):
        assert torch.equal(after(tokens()), original)
        with torch.no_grad():
            masked = before(tokens(), some_masks(before))
            assert torch.equal(after(tokens(), some_masks(after)), masked)
            wanted, found = (part.causal_importances(tokens()) for part in (before, after))
        assert all(torch.equal(found[site].lower, own.lower) for site, own in wanted.items())
        assert (masked - original).abs().max() > 0.01  # the masks matter
    assert opened.summary["steps"] == 50
    left_out = "transformer.h.*.mlp.dense_4h_to_h, whose output the target changes in place"
    notes = [f"not decomposed, though the patterns match: {left_out}"] if model == "falcon" else []
    assert opened.summary["notes"] == notes


@pytest.mark.slow
def test_weights_that_are_not_kept_are_found_again_and_must_be_the_same(tiny: Make) -> None:
    config = tiny("gpt2", "model.keep_weights=never", "train.steps=2", "train.checkpoint_every=2")
    outcome = run(config)
    assert outcome.run_dir is not None
    assert isinstance(config.model, HuggingFace)
    assert (outcome.run_dir / TARGET_FILE).stat().st_size < 10_000
    original = config.model.build(rng.generator(0, "unused"))
    assert torch.equal(load_run(outcome.run_dir).model(tokens()), original(tokens()))
    with torch.no_grad():
        original.transformer.wpe.weight[0, 0] += 1
    original.save_pretrained(config.model.name)
    with pytest.raises(WeightsError, match="was written for other weights of the target than those"):
        _ = load_run(outcome.run_dir).model
    shutil.rmtree(config.model.name)
    with pytest.raises(ConfigError, match=r"^model\.name: got .*, which is no directory"):
        _ = load_run(outcome.run_dir).model


@pytest.mark.slow
@pytest.mark.parametrize(("model", "padded"), [("gpt2", True), ("llama", False)])
def test_a_compiled_step_is_the_step_as_it_is_written(tiny: Make, model: str, padded: bool) -> None:
    found = []
    for compile in (False, True):
        parts = built(tiny(model, padded=padded))
        step, sampler = Step(parts.objective, compile=compile), parts.train_sampler()
        step(*sampler(0), parts.objective.scheduled(0.0))
        loss = step(*sampler(1), parts.objective.scheduled(0.0))  # compiled: with the first batch's graph
        gradients = {name: p.grad for name, p in parts.model.named_parameters() if p.requires_grad}
        found.append((loss.total, gradients))
    (eager, eager_gradients), (compiled, gradients) = found
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)
    for name, gradient in eager_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_the_check_before_launch_needs_no_weights_and_no_values(tiny: Make) -> None:
    config = tiny("gpt2")
    assert isinstance(config.model, HuggingFace)
    (Path(config.model.name) / "model.safetensors").write_bytes(b"")
    parts = preflight(config)
    assert parts.model.device.type == "meta"
    assert parts.position_shape == (LENGTH,)
    assert len(parts.model.site_names) == 8


def test_weights_that_are_not_read_are_found_before_launch(tiny: Make) -> None:
    config = tiny("gpt2")
    assert isinstance(config.model, HuggingFace)
    weights = Path(config.model.name) / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(ConfigError) as caught:
        preflight(config)
    assert str(caught.value) == (
        f"model.name: got {config.model.name}, which has no weights in the safetensors format; others are "
        "not read, since they can hold code"
    )


def test_weights_that_cannot_be_fetched_are_found_before_launch(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny("gpt2")
    assert isinstance(config.model, HuggingFace)
    snapshot = cached_model(tmp_path / "hub", "owner/model", Path(config.model.name))
    (snapshot / "model.safetensors").unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, name="owner/model"))
    with pytest.raises(ConfigError, match=r"which is not in .*hub, and HF_HUB_OFFLINE=1 forbids"):
        preflight(config)


def test_an_output_that_there_is_not_is_found_before_launch(tiny: Make) -> None:
    with pytest.raises(ConfigError, match=r"^model\.output: got logit, under which"):
        preflight(tiny("gpt2", "model.output=logit"))


SHAPELESS = [  # a wide pattern, what of it has no vectors, a pattern for the rest
    ("gpt2", "transformer.w*", "transformer.wpe", "transformer.wte", [1, 12]),
    ("bert_classifier", "*.[dq]*", "bert.pooler.dense", "bert.encoder.*.[dq]*", [8]),
    ("bert_classifier", None, "classifier", None, [8]),
]


@pytest.mark.parametrize(("model", "pattern", "others", "rest", "shape"), SHAPELESS[:2])
def test_sites_without_a_vector_per_row_and_position_are_passed_over_by_wide_patterns(
    tiny: Make, model: str, pattern: str | None, others: str, rest: str | None, shape: list[int]
) -> None:
    parts = preflight(tiny(model, f"decomposition.default_pattern='{pattern}'"))
    assert others not in parts.model.site_names
    assert parts.model.site_names
    assert remarks(parts)[0] == (
        f"not decomposed, though the patterns match: {others}, which see no vector per row and position "
        f"({shape} for 8 rows in place of [8, 12])"
    )


@pytest.mark.parametrize(("model", "pattern", "others", "rest", "shape"), SHAPELESS)
def test_sites_without_a_vector_per_row_and_position_that_are_named_are_refused_with_others(
    tiny: Make, model: str, pattern: str | None, others: str, rest: str | None, shape: list[int]
) -> None:
    words = [
        f"decomposition.sites.{name}.pattern='{own}'" for name, own in {"a": others, "b": rest}.items() if own
    ]
    with pytest.raises(ConfigError) as caught:
        preflight(tiny(model, *words))
    reason, advice = str(caught.value).split("; ")
    assert reason == (
        f"decomposition.sites: got {others}, which see no vector per row and position ({shape} for 8 rows in "
        "place of [8, 12])"
    )
    if rest is None:
        assert advice.startswith("choose others with decomposition.sites.<name>.pattern, of bert.embeddings.")
        return
    assert advice.startswith("decompose the others alone: ")
    words = [word.strip("'") for word in advice.partition(": ")[2].split()]
    parts = preflight(tiny(model, *words))
    assert others not in parts.model.site_names
    assert parts.model.site_names


def test_what_enters_the_modules_of_a_model_can_be_decomposed(tiny: Make) -> None:
    config = tiny("llama", "++decomposition.identities={mlp: {pattern: 'model.layers.*.mlp', C: 5}}")
    parts = preflight(config)
    assert parts.model.site_names[-2:] == ("model.layers.0.mlp.identity", "model.layers.1.mlp.identity")
    parts = built(config)
    batch = tokens()
    clean = parts.model.clean_pass(batch)
    assert torch.equal(clean.output, parts.model(batch))
    entering = clean.inputs["model.layers.0.mlp.identity"]
    assert torch.equal(entering, clean.inputs["model.layers.0.mlp.up_proj"])
    sizes = {name: len(sites) for name, sites in parts.groups().items()}
    assert sizes == {"default": 14, "mlp.identity": 2}
    measured = parts.ablations()
    assert measured is not None
    assert measured.groups == parts.groups()
