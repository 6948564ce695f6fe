"""Where and with what a run was made: enough to make it again."""

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from spd_hydra.redaction import redact, redact_command, redact_text

_LONGEST_DIFF = 500_000  # characters
_GIT_SECONDS = 10.0
_SLURM = {
    "SLURM_JOB_ID",
    "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID",
    "SLURM_JOB_PARTITION",
    "SLURM_NODELIST",
    "SLURM_NTASKS",
    "SLURM_RESTART_COUNT",
}


def describe_environment(device: str = "cpu") -> dict[str, Any]:
    """Versions, device, threads, git commit with uncommitted changes, and command line, without secrets.

    Args:
        device: what the run computes on, as torch names it.
    """
    here, package = Path.cwd(), Path(__file__).resolve().parent
    environment: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hydra": importlib.metadata.version("hydra-core"),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "command": shlex.join(redact_command(sys.argv)),
        "working_directory": str(here),
        "device": device,
        "device_name": _device_name(device),
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "slurm": {name: value for name, value in os.environ.items() if name in _SLURM},
        "packages": _packages(),
        "code": code_digest(),
        "git": describe_git(here),
    }
    if describe_git_root(package) != describe_git_root(here):
        environment["package_git"] = describe_git(package)
    return dict(redact(environment))


def code_digest() -> str:
    """Digest of this package's sources: equal as long as not a byte of them has changed."""
    package = Path(__file__).resolve().parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def command_line(words: list[str]) -> Iterator[None]:
    """Within the `with` block, the program was called with these words."""
    typed, sys.argv = sys.argv, words
    try:
        yield
    finally:
        sys.argv = typed


def describe_git(directory: Path) -> dict[str, Any] | None:
    """Commit, branch and uncommitted changes of the repository around a directory; None: there is none."""
    commit = _git(directory, "rev-parse", "HEAD")
    if commit is None:
        return None
    status = _git(directory, "status", "--porcelain", "--untracked-files=normal") or ""
    diff = _git(directory, "diff", "HEAD", "--no-color", "--no-ext-diff", "--no-textconv") or ""
    if len(diff) > _LONGEST_DIFF:
        diff = diff[:_LONGEST_DIFF] + f"\n… cut: {len(diff) - _LONGEST_DIFF} more characters\n"
    return {
        "commit": commit.strip(),
        "branch": (_git(directory, "rev-parse", "--abbrev-ref", "HEAD") or "").strip(),
        "dirty": bool(status.strip()),
        "status": status.splitlines()[:200],
        "diff": redact_text(diff),
    }


def describe_git_root(directory: Path) -> str | None:
    """Top folder of the repository that holds a directory; None: it is in no repository."""
    return _git(directory, "rev-parse", "--show-toplevel")


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(directory), *arguments],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=_GIT_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace")


def _packages() -> list[str]:
    found = {f"{item.name}=={item.version}" for item in importlib.metadata.distributions() if item.name}
    return sorted(found, key=str.lower)


def _device_name(device: str) -> str | None:
    if device.startswith("cuda") and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    return None


def _cpu_model() -> str:
    try:
        with Path("/proc/cpuinfo").open() as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
