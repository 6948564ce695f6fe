"""What keeps a decomposition from what it is made for, or decides what it shows; seen before training."""

from spd_hydra.build import Parts
from spd_hydra.data.masking import MaskedBatches, note
from spd_hydra.data.tokens import Tokens
from spd_hydra.decomposition.sites import site_groups


def expectations(parts: Parts) -> list[str]:
    """A line for each."""
    return [text for text in (_too_few(parts), _masks(parts)) if text is not None]


def _too_few(parts: Parts) -> str | None:
    """Sites with fewer subcomponents than the known answer of the target has there."""
    model, patterns = parts.model, parts.config.decomposition.sites
    try:
        known = parts.config.model.known_answer(model.target)
    except Exception:  # of a plug-in's target that needs values which a check does without
        return None
    if known is None:
        return None
    groups = site_groups(model.matrix_names, patterns)
    short: dict[str, int] = {}  # wanted, by the name of the pattern
    for name, sites in groups.items():
        wanted = max(known.expected_alive.get(site, 0) for site in sites)
        if patterns[name].subcomponents < wanted:
            short[name] = wanted
    if not short:
        return None
    told = ", ".join(
        f"{patterns[name].subcomponents} of {wanted} at {name}" for name, wanted in short.items()
    )
    keys = " ".join(f"decomposition.sites.{name}.C={2 * wanted}" for name, wanted in short.items())
    return (
        "decomposition: fewer subcomponents than the known answer of the target has, which so cannot be "
        f"found ({told}); try {keys}"
    )


def _masks(parts: Parts) -> str | None:
    """What a masked language model is given to fill."""
    data = parts.config.data
    if isinstance(parts.batches, MaskedBatches):
        return note(parts.batches.fraction)
    if not (parts.config.model.fills_masks() and isinstance(data, Tokens)):
        return None
    return (
        "data.mask_fraction: no tokens are masked, so unless the text has mask tokens of its own what is "
        "decomposed of this masked language model is mostly how it copies its input"
    )
