"""The decomposed model: exact where it must be, masked as the formula says, the target left alone."""

import copy
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spd_hydra.ci_fn.base import CausalImportanceFn
from spd_hydra.ci_fn.global_mlp import GlobalMLPCausalImportance
from spd_hydra.ci_fn.global_transformer import GlobalTransformerCausalImportance
from spd_hydra.ci_fn.mlp import MLPCausalImportance
from spd_hydra.ci_fn.shared_mlp import SharedMLPCausalImportance
from spd_hydra.ci_fn.sigmoid import Sigmoid
from spd_hydra.decomposition.clean_pass import Reuse
from spd_hydra.decomposition.config import Decomposition, SitePattern
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.decomposition.masks import SiteMask
from spd_hydra.decomposition.roots import find_roots
from spd_hydra.factored import dense
from spd_hydra.model.resid_mlp import MLPLayer, ResidMLPModel
from spd_hydra.model.tms import TMSModel
from spd_hydra.section import ConfigError

BATCH = 6


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def initialised(target: nn.Module) -> nn.Module:
    """The target with weights and biases that are all different from zero."""
    generator = seeded(3)
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return target


class Sequential(nn.Module):
    """Three matrices one after another: one root. The last input also skips the middle."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 4)
        self.middle = nn.Linear(4, 4, bias=False)
        self.last = nn.Linear(4, 3)
        self.register_buffer("scale", torch.tensor([1.0, 0.5, -2.0, 1.5]))

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        last: Tensor = self.last(a + torch.tanh(self.middle(torch.relu(a) * self.scale)))
        return last


class Parallel(nn.Module):
    """Two matrices on the same input, a third on their sum: two roots."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(5, 4)
        self.right = nn.Linear(5, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(torch.relu(self.left(x)) + torch.tanh(self.right(x)))
        return out


class Tokens(nn.Module):
    """An embedding, transformers' Conv1D and an unembedding that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(7, 4)
        proj: nn.Module = Conv1D(4, 4)
        self.proj = proj
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens)
        head: Tensor = self.head(x + torch.relu(self.proj(x)))
        return head


def tms() -> TMSModel:
    return TMSModel(torch.randn(2, 5, generator=seeded(1)), 0.1 * torch.randn(5, generator=seeded(2)), 1)


def resid_mlp() -> ResidMLPModel:
    """Two layers on a stream of 12 dimensions, which masked passes keep as products."""
    generator = seeded(4)
    layers = [
        MLPLayer(torch.randn(3, 12, generator=generator) / 3, torch.randn(12, 3, generator=generator) / 2)
        for _ in range(2)
    ]
    return ResidMLPModel(torch.randn(5, 12, generator=generator) / 3, layers)


def sites(**c: int) -> dict[str, SitePattern]:
    return {name: SitePattern(pattern=name.replace("__", "."), C=C) for name, C in c.items()}


CASES: dict[str, tuple[nn.Module, dict[str, SitePattern], dict[str, str]]] = {
    "sequential": (initialised(Sequential()), sites(first=3, middle=9, last=2), {}),
    "parallel": (initialised(Parallel()), sites(left=3, right=6, out=8), {}),
    "tokens": (initialised(Tokens()), sites(wte=5, proj=3, head=6), {}),
    "tied tokens": (initialised(Tokens()), sites(wte=5, proj=3, head=5), {"head": "wte"}),
    "tms": (tms(), sites(embed=6, hidden__0=3, unembed=6), {}),
    "residual": (
        resid_mlp(),
        sites(layers__0__mlp_in=6, layers__0__mlp_out=4, layers__1__mlp_in=7, layers__1__mlp_out=5),
        {},
    ),
    "tied tms": (tms(), sites(embed=6, hidden__0=3, unembed=6), {"unembed": "embed"}),
}


def make(case: str, *, ci_fn: CausalImportanceFn | None = None, seed: int = 0) -> DecomposedModel:
    target, patterns, tied = CASES[case]
    config = Decomposition(sites=patterns, tied=tied, sigmoid=Sigmoid.leaky_hard)
    return DecomposedModel(copy.deepcopy(target), config, ci_fn or MLPCausalImportance(hidden=4), seed=seed)


def batch_of(case: str, *positions: int) -> Tensor:
    positions = positions or (BATCH,)
    if "tokens" in case:
        return torch.randint(0, 7, positions, generator=seeded(5))
    return torch.randn(*positions, 5, generator=seeded(5))


def random_masks(
    model: DecomposedModel,
    positions: tuple[int, ...],
    *,
    delta: bool = True,
    route: bool = False,
    seed: int = 0,
) -> dict[str, SiteMask]:
    generator = seeded(seed + 10)
    masks = {}
    for name, shape in model.site_shapes().items():
        masks[name] = SiteMask(
            mask=torch.rand(*positions, shape.C, generator=generator),
            delta=torch.rand(positions, generator=generator) if delta else None,
            route=torch.rand(positions, generator=generator) < 0.5 if route else None,
        )
    return masks


def all_ones(model: DecomposedModel, positions: tuple[int, ...]) -> dict[str, SiteMask]:
    return {
        name: SiteMask(mask=torch.ones(*positions, shape.C), delta=torch.ones(positions))
        for name, shape in model.site_shapes().items()
    }


def assert_same(case: str, output: Tensor, wanted: Tensor) -> None:
    """Bit for bit, but for the rounding of a stream that is kept as products."""
    if case == "residual":
        torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(output, wanted)


def explicit_site(model: DecomposedModel, name: str, mask: SiteMask, x: Tensor) -> Tensor:
    """(h ⊙ m) U + δ·xΔᵀ + b, with every factor formed, or the original layer where not routed."""
    layer = model.target.get_submodule(name)
    W = model.weight(name)
    if isinstance(layer, nn.Embedding):
        x = torch.nn.functional.one_hot(x, W.shape[1]).float()
    V, U = model.pieces(name).V, model.pieces(name).U
    bias = getattr(layer, "bias", None)
    b = torch.zeros(W.shape[0]) if bias is None else bias
    h = x @ V
    y = (h if mask.mask is None else h * mask.mask) @ U + b
    if mask.delta is not None:
        delta_weight = W - (V @ U).T
        y = y + mask.delta[..., None] * (x @ delta_weight.T)
    return y if mask.route is None else torch.where(mask.route[..., None], y, x @ W.T + b)


def explicit_pass(model: DecomposedModel, batch: Tensor, masks: Mapping[str, SiteMask]) -> Tensor:
    """The whole masked pass, by hooks on a copy of the target that replace each site's output."""
    target = copy.deepcopy(model.target)
    for name, mask in masks.items():

        def replace(
            _: nn.Module, inputs: tuple[Tensor], __: Tensor, name: str = name, mask: SiteMask = mask
        ) -> Tensor:
            return explicit_site(model, name, mask, inputs[0])

        target.get_submodule(name).register_forward_hook(replace)
    output: Tensor = target(batch)
    return output


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("positions", [(BATCH,), (2, 3)])
def test_all_masks_one_with_full_delta_reproduce_the_target_exactly(
    case: str, positions: tuple[int, ...]
) -> None:
    model, batch = make(case), batch_of(case, *positions)
    assert_same(case, model(batch, all_ones(model, positions)), model.target(batch))


@pytest.mark.parametrize("case", CASES)
def test_routing_nothing_equals_the_target(case: str) -> None:
    model, batch = make(case), batch_of(case)
    nowhere = torch.zeros(BATCH, dtype=torch.bool)
    masks = {name: mask._replace(route=nowhere) for name, mask in random_masks(model, (BATCH,)).items()}
    assert_same(case, model(batch, masks), model.target(batch))
    assert_same(case, model(batch, {}), model.target(batch))
    assert torch.equal(model(batch), model.target(batch))


@pytest.mark.parametrize("case", CASES)
def test_routing_everything_equals_no_routing(case: str) -> None:
    model, batch = make(case), batch_of(case)
    everywhere = torch.ones(BATCH, dtype=torch.bool)
    masks = random_masks(model, (BATCH,))
    routed = {name: mask._replace(route=everywhere) for name, mask in masks.items()}
    assert torch.equal(model(batch, routed), model(batch, masks))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("route", [True, False])
@pytest.mark.parametrize("positions", [(BATCH,), (2, 3)])
def test_a_masked_pass_is_the_formula_with_an_explicit_weight_delta(
    case: str, delta: bool, route: bool, positions: tuple[int, ...]
) -> None:
    model, batch = make(case), batch_of(case, *positions)
    masks = random_masks(model, positions, delta=delta, route=route)
    torch.testing.assert_close(model(batch, masks), explicit_pass(model, batch, masks), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_a_masked_pass_are_those_of_the_formula(case: str) -> None:
    model, batch = make(case), batch_of(case)
    masks = random_masks(model, (BATCH,), route=True)
    wanted = list(model.component_parameters())
    for own, expected in zip(
        torch.autograd.grad(model(batch, masks).square().sum(), wanted),
        torch.autograd.grad(explicit_pass(model, batch, masks).square().sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(own, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_unmasked_leaves_the_weight_delta_out(case: str) -> None:
    model, batch = make(case), batch_of(case)
    unmasked = dict.fromkeys(model.site_names, SiteMask())
    ones = {name: SiteMask(mask=torch.ones(BATCH, s.C)) for name, s in model.site_shapes().items()}
    torch.testing.assert_close(model(batch, unmasked), explicit_pass(model, batch, ones))
    assert not torch.allclose(model(batch, unmasked), model.target(batch), atol=1e-3)


def test_a_weight_delta_mask_without_a_mask_takes_all_subcomponents() -> None:
    model, batch = make("sequential"), batch_of("sequential")
    masks = {"middle": SiteMask(delta=torch.rand(BATCH, generator=seeded(1)))}
    torch.testing.assert_close(model(batch, masks), explicit_pass(model, batch, masks))


def test_a_layer_that_is_not_routed_acts_on_the_current_input() -> None:
    model, batch = make("sequential"), batch_of("sequential")
    nowhere = torch.zeros(BATCH, dtype=torch.bool)
    masks = {
        "first": SiteMask(mask=torch.zeros(BATCH, 3)),
        "last": SiteMask(mask=torch.zeros(BATCH, 2), route=nowhere),
    }
    target = model.target
    assert isinstance(target, Sequential)
    perturbed = target.first.bias.expand(BATCH, 4)
    middle = torch.tanh((torch.relu(perturbed) * target.scale) @ target.middle.weight.T)
    expected = (perturbed + middle) @ target.last.weight.T + target.last.bias
    torch.testing.assert_close(model(batch, masks), expected)
    reuse = Reuse(clean := model.clean_pass(batch), model.activations(clean), products={})
    model.roots = find_roots(model, batch, model.clean_pass(batch))
    torch.testing.assert_close(model(batch, masks, reuse=reuse), expected)


def test_subcomponents_start_from_the_seed_and_the_sites_name_alone() -> None:
    whole = make("sequential")
    target, patterns, _ = CASES["sequential"]
    part = DecomposedModel(
        copy.deepcopy(target),
        Decomposition(sites={"last": patterns["last"]}),
        MLPCausalImportance(hidden=4),
        seed=0,
    )
    assert torch.equal(part.pieces("last").V, whole.pieces("last").V)
    assert not torch.equal(make("sequential", seed=1).pieces("last").V, whole.pieces("last").V)


def test_the_fit_of_the_matrices_is_their_weight_delta() -> None:
    model = make("tokens")
    for name in model.site_names:
        expected = model.weight(name) - sum(
            torch.outer(u, v) for u, v in zip(model.pieces(name).U, model.pieces(name).V.T, strict=True)
        )
        torch.testing.assert_close(model.weight_delta(name), expected)


def test_sites_may_have_any_number_of_subcomponents_below_and_above_the_rank() -> None:
    model = make("sequential")
    assert {name: shape.C for name, shape in model.site_shapes().items()} == {
        "first": 3,
        "middle": 9,
        "last": 2,
    }
    assert model.pieces("middle").V.shape == (4, 9)
    assert {
        name: ci.lower.shape for name, ci in model.causal_importances(batch_of("sequential")).items()
    } == {
        "first": (BATCH, 3),
        "middle": (BATCH, 9),
        "last": (BATCH, 2),
    }


@pytest.mark.parametrize("case", CASES)
def test_only_subcomponents_and_the_causal_importance_function_get_gradients(case: str) -> None:
    model, batch = make(case), batch_of(case)
    loss = model(batch, random_masks(model, (BATCH,))).square().sum()
    loss = loss + torch.stack([ci.z.square().sum() for ci in model.causal_importances(batch).values()]).sum()
    loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if not name.startswith("target.")}
    assert trained == set(model.trainable_state())
    assert not any(parameter.requires_grad for parameter in model.target.parameters())
    listed = [*model.component_parameters(), *model.ci_parameters()]
    assert {id(p) for p in listed} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(listed) == len(trained)


@pytest.mark.parametrize("case", CASES)
def test_the_target_keeps_its_modules_hooks_and_weights(case: str) -> None:
    original = copy.deepcopy(CASES[case][0])
    target = copy.deepcopy(original)
    modules = dict(target.named_modules())
    model = DecomposedModel(target, make(case).config, MLPCausalImportance(hidden=4), seed=0)
    batch = batch_of(case)
    model.roots = find_roots(model, batch, model.clean_pass(batch))
    model(batch, random_masks(model, (BATCH,))).sum().backward()
    model.causal_importances(batch)
    assert model.target is target
    assert dict(target.named_modules()) == modules
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in target.modules())
    before, after = original.state_dict(), target.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(model.target(batch), original(batch))


@pytest.mark.parametrize("case", CASES)
def test_the_copy_for_masked_passes_shares_parameters_and_buffers_and_is_not_a_part(case: str) -> None:
    model = make(case)
    patched = model.patched.module
    own = {id(t) for t in [*model.target.parameters(), *model.target.buffers()]}
    assert {id(t) for t in [*patched.parameters(), *patched.buffers()]} == own
    assert all(name.split(".")[0] in ("target", "subcomponents", "ci_fn") for name in model.state_dict())


def test_after_an_exception_in_a_pass_the_model_still_gives_the_clean_output() -> None:
    model, batch = make("sequential"), batch_of("sequential")
    masks = random_masks(model, (BATCH,))
    expected_masked, expected_clean = model(batch, masks), model.target(batch)
    patched = model.patched.module
    with pytest.raises(RuntimeError):
        model.clean_pass(torch.randn(2, 99))
    assert torch.equal(patched(batch), expected_clean)
    with pytest.raises(ValueError, match=r"masks\['last'\]\.mask: got one for positions \[7\]"):
        model(batch, masks | {"last": SiteMask(mask=torch.ones(BATCH + 1, 2))})
    assert torch.equal(patched(batch), expected_clean)
    assert torch.equal(model(batch), expected_clean)
    assert torch.equal(model.clean_pass(batch).output, expected_clean)
    assert torch.equal(model(batch, masks), expected_masked)


def test_masks_for_an_unknown_site_are_refused() -> None:
    model = make("tms")
    with pytest.raises(
        ValueError, match=r"no such site: \['embd'\]; the sites are \['embed', 'hidden.0', 'unembed'\]"
    ):
        model(batch_of("tms"), {"embd": SiteMask()})


def test_an_unknown_site_is_refused_with_those_that_there_are() -> None:
    model = make("tms")
    for ask in (model.pieces, model.weight, model.weight_delta):
        with pytest.raises(ValueError, match=r"no such site: \['foo'\]; the sites are \['embed', 'hidden.0'"):
            ask("foo")


def test_a_mask_on_its_own_is_refused_where_how_a_site_is_masked_is_meant() -> None:
    with pytest.raises(TypeError) as caught:
        make("tms")(batch_of("tms"), {"embed": torch.ones(BATCH, 20)})
    assert str(caught.value) == "masks['embed']: got a Tensor, must be SiteMask(mask=…)"


@pytest.mark.parametrize("case", CASES)
def test_the_clean_pass_holds_each_sites_input_and_output(case: str) -> None:
    model, batch = make(case), batch_of(case)
    clean = model.clean_pass(batch)
    assert_same(case, clean.output, model.target(batch))
    assert set(clean.inputs) == set(clean.outputs) == set(model.site_names)
    for name in model.site_names:
        layer = model.target.get_submodule(name)
        own = dense(clean.outputs[name])
        assert_same(case, layer(dense(clean.inputs[name])), own)
        assert not own.requires_grad
    first = batch @ model.target.W_E if isinstance(model.target, ResidMLPModel) else batch
    assert torch.equal(dense(clean.inputs[model.site_names[0]]), first)


@pytest.mark.parametrize("case", CASES)
def test_causal_importances_come_from_clean_activations(case: str) -> None:
    model, batch = make(case), batch_of(case)
    expected = model.causal_importances(batch)
    inputs: dict[str, Tensor] = {}
    handles = [
        model.target.get_submodule(name).register_forward_hook(
            lambda _, given, __, name=name: inputs.update({name: given[0]})
        )
        for name in model.site_names
    ]
    model.target(batch)
    for handle in handles:
        handle.remove()
    model(batch, random_masks(model, (BATCH,)))  # leaves nothing behind
    again = model.causal_importances(batch)
    for name in model.site_names:
        V = model.pieces(name).V
        h = V[inputs[name]] if not inputs[name].is_floating_point() else inputs[name] @ V
        net = model.ci_fn.get_submodule("sites." + name.replace(".", "/"))
        torch.testing.assert_close(expected[name].z, net(h))
        assert torch.equal(again[name].z, expected[name].z)


def test_with_the_paper_function_the_gradient_of_causal_importances_reaches_v() -> None:
    model, batch = make("sequential"), batch_of("sequential")
    z = model.causal_importances(batch)["last"].z.sum()
    V, U = model.pieces("last").V, model.pieces("last").U
    gradient_V, gradient_U = torch.autograd.grad(z, [V, U], allow_unused=True)
    assert torch.count_nonzero(gradient_V) > 0
    assert gradient_U is None


def test_functions_of_the_sites_input_leave_v_alone() -> None:
    model, batch = make("sequential", ci_fn=SharedMLPCausalImportance(hidden=[4])), batch_of("sequential")
    z = model.causal_importances(batch)["last"].z.sum()
    (gradient,) = torch.autograd.grad(z, [model.pieces("last").V], allow_unused=True)
    assert gradient is None


TRANSFORMER = GlobalTransformerCausalImportance(d_model=8, n_heads=2, n_layers=1, d_mlp=8)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ci_fn", [GlobalMLPCausalImportance(hidden=[4]), TRANSFORMER])
def test_functions_of_all_sites_at_once_read_whatever_the_sites_of_a_target_see(
    case: str, ci_fn: CausalImportanceFn
) -> None:
    model, positions = make(case, ci_fn=ci_fn), (2, 5) if "tokens" in case else (BATCH,)
    found = model.causal_importances(batch_of(case, *positions))
    assert {name: tuple(ci.lower.shape) for name, ci in found.items()} == {
        name: (*positions, model.pieces(name).C) for name in model.site_names
    }
    assert all(ci.z.isfinite().all() for ci in found.values())


def test_padding_is_kept_out_of_causal_importances() -> None:
    model, batch = make("tokens", ci_fn=TRANSFORMER), batch_of("tokens", 2, 5)
    valid = (torch.arange(5) < 3).expand(2, 5)
    found = model.importances(model.activations(model.clean_pass(batch)), valid=valid)
    wanted = model.causal_importances(batch[:, :3])
    for name in model.site_names:
        torch.testing.assert_close(found[name].z[:, :3], wanted[name].z, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("roots", [True, False])
@pytest.mark.parametrize("delta", [True, False])
def test_reusing_the_clean_pass_changes_neither_values_nor_gradients(
    case: str, roots: bool, delta: bool
) -> None:
    model, batch = make(case), batch_of(case)
    if roots:
        model.roots = find_roots(model, batch, model.clean_pass(batch))
    every = random_masks(model, (BATCH,), delta=delta)
    routed = random_masks(model, (BATCH,), delta=delta, route=True)
    choices = [
        every,
        routed,
        *({name: every[name]} for name in every),
        *({name: routed[name]} for name in every),
    ]
    for masks in choices:
        clean = model.clean_pass(batch)
        reuse = Reuse(clean, model.activations(clean), products={})
        outputs = model(batch, masks, reuse=reuse), model(batch, masks)
        torch.testing.assert_close(*outputs, atol=1e-6, rtol=1e-6)
        wanted = list(model.component_parameters())
        gradients = [torch.autograd.grad(y.square().sum(), wanted, allow_unused=True) for y in outputs]
        for own, expected in zip(*gradients, strict=True):
            assert (own is None) == (expected is None)
            if own is not None and expected is not None:
                torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["tied tms", "tied tokens"])
def test_a_tie_shares_one_pair_of_parameters(case: str) -> None:
    model = make(case)
    (tied, source), *_ = model.config.tied.items()
    assert torch.equal(model.pieces(tied).V, model.pieces(source).U.T)
    torch.testing.assert_close(model.weight_delta(tied), model.weight_delta(source).T)
    untied = make(case.removeprefix("tied "))
    assert len(list(model.component_parameters())) == len(list(untied.component_parameters())) - 2
    # each site keeps a causal-importance function of its own
    shapes = {name: p.shape for name, p in model.ci_fn.named_parameters()}
    assert len(shapes) == 4 * len(model.site_names)


def test_a_tied_site_may_come_before_its_source() -> None:
    target, patterns, _ = CASES["tms"]
    config = Decomposition(sites=patterns, tied={"embed": "unembed"})
    model = DecomposedModel(copy.deepcopy(target), config, MLPCausalImportance(), seed=0)
    assert model.site_names == ("embed", "hidden.0", "unembed")
    assert torch.equal(model.pieces("embed").V, model.pieces("unembed").U.T)


def test_a_deep_copy_keeps_the_tie_and_stands_alone() -> None:
    model, batch = make("tied tms"), batch_of("tms")
    masks = random_masks(model, (BATCH,))
    before = model(batch, masks)
    clone = copy.deepcopy(model)
    assert torch.equal(clone(batch, masks), before)
    with torch.no_grad():
        clone.pieces("embed").U.mul_(2)
        clone.target.get_parameter("embed.weight").mul_(3)
    assert torch.equal(clone.pieces("unembed").V, clone.pieces("embed").U.T)
    assert torch.equal(clone(batch, all_ones(clone, (BATCH,))), clone.target(batch))
    assert torch.equal(model(batch, masks), before)


@pytest.mark.parametrize("case", CASES)
def test_a_change_of_precision_reaches_masked_passes_with_buffers_and_ties(case: str) -> None:
    model, batch = make(case), batch_of(case)
    single = model(batch, random_masks(model, (BATCH,)))
    model = model.double()
    batch = batch.double() if batch.is_floating_point() else batch
    masks = {
        name: SiteMask(m.mask.double(), m.delta.double()) for name, m in random_masks(model, (BATCH,)).items()
    }
    assert model(batch, masks).dtype == torch.float64
    torch.testing.assert_close(model(batch, masks).float(), single, atol=1e-4, rtol=1e-4)
    assert_same(case, model.clean_pass(batch).output, model.target(batch))


def test_the_target_stays_in_evaluation_mode() -> None:
    target = nn.Sequential(nn.Linear(5, 50), nn.Dropout(0.5), nn.Linear(50, 5))
    model = DecomposedModel(
        target, Decomposition(sites={"all": SitePattern(pattern="*", C=3)}), MLPCausalImportance(), seed=0
    )
    batch = torch.randn(BATCH, 5)
    for mode in (True, False):
        model.train(mode)
        assert model.training is mode
        assert torch.equal(model(batch), model.clean_pass(batch).output)
        assert torch.equal(model(batch), model(batch, all_ones(model, (BATCH,))))


def test_a_saved_state_comes_back() -> None:
    model, other, batch = make("tied tms"), make("tied tms", seed=1), batch_of("tms")
    masks = random_masks(model, (BATCH,))
    assert not torch.equal(model(batch, masks), other(batch, masks))
    state = {name: tensor.clone() for name, tensor in model.trainable_state().items()}
    other.load_trainable_state(state)
    assert torch.equal(model(batch, masks), other(batch, masks))
    assert torch.equal(
        model.causal_importances(batch)["unembed"].z, other.causal_importances(batch)["unembed"].z
    )


def test_a_state_that_does_not_fit_is_refused() -> None:
    model = make("tms")
    state = model.trainable_state()
    with pytest.raises(ValueError, match=r"saved weights do not fit this model: \['extra'\] differ"):
        model.load_trainable_state(state | {"extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"subcomponents.embed.V: saved \(1,\), model \(5, 6\)"):
        model.load_trainable_state(state | {"subcomponents.embed.V": torch.zeros(1)})


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.fc(x))
        return y


class TwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.two = self.one

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.two(self.one(x))
        return y


class Idle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(4, 4)
        self.idle = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.used(x)
        return y


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            Twice(),
            "got fc, which the target runs more than once per forward pass; the target has no other matrices",
        ),
        (
            TwoNames(),
            "got one, which the target runs more than once per forward pass; "
            "the target has no other matrices",
        ),
        (
            Idle(),
            "got idle, which the target never runs; decompose the others alone: "
            "'decomposition.sites.used.pattern=used'",
        ),
    ],
)
def test_a_site_that_does_not_run_exactly_once_is_named(target: nn.Module, message: str) -> None:
    config = Decomposition(sites={"all": SitePattern(pattern="*", C=3)})
    model = DecomposedModel(target, config, MLPCausalImportance(), seed=0)
    with pytest.raises(ConfigError) as caught:
        model.clean_pass(torch.randn(2, 4))
    assert str(caught.value) == f"decomposition.sites: {message}"
    assert model(torch.randn(2, 4)).shape == (2, 4)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"a": SitePattern(pattern="nothing", C=2)}, "a.pattern: 'nothing' matches no module"),
        (
            {"a": SitePattern(pattern="*", C=2), "b": SitePattern(pattern="last", C=2)},
            "b.pattern: 'last' matches module 'last', which decomposition.sites.a matches already",
        ),
    ],
)
def test_mistakes_in_patterns_are_told_before_anything_is_built(
    patterns: dict[str, SitePattern], message: str
) -> None:
    target = initialised(Sequential())
    with pytest.raises(ConfigError, match=message):
        DecomposedModel(target, Decomposition(sites=patterns), MLPCausalImportance(), seed=0)
    assert all(parameter.requires_grad for parameter in target.parameters())


def test_a_masked_pass_can_be_mapped_over_a_replica_axis() -> None:
    models = [make("tied tms", seed=seed) for seed in (0, 1)]
    batch = batch_of("tms")
    masks = random_masks(models[0], (BATCH,))
    stacked = {
        name: torch.stack([model.trainable_state()[name] for model in models])
        for name in models[0].trainable_state()
    }
    together = torch.vmap(lambda state: torch.func.functional_call(models[0], state, (batch, masks)))(stacked)
    for index, model in enumerate(models):
        torch.testing.assert_close(together[index], model(batch, masks))
