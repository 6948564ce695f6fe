"""How far the choice among initialisations has come, in the run directory: one state at a time.

    restarts/step_<n>/       as a checkpoint: whole or not there, checked to the last bit
      run_<r>_initialisation_<i>.safetensors    parameters and optimiser state, of those that are left
      state.json             everything that is not a tensor
      manifest.json

n counts the steps of all initialisations together. Of a run with replicas, r numbers these, and the state is
that of all of them: they compete in step.
"""

import dataclasses
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from torch import Tensor

from spd_hydra import distributed
from spd_hydra.checkpoint import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    read_state,
    remove_newer,
    save_checkpoint,
    steps_of,
)
from spd_hydra.finite import TrainingError
from spd_hydra.run_dir import RunDirectory
from spd_hydra.trainer import Trainer

logger = logging.getLogger(__name__)

WHAT = "the choice among initialisations"
_FOLDER = "restarts"
_MODEL, _OPTIMIZER = "model", "optimizer"

Rows = list[tuple[int, dict[str, float]]]


class Beginning(NamedTuple):
    """An initialisation after some steps.

    Its parameters and optimiser state, its rows of metrics, and what was measured then; nothing in the middle
    of a part.
    """

    step: int
    parameters: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    rows: Rows
    measured: dict[str, float]

    @property
    def loss(self) -> float:
        """Training loss, averaged over the evaluation's batches."""
        return self.measured["loss/total"]


@dataclasses.dataclass
class Standing:
    """Of the initialisations of one trainer: which are left, best first; what became of each, by number."""

    left: list[int]
    ends: list[Beginning | TrainingError | None]
    rounds: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @classmethod
    def at_start(cls, number: int) -> Self:
        """All of so many are left, and none has begun."""
        return cls(list(range(number)), [None] * number)


@dataclasses.dataclass(frozen=True)
class State:
    """A choice that was interrupted.

    Attributes:
        parts: how many parts of the plan are done.
        at: the step that the initialisations of the next one have come to.
        standings: by trainer.
        said: by trainer what a checkpoint says of it: `facts` and `times`.
    """

    parts: int
    at: int
    standings: list[Standing]
    said: list[dict[str, Any]]


def steps_taken(run_dir: Path) -> int | None:
    """Steps that all initialisations of a run have taken together; None: no choice is being made."""
    taken = steps_of(run_dir / _FOLDER)
    return taken[-1] if taken else None


def settings_of(trainer: Trainer) -> dict[str, Any]:
    """What initialisations must share to be compared, by key, as far as it may change while a run goes on."""
    training, evaluation = trainer.training, trainer.evaluation
    return {
        "train.steps": training.steps,
        "train.restarts.number": training.restarts.number,
        "train.restarts.fraction": training.restarts.fraction,
        "eval.batches": evaluation.batches,
        "eval.batch_size": evaluation.batch_size,
    }


def save(
    directory: RunDirectory,
    trainers: Sequence[Trainer],
    standings: Sequence[Standing],
    *,
    parts: int,
    at: int,
    taken: int,
) -> None:
    """Write the state of a choice in place of the one before; ranks join what they share out, rank 0 writes.

    Args:
        directory: of the run.
        trainers: that choose.
        standings: of each of them.
        parts: how many parts of the plan are done.
        at: the step that the initialisations of the next one have come to.
        taken: steps of all initialisations so far, by which the state is called.

    Raises:
        CheckpointError: it could not be written; the one before is as it was.
    """
    tensors: dict[str, dict[str, Tensor]] = {}
    for place, (trainer, standing) in enumerate(zip(trainers, standings, strict=True)):
        for number, end in enumerate(standing.ends):
            if isinstance(end, Beginning):
                optimizer = trainer.updates.whole_moments(end.optimizer, keep=not directory.follows)
                named = {_MODEL: end.parameters, _OPTIMIZER: optimizer}
                tensors[_file(place, number)] = {
                    f"{part}.{name}": value for part, own in named.items() for name, value in own.items()
                }
    if directory.follows:
        return
    state = {
        "settings": settings_of(trainers[0]),
        "parts": parts,
        "at": at,
        "runs": [
            {"facts": trainer.facts, "times": trainer.stopwatch.state()} | _plain(standing)
            for trainer, standing in zip(trainers, standings, strict=True)
        ],
    }
    folder, allowed = directory.path / _FOLDER, directory.require_ownership
    save_checkpoint(folder, taken, tensors, state, keep=1, require_ownership=allowed)


