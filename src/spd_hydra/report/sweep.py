"""A sweep's jobs as rows: read from their directories, also where some failed or never began."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spd_hydra.redaction import redact, redact_command
from spd_hydra.report.numbers import NOTHING, wilson_interval
from spd_hydra.report.quantities import ABLATED, QUANTITIES, spread
from spd_hydra.report.verdict import certificate, findings

WIDTH = 100


@dataclass(frozen=True, kw_only=True)
class SweepRow:
    """One job of a sweep.

    Attributes:
        state: `done`, `running`, `stopped` (saved, may go on), `failed`, or `missing` for a job that left no
            status; while a sweep is watched also `pending` and `requeued`.
        overrides: what the job was given, by key; the seed is among them where it was swept.
        numbers: totals over sites and single values of the summary; empty unless the job is done.
        report: the job's report, relative to the sweep's directory, or None.
        id: the scheduler's id of the job.
        step, steps, loss: how far it is, of how many steps, and the loss of the newest row of its metrics.
        choice_steps: while it chooses among initialisations, the steps that these have taken together.
        exit: how it ended according to the scheduler, where that is not well.
        waits_for: what the scheduler says that it waits for, where that is not its turn.
        traceback: of an error that nobody foresaw.
        finding: the likeliest reason why it is not solved, and what to change.
        replica: of a job that trains several, which one this is.
    """

    job: int
    state: str
    overrides: dict[str, str] = field(default_factory=dict)
    experiment: str | None = None
    seed: int | None = None
    solved: bool | None = None
    strict: bool | None = None
    certified: bool | None = None
    numbers: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    report: str | None = None
    id: str | None = None
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    choice_steps: int | None = None
    exit: str | None = None
    waits_for: str | None = None
    traceback: str | None = None
    finding: str | None = None
    replica: int | None = None

    @property
    def folder(self) -> str:
        """The run's directory below the sweep's, which also names the row: `3`, or `3/0` for a replica."""
        return str(self.job) if self.replica is None else f"{self.job}/{self.replica}"

    def value(self, name: str) -> Any:
        """A quantity of the summary, or whatever else is called so; None if there is none."""
        return self.numbers.get(name) if name in QUANTITIES else getattr(self, name)

    @property
    def objective(self) -> float:
        """What a sweeper optimises; NaN if the job is not done or has none."""
        return self.numbers.get("objective", math.nan) if self.state == "done" else math.nan

    @property
    def reason(self) -> str:
        """Why it did not end well: its own words, and the scheduler's in brackets."""
        error = self.error or "no reason given"
        return f"{error} ({self.exit})" if self.exit and self.exit not in error else error

    @property
    def setting(self) -> tuple[tuple[str, str], ...]:
        """Everything that was overridden but the seed: jobs with equal settings are repetitions."""
        found = {key: value for key, value in self.overrides.items() if key != "seed"}
        return tuple(sorted(found.items()))


@dataclass(frozen=True, kw_only=True)
class SweepGroup:
    """Jobs that differ only in their seeds.

    `judged` of them ended with a verdict, `solved` with success, `strict` also at the strict tolerance.
    """

    setting: tuple[tuple[str, str], ...]
    rows: list[SweepRow]
    judged: int
    solved: int
    strict: int
    spread: dict[str, str]  # mean ± standard deviation over the finished jobs, by quantity

    @property
    def fraction(self) -> str:
        """The solved fraction with its 95 % interval: `18 of 20, 90 % [70, 97]`."""
        return fraction(self.solved, self.judged) if self.judged else NOTHING

    @property
    def unfinished(self) -> str:
        """How many jobs did not end well, by state: `1 failed, 2 running`."""
        states = [row.state for row in self.rows if row.state != "done"]
        return ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))

    def has(self, quantity: str) -> bool:
        """Whether some job of it has the quantity."""
        return any(quantity in row.numbers for row in self.rows)

    def label(self, only: Sequence[str] | None = None) -> str:
        """The overrides, all or those whose keys are named."""
        shown = [f"{key}={value}" for key, value in self.setting if only is None or key in only]
        return " ".join(shown) or "all jobs"


def fraction(successes: int, trials: int) -> str:
    """Successes out of trials, per cent, and Wilson's 95 % interval: `18 of 20, 90 % [70, 97]`.

    Raises:
        ValueError: as `wilson_interval`.
    """
    low, high = wilson_interval(successes, trials)
    return f"{successes} of {trials}, {100 * successes / trials:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"


def sweep_rows(
    sweep_dir: Path,
    overrides: Mapping[int, Sequence[str]] | None = None,
    names_and_seeds: Mapping[int, tuple[str, int]] | None = None,
) -> list[SweepRow]:
    """Read what every job of a sweep has left so far, in the order of the jobs.

    Args:
        sweep_dir: holds a folder `<n>` per job, in it status.json, summary.json, overrides.json.
        overrides: of each job, where the caller knows them; jobs without a folder are listed too.
        names_and_seeds: experiment and seed of each job as planned, for those that left no summary.
    """
    given, planned = dict(overrides or {}), dict(names_and_seeds or {})
    found = {int(path.name) for path in sweep_dir.iterdir() if path.is_dir() and path.name.isdecimal()}
    jobs = sorted(found | given.keys())
    return [_row(sweep_dir, job, given.get(job), planned.get(job, (None, None))) for job in jobs]


def with_replicas(sweep_dir: Path, rows: Sequence[SweepRow]) -> list[SweepRow]:
    """The rows, with one for each replica in place of the job that trained them."""
    found: list[SweepRow] = []
    for row in rows:
        directory = sweep_dir / str(row.job)
        has_replicas = (directory / "0" / "config.yaml").is_file()
        found += [_replica(row, one) for one in sweep_rows(directory)] if has_replicas else [row]
    return found


