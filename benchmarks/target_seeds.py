"""Train a target from several seeds and print what certification measures, with mean and spread.

    python benchmarks/target_seeds.py resid_mlp1 --seeds 10

The bounds in conf/model/*.yaml were set from its output; docs/targets.md records it.
"""

import argparse
import statistics
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir  # noqa: TID251 (one preset, no run)
from omegaconf import OmegaConf

from spd_hydra.data import sparse_features  # noqa: F401 (registers its schema)
from spd_hydra.data.base import DataSource
from spd_hydra.model import resid_mlp, tms  # noqa: F401 (register their schemas)
from spd_hydra.model.obtain import TrainedTarget, obtain_target
from spd_hydra.model.training import TrainableTarget

CONF = Path(__file__).resolve().parents[1] / "conf"


def preset(model: str) -> tuple[TrainableTarget, DataSource]:
    """The shipped target and its data."""
    data = "resid_mlp" if model.startswith("resid_mlp") else "tms"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = OmegaConf.to_object(compose(overrides=[f"+model={model}", f"+data={data}"]))
    return config["model"], config["data"]  # type: ignore[call-overload, index, return-value]


def main() -> None:
    """Parse the command line, train, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="a file of conf/model, without .yaml")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    spec, data = preset(arguments.model)
    found: list[TrainedTarget] = []
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        target = obtain_target(spec, data.bind(spec), seed=seed, device=arguments.device, cache_dir=None)
        found.append(target)
        numbers = "  ".join(
            f"{m.name} {m.value:.4g}{'' if m.passed else ' (!)'}" for m in target.measurements
        )
        verdict = "certified" if target.certified else "NOT certified"
        print(
            f"{arguments.model} seed {seed}: {verdict} at try {target.tries}, {target.seconds:.1f} s, "
            f"loss {target.loss:.4g}  {numbers}",
            flush=True,
        )
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.device}")
    rows = {"seconds": [t.seconds for t in found], "tries": [float(t.tries) for t in found]}
    rows["loss"] = [t.loss or 0.0 for t in found]
    for i, measurement in enumerate(found[0].measurements):
        rows[measurement.name] = [t.measurements[i].value for t in found]
    for name, values in rows.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(
            f"{name:16s} mean {statistics.mean(values):.4g}  std {spread:.2g}  "
            f"min {min(values):.4g}  max {max(values):.4g}"
        )


if __name__ == "__main__":
    main()
