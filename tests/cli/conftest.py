"""The command line called in this process."""

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from spd_hydra.cli import main


class Ended(NamedTuple):
    """What a call of `spd-run` came to."""

    code: int
    out: str
    err: str


Call = Callable[..., Ended]


@pytest.fixture
def spd_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Iterator[Call]:
    """Call `spd-run` with some words, in an empty folder, with a cache that all tests of one run share.

    Figures are left out, which take half of the time of a short run.
    """
    monkeypatch.setattr("spd_hydra.result.draw_all", lambda *arguments: [])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPD_CACHE_DIR", str(tmp_path.parent / "cache"))
    monkeypatch.delenv("SPD_OUT_DIR", raising=False)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def call(*words: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["spd-run", *words])
        root.handlers[:] = []  # as in a new process; Hydra then sends them to the captured streams
        code = main()
        captured = capsys.readouterr()
        return Ended(code, captured.out, captured.err)

    yield call
    root.handlers[:] = handlers
    root.setLevel(level)
