"""Blocks of a target, whose clean output stands in for them where nothing before them is masked."""

from collections.abc import Callable
from typing import Any

from torch import nn

AtBlock = Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any]], Any]
"""Called in place of a block with its path, the block, and its arguments; gives the output."""


def run_block(path: str, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a block as it is."""
    return block(*args, **kwargs)


class BlockSwitch:
    """What the wrapped blocks of one patched copy do at the moment; None: what the target does."""

    def __init__(self) -> None:
        self.at_block: AtBlock | None = None


class BlockWrapper(nn.Module):
    """A block that does what a switch says."""

    def __init__(self, path: str, block: nn.Module, switch: BlockSwitch) -> None:
        super().__init__()
        self.path, self.block, self.switch = path, block, switch

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.switch.at_block is None:
            return self.block(*args, **kwargs)
        return self.switch.at_block(self.path, self.block, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(
                super().__getattr__("block"), name
            )  # a target may ask its blocks for what they are


def wrap_blocks(patched: nn.Module, switch: BlockSwitch) -> None:
    """Wrap the elements of the outermost lists of modules."""
    lists = {path: module for path, module in patched.named_modules() if isinstance(module, nn.ModuleList)}
    for path, blocks in lists.items():
        if any(path.startswith(f"{outer}.") for outer in lists):
            continue
        for index, block in enumerate(blocks):
            blocks[index] = BlockWrapper(f"{path}.{index}".lstrip("."), block, switch)


class CleanBlocks:
    """Outputs of the blocks of a clean pass, and what was done before a site began.

    A block that was done, and a site that had run, before a site began has its clean output in every pass
    that masks this site alone.
    """

    def __init__(self) -> None:
        self._outputs: dict[str, Any] = {}
        self._again: set[str] = set()  # blocks that ran more than once: one output does not stand for them
        self._before: dict[str, frozenset[str]] = {}
        self._sites: list[str] = []  # in the order in which they began

    def record(self, path: str, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a block of the clean pass."""
        output = block(*args, **kwargs)
        if path in self._outputs:
            self._again.add(path)
        self._outputs[path] = output
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
        known = self._before[site] - self._again

        def at_block(path: str, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self._outputs[path] if path in known else run(path, block, args, kwargs)

        return at_block
