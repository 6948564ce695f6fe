"""Blocks of a target, whose clean output stands in for them where nothing before them is masked."""

from collections import deque
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from torch import Tensor, nn

AtBlock = Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any]], Any]
"""Called in place of a block with its path, the block, and its arguments; gives the output."""


def run_block(path: str, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a block as it is."""
    return block(*args, **kwargs)


class BlockSwitch:
    """What the wrapped blocks of one patched copy do at the moment; None: what the target does."""

    def __init__(self) -> None:
        self.at_block: AtBlock | None = None


_CLOSED = (type(None), bool, int, float, str, type, ModuleType)  # of which nothing inside is looked at
_COLLECTIONS = (tuple, list, dict, set, frozenset, deque)


class _Contents:
    """What can be reached from a value by elements and attributes, to see later whether it was changed."""

    def __init__(self, value: Any) -> None:
        self._value = value
        self._found = _reachable(value)

    def changed(self) -> bool:
        """Whether anything else can be reached now, or a tensor was written to."""
        now = _reachable(self._value)
        return len(now) != len(self._found) or any(
            one is not other or version != before
            for (one, version), (other, before) in zip(now, self._found, strict=True)
        )


def _reachable(value: Any) -> list[tuple[Any, int]]:
    """All that can be reached, in a fixed order, and how often each tensor was written to."""
    found: list[tuple[Any, int]] = []
    looked_into: set[int] = set()
    waiting = [value]
    while waiting:
        one = waiting.pop()
        is_tensor = isinstance(one, Tensor)
        found.append((one, one._version if is_tensor and not one.is_inference() else 0))
        if is_tensor or isinstance(one, _CLOSED) or id(one) in looked_into:
            continue
        looked_into.add(id(one))  # objects may refer to each other in a circle
        if isinstance(one, _COLLECTIONS):
            waiting += one
        if isinstance(one, dict):
            waiting += one.values()
        waiting += getattr(one, "__dict__", {}).values()
    return found


class BlockWrapper(nn.Module):
    """A block that does what a switch says, as long as to give an output is all that it does.

    One that changes what it is given, such as a cache of keys and values that later blocks read, runs as it
    is in every pass after the first, which is a clean one: its output does not stand for it, and to run it
    again in a backward pass would change that a second time.
    """

    def __init__(self, path: str, block: nn.Module, switch: BlockSwitch) -> None:
        super().__init__()
        self.path, self.block, self.switch = path, block, switch
        self.changes_arguments = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.switch.at_block is None or self.changes_arguments:
            return self.block(*args, **kwargs)
        given = _Contents((args, kwargs))
        output = self.switch.at_block(self.path, self.block, args, kwargs)
        self.changes_arguments = given.changed()
        return output

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # A target may ask its blocks for what they are.
            return getattr(super().__getattr__("block"), name)


class SequentialWrapper(BlockWrapper):
    """A block of which a target may also run the parts one by one; then they run as they are."""

    block: nn.Sequential

    def __getitem__(self, index: Any) -> nn.Module:
        return self.block[index]

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.block)

    def __len__(self) -> int:
        return len(self.block)


def wrap_blocks(patched: nn.Module, switch: BlockSwitch, path: str = "") -> None:
    """Wrap the elements of the outermost lists of modules that are called as a whole.

    A list or dictionary in a list is not called: its own elements are looked at.
    """
    for name, child in list(patched.named_children()):
        at = f"{path}.{name}".lstrip(".")
        if isinstance(child, BlockWrapper):  # of a list that is in two places
            continue
        if isinstance(patched, nn.ModuleList) and not isinstance(child, nn.ModuleList | nn.ModuleDict):
            wrapper = SequentialWrapper if isinstance(child, nn.Sequential) else BlockWrapper
            patched[int(name)] = wrapper(at, child, switch)
        else:
            wrap_blocks(child, switch, at)


class CleanBlocks:
    """Outputs of the blocks of a clean pass, and what was done before a site began.

    A block that was done, and a site that had run, before a site began has its clean output in every pass
    that masks this site alone.
    """

    def __init__(self) -> None:
        self._outputs: dict[str, Any] = {}
        self._as_given: dict[str, _Contents] = {}
        self._again: set[str] = set()  # blocks that ran more than once: one output does not stand for them
        self._before: dict[str, frozenset[str]] = {}
        self._sites: list[str] = []  # in the order in which they began

    def record(self, path: str, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a block of the clean pass."""
        output = block(*args, **kwargs)
        if path in self._outputs:
            self._again.add(path)
        self._outputs[path], self._as_given[path] = output, _Contents(output)
        return output

    def site_begins(self, site: str) -> None:
        """Note which blocks are done."""
        self._before[site] = frozenset(self._outputs)
        self._sites.append(site)

    def sites_before(self, site: str) -> frozenset[str]:
        """Sites that began earlier, which have their clean output in a pass that masks this one alone."""
        return frozenset(self._sites[: self._sites.index(site)])

    def reused_before(self, site: str, run: AtBlock) -> AtBlock:
        """For a pass in which this site alone is masked: clean outputs, up to the block that it is in.

        Args:
            site: the masked one.
            run: runs that block and those after it.
        """
        ran_once = self._before[site] - self._again
        # What followed, in the clean pass or a masked one, may have gone on in an output's own memory.
        known = {path for path in ran_once if not self._as_given[path].changed()}

        def at_block(path: str, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self._outputs[path] if path in known else run(path, block, args, kwargs)

        return at_block
