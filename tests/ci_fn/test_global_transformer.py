"""`global_transformer`: what it computes, and what positions and padding do to it."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from spd_hydra import rng
from spd_hydra.ci_fn.base import SiteActivation, SiteShape
from spd_hydra.ci_fn.global_transformer import GlobalTransformerCausalImportance, Rotation
from spd_hydra.section import ConfigError

SITES = {
    "h.0.mlp": SiteShape(d_in=3, C=4),
    "wte": SiteShape(d_in=11, C=2, embedding=True),
    "head": SiteShape(d_in=5, C=3),
}
SPEC = GlobalTransformerCausalImportance(d_model=12, n_heads=3, n_layers=2, d_mlp=7, rope_base=100.0)


def perturbed(seed: int = 0) -> nn.Module:
    """A module whose biases are not zero, so that they matter."""
    module, generator = SPEC.build(SITES, rng.generator(seed, "ci_fn")), rng.generator(1, "biases")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


def inputs(*positions: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(shape.d_in, positions, generator=generator)
        if shape.embedding
        else torch.randn(*positions, shape.d_in, generator=generator)
        for name, shape in SITES.items()
    }


def importances(module: nn.Module, x: dict[str, Tensor], valid: Tensor | None = None) -> Tensor:
    """z of all sites beside one another."""
    z = module({name: SiteActivation(own, torch.empty(0)) for name, own in x.items()}, valid=valid)
    assert {name: own.shape[-1] for name, own in z.items()} == {"h.0.mlp": 4, "wte": 2, "head": 3}
    return torch.cat([z[name] for name in SITES], dim=-1)


def normed(x: Tensor) -> Tensor:
    return x / x.square().mean(-1, keepdim=True).sqrt()


def explicit(module: nn.Module, x: dict[str, Tensor], valid: Tensor) -> Tensor:
    """One sequence, head by head and query by query, with rotations as complex numbers."""
    p, length = dict(module.named_parameters()), len(x["wte"])
    joined = torch.cat([normed(x["h.0.mlp"]), torch.eye(11)[x["wte"]], normed(x["head"])], dim=-1)
    first = torch.cat([p["first.weights.h/0/mlp"], p["first.weights.wte"], p["first.weights.head"]])
    r = joined @ first + p["first.bias"]
    frequencies = torch.tensor([1.0, 100.0 ** (-2 / 4)])
    for block in ("blocks.0", "blocks.1"):
        q, k, v = (normed(r) @ p[f"{block}.attention.qkv.weight"].T).split(12, dim=-1)
        heads = []
        for head in range(3):
            own = slice(4 * head, 4 * head + 4)
            turned = [
                torch.complex(half[:, own][:, :2], half[:, own][:, 2:])
                * torch.exp(1j * torch.arange(length)[:, None] * frequencies)
                for half in (q, k)
            ]
            rows = []
            for query in range(length):
                scores = (turned[0][query] * turned[1].conj()).real.sum(-1) / math.sqrt(4)
                weights = torch.where(valid, scores.exp(), 0.0)
                rows.append((weights / weights.sum()) @ v[:, own])
            heads.append(torch.stack(rows))
        r = r + torch.cat(heads, dim=-1) @ p[f"{block}.attention.out.weight"].T
        hidden = normed(r) @ p[f"{block}.mlp.0.weight"].T + p[f"{block}.mlp.0.bias"]
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        r = r + hidden @ p[f"{block}.mlp.2.weight"].T + p[f"{block}.mlp.2.bias"]
    return r @ p["last.weight"].T + p["last.bias"]


@pytest.mark.parametrize("n_valid", [7, 4])
def test_it_is_the_transformer_of_its_definition(n_valid: int) -> None:
    module, x = perturbed(), inputs(2, 7)
    valid = torch.stack([torch.ones(7, dtype=torch.bool), torch.arange(7) < n_valid])
    z = importances(module, x, valid)
    for row in range(2):
        wanted = explicit(module, {name: own[row] for name, own in x.items()}, valid[row])
        torch.testing.assert_close(z[row], wanted, atol=2e-5, rtol=1e-4)
    if n_valid == 7:
        torch.testing.assert_close(importances(module, x), z, atol=2e-5, rtol=1e-4)


def test_a_product_of_turned_vectors_depends_on_the_difference_of_positions_only() -> None:
    q, k = torch.randn(8), torch.randn(8)
    rotation = Rotation.of_positions(9, 8, 50.0, torch.device("cpu"))
    scores = rotation.apply(q.expand(9, 8)) @ rotation.apply(k.expand(9, 8)).T
    for difference in range(-8, 9):
        wanted = 0.0
        for i in range(4):
            a, b = complex(q[i], q[i + 4]), complex(k[i], k[i + 4])
            angle = difference * 50.0 ** (-2 * i / 8)
            wanted += (a * b.conjugate() * complex(math.cos(angle), math.sin(angle))).real
        found = scores.diagonal(-difference)  # query minus key
        torch.testing.assert_close(found, torch.full_like(found, wanted), atol=1e-5, rtol=1e-4)
    assert scores[:, 0].std() > 0.1 * scores.abs().max()


def test_where_in_the_row_a_text_stands_does_not_matter_but_the_order_of_its_tokens_does() -> None:
    module, x = perturbed(), inputs(1, 4)
    z = importances(module, x)
    pad = inputs(1, 3, seed=1)
    later = {name: torch.cat([pad[name], own], dim=1) for name, own in x.items()}
    moved = importances(module, later, torch.arange(7)[None] >= 3)[:, 3:]
    torch.testing.assert_close(moved, z, atol=2e-5, rtol=1e-4)
    order = torch.tensor([2, 0, 3, 1])
    permuted = importances(module, {name: own[:, order] for name, own in x.items()})
    assert (permuted - z[:, order]).abs().max() > 1e-2


@pytest.mark.parametrize("changed", [0, 2, 4])
def test_every_position_is_seen_from_every_other(changed: int) -> None:
    module, x, other = perturbed(), inputs(1, 5), inputs(1, 5, seed=1)
    at = torch.arange(5) == changed
    mixed = {
        name: torch.where(at.view(5, *[1] * (own.dim() - 2)), other[name], own) for name, own in x.items()
    }
    assert ((importances(module, mixed) - importances(module, x)).abs().amax((0, 2)) > 1e-4).all()


def test_rows_do_not_see_each_other() -> None:
    module, x, other = perturbed(), inputs(3, 5), inputs(3, 5, seed=1)
    mixed = {name: torch.cat([own[:1], other[name][1:]]) for name, own in x.items()}
    torch.testing.assert_close(importances(module, mixed)[0], importances(module, x)[0])


def test_padding_does_not_influence_real_positions() -> None:
    module, x, other = perturbed(), inputs(2, 6), inputs(2, 6, seed=1)
    valid = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 0, 1, 1]]).bool()
    mixed = {
        name: torch.where(valid if own.dim() == 2 else valid[..., None], own, other[name])
        for name, own in x.items()
    }
    z, again = importances(module, x, valid), importances(module, mixed, valid)
    assert torch.equal(z[valid], again[valid])
    short = importances(module, {name: own[:1, :4] for name, own in x.items()})
    torch.testing.assert_close(z[:1, :4], short, atol=2e-5, rtol=1e-4)


def test_no_gradient_comes_from_real_positions_to_padding() -> None:
    module, x = perturbed(), inputs(1, 5)
    x["head"].requires_grad_()
    z = importances(module, x, torch.arange(5)[None] < 3)
    (gradient,) = torch.autograd.grad(z[:, :3].square().sum(), x["head"])
    assert torch.count_nonzero(gradient[:, 3:]) == 0
    assert torch.count_nonzero(gradient[:, :3]) == gradient[:, :3].numel()


def test_a_row_of_padding_alone_stays_finite() -> None:
    module, x = perturbed(), inputs(2, 4)
    z = importances(module, x, torch.tensor([[True] * 4, [False] * 4]))
    torch.autograd.backward(z.square().sum())
    assert z.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_an_input_without_positions_is_a_row_of_one() -> None:
    module, x = perturbed(), inputs(6)
    with_axis = {name: own[:, None] for name, own in x.items()}
    z = importances(module, x)
    assert z.shape == (6, 9)
    torch.testing.assert_close(z, importances(module, with_axis)[:, 0])
    for row in range(6):
        wanted = explicit(module, {name: own[row] for name, own in with_axis.items()}, torch.tensor([True]))
        torch.testing.assert_close(z[row], wanted[0], atol=2e-5, rtol=1e-4)


def test_every_parameter_gets_a_gradient_and_over_one_position_queries_and_keys_exactly_none() -> None:
    module = perturbed()
    for positions, count in [((20, 3), 36), ((20,), 12)]:  # rows of qkv: 12 queries, 12 keys, 12 values
        parameters = dict(module.named_parameters())
        found = torch.autograd.grad(
            importances(module, inputs(*positions)).square().sum(), list(parameters.values())
        )
        for name, gradient in zip(parameters, found, strict=True):
            assert torch.count_nonzero(gradient) > 0, name
            if name.endswith("qkv.weight"):
                assert gradient.abs().amax(1).nonzero().flatten().tolist() == list(range(36 - count, 36))


def test_the_length_of_a_sites_input_does_not_matter() -> None:
    module, x = perturbed(), inputs(3, 4)
    longer = x | {"head": 7 * x["head"]}
    torch.testing.assert_close(
        importances(module, longer), importances(module, x), atol=1e-4, rtol=1e-4
    )  # up to the norm's epsilon


def test_a_replica_axis_can_be_mapped_over() -> None:
    modules, x = [perturbed(seed) for seed in (0, 1)], inputs(2, 5)
    stacked, _ = torch.func.stack_module_state(modules)

    def mapped(parameters: dict[str, Tensor]) -> Tensor:
        own = {name: SiteActivation(value, torch.empty(0)) for name, value in x.items()}
        z: dict[str, Tensor] = torch.func.functional_call(modules[0], parameters, (own,))
        return torch.cat(list(z.values()), dim=-1)

    with sdpa_kernel(SDPBackend.MATH):  # as `StackedStep` does
        together = torch.vmap(mapped)(stacked)
    gradients = torch.autograd.grad(together.square().mean(), list(stacked.values()))
    for number, module in enumerate(modules):
        alone = importances(module, x)
        torch.testing.assert_close(together[number], alone, atol=1e-5, rtol=1e-4)
        wanted = torch.autograd.grad(alone.square().mean() / 2, list(module.parameters()))
        for own, expected in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(own[number], expected, atol=1e-5, rtol=1e-3)


def test_weights_start_kaiming_normal_and_all_biases_but_the_first_at_zero() -> None:
    spec = GlobalTransformerCausalImportance(d_model=64, n_heads=2, n_layers=1, d_mlp=128)
    sites = {"a": SiteShape(d_in=100, C=150), "b": SiteShape(d_in=60, C=50)}
    p = dict(spec.build(sites, rng.generator(0, "ci_fn")).named_parameters())
    variances = {
        "first.weights.a": 1 / 160,
        "first.weights.b": 1 / 160,
        "blocks.0.attention.qkv.weight": 1 / 64,
        "blocks.0.attention.out.weight": 1 / 64,
        "blocks.0.mlp.0.weight": 2 / 64,
        "blocks.0.mlp.2.weight": 1 / 128,
        "last.weight": 1 / 64,
    }
    for name, variance in variances.items():
        n, scaled = p[name].numel(), p[name].detach() / variance**0.5
        assert abs(scaled.mean()) < 4.5 / n**0.5, name
        assert abs(scaled.square().mean() - 1) < 4.5 * (2 / n) ** 0.5, name
    biases = {"blocks.0.mlp.0.bias", "blocks.0.mlp.2.bias", "last.bias"}
    assert p.keys() == variances.keys() | biases | {"first.bias"}
    assert all(torch.count_nonzero(p[name]) == 0 for name in biases)


def test_gradients_of_inputs_that_are_all_zero_are_as_large_as_those_of_others() -> None:
    spec, sites = GlobalTransformerCausalImportance(), {"a": SiteShape(d_in=5, C=20)}
    module = spec.build(sites, rng.generator(0, "ci_fn"))

    def gradient_norm(x: Tensor) -> Tensor:
        (z,) = module({"a": SiteActivation(x, torch.empty(len(x), 20))}).values()
        return torch.nn.utils.get_total_norm(torch.autograd.grad(z.square().mean(), [*module.parameters()]))

    zeros, others = gradient_norm(torch.zeros(8, 5)), gradient_norm(torch.randn(8, 5))
    assert 0.2 < zeros / others < 5


def test_a_width_that_the_heads_cannot_share_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        GlobalTransformerCausalImportance(d_model=20, n_heads=4)
    assert str(caught.value) == (
        "d_model: got 20, must be a multiple of 2 x n_heads = 8: every head is rotated in pairs of "
        "coordinates"
    )
    with pytest.raises(ConfigError, match="n_heads: got 0, must be ≥ 1"):
        GlobalTransformerCausalImportance(n_heads=0)
