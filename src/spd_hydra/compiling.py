"""torch.compile where it can work, and one line that says so where it cannot."""

import contextlib
import functools
import importlib.util
import logging
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Options = dict[str, str | int | bool]
GraphCompiler = Callable[..., Any]
"""From a graph (a `GraphModule`), examples of its inputs, and settings by keyword to what computes it."""

_T = TypeVar("_T")
_tracing: ContextVar[bool] = ContextVar("tracing", default=False)


class _StandIn:
    """What compiles graphs for a while, and by kernel and layout what it made of them."""

    def __init__(self, compiler: GraphCompiler) -> None:
        self.compiler = compiler
        self.made: dict[Kernel, dict[tuple[Any, ...], Callable[..., Any]]] = {}


_stand_in: ContextVar[_StandIn | None] = ContextVar("stand_in", default=None)

OPTIONS: Options = {
    # Checks of every buffer's shape in every call, for those who work on the compiler.
    "size_asserts": False,
    "alignment_asserts": False,
    "scalar_asserts": False,
    # A kernel may be part of a CUDA graph of ours (`graph.py`), and none can be within another.
    "triton.cudagraphs": False,
    # The last few elements one by one: code for shorter vectors would take a sixth of the compilation.
    "cpp.enable_loop_tail_vec": False,
    # a·b + c in one instruction. For all kernels: each set of flags costs another precompiled header, 10 s.
    "cpp.enable_floating_point_contract_flag": "fast",
}

# By default an intermediate of many operations that several sums read is written to memory first.
_KEEP_IN_REGISTERS: Options = {
    "realize_opcount_threshold": 300,
    "realize_reads_threshold": 64,
    "realize_acc_reads_threshold": 64,
}


@functools.cache
def can_compile(device_type: str) -> bool:
    """Whether this machine can compile a step; if not, one line in the log says what is missing."""
    if device_type == "cpu":
        compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
        header = Path(sysconfig.get_path("include"), "Python.h")
        missing = "" if header.exists() else f"no headers of Python ({header}; often python3-dev)"
        missing = missing if shutil.which(compiler) else f"no C++ compiler ({compiler})"
    else:
        missing = "" if importlib.util.find_spec("triton") else "no Triton"
    if missing:
        logger.warning("%s: running uncompiled, which is correct but several times slower", missing)
    return not missing


def is_tracing() -> bool:
    """Whether a `Kernel` is recording the code that is running now, rather than just running it."""
    return _tracing.get()


def graph_compiler() -> GraphCompiler:
    """What makes code of graphs that were traced, lowered to basic operations and split into passes."""
    # Imported only now: the compiler takes longer to import than all else together.
    from torch._inductor.compile_fx import compile_fx_inner  # noqa: PLC0415

    _try_few_vectors()
    stand_in = _stand_in.get()
    return compile_fx_inner if stand_in is None else stand_in.compiler


@functools.cache
def _try_few_vectors() -> None:
    """Have the compiler try the vector instructions of float32 loops only, and no more once some work.

    It would try all that the processor has, those for small integers and bfloat16 too. Each is a compilation
    the first time, and a process that loads the result every time.
    """
    from torch._inductor import cpu_vec_isa  # noqa: PLC0415

    module: Any = cpu_vec_isa
    names = [name for name in ("avx512", "avx2") if name in module.x86_isa_checker()]
    if not names or "ATEN_CPU_CAPABILITY" in os.environ:  # whoever sets that chooses among all
        return
    kinds = {str(isa): isa for isa in module.supported_vec_isa_list}
    working = next(([kinds[name]] for name in names if kinds.get(name)), [])
    module.valid_vec_isa_list = lambda: working


@contextlib.contextmanager
def compiled_by(compiler: GraphCompiler) -> Iterator[None]:
    """Graphs of kernels and blocks that are compiled in the block are given to this function instead.

    What it makes of a kernel is used within the block only.
    """
    token = _stand_in.set(_StandIn(compiler))
    try:
        yield
    finally:
        _stand_in.reset(token)


def mending_files(compile: Callable[[], _T]) -> _T:
    """What it returns; files of the compiler that cannot be loaded are removed and made anew.

    A process that is killed while it compiles leaves one behind, which every later one would fail to load.
    """
    broken: set[Path] = set()
    while True:
        try:
            return compile()
        except Exception as error:
            file = _unloadable(error)
            if file is None or file in broken:
                raise
            broken.add(file)
            logger.info("compiling again what a process that was stopped has left incomplete: %s", file)
            file.unlink(missing_ok=True)


