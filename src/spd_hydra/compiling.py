"""torch.compile where it can work, and one line that says so where it cannot."""

import functools
import importlib.util
import logging
import os
import shutil
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

logger = logging.getLogger(__name__)

# By default an intermediate of many operations that several sums read is written to memory first.
_KEEP_IN_REGISTERS: dict[str, str | int | bool] = {
    "realize_opcount_threshold": 300,
    "realize_reads_threshold": 64,
    "realize_acc_reads_threshold": 64,
}

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@functools.cache
def can_compile(device_type: str) -> bool:
    """Whether this machine can compile a step; if not, one line in the log says what is missing."""
    if device_type == "cpu":
        compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
        missing = "" if shutil.which(compiler) else f"no C++ compiler ({compiler})"
    else:
        missing = "" if importlib.util.find_spec("triton") else "no Triton"
    if missing:
        logger.warning("%s: running uncompiled, which is correct but several times slower", missing)
    return not missing


def compiled(
    function: Callable[Arguments, Result], *, keep_in_registers: bool = False
) -> Callable[Arguments, Result]:
    """The function as one compiled graph; a break in the graph is an error, never a silent slowdown.

    Args:
        function: what to compile; every set of shapes is compiled anew.
        keep_in_registers: recompute intermediates rather than write them to memory, for a small function
            with long arithmetic on large tensors.
    """
    options = dict(_KEEP_IN_REGISTERS) if keep_in_registers else None
    return torch.compile(function, fullgraph=True, dynamic=False, options=options)
