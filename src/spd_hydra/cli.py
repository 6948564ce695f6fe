"""`spd-run`: one run, or a sweep of runs, from the command line."""

import argparse
import importlib.metadata
import logging
import sys
from collections.abc import Sequence

from hydra._internal.utils import get_args_parser

from spd_hydra import distributed, suite
from spd_hydra.cli_help import help_text
from spd_hydra.cli_hydra import call_hydra
from spd_hydra.composer import Composer
from spd_hydra.config_errors import invalid
from spd_hydra.dotenv import load_dotenv
from spd_hydra.exit_code import ExitCode
from spd_hydra.overrides import read, with_entries
from spd_hydra.run_files import RunDirectoryError
from spd_hydra.section import ConfigError
from spd_hydra.stop import Stopped
from spd_hydra.terminal import output_may_be_lost, show


def main() -> int:
    """Do what the command line says, and return the exit code."""
    with output_may_be_lost():
        return _said_and_done()


def _said_and_done() -> int:
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    load_dotenv()
    if not distributed.leads():  # what every rank would say, rank 0 says
        logging.disable(logging.CRITICAL)
    if "--version" in sys.argv[1:]:
        names = ("spd_hydra", "hydra-core", "torch")
        show(" ".join(f"{name} {importlib.metadata.version(name)}" for name in names))
        return ExitCode.ok
    try:
        return _main(_parsed())
    except ConfigError as error:
        if distributed.leads():
            show(f"{invalid(error)}\nNothing was started. spd-run --help lists every key.", sys.stderr)
        return ExitCode.bad_config
    except RunDirectoryError as error:
        show(f"{error}", sys.stderr)
        return ExitCode.run_failed
    except Stopped as stopped:
        if distributed.leads():
            show("Interrupted." if stopped.exit_code == ExitCode.interrupted else "Stopped.", sys.stderr)
        return stopped.exit_code
    except KeyboardInterrupt:
        show("Interrupted.", sys.stderr)
        return ExitCode.interrupted


def _parsed() -> argparse.Namespace:
    """What the command line says.

    Raises:
        ConfigError: it has an option that there is not.
    """
    parser = get_args_parser()
    parser.allow_abbrev = False  # --experiment would mean --experimental-rerun
    arguments, unknown = parser.parse_known_intermixed_args()
    if unknown:
        key = unknown[0].lstrip("-").partition("=")[0]
        raise ConfigError(
            f"{unknown[0]}: there is no such option; keys are written without dashes, as {key}=…"
        )
    return arguments


def _main(arguments: argparse.Namespace) -> int:
    if arguments.experimental_rerun:
        raise ConfigError("--experimental-rerun: would unpickle a file, which can run any code; use resume=")
    if arguments.config_name or arguments.config_path:
        raise ConfigError("--config-name, --config-path: not supported; add YAML files with --config-dir")
    with Composer.open(arguments.config_dir) as composer:
        if arguments.help:
            show(help_text(composer))
            return ExitCode.ok
        if arguments.cfg or arguments.info:
            suite.require_none(composer, arguments.overrides)
            _require_no_saved_run(arguments.overrides)
            composer.composed(arguments.overrides)
    if arguments.info:
        logging.getLogger().handlers.clear()  # Hydra adds one of its own, and would say everything twice
    if arguments.cfg or arguments.info or arguments.hydra_help or arguments.shell_completion:
        return call_hydra(with_entries(sys.argv[1:]), lambda cfg: None)
    # Imported only now: help, completion and a look at the configuration need none of what a run needs.
    from spd_hydra.cli_run import begin  # noqa: PLC0415

    return begin(arguments.overrides, multirun=arguments.multirun, config_dir=arguments.config_dir)


def _require_no_saved_run(overrides: Sequence[str]) -> None:
    """Refuse to show a configuration that is not composed.

    Raises:
        ConfigError: a run is to go on, whose configuration is the saved one.
    """
    for word in map(read, overrides):
        if word is not None and word.key_or_group in {"resume", "run"}:
            raise ConfigError(
                f"--cfg, --info: got {word.input_line}, a run whose configuration is in its config.yaml; "
                "look there, or leave it out"
            )


if __name__ == "__main__":
    sys.exit(main())
