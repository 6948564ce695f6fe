"""Calls of a module with other tensors in place of its own, also if it holds a module or a tensor twice."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


def places(module: nn.Module) -> dict[str, str]:
    """Every place in which a module holds a tensor, and by what name the tensor is known.

    That is the name which `named_parameters` and `named_buffers` have for it: of its first place. A module
    that is held twice counts once: `functional_call`, told to put a tensor into the same place under two
    names, takes the first of the two for what was there before, and leaves it there.
    """
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for path, part in module.named_modules():
        for tables in (part._parameters, part._buffers):
            for name, tensor in tables.items():
                if tensor is not None:
                    place = f"{path}.{name}" if path else name
                    found[place] = first.setdefault(id(tensor), place)
    return found


def call(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Call a module as if these tensors were its own.

    Args:
        module: has its own tensors again afterwards.
        tensors: by the name that `places` gives; of those that are missing its own are used.
        args: of the call.
        kwargs: of the call.
    """
    own = {place: tensors[name] for place, name in places(module).items() if name in tensors}
    return functional_call(module, own, tuple(args), dict(kwargs or {}), tie_weights=False)
