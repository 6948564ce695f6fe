"""Storage of a training state: written whole or not at all, checked to the last bit when read.

    checkpoints/step_<n>/
      <name>.safetensors   tensors, one file per group (model, optimizer, …)
      state.json           everything that is not a tensor
      manifest.json        size and sha256 of the files above, and a digest of itself

Nothing is pickled. A checkpoint gets its name by one rename, after all its bytes are on the disk.
"""

import contextlib
import json
import logging
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
from torch import Tensor

from spd_hydra import atomic, manifest

logger = logging.getLogger(__name__)

Found = TypeVar("Found")

_STATE, _TENSORS = "state.json", ".safetensors"
# When a step is saved again, the checkpoint of before is called `.replaced` until the new one has its name.
_NAME = re.compile(r"step_(0|[1-9]\d*)(\.replaced)?")
_TEMPORARY = re.compile(r"\.tmp_(?P<host>.+)_(?P<pid>\d{1,7})_[0-9a-f]{8}")
_FOREIGN_TEMPORARY_SECONDS = 24 * 3600.0  # of another machine, whose processes cannot be asked


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none of those present can be trusted."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A verified training state, its tensors on the CPU."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save_checkpoint(
    directory: Path,
    step: int,
    tensors: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
    keep: int,
    require_ownership: Callable[[], None] = lambda: None,
) -> Path:
    """Write `directory/step_<step>`, then remove the oldest checkpoints beyond `keep` verified ones.

    Args:
        directory: where the checkpoints of one run live; made if missing, in a directory that exists.
        step: number of training steps that the state has seen, ≥ 0.
        tensors: per file, its tensors by name; dense, any device.
        state: numbers, strings, booleans, None, and lists and string-keyed dictionaries of them.
        keep: number of verified checkpoints to keep, this one included, ≥ 1.
        require_ownership: called before the checkpoint gets its name; what it raises leaves all as it was.

    Raises:
        CheckpointError: the checkpoint could not be written; those before it are as they were.
        TypeError: `state` holds something that JSON would not give back as it was.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"step must be ≥ 0 and keep ≥ 1, got {step} and {keep}")
    for name in tensors:
        if not manifest.FILE_NAME.fullmatch(name):
            raise ValueError(f"{name!r} cannot be the name of a file of tensors")
    encoded_state = _encode_state(state)
    final = directory / f"step_{step}"
    temporary = directory / f".tmp_{socket.gethostname()}_{os.getpid()}_{secrets.token_hex(4)}"
    try:
        if not directory.is_dir():
            directory.mkdir()  # not its parents: a run directory that was removed stays removed
            atomic.sync_directory(directory.parent)
        _remove_temporaries_of_dead_writers(directory)
        temporary.mkdir()
        entries = {_STATE: manifest.write_file(temporary / _STATE, encoded_state)}
        for name, group in tensors.items():  # one after the other: only one lies in memory a second time
            file = name + _TENSORS
            entries[file] = manifest.write_file(temporary / file, safetensors.torch.save(_storable(group)))
        manifest.write_manifest(temporary, step, entries)
        atomic.sync_directory(temporary)
        require_ownership()
        _step_aside(final)
        temporary.rename(final)
        atomic.sync_directory(directory)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise CheckpointError(_cannot_write(final, error)) from error
        raise
    _apply_retention(directory, final, keep)
    return final


def load_newest(directory: Path, warn: Callable[[str], None] = logger.warning) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None where none was ever written.

    Args:
        directory: as given to `save_checkpoint`; need not exist.
        warn: called with one message per damaged checkpoint that is passed over.

    Raises:
        CheckpointError: there are checkpoints and every one is damaged. Nothing is changed on the disk.
    """
    return _newest(directory, load_checkpoint, warn)


def require_whole(directory: Path) -> Path | None:
    """The checkpoint that `load_newest` would load; None: none was ever written.

    Raises:
        CheckpointError: there are checkpoints and every one is damaged.
    """
    return _newest(directory, _verified, lambda damage: None)  # `load_newest` will tell


def _newest(directory: Path, read: Callable[[Path], Found], warn: Callable[[str], None]) -> Found | None:
    """What `read` makes of the newest checkpoint that it does not refuse; None: there are no checkpoints."""
    damages: list[str] = []
    for path in _candidates(directory):
        try:
            found = read(path)
        except CheckpointError as error:
            damages.append(str(error))
            continue
        for damage in damages:
            warn(f"{damage}. Going on from {path.name} instead.")
        return found
    if damages:
        raise _none_whole(directory, damages)
    return None


def _verified(path: Path) -> Path:
    if problems := verify(path):
        raise CheckpointError(_damaged(path, problems))
    return path


