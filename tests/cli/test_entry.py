"""Where the command begins."""

import sys
from types import ModuleType

import pytest

from spd_hydra.entry import main


def test_an_interruption_while_the_rest_is_imported_is_a_line_and_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupted(ModuleType):
        def __getattr__(self, name: str) -> object:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "spd_hydra.cli", Interrupted("spd_hydra.cli"))
    assert main() == 130
    assert capsys.readouterr().err == "Interrupted.\n"
