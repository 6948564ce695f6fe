"""Was the known answer found? In words, and as a table for the terminal."""

import os
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spd_hydra.report import ablations
from spd_hydra.report.numbers import NOTHING, clipped, counted_steps, duration, number, text_table
from spd_hydra.terminal import is_terminal

WIDTH = 100
_CERTIFIED: dict[Any, str] = {True: "certified", False: "NOT certified"}
GREEN, RED, RESET = "\033[1;32m", "\033[1;31m", "\033[0m"


def headline(summary: Mapping[str, Any]) -> str:
    """The verdict in one sentence: solved, not solved, or, where nobody knows the answer, what was kept."""
    solved = summary.get("solved")
    if solved is None:
        unknown = "No known answer: this target has none to compare with."
        return ablations.sentence(summary) or unknown
    if not solved:
        return "Not solved: the decomposition is not the known answer."
    if summary.get("strict"):
        return f"Solved: the known answer was found, also at the strict tolerance{_strictest(summary)}."
    return f"Solved: the known answer was found, but not at the strict tolerance{_strictest(summary)}."


def reasons(summary: Mapping[str, Any]) -> list[str]:
    """What stands between this run and a solved one, a sentence each; empty where nothing does.

    MMCS and ML2R count unless the summary's thresholds say `cosine_decides: false`.
    """
    if summary.get("solved") is None:
        return []
    found = []
    target, thresholds = summary.get("target") or {}, summary.get("thresholds") or {}
    if target.get("certified") is False:
        found.append("The target itself is not certified, so its decomposition proves nothing.")
    checks = summary.get("checks") or []
    loosest = thresholds.get("tolerance", max((check["tolerance"] for check in checks), default=None))
    for check in checks:
        if check["tolerance"] == loosest and check["error"] > 0:
            entries = "1 entry is" if check["error"] == 1 else f"{check['error']} entries are"
            answer = known_answer(check)
            found.append(f"{check['site']}: {entries} wrong at tolerance {loosest:g} ({answer}).")
    if thresholds.get("cosine_decides", True):
        mmcs, ml2r = summary.get("mmcs"), summary.get("ml2r")
        least, most = thresholds.get("mmcs"), thresholds.get("ml2r")
        if mmcs is not None and least is not None and not mmcs >= least:
            found.append(
                f"MMCS {number(mmcs)} is below {least:g}: some feature has no subcomponent of its direction."
            )
        if ml2r is not None and most is not None and not abs(ml2r - 1) <= most:
            found.append(
                f"ML2R {number(ml2r)} is further from 1 than {most:g}: subcomponents have the wrong size."
            )
    return found


def findings(summary: Mapping[str, Any]) -> list[str]:
    """What was found to be wrong and what to change, a line each, the likeliest cause first."""
    return [f"{one['symptom']}; {one['advice']}" for one in summary.get("diagnosis") or []]


def verdict_lines(summary: Mapping[str, Any]) -> list[str]:
    """The verdict in words: the headline, a line for each reason against it, a line for each finding."""
    return [headline(summary), *reasons(summary), *findings(summary)]


def known_answer(check: Mapping[str, Any]) -> str:
    """What is expected at a site: `identity of 5` or `dense of 2`."""
    return f"{check['name']} of {check['expected']}"


def tolerances(summary: Mapping[str, Any]) -> list[float]:
    """The tolerances of the checks, strictest first."""
    return sorted({check["tolerance"] for check in summary.get("checks") or []})


def has_known_answers(summary: Mapping[str, Any]) -> bool:
    """Whether a column for them is worth its place: of most models nobody knows any."""
    return bool(summary.get("checks"))


def certificate(summary: Mapping[str, Any]) -> bool | None:
    """Whether the target is certified; None where nothing was measured that could tell."""
    target = summary.get("target") or {}
    if not target.get("measurements") and not has_known_answers(summary):
        return None
    certified: bool | None = target.get("certified")
    return certified


def cosine_limits(summary: Mapping[str, Any]) -> tuple[str, str]:
    """What MMCS and ML2R must be: `≥ 0.99` and `1 ± 0.05`; nothing where the summary names no limits.

    Where they are no part of the verdict (residual MLPs) they have none: `reported only`.
    """
    thresholds = summary.get("thresholds") or {}
    if not thresholds.get("cosine_decides", True):
        return "reported only", "reported only"
    least, most = thresholds.get("mmcs"), thresholds.get("ml2r")
    return "" if least is None else f"≥ {least:g}", "" if most is None else f"1 ± {most:g}"


def thresholds_text(summary: Mapping[str, Any]) -> str:
    """What the verdict asks for, in words; empty where the summary names no limits."""
    thresholds = summary.get("thresholds") or {}
    parts = []
    if "tolerance" in thresholds:
        strict = thresholds.get("strict_tolerance")
        at = "" if strict is None else f", or {strict:g} where it is strict"
        parts.append(f"no error at tolerance {thresholds['tolerance']:g}{at}")
    least, size = cosine_limits(summary)
    if thresholds.get("cosine_decides", True):
        parts += [f"{name} {limit}" for name, limit in (("MMCS", least), ("ML2R", size)) if limit]
    elif summary.get("mmcs") is not None:
        parts.append("MMCS and ML2R are only reported")
    return "; ".join(parts)


