"""Pictures of sweeps made by hand: when there is one, what is in it, and that it never costs the sweep."""

import dataclasses
import json
import logging
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from spd_hydra.report import sweep_rows, write_sweep
from spd_hydra.report.range_figure import draw_range, ideal_l0, l0_of
from spd_hydra.report.sweep import SweepRow
from spd_hydra.report.sweep_pictures import heatmaps, range_picture, swept_number

COEFF = "loss.importance_minimality.coeff"


def row(job: int, solved: bool | None = True, state: str = "done", **overrides: str) -> SweepRow:
    numbers = {"mmcs": 0.9, "ml2r": 1.1, "l0": 3.0, "l0.a": 0.5, "l0.b": 2.5, "l0_ideal.a": 0.25}
    return SweepRow(job=job, state=state, overrides=overrides, solved=solved, numbers=numbers, seed=job,
                    experiment=overrides.get("experiment", "tms_5-2"))  # fmt: skip


def over(values: Sequence[str], seeds: int = 2) -> list[SweepRow]:
    """Solved for all but the first value."""
    return [
        row(seeds * i + seed, i > 0, **{COEFF: value, "seed": str(seed)})
        for i, value in enumerate(values)
        for seed in range(seeds)
    ]


def sweep_in(directory: Path, synthetic: Any, summaries: Any, picture: bytes = b"") -> Path:
    """Two coefficients with two seeds each; the second coefficient is solved."""
    for job in range(4):
        run = directory / str(job)
        (run / "figures").mkdir(parents=True)
        overrides = [f"{COEFF}={'1e-3' if job < 2 else '1e-2'}", f"seed={1 - job % 2}"]
        (run / "overrides.json").write_text(json.dumps(overrides))
        (run / "status.json").write_text(json.dumps({"status": "done"}))
        summary = summaries.summary_of(synthetic.tms(solved=job > 1), seed=1 - job % 2)
        (run / "summary.json").write_text(json.dumps(summary))
        if picture:
            (run / "figures" / "causal_importance.png").write_bytes(picture)
    return directory


def png(size: int) -> bytes:
    """The smallest PNG that says its size."""
    return b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + struct.pack(">II", size, 16) + b"rest"


@pytest.mark.parametrize(
    ("rows", "key"),
    [
        (over(["1e-3", "3e-3"]), COEFF),
        ([row(0, C="4", experiment="a"), row(1, C="8", experiment="b")], "C"),
        ([row(0, C="4"), row(1, C="8", lr="1")], None),  # two keys
        ([row(0, C="4"), row(1, C="many")], None),
        ([row(0, C="4"), row(1)], None),
        (over(["1e-3"]), None),
        ([row(0, C="1"), row(1, C="1.0")], None),  # the same number
        ([], None),
    ],
)
def test_a_picture_needs_one_number_in_which_jobs_differ(rows: list[SweepRow], key: str | None) -> None:
    assert swept_number(rows) == key


def test_solved_fractions_have_their_intervals_and_values_their_ticks() -> None:
    rows = over(["1e-3", "1e-2"])
    figure = draw_range({"tms_5-2": {0.001: rows[:2], 0.01: rows[2:]}}, "x")
    solved, l0, sizes = figure.axes
    (container,) = solved.containers
    line, _, (bars,) = container
    assert [list(map(float, line.get_xdata())), list(line.get_ydata())] == [[0.001, 0.01], [0, 1]]
    ends = [float(x) for segment in bars.get_segments() for x in segment[:, 1]]
    z2 = 1.959963984540054**2
    assert ends == pytest.approx([0, z2 / (2 + z2), 2 / (2 + z2), 1])  # Wilson, of 0 of 2 and 2 of 2
    assert solved.get_xscale() == "log"
    assert [tick.get_text() for tick in l0.get_xticklabels()] == ["0.001", "0.01"]
    assert [line.get_ydata()[0] for line in l0.lines] == [0.5, 0.5, 0.25]  # points, their mean, the ideal
    assert {round(float(y), 9) for line in sizes.lines for y in line.get_ydata()} == {0.1}  # from 1, both
    assert sizes.get_yscale() == "log"
    left, right = solved.get_xlim()
    assert left < 0.001 < 0.01 < right


