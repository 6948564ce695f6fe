"""Hydra's own command line, called with words of our choice."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import hydra

from spd_hydra.composer import CONFIG_MODULE, CONFIG_NAME, HYDRA_VERSION_BASE
from spd_hydra.environment import command_line
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
