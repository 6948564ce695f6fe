"""Blocks of a target compiled one by one: a deep model, or many passes, would make one graph too large."""

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from spd_hydra.compiling import OPTIONS, graph_compiler, mending_files

logger = logging.getLogger(__name__)

_CONSTANTS = (type(None), bool, int, float, str)
# A backward pass is compiled for the strides that were traced. On a GPU the compiler would pad what the
# forward pass saves for it, and the backward pass would read between the numbers.
_OPTIONS = OPTIONS | {"comprehensive_padding": False}


class _Compiled(NamedTuple):
    run: Callable[..., Any]
    outputs: list[Any]
    """The leaves of the output, of which tensors are replaced by those that a call gives."""
    structure: list[TreeSpec]


class CompiledBlocks:
    """Compiles functions of trees of tensors with their backward passes, and remembers them by what they do.

    Each function is traced once per name and kinds of inputs. Functions that come to the same operations,
    like those of the repeated blocks of a transformer, share what the compiler makes of them.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], _Compiled | None] = {}
        self._kernels: dict[tuple[Any, ...], Callable[..., Any]] = {}
        self._refused: set[str] = set()

    def __reduce__(self) -> tuple[type["CompiledBlocks"], tuple[()]]:
        return CompiledBlocks, ()  # what was compiled cannot be copied, and is made again

    def __call__(self, name: str, function: Callable[..., Any], *inputs: Any) -> Any:
        """The function's value, whose backward pass is compiled too.

        A function that cannot be compiled is run as it is, and a line in the log says so.

        Args:
            name: says which function it is, together with everything in `inputs` that is no tensor.
            function: pure, of tensors in dictionaries, tuples and lists, that reads no others.
            inputs: its arguments.
        """
        leaves, structure = tree_flatten(inputs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        rest = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        strange = next((leaf for leaf in rest if not isinstance(leaf, _CONSTANTS)), None)
        if strange is not None:
            if name not in self._refused:
                self._refused.add(name)
                _say(name, f"it takes an argument of type {type(strange).__name__}")
            return function(*inputs)
        kinds = tuple((t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in tensors)
        autocast = torch.is_autocast_enabled(tensors[0].device.type)
        key = (name, str(structure), tuple(rest), kinds, autocast)
        if key in self._known:
            known = self._known[key]
            return function(*inputs) if known is None else _filled(known, known.run(*tensors))

        def compile() -> _Compiled:
            compiled = self._traced(function, leaves, structure)
            _try_both_ways(compiled, tensors)
            return compiled

        try:
            with warnings.catch_warnings():
                # Tracing looks at every `.grad`, also of tensors that are no leaves.
                warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
                compiled = mending_files(compile)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler may say about a model that it was not made for
            self._known[key] = None
            _say(name, str(error).partition("\n")[0])
            return function(*inputs)
        self._known[key] = compiled
        return _filled(compiled, compiled.run(*tensors))

    def _traced(self, function: Callable[..., Any], leaves: list[Any], structure: TreeSpec) -> _Compiled:
        # Imported only now: the compiler takes longer to import than all else together.
        from torch._functorch.aot_autograd import aot_function  # noqa: PLC0415
        from torch._functorch.partitioners import min_cut_rematerialization_partition  # noqa: PLC0415
        from torch._inductor.decomposition import select_decomp_table  # noqa: PLC0415

        places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        outputs: list[Any] = []
        structures: list[TreeSpec] = []

        def flat(*tensors: Tensor) -> list[Tensor]:
            given = list(constants)
            for place, tensor in zip(places, tensors, strict=True):
                given[place] = tensor
            found, spec = tree_flatten(function(*tree_unflatten(given, structure)))
            outputs[:] = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in found]
            structures[:] = [spec]
            return [leaf for leaf in found if isinstance(leaf, Tensor)]

        run = aot_function(
            flat,
            fw_compiler=self._compile,
            bw_compiler=self._compile,
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(),
        )
        return _Compiled(run, outputs, structures)

    def _compile(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Any:
        from torch._inductor import config  # noqa: PLC0415

        holds_tensors = any(node.op == "get_attr" for node in gm.graph.nodes)
        kinds = tuple((t.shape, t.stride(), t.dtype, t.device) for t in example_inputs)
        key = (gm.code, kinds)
        if key in self._kernels:
            return self._kernels[key]
        with config.patch(_OPTIONS):
            kernel = graph_compiler()(gm, example_inputs)
        if not holds_tensors:  # which the code does not show
            self._kernels[key] = kernel
        return kernel


_TENSOR = object()


def _say(name: str, reason: str) -> None:
    logger.warning("%s cannot be compiled and runs as it is, which is slower: %s", name, reason)


def _try_both_ways(compiled: _Compiled, tensors: Sequence[Tensor]) -> None:
    """Run a function and its backward pass on tensors apart: both are compiled when they first run."""
    apart = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]
    # Hooks of whoever recomputes in the backward pass would run all of it here.
    with torch.autograd.graph.saved_tensors_hooks(_unchanged, _unchanged):
        outputs = [tensor for tensor in compiled.run(*apart) if tensor.requires_grad]
    wanted = [tensor for tensor in apart if tensor.requires_grad]
    if outputs and wanted:
        torch.autograd.grad(outputs, wanted, [torch.zeros_like(own) for own in outputs], allow_unused=True)


def _unchanged(saved: Any) -> Any:
    return saved


def _filled(compiled: _Compiled, tensors: Any) -> Any:
    given = iter(tensors)
    leaves = [next(given) if leaf is _TENSOR else leaf for leaf in compiled.outputs]
    return tree_unflatten(leaves, compiled.structure[0])
