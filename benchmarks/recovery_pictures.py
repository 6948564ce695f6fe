"""Pictures of solved runs, copied beside the page of `recovery.py`."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

from benchmarks.recovery_runs import Run

FOLDER = Path("images/results")
SENTENCES = {
    "tms_polygon": "The target's columns, the sum of all subcomponents, and the largest of them one by one: "
    "in a solved run each carries one column.",
    "causal_importance": "The causal importance of each subcomponent when one feature is active: a diagonal "
    "where every feature has a subcomponent of its own, filled columns where all features share them.",
    "neuron_contributions": "What each neuron contributes to each feature's own output, in the target and in "
    "the strongest subcomponent: points on the dashed line agree.",
}
"""The figures that are shown, each with what to look for; a run has those that fit its target."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure of one run, and where it lies relative to the page."""

    experiment: str
    seed: int
    sentence: str
    path: Path

    @property
    def markdown(self) -> str:
        """The picture, with its sentence for those who cannot see it."""
        return f"![{self.experiment}, seed {self.seed}: {self.sentence}]({self.path.as_posix()})"


def copy_pictures(runs: Sequence[Run], out: Path, beside: Path) -> list[Picture]:
    """Copy figures of the lowest solved seed of every experiment into a folder beside a page.

    Args:
        runs: from `read_runs`.
        out: where they lie.
        beside: the folder of the page.
    """
    pictures: list[Picture] = []
    for name in dict.fromkeys(run.experiment for run in runs):
        solved = [run.seed for run in runs if run.experiment == name and run.row.solved]
        if not solved:
            continue
        seed = min(solved)
        for figure, sentence in SENTENCES.items():
            source = out / name / str(seed) / "figures" / f"{figure}.png"
            if not source.is_file():
                continue
            path = FOLDER / f"{name.replace('/', '-')}_{figure}.png"
            (beside / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, beside / path)
            pictures.append(Picture(name, seed, sentence, path))
    return pictures
