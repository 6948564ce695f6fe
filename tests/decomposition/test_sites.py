"""From patterns to sites: what matches, and what each mistake is told."""

import re

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from spd_hydra.decomposition.config import Decomposition, SitePattern
from spd_hydra.decomposition.layers import bias_vector, is_decomposable, is_embedding, weight_matrix
from spd_hydra.decomposition.sites import check_ties, find_sites, site_groups
from spd_hydra.decomposition.subcomponents import Init
from spd_hydra.factored import WritingLinear
from spd_hydra.model.tms import TMSModel
from spd_hydra.model.transposed import TransposedLinear
from spd_hydra.section import ConfigError


def conv1d(d_out: int, d_in: int) -> nn.Module:
    layer: nn.Module = Conv1D(d_out, d_in)
    return layer


class Target(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(11, 4)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(4), "fc": nn.Linear(4, 8), "proj": conv1d(4, 8)})
            for _ in range(2)
        )
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.wte.weight


def patterns(**given: tuple[str, int]) -> dict[str, SitePattern]:
    return {name: SitePattern(pattern=pattern, C=C) for name, (pattern, C) in given.items()}


def test_sites_are_found_in_the_order_of_the_targets_modules_with_their_own_c() -> None:
    sites = find_sites(Target(), patterns(out=("head", 3), mlp=("layers.*.fc", 7), proj=("layers.1.proj", 9)))
    found = [(name, entry.C) for name, entry in sites.items()]
    assert found == [("layers.0.fc", 7), ("layers.1.fc", 7), ("layers.1.proj", 9), ("head", 3)]


def test_a_star_matches_layers_of_every_kind_that_can_be_decomposed_and_nothing_else() -> None:
    assert list(find_sites(Target(), patterns(every=("*", 2)))) == [
        "wte",
        "layers.0.fc",
        "layers.0.proj",
        "layers.1.fc",
        "layers.1.proj",
        "head",
    ]


def test_sites_are_grouped_by_the_pattern_that_matches_them() -> None:
    found = patterns(fc=("layers.*.fc", 3), rest=("layers.*.proj", 2))
    sites = [*find_sites(Target(), found), "layers.0.identity"]  # the last one of no pattern
    assert site_groups(sites, found) == {
        "fc": ["layers.0.fc", "layers.1.fc"],
        "rest": ["layers.0.proj", "layers.1.proj"],
    }


def test_case_matters() -> None:
    with pytest.raises(ConfigError, match="matches no module"):
        find_sites(Target(), patterns(a=("HEAD", 2)))


def test_a_pattern_that_matches_nothing_is_named_with_the_nearest_module() -> None:
    with pytest.raises(ConfigError) as caught:
        find_sites(Target(), patterns(mlp=("layers.0.fcc", 2)))
    assert str(caught.value) == (
        "decomposition.sites.mlp.pattern: 'layers.0.fcc' matches no module of the target. "
        "Did you mean 'layers.0.fc'? "
        "It has: wte, layers.0.fc, layers.0.proj, layers.1.fc, layers.1.proj, head"
    )


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("blocks.*", "layers.*"),
        ("layer.*.fc", "layers.*.fc"),
        ("layers.*.fcc", "layers.*.fc"),
        ("model.layers.*", None),
    ],
)
def test_a_pattern_with_a_star_is_met_with_one_of_the_same_shape(pattern: str, near: str | None) -> None:
    with pytest.raises(ConfigError) as caught:
        find_sites(Target(), patterns(mlp=(pattern, 2)))
    hint = f" Did you mean {near!r}?" if near else ""
    assert f"{pattern!r} matches no module of the target.{hint} It has: wte, " in str(caught.value)
    if near:
        assert find_sites(Target(), patterns(mlp=(near, 2)))


def test_a_pattern_with_a_star_is_met_with_the_blocks_that_there_are() -> None:
    names = ["wte", *(f"h.{block}.{name}" for block in (0, 1) for name in ("attn.c_attn", "mlp.c_fc"))]
    target = nested(*(f"transformer.{name}" for name in names))
    for pattern, near in {
        "transformer.layers.*": "transformer.h.*",
        "transformer.layers.*.mlp.*": "transformer.h.*.mlp.*",
        "transformer.h.*.mlp.c_fcc": "transformer.h.*.mlp.c_fc",
    }.items():
        with pytest.raises(ConfigError, match=re.escape(f"Did you mean {near!r}?")):
            find_sites(target, patterns(mlp=(pattern, 2)))


def test_nothing_near_gives_no_hint() -> None:
    with pytest.raises(ConfigError, match=r"matches no module of the target\. It has: wte, "):
        find_sites(Target(), patterns(mlp=("zzz", 2)))


def test_a_pattern_that_matches_only_modules_of_another_kind_is_named_with_that_kind() -> None:
    with pytest.raises(ConfigError) as caught:
        find_sites(Target(), patterns(n=("layers.*.norm", 2)))
    assert str(caught.value) == (
        "decomposition.sites.n.pattern: 'layers.*.norm' matches 'layers.0.norm', a LayerNorm; only Linear, "
        "Embedding and Conv1D layers can be decomposed: "
        "wte, layers.0.fc, layers.0.proj, layers.1.fc, layers.1.proj, head"
    )


