"""How `datasets` is used: without requests that nobody asked for, and without noise in files."""

import contextlib
import logging
import sys
from collections.abc import Iterator

from spd_hydra.terminal import is_terminal


@contextlib.contextmanager
def without_network() -> Iterator[None]:
    """Let `datasets` ask no server: it counts loads, also of local files, and takes what its cache has."""
    from datasets import config

    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Progress bars on terminals only, and of what the libraries log no more than errors."""
    import datasets
    import huggingface_hub.utils as hub  # noqa: PLC0415

    loggers = {name: logging.getLogger(name) for name in ("datasets", "huggingface_hub")}
    levels = {name: one.level for name, one in loggers.items()}
    bars = [
        one for one in (datasets, hub) if not is_terminal(sys.stderr) and not one.are_progress_bars_disabled()
    ]
    for one in loggers.values():
        one.setLevel(logging.ERROR)
    for library in bars:
        library.disable_progress_bars()
    try:
        yield
    finally:
        for library in bars:
            library.enable_progress_bars()
        for name, one in loggers.items():
            one.setLevel(levels[name])
