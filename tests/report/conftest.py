from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def summaries(load_module: Callable[[Path], ModuleType]) -> ModuleType:
    """The summaries of summaries.py, which lies beside this file."""
    return load_module(Path(__file__).with_name("summaries.py"))
