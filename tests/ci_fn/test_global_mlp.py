"""`global_mlp`: one network for all sites."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from spd_hydra import rng
from spd_hydra.ci_fn.base import SiteActivation, SiteShape
from spd_hydra.ci_fn.global_mlp import GlobalMLPCausalImportance
from spd_hydra.ci_fn.global_transformer import GlobalTransformerCausalImportance
from spd_hydra.compiling import Kernel
from spd_hydra.factored import Factored, Matrix
from spd_hydra.section import ConfigError

SITES = {
    "layers.1.mlp": SiteShape(d_in=3, C=4),
    "wte": SiteShape(d_in=11, C=2, embedding=True),
    "head": SiteShape(d_in=5, C=3),
}
SPECS = [
    GlobalMLPCausalImportance(hidden=[6, 8]),
    GlobalTransformerCausalImportance(d_model=8, n_heads=2, n_layers=1, d_mlp=6),
]


def perturbed(
    spec: GlobalMLPCausalImportance | GlobalTransformerCausalImportance, sites: dict[str, SiteShape] = SITES
) -> nn.Module:
    """A module whose biases are not zero, so that they matter."""
    module, generator = spec.build(sites, rng.generator(0, "ci_fn")), rng.generator(1, "biases")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


def inputs(*positions: int, sites: dict[str, SiteShape] = SITES, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(shape.d_in, positions, generator=generator)
        if shape.embedding
        else torch.randn(*positions, shape.d_in, generator=generator)
        for name, shape in sites.items()
    }


def seen(x: dict[str, Tensor]) -> dict[str, SiteActivation]:
    return {name: SiteActivation(own, torch.empty(0)) for name, own in x.items()}


def explicit(module: nn.Module, x: dict[str, Tensor]) -> Tensor:
    """The network on the concatenated inputs, tokens as one-hot vectors."""
    one_hot = nn.functional.one_hot(x["wte"], 11).float()
    joined = torch.cat([x["layers.1.mlp"], one_hot, x["head"]], dim=-1)
    p = dict(module.named_parameters())
    first = torch.cat([p["first.weights.layers/1/mlp"], p["first.weights.wte"], p["first.weights.head"]])
    hidden = joined @ first + p["first.bias"]
    for layer in ("1", "3"):
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        hidden = hidden @ p[f"others.{layer}.weight"].T + p[f"others.{layer}.bias"]
    return hidden


def test_it_is_one_network_of_all_inputs_whose_output_is_split_by_site() -> None:
    module, x = perturbed(SPECS[0]), inputs(2, 7)
    z = module(seen(x))
    assert list(z) == list(SITES)
    wanted = explicit(module, x)
    torch.testing.assert_close(torch.cat([z[name] for name in SITES], dim=-1), wanted, atol=3e-6, rtol=1e-5)
    assert {name: own.shape[-1] for name, own in z.items()} == {"layers.1.mlp": 4, "wte": 2, "head": 3}


def test_its_gradients_are_those_of_the_network_on_one_hot_vectors() -> None:
    module, x = perturbed(SPECS[0]), inputs(30)  # of 11 tokens: some come several times
    parameters = list(module.parameters())
    own = torch.autograd.grad(torch.cat(list(module(seen(x)).values()), dim=-1).square().sum(), parameters)
    for gradient, wanted in zip(
        own, torch.autograd.grad(explicit(module, x).square().sum(), parameters), strict=True
    ):
        torch.testing.assert_close(gradient, wanted, atol=1e-4, rtol=1e-4)
        assert torch.count_nonzero(gradient) > 0


def test_without_hidden_layers_it_is_linear() -> None:
    sites = {name: SITES[name] for name in ("layers.1.mlp", "head")}
    module = perturbed(GlobalMLPCausalImportance(hidden=[]), sites)
    x = inputs(9, sites=sites)
    p = dict(module.named_parameters())
    wanted = x["layers.1.mlp"] @ p["first.weights.layers/1/mlp"] + x["head"] @ p["first.weights.head"]
    z = module(seen(x))
    torch.testing.assert_close(torch.cat([z[name] for name in sites], dim=-1), wanted + p["first.bias"])


@pytest.mark.parametrize("spec", SPECS)
def test_every_site_is_predicted_from_the_inputs_of_all(
    spec: GlobalMLPCausalImportance | GlobalTransformerCausalImportance,
) -> None:
    module, x = perturbed(spec), inputs(6)
    z = module(seen(x))
    for changed in SITES:
        other = module(seen(x | {changed: inputs(6, seed=1)[changed]}))
        assert all(not torch.equal(z[name], other[name]) for name in SITES)


@pytest.mark.parametrize("spec", SPECS)
def test_the_order_in_which_sites_ran_does_not_matter(
    spec: GlobalMLPCausalImportance | GlobalTransformerCausalImportance,
) -> None:
    module, x = perturbed(spec), inputs(2, 3)
    z, again = module(seen(x)), module(seen(dict(reversed(x.items()))))
    assert all(torch.equal(z[name], again[name]) for name in SITES)


@pytest.mark.parametrize("spec", SPECS)
def test_an_input_kept_as_products_gives_the_same_as_the_vector(
    spec: GlobalMLPCausalImportance | GlobalTransformerCausalImportance,
) -> None:
    module, x = perturbed(spec), inputs(6)
    c, basis = torch.randn(6, 2), torch.randn(2, 5)
    factored = Factored(((c, Matrix(basis)), (x["head"], None)))
    z = module(seen(x | {"head": factored}))
    wanted = module(seen(x | {"head": c @ basis + x["head"]}))
    for name in SITES:
        torch.testing.assert_close(z[name], wanted[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spec", SPECS)
def test_a_site_without_a_batch_axis_of_its_own_counts_in_every_row(
    spec: GlobalMLPCausalImportance | GlobalTransformerCausalImportance,
) -> None:
    module, x = perturbed(spec), inputs(4, 3)
    x["wte"] = x["wte"][:1]  # as position embeddings have it
    z = module(seen(x))
    wanted = module(seen(x | {"wte": x["wte"].expand(4, 3)}))
    for name in SITES:
        torch.testing.assert_close(z[name], wanted[name])


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("positions", [(4,), (4, 2)])
def test_sites_at_different_positions_are_refused_by_name(
    spec: GlobalMLPCausalImportance | GlobalTransformerCausalImportance, positions: tuple[int, ...]
) -> None:
    x = inputs(4, 3) | {"head": torch.zeros(*positions, 5)}
    with pytest.raises(ConfigError) as caught:
        perturbed(spec)(seen(x))
    assert str(caught.value) == (
        "ci_fn: global_mlp and global_transformer read the inputs of all sites at one position together, but "
        f"site 'layers.1.mlp' runs at positions of shape [4, 3] and site 'head' at {list(positions)}; leave "
        "one of them out, or use mlp, vector_mlp or shared_mlp"
    )


def test_the_first_layer_starts_with_the_variance_of_its_gain_at_inputs_of_mean_square_1() -> None:
    sites = {
        "narrow": SiteShape(d_in=30, C=300),
        "wide": SiteShape(d_in=90, C=100),
        "wte": SiteShape(d_in=5000, C=200, embedding=True),
    }
    spec = GlobalMLPCausalImportance(hidden=[400])
    p = dict(spec.build(sites, rng.generator(0, "ci_fn")).named_parameters())
    # Three sites of mean width 60: fan-in 180. A token's row is a third of the variance 2.
    wanted = {"narrow": 2 / 180, "wide": 2 / 180, "wte": 2 / 3}
    found = {name: p[f"first.weights.{name}"] for name in wanted}
    found["last"], wanted["last"] = p["others.1.weight"], 1 / 400
    for name, parameter in found.items():
        n, scaled = parameter.numel(), parameter.detach() / wanted[name] ** 0.5
        assert abs(scaled.mean()) < 4.5 / n**0.5, name
        assert abs(scaled.square().mean() - 1) < 4.5 * (2 / n) ** 0.5, name
    assert torch.count_nonzero(p["first.bias"]) == torch.count_nonzero(p["others.1.bias"]) == 0
    total = 30 * wanted["narrow"] + 90 * wanted["wide"] + wanted["wte"]
    assert total == pytest.approx(2)


@pytest.mark.parametrize("spec", SPECS)
def test_under_autocast_it_is_close_to_full_precision(
    spec: GlobalMLPCausalImportance | GlobalTransformerCausalImportance,
) -> None:
    module, x = perturbed(spec), inputs(5, 4)
    half = {name: own.bfloat16() if own.is_floating_point() else own for name, own in x.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = module(seen(half))
    wanted = module(seen(x))
    torch.autograd.backward([own.float().square().sum() for own in z.values()])
    for name in SITES:
        scale = wanted[name].abs().max().item()
        torch.testing.assert_close(z[name].float(), wanted[name], atol=0.03 * scale, rtol=0.03)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS)
def test_compiled_it_gives_the_same_values_and_gradients(
    spec: GlobalMLPCausalImportance | GlobalTransformerCausalImportance,
) -> None:
    module, x = perturbed(spec), inputs(3, 6)
    names = list(dict(module.named_parameters()))

    def values_and_gradients(valid: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(x, tensors, strict=False))
        weights = [p.detach().requires_grad_() for p in tensors[len(x) :]]
        z = functional_call(module, dict(zip(names, weights, strict=True)), (seen(given),), {"valid": valid})
        loss = torch.cat(list(z.values()), dim=-1).square().mean()
        return (*(own.detach() for own in z.values()), *torch.autograd.grad(loss, weights))

    valid = torch.arange(6) < torch.tensor([[6], [4], [0]])
    given = (valid, *x.values(), *(p.detach() for p in module.parameters()))
    for own, wanted in zip(Kernel(values_and_gradients)(*given), values_and_gradients(*given), strict=True):
        torch.testing.assert_close(own, wanted, atol=1e-5, rtol=1e-4)


def test_a_width_of_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"hidden: got \[4, 0\], must be ≥ 1"):
        GlobalMLPCausalImportance(hidden=[4, 0])
