"""From patterns to sites: which modules of the target are decomposed."""

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from itertools import zip_longest

from torch import nn

from spd_hydra.decomposition.config import SitePattern
from spd_hydra.decomposition.layers import computes_otherwise, is_decomposable, weight_matrix
from spd_hydra.section import ConfigError


class UnfitSitesError(ConfigError):
    """Sites that no mask could stand for.

    Attributes:
        sites: their paths.
        reason: what comes behind their names.
        is_first_of_kind: whether the same ones of other blocks were not looked at.
    """

    def __init__(self, text: str, sites: Iterable[str], reason: str, *, is_first_of_kind: bool) -> None:
        super().__init__(text)
        self.sites, self.reason, self.is_first_of_kind = tuple(sites), reason, is_first_of_kind


def find_sites(
    target: nn.Module, patterns: Mapping[str, SitePattern], without: Collection[str] = ()
) -> dict[str, SitePattern]:
    """The entry that each module path belongs to, in the order of the target's modules.

    Args:
        target: the model.
        patterns: the entries by name.
        without: paths of layers that are passed over.

    Raises:
        ConfigError: a pattern matches no decomposable module, or a module is matched twice.
    """
    modules = {name: module for name, module in target.named_modules() if name}
    candidates = [name for name, module in modules.items() if is_decomposable(module) and name not in without]
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
        own = next((name for name in wrong_kind if computes_otherwise(modules[name])), None)
        name = own or wrong_kind[0]
        otherwise = ", whose output is no product with its matrix (hooks, max_norm or a forward of its own)"
        return (
            f"{pattern!r} matches {name!r}, a {type(modules[name]).__name__}{otherwise if own else ''}; only "
            f"Linear, Embedding and Conv1D layers can be decomposed: {_shortened(candidates)}"
        )
    return why_no_module(pattern, candidates)


def why_no_module(pattern: str, candidates: Iterable[str]) -> str:
    """What a user is told of a pattern that matches none of the paths, with the nearest one and a list."""
    candidates = list(candidates)
    near = _nearest(pattern, candidates)
    hint = f" Did you mean {near!r}?" if near else ""
    return f"{pattern!r} matches no module of the target.{hint} It has: {_shortened(candidates)}"


def _nearest(pattern: str, candidates: list[str]) -> str | None:
    """The path most like it; for a pattern with a star the path of that kind that is most alike."""
    if "*" not in pattern:
        return next(iter(difflib.get_close_matches(pattern, candidates, n=1)), None)
    options: dict[str, None] = {}
    for name in candidates:
        options |= dict.fromkeys(_patterns_of(name))
    best = max(options, key=lambda option: _alike(pattern, option), default=None)
    return best if best is not None and _alike(pattern, best) > 0.5 else None


def _patterns_of(name: str, shortest: int = 1) -> Iterator[str]:
    """Patterns that match a path, the widest first and without any number; they keep so many parts."""
    parts = in_every_block(name).split(".")
    for end in range(shortest, len(parts)):
        yield f"{'.'.join(parts[:end])}.*".replace(".*.*", ".*")
    yield ".".join(parts)


