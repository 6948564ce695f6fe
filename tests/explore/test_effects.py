"""Effects of ablations: those of the model with the subcomponent's own matrix subtracted from its layer."""

import copy
import math
from types import ModuleType

import pytest
import torch
from tests.model.tiny_hf import padded_tokens, saved_model, tokens
from torch import Tensor, nn

from spd_hydra.ci_fn.mlp import MLPCausalImportance
from spd_hydra.decomposition.config import Decomposition, SitePattern
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.explore.effects import Effects, ablation_effects
from spd_hydra.loss.divergence import Divergence
from spd_hydra.model.resid_mlp import MLPLayer, ResidMLPModel
from spd_hydra.model.tokens_in import adapt

SITES = ("transformer.h.0.mlp.c_fc", "transformer.h.1.attn.c_proj")


def with_less(model: DecomposedModel, site: str, indices: list[int]) -> nn.Module:
    """The target with W - Σ_c (V_c U_c)ᵀ in place of W, of Conv1D its transpose."""
    target = copy.deepcopy(model.target)
    pieces, layer = model.pieces(site), target.get_submodule(site)
    part = torch.stack([torch.outer(pieces.V[:, c], pieces.U[c]) for c in indices]).sum(0)
    with torch.no_grad():
        layer.weight -= part.T if isinstance(layer, nn.Linear) else part
    return target


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> DecomposedModel:
    target = adapt(saved_model("gpt2", tmp_path_factory.mktemp("gpt2")), "logits")
    sites = {name: SitePattern(pattern=site, C=5) for name, site in zip("ab", SITES, strict=True)}
    return DecomposedModel(target, Decomposition(sites=sites), MLPCausalImportance(hidden=2), seed=0).eval()


def resid() -> DecomposedModel:
    """A residual MLP, which keeps its stream as products."""
    generator = torch.Generator().manual_seed(4)
    layers = [
        MLPLayer(torch.randn(3, 12, generator=generator) / 3, torch.randn(12, 3, generator=generator) / 2)
        for _ in range(2)
    ]
    target = ResidMLPModel(torch.randn(5, 12, generator=generator) / 3, layers)
    sites = {"a": SitePattern(pattern="layers.*.mlp_*", C=4)}
    return DecomposedModel(target, Decomposition(sites=sites), MLPCausalImportance(hidden=2), seed=0).eval()


@torch.no_grad()
def test_an_ablated_model_is_the_target_with_the_subcomponents_subtracted_from_the_layer(
    gpt2: DecomposedModel,
) -> None:
    batch = tokens()
    ablated = gpt2.ablated(batch, {SITES[0]: [0, 3], SITES[1]: 2})
    less = with_less(gpt2, SITES[0], [0, 3])
    part = torch.outer(gpt2.pieces(SITES[1]).V[:, 2], gpt2.pieces(SITES[1]).U[2])
    less.get_submodule(SITES[1]).weight -= part
    torch.testing.assert_close(ablated, less(batch), rtol=1e-4, atol=1e-4)
    assert torch.equal(gpt2.ablated(batch, {SITES[0]: []}), gpt2(batch))


@torch.no_grad()
def test_a_boolean_mask_and_a_generator_take_out_what_they_name(gpt2: DecomposedModel) -> None:
    batch, chosen = tokens(), torch.tensor([True, False, False, True, False])
    expected = with_less(gpt2, SITES[0], [0, 3])(batch)
    for named in (chosen, (c for c in (0, 3)), chosen.nonzero().flatten()):
        torch.testing.assert_close(gpt2.ablated(batch, {SITES[0]: named}), expected, rtol=1e-4, atol=1e-4)
    found = ablation_effects(gpt2, batch, {SITES[0]: chosen}, kind=Divergence.kl, threshold=0.1)
    assert {effect.index for effect in found} == {0, 3}


