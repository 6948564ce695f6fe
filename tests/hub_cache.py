"""The cache of Hugging Face as a download leaves it, made by hand: there is no network in tests."""

import shutil
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached_model(cache: Path, name: str, files: Path, *, commit: str = COMMIT) -> Path:
    """Put a directory into the cache as a model of the hub, and let main be at its commit."""
    repo = cache / f"models--{name.replace('/', '--')}"
    snapshot = repo / "snapshots" / commit
    shutil.copytree(files, snapshot)
    (repo / "refs").mkdir(exist_ok=True)
    (repo / "refs" / "main").write_text(commit)
    return snapshot
