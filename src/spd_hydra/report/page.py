"""The report of a run: one HTML file that needs nothing else."""

import base64
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spd_hydra import atomic
from spd_hydra.figure.base import Drawn, History
from spd_hydra.metric.evaluation import Evaluation
from spd_hydra.model.base import interval
from spd_hydra.report import ablations
from spd_hydra.report.contexts import text_section
from spd_hydra.report.html import render
from spd_hydra.report.numbers import NOTHING, counted_steps, duration, number
from spd_hydra.report.verdict import (
    certificate,
    cosine_limits,
    findings,
    fit,
    has_known_answers,
    headline,
    initialisation,
    reasons,
    restart_losses,
    site_rows,
    thresholds_text,
    tolerances,
)

_STATE: dict[Any, str] = {True: "solved", False: "unsolved"}
CSS_PIXELS = 96 / 160  # figures have 160 dots per inch, a page has 96
_COSTS_BY_MASK = {"ce", "kl", "mse", "ce_subset", "kl_subset", "mse_subset", "pgd"}
_FIXED_MASKS = {"target", "random", "zero"}  # no aim of training
LONGEST_BLOCK = 60_000  # characters of a diff or a list
IN_HEADER = ("command", "device", "device_name", "cpu", "python", "torch", "platform", "host")


def write_report(
    path: Path,
    *,
    summary: Mapping[str, Any],
    evaluation: Evaluation,
    history: History,
    figures: Sequence[Drawn],
    config_text: str,
    environment: Mapping[str, Any],
    warnings: Sequence[str] = (),
) -> None:
    """Write the report of a run as one self-contained HTML file, replacing an older one in one step.

    Args:
        path: the file, usually `<run>/report.html`.
        summary: the content of summary.json.
        evaluation: the last evaluation.
        history: rows of metrics.jsonl.
        figures: what `draw_all` returned; the pictures go into the file.
        config_text: the resolved configuration as YAML.
        environment: the content of environment.json.
        warnings: sentences that the reader must see.

    Raises:
        OSError: the file cannot be written; an older report is then still there.
    """
    pictures, missing = embedded(figures)
    facts, blocks = _environment(environment)
    page = render(
        "report_template.html",
        title=f"{summary.get('experiment', 'run')}, seed {summary.get('seed', NOTHING)}",
        state=_STATE.get(summary.get("solved"), "unknown"),
        headline=headline(summary),
        reasons=reasons(summary),
        findings=findings(summary),
        tolerances=tolerances(summary),
        sites=site_rows(summary),
        known_answers=has_known_answers(summary),
        masks=ablations.masks_rows(summary),
        groups=ablations.group_rows(summary),
        with_ce=ablations.has_ce(summary),
        recovered=ablations.has_recovered(summary),
        divergence=ablations.divergence_name(summary),
        pgd=summary.get("pgd") or {},
        text=None if evaluation.text is None else text_section(evaluation.text),
        key_numbers=_key_numbers(summary, evaluation),
        target=_target(summary.get("target") or {}, certificate(summary)),
        losses=summary.get("losses") or {},
        thresholds=thresholds_text(summary),
        evaluation=evaluation,
        pictures=pictures,
        metrics=metric_rows(history),
        config_text=config_text,
        facts=facts,
        blocks=blocks,
        warnings=[*warnings, *summary.get("notes", ()), *missing],
    )
    atomic.replace(path, page)


def metric_rows(history: History) -> list[dict[str, Any]]:
    """Every logged quantity with its last value and, where better has a meaning, its best value and step."""
    points: dict[tuple[str, str], dict[int, float]] = {}
    for row in history:
        for name, value in row.items():
            if name not in {"step", "split"} and isinstance(value, int | float):
                points.setdefault((name, str(row.get("split", ""))), {})[int(row.get("step", 0))] = float(
                    value
                )
    rows = []
    for (name, split), values in sorted(points.items()):
        last = max(values)
        cost = _cost(name)
        best = None if cost is None else min(values, key=lambda step: (cost(values[step]), step))
        rows.append(
            {
                "name": name,
                "split": split,
                "last": number(values[last]),
                "best": NOTHING if best is None else number(values[best]),
                "best_step": NOTHING if best is None else number(best),
            }
        )
    return rows


def _cost(name: str) -> Any:
    """What to minimise to find the best value of a quantity; None where neither way is better."""
    group, _, last = name.rpartition("/")
    if group in _COSTS_BY_MASK:
        return (lambda value: value) if last not in _FIXED_MASKS else None
    if last.startswith("ml2r") or "/neuron_" in name:
        return lambda value: abs(value - 1)
    if last.startswith("mmcs") or "recovered" in name:
        return lambda value: -value
    if name.startswith("loss/") or "error" in last or last.startswith(("kl", "ce")):
        return lambda value: value
    return None


