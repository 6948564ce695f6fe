"""Identity matrices in front of chosen modules: sites that take apart what a stream carries into a module."""

import inspect
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn

from spd_hydra.decomposition.config import SitePattern
from spd_hydra.decomposition.layers import is_decomposable, is_embedding, weight_matrix
from spd_hydra.decomposition.sites import why_no_module
from spd_hydra.factored import Activation
from spd_hydra.section import ConfigError

SUFFIX = "identity"
"""The identity in front of module `path` is the site `path.identity`."""


class Identity(nn.Linear):
    """y = x, with the identity matrix as its weight; the weight is not used, so nothing is rounded.

    Args:
        before: path of the module in front of which it stands.
        width: of that module's input.
    """

    def __init__(self, before: str, width: int) -> None:
        super().__init__(width, width, bias=False, device="meta")
        self.before = before
        self.weight = nn.Parameter(torch.eye(width), requires_grad=False)

    def forward(self, input: Activation) -> Activation:  # type: ignore[override]
        """The input itself.

        Raises:
            ConfigError: it is of another width than that of the module's first matrix, or no vector.
        """
        if isinstance(input, Tensor) and (
            input.shape[-1:] != (self.in_features,) or not input.is_floating_point()
        ):
            raise ConfigError(
                f"decomposition.identities: the input of {self.before} has the shape {list(input.shape)}, "
                f"but its first matrix reads {self.in_features} numbers; choose a module whose input it reads"
            )
        return input


def find_identities(
    target: nn.Module, patterns: Mapping[str, SitePattern]
) -> dict[str, tuple[SitePattern, Identity]]:
    """The entry and the identity matrix of every site, in the order of the target's modules.

    Modules that lie in another one of the same pattern are passed over: `h.*` means each block.

    Raises:
        ConfigError: a pattern matches no module, a module is matched twice, or its width is not known.
    """
    modules = {name: module for name, module in target.named_modules() if name}
    matched_by: dict[str, str] = {}
    for key, site in patterns.items():
        where = f"decomposition.identities.{key}.pattern"
        found = _outermost(modules, site.pattern)
        if not found:
            raise ConfigError(f"{where}: {why_no_module(site.pattern, modules)}")
        for name in found:
            if name in matched_by:
                raise ConfigError(
                    f"{where}: {site.pattern!r} matches module {name!r}, which "
                    f"decomposition.identities.{matched_by[name]} matches already; make one of them narrower"
                )
            if hasattr(modules[name], SUFFIX):
                raise ConfigError(f"{where}: module {name!r} has something called {SUFFIX!r} already")
            matched_by[name] = key
    return {
        f"{name}.{SUFFIX}": (patterns[key], Identity(name, _width(name, modules[name], key)))
        for name, key in sorted(matched_by.items(), key=lambda item: list(modules).index(item[0]))
    }


def identity_groups(sites: Iterable[str], patterns: Mapping[str, SitePattern]) -> dict[str, list[str]]:
    """The identities that each pattern stands for, as `<name of the pattern>.identity`."""
    modules = {site: site.removesuffix(f".{SUFFIX}") for site in sites if site.endswith(f".{SUFFIX}")}
    found = {name: _outermost(modules.values(), one.pattern) for name, one in patterns.items()}
    return {
        f"{name}.{SUFFIX}": [f"{own}.{SUFFIX}" for own in names] for name, names in found.items() if names
    }


def _outermost(names: Iterable[str], pattern: str) -> list[str]:
    """The modules that a pattern matches, without those in others of them, which come before."""
    found: list[str] = []
    for name in names:
        if fnmatchcase(name, pattern) and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    return found


def _width(name: str, module: nn.Module, key: str) -> int:
    """Width of a module's input: that of the first matrix in it, which for a module of its own reads it."""
    for layer in module.modules():
        if is_decomposable(layer) and not is_embedding(layer):
            return weight_matrix(layer).shape[1]
    raise ConfigError(
        f"decomposition.identities.{key}.pattern: {name!r}, a {type(module).__name__}, holds no matrix to "
        "tell how wide its input is; choose a module that holds one"
    )


class _Entered(nn.Module):
    """What `insert` puts in front of a module: its class is this one and the module's own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module on its first input, with the site in between."""
        identity = cast(nn.Module, getattr(self, SUFFIX))
        if args:
            return super().forward(identity(args[0]), *args[1:], **kwargs)
        first = next(name for name in inspect.signature(super().forward).parameters)
        return super().forward(**(kwargs | {first: identity(kwargs[first])}))


def insert(module: nn.Module, site: nn.Module) -> None:
    """Let a module, of a copy of the target, send its first input through a site.

    Its class changes and nothing else: whoever holds it, or asks it for an attribute, finds what was there.
    """
    kind = type(module)
    module.__class__ = type(kind.__name__, (_Entered, kind), {"__module__": kind.__module__})
    module.add_module(SUFFIX, site)
