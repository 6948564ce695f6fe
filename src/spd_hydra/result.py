"""What a run leaves behind at its end: summary, figures, report, verdict."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spd_hydra import report
from spd_hydra.build import Parts
from spd_hydra.decomposition.fitting import passed_over_notes
from spd_hydra.decomposition.sites import site_groups
from spd_hydra.distributed import say
from spd_hydra.figure.base import Drawn, History, draw_all, remove_figures
from spd_hydra.metric.diagnosis import diagnose
from spd_hydra.metric.evaluation import Evaluation
from spd_hydra.metric.finding import Finding, Settings
from spd_hydra.metric.symptoms import LAST_QUARTER
from spd_hydra.model.obtain import TrainedTarget
from spd_hydra.model.training import TrainableTarget
from spd_hydra.run_dir import RunDirectory
from spd_hydra.saved_run import target_facts
from spd_hydra.stop import Stopped
from spd_hydra.summary import summarise

log = logging.getLogger(__name__)

_LATE = [1 - LAST_QUARTER * share / 100 for share in range(101)]  # fractions of training


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run came to: its directory (None for a check) and its summary.

    `late_stop`: a signal asked for a stop when there was nothing left to stop.
    """

    run_dir: Path | None
    summary: dict[str, Any]
    late_stop: Stopped | None = None


def steps_per_second(times: Mapping[str, Any]) -> float | None:
    """The speed of training, from `Stopwatch.state`; None before a step was timed."""
    trained = times["seconds"]["train"]
    return times["timed_steps"] / trained if trained else None


def conclude(
    directory: RunDirectory,
    parts: Parts,
    target: TrainedTarget,
    evaluation: Evaluation,
    *,
    seconds: Mapping[str, float],
    steps_per_second: float | None,
    restarts: Mapping[str, Any] | None,
    replicas: int = 1,
    tell: bool = True,
) -> tuple[dict[str, Any], dict[str, Path]]:
    """Draw the figures, write summary and report, print the verdict if it is to be told.

    `replicas` is the number of runs that shared their steps, and so these seconds.

    Returns:
        The summary, and the files of the figures by name.
    """
    history = directory.read_metrics()
    summary = summarise(
        parts.config,
        evaluation,
        target_facts(target),
        diagnosis=_diagnosed(parts, target, evaluation, history),
        cosine_decides=parts.known is not None and parts.known.cosine_decides and evaluation.mmcs is not None,
        seconds=seconds,
        steps_per_second=steps_per_second,
        restarts=restarts,
        replicas=replicas,
        notes=[*passed_over_notes(parts.model.passed_over), *parts.eval_batches.notes()],
    )
    drawn: list[Drawn] = []
    if parts.config.eval.figures:
        drawn = draw_all(evaluation, history, directory.figures, directory.require_ownership)
    else:
        directory.require_ownership()
        remove_figures(directory.figures)  # of an earlier evaluation
    directory.write_summary(summary)
    directory.write_subcomponents(None if evaluation.text is None else dataclasses.asdict(evaluation.text))
    with directory.writing("report.html") as path:
        report.write_report(
            path,
            summary=summary,
            evaluation=evaluation,
            history=history,
            figures=drawn,
            config_text=directory.read_config(),
            environment=directory.read_environment(),
            warnings=() if target.certified else ("The target is not certified.",),
        )
    if tell:
        say(report.verdict_table(summary, path))
    return summary, {figure.name: figure.path for figure in drawn}


def _diagnosed(
    parts: Parts, target: TrainedTarget, evaluation: Evaluation, history: History
) -> list[Finding]:
    """What is wrong, if anything; advice is never a reason to lose a run."""
    try:
        return diagnose(evaluation, history, settings_of(parts, target))
    except Exception:
        log.warning("no diagnosis could be made; the run goes on without it", exc_info=True)
        return []


def settings_of(parts: Parts, target: TrainedTarget) -> Settings:
    """What the run was given, as far as a diagnosis refers to it."""
    config = parts.config
    is_smooth = config.loss.importance_minimality.coeff == 0 < config.loss.smooth_l0.coeff
    sparsity_term = "smooth_l0" if is_smooth else "importance_minimality"
    patterns, model = config.decomposition.sites, config.model
    groups = site_groups(parts.model.matrix_names, patterns)
    names = {site: name for name, sites in groups.items() for site in sites}
    return Settings(
        steps=config.train.steps,
        restarts=config.train.restarts.number,
        sparsity_term=sparsity_term,
        sparsity_coeff=config.loss.terms()[sparsity_term].coeff,
        adversary_coeff=config.loss.pgd_recon_subset.coeff,
        lr=config.train.lr,
        clip_ci_fn=config.train.clip_ci_fn,
        sites={site: (name, patterns[name].subcomponents) for site, name in names.items()},
        tied=config.decomposition.tied,
        certified=target.certified,
        measurements=target.measurements,
        max_tries=model.training.max_tries if isinstance(model, TrainableTarget) else None,
        short_target=(
            model.training.steps if config.target_steps and isinstance(model, TrainableTarget) else None
        ),
        anneals_late=any(
            any(term.scheduled(progress) != term.scheduled(1.0) for progress in _LATE)
            for term in config.loss.active_terms().values()
        ),
    )