def _unloadable(error: BaseException | None) -> Path | None:
    """The compiler's file that could not be loaded, if that is what went wrong."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # noqa: PLC0415

    while error is not None:
        if isinstance(error, ImportError) and error.path is not None:
            file = Path(error.path)
            return file if file.is_relative_to(cache_dir()) else None
        error = error.__cause__ or error.__context__  # the compiler hides what its own errors come from
    return None


def _asks_for_values(error: Exception) -> bool:
    """Whether a function could not be traced because what it does depends on values."""
    from torch._subclasses.fake_tensor import (  # noqa: PLC0415
        DataDependentOutputException,
        DynamicOutputShapeException,
    )
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode  # noqa: PLC0415

    kinds = (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)
    return isinstance(error, kinds)


class Kernel:
    """A pure function of tensors, compiled as one piece per set of shapes, without a backward pass.

    Unlike with `torch.compile` nothing is checked when it is called and nothing recorded for gradients: for a
    toy model both take longer than the arithmetic. What is not an argument counts as constant. Gradients
    can be computed inside, with `torch.autograd.grad`.

    Args:
        function: from tensors to tensors.
        keep_in_registers: recompute intermediates rather than write them to memory, for a small function with
            long arithmetic on large tensors.
    """

    def __init__(self, function: Callable[..., Any], *, keep_in_registers: bool = False) -> None:
        self._function = function
        self._options = OPTIONS | (_KEEP_IN_REGISTERS if keep_in_registers else {})
        self._compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def __call__(self, *tensors: Tensor) -> Any:
        """The function's value."""
        layout = tuple((t.shape, t.stride(), t.dtype, t.device) for t in tensors)
        stand_in = _stand_in.get()
        compiled = self._compiled if stand_in is None else stand_in.made.setdefault(self, {})
        if layout not in compiled:
            try:
                compiled[layout] = mending_files(lambda: self._compile(tensors))
            except Exception as error:
                if stand_in is not None or not _asks_for_values(error):
                    raise
                logger.warning(
                    "the target asks for the values of a tensor on its way (%s): the step runs uncompiled, "
                    "which is slower; with train.compile_blocks=true what can be compiled is",
                    str(error).partition("\n")[0],
                )
                compiled[layout] = self._function
        return compiled[layout](*tensors)

    def _compile(self, tensors: tuple[Tensor, ...]) -> Callable[..., Any]:
        # Imported only now: the compiler takes longer to import than all else together.
        from torch._guards import TracingContext, detect_fake_mode, tracing  # noqa: PLC0415
        from torch._inductor.compile_fx import compile_fx  # noqa: PLC0415
        from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: PLC0415
        from torch.fx.experimental.proxy_tensor import make_fx  # noqa: PLC0415
        from torch.fx.experimental.symbolic_shapes import ShapeEnv  # noqa: PLC0415

        tensors = tuple(t.detach() for t in tensors)  # tracing others warns that it reads their `.grad`
        # The compiler's cache on disk wants to know on which shapes a graph depends: here on all of them.
        fake = detect_fake_mode(tensors) or FakeTensorMode(
            shape_env=ShapeEnv(), static_shapes=True, allow_non_fake_inputs=True
        )
        inputs: list[Any] = [
            t if isinstance(t, FakeTensor) else fake.from_tensor(t, static_shapes=True) for t in tensors
        ]
        token = _tracing.set(True)
        try:
            with fake:  # without values: there may be too little memory for a step that is not compiled
                # A function of its own, because a method's arguments would be miscounted.
                graph = make_fx(lambda *args: self._function(*args))(*inputs)
        finally:
            _tracing.reset(token)
        with torch.no_grad(), tracing(TracingContext(fake)):
            run: Any = compile_fx(
                graph, inputs, inner_compile=graph_compiler(), config_patches=dict(self._options)
            )
        return cast(Callable[..., Any], run)


def main() -> None:
    """Compile a sum: the first one on a machine takes half a minute, for headers that are then kept."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    if can_compile("cpu"):
        Kernel(torch.add)(torch.ones(64), torch.ones(64))


if __name__ == "__main__":
    main()
