"""What README.md, CONTRIBUTING.md and the guides show works: their commands, Python, files and links."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.utils import get_args_parser

from spd_hydra.composer import Composer
from spd_hydra.composition import compose
from spd_hydra.plan import make_plan
from spd_hydra.preflight import preflight
from spd_hydra.run import run

ROOT = Path(__file__).parents[1]
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
PYTHON, LANGUAGE = ROOT / "docs" / "guide" / "python.md", "experiment=lm_tiny"


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """The lines of its shell blocks that call spd-run."""
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    return [line for line in lines if line.startswith("spd-run")]


GUIDES = [README, *sorted((ROOT / "docs" / "guide").glob("*.md"))]
PAGES = [*GUIDES, CONTRIBUTING, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
SHOWN = [(page, line) for page in GUIDES for line in commands(page)]


def write_files(page: Path, language: str, folder: Path) -> list[Path]:
    """The blocks that begin with a comment with a path, as files."""
    written = []
    for block in blocks(page, language):
        if path := re.match(r"(?:# @.*\n)?# ([\w/-]+\.(?:yaml|py))\b", block):
            written.append(folder / path[1])
            written[-1].parent.mkdir(parents=True, exist_ok=True)
            written[-1].write_text(block)
    return written


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of the guides and a finished run, `run`."""
    folder = tmp_path_factory.mktemp("guide")
    for page in GUIDES:
        write_files(page, "yaml", folder)
    words = ["debug=smoke", f"out_dir={folder / 'outputs'}", f"cache_dir={folder / 'cache'}"]
    outcome = run(compose(words))
    assert outcome.run_dir is not None
    (folder / "run").symlink_to(outcome.run_dir)
    return folder


@pytest.fixture
def in_folder(monkeypatch: pytest.MonkeyPatch, smoke: Path) -> None:
    monkeypatch.chdir(smoke)
    monkeypatch.delenv("SPD_OUT_DIR", raising=False)


def test_the_guides_show_commands_of_every_kind() -> None:
    shown = " ".join(line for _, line in SHOWN)
    for part in (
        " -m ",
        "--config-dir",
        "--cfg",
        "resume=",
        "task=analyse",
        "task=check",
        "'~",
        "sites.middle.pattern=",
    ):
        assert part in shown


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(line, marks=[pytest.mark.slow] * ("suite=" in line), id=f"{page.stem}: {line}")
        for page, line in SHOWN
    ],
)
def test_a_command_of_the_guides_composes_and_builds(in_folder: None, command: str) -> None:
    words = shlex.split(command.replace("$RUN", "run"))
    arguments = get_args_parser().parse_intermixed_args(words[1:])
    with Composer.open(arguments.config_dir) as composer:
        if arguments.cfg or arguments.info:
            assert composer.composed(arguments.overrides).name
            return
        plan = make_plan(
            composer, arguments.overrides, multirun=arguments.multirun, config_dir=arguments.config_dir
        )
    assert plan.is_sweep == (len(plan.jobs) > 1)
    if not plan.is_sweep:  # those of a sweep were built
        preflight(plan.jobs[0].config)


def test_a_loss_in_a_folder_of_ones_own_reaches_the_configuration(in_folder: None) -> None:
    config = compose(["experiment=mine"], config_dir="my_conf")
    assert (config.name, config.loss.importance_minimality.coeff) == ("mine", 1e-3)
    assert config.loss.stochastic_recon.coeff == 1  # of delta, which it is built on


def run_python(
    page: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    chosen: Callable[[str], bool] = lambda block: True,
) -> dict[str, Any]:
    """The names that the Python blocks of a page leave."""
    monkeypatch.chdir(folder)
    monkeypatch.delenv("SPD_OUT_DIR", raising=False)
    monkeypatch.setenv("SPD_CACHE_DIR", str(folder / "cache"))
    names: dict[str, Any] = {}
    for block in filter(chosen, blocks(page, "python")):
        exec(compile(block, str(page), "exec"), names)
    return names


def test_the_python_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = run_python(README, tmp_path, monkeypatch)
    assert names["run"].config.seed == 3
    assert "False torch.Size([5, 20])" in capsys.readouterr().out


