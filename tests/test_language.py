"""A model of text from its configuration to its report."""

import dataclasses
import json
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from spd_hydra import load_run
from spd_hydra.analyse import analyse
from spd_hydra.build import assemble, untrained_target
from spd_hydra.config import RunConfig, Task
from spd_hydra.decomposition.config import SitePattern
from spd_hydra.loss.divergence import Divergence
from spd_hydra.run import run

Toy = Callable[..., RunConfig]
KINDS = ["target", "unmasked", "stochastic", "ci", "rounded_0", "rounded_0.5", "random", "zero"]


@pytest.fixture
def config(toy: Toy, language: ModuleType, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    # Pictures take longest, and have tests of their own.
    monkeypatch.setattr("spd_hydra.result.draw_all", lambda *arguments: [])
    made = toy(
        "eval.batches=2",
        "eval.batch_size=8",
        "train.batch_size=8",
        "eval.ci_threshold=0",
        "eval.pgd_steps=[2]",
    )
    sites = {
        "reads": SitePattern(pattern="embed", C=14),
        "writes": SitePattern(pattern="unembed", C=9),
    }
    made.decomposition = dataclasses.replace(made.decomposition, sites=sites, tied={})
    made.loss.divergence = Divergence.kl
    return dataclasses.replace(made, model=language.BigramSpec(), data=language.Tokens())


def test_a_run_leaves_numbers_of_ablated_models_and_what_subcomponents_respond_to(
    config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run(config).run_dir
    assert path is not None
    opened = load_run(path)
    summary = opened.summary
    assert list(summary["ablations"]) == KINDS
    assert set(summary["ablations"]["ci"]) == {"ce", "kl"}  # untrained, it is no better than all off
    assert set(summary["groups"]) == {"reads", "writes"}
    assert set(summary["groups"]["reads"]) == {"l0", "alive", "ce", "kl"}
    assert summary["groups"]["reads"]["alive"] == summary["alive"]["embed"]
    assert list(summary["pgd"]) == ["2"]
    rows = [row for row in opened.metrics if row["split"] == "eval"]
    assert rows[-1]["ce/ci"] == summary["ablations"]["ci"]["ce"]
    assert all(f"kl/{kind}" in row for row in rows for kind in KINDS if kind != "target")

    text = opened.subcomponents
    assert text["positions"] == 2 * (8 * 9 - 4)  # a token of every other row is padding
    assert set(text["sites"]) == {"embed", "unembed"}
    first = text["sites"]["embed"][0]
    assert set(first) == {"index", "mean_ci", "density", "tokens", "contexts"}
    assert first["contexts"][0]["tokens"][first["contexts"][0]["at"]] in {
        "<script>alert(1)</script>",
        *(f" tok{token}" for token in range(12)),
    }
    page = (path / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "Ablated models" in page
    assert '<th class="text">known answer</th>' not in page
    assert "Not checked: nothing is known that could certify this target." in page
    printed = capsys.readouterr().out
    assert "so no share of the cross-entropy is recovered" in " ".join(printed.split())
    assert "known answer" not in printed


def test_analysing_a_run_again_gives_the_same_numbers_and_contexts(config: RunConfig) -> None:
    path = run(config).run_dir
    assert path is not None
    before = {name: (path / name).read_text() for name in ("subcomponents.json", "summary.json")}
    (path / "subcomponents.json").unlink()
    analyse(dataclasses.replace(config, task=Task.analyse, run=str(path)))
    assert (path / "subcomponents.json").read_text() == before["subcomponents.json"]
    after = json.loads((path / "summary.json").read_text())
    assert after["ablations"] == json.loads(before["summary.json"])["ablations"]


def test_an_analysis_that_does_not_look_at_the_text_removes_what_was_said_of_it(config: RunConfig) -> None:
    path = run(config).run_dir
    assert path is not None
    unseen = dataclasses.replace(config.eval, subcomponents=0)
    analyse(dataclasses.replace(config, task=Task.analyse, run=str(path), eval=unseen))
    assert not (path / "subcomponents.json").exists()
    assert load_run(path).subcomponents == {}


def test_only_the_last_evaluation_looks_at_the_text(config: RunConfig) -> None:
    parts = assemble(config, untrained_target(config), torch.device("cpu"))
    assert parts.evaluate(10, certified=True).text is None
    assert parts.evaluate(config.train.steps, certified=True).text is not None
    assert parts.evaluate(10, certified=True, last=True).text is not None
    config.eval.subcomponents = 0
    assert parts.evaluate(config.train.steps, certified=True).text is None


def test_vectors_are_no_text_and_are_ablated_only_where_that_is_asked_for(toy: Toy) -> None:
    def measured(*words: str) -> dict[str, float]:
        config = toy(*words)
        parts = assemble(config, untrained_target(config), torch.device("cpu"))
        assert not parts.reads_tokens
        found = parts.evaluate(config.train.steps, certified=True)
        assert found.text is None
        return found.metrics

    plain, ablated = measured(), measured("eval.ablations=true")
    added = set(ablated) - set(plain)
    kinds = {name.removeprefix("mse/") for name in added if name.startswith("mse/")}
    assert kinds == set(KINDS) - {"target"}
    assert set(measured("eval.pgd_steps=[1,3]")) - set(plain) == {"pgd/1", "pgd/3"}
    assert {name: ablated[name] for name in plain} == pytest.approx(plain, rel=0, abs=0, nan_ok=True)


def test_a_model_of_text_that_does_not_predict_the_next_token_has_its_divergence_alone(
    config: RunConfig, language: ModuleType
) -> None:
    config = dataclasses.replace(config, model=language.BigramSpec(next_token=False))
    parts = assemble(config, untrained_target(config), torch.device("cpu"))
    found = parts.evaluate(1, certified=True).metrics
    assert {name for name in found if name.startswith("kl/")} == {f"kl/{kind}" for kind in KINDS[1:]}
    assert not any(name.startswith(("ce/", "ce_")) for name in found)
    config.eval.ablations = False
    assert not any(name.startswith("kl/") for name in parts.evaluate(1, certified=True).metrics)
