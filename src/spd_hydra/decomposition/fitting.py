"""Layers that wide patterns match and no mask could stand for: they are passed over, and told."""

from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import Tensor, nn

from spd_hydra.ci_fn.layers import site_key
from spd_hydra.decomposition.config import Decomposition
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.decomposition.sites import UnfitSitesError, find_sites, in_every_block, site_groups

Found = TypeVar("Found")


def fitting(
    make: Callable[[Mapping[str, str]], DecomposedModel], check: Callable[[DecomposedModel], Found]
) -> tuple[DecomposedModel, Found]:
    """The model without the layers that do not fit, and what its check gives.

    Args:
        make: a model without these layers, given with the reason of each.
        check: raises UnfitSitesError of sites that cannot be masked.

    Raises:
        UnfitSitesError: one of them is named exactly or tied, or nothing would be left of a pattern.
    """
    passed_over: Mapping[str, str] = {}
    while True:
        model = make(passed_over)
        try:
            return model, check(model)
        except UnfitSitesError as error:
            unfit = _to_pass_over(model, error)
            assert unfit, "each turn leaves out at least one layer"
            passed_over = {**passed_over, **dict.fromkeys(unfit, error.reason)}
            del model  # which holds what the next one needs room for


def _to_pass_over(model: DecomposedModel, error: UnfitSitesError) -> set[str]:
    unfit = set(error.sites)
    if not unfit <= set(model.matrix_names):  # an identity
        raise error
    kinds = {in_every_block(site) for site in unfit}
    of_all_blocks = {site for site in model.matrix_names if in_every_block(site) in kinds}
    if error.is_first_of_kind:  # blocks are alike
        unfit = of_all_blocks
    tied = {*model.config.tied, *model.config.tied.values()}
    if unfit & tied or unfit != of_all_blocks:  # in some blocks alone: on other rows it may be in others
        raise error
    for name, own in site_groups(model.matrix_names, model.config.sites).items():
        if unfit.intersection(own) and (unfit.issuperset(own) or not _is_wide(model.config, name)):
            raise error
    return unfit


def _is_wide(config: Decomposition, name: str) -> bool:
    return any(character in config.sites[name].pattern for character in "*?[")


def passed_over_in(state: Mapping[str, Tensor], target: nn.Module, config: Decomposition) -> dict[str, str]:
    """The layers that a saved model has passed over: those that its wide patterns match and that it lacks."""
    sites = find_sites(target, config.sites)
    wide = site_groups(sites, {name: one for name, one in config.sites.items() if _is_wide(config, name)})
    lacking = (
        site
        for own in wide.values()
        for site in own
        if site not in config.tied and f"subcomponents.{site_key(site)}.V" not in state
    )
    return dict.fromkeys(lacking, "which the saved model passes over")


def passed_over_notes(passed_over: Mapping[str, str]) -> list[str]:
    """What a reader has to know of them, a sentence for each reason."""
    by_reason: dict[str, dict[str, None]] = {}
    for site, reason in passed_over.items():
        by_reason.setdefault(reason, {})[in_every_block(site)] = None
    return [
        f"not decomposed, though the patterns match: {', '.join(kinds)}, {reason}"
        for reason, kinds in by_reason.items()
    ]
