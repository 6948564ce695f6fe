"""What ablated models lose, in words and as tables: the verdict where nobody knows the right answer."""

import math
from collections.abc import Mapping
from typing import Any

from spd_hydra.report.numbers import NOTHING, number, text_table

_MEANINGS = {
    "target": "the target itself",
    "unmasked": "all subcomponents on, without the weight delta",
    "stochastic": "masks drawn as in training",
    "ci": "masks equal to the causal importances",
    "random": "masks drawn from U(0, 1)",
    "zero": "all subcomponents off",
}
_DIVERGENCES = {"kl": "KL", "mse": "MSE"}


def masks_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per kind of mask: its name, what it means, CE, share of CE recovered, divergence."""
    kind = divergence(summary)
    return [
        {
            "masks": name,
            "meaning": _meaning(name),
            "ce": own.get("ce"),
            "recovered": percent(own.get("ce_recovered")),
            "divergence": own.get(kind) if kind else None,
        }
        for name, own in (summary.get("ablations") or {}).items()
    ]


def group_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per group of sites: alive, L0, CE and divergence with masks at this group alone."""
    kind = divergence(summary)
    return [
        {
            "group": name,
            "alive": own.get("alive"),
            "l0": own.get("l0"),
            "ce": own.get("ce"),
            "divergence": own.get(kind) if kind else None,
        }
        for name, own in (summary.get("groups") or {}).items()
    ]


def divergence(summary: Mapping[str, Any]) -> str | None:
    """The key of the divergence that was measured, `kl` or `mse`."""
    found = {key for own in (summary.get("ablations") or {}).values() for key in own}
    return next((kind for kind in _DIVERGENCES if kind in found), None)


def divergence_name(summary: Mapping[str, Any]) -> str:
    """How people write the divergence that was measured."""
    return _DIVERGENCES.get(divergence(summary) or "", "divergence")


def has_ce(summary: Mapping[str, Any]) -> bool:
    """Whether the target predicts tokens, so that there is a cross-entropy."""
    return "target" in (summary.get("ablations") or {})


def has_recovered(summary: Mapping[str, Any]) -> bool:
    """Whether a share of cross-entropy can be told: not where all off is no worse than the target."""
    return any("ce_recovered" in own for own in (summary.get("ablations") or {}).values())


def sentence(summary: Mapping[str, Any]) -> str | None:
    """The result in one sentence; None where nothing was ablated."""
    found = summary.get("ablations") or {}
    ci, zero, target = (found.get(name) or {} for name in ("ci", "zero", "target"))
    if not ci:
        return None
    alive, l0 = sum((summary.get("alive") or {}).values()), (summary.get("l0") or {}).get("total")
    sparsity = f"L0 {number(l0)} of {number(alive)} alive"
    kind = divergence(summary) or ""
    diverged = f"{number(ci.get(kind))} ({number(zero.get(kind))} with all off)"
    if "ce" not in ci:
        return f"With causal importances as masks the {divergence_name(summary)} is {diverged}: {sparsity}."
    if "ce_recovered" not in ci:
        return (
            f"All off (CE {number(zero.get('ce'))}) is {_no_worse(summary)} than the target "
            f"({number(target.get('ce'))}), so no share of the cross-entropy is recovered: with causal "
            f"importances as masks CE is {number(ci['ce'])} and {divergence_name(summary)} {diverged}; "
            f"{sparsity}."
        )
    return (
        f"With causal importances as masks {percent(ci['ce_recovered'])} of the cross-entropy is "
        f"recovered: CE {number(ci['ce'])}, target {number(target.get('ce'))}, all off "
        f"{number(zero.get('ce'))}; {sparsity}."
    )


def tables(summary: Mapping[str, Any]) -> list[str]:
    """Tables for the terminal: by kind of mask, and by group of sites where there are several."""
    rows, name = masks_rows(summary), divergence_name(summary)
    if not rows:
        return []
    with_ce, recovered = has_ce(summary), has_recovered(summary)
    header = ["masks", *(["CE"] if with_ce else []), *(["recovered"] if recovered else []), name]
    cells = [
        [
            row["masks"],
            *([number(row["ce"])] if with_ce else []),
            *([row["recovered"]] if recovered else []),
            number(row["divergence"]),
        ]
        for row in rows
    ]
    lines = text_table(header, cells)
    groups = group_rows(summary)
    if len(groups) > 1:
        header = ["group", "alive", "L0", *(["CE, it alone"] if with_ce else []), f"{name}, it alone"]
        cells = [
            [
                row["group"],
                number(row["alive"]),
                number(row["l0"]),
                *([number(row["ce"])] if with_ce else []),
                number(row["divergence"]),
            ]
            for row in groups
        ]
        lines += ["", *text_table(header, cells)]
    return lines


def topics(summary: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Facts for the terminal: on how much data, and what an adversary reaches."""
    thresholds, found = summary.get("thresholds") or {}, []
    if summary.get("ablations"):
        positions = f"{number(thresholds.get('positions'))} positions"
        found.append(("active", [f"g > {thresholds.get('ci', 0):g}", positions]))
    if pgd := summary.get("pgd"):
        name = divergence_name(summary)
        after = [f"{number(v)} after {steps} step{'' if steps == '1' else 's'}" for steps, v in pgd.items()]
        found.append(("adversary", [f"{name} {text}" for text in after]))
    return found


def cards(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Cards for the page: name, value, note."""
    found = summary.get("ablations") or {}
    ci, zero, target = (found.get(name) or {} for name in ("ci", "zero", "target"))
    kind = divergence(summary)
    if not ci or kind is None:
        return []
    first = (divergence_name(summary), number(ci.get(kind)), f"CI masks; all off {number(zero.get(kind))}")
    if "ce" not in ci:
        return [first]
    if "ce_recovered" not in ci:
        others = f"target {number(target.get('ce'))}, all off {number(zero.get('ce'))}"
        return [first, ("CE", number(ci["ce"]), f"CI masks; {others}")]
    unmasked = percent((found.get("unmasked") or {}).get("ce_recovered"))
    return [
        ("CE recovered", percent(ci["ce_recovered"]), f"CI masks; unmasked {unmasked}"),
        ("CE", number(ci["ce"]), f"CI masks; target {number(target.get('ce'))}"),
        first,
    ]


def percent(share: Any) -> str:
    """A share as people read it: 94.3 %, or – for anything else."""
    if isinstance(share, bool) or not isinstance(share, int | float):
        return NOTHING
    return f"{100 * share:.1f} %"


def _no_worse(summary: Mapping[str, Any]) -> str:
    """How all off compares with the target where no share of the difference can be told."""
    found = summary["ablations"]
    zero, target = (float((found.get(name) or {}).get("ce", math.nan)) for name in ("zero", "target"))
    return "hardly worse" if zero > target else "not worse"


def _meaning(name: str) -> str:
    if name.startswith("rounded_"):
        return f"masks 1 where g > {name.removeprefix('rounded_')}, else 0"
    return _MEANINGS.get(name, "")
