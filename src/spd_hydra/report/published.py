"""The toys of a sweep beside what is published of them: Bushnaq, Braun and Sharkey 2025, arXiv 2506.20790."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spd_hydra.report.numbers import NOTHING, clipped, ranges, text_table
from spd_hydra.report.setting_names import fitted, setting_text, short_names
from spd_hydra.report.sweep import WIDTH, SweepGroup, SweepRow, fraction, sweep_groups, varying_keys

SOURCE = "arXiv 2506.20790"
HEADER = ("experiment", "of", "seeds", "solved", "strict", "MMCS", "ML2R")
NOTE = (
    f"paper: {SOURCE}, Table 1; solved, which it does not have, is of the authors' own seeds.",
    "±: standard deviation, here over seeds. Where no line of the paper follows, nothing is published.",
)
CHANGED = ("*: with other settings than the experiment's own; the paper's line is of the paper's settings.",)
_SETTINGS_OF_THE_PAPER = "paper/"
_OTHER_TOY = ("debug", "model", "target_steps", "train.steps")  # what makes a comparison mean nothing
_NO_SETTING = (
    *("experiment", "suite", "seed", "name", "out_dir", "cache_dir", "device", "threads", "train.replicas"),
    *("logger", "launcher", "eval", "objective"),
)  # what changes no result
_WIDEST_SEEDS = 9


@dataclass(frozen=True, kw_only=True)
class Published:
    """What is published of one toy.

    Attributes:
        mmcs: as in Table 1.
        ml2r: value and deviation as in Table 1.
        solved: seeds of the authors with the known answer, and how many there were; not in the table.
    """

    mmcs: float
    ml2r: tuple[float, float]
    solved: tuple[int, int] | None = None

    @property
    def ml2r_text(self) -> str:
        """Value ± deviation as in the paper."""
        mean, spread = self.ml2r
        return f"{mean:.3f} ± {spread:.3f}"


PUBLISHED = {
    "tms_5-2": Published(mmcs=1.000, ml2r=(0.993, 0.002), solved=(77, 90)),
    "tms_5-2-id": Published(mmcs=1.000, ml2r=(0.992, 0.010)),
    "tms_40-10": Published(mmcs=1.000, ml2r=(1.010, 0.007), solved=(15, 19)),
    "tms_40-10-id": Published(mmcs=1.000, ml2r=(1.031, 0.001)),
}


def published_of(experiment: str | None) -> Published | None:
    """What is published of an experiment, with whichever settings it was run; None: nothing."""
    return PUBLISHED.get((experiment or "").removeprefix(_SETTINGS_OF_THE_PAPER))


def beside_the_paper(rows: Sequence[SweepRow], *, short: bool = False) -> list[list[str]]:
    """The cells under `HEADER`: a line for each experiment with a finished job, and below it the paper's.

    Jobs of one experiment that differ in more than their seed are lines of their own, with their keys, of
    which `short` leaves the endings that tell them apart. Empty if nothing is published of any finished job.
    """
    keys = _keys(rows)
    names = short_names(keys) if short else {key: key for key in keys}
    cells: list[list[str]] = []
    done = [row for row in rows if row.state == "done"]
    if not any(_comparable(row) for row in done):
        return []
    for group in sweep_groups(done):
        cells.append(_own(group, names))
        published = published_of(group.rows[0].experiment)
        if published is not None and _comparable(group.rows[0]):
            solved = NOTHING if published.solved is None else fraction(*published.solved)
            mmcs = f"{published.mmcs:.3f}"
            cells.append(["", "paper", NOTHING, solved, NOTHING, mmcs, published.ml2r_text])
    return cells


def _comparable(row: SweepRow) -> bool:
    """Whether something is published of the toy that a job decomposed, and the job was not cut short."""
    return published_of(row.experiment) is not None and not _touches(row, _OTHER_TOY)


def is_changed(row: SweepRow) -> bool:
    """Whether a job was given settings that its experiment does not have."""
    return any(
        not _is_among(key, _NO_SETTING) and (key, value) != ("debug", "none")
        for key, value in row.overrides.items()
    )


def _touches(row: SweepRow, keys: Sequence[str]) -> bool:
    return any(_is_among(key, keys) and value != "none" for key, value in row.overrides.items())


def _is_among(key: str, keys: Sequence[str]) -> bool:
    return any(key == one or key.startswith((f"{one}.", f"{one}/")) for one in keys)


def notes(rows: Sequence[SweepRow]) -> tuple[str, ...]:
    """What stands below the table."""
    return NOTE + (CHANGED if any(is_changed(row) for row in rows if row.state == "done") else ())


def published_table(rows: Sequence[SweepRow]) -> str:
    """The same for the terminal, with its sources; empty if nothing is published of any finished job."""
    cells = beside_the_paper(rows)
    if not cells:
        return ""
    others = sum(max(len(line[i]) for line in [HEADER, *cells]) + 2 for i in range(1, len(HEADER)))
    room = max(WIDTH - 2 - others, 8)
    named: list[str] = []
    keys = _keys(rows)
    if any(len(line[0]) > room for line in cells):
        cells = beside_the_paper(rows, short=True)
    if len(keys) == 1 and any(len(line[0]) > room for line in cells):
        cells = [[line[0].replace(f"{short_names(keys)[keys[0]]}=", ""), *line[1:]] for line in cells]
        named = [f"behind the experiment: {keys[0]}."]
    settings = fitted([line[0] for line in cells], room, keys=len(keys))
    cells = [[setting, *line[1:]] for setting, line in zip(settings, cells, strict=True)]
    return "\n".join(
        [*text_table(HEADER, cells, left=4), "", *(f"  {line}" for line in [*named, *notes(rows)]), ""]
    )


def _keys(rows: Sequence[SweepRow]) -> list[str]:
    return [key for key in varying_keys(rows) if key != "experiment"]


def _own(group: SweepGroup, names: Mapping[str, str]) -> list[str]:
    first = group.rows[0]
    setting = setting_text(group.setting, names)
    seeds = ranges([row.seed for row in group.rows if row.seed is not None])
    return [
        f"{first.experiment or NOTHING} {setting}".rstrip(),
        "here*" if is_changed(first) else "here",
        clipped(seeds, _WIDEST_SEEDS),
        group.fraction,
        str(group.strict) if group.judged else NOTHING,
        _mean_and_spread(group.rows, "mmcs"),
        _mean_and_spread(group.rows, "ml2r"),
    ]


def _mean_and_spread(rows: Sequence[SweepRow], key: str) -> str:
    """Mean ± sample standard deviation to three places, as the paper has them."""
    values = [row.numbers[key] for row in rows if key in row.numbers]
    if not values:
        return NOTHING
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.3f}"
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return f"{mean:.3f} ± {spread:.3f}"
