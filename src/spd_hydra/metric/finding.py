"""What a diagnosis is made of: findings, and what the run was given, which advice refers to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spd_hydra.model.base import Measurement


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong: what was measured, what to change, and where, if at one site."""

    symptom: str
    advice: str
    site: str | None = None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the run was given, as far as advice refers to it.

    Attributes:
        sites: by module path, the site's name in the configuration and its C.
        sparsity_term: what asks for few subcomponents, `importance_minimality` or `smooth_l0`.
        adversary_coeff: of `pgd_recon_subset`.
        tied: by module path, the site whose subcomponents it shares.
        measurements: of the target, with their bounds.
        max_tries: of the target's training; None where it is not trained here.
        short_target: steps of a target that `target_steps` has trained in one try; None where it is not set.
        anneals_late: a parameter of the loss, and L0 with it, still moves in the last quarter of training.
    """

    steps: int
    restarts: int
    sparsity_term: str
    sparsity_coeff: float
    adversary_coeff: float
    lr: float
    clip_ci_fn: float | None
    sites: Mapping[str, tuple[str, int]]
    tied: Mapping[str, str]
    certified: bool
    measurements: Sequence[Measurement]
    max_tries: int | None
    short_target: int | None
    anneals_late: bool


def more_restarts(settings: Settings) -> str:
    """The advice against a local minimum."""
    number = max(8, 2 * settings.restarts)
    return f"a local minimum: try train.restarts.number={number} (now {settings.restarts})"


def more_steps(settings: Settings, factor: int) -> str:
    """The advice against a training that ended too early."""
    return f"try train.steps={factor * settings.steps} (now {settings.steps})"


def listed(items: Sequence[object], noun: str = "", most: int = 4) -> str:
    """`features 1 and 3`, `features 0, 1, 2, 3 and 7 more`, `embed and unembed`."""
    shown = [str(item) for item in items[:most]]
    if len(items) > most:
        shown.append(f"{len(items) - most} more")
    text = shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
    return f"{noun}{'' if len(items) == 1 else 's'} {text}" if noun else text


def values(g: Sequence[float]) -> str:
    """`g 0.98 and 0.97`, `g 0.94 to 1.00`."""
    return f"g {g[0]:.2f} and {g[1]:.2f}" if len(g) == 2 else f"g {min(g):.2f} to {max(g):.2f}"
