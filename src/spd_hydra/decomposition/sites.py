"""From patterns to sites: which modules of the target are decomposed."""

import difflib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from itertools import zip_longest

from torch import nn

from spd_hydra.decomposition.config import SitePattern
from spd_hydra.decomposition.layers import computes_otherwise, is_decomposable, weight_matrix
from spd_hydra.section import ConfigError


def find_sites(target: nn.Module, patterns: Mapping[str, SitePattern]) -> dict[str, SitePattern]:
    """The entry that each module path belongs to, in the order of the target's modules.

    Raises:
        ConfigError: a pattern matches no decomposable module, or a module is matched twice.
    """
    modules = {name: module for name, module in target.named_modules() if name}
    candidates = [name for name, module in modules.items() if is_decomposable(module)]
    matched_by: dict[str, str] = {}
    for key, site in patterns.items():
        found = [name for name in candidates if fnmatchcase(name, site.pattern)]
        if not found:
            raise ConfigError(
                f"decomposition.sites.{key}.pattern: {_why_nothing(site.pattern, modules, candidates)}"
            )
        for name in found:
            if name in matched_by:
                raise ConfigError(
                    f"decomposition.sites.{key}.pattern: {site.pattern!r} matches module {name!r}, which "
                    f"decomposition.sites.{matched_by[name]} matches already; make one of them narrower"
                )
            matched_by[name] = key
    return {name: patterns[matched_by[name]] for name in candidates if name in matched_by}


def site_groups(sites: Iterable[str], patterns: Mapping[str, SitePattern]) -> dict[str, list[str]]:
    """The sites that each pattern stands for, by the pattern's name; a site of no pattern is in no group."""
    sites = list(sites)
    found = {
        name: [site for site in sites if fnmatchcase(site, one.pattern)] for name, one in patterns.items()
    }
    return {name: own for name, own in found.items() if own}


def _why_nothing(pattern: str, modules: Mapping[str, nn.Module], candidates: list[str]) -> str:
    wrong_kind = [name for name in modules if fnmatchcase(name, pattern)]
    if wrong_kind:
        layer = modules[wrong_kind[0]]
        otherwise = ", whose forward is its own and not a product with its matrix"
        return (
            f"{pattern!r} matches {wrong_kind[0]!r}, a {type(layer).__name__}"
            f"{otherwise if computes_otherwise(layer) else ''}; only Linear, Embedding and Conv1D layers can "
            f"be decomposed: {_shortened(candidates)}"
        )
    near = _nearest(pattern, candidates)
    hint = f" Did you mean {near!r}?" if near else ""
    return f"{pattern!r} matches no module of the target.{hint} It has: {_shortened(candidates)}"


def _nearest(pattern: str, candidates: list[str]) -> str | None:
    """The path most like it; for a pattern with a star the path of that kind that is most alike."""
    if "*" not in pattern:
        return next(iter(difflib.get_close_matches(pattern, candidates, n=1)), None)
    options: dict[str, None] = {}
    for name in candidates:
        parts = ["*" if part.isdigit() else part for part in name.split(".")]
        heads = [".".join(parts[:end]) for end in range(1, len(parts))]
        options |= dict.fromkeys([*(f"{head}.*".replace(".*.*", ".*") for head in heads), ".".join(parts)])
    best = max(options, key=lambda option: _alike(pattern, option), default=None)
    return best if best is not None and _alike(pattern, best) > 0.5 else None


def _alike(one: str, other: str) -> float:
    """Mean likeness of two paths, part by part, in [0, 1]."""
    pairs = list(zip_longest(one.split("."), other.split("."), fillvalue=""))
    return sum(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs) / len(pairs)


def _shortened(names: list[str], most: int = 20) -> str:
    return ", ".join(names[:most]) + (f", … ({len(names)} in all)" if len(names) > most else "")


def check_ties(target: nn.Module, tied: Mapping[str, str], sites: Mapping[str, int]) -> None:
    """Check that every tied site and its source are sites, transposes of each other, with equal C.

    Raises:
        ConfigError: naming the tie and what is wrong with it.
    """
    for name, source in tied.items():
        where = f"decomposition.tied.{name}"
        for site in (name, source):
            if site not in sites:
                raise ConfigError(f"{where}: {site!r} is not a site; the sites are {', '.join(sites)}")
        if source in tied:
            raise ConfigError(
                f"{where}: {source!r} is itself tied; name the site that owns the subcomponents"
            )
        if sites[name] != sites[source]:
            raise ConfigError(
                f"{where}: C is {sites[name]} here and {sites[source]} at {source!r}; make them equal"
            )
        own, other = (weight_matrix(target.get_submodule(site)) for site in (name, source))
        if own.shape != other.T.shape or not bool(
            (own == other.T).all() if own.device.type != "meta" else True
        ):
            raise ConfigError(f"{where}: the weight is not the transpose of that of {source!r}")