def language_row(job: int, value: str, kl: float, share: float | None, l0: float = 40.0) -> SweepRow:
    numbers = {"kl": kl, "ce": 3.0, "l0": l0} | ({} if share is None else {"ce_recovered": share})
    return SweepRow(job=job, state="done", overrides={COEFF: value}, numbers=numbers, seed=0, experiment="lm")


def drawn(axes: Any) -> set[float]:
    return {float(y) for line in axes.lines for y in line.get_ydata()}


def test_where_nothing_has_a_verdict_what_masked_models_keep_is_drawn() -> None:
    rows = [language_row(0, "1e-4", 0.25, 0.95), language_row(1, "1e-2", 0.5, 0.5)]
    figure = draw_range({"lm": {1e-4: rows[:1], 1e-2: rows[1:]}}, "x")
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["CE recovered with masks g, %", "L0", "KL with masks g"]
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert labels == ["% of the cross-entropy", "subcomponents per position", "KL"]
    assert [drawn(axes) for axes in figure.axes] == [{95.0, 50.0, 100.0}, {40.0}, {0.25, 0.5}]


@pytest.mark.parametrize("mmcs", [(0.9, 0.9), (0.979, 0.957), (0.9999, 0.99), (1.0, 1.0)])
def test_distances_from_1_have_two_labels_and_show_every_point(mmcs: tuple[float, float]) -> None:
    rows = [dataclasses.replace(row(i), numbers={"mmcs": value, "l0": 1.0}) for i, value in enumerate(mmcs)]
    axes = draw_range({"tms": {1.0: rows[:1], 2.0: rows[1:]}}, "x").axes[-1]
    low, high = axes.get_ylim()
    assert sum(low <= tick <= high for tick in axes.get_yticks()) >= 2
    assert all(low < max(1 - value, 1e-4) < high for value in mmcs)


def test_without_a_share_the_divergence_is_drawn_beside_l0() -> None:
    rows = [language_row(0, "1e-4", 0.25, None), language_row(1, "1e-2", 0.5, None)]
    rows[1].numbers["mse"] = rows[1].numbers.pop("kl")
    figure = draw_range({"lm": {1e-4: rows[:1]}}, "x")
    assert [axes.get_title() for axes in figure.axes] == ["L0", "KL with masks g"]
    figure = draw_range({"lm": {1e-2: rows[1:]}}, "x")
    assert [axes.get_title() for axes in figure.axes] == ["L0", "MSE with masks g"]


def test_a_verdict_is_drawn_even_if_masked_models_were_measured() -> None:
    rows = [row(0), row(1)]
    for one in rows:
        one.numbers.update(kl=0.1, ce_recovered=0.9)
    figure = draw_range({"one": {1.0: rows}}, "x")
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["solved, with 95 % interval", "L0, dashed: ideal", "1 – MMCS ●, |1 – ML2R| ▲"]


def test_a_level_curve_keeps_away_from_the_edge_of_its_panel() -> None:
    rows = [language_row(0, "1e-4", 0.25, 0.5, l0=40.0), language_row(1, "1e-2", 0.25, 0.5, l0=40.5)]
    figure = draw_range({"lm": {1e-4: rows[:1], 1e-2: rows[1:]}}, "x")
    for axes, highest in zip(figure.axes[1:], (40.5, 0.25), strict=True):
        bottom, top = axes.get_ylim()
        assert bottom == 0
        assert top > 1.05 * highest


def test_crowded_ticks_slant_in_the_picture() -> None:
    values = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
    line = {value: [language_row(0, f"{value}", 0.2, 0.5)] for value in values}
    figure = draw_range({"lm": line}, "x")
    assert {text.get_rotation() for axes in figure.axes for text in axes.get_xticklabels()} == {40.0}


def test_the_caption_names_what_is_drawn(tmp_path: Path) -> None:
    picture = range_picture(tmp_path, [language_row(0, "1e-4", 0.1, 0.5), language_row(1, "1e-2", 0.2, 0.4)])
    assert picture is not None
    assert picture["caption"] == (
        f"Over {COEFF}: how much of the cross-entropy masks of causal importances recover, how many "
        "subcomponents are active per position, and the KL from the target with masks of causal importances; "
        "lines join means over seeds, pale points are single runs."
    )
    picture = range_picture(tmp_path, over(["1e-3", "1e-2"]))
    assert picture is not None
    assert picture["caption"] == (
        f"Over {COEFF}: how many jobs are solved, how many subcomponents are active per position, and how "
        "far their directions and sizes are from a perfect match (lower is better); lines join means over "
        "seeds, pale points are single runs."
    )


