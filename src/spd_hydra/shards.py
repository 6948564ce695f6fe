"""The optimiser's state, and the gradients it reads, shared out over ranks; parameters stay whole on each.

Each rank updates its own piece of every parameter, so it needs the moments and the summed gradient of that
piece alone. Pieces are torch's distributed tensors, the form in which FSDP keeps what it shards.

Importing this takes as long as importing torch: it is done where pieces are made.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
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
        return [
            self._sum(gradient) if parameter in self._pieces else distributed.global_sum([gradient])[0]
            for parameter, gradient in zip(parameters, gradients, strict=True)
        ]

    def _sum(self, gradient: Tensor) -> Tensor:
        addend = DTensor.from_local(gradient.reshape(-1), self._mesh, [Partial()])
        return addend.redistribute(placements=[Shard(0)])

    def take_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Keep this rank's pieces alone of gradients that are the same on every rank."""
        for parameter in parameters:
            assert parameter.grad is not None, "a backward pass has just set it"
            self._pieces[parameter].grad = self._own(parameter.grad).clone()
            parameter.grad = None

    @torch.no_grad()
    def gather(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make parameters whole again, after each rank has changed its pieces."""
        for parameter in parameters:
            parameter.copy_(self.whole(self._pieces[parameter]).view(parameter.shape))

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
        flat = tensor.reshape(-1)
        pieces, number = flat.chunk(self._mesh.size()), distributed.rank()
        own = pieces[number] if number < len(pieces) else flat[:0]
        own = own.to(self._mesh.device_type)
        return DTensor.from_local(own, self._mesh, [Shard(0)], shape=flat.shape, stride=(1,))

    @staticmethod
    def whole(tensor: Tensor) -> Tensor:
        """A tensor from the pieces of all ranks; flat, if it is a parameter's or a moment."""
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
