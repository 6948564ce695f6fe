"""What a run leaves behind at its end: summary, figures, report, verdict."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spd_hydra import report
from spd_hydra.build import Parts
from spd_hydra.distributed import say
from spd_hydra.figure.base import draw_all
from spd_hydra.metric.evaluation import Evaluation
from spd_hydra.model.obtain import TrainedTarget
from spd_hydra.run_dir import RunDirectory
from spd_hydra.saved_run import target_facts
from spd_hydra.summary import summarise


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run came to: its directory (None for a check) and its summary."""

    run_dir: Path | None
    summary: dict[str, Any]


def steps_per_second(times: Mapping[str, Any]) -> float | None:
    """The speed of training, from `Trainer.times`; None before a step was timed."""
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
) -> tuple[dict[str, Any], dict[str, Path]]:
    """Draw the figures, write summary and report, print the verdict.

    Of several replicas that shared their steps, and so these seconds, the verdict is not printed.

    Returns:
        The summary, and the files of the figures by name.
    """
    summary = summarise(
        parts.config,
        evaluation,
        target_facts(target),
        cosine_decides=parts.known is not None and parts.known.cosine_decides,
        seconds=seconds,
        steps_per_second=steps_per_second,
        restarts=restarts,
        replicas=replicas,
    )
    history = directory.read_metrics()
    drawn = draw_all(evaluation, history, directory.figures, directory.require_ownership)
    directory.write_summary(summary)
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
    if replicas == 1:
        say(report.verdict_table(summary, path))
    return summary, {figure.name: figure.path for figure in drawn}
