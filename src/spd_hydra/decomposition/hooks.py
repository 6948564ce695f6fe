"""Forward hooks of people on a target, which the copy for masked passes has to have too."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from spd_hydra.decomposition.sites import why_no_module

Hook = Callable[[nn.Module, tuple[Any, ...], Any], Any]
"""As torch calls it: with module, inputs and output; gives another output, or None to leave it."""

_KEPT = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


@contextmanager
def registered(target: nn.Module, hooks: Mapping[str, Hook]) -> Iterator[None]:
    """The hooks on modules of a target, by path, until the block ends.

    Raises:
        ValueError: the target has no such module; the nearest is named.
        TypeError: a hook cannot be called.
    """
    modules = dict(target.named_modules(remove_duplicate=False))
    for path, hook in hooks.items():
        if path not in modules:
            raise ValueError(f"hooks: {why_no_module(path, filter(None, modules))}")
        if not callable(hook):
            raise TypeError(
                f"hooks[{path!r}]: got a {type(hook).__name__}, must be a function of "
                "(module, inputs, output)"
            )
    with ExitStack() as stack:
        for path, hook in hooks.items():
            stack.callback(modules[path].register_forward_hook(_told_of(modules[path], hook)).remove)
        yield


def _told_of(module: nn.Module, hook: Hook) -> Hook:
    """A hook that is given the target's own module, also where a wrapper in a copy calls it."""

    def called(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        return hook(module, inputs, output)

    return called


def hooks_of(module: nn.Module) -> list[Callable[..., Any]]:
    """A module's forward hooks, without those by which transformers collects outputs when asked to."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return [hook for hook in hooks if not str(getattr(hook, "__module__", "")).startswith("transformers.")]


def move_hooks(layer: nn.Module, wrapper: nn.Module) -> None:
    """Let a wrapper call the hooks of the layer that it stands for, on what it is given and gives."""
    for name in _KEPT:
        mine, its = getattr(layer, name), getattr(wrapper, name)
        its.update(mine)
        mine.clear()


class AsCopied:
    """What a target was when it was copied, to see later whether its copy is still one."""

    def __init__(self, target: nn.Module) -> None:
        self._modules = dict(target.named_modules(remove_duplicate=False))
        self._hooks = {path: hooks_of(module) for path, module in self._modules.items()}

    def require_same(self, target: nn.Module) -> None:
        """Refuse a target that has other modules or hooks now.

        Raises:
            ValueError: names the first that differs, and what to do.
        """
        now = dict(target.named_modules(remove_duplicate=False))
        for path in [*now, *self._modules]:
            name = path or "the target itself"
            if now.get(path) is not self._modules.get(path):
                raise ValueError(
                    f"model.target: {name} is not the module that was there when the model was made, which "
                    "masked passes run; leave it, and change its output in all passes: "
                    f"with model.hooked({{{path!r}: hook}}): ..."
                )
            if hooks_of(now[path]) != self._hooks[path]:
                raise ValueError(
                    f"model.target: {name} has other forward hooks than masked passes run with; remove "
                    f"them, and register them for all passes: with model.hooked({{{path!r}: hook}}): ..."
                )
