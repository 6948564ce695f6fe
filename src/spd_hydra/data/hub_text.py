"""Text of datasets on the Hugging Face hub, or of what its cache has of them."""

import contextlib
import functools
import logging
import time
from typing import Any

from spd_hydra.data.columns import Columns, columns_of
from spd_hydra.data.library import quiet, without_network
from spd_hydra.data.text_source import TextSource, Wanted, first_line, wrong_configuration
from spd_hydra.model.hub import COMMIT, TIMEOUT
from spd_hydra.section import ConfigError

logger = logging.getLogger(__name__)

_REMEMBERED = 600  # seconds for which a hub that did not answer is not asked again


def on_hub(wanted: Wanted) -> TextSource:
    """One split of a dataset that is named by its id.

    Raises:
        ConfigError: it is neither on the hub nor in the cache, or has no such split or configuration.
    """
    from datasets import load_dataset, load_dataset_builder

    name, config_name, revision = wanted.name, wanted.config_name, wanted.revision
    away = _why_away(name, revision)

    def reading() -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        stack.enter_context(quiet())
        if away is not None:
            stack.enter_context(without_network())
        return stack

    try:
        with reading():
            builder = load_dataset_builder(name, config_name, revision=revision)
    except Exception as error:  # of several libraries
        raise _not_had(wanted, error, away) from error
    commit = str(builder.hash) if COMMIT.fullmatch(str(builder.hash)) else None
    if revision is not None and COMMIT.fullmatch(revision) and commit != revision:
        raise ConfigError(  # offline, `datasets` takes what it has
            f"{wanted.key('revision')}: got {revision}, but the cache holds {name} at "
            f"{commit or 'no known commit'} and the hub cannot be asked; fetch it with "
            "`spd-run task=prefetch ...` where there is a network"
        )
    split = wanted.chosen(builder.info.splits, name) if builder.info.splits else wanted.split or "train"

    def load(*, streaming: bool = False) -> Any:
        if away is not None:
            logger.info(
                "%s: %s is read from the cache; the hub cannot be asked: %s", wanted.key("name"), name, away
            )
        try:
            with reading():
                return load_dataset(name, config_name, revision=revision, split=split, streaming=streaming)
        except Exception as error:
            raise _not_had(wanted, error, away) from error

    def columns() -> Columns:
        return columns_of(builder.info.features or load(streaming=True).features or load().features)

    return TextSource(
        identity=f"hub {name} {builder.config.name} {builder.hash} {split}",
        where=str(builder.cache_dir),
        columns=columns,
        load=load,
        stream=functools.partial(load, streaming=True),
        commit=commit,
    )


def _why_away(name: str, revision: str | None) -> str | None:
    """Why the hub cannot be asked for a dataset; None: it answers, be it that there is none."""
    from datasets import config

    if config.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    return _asked(name, revision, int(time.monotonic() // _REMEMBERED))


@functools.cache
def _asked(name: str, revision: str | None, period: int) -> str | None:
    """Asked once in a period, with a time limit: `datasets` itself would try again and again."""
    from huggingface_hub import HfApi  # noqa: PLC0415
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError  # noqa: PLC0415

    try:
        HfApi().dataset_info(name, revision=revision, timeout=TIMEOUT)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return None
    except Exception as error:  # of several libraries, all about the way to the hub
        return f"{type(error).__name__}: {first_line(error)}"
    return None


def _not_had(wanted: Wanted, error: Exception, away: str | None) -> ConfigError:
    if (problem := wrong_configuration(wanted, error)) is not None:
        return problem
    start = f"{wanted.key('name')}: got {wanted.name}, which is no local file and cannot be had from the hub"
    if away is None:
        return ConfigError(
            f"{start} ({first_line(error)}); check the spelling, or, if it is not open to all, log in with "
            "`hf auth login` or set HF_TOKEN"
        )
    from huggingface_hub.constants import HF_HOME  # noqa: PLC0415

    return ConfigError(
        f"{start} ({away}), nor from the cache; check the spelling, or fetch it with "
        "`spd-run task=prefetch ...` on a machine with a network and the same HF_HOME, which is "
        f"{HF_HOME}, and set HF_HUB_OFFLINE=1 on this one"
    )
