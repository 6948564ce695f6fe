"""A directory whose files can be checked to the last bit against a list written with them."""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from spd_hydra import atomic

NAME = "manifest.json"
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_FORMAT = 1


class ManifestError(ValueError):
    """The manifest itself is missing, unreadable or changed."""


def write_file(path: Path, data: bytes) -> dict[str, Any]:
    """Write a new file, wait for the disk, and return its entry in the manifest."""
    atomic.write_new(path, data)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def write_manifest(directory: Path, step: int, entries: dict[str, dict[str, Any]]) -> None:
    """List the files of a directory, by name, in a manifest that carries a digest of itself."""
    atomic.write_new(directory / NAME, _sealed({"format": _FORMAT, "step": step, "files": entries}))


def read_manifest(directory: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """The step and the entries of a directory's manifest.

    Raises:
        ManifestError: it is not, byte for byte, as it was written.
    """
    try:
        data = (directory / NAME).read_bytes()
    except FileNotFoundError:
        raise ManifestError(f"{NAME} is missing") from None
    except OSError as error:
        raise ManifestError(f"{NAME} cannot be read: {error.strerror}") from error
    try:
        content = json.loads(data)
        # Comparing bytes covers also the digest and the white space: one changed bit anywhere is seen.
        as_written = data == _sealed({key: content[key] for key in ("format", "step", "files")})
        step, entries = int(content["step"]), dict(content["files"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ManifestError(f"{NAME} is empty, cut or changed") from None
    if not as_written:
        raise ManifestError(f"{NAME} has changed since it was written (its digest differs)")
    if content["format"] != _FORMAT:
        raise ManifestError(f"{NAME} is of format {content['format']}, this version reads format {_FORMAT}")
    if not all(FILE_NAME.fullmatch(name) for name in entries):
        raise ManifestError(f"{NAME} names files outside its directory")
    if not all(isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys() for entry in entries.values()):
        raise ManifestError(f"{NAME} lists files without their size and digest")
    return step, entries


def file_problem(path: Path, entry: dict[str, Any]) -> str | None:
    """What is wrong with one file, without holding it in memory; None: it is as it was written."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return _difference(path.name, entry, file.seek(0, os.SEEK_END), digest)
    except OSError as error:
        return _unreadable(path.name, error)


def read_file(path: Path, entry: dict[str, Any]) -> tuple[bytes, str | None]:
    """The bytes of one file and what is wrong with them: what is checked is what is used."""
    try:
        data = path.read_bytes()
    except OSError as error:
        return b"", _unreadable(path.name, error)
    return data, _difference(path.name, entry, len(data), hashlib.sha256(data).hexdigest())


def _difference(name: str, entry: dict[str, Any], size: int, digest: str) -> str | None:
    if size != entry["bytes"]:
        return f"{name} has {size} bytes instead of {entry['bytes']}"
    if digest != entry["sha256"]:
        return f"{name} has changed since it was written (its sha256 differs)"
    return None


def _unreadable(name: str, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{name} is missing"
    return f"{name} cannot be read: {error.strerror}"


def _sealed(content: dict[str, Any]) -> bytes:
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "digest": digest}, indent=1, sort_keys=True).encode()
