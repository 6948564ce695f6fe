"""Small runs for the tests of what lies above the loss, and evaluations made by hand for what shows them."""

import contextlib
import importlib.util
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from spd_hydra.build import Parts, assemble, device_of, untrained_target
from spd_hydra.composition import compose
from spd_hydra.config import RunConfig
from spd_hydra.logger.base import Logger
from spd_hydra.loss.base import Loss
from spd_hydra.metric.evaluation import Evaluation
from spd_hydra.run_dir import RunDirectory
from spd_hydra.trainer import Trainer

# A shell ignores Ctrl-C in what it starts in the background, and so would every process that a test starts.
with contextlib.suppress(ValueError):  # not the main thread
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)

WITHOUT_FIGURES = "# @package _global_\neval: {figures: false}\n"

Toy = Callable[..., RunConfig]
Make = Callable[..., Trainer]
STEPS = 6


@pytest.fixture(scope="session")
def target_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the targets of all small runs are kept."""
    return tmp_path_factory.mktemp("targets")


@pytest.fixture(scope="session")
def work_without_figures() -> Callable[[Path], Path]:
    """Make a folder in which runs draw no figures, which take half of the time of a short run."""

    def make(folder: Path) -> Path:
        (folder / "local").mkdir(parents=True)
        (folder / "local" / "default.yaml").write_text(WITHOUT_FIGURES)
        return folder

    return make


@pytest.fixture
def toy(tmp_path: Path, target_cache: Path) -> Toy:
    """Compose `debug=smoke`, 20 uncompiled steps without figures, below `<tmp>/runs`, with overrides."""

    def make(*overrides: str) -> RunConfig:
        places = [f"out_dir={tmp_path / 'runs'}", f"cache_dir={target_cache}"]
        small = ["model.training.batch_size=64", "eval.figures=false"]
        return compose(["debug=smoke", *places, *small, *overrides])

    return make


@pytest.fixture(scope="session")
def load_module() -> Callable[[Path], ModuleType]:
    """Import a Python file of the tests that is no test."""

    def load(path: Path) -> ModuleType:
        name = f"tests_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None, f"{path} is a Python file"
        assert spec.loader is not None, f"{path} is a Python file"
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def synthetic(load_module: Callable[[Path], ModuleType]) -> ModuleType:
    """The evaluations of figure/synthetic.py, for the tests of figures and report."""
    return load_module(Path(__file__).parent / "figure" / "synthetic.py")


class Recorder(Logger):
    def __init__(self) -> None:
        self.rows: list[tuple[int, str]] = []

    def log(self, step: int, split: str, values: dict[str, float]) -> None:
        self.rows.append((step, split))


@pytest.fixture
def make(toy: Toy, tmp_path: Path) -> Iterator[Make]:
    """A trainer of a small run, with an untrained target and an evaluation that measures nothing."""
    opened: list[RunDirectory] = []

    def build(*overrides: str, extra: dict[str, Loss] | None = None, steps: int = STEPS) -> Trainer:
        config = toy(f"train.steps={steps}", "train.log_every=1", *overrides)
        config.loss.extra = extra or {}
        parts: Parts = assemble(config, untrained_target(config), device_of(config))
        opened.append(RunDirectory.create(tmp_path / "made", "toy"))
        return Trainer(
            parts.objective,
            training=config.train,
            evaluation=config.eval,
            sampler=parts.train_sampler(),
            evaluate=lambda step: Evaluation(
                step=step, n_positions=1, ci_threshold=0.1, metrics={"loss/total": 0.0}, sites={}
            ),
            on_figures=lambda evaluation: None,
            run=opened[-1],
            tracker=Recorder(),
        )

    yield build
    for directory in opened:
        directory.close()


@pytest.fixture(scope="session")
def language(load_module: Callable[[Path], ModuleType]) -> ModuleType:
    """The small language model of language.py, which lies beside this file."""
    return load_module(Path(__file__).with_name("language.py"))
