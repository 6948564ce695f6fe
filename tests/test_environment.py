"""The environment file tells how to make the run again, and no secrets."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spd_hydra.environment import describe_environment, describe_git


def git(directory: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=someone", "-c", "user.email=someone@example.org"]
    subprocess.run(["git", "-C", str(directory), *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q", "-b", "trunk")
    (tmp_path / "code.py").write_text("x = 1\n")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-q", "-m", "begin")
    return tmp_path


def test_versions_device_and_command_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["spd-run", "seed=3", "a.api_key=canary-4711", "x='a b'"])
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    found = describe_environment()
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["slurm"]["SLURM_JOB_ID"] == "17"
    assert found["command"] == """spd-run seed=3 'a.api_key=<redacted>' 'x='"'"'a b'"'"''"""
    assert f"hydra-core=={found['hydra']}" in found["packages"]
    assert found["cpu"]


def test_a_clean_repository_gives_its_commit(repository: Path) -> None:
    found = describe_git(repository)
    assert found is not None
    assert len(found["commit"]) == 40
    assert found["branch"] == "trunk"
    assert (found["dirty"], found["diff"], found["status"]) == (False, "", [])


def test_uncommitted_changes_are_kept_without_secrets(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_TOKEN", "canary-4711-canary")
    (repository / "code.py").write_text("x = 2  # canary-4711-canary\n")
    (repository / "new.py").write_text("")
    found = describe_git(repository)
    assert found is not None
    assert found["dirty"]
    assert "-x = 1\n+x = 2" in found["diff"]
    assert "canary" not in str(found)
    assert "?? new.py" in found["status"]


def test_a_huge_diff_is_cut_and_says_so(repository: Path) -> None:
    (repository / "code.py").write_text("y = 12345\n" * 100_000)
    found = describe_git(repository)
    assert found is not None
    assert len(found["diff"]) < 600_000
    assert "more characters" in found["diff"]


def test_outside_of_a_repository_there_is_no_git(tmp_path: Path) -> None:
    assert describe_git(tmp_path) is None


def test_without_git_installed_there_is_no_git(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert describe_git(repository) is None
