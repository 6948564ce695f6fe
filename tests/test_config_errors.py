"""What is said of entries and loss terms that a configuration does not have."""

import dataclasses

import pytest
from omegaconf import DictConfig, OmegaConf

from spd_hydra import section
from spd_hydra.config_errors import unknown_key, wrong_term
from spd_hydra.decomposition.config import Decomposition, SitePattern
from spd_hydra.loss.base import Loss
from spd_hydra.loss.loss_set import LossSet


@dataclasses.dataclass
class Composed:
    """The two sections that these messages are about."""

    decomposition: Decomposition = dataclasses.field(default_factory=Decomposition)
    loss: LossSet = dataclasses.field(default_factory=LossSet)


@pytest.fixture
def cfg() -> DictConfig:
    sites = {name: SitePattern(pattern=name, C=4) for name in ("embed", "unembed")}
    composed = OmegaConf.structured(Composed(decomposition=Decomposition(sites=sites)))
    assert isinstance(composed, DictConfig)
    return composed


@pytest.fixture
def indecision(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plug-in's term is the only one that is registered."""
    monkeypatch.setitem(section._registered, "loss_term", {"indecision": Loss})


@pytest.fixture
def no_plug_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(section._registered, "loss_term", {})


def test_whoever_deletes_an_entry_that_is_not_there_is_not_told_how_to_add_it(cfg: DictConfig) -> None:
    key = "decomposition.sites.foo"
    without = "decomposition.sites has no entry foo, only embed, unembed."
    assert unknown_key(key, cfg, is_deleted=True) == without
    assert unknown_key(key, cfg).startswith(f"{without} An entry is added whole: ")


def test_a_tie_is_added_with_two_paths(cfg: DictConfig) -> None:
    assert unknown_key("decomposition.tied.h", cfg) == (
        "decomposition.tied has no entry h. To add one give two sites by the paths of their "
        "modules, e.g. +decomposition.tied.lm_head=model.embed_tokens"
    )


@pytest.mark.usefixtures("no_plug_in")
def test_without_a_plug_in_no_term_is_suggested(cfg: DictConfig) -> None:
    none = "o plug-in offers loss terms; install the package that has yours (CONTRIBUTING.md, a plug-in)"
    assert unknown_key("loss.extra.foo.coeff", cfg) == f"loss.extra has no entry foo. N{none}"
    assert unknown_key("loss_term", cfg) == f"n{none}"
    assert wrong_term("foo_schema", "loss.extra.foo", []) == f"n{none}"


@pytest.mark.usefixtures("indecision")
@pytest.mark.parametrize(
    ("name", "place", "message"),
    [
        ("indecision_schema", "loss.extra.mine", None),
        ("mine", "loss.extra.mine", None),
        (
            "indecision",
            "loss.extra.x",
            "got indecision; did you mean indecision_schema? Choose one of {known}",
        ),
        (
            "indecison_schema",
            "loss.extra.x",
            "got indecison_schema; did you mean indecision_schema? Choose one of {known}",
        ),
        ("other", "loss.extra.x", "got other; must be one of {known}"),
        ("indecision", None, "say where the term goes: '+loss_term@loss.extra.indecision=indecision_schema'"),
    ],
)
def test_a_term_is_chosen_by_its_schema_or_a_file_and_for_a_place(
    name: str, place: str | None, message: str | None
) -> None:
    known = "indecision_schema, mine"
    assert wrong_term(name, place, ["mine"]) == (message and message.format(known=known))


@pytest.mark.usefixtures("indecision")
def test_a_term_that_is_registered_is_named_in_the_choice(cfg: DictConfig) -> None:
    assert unknown_key("loss.extra.indecision.coeff", cfg).endswith(
        "the term of a plug-in: '+loss_term@loss.extra.indecision=indecision_schema'"
    )
    assert unknown_key("loss.extra.foo.coeff", cfg).endswith(
        "the term of a plug-in, of indecision: '+loss_term@loss.extra.foo=<term>_schema'"
    )


@pytest.mark.usefixtures("indecision")
@pytest.mark.parametrize("typed", ["indecision", "indecison"])
def test_the_term_of_a_plug_in_is_found_before_a_key_that_looks_alike(cfg: DictConfig, typed: str) -> None:
    assert unknown_key(f"loss.{typed}.coeff", cfg) == (
        "there is no such key; the term indecision of a plug-in goes into loss.extra: "
        "'+loss_term@loss.extra.indecision=indecision_schema' loss.extra.indecision.coeff=…"
    )


@pytest.mark.usefixtures("indecision")
def test_a_slip_in_a_term_of_our_own_is_none_of_a_plug_in(cfg: DictConfig) -> None:
    meant = unknown_key("loss.faithfulnes.coeff", cfg)
    assert meant == "there is no such key; did you mean loss.faithfulness.coeff?"


@pytest.mark.usefixtures("indecision")
def test_a_term_that_is_chosen_already_is_named_with_its_key(cfg: DictConfig) -> None:
    chosen = OmegaConf.merge(cfg, {"loss": {"extra": {"indecision": {}}}})
    assert isinstance(chosen, DictConfig)
    meant = unknown_key("loss.indecision.coeff", chosen)
    assert meant == "there is no such key; did you mean loss.extra.indecision.coeff?"