def in_every_block(name: str) -> str:
    """The path with * for every number."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _alike(one: str, other: str) -> float:
    """Mean likeness of two paths, part by part, in [0, 1]."""
    pairs = list(zip_longest(one.split("."), other.split("."), fillvalue=""))
    return sum(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs) / len(pairs)


def _shortened(names: list[str], most: int = 20) -> str:
    return ", ".join(names[:most]) + (f", … ({len(names)} in all)" if len(names) > most else "")


def unfit_sites(
    reason: str,
    unfit: Iterable[str],
    target: nn.Module,
    sites: Iterable[str],
    *,
    is_first_of_kind: bool = False,
) -> UnfitSitesError:
    """What a user is told of sites that no mask could stand for, with patterns for those that are left.

    Args:
        reason: what comes behind their names, such as "which the target never runs".
        unfit: their paths; if all of them are identities that were put into the target, these are named.
        target: the model.
        sites: paths of all layers that are decomposed.
        is_first_of_kind: whether the same ones of other blocks were not looked at.
    """

    def error(text: str) -> UnfitSitesError:
        return UnfitSitesError(text, unfit, reason, is_first_of_kind=is_first_of_kind)

    unfit, sites = list(unfit), list(sites)
    found = [name for name in unfit if name in sites]
    if not found:
        return error(f"decomposition.identities: got {_shortened(unfit, 3)}, {reason}; leave it out")
    kinds = {in_every_block(name) for name in found}
    layers = [name for name, module in target.named_modules() if name and is_decomposable(module)]
    left = [name for name in sites if in_every_block(name) not in kinds]  # blocks are alike
    left = left or [name for name in sites if name not in found]
    others = [name for name in layers if name not in sites]
    if left:
        advice = f"decompose the others alone: {' '.join(_as_words(_patterns_for(left, layers)))}"
    elif others:
        advice = f"choose others with decomposition.sites.<name>.pattern, of {_shortened(others)}"
    else:
        advice = "the target has no other matrices"
    return error(f"decomposition.sites: got {_shortened(found, 3)}, {reason}; {advice}")


def _patterns_for(wanted: list[str], layers: list[str]) -> list[str]:
    """Few patterns that match the wanted layers and none of the others."""
    found: dict[str, set[str]] = {}
    for name in wanted:
        if any(name in matched for matched in found.values()):
            continue
        above = next((n for n, part in enumerate(name.split(".")) if part.isdigit()), 0)  # parts above blocks
        for pattern in (*_patterns_of(name, max(1, above)), name):
            matched = {layer for layer in layers if fnmatchcase(layer, pattern)}
            if matched <= set(wanted):
                found[pattern] = matched
                break
    return [one for one, own in found.items() if not any(own < other for other in found.values())]


def _as_words(patterns: list[str]) -> list[str]:
    """What to write on the command line for an entry of each pattern, named by the last part of its path."""
    words: dict[str, str] = {}
    for pattern in patterns:
        last = [part for part in pattern.split(".") if part != "*"][-1:] or ["all"]
        name = last[0] if last[0] not in words else f"{last[0]}_{len(words) + 1}"
        words[name] = f"'decomposition.sites.{name}.pattern={pattern}'"
    return list(words.values())


def check_ties(
    target: nn.Module,
    tied: Mapping[str, str],
    sites: Mapping[str, SitePattern],
    patterns: Mapping[str, SitePattern],
) -> None:
    """Check that tied sites and their sources are sites, transposes of each other, with equal C and start.

    Args:
        target: the model.
        tied: by site, its source.
        sites: the entry of each site.
        patterns: the entries by name, for what is said of a tie that has their names in place of paths.

    Raises:
        ConfigError: naming the tie and what is wrong with it.
    """
    for name, source in tied.items():
        where = f"decomposition.tied.{name}"
        for site in (name, source):
            if site not in sites:
                # A slip in a name is no layer; a layer that is none of the sites was left out of them.
                is_layer = any(layer == site for layer, _ in target.named_modules())
                advice = f"; drop the tie too: '~{where}'" if is_layer else ""
                known = ", ".join(sites)
                advice = advice or _tie_of_paths(name, source, sites, patterns)
                raise ConfigError(f"{where}: {site!r} is not a site; the sites are {known}{advice}")
        if source in tied:
            raise ConfigError(
                f"{where}: {source!r} is itself tied; name the site that owns the subcomponents"
            )
        own, other = sites[name], sites[source]
        if own.subcomponents != other.subcomponents:
            raise ConfigError(
                f"{where}: C is {own.subcomponents} here and {other.subcomponents} at {source!r}; make them "
                "equal"
            )
        if own.init not in {None, other.init}:
            raise ConfigError(
                f"{where}: init is {own.init.name} here, but a tied site begins as {source!r}; set it there"
            )
        if own.lr_factor not in {1.0, other.lr_factor}:
            raise ConfigError(
                f"{where}: lr_factor is {own.lr_factor:g} here, but a tied site learns as {source!r}; "
                "set it there"
            )
        weight, of_source = (weight_matrix(target.get_submodule(site)) for site in (name, source))
        if weight.shape != of_source.T.shape or not bool(
            (weight == of_source.T).all() if weight.device.type != "meta" else True
        ):
            raise ConfigError(f"{where}: the weight is not the transpose of that of {source!r}")


def _tie_of_paths(
    name: str, source: str, sites: Mapping[str, SitePattern], patterns: Mapping[str, SitePattern]
) -> str:
    """What to write in place of a tie of names that are no paths, if it is clear which sites they mean."""
    groups = site_groups(sites, patterns)

    def meant(given: str) -> list[str]:
        return (
            [given] if given in sites else groups.get(given) or [p for p in sites if p.endswith(f".{given}")]
        )

    found = [meant(given) for given in (name, source)]
    if any(len(paths) != 1 for paths in found) or found[0] == found[1]:
        return ""
    return f"; a tie names them by these paths: '+decomposition.tied.{found[0][0]}={found[1][0]}'"
