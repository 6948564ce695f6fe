"""What gets installed: the configuration files, the pins, and a wheel that works far from the sources."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {_normalised(name): version for name, version in (line.split("==") for line in lines)}


def _tracked(folder: Path) -> list[Path]:
    """The files of a folder as a clone has them: settings of one machine and caches left out."""
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if not {"__pycache__", "local"} & set(path.parts)]


def _covered(path: Path, patterns: list[str]) -> bool:
    """Whether setuptools' patterns cover the path; `**/` stands for any number of folders, also none."""
    return any(path.match(pattern.removeprefix("**/")) for pattern in patterns)


def test_every_dependency_is_pinned_to_one_version_inside_its_declared_range() -> None:
    project = PYPROJECT["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    requirements = [Requirement(line) for line in lines]
    declared = {_normalised(requirement.name): requirement.specifier for requirement in requirements}
    pins = _pins()
    assert declared.keys() - pins.keys() == set(), "add them to constraints.txt (make constraints)"
    outside = [f"{name}=={pins[name]}" for name, allowed in declared.items() if pins[name] not in allowed]
    assert outside == [], "these pins contradict the ranges in pyproject.toml"


def test_pins_hold_on_any_machine() -> None:
    assert _pins()["torch"] == "2.13.0"
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line), (
            f"{line!r}: a pin names a package and a public version, no path and no local build"
        )


def test_every_source_package_is_listed_for_the_wheel() -> None:
    found = {
        ".".join(init.relative_to(ROOT / "src").parent.parts) for init in (ROOT / "src").rglob("__init__.py")
    }
    assert set(SETUPTOOLS["packages"]) == found | {"spd_hydra.conf"}, "[tool.setuptools] packages"


def test_every_source_folder_with_modules_is_a_package() -> None:
    folders = {path.parent for path in (ROOT / "src" / "spd_hydra").rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_every_file_of_conf_is_covered_by_the_package_data() -> None:
    patterns = SETUPTOOLS["package-data"]["spd_hydra.conf"]
    files = [path for path in _tracked(ROOT / "conf") if path != Path("__init__.py")]
    assert files, "conf/ holds no configuration file"
    assert [str(path) for path in files if not _covered(path, patterns)] == []


def test_every_other_file_of_the_sources_is_covered_by_the_package_data() -> None:
    source = ROOT / "src" / "spd_hydra"
    uncovered = []
    for path in _tracked(source):
        package = ".".join(["spd_hydra", *path.parts[:1]]) if len(path.parts) > 1 else "spd_hydra"
        patterns = SETUPTOOLS["package-data"].get(package, [])
        if path.suffix != ".py" and not _covered(path, patterns):
            uncovered.append(str(path))
    assert uncovered == [], "[tool.setuptools.package-data] in pyproject.toml"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of what belongs to it so that nothing is left behind in the sources."""
    copy = tmp_path_factory.mktemp("sources")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("src", "conf"):
        shutil.copytree(
            ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "local")
        )
    built = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(built), str(copy)]
    result = subprocess.run(build, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The executables of a new environment that has the wheel and borrows its dependencies from ours."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False)
    scheme = {"base": str(home), "platbase": str(home)}
    packages = Path(sysconfig.get_path("purelib", "venv", scheme))
    # A .pth line, unlike PYTHONPATH, comes after the environment's own packages; what it adds is not
    # searched for .pth files in turn, so the editable install of ours stays out of sight.
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = home / "bin" / "python"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--no-deps",
        "--no-index",
        str(wheel),
    ]
    result = subprocess.run(pip, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return home / "bin"


def _run_elsewhere(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    hidden = ("PYTHON", "SPD_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    environment |= {"SPD_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_the_installed_wheel_holds_every_configuration_file(installed: Path, tmp_path: Path) -> None:
    program = (
        "import importlib.resources, spd_hydra\n"
        "conf = importlib.resources.files('spd_hydra.conf')\n"
        "print(conf)\n"
        "print(*sorted(str(p.relative_to(conf)) for p in conf.rglob('*.yaml')), sep='\\n')\n"
    )
    result = _run_elsewhere([str(installed / "python"), "-c", program], tmp_path)
    assert result.returncode == 0, result.stderr
    where, *names = result.stdout.split("\n")[:-1]
    assert Path(where).is_relative_to(installed.parent), "conf must come from the wheel, not from the sources"
    assert names == sorted(str(path) for path in _tracked(ROOT / "conf") if path.suffix == ".yaml")


@pytest.mark.slow
def test_the_installed_command_explains_itself_in_an_empty_directory(installed: Path, tmp_path: Path) -> None:
    result = _run_elsewhere([str(installed / "spd-run"), "--help"], tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "experiment=" in result.stdout
    assert list(tmp_path.iterdir()) == [], "asking for help writes nothing"


@pytest.mark.slow
def test_the_installed_command_runs_in_an_empty_directory(installed: Path, tmp_path: Path) -> None:
    result = _run_elsewhere([str(installed / "spd-run"), "debug=smoke"], tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert list(tmp_path.glob("outputs/**/summary.json")), "the run directory lies under where we are"
    for sources in (ROOT / "src", ROOT / "conf"):
        assert str(sources) not in result.stdout + result.stderr, "the run used the wheel alone"