def site_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per site: known answer, errors by tolerance, alive subcomponents, L0."""
    alive, l0 = summary.get("alive") or {}, summary.get("l0") or {}
    checks = summary.get("checks") or []
    names = dict.fromkeys([*(check["site"] for check in checks), *alive, *l0])
    rows = []
    for site in names:
        own = [check for check in checks if check["site"] == site]
        rows.append(
            {
                "site": site,
                "known": known_answer(own[0]) if own else NOTHING,
                "expected": own[0]["expected"] if own else None,
                "errors": {check["tolerance"]: check["error"] for check in own},
                "alive": alive.get(site),
                "l0": l0.get(site),
            }
        )
    return rows


def verdict_table(
    summary: Mapping[str, Any], report: Path | str | None = None, *, colour: bool | None = None
) -> str:
    """The verdict for the terminal, at most 100 columns wide but for the path of the report.

    Args:
        summary: the content of summary.json.
        report: path to print at the end.
        colour: whether to colour the verdict; by default only on a terminal without NO_COLOR.
    """
    if colour is None:
        colour = is_terminal(sys.stdout) and not os.environ.get("NO_COLOR")
    first = headline(summary)
    if colour and summary.get("solved") is not None:
        word, rest = first.split(":", 1)
        first = f"{GREEN if summary['solved'] else RED}{word}{RESET}:{rest}"
    name, seed, steps = summary.get("experiment", "run"), summary.get("seed", NOTHING), summary.get("steps")
    lines = ["", clipped(f"{name}, seed {seed}, {counted_steps(steps)}", WIDTH)]
    lines += [first] if colour else textwrap.wrap(first, WIDTH)
    for reason in reasons(summary):
        lines += textwrap.wrap(reason, WIDTH, initial_indent="  · ", subsequent_indent="    ")
    for finding in findings(summary):
        lines += textwrap.wrap(finding, WIDTH, initial_indent="  → ", subsequent_indent="    ")
    for table in (_site_table(summary), ablations.tables(summary)):
        lines += ["", *table] if table else []
    lines += ["", *_facts(summary)]
    if report is not None:
        lines += ["", f"  report  {report}"]
    return "\n".join([*lines, ""])


def _strictest(summary: Mapping[str, Any]) -> str:
    found = tolerances(summary)
    return f" {found[0]:g}" if found else ""


def _site_table(summary: Mapping[str, Any]) -> list[str]:
    columns, known = tolerances(summary), has_known_answers(summary)
    header = ["site", *(["known answer"] if known else []), *(f"error at {t:g}" for t in columns)]
    header += ["alive", "L0"]
    rows = [
        [
            row["site"],
            *([row["known"]] if known else []),
            *(number(row["errors"].get(t)) for t in columns),
            number(row["alive"]),
            number(row["l0"]),
        ]
        for row in site_rows(summary)
    ]
    if not rows:
        return []
    others = sum(max(len(line[i]) for line in [header, *rows]) + 2 for i in range(1, len(header)))
    rows = [[clipped(row[0], WIDTH - 2 - others), *row[1:]] for row in rows]
    return text_table(header, rows, left=2 if known else 1)


def _facts(summary: Mapping[str, Any]) -> list[str]:
    """Key numbers, one topic per line, wrapped."""
    target = summary.get("target") or {}
    seconds, losses = summary.get("seconds") or {}, summary.get("losses") or {}
    topics: list[tuple[str, list[str]]] = []
    if summary.get("mmcs") is not None:
        wanted, size = (f" ({limit})" if limit else "" for limit in cosine_limits(summary))
        topics.append(
            ("MMCS", [f"{number(summary['mmcs'])}{wanted}", f"ML2R {number(summary.get('ml2r'))}{size}"])
        )
    if contributions := summary.get("contributions"):
        topics.append(("neurons", [f"{layer}: {fit(one)}" for layer, one in contributions.items()]))
    if restarts := summary.get("restarts"):
        topics.append(("start", [f"initialisation {initialisation(restarts)}", *restart_losses(restarts)]))
    topics += ablations.topics(summary)
    if losses:
        topics.append(("losses", [f"{name} {number(value)}" for name, value in losses.items()]))
    if target:
        certified = _CERTIFIED.get(certificate(summary), "not checked")
        seed = [f"seed {target['seed']}"] if "seed" in target else []
        topics.append(("target", [certified, *seed]))
    if seconds:
        parts = [f"{name} {duration(value)}" for name, value in seconds.items()]
        speed = summary.get("steps_per_second")
        topics.append(("time", [*parts, *([f"{number(speed)} steps/s"] if speed is not None else [])]))
    label = max((len(name) for name, _ in topics), default=0)
    lines: list[str] = []
    for name, parts in topics:
        lines += _joined(parts, f"  {name.ljust(label)}  ", " " * (label + 4))
    return lines


def fit(contribution: Mapping[str, Any]) -> str:
    """How a layer's neuron contributions agree with the target's: `R² 0.9812, slope 0.9703`."""
    return f"R² {number(contribution['r2'])}, slope {number(contribution['slope'])}"


def restart_losses(restarts: Mapping[str, Any]) -> list[str]:
    """What the training losses of the initialisations were, round after round."""
    found = []
    for index, one in enumerate(restarts["rounds"]):
        losses = one["losses"]
        texts = [number(loss) for loss in losses if loss is not None]
        if index == 0:
            texts = ["not finite" if loss is None else number(loss) for loss in losses]
        found += [f"losses after {counted_steps(one['steps'])}: {texts[0]}", *texts[1:]]
    return found


def initialisation(restarts: Mapping[str, Any]) -> str:
    """Which initialisation went on: `4 of 16`."""
    return f"{restarts['chosen'] + 1} of {len(restarts['rounds'][0]['losses'])}"


def _joined(parts: list[str], first: str, following: str) -> list[str]:
    """The parts with commas, broken only between them so that a number never leaves its name."""
    lines, line = [], first
    for index, part in enumerate(parts):
        piece = part + ("," if index < len(parts) - 1 else "")
        if len(line) + len(piece) > WIDTH and line.strip() and line not in {first, following}:
            lines.append(line.rstrip())
            line = following
        line += piece + " "
    return [*lines, line.rstrip()]
