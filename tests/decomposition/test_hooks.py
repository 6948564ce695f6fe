"""Forward hooks: every pass sees them, and none sees those that only some would see."""

from typing import Any

import pytest
import torch
from tests.decomposition.test_decomposed_model import (
    BATCH,
    Sequential,
    all_ones,
    batch_of,
    explicit_site,
    make,
    random_masks,
)
from tests.explore.test_effects import SITES, resid, with_less
from tests.model.tiny_hf import saved_model, tokens
from torch import Tensor, nn

from spd_hydra.ci_fn.mlp import MLPCausalImportance
from spd_hydra.decomposition.clean_pass import Reuse
from spd_hydra.decomposition.config import Decomposition, SitePattern
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.explore.effects import ablation_effects
from spd_hydra.loss.divergence import Divergence
from spd_hydra.model.tokens_in import adapt


def doubled(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    return 2 * output


def by_hand(model: DecomposedModel, x: Tensor, masks: Any) -> Tensor:
    """The masked pass of `Sequential` with twice the output of its middle."""
    target = model.target
    assert isinstance(target, Sequential)
    a = explicit_site(model, "first", masks["first"], x)
    middle = 2 * explicit_site(model, "middle", masks["middle"], torch.relu(a) * target.scale)
    return explicit_site(model, "last", masks["last"], a + torch.tanh(middle))


def test_clean_masked_and_ablated_passes_see_a_hook_and_so_do_causal_importances() -> None:
    model, x = make("sequential"), batch_of("sequential")
    masks, ones = random_masks(model, (BATCH,)), all_ones(make("sequential"), (BATCH,))
    before = model(x, masks)
    with model.hooked({"middle": doubled}):
        torch.testing.assert_close(model(x), by_hand(model, x, ones))
        torch.testing.assert_close(model(x, masks), by_hand(model, x, masks), rtol=1e-4, atol=1e-5)
        assert torch.equal(model(x, ones), model(x))
        assert torch.equal(model.ablated(x, {"last": []}), model(x))
        clean = model.clean_pass(x)
        assert torch.equal(clean.output, model(x))
        last = model.causal_importances(x)["last"].z
    assert torch.equal(model(x, masks), before)
    assert not torch.allclose(model.causal_importances(x)["last"].z, last)


def test_what_was_computed_without_a_hook_is_not_reused_with_it_nor_the_other_way_round() -> None:
    model, x = make("sequential"), batch_of("sequential")
    masks = {"last": random_masks(model, (BATCH,))["last"]}

    def reuse() -> Reuse:
        clean = model.clean_pass(x)
        return Reuse(clean, model.activations(clean), products={})

    without, outside = reuse(), model(x, masks)
    with model.hooked({"middle": doubled}):
        within, expected = reuse(), model(x, masks)
        assert torch.equal(model(x, masks, reuse=without), expected)
        assert torch.equal(model(x, masks, reuse=within), expected)
    assert not torch.allclose(expected, outside)
    assert torch.equal(model(x, masks, reuse=within), outside)
    torch.testing.assert_close(model(x, masks, reuse=without), outside)


@torch.no_grad()
def test_effects_in_a_block_are_those_of_a_target_with_the_hook(tmp_path: Any) -> None:
    target = adapt(saved_model("gpt2", tmp_path), "logits")
    sites = {name: SitePattern(pattern=site, C=5) for name, site in zip("ab", SITES, strict=True)}
    model = DecomposedModel(target, Decomposition(sites=sites), MLPCausalImportance(hidden=2), seed=0).eval()
    batch = tokens()
    less = with_less(model, SITES[0], [3])
    less.get_submodule("transformer.h.0").register_forward_hook(doubled)
    with model.hooked({"transformer.h.0": doubled}):
        (effect,) = ablation_effects(model, batch, {SITES[0]: 3}, kind=Divergence.kl, threshold=0.1)
        target, without = model(batch).log_softmax(-1), less(batch).log_softmax(-1)
    kl = (target.exp() * (target - without)).sum(-1)
    torch.testing.assert_close(effect.divergence, kl, rtol=1e-3, atol=1e-6)


@torch.no_grad()
def test_a_hook_is_given_the_targets_module_and_tensors_also_where_a_stream_is_kept_as_products() -> None:
    model, x = resid(), torch.rand(6, 5)
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []
    site = "layers.1.mlp_in"
    with model.hooked({site: lambda module, inputs, output: seen.append((module, inputs[0], output))}):
        clean, ablated = model(x), model.ablated(x, {site: 2})
    layer, pieces = model.target.get_submodule(site), model.pieces(site)
    assert [module for module, *_ in seen] == [layer, layer]
    (_, read, whole), (_, also_read, less) = seen
    torch.testing.assert_close(also_read, read)
    torch.testing.assert_close(
        whole - less, torch.outer(read @ pieces.V[:, 2], pieces.U[2]), atol=1e-5, rtol=1e-4
    )
    assert not torch.allclose(clean, ablated)


def test_blocks_may_stand_in_blocks_and_models_move_in_them() -> None:
    model, x = make("sequential"), batch_of("sequential")
    plain = model(x)
    with model.hooked({"last": doubled}):
        with model.hooked({"last": doubled, "": lambda *given: given[2] + 1}):
            torch.testing.assert_close(model(x), 4 * plain + 1)
            model.double()
            expected = 4 * plain.double() + 1
            for output in (model(x.double()), model.ablated(x.double(), {"middle": []})):
                torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
            model.float()
        torch.testing.assert_close(model.ablated(x, {"middle": []}), 2 * plain)
        with pytest.raises(RuntimeError, match="broken"), model.hooked({"last": doubled}):
            raise RuntimeError("broken")
        torch.testing.assert_close(model.ablated(x, {"middle": []}), 2 * plain)
    assert torch.equal(model.ablated(x, {"middle": []}), plain)
    assert not any(module._forward_hooks for module in model.target.modules())


def test_modules_that_there_are_not_are_refused_with_the_nearest_and_so_is_what_is_no_function() -> None:
    model = make("sequential")
    with pytest.raises(ValueError, match=r"hooks: 'midle' matches no module .* Did you mean 'middle'\?"):
        model.hooked({"midle": doubled}).__enter__()
    no_function: Any = 3
    with pytest.raises(
        TypeError, match=r"hooks\['middle'\]: got a int, must be a function of \(module, inputs"
    ):
        model.hooked({"middle": no_function}).__enter__()
    assert not any(module._forward_hooks for module in model.target.modules())


def test_a_target_with_hooks_that_masked_passes_lack_is_refused_until_they_are_gone() -> None:
    model, x = make("sequential"), batch_of("sequential")
    handle = model.target.get_submodule("middle").register_forward_hook(doubled)
    looks: list[Any] = [
        lambda: model.ablated(x, {"last": 0}),
        lambda: ablation_effects(model, x, {"last": 0}, kind=Divergence.mse, threshold=0.1),
        lambda: model.causal_importances(x),
        lambda: model(x, random_masks(model, (BATCH,))),
        lambda: model.hooked({}).__enter__(),
    ]
    for look in looks:
        with pytest.raises(
            ValueError, match=r"middle has other forward hooks .* model.hooked\(\{'middle': hook"
        ):
            look()
    handle.remove()
    model.ablated(x, {"last": 0})


def test_a_target_with_another_module_than_masked_passes_run_is_refused() -> None:
    model, x = make("sequential"), batch_of("sequential")
    model.target.middle = nn.Linear(4, 4, bias=False)
    with pytest.raises(ValueError, match=r"middle is not the module that was there when the model was made"):
        model.ablated(x, {"last": 0})


@torch.no_grad()
def test_hooks_by_which_transformers_collects_outputs_when_asked_to_are_no_reason_to_refuse(
    tmp_path: Any,
) -> None:
    target = adapt(saved_model("gpt2", tmp_path), "logits")
    config = Decomposition(sites={"a": SitePattern(pattern=SITES[0], C=5)})
    model = DecomposedModel(target, config, MLPCausalImportance(hidden=2), seed=0).eval()
    before = model.ablated(tokens(), {SITES[0]: 0})
    collected: Any = target(input_ids=tokens(), output_hidden_states=True)
    assert collected.hidden_states
    assert any(module._forward_hooks for module in target.modules())
    assert torch.equal(model.ablated(tokens(), {SITES[0]: 0}), before)


def test_what_a_hook_raises_is_told_as_it_is_and_a_batch_of_another_width_with_its_shape() -> None:
    model, x = make("sequential"), batch_of("sequential")

    def failing(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        raise KeyError("mine")

    with model.hooked({"middle": failing}):
        for look in (lambda: model.ablated(x, {"last": 0}), lambda: model.causal_importances(x)):
            with pytest.raises(KeyError, match="mine"):
                look()
    with pytest.raises(
        ValueError, match=r"batch: got shape \[6, 4\], float32, which the target does not take"
    ):
        model.ablated(x[:, :4], {"last": 0})