def test_near_values_have_a_plain_axis_and_experiments_a_line_each() -> None:
    lines = {name: {2.0: [row(0)], 3.0: [row(1, None)]} for name in ("one", "two")}
    figure = draw_range(lines, "x")
    assert figure.axes[0].get_xscale() == "linear"
    assert len(figure.axes[0].containers) == 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "two"]


def test_a_line_is_not_drawn_across_a_value_that_it_lacks() -> None:
    lines = {
        "all": {factor: [row(0)] for factor in (0.5, 1.0, 2.0)},
        "some": {factor: [row(1)] for factor in (0.25, 0.5, 2.0)},
    }
    figure = draw_range(lines, "x", through=1.0)
    solved, l0, _ = figure.axes
    assert [len(list(container[0].get_xdata())) for container in solved.containers] == [3, 2, 1]
    means = [line for line in l0.lines if line.get_linestyle() == "-" and line.get_markersize() == 5]
    assert [len(list(line.get_xdata())) for line in means] == [3, 2, 1]
    assert [len(list(c[0].get_xdata())) for c in draw_range(lines, "x").axes[0].containers] == [3, 3]


def test_an_ideal_l0_that_the_varied_number_moves_is_drawn_from_value_to_value() -> None:
    rows = [row(0), row(1), row(2)]
    rows[1].numbers["l0_ideal.a"] = 1.0
    figure = draw_range({"one": {0.1: [rows[0]], 0.2: [rows[1]], 0.3: [rows[2]]}}, "x")
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[1].lines]
    assert ([0.1, 0.2, 0.3], [0.25, 1.0, 0.25]) in drawn


def test_l0_is_that_of_the_sites_whose_ideal_is_known() -> None:
    unknown = SweepRow(job=0, state="done", numbers={"l0": 3.0, "l0.a": 3.0})
    assert l0_of([row(0), unknown, SweepRow(job=1, state="done")]) == [0.5, 3.0]
    assert (ideal_l0(row(0)), ideal_l0(unknown)) == (0.25, None)


def test_the_page_has_the_picture_and_the_lowest_seed_of_each_value(
    tmp_path: Path, synthetic: Any, summaries: Any
) -> None:
    sweep_in(tmp_path, synthetic, summaries, png(320))
    rows = sweep_rows(tmp_path)
    _, page = write_sweep(tmp_path, rows)
    assert (tmp_path / "figures" / f"{COEFF}.png").read_bytes()[:4] == b"\x89PNG"
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 3
    assert f"What {COEFF} does" in text
    assert [one["caption"] for one in heatmaps(tmp_path, rows)] == [
        f"{COEFF}=1e-3, seed 0, not solved", f"{COEFF}=1e-2, seed 0, solved",
    ]  # fmt: skip
    assert [one["name"] for one in heatmaps(tmp_path, rows)] == ["job 1", "job 3"]


def test_sweeps_of_anything_else_have_no_picture(tmp_path: Path, synthetic: Any, summaries: Any) -> None:
    rows = [row(0, C="4"), row(1, C="many")]
    assert range_picture(tmp_path, rows) is None
    assert heatmaps(tmp_path, rows) == []
    assert range_picture(tmp_path, [row(0, None, "running", C="4"), row(1, None, "failed", C="5")]) is None
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_fails_loses_no_sweep(
    tmp_path: Path,
    synthetic: Any,
    summaries: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(*arguments: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("spd_hydra.report.sweep_pictures.draw_range", broken)
    sweep_in(tmp_path, synthetic, summaries, b"no picture")
    with caplog.at_level(logging.WARNING):
        _, page = write_sweep(tmp_path, sweep_rows(tmp_path))
    assert "2 of 2" in page.read_text()
    assert "could not be drawn" in caplog.text
    assert "could not be read" in caplog.text
