"""Identity matrices in front of modules: the target's numbers stay, what enters a module is taken apart."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from spd_hydra.ci_fn.shared_mlp import SharedMLPCausalImportance
from spd_hydra.decomposition.config import Decomposition, SitePattern
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.decomposition.identities import identity_groups
from spd_hydra.decomposition.masks import SiteMask
from spd_hydra.section import ConfigError


class Block(nn.Module):
    kind = "block"

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, stream: Tensor, scale: float = 1.0) -> Tensor:
        added: Tensor = scale * self.down(torch.relu(self.up(self.norm(stream))))
        return added


class Target(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(11, 4)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, tokens: Tensor) -> Tensor:
        stream: Tensor = self.wte(tokens)
        stream = stream + self.blocks[0](stream, 0.5)
        assert self.blocks[1].kind == "block", "targets ask their modules for attributes"
        stream = stream + self.blocks[1](scale=2.0, stream=stream)
        return stream


TOKENS = torch.tensor([[1, 2, 3], [4, 5, 10]])


def target() -> Target:
    torch.manual_seed(0)
    return Target()


def decomposed(identities: str, sites: str | None = None, C: int = 3) -> DecomposedModel:
    config = Decomposition(
        sites={} if sites is None else {"own": SitePattern(pattern=sites, C=C)},
        identities={"in": SitePattern(pattern=identities, C=C)},
    )
    return DecomposedModel(target(), config, SharedMLPCausalImportance(hidden=[4]), seed=0)


def whole(model: DecomposedModel) -> dict[str, SiteMask]:
    ones = torch.ones(TOKENS.shape)
    return {
        site: SiteMask(mask=ones[..., None].expand(-1, -1, model.pieces(site).C), delta=ones)
        for site in model.site_names
    }


def test_a_site_stands_before_each_module_and_its_matrix_is_the_identity() -> None:
    model = decomposed("blocks.?", sites="blocks.1.down")
    assert model.site_names == ("blocks.1.down", "blocks.0.identity", "blocks.1.identity")
    assert torch.equal(model.weight("blocks.0.identity"), torch.eye(4))
    shapes = model.site_shapes()
    assert shapes["blocks.1.identity"].d_in == 4
    assert not any("identity" in name for name, _ in model.target.named_modules())


def test_modules_within_others_of_a_pattern_are_passed_over() -> None:
    assert decomposed("blocks.*").site_names == ("blocks.0.identity", "blocks.1.identity")
    config = Decomposition(
        identities={"a": SitePattern(pattern="blocks.*", C=3), "b": SitePattern(pattern="*.up", C=3)}
    )
    model = DecomposedModel(target(), config, SharedMLPCausalImportance(hidden=[4]), seed=0)
    assert identity_groups(model.site_names, config.identities) == {
        "a.identity": ["blocks.0.identity", "blocks.1.identity"],
        "b.identity": ["blocks.0.up.identity", "blocks.1.up.identity"],
    }


def test_the_targets_output_stays_bit_for_bit() -> None:
    model = decomposed("blocks.?")
    plain = target()(TOKENS)
    assert torch.equal(model(TOKENS), plain)
    assert torch.equal(model.clean_pass(TOKENS).output, plain)
    assert torch.equal(model(TOKENS, {}), plain)
    torch.testing.assert_close(model(TOKENS, whole(model)), plain)


def test_what_a_site_sees_is_the_stream_that_enters_the_module() -> None:
    model, plain = decomposed("blocks.?"), target()
    clean = model.clean_pass(TOKENS)
    stream = plain.wte(TOKENS)
    assert torch.equal(clean.inputs["blocks.0.identity"], stream)
    stream = stream + 0.5 * plain.blocks[0](stream)
    assert torch.equal(clean.inputs["blocks.1.identity"], stream)


def test_masks_let_through_the_parts_of_the_stream_that_they_keep() -> None:
    model, plain = decomposed("blocks.1", C=4), target()
    with torch.no_grad():  # subcomponent c carries coordinate c
        model.pieces("blocks.1.identity").V.copy_(torch.eye(4))
        model.pieces("blocks.1.identity").U.copy_(torch.eye(4))
    kept = torch.tensor([1.0, 0.0, 1.0, 0.0])
    found = model(TOKENS, {"blocks.1.identity": SiteMask(mask=kept.expand(2, 3, 4))})
    stream = plain.wte(TOKENS)
    stream = stream + 0.5 * plain.blocks[0](stream)
    torch.testing.assert_close(found, stream + 2 * plain.blocks[1](stream * kept))


def test_an_identity_acts_before_a_layer_that_is_masked_too() -> None:
    model, plain = decomposed("blocks.0.up", sites="blocks.0.up", C=4), target()
    site, before = "blocks.0.up", "blocks.0.up.identity"
    zero = torch.zeros(2, 3, 4)
    found = model(TOKENS, {before: SiteMask(mask=zero), site: whole(model)[site]})
    stream = plain.wte(TOKENS)
    hidden = torch.relu(plain.blocks[0].up.bias.expand(2, 3, 6))  # what `up` makes of nothing
    stream = stream + 0.5 * plain.blocks[0].down(hidden)
    torch.testing.assert_close(found, stream + 2 * plain.blocks[1](stream))


def test_only_subcomponents_and_importances_are_trained_and_moves_keep_the_sites() -> None:
    model = decomposed("blocks.?")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(name.startswith(("identities", "target")) for name in trained)
    model.double()
    assert model(TOKENS, whole(model)).dtype == torch.float64
    assert model.to("meta").causal_importances(TOKENS.to("meta"))["blocks.0.identity"].lower.shape == (
        2,
        3,
        3,
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: decomposed("blocs.?"),
            "decomposition.identities.in.pattern: 'blocs.?' matches no module of the target. Did you "
            "mean 'blocks.1'? It has: wte, blocks, blocks.0, blocks.0.norm, blocks.0.up, "
            "blocks.0.down, blocks.1, blocks.1.norm, blocks.1.up, blocks.1.down",
        ),
        (
            lambda: decomposed("blocks.0.norm"),
            "decomposition.identities.in.pattern: 'blocks.0.norm', a LayerNorm, holds no matrix to tell how "
            "wide its input is; choose a module that holds one",
        ),
        (
            lambda: DecomposedModel(
                target(),
                Decomposition(
                    identities={
                        "a": SitePattern(pattern="blocks.0", C=1),
                        "b": SitePattern(pattern="blocks.?", C=1),
                    }
                ),
                SharedMLPCausalImportance(),
                seed=0,
            ),
            "decomposition.identities.b.pattern: 'blocks.?' matches module 'blocks.0', which "
            "decomposition.identities.a matches already; make one of them narrower",
        ),
        (
            lambda: decomposed("wte").clean_pass(TOKENS),
            "decomposition.identities.in.pattern: 'wte', a Embedding, holds no matrix to tell how wide its "
            "input is; choose a module that holds one",
        ),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value) == message


def test_a_module_whose_input_its_first_matrix_does_not_read_is_refused() -> None:
    model = DecomposedModel(
        nn.Sequential(nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 2))),
        Decomposition(identities={"in": SitePattern(pattern="0", C=1)}),
        SharedMLPCausalImportance(),
        seed=0,
    )
    with pytest.raises(ConfigError) as caught:
        model.clean_pass(TOKENS)
    assert str(caught.value) == (
        "decomposition.identities: the input of 0 has the shape [2, 3], but its first matrix reads 4 "
        "numbers; choose a module whose input it reads"
    )


def test_identities_are_in_the_group_of_their_pattern() -> None:
    sites = ["blocks.0.identity", "blocks.1.identity", "blocks.1.up.identity", "blocks.0.down"]
    patterns = {
        "blocks": SitePattern(pattern="blocks.[0-9]", C=3),
        "ups": SitePattern(pattern="*.up", C=3),
        "none": SitePattern(pattern="wte", C=3),
    }
    assert identity_groups(sites, patterns) == {
        "blocks.identity": ["blocks.0.identity", "blocks.1.identity"],
        "ups.identity": ["blocks.1.up.identity"],
    }
