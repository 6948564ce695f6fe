"""Plug-ins of other packages are registered wherever a configuration is read."""

import importlib.metadata
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from spd_hydra import compose, load_run
from spd_hydra.components import PLUGINS, load_plugins
from spd_hydra.config import RunConfig
from spd_hydra.run import run
from spd_hydra.section import ConfigError

Toy = Callable[..., RunConfig]


@pytest.fixture
def plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Offer a module with the given text as the only plug-in; gives the module's name."""

    def offer(text: str) -> str:
        (tmp_path / "offered_plug_in.py").write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "offered_plug_in", raising=False)
        entry = importlib.metadata.EntryPoint("mine", "offered_plug_in", PLUGINS)
        monkeypatch.setattr(
            importlib.metadata, "entry_points", lambda group: [entry] if group == PLUGINS else []
        )
        return "offered_plug_in"

    return offer


def test_a_plug_in_is_imported_before_a_configuration_is_composed(plug_in: Callable[[str], str]) -> None:
    name = plug_in("LOADED = True")
    compose(["debug=smoke"])
    assert sys.modules[name].LOADED


def test_a_plug_in_is_imported_before_a_run_is_opened(toy: Toy, plug_in: Callable[[str], str]) -> None:
    outcome = run(toy())
    assert outcome.run_dir is not None
    name = plug_in("LOADED = True")
    assert load_run(outcome.run_dir).config.name == "tms_5-2"
    assert sys.modules[name].LOADED


def test_a_plug_in_that_fails_is_named_with_its_reason(plug_in: Callable[[str], str]) -> None:
    plug_in("raise RuntimeError('no licence')")
    with pytest.raises(ConfigError, match=r"plug-in mine \(offered_plug_in\) .*RuntimeError: no licence"):
        load_plugins()