class Scaling(nn.Module):
    """A module that holds a layer with a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Scaled(7, 2)


def test_a_pattern_that_matches_no_layer_but_one_with_a_forward_of_its_own_is_refused_for_that() -> None:
    with pytest.raises(ConfigError) as caught:
        find_sites(nn.ModuleDict({"block": Scaling(), "head": nn.Linear(2, 2)}), patterns(a=("block*", 2)))
    assert str(caught.value) == (
        "decomposition.sites.a.pattern: 'block*' matches 'block.inner', a Scaled, whose output is no "
        "product with its matrix (hooks, max_norm or a forward of its own); only Linear, Embedding and "
        "Conv1D layers can be decomposed: head"
    )


def nested(*names: str) -> nn.Module:
    """A target with a layer at each of these paths."""
    target = nn.Module()
    for name in names:
        parent = target
        *heads, last = name.split(".")
        for head in heads:
            if head not in parent._modules:
                parent.add_module(head, nn.Module())
            parent = parent.get_submodule(head)
        parent.add_module(last, nn.Linear(2, 2))
    return target


def test_a_module_matched_twice_is_named_with_both_patterns() -> None:
    with pytest.raises(ConfigError) as caught:
        find_sites(Target(), patterns(some=("layers.*.fc", 2), one=("layers.1.*", 3)))
    assert str(caught.value) == (
        "decomposition.sites.one.pattern: 'layers.1.*' matches module 'layers.1.fc', which "
        "decomposition.sites.some matches already; make one of them narrower"
    )


def test_a_long_list_of_modules_is_shortened() -> None:
    target = nn.Sequential(*(nn.Linear(1, 1) for _ in range(30)))
    with pytest.raises(ConfigError, match=r"18, 19, … \(30 in all\)$"):
        find_sites(target, patterns(a=("nope", 2)))


@pytest.mark.parametrize("C", [0, -3])
def test_fewer_than_one_subcomponent_is_refused(C: int) -> None:
    with pytest.raises(ConfigError, match=f"^C: got {C}, must be ≥ 1"):
        SitePattern(pattern="embed", C=C)


def test_the_weight_delta_is_on_and_the_sigmoid_leaky_by_default() -> None:
    config = Decomposition()
    assert config.use_delta
    assert config.sigmoid.name == "leaky_hard"
    assert config.init.name == "normal"


def tms(n_hidden_layers: int = 0) -> TMSModel:
    weight = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    return TMSModel(weight, torch.zeros(5), n_hidden_layers)


def entries(**C: int) -> dict[str, SitePattern]:
    return {name: SitePattern(pattern=name, C=own) for name, own in C.items()}


def test_transposed_matrices_may_be_tied() -> None:
    check_ties(tms(), {"unembed": "embed"}, entries(**{"embed": 4, "unembed": 4}), {})
    check_ties(Target(), {"head": "wte"}, entries(**{"wte": 4, "head": 4}), {})


def test_ties_need_no_values_on_the_meta_device() -> None:
    check_ties(tms().to("meta"), {"unembed": "embed"}, entries(**{"embed": 4, "unembed": 4}), {})


@pytest.mark.parametrize(
    ("tied", "sites", "message"),
    [
        (
            {"unembed": "embed"},
            {"embed": 4},
            "decomposition.tied.unembed: 'unembed' is not a site; the sites are embed; drop the tie too: "
            "'~decomposition.tied.unembed'",
        ),
        (
            {"unembed": "embd"},
            {"embed": 4, "unembed": 4},
            "decomposition.tied.unembed: 'embd' is not a site; the sites are embed, unembed",
        ),
        (
            {"unembed": "embed"},
            {"embed": 4, "unembed": 5},
            "decomposition.tied.unembed: C is 5 here and 4 at 'embed'; make them equal",
        ),
        (
            {"embed": "unembed", "unembed": "embed"},
            {"embed": 4, "unembed": 4},
            "decomposition.tied.embed: 'unembed' is itself tied; name the site that owns the subcomponents",
        ),
        (
            {"hidden.0": "embed"},
            {"embed": 4, "hidden.0": 4},
            "decomposition.tied.hidden.0: the weight is not the transpose of that of 'embed'",
        ),
    ],
)
def test_an_impossible_tie_is_refused(tied: dict[str, str], sites: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_ties(tms(1), tied, entries(**sites), {})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("tied", "clear"), [({"h": "e"}, True), ({"h": "wte"}, True), ({"h": "mlp"}, False), ({"h": "x"}, False)]
)
def test_a_tie_of_entries_is_told_with_the_paths_that_they_stand_for(
    tied: dict[str, str], clear: bool
) -> None:
    given = patterns(e=("wte", 4), h=("hea*", 4), mlp=("layers.*.fc", 4))
    target = Target()
    with pytest.raises(ConfigError) as caught:
        check_ties(target, tied, find_sites(target, given), given)
    advice = "; a tie names them by these paths: '+decomposition.tied.head=wte'" if clear else ""
    assert str(caught.value) == (
        f"decomposition.tied.h: 'h' is not a site; the sites are wte, layers.0.fc, layers.1.fc, head{advice}"
    )


def test_a_tied_site_has_no_start_of_its_own() -> None:
    tied, same = {"unembed": "embed"}, entries(embed=4, unembed=4)
    same["unembed"].init = Init.inputs
    with pytest.raises(ConfigError) as caught:
        check_ties(tms(), tied, same, {})
    assert str(caught.value) == (
        "decomposition.tied.unembed: init is inputs here, but a tied site begins as 'embed'; set it there"
    )
    same["embed"].init = Init.inputs
    check_ties(tms(), tied, same, {})


def test_a_tied_site_has_no_rate_of_its_own() -> None:
    tied, same = {"unembed": "embed"}, entries(embed=4, unembed=4)
    same["unembed"].lr_factor = 0.1
    with pytest.raises(ConfigError) as caught:
        check_ties(tms(), tied, same, {})
    assert str(caught.value) == (
        "decomposition.tied.unembed: lr_factor is 0.1 here, but a tied site learns as 'embed'; set it there"
    )
    same["embed"].lr_factor = 0.1
    check_ties(tms(), tied, same, {})


def test_layers_that_give_something_else_than_the_product_are_no_sites() -> None:
    plain, hooked, read_first, shrinking = (
        nn.Linear(2, 2),
        nn.Linear(2, 2),
        nn.Linear(2, 2),
        nn.Embedding(3, 2),
    )
    hooked.register_forward_hook(lambda layer, inputs, output: 2 * output)
    read_first.register_forward_pre_hook(lambda layer, inputs: (2 * inputs[0],))
    shrinking.max_norm = 0.5
    assert is_decomposable(plain)
    assert not any(is_decomposable(layer) for layer in (hooked, read_first, shrinking))


def test_equal_shapes_are_not_enough_for_a_tie() -> None:
    target = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    with pytest.raises(ConfigError, match="the weight is not the transpose of that of '0'"):
        check_ties(target, {"1": "0"}, entries(**{"0": 2, "1": 2}), {})


def test_weight_and_bias_of_every_kind_give_what_the_layer_computes() -> None:
    shared = nn.Parameter(torch.randn(5, 4))
    layers: list[nn.Module] = [
        nn.Linear(5, 4),
        nn.Linear(5, 4, bias=False),
        conv1d(4, 5),
        TransposedLinear(shared, nn.Parameter(torch.randn(4))),
    ]
    x = torch.randn(3, 5)
    for layer in layers:
        assert is_decomposable(layer)
        assert not is_embedding(layer)
        bias = bias_vector(layer)
        expected = torch.einsum("oi,bi->bo", weight_matrix(layer), x) + (0 if bias is None else bias)
        torch.testing.assert_close(layer(x), expected)
    assert bias_vector(layers[1]) is None


def test_an_embedding_reads_as_a_matrix_on_one_hot_inputs() -> None:
    layer, tokens = nn.Embedding(7, 4), torch.tensor([0, 6, 3])
    assert is_decomposable(layer)
    assert is_embedding(layer)
    assert bias_vector(layer) is None
    one_hot = torch.nn.functional.one_hot(tokens, 7).float()
    torch.testing.assert_close(one_hot @ weight_matrix(layer).T, layer(tokens))


class Scaled(nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 3 * super().forward(input)


class Renamed(nn.Linear):
    """Computes what any other does."""


def test_layers_that_compute_something_else_than_their_kind_cannot_be_decomposed() -> None:
    class Squared(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) ** 2

    class SquaredConv1D(Conv1D):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x**2

    patched = nn.Linear(2, 2)
    patched.forward = lambda input: input  # type: ignore[method-assign]
    for layer in (Scaled(3, 2), Squared(2, 2), SquaredConv1D(2, 2), patched):
        assert not is_decomposable(layer)
    assert is_decomposable(Renamed(2, 2))
    assert is_decomposable(WritingLinear(2, 2, bias=False))


def test_a_layer_with_a_forward_of_its_own_is_refused_by_its_class_and_passed_over_by_wider_patterns() -> (
    None
):
    target = nn.Sequential(Scaled(7, 2), nn.Linear(2, 2))
    with pytest.raises(ConfigError) as caught:
        find_sites(target, patterns(a=("0", 2)))
    assert str(caught.value) == (
        "decomposition.sites.a.pattern: '0' matches '0', a Scaled, whose output is no "
        "product with its matrix (hooks, max_norm or a forward of its own); only Linear, Embedding and "
        "Conv1D layers can be decomposed: 1"
    )
    assert list(find_sites(target, patterns(a=("*", 2)))) == ["1"]


def test_other_layers_cannot_be_decomposed() -> None:
    class Conv1D(nn.Module):  # of the same name, from elsewhere
        pass

    for layer in (nn.LayerNorm(3), nn.Conv1d(1, 1, 1), nn.ReLU(), Conv1D()):
        assert not is_decomposable(layer)
