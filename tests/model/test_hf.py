"""Targets from Hugging Face: the same numbers as transformers gives, and what each mistake is told."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.model.tiny_hf import MODELS, padded_tokens, saved_model, tokens
from torch import nn

from spd_hydra import rng
from spd_hydra.ci_fn.shared_mlp import SharedMLPCausalImportance
from spd_hydra.decomposition.config import Decomposition, SitePattern
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.decomposition.masks import SiteMask
from spd_hydra.model.hf import AutoClass, HuggingFace

GENERATOR = rng.generator(0, "unused")
BLOCKS = "*.[0-9]*.*"


@pytest.fixture(params=MODELS)
def tiny(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[HuggingFace, nn.Module]:
    """The configuration of a tiny model in a directory, and the model as transformers made it."""
    original = saved_model(request.param, tmp_path)
    return HuggingFace(name=str(tmp_path), auto_class=AutoClass[MODELS[request.param][0]]), original


@pytest.fixture
def gpt2(tmp_path: Path) -> tuple[HuggingFace, nn.Module]:
    original = saved_model("gpt2", tmp_path)
    return HuggingFace(name=str(tmp_path)), original


def called(original: nn.Module, batch: torch.Tensor) -> Any:
    """What a user of transformers would write."""
    pad = original.config.pad_token_id or 0
    with torch.no_grad():
        return original(
            input_ids=batch.where(batch >= 0, torch.tensor(pad)), attention_mask=(batch >= 0).long()
        )


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_the_output_is_that_of_the_model_and_module_paths_are_its_own(
    tiny: tuple[HuggingFace, nn.Module],
) -> None:
    spec, original = tiny
    module = spec.build(GENERATOR)
    close(module(tokens()), called(original, tokens()).logits)
    assert [name for name, _ in module.named_modules()] == [name for name, _ in original.named_modules()]
    assert isinstance(module, type(original))
    assert not module.training
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_padding_is_attended_to_by_no_position(tiny: tuple[HuggingFace, nn.Module]) -> None:
    spec, original = tiny
    batch = padded_tokens()
    found, wanted = spec.build(GENERATOR)(batch), called(original, batch).logits
    counted = batch >= 0 if found.ndim == 3 else slice(None)
    close(found[counted], wanted[counted])


def test_without_padding_no_attention_mask_is_needed(tiny: tuple[HuggingFace, nn.Module]) -> None:
    spec, original = tiny
    module = spec.build(GENERATOR)
    module.expect_padding(False)
    close(module(tokens()), called(original, tokens()).logits)


def test_all_masks_and_deltas_at_one_give_the_models_own_output(
    tiny: tuple[HuggingFace, nn.Module],
) -> None:
    spec, original = tiny
    model = decomposed(spec.build(GENERATOR), BLOCKS)
    assert len(model.site_names) >= 8
    batch = padded_tokens()
    ones = torch.ones(*batch.shape)
    masks = {site: SiteMask(mask=ones[..., None].expand(-1, -1, 5), delta=ones) for site in model.site_names}
    found, wanted = model(batch, masks), called(original, batch).logits
    counted = batch >= 0 if found.ndim == 3 else slice(None)
    close(found[counted], wanted[counted])


def decomposed(module: nn.Module, pattern: str) -> DecomposedModel:
    sites = {"every": SitePattern(pattern=pattern, C=5)}
    return DecomposedModel(module, Decomposition(sites=sites), SharedMLPCausalImportance(hidden=[4]), seed=0)