@torch.no_grad()
def test_in_a_stream_that_is_kept_as_products_too() -> None:
    model, batch = resid(), torch.rand(6, 5)
    for site in model.site_names:
        expected = with_less(model, site, [1, 2])(batch)
        torch.testing.assert_close(model.ablated(batch, {site: [1, 2]}), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("at_once", [1, 2, None])
@torch.no_grad()
def test_effects_are_the_divergences_of_lone_ablations_whatever_the_size_of_a_pass(
    gpt2: DecomposedModel, at_once: int | None
) -> None:
    batch = padded_tokens()
    gpt2.target.expect_padding(True)
    named = {SITES[0]: [4, 0, 2], SITES[1]: [1]}
    found = ablation_effects(gpt2, batch, named, kind=Divergence.kl, threshold=0.1, at_once=at_once)
    assert len(found) == 4
    valid, target = batch >= 0, gpt2.target(batch).log_softmax(-1)
    for effect in found:
        logits = with_less(gpt2, effect.site, [effect.index])(batch)
        kl = (target.exp() * (target - logits.log_softmax(-1))).sum(-1) * valid
        torch.testing.assert_close(effect.divergence, kl, rtol=1e-3, atol=1e-6)
        assert effect.mean == pytest.approx(float(kl[valid].mean()), rel=1e-3)
    means = [effect.mean for effect in found]
    assert means == sorted(means, reverse=True)
    assert found[SITES[1], 1].index == 1


@torch.no_grad()
def test_changes_are_of_log_probabilities_in_the_mean_over_the_positions_that_need_the_subcomponent(
    gpt2: DecomposedModel,
) -> None:
    batch = tokens()
    g = gpt2.causal_importances(batch)[SITES[0]].lower[..., 2]
    threshold = float(g.median())
    named = {SITES[0]: [2]}
    found = ablation_effects(gpt2, batch, named, kind=Divergence.kl, threshold=threshold, names=letters)
    (effect,) = found
    logits = with_less(gpt2, SITES[0], [2])(batch), gpt2.target(batch)
    without, whole = (own.log_softmax(-1)[g > threshold] for own in logits)
    change = (without - whole).mean(0)
    order = change.argsort().tolist()
    assert [one.id for one in effect.falls] == order[:5]
    assert [one.id for one in effect.rises] == order[::-1][:5]
    assert [one.name for one in effect.falls] == letters(order[:5])
    assert effect.falls[0].change == pytest.approx(float(change.min()), rel=1e-3)
    assert effect.ci == pytest.approx(float(g.max()))


@torch.no_grad()
def test_of_few_classes_each_falls_or_rises_and_not_both(language: ModuleType) -> None:
    model, batch = language.hand_made(), torch.tensor([[0, 0]])
    (effect,) = ablation_effects(model, batch, {"unembed": [0]}, kind=Divergence.kl, threshold=0.1)
    # Without it the logits of token 0 are lower by 1, 0 and -1.
    odds = [0.7 / math.e, 0.2, 0.1 * math.e]
    change = [math.log(own / sum(odds) / chance) for own, chance in zip(odds, (0.7, 0.2, 0.1), strict=True)]
    assert change[0] < 0 < change[1] < change[2]
    assert [one.id for one in effect.falls] == [0]
    assert [one.id for one in effect.rises] == [2, 1]
    assert effect.falls[0].change == pytest.approx(change[0], rel=1e-4)
    assert [one.change for one in effect.rises] == pytest.approx([change[2], change[1]], rel=1e-4)


@torch.no_grad()
def test_what_moves_all_logits_alike_changes_no_class(language: ModuleType) -> None:
    model, batch = language.hand_made(), torch.tensor([[1, 1]])
    model.pieces("unembed").U[1] = 0.5
    (effect,) = ablation_effects(model, batch, {"unembed": [1]}, kind=Divergence.kl, threshold=0.1)
    assert all(abs(one.change) < 1e-6 for one in [*effect.falls, *effect.rises])
    assert not torch.allclose(model.ablated(batch, {"unembed": [1]}), model(batch), atol=0.1)


def letters(ids: list[int]) -> list[str]:
    return [chr(60 + one) for one in ids]


@torch.no_grad()
def test_without_a_choice_those_above_the_threshold_at_a_real_position_are_taken_out(
    language: ModuleType,
) -> None:
    model = language.hand_made()  # g is 1 at `embed`; 1, 0.5 and 0 at `unembed`
    batch = torch.tensor([[0, 1, -1], [2, 0, 1]])
    found = ablation_effects(model, batch, kind=Divergence.kl, threshold=0.5)
    assert {(effect.site, effect.index) for effect in found} == {
        ("embed", 0),
        ("embed", 1),
        ("embed", 2),
        ("unembed", 0),
    }
    # Without piece 0 token 0 has log chances less PIECES[0]; other tokens do not read it.
    effect = found["unembed", 0]
    logits = language.CHANCES[0].log() - language.PIECES[0]
    kl = float((language.CHANCES[0] * (language.CHANCES[0].log() - logits.log_softmax(0))).sum())
    assert effect.divergence.tolist() == [
        pytest.approx([kl, 0, 0], abs=1e-6),
        pytest.approx([0, kl, 0], abs=1e-6),
    ]
    assert effect.mean == pytest.approx(2 * kl / 5)


@torch.no_grad()
def test_of_other_outputs_it_is_the_squared_error_of_each_row() -> None:
    model, batch = resid(), torch.rand(6, 5)
    site = "layers.1.mlp_in"
    (effect,) = ablation_effects(model, batch, {site: [3]}, kind=Divergence.mse, threshold=0.1)
    expected = (with_less(model, site, [3])(batch) - model.target(batch)).square().mean(-1)
    torch.testing.assert_close(effect.divergence, expected, rtol=1e-3, atol=1e-7)
    assert (effect.falls, effect.rises) == ([], [])


def test_nothing_of_the_model_is_changed_and_no_gradient_is_kept(gpt2: DecomposedModel) -> None:
    before = {name: value.clone() for name, value in gpt2.state_dict().items()}
    found = ablation_effects(gpt2, tokens(), {SITES[0]: [1]}, kind=Divergence.kl, threshold=0.1)
    assert not found.found[0].divergence.requires_grad
    assert all(torch.equal(before[name], value) for name, value in gpt2.state_dict().items())
    assert not gpt2.training


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"nowhere": [0]}, r"no such site: \['nowhere'\]; the sites are"),
        ({SITES[0]: [0, 5]}, r"subcomponents\['transformer.h.0.mlp.c_fc'\]: got \[5\], must be from 0 to 4"),
        ({SITES[0]: [-1]}, r"got \[-1\], must be from 0 to 4"),
    ],
)
def test_what_there_is_not_cannot_be_taken_out(
    gpt2: DecomposedModel, named: dict[str, list[int]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        gpt2.ablated(tokens(), named)
    with pytest.raises(ValueError, match=message):
        ablation_effects(gpt2, tokens(), named, kind=Divergence.kl, threshold=0.1)


def test_the_table_names_the_largest_and_says_how_many_are_left(language: ModuleType) -> None:
    with torch.no_grad():
        found: Effects = ablation_effects(
            language.hand_made(), torch.tensor([[0, 1]]), kind=Divergence.kl, threshold=0.2, names=letters
        )
    lines = found.table(2).splitlines()
    assert lines[0].split() == ["site", "c", "g", "kl", "falls", "without", "it", "rises"]
    assert len(lines) == 2 + 2 + 1  # with the rule
    assert lines[-1] == f"… and {len(found) - 2} more; table(n) shows n of them"
    with pytest.raises(KeyError, match="was not taken out; name it"):
        found["unembed", 2]
    assert not math.isnan(found.found[0].mean)
    assert isinstance(found.found[0].divergence, Tensor)
