"""A target and data of a user's own: opened from anywhere, and mistakes in them told in one line."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spd_hydra import compose, decompose, load_run, section
from spd_hydra.config import RunConfig
from spd_hydra.data.base import Batches, DataSource
from spd_hydra.loss.base import Loss, LossInputs, Statistics
from spd_hydra.model.base import TargetSpec
from spd_hydra.model.users_code import UsersCodeError
from spd_hydra.preflight import preflight
from spd_hydra.saved_config import to_yaml
from spd_hydra.section import ConfigError, option, register
from spd_hydra.sources import pinned

Make = Callable[..., RunConfig]


@register("model", "test_own_net")
@dataclasses.dataclass(kw_only=True)
class OwnNet(TargetSpec):
    """A matrix from a file, without a skeleton."""

    weights: str = option("net.safetensors", "file with its weights")
    activation: str = option("relu", "no file, even where there is one of this name")

    def build(self, generator: torch.Generator) -> nn.Module:
        module = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
        module.load_state_dict(load_file(self.weights), assign=True)
        return module


class Rows(Batches):
    """The first rows of a tensor."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __call__(self, key: Tensor, rows: Tensor) -> Tensor:
        return self.x.to(rows.device)[rows.long() % len(self.x)]


@register("data", "test_own_inputs")
@dataclasses.dataclass(kw_only=True)
class OwnInputs(DataSource):
    """Rows from a file."""

    file: str = option("inputs.safetensors", "file with a tensor x")

    def bind(self, target: TargetSpec) -> Rows:
        return Rows(load_file(self.file)["x"])


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Configurations in a directory with the two files."""
    monkeypatch.chdir(tmp_path)
    module = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    save_file(module.state_dict(), "net.safetensors")

    def make(x: Tensor | None = None, name: str = "x") -> RunConfig:
        save_file({name: torch.randn(50, 6) if x is None else x}, "inputs.safetensors")
        sites = ["decomposition.sites.first={pattern: '0', C: 5}"]
        sizes = ["train.steps=2", "train.batch_size=8", "eval.batches=1", "eval.batch_size=8", "device=cpu"]
        more = [
            "train.restarts.number=1",
            "train.compile=false",
            "eval.figures=false",
            "decomposition=blocks",
        ]
        return compose(
            [
                "experiment=none",
                "name=own",
                "model=test_own_net_schema",
                "data=test_own_inputs_schema",
                *more,
                *sites,
                *sizes,
            ]
        )

    return make


@pytest.mark.parametrize(
    ("x", "what", "why"),
    [
        (torch.zeros(9, 7), "rows of shape [7], dtype float32", "mat1 and mat2 shapes cannot be multiplied"),
        (torch.zeros(9, 6).double(), "rows of shape [6], dtype float64", "must have the same dtype"),
    ],
    ids=["other width", "other precision"],
)
def test_rows_that_do_not_fit_are_told_in_one_line_and_torch_writes_nothing(
    own: Make, capfd: pytest.CaptureFixture[str], x: Tensor, what: str, why: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        preflight(own(x))
    message = str(caught.value)
    assert message.startswith(f"data: {what}, do not fit the target: ")
    assert why in message
    assert message.endswith("; OwnInputs.bind has to give what the model's forward takes")
    assert "\n" not in message
    assert capfd.readouterr() == ("", "")


@register("loss_term", "test_own_term")
@dataclasses.dataclass(kw_only=True)
class OwnTerm(Loss):
    """Σ g, mean over positions."""

    scales: list[float] = option(default_factory=lambda: [1.0, 2.0], help="factors by site")

    def statistics(self, inputs: LossInputs) -> Statistics:
        total = torch.stack([ci.lower.sum() for ci in inputs.ci.values()]).sum()
        return {"sum": self.scales[0] * total, "count": inputs.n_positions}


def test_a_run_with_a_loss_term_that_is_not_here_opens_and_keeps_it_but_is_not_gone_on_with(
    own: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = own()
    config.loss.extra = {"mine": OwnTerm(coeff=0.5, scales=[3.0])}
    path = decompose(config).path
    saved = (path / "config.yaml").read_text()
    monkeypatch.delitem(section._registered["loss_term"], "test_own_term")
    run = load_run(path)
    assert [record.message for record in caplog.records if "loss.extra" in record.message] == [
        "loss.extra.mine is of kind loss_term/test_own_term, which no plug-in here has: it is kept as saved"
    ]
    assert to_yaml(run.config) == saved
    assert yaml.safe_load(saved)["loss"]["extra"]["mine"] == {
        "_kind_": "loss_term/test_own_term",
        "coeff": 0.5,
        "scales": [3.0],
    }
    assert run.model.pieces("0").V.shape == (6, 5)
    assert run.alive().keys() == {"0"}
    for words in (["task=analyse", f"run={path}"], [f"resume={path}", "train.steps=4"]):
        with pytest.raises(ConfigError, match=r"loss\.extra\.mine: unknown kind 'loss_term/test_own_term'; "):
            decompose(words)
    with pytest.raises(ConfigError, match=r"loss\.extra\.mine: unknown kind"):
        decompose(run.config)
    assert (path / "config.yaml").read_text() == saved


def test_an_error_in_ones_own_code_names_key_class_method_and_line(own: Make) -> None:
    with pytest.raises(
        UsersCodeError,
        match=r"^data: OwnInputs\.bind \(test_own_classes\.py:\d+\) failed with KeyError: 'x'$",
    ):
        preflight(own(name="y"))
    config = own()
    Path("net.safetensors").unlink()
    with pytest.raises(
        UsersCodeError,
        match=r"^model: OwnNet\.build \(test_own_classes\.py:\d+\) failed with FileNotFoundError: ",
    ):
        preflight(config)


@dataclasses.dataclass(kw_only=True)
class Wrong(Loss):
    """A term that gives what its test says."""

    gives: ClassVar[Any] = None

    def statistics(self, inputs: LossInputs) -> Statistics:
        found: Statistics = self.gives(inputs)
        return found


CONTRACT = (
    "it must return a dictionary of tensors, sums over the positions of the batch: sum and count, each a "
    "single number, whose ratio is the term"
)


@pytest.mark.parametrize(
    ("gives", "told"),
    [
        (lambda inputs: 0.5, "returned float"),
        (lambda inputs: inputs.n_positions, "returned a tensor of shape []"),
        (lambda inputs: {"sum": inputs.n_positions}, "returned no count"),
        (lambda inputs: {"total": inputs.n_positions}, "returned no sum and no count"),
        (lambda inputs: {"sum": 1.0, "count": inputs.n_positions}, "returned float as sum"),
        (
            lambda inputs: {"sum": inputs.ci["0"].lower.sum(0), "count": inputs.n_positions},
            "returned a tensor of shape [5] as sum",
        ),
    ],
)
def test_statistics_that_are_none_are_told_with_the_term_and_what_they_must_be(
    own: Make, monkeypatch: pytest.MonkeyPatch, gives: Callable[[LossInputs], Any], told: str
) -> None:
    monkeypatch.setattr(Wrong, "gives", staticmethod(gives))
    config = own()
    config.loss.extra = {"mine": Wrong(coeff=0.5)}
    with pytest.raises(ConfigError) as caught:
        preflight(config)
    assert str(caught.value) == f"loss.extra.mine: Wrong.statistics {told}; {CONTRACT}"


def test_a_value_that_is_no_single_number_is_told_too(own: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    gives = {"kept": torch.ones(5)}  # whatever its own value takes
    monkeypatch.setattr(Wrong, "gives", staticmethod(lambda inputs: gives))
    config = own()
    config.loss.extra = {"mine": Wrong(coeff=0.5)}
    monkeypatch.setattr(Wrong, "value", lambda self, statistics, positions: statistics["kept"].sum())
    preflight(config)
    monkeypatch.setattr(Wrong, "value", lambda self, statistics, positions: 2 * statistics["kept"])
    with pytest.raises(ConfigError) as caught:
        preflight(config)
    assert str(caught.value) == (
        "loss.extra.mine: Wrong.value returned a tensor of shape [5]; it must return a tensor of no axes"
    )


def test_an_error_in_ones_own_loss_term_is_told_with_its_key(
    own: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Wrong, "gives", staticmethod(lambda inputs: inputs.ci["embed"]))
    config = own()
    config.loss.extra = {"mine": Wrong(coeff=0.5)}
    place = r"^loss\.extra\.mine: Wrong\.statistics \(test_own_classes\.py:\d+\)"
    with pytest.raises(UsersCodeError, match=f"{place} failed with KeyError: 'embed'$"):
        preflight(config)


def test_a_target_that_returns_several_tensors_is_refused_before_a_directory_is_made(
    own: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Two(nn.Sequential):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return y, y

    monkeypatch.setattr(
        OwnNet, "build", lambda self, generator: Two(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    )
    with pytest.raises(ConfigError) as caught:
        decompose(own())
    assert str(caught.value) == (
        "model: the target must return one tensor; got tuple of Tensor, Tensor; wrap it in a module whose "
        "forward returns the one that is to be kept"
    )
    assert not (tmp_path / "outputs").exists()


def test_what_fits_passes(own: Make) -> None:
    assert preflight(own()).model.site_names == ("0",)


def test_a_run_names_files_of_ones_own_classes_whole_and_no_other_texts(own: Make, tmp_path: Path) -> None:
    config = own()
    Path("relu").write_text("a file of this name")
    named: Any = pinned(config)
    assert named.model.weights == str(tmp_path / "net.safetensors")
    assert named.model.activation == "relu"
    assert named.data.file == str(tmp_path / "inputs.safetensors")
    assert pinned(named) == named


def test_a_run_opens_from_another_directory_and_without_its_data(
    own: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = decompose(own()).path.absolute()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "inputs.safetensors").unlink()
    assert load_run(path).model.pieces("0").V.shape == (6, 5)
    (tmp_path / "net.safetensors").unlink()
    with pytest.raises(ConfigError) as caught:
        _ = load_run(path).model
    assert re.match(
        r"model: OwnNet\.build \(.*\) failed with FileNotFoundError: .*; the run directory has",
        str(caught.value),
    )
    monkeypatch.setattr(
        OwnNet,
        "skeleton",
        lambda spec, architecture=None: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)),
    )
    assert load_run(path).model.pieces("0").V.shape == (6, 5)


def test_a_class_that_is_not_imported_is_told_with_what_to_do(
    own: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = decompose(own()).path
    config = path / "config.yaml"
    config.write_text(config.read_text().replace("model/test_own_net", "model/my_net"))
    for open_it in (lambda: load_run(path), lambda: decompose(["task=analyse", f"run={path}"])):
        with pytest.raises(ConfigError) as caught:
            open_it()
        assert "unknown kind 'model/my_net'; known are" in str(caught.value)
        assert "Import the module that registers it first, or make it a plug-in" in str(caught.value)