def _replica(job: SweepRow, own: SweepRow) -> SweepRow:
    """The row of a replica; how the job ended counts for one that wrote no end of its own."""
    row = dataclasses.replace(
        own,
        job=job.job,
        replica=own.job,
        id=job.id,
        overrides={key: value for key, value in job.overrides.items() if key != "seed"},
        experiment=own.experiment or job.experiment,
        seed=job.seed + own.job if own.seed is None and job.seed is not None else own.seed,
        report=None if own.report is None else f"{job.job}/{own.report}",
    )
    if own.state in {"done", "failed"} or job.state == "done":
        return row
    return dataclasses.replace(
        row, state=job.state, error=job.error, exit=job.exit, traceback=job.traceback, steps=job.steps
    )


def sweep_groups(rows: Sequence[SweepRow]) -> list[SweepGroup]:
    """Repetitions together, in the order of their first job."""
    settings = dict.fromkeys(row.setting for row in rows)
    groups = []
    for setting in settings:
        own = [row for row in rows if row.setting == setting]
        judged = [row for row in own if row.state == "done" and row.solved is not None]
        values = {key: [row.numbers[key] for row in own if key in row.numbers] for key in QUANTITIES}
        groups.append(
            SweepGroup(
                setting=setting,
                rows=own,
                judged=len(judged),
                solved=sum(bool(row.solved) for row in judged),
                strict=sum(bool(row.strict) for row in judged),
                spread={key: spread(key, found) for key, found in values.items()},
            )
        )
    return groups


def varying_keys(rows: Sequence[SweepRow]) -> list[str]:
    """The override keys that tell the jobs apart, the seed excepted."""
    settings = [dict(row.setting) for row in rows]
    keys = dict.fromkeys(key for setting in settings for key in setting)
    return [key for key in keys if len({setting.get(key) for setting in settings}) > 1]


def is_shown(rows: Sequence[SweepRow], name: str) -> bool:
    """Whether a column is worth its place: some job has a value, or none is done, so that nobody can tell."""
    if any(row.value(name) is not None for row in rows):
        return True
    return name not in ABLATED and not any(row.state == "done" for row in rows)


def _row(
    sweep_dir: Path, job: int, given: Sequence[str] | None, planned: tuple[str | None, int | None]
) -> SweepRow:
    directory = sweep_dir / str(job)
    overrides = _overrides(given if given is not None else _read(directory / "overrides.json"))
    status, summary = _read(directory / "status.json"), _read(directory / "summary.json")
    (name, number), seed = planned, overrides.get("seed", "")
    row = SweepRow(
        job=job,
        state="missing",
        overrides=overrides,
        experiment=name if name is not None else overrides.get("experiment"),
        seed=int(seed) if seed.lstrip("-").isdecimal() else number,
        report=f"{job}/report.html" if (directory / "report.html").is_file() else None,
    )
    if not isinstance(status, Mapping):
        return row
    state = str(status.get("status"))
    if state != "done" or not isinstance(summary, Mapping):
        lost = "ended without a readable summary.json" if state == "done" else None
        return dataclasses.replace(
            row,
            state=state if state in {"running", "stopped"} else "failed",
            error=_first_line(status.get("error")) or lost,
            traceback=status.get("traceback"),
        )
    return dataclasses.replace(
        row,
        state="done",
        experiment=summary.get("experiment", row.experiment),
        seed=summary.get("seed", row.seed),
        solved=summary.get("solved"),
        strict=summary.get("strict"),
        certified=certificate(summary),
        finding=next(iter(findings(summary)), None),
        numbers=_numbers(summary),
    )


def _numbers(summary: Mapping[str, Any]) -> dict[str, float]:
    """Single numbers of a summary: of sites sums, errors by tolerance, what masks g keep, of plug-ins."""
    masked = (summary.get("ablations") or {}).get("ci") or {}
    found: dict[str, Any] = {
        "steps": summary.get("steps"),
        "mmcs": summary.get("mmcs"),
        "ml2r": summary.get("ml2r"),
        **{key: masked.get(key) for key in ABLATED},
        "loss": (summary.get("losses") or {}).get("total"),
        "seconds": (summary.get("seconds") or {}).get("total"),
        "steps_per_second": summary.get("steps_per_second"),
        "objective": summary.get("objective"),
    }
    for key in ("alive", "l0"):
        sites = {site: value for site, value in (summary.get(key) or {}).items() if site != "total"}
        found[key] = sum(sites.values()) if sites else None
        found |= {f"{key}.{site}": value for site, value in sites.items()}
    found |= {f"l0_ideal.{site}": value for site, value in (summary.get("l0_ideal") or {}).items()}
    found |= summary.get("extra") or {}
    for check in summary.get("checks") or []:
        name = f"error_{check['tolerance']:g}"
        found[name] = found.get(name, 0) + check["error"]
    return {key: value for key, value in found.items() if isinstance(value, int | float)}


def _overrides(given: Any) -> dict[str, str]:
    """Overrides by key and without secrets, from Hydra's `key=value` texts or from an object."""
    if isinstance(given, Mapping):
        return {str(key): str(value) for key, value in redact(given).items()}
    if not isinstance(given, list | tuple):
        return {}
    pairs = [text.lstrip("+").partition("=") for text in redact_command([str(text) for text in given])]
    return {key: value for key, _, value in pairs if key}


def _first_line(text: Any) -> str | None:
    return next((line.strip() for line in str(text or "").splitlines() if line.strip()), None)


def _read(path: Path) -> Any:
    """The JSON in a file, or None where there is none yet or it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
