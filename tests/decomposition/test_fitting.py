"""Layers that wide patterns match and no mask could stand for: left out, told, and again when opened."""

import pytest
import torch
from torch import Tensor, nn

from spd_hydra.ci_fn.mlp import MLPCausalImportance
from spd_hydra.decomposition.clean_pass import CleanPass
from spd_hydra.decomposition.config import Decomposition, SitePattern
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.decomposition.fitting import fitting, passed_over_in, passed_over_notes
from spd_hydra.decomposition.roots import require_values_that_stay
from spd_hydra.decomposition.sites import unfit_sites
from spd_hydra.section import ConfigError

IN_PLACE = "whose output the target changes in place"
READ = "whose matrix the target reads itself instead of calling the layer"
BATCH = torch.ones(2, 4)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("plain", "changed", "read"):
            self.add_module(name, nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.changed(x)
        y += 1
        z: Tensor = self.plain(y) + x @ self.read.weight
        return z


class Target(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def fitted(tied: dict[str, str] | None = None, **patterns: str) -> DecomposedModel:
    target = Target()
    entries = {name: SitePattern(pattern=pattern, C=3) for name, pattern in patterns.items()}
    config = Decomposition(sites=entries, tied=tied or {})

    def check(model: DecomposedModel) -> CleanPass:
        require_values_that_stay(model, BATCH)
        return model.clean_pass(BATCH)

    model, _ = fitting(
        lambda without: DecomposedModel(
            target, config, MLPCausalImportance(hidden=2), seed=0, passed_over=without
        ),
        check,
    )
    return model


@pytest.mark.parametrize(
    "patterns",
    [{"all": "blocks.*"}, {"all": "*"}, {"first": "blocks.0.*", "second": "blocks.1.[a-z]*"}],
)
def test_a_wide_pattern_leaves_unfit_layers_out_and_says_why(patterns: dict[str, str]) -> None:
    model = fitted(**patterns)
    assert model.site_names == ("blocks.0.plain", "blocks.1.plain")
    assert sorted(passed_over_notes(model.passed_over)) == [
        f"not decomposed, though the patterns match: blocks.*.changed, {IN_PLACE}",
        f"not decomposed, though the patterns match: blocks.*.read, {READ}",
    ]


def test_where_all_layers_fit_nothing_is_said() -> None:
    model = fitted(plain="*.plain")
    assert model.passed_over == {}
    assert passed_over_notes({}) == []


@pytest.mark.parametrize(
    ("patterns", "reason"),
    [
        ({"one": "blocks.0.changed", "rest": "blocks.*.plain"}, IN_PLACE),  # named exactly
        ({"one": "blocks.*.changed", "rest": "blocks.*.plain"}, IN_PLACE),  # nothing would be left of it
        ({"one": "*.read"}, READ),
        ({"one": "blocks.0.read", "rest": "blocks.1.*"}, READ),
    ],
)
def test_what_is_named_exactly_or_alone_in_its_pattern_is_refused(
    patterns: dict[str, str], reason: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^decomposition\.sites: got blocks\.0\.[a-z]+.*, {reason}; "):
        fitted(**patterns)


def test_what_is_tied_is_refused() -> None:
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spd_hydra.decomposition.decomposed_model.check_ties", lambda *arguments: None)
        with pytest.raises(ConfigError, match=IN_PLACE):
            fitted({"blocks.0.changed": "blocks.0.plain"}, all="*")


@pytest.mark.parametrize(
    ("sites", "is_first_of_kind"),
    [
        (["blocks.0.identity"], True),  # put in, so of no pattern of sites
        (["blocks.1.plain"], False),  # not of all blocks: other rows may run it
    ],
)
def test_what_is_no_layer_of_all_blocks_is_refused(sites: list[str], is_first_of_kind: bool) -> None:
    target = Target()
    config = Decomposition(sites={"all": SitePattern(pattern="*.plain", C=3)})

    def check(model: DecomposedModel) -> None:
        names = model.matrix_names
        raise unfit_sites("which is unfit", sites, target, names, is_first_of_kind=is_first_of_kind)

    with pytest.raises(ConfigError, match=rf"got {sites[0]}, which is unfit"):
        fitting(
            lambda without: DecomposedModel(
                target, config, MLPCausalImportance(hidden=2), seed=0, passed_over=without
            ),
            check,
        )


def test_a_saved_model_passes_over_what_its_state_lacks() -> None:
    model = fitted(all="*")
    found = passed_over_in(model.trainable_state(), model.target, model.config)
    assert found.keys() == model.passed_over.keys()
    named = fitted(plain="blocks.0.plain")
    assert passed_over_in({}, named.target, named.config) == {}  # whose loading then fails
