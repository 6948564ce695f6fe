"""What compiled kernels take of memory, as the compiler plans it before it would write their code."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node


class Planner:
    """Stands in for the compiler of graphs: the kernels that it gives have shapes, sizes and no values.

    Attributes:
        reach: every call of a kernel gives this the bytes that what the kernel makes takes at most at a time,
            its outputs included. They are made afterwards.
        error: why there is no plan for a graph, if that is so for one.
    """

    def __init__(self) -> None:
        self.reach: Callable[[int], None] = lambda size: None
        self.error: Exception | None = None

    def __call__(self, graph: GraphModule, inputs: Sequence[Any], **settings: Any) -> Callable[..., Any]:
        """A kernel without code for a graph, for tensors without values."""
        from torch._functorch._aot_autograd.utils import make_boxed_func  # noqa: PLC0415

        outputs = _Outputs(graph)  # now, because the compiler changes the graph
        try:
            size = planned_bytes(graph, inputs, **settings)
        except Exception as error:
            self.error = error
            raise

        def run(*tensors: Tensor) -> list[Any]:
            self.reach(size)
            return outputs(tensors)

        boxed: Callable[..., Any] = make_boxed_func(run)
        return boxed


def planned_bytes(graph: GraphModule, inputs: Sequence[Any], **settings: Any) -> int:
    """Most bytes that intermediates and outputs of a compiled graph take at a time, without its inputs.

    The compiler lowers the graph, fuses its operations and orders what comes of it; then its own account of
    the buffers that are left is taken, and no code is written. Memory within operations that are no kernels
    of the compiler, e.g. the workspace of a matrix product, is not counted.

    Args:
        graph: as the compiler of graphs is given it, which may change it.
        inputs: of it.
        settings: of the compiler of graphs.
    """
    from torch._inductor import config  # noqa: PLC0415
    from torch._inductor.compile_fx import compile_fx_inner  # noqa: PLC0415

    try:
        with _before_code_is_written(), config.patch(force_disable_caches=True):
            compile_fx_inner(graph, inputs, **settings)
    except _Planned as planned:
        return planned.size
    return 0  # a graph without operations is not compiled


class _Planned(BaseException):
    """Ends a compilation; the compiler lets through what is no Exception."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size


@contextlib.contextmanager
def _before_code_is_written() -> Iterator[None]:
    """Raise `_Planned` where the compiler would begin to write the code of what it has scheduled."""
    from torch._inductor.scheduler import Scheduler  # noqa: PLC0415

    def stop(scheduler: Any) -> None:
        raise _Planned(_most_bytes(scheduler.nodes))

    compiler: Any = Scheduler
    codegen = compiler.codegen
    compiler.codegen = stop
    try:
        yield
    finally:
        compiler.codegen = codegen


def _most_bytes(kernels: list[Any]) -> int:
    """Of the buffers that these kernels make, at a time."""
    from torch._inductor.memory import compute_memory_timeline  # noqa: PLC0415
    from torch._inductor.virtualized import V  # noqa: PLC0415
    from torch.utils._ordered_set import OrderedSet  # noqa: PLC0415

    # Inputs that could be freed are left out: whoever calls the kernels still holds them.
    outputs = OrderedSet(V.graph.get_output_names())
    buffers: list[Any] = list(compute_memory_timeline(kernels, {}, outputs)[0])
    changes = [0] * (len(kernels) + 1)
    writing_over: set[str] = set()  # operations that write their result over an input
    for buffer in buffers:
        first, last = buffer.start_step, buffer.end_step
        operations = kernels[last].get_nodes()
        if first == last and len(operations) > 1:
            continue  # passed on between operations that are one kernel, which never writes it to memory
        changes[first] += buffer.size_alloc
        if last < 0:  # an output
            continue
        readers = [user for user in buffer.buffer.users if user.node in operations]
        (reader,) = readers if len(readers) == 1 else (None,)
        if reader is None or not reader.can_inplace or reader.get_name() in writing_over:
            changes[last + 1] -= buffer.size_free
        else:
            writing_over.add(reader.get_name())
            changes[last] -= buffer.size_free
    return max(itertools.accumulate(changes))


class _Outputs:
    """Makes outputs of a graph without values; what shares memory in the graph shares it here."""

    def __init__(self, graph: GraphModule) -> None:
        inputs = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
        self._places = {_memory(value): i for i, value in enumerate(inputs) if isinstance(value, Tensor)}
        (output,) = graph.graph.find_nodes(op="output")
        leaves = [leaf.meta["val"] if isinstance(leaf, Node) else leaf for leaf in output.args[0]]
        self._outputs = [_Output.like(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def __call__(self, inputs: Sequence[Tensor]) -> list[Any]:
        memory = {known: inputs[place] for known, place in self._places.items()}
        return [own.made_in(memory) if isinstance(own, _Output) else own for own in self._outputs]


class _Output(NamedTuple):
    """A tensor's layout and the identity of its memory."""

    memory: int
    numbers: int
    dtype: torch.dtype
    device: torch.device
    layout: tuple[Sequence[int], Sequence[int], int]

    @classmethod
    def like(cls, value: Tensor) -> "_Output":
        numbers = value.untyped_storage().nbytes() // value.itemsize
        layout = tuple(value.shape), value.stride(), int(value.storage_offset())
        return cls(_memory(value), numbers, value.dtype, value.device, layout)

    def made_in(self, memory: dict[int, Tensor]) -> Tensor:
        """The tensor; its memory is made if it is not there."""
        if self.memory not in memory:
            memory[self.memory] = torch.empty(self.numbers, dtype=self.dtype, device=self.device)
        return memory[self.memory].as_strided(*self.layout)


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
