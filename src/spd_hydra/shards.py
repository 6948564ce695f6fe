"""The optimiser's state, and the gradients it reads, shared out over ranks; parameters stay whole on each.

Each rank updates its own piece of every parameter, so it needs the moments and the summed gradient of that
piece alone. Pieces are torch's distributed tensors, the form in which FSDP keeps what it shards. They travel
together, so that a step makes a few messages however many parameters there are.

Importing this takes as long as importing torch: it is done where pieces are made.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard

from spd_hydra import distributed
from spd_hydra.optimizer import NamedParameters, is_step_count


class Shards:
    """Of each parameter the piece that this rank updates: 1/ranks of its numbers, rounded up to one.

    A piece lies in the memory of its parameter, flattened: the optimiser is given pieces and so changes the
    parameters, and `gather` brings what the other ranks changed. Ranks call the methods in the same order.

    Args:
        parameters: whole, the same on every rank; one whose numbers are not in a row gets new memory.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        shared = list(parameters)
        assert dist.group.WORLD is not None, "ranks have met before they share something out"
        self._mesh = DeviceMesh.from_group(dist.group.WORLD, shared[0].device.type)
        for parameter in shared:
            parameter.data = parameter.data.contiguous()
        self._pieces = {parameter: nn.Parameter(self._own(parameter.detach())) for parameter in shared}

    def of(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """This rank's pieces of parameters; one that is not shared out stands for itself."""
        return [self._pieces.get(parameter, parameter) for parameter in parameters]

    def sums(self, parameters: Iterable[nn.Parameter], gradients: Iterable[Tensor]) -> list[Tensor]:
        """Gradients summed over ranks, of which each gets what it updates.

        Args:
            parameters: some are shared out, some are not: of these every rank gets the whole sum.
            gradients: of them, from this rank's rows.
        """
        order: list[nn.Parameter] = []
        others: list[Tensor] = []

        def shared() -> Iterator[Tensor]:  # one by one, so that what was sent is free
            for parameter, gradient in zip(parameters, gradients, strict=True):
                order.append(parameter)
                if parameter in self._pieces:
                    yield gradient.reshape(-1)
                else:
                    others.append(gradient)

        messages = distributed.messages_of(shared())
        pieces = iter([piece for together in messages for piece in self._sums_of_one_message(together)])
        whole = iter(distributed.global_sum(others))
        return [next(pieces if parameter in self._pieces else whole) for parameter in order]

    def _sums_of_one_message(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Of flat gradients, this rank's pieces of their sums."""
        rows = torch.cat([self._in_rows(gradient) for gradient in gradients], dim=1)
        addend = DTensor.from_local(rows.view(-1), self._mesh, [Partial()])
        own = addend.redistribute(placements=[Shard(0)]).to_local()
        parts = torch.split(own, [self._width(gradient) for gradient in gradients])
        return [
            self._piece(part[: self._length(gradient)], gradient.numel())
            for part, gradient in zip(parts, gradients, strict=True)
        ]

    def take_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Keep this rank's pieces alone of gradients that are the same on every rank."""
        for parameter in parameters:
            assert parameter.grad is not None, "a backward pass has just set it"
            self._pieces[parameter].grad = self._own(parameter.grad).clone()
            parameter.grad = None

    @torch.no_grad()
    def gather(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make parameters whole again, after each rank has changed its pieces."""
        for together in distributed.messages_of(parameters):
            widths = [self._width(parameter) for parameter in together]
            pieces = [_local(self._pieces[parameter]) for parameter in together]
            own = torch.cat([_filled(piece, width) for piece, width in zip(pieces, widths, strict=True)])
            rows = DTensor.from_local(own, self._mesh, [Shard(0)]).full_tensor().view(-1, len(own))
            for parameter, part in zip(together, torch.split(rows, widths, dim=1), strict=True):
                parameter.copy_(part.reshape(-1)[: parameter.numel()].view(parameter.shape))

    def cut(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's pieces of an optimiser's state; what is in pieces already stays as it is."""
        return {
            key: value if is_step_count(key) or isinstance(value, DTensor) else self._own(value)
            for key, value in state.items()
        }

    def join(
        self, state: Mapping[str, Tensor], parameters: NamedParameters, *, keep: bool
    ) -> dict[str, Tensor]:
        """What is in pieces of an optimiser's state made whole, on the CPU; the rest as it is.

        Args:
            state: as `state_tensors` names it.
            parameters: whole, by name.
            keep: whether this rank wants it; one that does not takes part and gets nothing.
        """
        shapes = {name: parameter.shape for name, parameter in parameters}
        found: dict[str, Tensor] = {}
        for key, value in state.items():  # one of them at a time is whole on the device
            if isinstance(value, DTensor):
                value = self.whole(value).view(shapes[key.partition(".")[2]])
            if keep:
                found[key] = value.cpu()
        return found

    def _own(self, tensor: Tensor) -> DTensor:
        """This rank's piece of a tensor that every rank has, in the memory of that tensor if it can be."""
        start = distributed.rank() * self._width(tensor)
        own = tensor.reshape(-1)[start : start + self._length(tensor)]
        return self._piece(own.to(self._mesh.device_type), tensor.numel())

    @staticmethod
    def whole(tensor: Tensor) -> Tensor:
        """A tensor from the pieces of all ranks; flat, if it is a parameter's or a moment."""
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def _piece(self, own: Tensor, numbers: int) -> DTensor:
        return DTensor.from_local(own, self._mesh, [Shard(0)], shape=torch.Size([numbers]), stride=(1,))

    def _width(self, tensor: Tensor) -> int:
        """Numbers in a piece; the last ranks may have fewer."""
        return math.ceil(tensor.numel() / self._mesh.size())

    def _length(self, tensor: Tensor) -> int:
        """Numbers in this rank's piece."""
        width = self._width(tensor)
        return min(max(tensor.numel() - distributed.rank() * width, 0), width)

    def _in_rows(self, flat: Float[Tensor, " numbers"]) -> Float[Tensor, "ranks width"]:
        """The pieces of all ranks, filled up to one width."""
        width = self._width(flat)
        return _filled(flat, width * self._mesh.size()).view(-1, width)


def _filled(flat: Float[Tensor, " numbers"], length: int) -> Float[Tensor, " length"]:
    """With zeros at the end."""
    return nn.functional.pad(flat, (0, length - len(flat)))


def _local(piece: Tensor) -> Tensor:
    assert isinstance(piece, DTensor), "what is shared out is in pieces"
    return piece.to_local()
