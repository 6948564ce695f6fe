"""The patched copy: what a target may ask of a site's layer."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
import transformers
from tests.decomposition.test_sites import patterns
from torch import Tensor, nn

from spd_hydra.ci_fn.mlp import MLPCausalImportance
from spd_hydra.decomposition.config import Decomposition
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.model.tokens_in import adapt
from spd_hydra.section import ConfigError


class Reading(nn.Module):
    """Reads the width of one layer, and the matrix of another."""

    def __init__(self, tensor: str) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.tensor = tensor

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) / self.first.in_features
        found: Tensor = x + getattr(self.second, self.tensor).sum()
        return found


def decomposed(target: nn.Module, **given: str) -> DecomposedModel:
    sites = patterns(**{name: (pattern, 3) for name, pattern in given.items()})
    return DecomposedModel(target, Decomposition(sites=sites), MLPCausalImportance(), seed=0)


@pytest.mark.parametrize("tensor", ["weight", "bias"])
def test_a_site_whose_tensors_the_target_reads_itself_is_refused_and_the_others_are_named(
    tensor: str,
) -> None:
    target = Reading(tensor)
    model = decomposed(target, every="*")
    with pytest.raises(ConfigError) as caught:
        model.clean_pass(torch.randn(2, 4))
    assert str(caught.value) == (
        "decomposition.sites: got second, whose matrix the target reads itself instead of calling the layer; "
        "decompose the others alone: 'decomposition.sites.first.pattern=first'"
    )
    batch = torch.randn(2, 4)
    assert torch.equal(model(batch), target(batch))


def test_what_is_no_tensor_of_a_layer_may_be_read() -> None:
    target, batch = Reading("weight"), torch.randn(2, 4)
    assert torch.equal(decomposed(target, one="first").clean_pass(batch).output, target(batch))


def test_a_patched_copy_can_be_copied() -> None:
    model = copy.deepcopy(decomposed(Reading("weight"), one="first"))
    assert model.clean_pass(torch.randn(2, 4)).output.shape == (2, 4)
    with pytest.raises(AttributeError):
        model.patched.module.get_submodule("first").nothing  # noqa: B018


def test_a_target_with_a_tensor_in_place_of_a_parameter_is_refused_with_what_to_do() -> None:
    target = Reading("bias")
    torch.nn.utils.prune.l1_unstructured(target.second, "weight", amount=0.5)
    target(torch.randn(2, 4))
    with pytest.raises(ConfigError) as caught:
        decomposed(target, one="first")
    assert str(caught.value).startswith("model: the target cannot be copied (Only Tensors created explicitly")
    assert str(caught.value).endswith("torch.nn.utils.prune.remove or remove_weight_norm")
    torch.nn.utils.prune.remove(target.second, "weight")
    decomposed(target, one="first")


def test_mamba_is_decomposed_with_the_patterns_that_its_refusal_names() -> None:
    sizes: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}
    target = adapt(transformers.MambaForCausalLM(transformers.MambaConfig(**sizes)), "logits")
    tokens = torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(0))
    with pytest.raises(ConfigError) as caught:
        decomposed(target, default="*.[0-9]*.*").clean_pass(tokens)
    message, _, advice = str(caught.value).partition("; decompose the others alone: ")
    assert message == (
        "decomposition.sites: got backbone.layers.0.mixer.dt_proj, whose matrix the target reads itself "
        "instead of calling the layer"
    )
    words = [word.strip("'").split("=") for word in advice.split()]
    assert words == [
        [f"decomposition.sites.{name}.pattern", f"backbone.layers.*.mixer.{name}"]
        for name in ("in_proj", "x_proj", "out_proj")
    ]
    found = decomposed(target, **{key.split(".")[2]: pattern for key, pattern in words})
    assert set(found.clean_pass(tokens).inputs) == {
        f"backbone.layers.{n}.mixer.{name}" for n in (0, 1) for name in ("in_proj", "x_proj", "out_proj")
    }