def read_state(path: Path) -> dict[str, Any]:
    """What a checkpoint says beside its tensors; empty where it cannot be read, which `load_newest` tells."""
    try:
        state = json.loads((path / _STATE).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return state if isinstance(state, dict) else {}


def steps_of(directory: Path) -> list[int]:
    """Steps of which there is a checkpoint, whole or damaged, ascending."""
    return sorted({step_of(path) for path in _candidates(directory)})


def remove_newer(directory: Path, step: int) -> None:
    """Remove the checkpoints of later steps than this."""
    for path in _candidates(directory):
        if step_of(path) > step:
            _remove(path)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint and check every byte of it.

    Raises:
        CheckpointError: it is damaged; the message names each file and what is wrong with it.
    """
    tensors, state = {}, None
    problems: list[str] = []
    try:
        for name, entry in _entries(path).items():
            data, problem = manifest.read_file(path / name, entry)
            if problem:
                problems.append(problem)
            elif name.endswith(_TENSORS):
                # safetensors gives them in an order that differs from process to process.
                tensors[name.removesuffix(_TENSORS)] = dict(sorted(safetensors.torch.load(data).items()))
            elif name == _STATE:
                state = json.loads(data)
    except (manifest.ManifestError, safetensors.SafetensorError, ValueError, RecursionError) as error:
        problems.append(str(error))
    if not problems and not isinstance(state, dict):
        problems.append(f"it has no {_STATE}")
    if problems or state is None:
        raise CheckpointError(_damaged(path, problems))
    return Checkpoint(path=path, step=step_of(path), tensors=tensors, state=state)


def verify(path: Path) -> list[str]:
    """What is wrong with a checkpoint, an entry per file; empty: every byte is as it was written."""
    try:
        entries = _entries(path)
    except manifest.ManifestError as error:
        return [str(error)]
    found = [manifest.file_problem(path / name, entry) for name, entry in entries.items()]
    return [problem for problem in found if problem]


def _entries(path: Path) -> dict[str, dict[str, Any]]:
    step, entries = manifest.read_manifest(path)
    if not _NAME.fullmatch(path.name) or step != step_of(path):
        raise manifest.ManifestError(
            f"{manifest.NAME} is of step {step}, but the directory is called {path.name}"
        )
    return entries


def _storable(group: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU; a tensor that shares memory with one before it gets its own."""
    stored: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in group.items():
        plain = tensor.detach().cpu().contiguous()
        if plain.untyped_storage().data_ptr() in storages:
            plain = plain.clone()
        storages.add(plain.untyped_storage().data_ptr())
        stored[name] = plain
    return stored


def _encode_state(state: dict[str, Any]) -> bytes:
    _require_plain(state, "state")
    return json.dumps(state, indent=1).encode()


def _require_plain(value: Any, key: str) -> None:
    if isinstance(value, dict):
        for name, item in value.items():
            if not isinstance(name, str):
                raise TypeError(f"{key}: the key {name!r} must be a string to be stored")
            _require_plain(item, f"{key}.{name}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _require_plain(item, f"{key}[{index}]")
    elif value is not None and type(value) not in (bool, int, float, str):
        raise TypeError(f"{key}: {type(value).__name__} cannot be stored; use numbers, strings, lists, dicts")


def step_of(path: Path) -> int:
    """The step whose checkpoint lies there."""
    return int(path.name.removeprefix("step_").removesuffix(".replaced"))


def _candidates(directory: Path) -> list[Path]:
    """Checkpoints, newest first; of the same step the one that was not replaced first."""
    try:
        found = [path for path in directory.iterdir() if _NAME.fullmatch(path.name)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"cannot read {directory}: {error.strerror}") from error
    return sorted(found, key=lambda path: (-step_of(path), len(path.name)))


def _step_aside(final: Path) -> None:
    """Free the name of a checkpoint that is being saved again, without a moment in which none is whole."""
    if not final.exists():
        return
    aside = final.with_name(final.name + ".replaced")
    if aside.exists() and verify(final):
        _remove(final)
        return
    if aside.exists():
        _remove(aside)
    final.rename(aside)


def _apply_retention(directory: Path, written: Path, keep: int) -> None:
    """Remove what is older than the newest `keep` verified checkpoints; only warns where it cannot."""
    verified: set[int] = set()
    try:
        for path in _candidates(directory):
            step = step_of(path)
            if path == written or (step not in verified and len(verified) < keep and not verify(path)):
                verified.add(step)
            elif step in verified or len(verified) >= keep:
                _remove(path)
    except (OSError, CheckpointError) as error:
        logger.warning("Could not remove old checkpoints in %s: %s", directory, error)


def _remove(path: Path) -> None:
    """Take a checkpoint's name away first, so that a half removed one is never taken for a damaged one."""
    doomed = path.with_name(f".tmp_{socket.gethostname()}_{os.getpid()}_{secrets.token_hex(4)}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def _remove_temporaries_of_dead_writers(directory: Path) -> None:
    for path in directory.iterdir():
        match = _TEMPORARY.fullmatch(path.name)
        if match and _is_dead(match["host"], int(match["pid"]), path):
            shutil.rmtree(path, ignore_errors=True)


def _is_dead(host: str, pid: int, path: Path) -> bool:
    if host != socket.gethostname():
        with contextlib.suppress(OSError):
            return time.time() - path.stat().st_mtime > _FOREIGN_TEMPORARY_SECONDS
        return False
    if pid == os.getpid():
        return True  # left by a save of this process, which has ended
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _damaged(path: Path, problems: list[str]) -> str:
    return f"checkpoint {path} is damaged: {'; '.join(problems)}"


def _none_whole(directory: Path, damages: list[str]) -> CheckpointError:
    listing = "\n  ".join(damages)
    return CheckpointError(
        f"{directory} has {len(damages)} checkpoints and none is whole, so nothing was loaded and "
        f"nothing was changed:\n  {listing}\nRestore one from a backup, or start a new run."
    )


def _cannot_write(final: Path, error: OSError) -> str:
    whole = next((path for path in _candidates(final.parent) if not verify(path)), None)
    previous = f"{whole.name}, written before, is whole" if whole else "there is none from before"
    return (
        f"cannot write checkpoint {final}: {error.strerror or error}; {previous}. "
        "Make room or choose another out_dir, then resume."
    )
