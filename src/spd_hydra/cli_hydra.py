"""Hydra's own command line, called with words of our choice."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import hydra

from spd_hydra.composition import CONFIG_MODULE, CONFIG_NAME, HYDRA_VERSION_BASE
from spd_hydra.exit_code import ExitCode


def call_hydra(words: Sequence[str], task: Callable[[Any], Any]) -> int:
    """Let Hydra do what these words say, with the task as its application, and return the exit code."""
    decorate = hydra.main(f"pkg://{CONFIG_MODULE}", CONFIG_NAME, version_base=HYDRA_VERSION_BASE)
    with command_line([sys.argv[0], *words]):
        try:
            decorate(task)()
        except SystemExit as ended:
            return ended.code if isinstance(ended.code, int) else ExitCode.run_failed
    return ExitCode.ok


@contextlib.contextmanager
def command_line(words: list[str]) -> Iterator[None]:
    """Within the `with` block, the program was called with these words."""
    typed, sys.argv = sys.argv, words
    try:
        yield
    finally:
        sys.argv = typed
