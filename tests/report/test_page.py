import dataclasses
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from spd_hydra.figure import Drawn
from spd_hydra.report import write_report
from spd_hydra.report.page import metric_rows

# The smallest PNG that says its size: signature, header of 3 × 2 pixels.
PNG = b"\x89PNG\r\n\x1a\n" + b"\x00\x00\x00\rIHDR" + (320).to_bytes(4) + (160).to_bytes(4) + b"rest"


class Page(HTMLParser):
    """What a browser would load, and the texts outside of style and script."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def loaded(self) -> list[str]:
        return [
            value for _, a in self.tags for key in ("src", "href", "srcset", "data") if (value := a.get(key))
        ]


@pytest.fixture
def parts(synthetic: Any, summaries: Any, tmp_path: Path) -> dict[str, Any]:
    """The arguments of a report with one figure."""
    picture = tmp_path / "losses.png"
    picture.write_bytes(PNG)
    evaluation = synthetic.tms()
    return {
        "summary": summaries.summary_of(evaluation),
        "evaluation": evaluation,
        "history": synthetic.history(),
        "figures": [Drawn(name="losses", caption="Losses fall.", path=picture)],
        "config_text": summaries.CONFIG,
        "environment": summaries.ENVIRONMENT,
    }


def _written(parts: dict[str, Any], tmp_path: Path) -> Page:
    write_report(tmp_path / "report.html", **parts)
    return Page(tmp_path / "report.html")


def test_the_report_loads_nothing_from_outside(parts: dict[str, Any], tmp_path: Path) -> None:
    page = _written(parts, tmp_path)
    assert page.loaded(), "the figure is there"
    assert all(address.startswith("data:image/png;base64,") for address in page.loaded())
    text = (tmp_path / "report.html").read_text()
    assert not re.search(r"(src|href)\s*=\s*[\"']?\s*(https?:)?//", text)
    assert "@import" not in text
    assert "url(" not in text
    assert "script" not in {tag for tag, _ in page.tags}


def test_the_verdict_comes_before_the_figures(parts: dict[str, Any], tmp_path: Path) -> None:
    text = _written(parts, tmp_path).text
    verdict = text.index("Solved: the known answer was found, also at the strict tolerance 0.1.", 400)
    assert verdict < text.index("Checks by site") < text.index("Losses fall.") < text.index("Configuration")


def test_an_unsolved_run_says_why(
    synthetic: Any, summaries: Any, parts: dict[str, Any], tmp_path: Path
) -> None:
    unsolved = synthetic.tms(solved=False)
    text = _written(
        {**parts, "evaluation": unsolved, "summary": summaries.summary_of(unsolved)}, tmp_path
    ).text
    assert "Not solved" in text
    assert "embed: 6 entries are wrong at tolerance 0.2 (identity of 5)." in text
    assert "MMCS 0.9120 is below 0.99" in text


@pytest.mark.parametrize("decides", [True, False])
def test_limits_stand_beside_mmcs_and_ml2r_where_they_decide(
    parts: dict[str, Any], tmp_path: Path, decides: bool
) -> None:
    parts["summary"]["thresholds"] |= {"cosine_decides": decides, "ci": 0.1, "positions": 20480}
    text = " ".join(_written(parts, tmp_path).text.split())
    assert ("at least 0.99" in text) == decides
    assert ("1 ± 0.05" in text) == decides
    assert text.count("reported only") == (0 if decides else 2)
    assert "cosine_decides" not in text
    assert ("MMCS and ML2R are only reported." in text) == (not decides)


def test_the_diagnosis_and_the_neurons_are_in_the_report(parts: dict[str, Any], tmp_path: Path) -> None:
    assert "what to change" not in _written(parts, tmp_path).text
    parts["summary"]["diagnosis"] = [{"symptom": "<b>L0</b> still falls", "advice": "try x=1", "site": None}]
    parts["summary"]["contributions"] = {"layers.0": {"r2": 0.98, "slope": 0.97}}
    text = _written(parts, tmp_path).text
    assert text.index("what to change") < text.index("<b>L0</b> still falls; try x=1") < text.index("Checks")
    assert "Neurons, layers.0R² 0.9800to y = x, target against subcomponents; slope 0.9700" in text


@pytest.mark.parametrize("where", ["config_text", "warnings", "environment", "summary", "caption", "history"])
def test_hostile_strings_stay_text(parts: dict[str, Any], tmp_path: Path, where: str) -> None:
    hostile = "</style></pre><script>alert('x')</script><img src=x onerror=\"alert(1)\">"
    changed: dict[str, Any] = {
        "config_text": hostile,
        "warnings": [hostile],
        "environment": {"command": hostile, hostile: [hostile, hostile], "git": {"diff": f"{hostile}\n"}},
        "summary": {
            **parts["summary"],
            "experiment": hostile,
            "losses": {hostile: 1.0},
            "target": {hostile: hostile},
        },
        "caption": [dataclasses.replace(parts["figures"][0], name=f'"{hostile}', caption=f'"{hostile}')],
        "history": [{"step": 0, "split": hostile, f"loss/{hostile}": 1.0}],
    }
    plain = _written(parts, tmp_path)
    page = _written({**parts, ("figures" if where == "caption" else where): changed[where]}, tmp_path)
    assert hostile in page.text + str(page.tags).replace("\\'", "'")
    assert "script" not in {tag for tag, _ in page.tags}
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert [tag for tag, _ in page.tags].count("img") == [tag for tag, _ in plain.tags].count("img")


def test_figures_are_sized_to_the_page(parts: dict[str, Any], tmp_path: Path) -> None:
    images = [attributes for tag, attributes in _written(parts, tmp_path).tags if tag == "img"]
    assert [(image["width"], image["height"]) for image in images] == [("192", "96")]  # 320 × 160 at 160 dpi


def test_a_figure_that_is_gone_is_a_warning(parts: dict[str, Any], tmp_path: Path) -> None:
    gone = Drawn(name="gone", caption="Nothing.", path=tmp_path / "gone.png")
    page = _written({**parts, "figures": [*parts["figures"], gone]}, tmp_path)
    assert "The figure gone could not be read" in page.text
    assert "Losses fall." in page.text


def test_a_run_without_a_known_answer_has_a_report(
    synthetic: Any, parts: dict[str, Any], tmp_path: Path
) -> None:
    minimal = {"experiment": "lm", "solved": None}
    evaluation = synthetic.language_model(n_sites=1)
    page = _written({**parts, "summary": minimal, "evaluation": evaluation, "history": []}, tmp_path)
    assert "No known answer" in page.text
    assert "Checks by site" not in page.text


@pytest.mark.parametrize(
    ("lower", "upper", "text"),
    [
        (5e-324, math.inf, "> 0"),  # as the margin of a TMS target, the least number above 0
        (5e-324, None, "> 0"),
        (0.5, math.inf, "≥ 0.5"),
        (0, 0.05, "0 to 0.05"),
        (1, 1, "1"),
        (-math.inf, 3.0, "≤ 3"),
        (None, None, "–"),
    ],
)
def test_what_a_measurement_of_the_target_may_be_is_said_as_people_say_it(
    parts: dict[str, Any], tmp_path: Path, lower: Any, upper: Any, text: str
) -> None:
    measurement = {"name": "margin", "value": 0.25, "lower": lower, "upper": upper}
    parts["summary"] |= {"target": {"certified": True, "measurements": [measurement]}}
    page = _written(parts, tmp_path)
    assert f"margin0.2500{text}\n" in page.text
    assert "e-324" not in page.text


def test_config_environment_and_certificate_are_in_the_report(parts: dict[str, Any], tmp_path: Path) -> None:
    text = _written(parts, tmp_path).text
    for part in (
        "embed: {C: 20}",
        "spd-run experiment=tms_5-2 seed=3",
        "0123456789",
        "torch==2.13.0",
        "+x = 2",
    ):
        assert part in text
    assert "Certified" in text
    assert "smallest angle" in text
    assert "seed 1003" in text


def test_the_same_inputs_give_the_same_report(parts: dict[str, Any], tmp_path: Path) -> None:
    write_report(tmp_path / "a.html", **parts)
    write_report(tmp_path / "b.html", **parts)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_best_is_lowest_for_losses_highest_for_mmcs_and_nearest_to_one_for_ml2r() -> None:
    values = {
        "loss/total": [3.0, 1.0, 2.0],
        "recovery/mmcs": [0.5, 0.75, 0.25],
        "recovery/ml2r": [0.5, 1.25, 2.0],
        "l0/total": [9.0, 2.0, 3.0],
    }
    history = [
        {"step": 10 * i, "split": "eval", **{name: column[i] for name, column in values.items()}}
        for i in range(3)
    ]
    rows = {row["name"]: (row["last"], row["best"], row["best_step"]) for row in metric_rows(history)}
    assert rows == {
        "loss/total": ("2", "1", "10"),
        "recovery/mmcs": ("0.2500", "0.7500", "10"),
        "recovery/ml2r": ("2", "1.2500", "10"),
        "l0/total": ("3", "–", "–"),
    }
