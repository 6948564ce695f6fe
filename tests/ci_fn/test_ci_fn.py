"""Causal-importance functions: what they compute and how they start."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from spd_hydra import rng
from spd_hydra.ci_fn.base import CausalImportanceFn, SiteActivation, SiteShape
from spd_hydra.ci_fn.global_mlp import GlobalMLPCausalImportance
from spd_hydra.ci_fn.global_transformer import GlobalTransformerCausalImportance
from spd_hydra.ci_fn.mlp import MLPCausalImportance
from spd_hydra.ci_fn.shared_mlp import SharedMLPCausalImportance
from spd_hydra.ci_fn.vector_mlp import VectorMLPCausalImportance
from spd_hydra.factored import dense
from spd_hydra.section import ConfigError, registered

SITES = {"embed": SiteShape(d_in=5, C=4), "layers.0.mlp": SiteShape(d_in=3, C=7)}
KINDS: list[CausalImportanceFn] = [
    MLPCausalImportance(hidden=6),
    VectorMLPCausalImportance(hidden=6),
    SharedMLPCausalImportance(hidden=[6, 8]),
    GlobalMLPCausalImportance(hidden=[6]),
    GlobalTransformerCausalImportance(d_model=8, n_heads=2, n_layers=1, d_mlp=6),
]


def build(spec: CausalImportanceFn, seed: int = 0, sites: dict[str, SiteShape] = SITES) -> nn.Module:
    return spec.build(sites, rng.generator(seed, "ci_fn"))


def perturbed(spec: CausalImportanceFn, sites: dict[str, SiteShape] = SITES) -> nn.Module:
    """A module whose biases are not zero, so that they matter."""
    module, generator = build(spec, sites=sites), rng.generator(1, "biases")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


def activations(*positions: int) -> dict[str, SiteActivation]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: SiteActivation(
            torch.randn(*positions, shape.d_in, generator=generator),
            torch.randn(*positions, shape.C, generator=generator).requires_grad_(),
        )
        for name, shape in SITES.items()
    }


def parameters_of(module: nn.Module, site: str) -> dict[str, Tensor]:
    prefix = f"sites.{site.replace('.', '/')}."
    return {
        name.removeprefix(prefix): parameter
        for name, parameter in module.named_parameters()
        if name.startswith(prefix)
    }


@pytest.mark.parametrize("spec", KINDS)
@pytest.mark.parametrize("positions", [(6,), (2, 3)])
def test_every_site_gets_values_of_its_own_shape(
    spec: CausalImportanceFn, positions: tuple[int, ...]
) -> None:
    z = build(spec)(activations(*positions))
    assert {name: tuple(own.shape) for name, own in z.items()} == {
        "embed": (*positions, 4),
        "layers.0.mlp": (*positions, 7),
    }


def test_mlp_is_a_private_network_of_each_inner_activation() -> None:
    module, given = perturbed(MLPCausalImportance(hidden=6)), activations(9)
    z = module(given)
    for site, (_, h) in given.items():
        p = parameters_of(module, site)
        for b in range(9):
            for c in range(SITES[site].C):
                hidden = [gelu(p["w_in"][c, j] * h[b, c] + p["b_in"][c, j]) for j in range(6)]
                value = sum((p["w_out"][c, j] * hidden[j] for j in range(6)), start=p["b_out"][c])
                assert z[site][b, c].item() == pytest.approx(value.item(), abs=3e-6)


def test_vector_mlp_is_a_private_network_of_the_sites_input() -> None:
    module, given = perturbed(VectorMLPCausalImportance(hidden=6)), activations(9)
    z = module(given)
    for site, (x, _) in given.items():
        p = parameters_of(module, site)
        for b in range(9):
            for c in range(SITES[site].C):
                hidden = [gelu(x[b] @ p["w_in"][:, c, j] + p["b_in"][c, j]) for j in range(6)]
                value = sum((p["w_out"][c, j] * hidden[j] for j in range(6)), start=p["b_out"][c])
                assert z[site][b, c].item() == pytest.approx(value.item(), abs=3e-6)


def test_shared_mlp_is_one_network_per_site() -> None:
    module, given = perturbed(SharedMLPCausalImportance(hidden=[6, 8])), activations(9)
    z = module(given)
    for site, (x, _) in given.items():
        p = parameters_of(module, site)
        for b in range(9):
            value = x[b]
            for layer in ("0", "2", "4"):
                value = torch.stack(
                    [
                        sum((w * v for w, v in zip(row, value, strict=True)), start=bias)
                        for row, bias in zip(p[f"{layer}.weight"], p[f"{layer}.bias"], strict=True)
                    ]
                )
                value = value if layer == "4" else value * (1 + torch.erf(value / math.sqrt(2))) / 2
            torch.testing.assert_close(z[site][b], value, atol=3e-6, rtol=1e-5)


def test_shared_mlp_without_hidden_layers_is_linear() -> None:
    module, given = perturbed(SharedMLPCausalImportance(hidden=[])), activations(9)
    p = parameters_of(module, "embed")
    expected = given["embed"].input @ p["0.weight"].T + p["0.bias"]
    torch.testing.assert_close(module(given)["embed"], expected)


@pytest.mark.parametrize(
    ("spec", "shapes"),
    [
        (KINDS[0], {"w_in": (7, 6), "b_in": (7, 6), "w_out": (7, 6), "b_out": (7,)}),
        (KINDS[1], {"w_in": (3, 7, 6), "b_in": (7, 6), "w_out": (7, 6), "b_out": (7,)}),
        (
            KINDS[2],
            {
                "0.weight": (6, 3),
                "0.bias": (6,),
                "2.weight": (8, 6),
                "2.bias": (8,),
                "4.weight": (7, 8),
                "4.bias": (7,),
            },
        ),
    ],
)
def test_parameter_shapes(spec: CausalImportanceFn, shapes: dict[str, tuple[int, ...]]) -> None:
    found = parameters_of(build(spec), "layers.0.mlp")
    assert {name: tuple(parameter.shape) for name, parameter in found.items()} == shapes


LARGE = {"site": SiteShape(d_in=30, C=400)}


@pytest.mark.parametrize(
    ("spec", "variances"),
    [
        (MLPCausalImportance(hidden=50), {"w_in": 2 / 1, "w_out": 1 / 50}),
        (VectorMLPCausalImportance(hidden=50), {"w_in": 2 / 30, "w_out": 1 / 50}),
        (
            SharedMLPCausalImportance(hidden=[300, 200]),
            {"0.weight": 2 / 30, "2.weight": 2 / 300, "4.weight": 1 / 200},
        ),
    ],
)
def test_weights_start_kaiming_normal_and_biases_at_zero(
    spec: CausalImportanceFn, variances: dict[str, float]
) -> None:
    found = parameters_of(build(spec, sites=LARGE), "site")
    for name, parameter in found.items():
        if name in variances:
            n, scaled = parameter.numel(), parameter.detach() / variances[name] ** 0.5
            assert abs(scaled.mean()) < 4.5 / n**0.5, name
            assert abs(scaled.square().mean() - 1) < 4.5 * (2 / n) ** 0.5, name
            assert abs(scaled.pow(4).mean() - 3) < 4.5 * (96 / n) ** 0.5, name  # normal, not uniform
        else:
            assert torch.count_nonzero(parameter) == 0, name


@pytest.mark.parametrize("spec", KINDS)
def test_initial_weights_depend_on_the_seed_alone(spec: CausalImportanceFn) -> None:
    torch.manual_seed(5)
    first = build(spec).state_dict()
    torch.manual_seed(6)
    again, other = build(spec).state_dict(), build(spec, seed=1).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_subcomponents_start_with_networks_of_their_own() -> None:
    w_in = parameters_of(build(KINDS[0]), "embed")["w_in"]
    assert len({tuple(row) for row in w_in.tolist()}) == 4


TOKENS = {"h.0.mlp": SiteShape(3, 4), "wte": SiteShape(11, 5, embedding=True)}


def tokens(*positions: int) -> dict[str, SiteActivation]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(11, positions, generator=generator)
    vectors = torch.randn(*positions, 3, generator=generator)
    return {
        "h.0.mlp": SiteActivation(vectors, torch.randn(*positions, 4, generator=generator)),
        "wte": SiteActivation(ids, torch.randn(*positions, 5, generator=generator)),
    }


@pytest.mark.parametrize("spec", KINDS)
def test_every_function_takes_tokens(spec: CausalImportanceFn) -> None:
    z = build(spec, sites=TOKENS)(tokens(4, 3))
    assert {name: tuple(own.shape) for name, own in z.items()} == {"h.0.mlp": (4, 3, 4), "wte": (4, 3, 5)}


def assert_equal_with_gradients(z: Tensor, wanted: Tensor, parameters: dict[str, Tensor]) -> None:
    torch.testing.assert_close(z, wanted, atol=3e-6, rtol=1e-5)
    own = torch.autograd.grad(z.square().sum(), list(parameters.values()))
    expected = torch.autograd.grad(wanted.square().sum(), list(parameters.values()))
    for name, gradient, right in zip(parameters, own, expected, strict=True):
        torch.testing.assert_close(gradient, right, atol=1e-4, rtol=1e-4)
        assert torch.count_nonzero(gradient) > 0, name


def test_shared_mlp_reads_a_token_as_a_one_hot_vector() -> None:
    module, given = perturbed(SharedMLPCausalImportance(hidden=[6]), TOKENS), tokens(15, 2)
    p = parameters_of(module, "wte")
    one_hot = nn.functional.one_hot(given["wte"].input, 11).float()
    wanted = gelu(one_hot @ p["0.weight"] + p["0.bias"]) @ p["2.weight"].T + p["2.bias"]
    assert_equal_with_gradients(module(given)["wte"], wanted, p)


def test_vector_mlp_reads_a_token_as_a_one_hot_vector() -> None:
    module, given = perturbed(VectorMLPCausalImportance(hidden=6), TOKENS), tokens(15, 2)
    p = parameters_of(module, "wte")
    one_hot = nn.functional.one_hot(given["wte"].input, 11).float()
    hidden = gelu(torch.einsum("bti,icj->btcj", one_hot, p["w_in"]) + p["b_in"])
    assert_equal_with_gradients(module(given)["wte"], (hidden * p["w_out"]).sum(-1) + p["b_out"], p)


@pytest.mark.parametrize(
    ("spec", "first"), [(VectorMLPCausalImportance(), "w_in"), (SharedMLPCausalImportance(), "0.weight")]
)
def test_weights_that_a_token_reads_start_with_the_variance_of_one_input(
    spec: CausalImportanceFn, first: str
) -> None:
    sites = {"wte": SiteShape(500, 30, embedding=True)}
    weight = parameters_of(build(spec, sites=sites), "wte")[first].detach()
    assert abs(weight.square().mean() / 2 - 1) < 4.5 * (2 / weight.numel()) ** 0.5


@pytest.mark.parametrize("spec", KINDS)
def test_a_replica_axis_can_be_mapped_over_tokens(spec: CausalImportanceFn) -> None:
    modules, given = [build(spec, seed=seed, sites=TOKENS) for seed in (0, 1)], tokens(9)
    stacked, _ = torch.func.stack_module_state(modules)
    vectors, first = given["h.0.mlp"], dense(given["wte"].input)
    ids = torch.stack([first, first.flip(0)])

    def mapped(parameters: dict[str, Tensor], own: Tensor) -> Tensor:
        activations = {"h.0.mlp": vectors, "wte": SiteActivation(own, given["wte"].inner)}
        z: dict[str, Tensor] = torch.func.functional_call(modules[0], parameters, (activations,))
        return torch.cat(list(z.values()), dim=-1)

    together = torch.vmap(mapped)(stacked, ids)
    gradients = torch.autograd.grad(together.square().mean(), list(stacked.values()))
    for number, module in enumerate(modules):
        parameters = dict(module.named_parameters())
        alone = mapped(parameters, ids[number])
        torch.testing.assert_close(together[number], alone)
        wanted = torch.autograd.grad(alone.square().mean() / 2, list(parameters.values()))
        for own, expected in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(own[number], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("spec", KINDS[:4])
def test_functions_of_each_position_by_itself_ignore_padding(spec: CausalImportanceFn) -> None:
    module, given = build(spec), activations(2, 3)
    z, again = module(given), module(given, valid=torch.tensor([[True, False, False]] * 2))
    assert all(torch.equal(z[name], again[name]) for name in SITES)


def test_the_gradient_of_mlp_reaches_the_inner_activation_and_no_other_subcomponent() -> None:
    module, given = perturbed(KINDS[0]), activations(6)
    h = given["embed"].inner
    (gradient,) = torch.autograd.grad(module(given)["embed"][:, 2].sum(), h)
    assert gradient[:, 2].abs().min() > 0
    gradient[:, 2] = 0
    assert torch.count_nonzero(gradient) == 0


@pytest.mark.parametrize("spec", KINDS)
def test_every_parameter_gets_a_gradient(spec: CausalImportanceFn) -> None:
    module = perturbed(spec)
    torch.autograd.backward([z.square().sum() for z in module(activations(20)).values()])
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert torch.count_nonzero(parameter.grad) > 0, name


@pytest.mark.parametrize("spec", KINDS[:2])
def test_no_hidden_activation_of_private_networks_is_kept_for_the_backward_pass(
    spec: CausalImportanceFn,
) -> None:
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    module, given = build(spec), activations(500)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(given)
    assert kept
    assert max(kept) <= 500 * 7  # hidden activations would be 500 × 7 × 6


def test_recomputing_the_hidden_layer_of_vector_mlp_does_not_change_its_gradients() -> None:
    module, given = perturbed(KINDS[1]), activations(11)
    p = parameters_of(module, "embed")
    x = given["embed"].input
    plain = (gelu(torch.einsum("bi,icj->bcj", x, p["w_in"]) + p["b_in"]) * p["w_out"]).sum(-1) + p["b_out"]
    for own, expected in zip(
        torch.autograd.grad(module(given)["embed"].square().sum(), list(p.values())),
        torch.autograd.grad(plain.square().sum(), list(p.values())),
        strict=True,
    ):
        torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spec", KINDS)
def test_a_replica_axis_can_be_mapped_over(spec: CausalImportanceFn) -> None:
    modules = [build(spec, seed=seed) for seed in (0, 1)]
    stacked, _ = torch.func.stack_module_state(modules)
    given = {name: (own.input, own.inner) for name, own in activations(8).items()}

    def mapped(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        own = {name: SiteActivation(*pair) for name, pair in given.items()}
        found: dict[str, Tensor] = torch.func.functional_call(modules[0], parameters, (own,))
        return found

    together = torch.vmap(mapped)(stacked)
    for index, module in enumerate(modules):
        alone = module(activations(8))
        for site in SITES:
            torch.testing.assert_close(together[site][index], alone[site])
    loss = torch.stack([z.square().sum() for z in together.values()]).sum()
    gradients = torch.autograd.grad(loss, list(stacked.values()))
    loss = torch.stack([z.square().sum() for z in modules[1](activations(8)).values()]).sum()
    for own, expected in zip(
        gradients, torch.autograd.grad(loss, list(modules[1].parameters())), strict=True
    ):
        torch.testing.assert_close(own[1], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("spec", [MLPCausalImportance, VectorMLPCausalImportance])
def test_a_width_of_zero_is_refused(spec: type[MLPCausalImportance]) -> None:
    with pytest.raises(ConfigError, match="hidden: got 0, must be ≥ 1"):
        spec(hidden=0)


def test_each_kind_is_registered_under_its_name() -> None:
    assert registered("ci_fn").items() >= {
        ("mlp", MLPCausalImportance),
        ("vector_mlp", VectorMLPCausalImportance),
        ("shared_mlp", SharedMLPCausalImportance),
        ("global_mlp", GlobalMLPCausalImportance),
        ("global_transformer", GlobalTransformerCausalImportance),
    }


def test_vector_mlp_passes_the_gradient_on_to_its_input_and_takes_half_precision() -> None:
    module = perturbed(KINDS[1])
    p = parameters_of(module, "embed")
    x = activations(2, 3)["embed"].input.bfloat16().requires_grad_()
    given = {"embed": SiteActivation(x, torch.empty(0))}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = module(given)["embed"]
    (gradient,) = torch.autograd.grad(z.float().square().sum(), x)
    exact = x.detach().float().requires_grad_()
    plain = (gelu(torch.einsum("...i,icj->...cj", exact, p["w_in"]) + p["b_in"]) * p["w_out"]).sum(-1)
    (expected,) = torch.autograd.grad((plain + p["b_out"]).square().sum(), exact)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient.float(), expected, atol=0.03 * expected.abs().max().item(), rtol=0.05)
