"""A run whose model and text lie elsewhere now: it is opened, measured and gone on with when told where."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tests.model.tiny_hf import LENGTH, VOCAB, saved_model

from spd_hydra.api import decompose, load_run
from spd_hydra.composition import compose
from spd_hydra.model.weights import WeightsError
from spd_hydra.saved_config import load_config
from spd_hydra.section import ConfigError

STEPS = 4


def write_rows(path: Path, factor: int) -> None:
    rows = [{"input_ids": [(factor * start + n) % VOCAB for n in range(40)]} for start in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run in `run`, whose model and data were then taken to `new`."""
    folder = tmp_path_factory.mktemp("moved")
    saved_model("gpt2", folder / "model")
    write_rows(folder / "ids.jsonl", 7)
    decompose(
        [
            *("experiment=lm_hf", f"model.name={folder / 'model'}", f"data.name={folder / 'ids.jsonl'}"),
            *(f"data.length={LENGTH}", "data.eval_fraction=0.3", f"cache_dir={folder / 'cache'}"),
            *("device=cpu", "decomposition.C=4", "ci_fn=mlp", "ci_fn.hidden=4", "train.restarts.number=1"),
            *(f"train.steps={STEPS}", "train.batch_size=6", "train.log_every=2", "train.compile=false"),
            *("train.faithfulness_warmup.steps=2", "eval.batches=1", "eval.batch_size=6", "eval.every=4"),
            *("eval.subcomponents=0", "eval.figures=false", f"run_dir={folder / 'run'}"),
        ]
    )
    (folder / "new").mkdir()
    for name in ("model", "ids.jsonl"):
        shutil.move(folder / name, folder / "new" / name)
    return folder


def places(folder: Path) -> dict[str, str]:
    return {"model.name": str(folder / "new" / "model"), "data.name": str(folder / "new" / "ids.jsonl")}


def copied(folder: Path, place: Path) -> Path:
    return Path(shutil.copytree(folder / "run", place / "run"))


def test_told_where_its_text_is_an_opened_run_looks_at_it_as_before(trained: Path) -> None:
    with pytest.raises(ConfigError):
        load_run(trained / "run").alive()
    run = load_run(trained / "run", moved=places(trained))
    alive = {site: len(found) for site, found in run.alive().items()}
    assert alive == run.summary["alive"]


def test_what_is_moved_is_a_place_and_nothing_else(trained: Path) -> None:
    refusal = r"moved: got train\.steps, but only model\.name, model\.revision, data\.name, .* say where"
    with pytest.raises(ConfigError, match=refusal):
        load_run(trained / "run", moved={"train.steps": "3"})


def test_other_text_in_the_new_place_is_refused(trained: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "others.jsonl", 11)
    words = [f"{key}={value}" for key, value in places(trained).items()]
    own = copied(trained, tmp_path)
    others = [*words, f"data.name={tmp_path / 'others.jsonl'}"]
    for asked in ([f"run={own}", "task=analyse"], [f"resume={own}", "train.steps=6"]):
        with pytest.raises(ConfigError, match=r"data: the rows to train .*on are not those of"):
            decompose([*asked, *others])
    assert load_config(own / "config.yaml") == load_config(trained / "run" / "config.yaml")
    with pytest.raises(ConfigError, match=r"data: the rows to train .*on are not those of"):
        load_run(own, moved=places(trained) | {"data.name": str(tmp_path / "others.jsonl")}).alive()


def test_another_model_in_the_new_place_is_not_used(trained: Path, tmp_path: Path) -> None:
    """Small models lie in the run itself, and large ones are known by their digest."""
    torch.manual_seed(5)
    saved_model("gpt2", tmp_path / "other")
    own = load_run(trained / "run", moved=places(trained)).model.target
    try:
        found = load_run(trained / "run", moved={"model.name": str(tmp_path / "other")}).model.target
    except WeightsError:
        return
    for name, parameter in own.named_parameters():
        assert torch.equal(found.get_parameter(name), parameter)


def test_it_is_measured_again_where_they_are_now(trained: Path, tmp_path: Path) -> None:
    own = copied(trained, tmp_path)
    before = load_run(own).summary
    words = [f"{key}={value}" for key, value in places(trained).items()]
    run = decompose(["task=analyse", f"run={own}", *words])
    assert run.summary["losses"] == pytest.approx(before["losses"])


def test_it_goes_on_and_then_knows_where_they_are(trained: Path, tmp_path: Path) -> None:
    own = copied(trained, tmp_path)
    words = [f"{key}={value}" for key, value in places(trained).items()]
    run = decompose([f"resume={own}", "train.steps=6", *words])
    assert run.summary["steps"] == 6
    saved = load_config(own / "config.yaml")
    assert (saved.model.names(), saved.data.names()) == (
        {"name": places(trained)["model.name"]},
        {"name": places(trained)["data.name"]},
    )
    again = decompose([f"resume={own}", "train.steps=8"])  # which needs no word about them any more
    assert again.summary["steps"] == 8


def test_a_toy_names_no_places() -> None:
    with pytest.raises(ConfigError, match=r"model\.name"):
        compose(["model.name=x"])