def test_the_python_of_its_guide_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = run_python(PYTHON, tmp_path, monkeypatch, lambda block: LANGUAGE not in block)
    assert names["run"].path.parent == tmp_path / "outputs" / "tms_5-2"
    assert names["run"].config.seed == 3
    assert names["importances"]["embed"].lower.shape == (5, 20)
    assert names["ablated"].shape == (5, 5)
    assert len(set(names["order"])) == 5
    assert names["together"].divergence.shape == (5,)
    assert names["one"].divergence.shape == (5,)
    assert names["matching"].own == names["run"].alive()["embed"]
    assert [step for step, _ in names["curve"]] == [10, 20]
    assert "torch.Size([5, 20]) torch.Size([20, 2])" in capsys.readouterr().out
    assert names["mine"].summary["alive"].keys() == {"0", "2"}
    assert names["mine"].model.target[0].weight.tolist() == names["net"][0].weight.tolist()


@pytest.mark.slow
def test_the_python_of_its_guide_for_language_models_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = run_python(PYTHON, tmp_path, monkeypatch, lambda block: LANGUAGE in block)
    assert "".join(names["prompt"].texts) == "def close(self):"
    assert len(names["effects"]) == 8
    length = len(names["prompt"].texts)
    assert {g.lower.shape[:2] for g in names["needed"].values()} == {(1, length)}
    assert names["logits"].shape[:2] == names["texts"]["input_ids"].shape
    assert names["needed_anywhere"].keys() == names["needed"].keys()
    assert names["continued"].shape == (1, length + 5)
    assert "falls without it" in capsys.readouterr().out


@pytest.mark.slow
def test_the_pieces_of_contributing_work_together_in_a_run(tmp_path: Path) -> None:
    modules = [path.stem for path in write_files(CONTRIBUTING, "python", tmp_path)]
    write_files(CONTRIBUTING, "yaml", tmp_path)
    parsed = [get_args_parser().parse_args(shlex.split(line)[1:]) for line in commands(CONTRIBUTING)]
    words = [word for arguments in parsed for word in arguments.overrides] + ["debug=smoke"]
    assert {arguments.config_dir for arguments in parsed} == {None, "my_conf"}
    script = f"""
import json, {", ".join(modules)}
from spd_hydra import compose, decompose, load_run
done = decompose(compose({words!r}, config_dir="my_conf"))
config = load_run(done.path).config
rows = map(json.loads, (done.path / "metrics.jsonl").read_text().splitlines())
overlaps = [row["overlap/read"] for row in rows if "overlap/read" in row]
assert overlaps and all(0 <= value <= 1.001 for value in overlaps), overlaps
assert (done.path / "figures" / "overlap.png").is_file()
pieces = [type(part).__name__ for part in (config.loss.extra["indecision"], config.model, config.data)]
print(json.dumps([done.summary, pieces]))
"""
    ended = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"SPD_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    summary, pieces = json.loads(ended.stdout.splitlines()[-1])
    assert pieces == ["Indecision", "ReLUNet", "Gaussian"]
    assert (summary["experiment"], summary["solved"]) == ("relu_net", None)
    assert summary["alive"].keys() == {"read", "write"}
    assert summary["losses"]["indecision"] >= 0
    assert summary["target"]["measurements"][0]["name"] == "response"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_make_target_that_is_named_exists(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    text = page.read_text()
    code = [*blocks(page, "bash"), *re.findall(r"`(make [^`\n]+)`", text)]
    called = {
        word
        for line in "\n".join(code).splitlines()
        if line.startswith("make ")
        for word in shlex.split(line, comments=True)[1:]
        if re.fullmatch("[a-z-]+", word)
    }
    assert called <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_to_one(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_heading_leads_to_one(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#\s]*)#([^)\s]+)\)", page.read_text())
    broken = [
        (path, anchor)
        for path, anchor in links
        if anchor not in anchors(page if not path else (page.parent / path))
    ]
    assert broken == []


def anchors(page: Path) -> set[str]:
    """How GitHub names the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_everything_in_the_file_tree_exists() -> None:
    (tree,) = [block for block in blocks(ARCHITECTURE, "text") if block.startswith("conf/")]
    folder, missing, named = "", [], 0
    for line in tree.splitlines():
        names = re.split(r"\s{2,}", line.strip())[0].split()
        if not line.startswith(" "):
            folder = names[0] if names[0].endswith("/") else ""
        paths = [f"{folder if line.startswith(' ') else ''}{name}" for name in names]
        named += len(paths)
        missing += [path for path in paths if not (ROOT / path).exists()]
    assert missing == []
    assert named > 40
    modules = {path.name for path in (ROOT / "src" / "spd_hydra").glob("[!_]*.py")}
    assert {name for name in modules if name not in tree} == set()
