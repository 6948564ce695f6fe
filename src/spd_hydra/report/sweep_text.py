"""A sweep for the terminal: a line per job, then a line per setting."""

from collections.abc import Mapping, Sequence

from spd_hydra.report.numbers import NOTHING, text_table
from spd_hydra.report.quantities import ABLATED, QUANTITIES, written
from spd_hydra.report.setting_names import fitted, setting_text, short_names
from spd_hydra.report.sweep import WIDTH, SweepGroup, SweepRow, is_shown, sweep_groups, varying_keys

_QUANTITIES = [name for name in QUANTITIES if name != "steps_per_second"]  # for which there is no room
_HEADINGS = QUANTITIES | {"ce_recovered": "recovered"}
_IN_SUMMARY = ["mmcs", "ce_recovered", "kl", "mse"]


def sweep_table(rows: Sequence[SweepRow]) -> str:
    """The sweep for the terminal: a line per job, then a line per setting with the solved fraction.

    Columns in which no finished job has anything are left out; where nobody knows the right answer the line
    of a setting says what masked models keep. Keys stand whole where there is room, else by their endings.
    """
    if not rows:
        return "no jobs\n"
    keys = varying_keys(rows)
    told = [] if keys == ["experiment"] else keys  # the name alone says as much
    shown = [name for name in ["solved", "seed", *_QUANTITIES] if is_shown(rows, name)]
    only = told[0] if len(told) == 1 else None  # its key stands above the values
    header = ["job", "setting", "state", *(_HEADINGS.get(name, name) for name in shown)]
    cells = [[row.folder, "", row.state, *(_cell(row, name) for name in shown)] for row in rows]
    other = sum(max(len(line[i]) for line in [header, *cells]) + 2 for i in range(len(header)) if i != 1)
    groups = sweep_groups(rows)
    facts = ["; ".join(_facts(group)) for group in groups]
    of_row, of_group = max(WIDTH - 4 - other, 8), max(WIDTH - 4 - max(map(len, facts)), 20)
    names = {key: key for key in keys}
    if any(len(_setting(row, names, told)) > of_row for row in rows) or any(
        len(_label(group, names)) > of_group for group in groups
    ):
        names = short_names(keys)
    if only is None:
        settings = fitted([_setting(row, names, told) for row in rows], of_row, keys=len(told))
    else:
        settings = fitted([row.overrides.get(only, NOTHING) for row in rows], of_row, keys=1)
        header[1] = next((name for name in (only, names[only]) if len(name) <= of_row), header[1])
    cells = [[line[0], setting, *line[2:]] for line, setting in zip(cells, settings, strict=True)]
    lines = ["", *text_table(header, cells, left=3 + ("solved" in shown)), ""]
    labels = _labels(groups, names, of_group)
    lines += [f"  {label}: {text}" for label, text in zip(labels, facts, strict=True)]
    errors = [f"  job {row.folder}: {row.reason}" for row in rows if row.error]
    if errors:
        lines += ["", *errors]
    return "\n".join([*lines, ""])


def _setting(row: SweepRow, names: Mapping[str, str], told: Sequence[str]) -> str:
    given = setting_text(row.setting, {key: names[key] for key in told})
    return given or row.experiment or NOTHING


def _label(group: SweepGroup, names: Mapping[str, str]) -> str:
    return setting_text(group.setting, names) or ("all jobs" if names else group.label())


def _labels(groups: Sequence[SweepGroup], names: Mapping[str, str], room: int) -> list[str]:
    """A label for each setting; of a single key whole names, and only values are cut."""
    if len(names) != 1:
        return fitted([_label(group, names) for group in groups], room, keys=len(names))
    ((key, name),) = names.items()
    values = [dict(group.setting).get(key, NOTHING) for group in groups]
    cut = fitted(values, max(room - len(name) - 1, 8), keys=1)
    return [f"{name}={value}" for value in cut]


def _cell(row: SweepRow, name: str) -> str:
    if name == "solved":
        return NOTHING if row.solved is None else "yes" if row.solved else "no"
    if name == "seed":
        return NOTHING if row.seed is None else str(row.seed)
    return written(name, row.numbers.get(name))


def _facts(group: SweepGroup) -> list[str]:
    """What came of a setting; without a verdict the solved fraction is left out if there is anything else."""
    found = [f"{QUANTITIES[name]} {group.spread[name]}" for name in _IN_SUMMARY if group.has(name)]
    if group.judged or not any(group.has(name) for name in ABLATED):
        found.insert(0, f"solved {group.fraction}")
    return [*found, group.unfinished] if group.unfinished else found
