"""Hydra's own command line, called with words of our choice."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import run_and_report

from spd_hydra.composer import CONFIG_MODULE, CONFIG_NAME, HYDRA_VERSION_BASE
from spd_hydra.environment import command_line
from spd_hydra.exit_code import ExitCode
from spd_hydra.run_files import RunDirectoryError

_FULL_ERROR = "HYDRA_FULL_ERROR"


def call_hydra(words: Sequence[str], task: Callable[[Any], Any]) -> int:
    """Let Hydra do what these words say, with the task as its application, and return the exit code.

    Raises:
        OSError, RunDirectoryError: something could not be written; of other errors Hydra shows the traceback.
    """
    decorate = hydra.main(f"pkg://{CONFIG_MODULE}", CONFIG_NAME, version_base=HYDRA_VERSION_BASE)
    before = os.environ.get(_FULL_ERROR)
    with command_line([sys.argv[0], *words]):
        try:
            os.environ[_FULL_ERROR] = "1"  # errors come here
            decorate(task)()
        except SystemExit as ended:
            return ended.code if isinstance(ended.code, int) else ExitCode.run_failed
        except (OSError, RunDirectoryError):
            raise
        except Exception as error:
            _restore(before)
            return _reported(error)
        finally:
            _restore(before)
    return ExitCode.ok


def _restore(before: str | None) -> None:
    if before is None:
        os.environ.pop(_FULL_ERROR, None)
    else:
        os.environ[_FULL_ERROR] = before


def _reported(error: Exception) -> int:
    """Show an error as Hydra does."""

    def again() -> NoReturn:
        raise error

    try:
        run_and_report(again)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else ExitCode.run_failed
    return ExitCode.run_failed