def load(directory: RunDirectory, settings: Mapping[str, Any]) -> State | None:
    """The choice that was interrupted, on every rank as rank 0 finds it; None: there is none to go on with.

    One that is damaged, or was begun with other settings, is left out with a warning.
    """
    folder = directory.path / _FOLDER
    if directory.follows:
        name = distributed.of_rank_0()
        found = None if name is None else load_checkpoint(folder / name)
    else:
        found = _usable(folder, settings)
        distributed.of_rank_0(None if found is None else found.path.name)
    return None if found is None else _read(found)


def remove(directory: RunDirectory) -> None:
    """Leave nothing of a choice that is made: a checkpoint goes on from here."""
    folder = directory.path / _FOLDER
    if directory.follows or not folder.is_dir():
        return
    directory.require_ownership()
    with directory.errors("remove", _FOLDER):
        remove_newer(folder, -1)
        shutil.rmtree(folder)


def exists(run_dir: Path) -> bool:
    """Whether a run directory has the state of a choice."""
    return bool(steps_of(run_dir / _FOLDER))


def said_in(run_dir: Path) -> list[dict[str, Any]]:
    """By trainer, what the state of a choice says beside its tensors; none where there is none to be read."""
    steps = steps_of(run_dir / _FOLDER)
    runs = read_state(run_dir / _FOLDER / f"step_{steps[-1]}").get("runs") if steps else None
    return runs if isinstance(runs, list) else []


def _usable(folder: Path, settings: Mapping[str, Any]) -> Checkpoint | None:
    found = _newest_whole(folder)
    if found is None:
        return None
    then = found.state["settings"]
    changed = [f"{key}: {then.get(key)} → {now}" for key, now in settings.items() if then.get(key) != now]
    if changed:
        logger.warning("%s begins anew: %s", WHAT, ", ".join(changed))
        return None
    return found


def _newest_whole(folder: Path) -> Checkpoint | None:
    steps = steps_of(folder)
    for step in reversed(steps):
        for path in (folder / f"step_{step}", folder / f"step_{step}.replaced"):
            if not path.is_dir():
                continue
            try:
                return load_checkpoint(path)
            except CheckpointError as error:
                logger.warning("of %s, %s; it is left out", WHAT, error)
    if steps:
        logger.warning("%s begins anew: none of its states is whole", WHAT)
    return None


def _file(place: int, number: int) -> str:
    return f"run_{place}_initialisation_{number}"


def _plain(standing: Standing) -> dict[str, Any]:
    return {
        "left": standing.left,
        "rounds": standing.rounds,
        "ends": [_plain_end(end) for end in standing.ends],
    }


def _plain_end(end: Beginning | TrainingError | None) -> dict[str, Any] | None:
    if isinstance(end, Beginning):
        rows = [[step, numbers] for step, numbers in end.rows]
        return {"step": end.step, "rows": rows, "measured": end.measured}
    return None if end is None else {"error": str(end)}


def _read(found: Checkpoint) -> State:
    runs: list[dict[str, Any]] = found.state["runs"]
    standings = [
        Standing(
            left=own["left"],
            ends=[_read_end(end, found.tensors, _file(place, n)) for n, end in enumerate(own["ends"])],
            rounds=own["rounds"],
        )
        for place, own in enumerate(runs)
    ]
    return State(found.state["parts"], found.state["at"], standings, runs)


def _read_end(
    end: dict[str, Any] | None, tensors: Mapping[str, dict[str, Tensor]], file: str
) -> Beginning | TrainingError | None:
    if end is None:
        return None
    if "error" in end:
        return TrainingError(end["error"])
    parts: dict[str, dict[str, Tensor]] = {_MODEL: {}, _OPTIMIZER: {}}
    for key, value in tensors[file].items():
        part, _, name = key.partition(".")
        parts[part][name] = value
    rows = [(step, numbers) for step, numbers in end["rows"]]
    return Beginning(end["step"], parts[_MODEL], parts[_OPTIMIZER], rows, end["measured"])