def _key_numbers(summary: Mapping[str, Any], evaluation: Evaluation) -> list[dict[str, str]]:
    """The cards under the verdict: name, value, and what it should be."""
    (least, size), seconds = cosine_limits(summary), summary.get("seconds") or {}
    alive = [n for site, n in (summary.get("alive") or {}).items() if site != "total"]
    l0 = {site: x for site, x in (summary.get("l0") or {}).items() if site != "total"}
    expected = [row["expected"] for row in site_rows(summary) if row["expected"] is not None]
    ideal = [v for k, v in evaluation.metrics.items() if k.startswith("l0_ideal/") and k != "l0_ideal/total"]
    plain = f"; plain {number(evaluation.ml2r_plain)}" if evaluation.ml2r_plain is not None else ""
    cards = [
        *ablations.cards(summary),
        ("MMCS", number(summary.get("mmcs")), least.replace("≥", "at least")),
        ("ML2R", number(summary.get("ml2r")), (size or "ideally 1") + plain),
        (
            "Alive",
            number(sum(alive)) if alive else NOTHING,
            f"{sum(expected)} expected" if expected else "all sites",
        ),
        (
            "L0",
            number(float(sum(l0.values()))) if l0 else NOTHING,
            f"ideally {number(float(sum(ideal)))}"
            if len(ideal) == len(l0) and ideal
            else "per position, all sites",
        ),
        (
            "Total loss",
            number((summary.get("losses") or {}).get("total")),
            f"after {counted_steps(summary.get('steps'))}",
        ),
        *((f"Neurons, {layer}", *_fit(one)) for layer, one in (summary.get("contributions") or {}).items()),
        ("Start", *_start(summary.get("restarts"))),
        ("Time", duration(seconds.get("total")), _parts(seconds)),
        ("Speed", number(summary.get("steps_per_second")), "steps per second"),
    ]
    return [{"name": name, "value": value, "note": note} for name, value, note in cards if value != NOTHING]


def _fit(contribution: Mapping[str, Any]) -> tuple[str, str]:
    value, _, slope = fit(contribution).partition(", ")
    return value, f"to y = x, target against subcomponents; {slope}"


def _start(restarts: Mapping[str, Any] | None) -> tuple[str, str]:
    if not restarts:
        return NOTHING, ""
    return initialisation(restarts), f"initialisations; {', '.join(restart_losses(restarts))}"


def _parts(seconds: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {duration(value)}" for name, value in seconds.items() if name != "total")


def _target(target: Mapping[str, Any], certified: bool | None) -> dict[str, Any]:
    """The certificate: whether it holds, its plain facts, and its measurements where there are some."""
    measured = [dict(m) for m in target.get("measurements") or [] if isinstance(m, Mapping)]
    for measurement in measured:
        value, lower, upper = (measurement.get(key) for key in ("value", "lower", "upper"))
        inside = None not in (value, lower, upper) and lower <= value <= upper  # type: ignore[operator]
        measurement["passed"] = bool(measurement.get("passed", inside))
        measurement["allowed"] = interval(lower, upper) or NOTHING
    facts = {k: v for k, v in target.items() if k not in {"certified", "measurements"}}
    return {
        "certified": certified,
        "facts": {
            k: number(v) if isinstance(v, float) else _as_text(v)
            for k, v in facts.items()
            if not isinstance(v, dict | list)
        },
        "measurements": measured,
    }


def embedded(figures: Sequence[Drawn]) -> tuple[list[dict[str, Any]], list[str]]:
    """Figures as data, their text as large as the page's, and warnings about missing ones."""
    pictures: list[dict[str, Any]] = []
    missing = []
    for figure in figures:
        try:
            png = figure.path.read_bytes()
            width, height = struct.unpack(">II", png[16:24])
        except (OSError, struct.error):
            missing.append(f"The figure {figure.name} could not be read from {figure.path}.")
            continue
        pictures.append(
            {
                "name": figure.name,
                "caption": figure.caption,
                "data": base64.b64encode(png).decode("ascii"),
                "width": round(width * CSS_PIXELS),
                "height": round(height * CSS_PIXELS),
            }
        )
    return pictures, missing


def _environment(environment: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """Short facts, the most asked for first, and long texts (packages, diff) to unfold."""
    facts: dict[str, str] = {}
    blocks: dict[str, str] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                add(f"{name} {key}".strip(), inner)
        elif isinstance(value, list | tuple) or (
            isinstance(value, str) and ("\n" in value or len(value) > 400)
        ):
            text = value if isinstance(value, str) else "\n".join(_as_text(item) for item in value)
            cut = f"\n… {len(text) - LONGEST_BLOCK:,} more characters" if len(text) > LONGEST_BLOCK else ""
            if text.strip() and name == "command":
                facts[name] = text
            elif text.strip():
                blocks[name] = text[:LONGEST_BLOCK] + cut
        elif value is not None and value != "":
            facts[name] = _as_text(value)

    first = [key for key in IN_HEADER if key in environment]
    for key in [*first, *(key for key in environment if key not in IN_HEADER)]:
        add(str(key), environment[key])
    return facts, blocks


def _as_text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else json.dumps(value, default=str)
