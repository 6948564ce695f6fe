"""Content of summary.json for evaluations made by hand."""

from typing import Any

from spd_hydra.metric.evaluation import Evaluation

ENVIRONMENT: dict[str, Any] = {
    "python": "3.11.7", "torch": "2.13.0", "platform": "Linux", "host": "node7", "device": "cpu",
    "command": "spd-run experiment=tms_5-2 seed=3", "device_name": None, "cpu": "a processor", "cpu_count": 2,
    "packages": ["jinja2==3.1.6", "torch==2.13.0"], "slurm": {},
    "git": {"commit": "0123456789abcdef", "branch": "main", "dirty": True, "status": [" M a.py"],
            "diff": "--- a/a.py\n+++ b/a.py\n-x = 1\n+x = 2\n"},
}  # fmt: skip

CONFIG = "name: tms_5-2\nseed: 3\ndecomposition:\n  sites:\n    embed: {C: 20}\n"


def summary_of(evaluation: Evaluation, experiment: str = "tms_5-2", seed: int = 3) -> dict[str, Any]:
    """A summary as a run would write it."""
    thresholds = {"mmcs": 0.99, "ml2r": 0.05, "tolerance": 0.2, "strict_tolerance": 0.1}
    metrics = evaluation.metrics
    return {
        "experiment": experiment,
        "seed": seed,
        "steps": evaluation.step,
        "solved": evaluation.solved,
        "strict": evaluation.strict,
        "checks": [dict(vars(check)) for check in evaluation.checks],
        "thresholds": thresholds if evaluation.checks else {},
        "mmcs": evaluation.mmcs,
        "ml2r": evaluation.ml2r,
        "alive": {name: int((site.density > 0).sum()) for name, site in evaluation.sites.items()},
        "l0": {name: float(site.density.sum()) for name, site in evaluation.sites.items()},
        "losses": {k.removeprefix("loss/"): v for k, v in metrics.items() if k.startswith("loss/")},
        "target": {
            "certified": True, "seed": 1003, "tries": 3,
            "measurements": [{"name": "column norm spread", "value": 0.012, "lower": 0.0, "upper": 0.05},
                             {"name": "smallest angle", "value": 71.4, "lower": 69.0, "upper": 75.0}],
        },
        "seconds": {"target": 3.21, "train": 18.4, "eval": 1.9, "total": 27.6},
        "steps_per_second": 543.2,
    }  # fmt: skip
