import dataclasses
import logging
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest

from spd_hydra.figure import base, draw_all, figure, figures
from spd_hydra.figure.ablations import draw as draw_ablations
from spd_hydra.figure.activation_density import binned
from spd_hydra.figure.activation_density import draw as draw_density
from spd_hydra.figure.base import FigureKind, caption_of
from spd_hydra.figure.causal_importance import draw as draw_causal_importance
from spd_hydra.figure.ci_histogram import draw as draw_histogram
from spd_hydra.figure.columns import Columns, columns_of, label_columns, wrong_entries
from spd_hydra.figure.curves import series, thinned
from spd_hydra.figure.losses import draw as draw_losses
from spd_hydra.figure.mean_ci import draw as draw_mean_ci
from spd_hydra.figure.neuron_contributions import draw as draw_contributions
from spd_hydra.figure.sites import draw as draw_sites
from spd_hydra.figure.sparsity import draw as draw_sparsity
from spd_hydra.figure.style import new_figure
from spd_hydra.figure.tms_polygon import draw as draw_polygon
from spd_hydra.figure.tms_polygon import plane_vectors
from spd_hydra.figure.trade_off import draw as draw_trade_off
from spd_hydra.figure.weights import balanced
from spd_hydra.figure.weights import draw as draw_weights
from spd_hydra.metric.evaluation import Evaluation, SiteCheck, SiteEvaluation

TMS_FIGURES = [
    "tms_polygon",
    "causal_importance",
    "weights",
    "ci_histogram",
    "mean_ci",
    "activation_density",
    "losses",
    "sparsity",
]


def _images(picture: Any) -> list[np.ndarray]:
    return [np.asarray(image.get_array()) for axes in picture.axes for image in axes.images]


def _texts(picture: Any) -> str:
    found = [text.get_text() for axes in picture.axes for text in (axes.title, *axes.texts)]
    found += [part._suptitle.get_text() for part in (picture, *picture.subfigs) if part._suptitle]
    return "\n".join(found)


def _site(C: int, *, alive: list[int], order: list[int] | None = None) -> SiteEvaluation:
    density = np.zeros(C)
    density[alive] = 0.1
    return SiteEvaluation(
        weight=np.zeros((3, 4)), V=np.zeros((4, C)), U=np.zeros((C, 3)), mean_ci=density, density=density,
        histogram=np.array([10, 1]), order=np.array(range(C) if order is None else order),
    )  # fmt: skip


# ---- all figures ------------------------------------------------------------------------------------


def test_every_figure_that_applies_is_a_png_of_readable_size(synthetic: Any, tmp_path: Path) -> None:
    drawn = draw_all(synthetic.tms(), synthetic.history(), tmp_path / "figures")
    assert [one.name for one in drawn] == TMS_FIGURES
    for one in drawn:
        data = one.path.read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        assert data[:8] == b"\x89PNG\r\n\x1a\n", one.name
        assert 700 <= width <= 1700, one.name
        assert 300 <= height <= 3000, one.name
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == sorted(
        f"{n}.png" for n in TMS_FIGURES
    )


def test_drawing_again_gives_the_same_bytes(synthetic: Any, tmp_path: Path) -> None:
    evaluation = synthetic.language_model(n_sites=1)
    first = draw_all(evaluation, [], tmp_path / "a")
    second = draw_all(evaluation, [], tmp_path / "b")
    assert [one.path.read_bytes() for one in first] == [one.path.read_bytes() for one in second]


def test_captions_are_single_sentences() -> None:
    for kind in figures():
        assert kind.caption.endswith("."), kind.name
        assert ". " not in kind.caption, kind.name
        assert kind.caption[0].isupper(), kind.name


def _caption(picture: Any) -> str:
    """The caption that a picture has of its own: one sentence."""
    caption = str(caption_of(picture))
    assert caption.endswith(".")
    assert ". " not in caption
    return caption


def _many(synthetic: Any, C: int = 40) -> Evaluation:
    """Twenty sites without a known answer, the i-th with C + i subcomponents."""
    site = next(iter(synthetic.tms(C=C).sites.values()))
    grown = {}
    for i in range(20):
        pad = [(0, i)]
        grown[f"layers.{i}"] = dataclasses.replace(
            site,
            V=np.pad(site.V, [(0, 0), *pad]),
            U=np.pad(site.U, [*pad, (0, 0)]),
            mean_ci=np.pad(site.mean_ci, pad),
            density=np.pad(site.density, pad),
            order=np.arange(C + i),
            probe_lower=None,
            probe_upper=None,
            directions=None,
        )
    found: Evaluation = dataclasses.replace(synthetic.tms(C=C), sites=grown, checks=[])
    return found


def _few(evaluation: Evaluation) -> Evaluation:
    return dataclasses.replace(evaluation, sites=dict(list(evaluation.sites.items())[:3]))


def test_a_caption_speaks_of_what_its_picture_shows(synthetic: Any) -> None:
    known, many = synthetic.tms(), _many(synthetic)
    unknown = _few(many)
    lines = {"dotted line": (True, True, False), "expected number": (True, False, False)}
    for words, holds in lines.items():
        assert tuple(words in _caption(draw_mean_ci(e, [])) for e in (known, unknown, many)) == holds, words
    no_threshold = dataclasses.replace(known, ci_threshold=0.0)
    assert "dotted" not in _caption(draw_mean_ci(no_threshold, []))
    densities = {
        "grey bar": (True, True, False),
        "both axes": (True, True, False),
        "frequency of the features": (True, False, False),
    }
    for words, holds in densities.items():
        assert tuple(words in _caption(draw_density(e, [])) for e in (known, unknown, many)) == holds, words
    all_alive = {name: dataclasses.replace(s, density=s.density + 0.01) for name, s in known.sites.items()}
    assert "grey bar" not in _caption(draw_density(dataclasses.replace(known, sites=all_alive), []))
    assert "row per site" in _caption(draw_histogram(many, []))


def test_the_caption_of_weights_names_features_and_heatmaps_only_where_they_are(synthetic: Any) -> None:
    known, unknown = _caption(draw_weights(synthetic.tms(), [])), _few(_many(synthetic))
    assert "one feature" in known
    assert "heatmaps above" in known
    caption = _caption(draw_weights(unknown, []))
    assert "feature" not in caption
    assert "heatmaps" not in caption


def test_the_caption_of_sparsity_names_dashed_lines_only_where_they_are(synthetic: Any) -> None:
    history = synthetic.history()
    assert "dashed" in _caption(draw_sparsity(synthetic.tms(), history))
    for evaluation in (_few(_many(synthetic)), _many(synthetic)):
        picture = draw_sparsity(dataclasses.replace(evaluation, metrics={}), history)
        assert picture is not None
        assert caption_of(picture) is None
    assert "dashed" not in base._figures["sparsity"].caption


def test_a_picture_with_a_caption_of_its_own_has_it_in_the_report(synthetic: Any, tmp_path: Path) -> None:
    drawn = {one.name: one.caption for one in draw_all(_many(synthetic), [], tmp_path)}
    assert drawn["mean_ci"] == _caption(draw_mean_ci(_many(synthetic), []))
    assert drawn["sites"] == base._figures["sites"].caption


def test_what_a_site_does_not_have_is_grey_and_no_dead_subcomponent(synthetic: Any) -> None:
    picture = draw_mean_ci(_many(synthetic), [])
    assert picture is not None
    means, beyond = [np.ma.getmaskarray(np.ma.asarray(i.get_array())) for i in picture.axes[0].images]
    assert means.shape == beyond.shape == (20, 59)
    assert (~beyond).sum(axis=1).tolist() == list(range(19, -1, -1))
    equal = {name: _many(synthetic).sites["layers.0"] for name in map(str, range(20))}
    alike = draw_mean_ci(dataclasses.replace(_many(synthetic), sites=equal), [])
    assert "grey" not in _texts(alike)


def test_dead_subcomponents_are_pale_in_the_weights(synthetic: Any) -> None:
    evaluation = synthetic.tms()
    picture = draw_weights(evaluation, [])
    assert picture is not None
    image = picture.subfigs[0].axes[0].images[0]
    site = next(iter(evaluation.sites.values()))
    assert np.array_equal(np.asarray(image.get_alpha())[0], np.where(site.density[site.order] > 0, 1.0, 0.25))


@pytest.mark.parametrize(
    ("shown", "named", "label"),
    [
        (range(24), 24, "subcomponent"),
        (range(60), 20, "subcomponent (1 in 3 named)"),
        (range(500, 540), 10, "subcomponent (1 in 4 named)"),
    ],
)
def test_columns_name_subcomponents_as_many_as_fit(shown: range, named: int, label: str) -> None:
    axes = new_figure(height=2.0).subplots()
    label_columns(axes, Columns(shown=np.asarray(shown)[::-1], note=""))
    ticks = [int(tick) for tick in axes.get_xticks()]
    assert len(ticks) == named
    assert [text.get_text() for text in axes.get_xticklabels()] == [str(shown[::-1][tick]) for tick in ticks]
    assert axes.get_xlabel() == label


def test_a_figure_that_fails_is_left_out_with_a_warning(
    synthetic: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(evaluation: Any, history: Any) -> None:
        raise ZeroDivisionError

    kinds = {"broken": FigureKind(name="broken", caption="", draw=broken), "losses": base._figures["losses"]}
    monkeypatch.setattr(base, "_figures", kinds)
    with caplog.at_level(logging.WARNING):
        drawn = draw_all(synthetic.tms(), synthetic.history(), tmp_path)
    assert [one.name for one in drawn] == ["losses"]
    assert "broken" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["losses.png"]


def test_two_figures_cannot_have_one_name() -> None:
    with pytest.raises(ValueError, match=r"losses is already drawn by spd_hydra\.figure\.losses"):
        figure("losses", "Another.")(lambda evaluation, history: None)


def test_drawing_leaves_matplotlib_as_it_was(synthetic: Any, tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams.copy())
    draw_all(synthetic.language_model(n_sites=1), synthetic.history(), tmp_path)
    assert dict(matplotlib.rcParams.copy()) == before


def test_matplotlib_is_loaded_only_to_draw_and_pyplot_never(tmp_path: Path) -> None:
    script = f"""
import sys, pathlib
import numpy as np
from spd_hydra.figure import draw_all
from spd_hydra.metric.evaluation import Evaluation, SiteEvaluation
assert "matplotlib" not in sys.modules, "loaded by the import"
ones = np.ones(3)
site = SiteEvaluation(weight=np.ones((2, 4)), V=np.ones((4, 3)), U=np.ones((3, 2)), mean_ci=ones,
                      density=ones, histogram=np.array([1, 2]), order=np.arange(3))
evaluation = Evaluation(step=1, n_positions=10, ci_threshold=0.1, metrics={{}}, sites={{"a": site}})
assert len(draw_all(evaluation, [], pathlib.Path({str(tmp_path)!r}))) == 5
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules, "pyplot was loaded"
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_language_models_and_residual_mlps_are_drawn_without_a_warning(
    synthetic: Any, tmp_path: Path
) -> None:
    mlp = draw_all(synthetic.resid_mlp(), synthetic.history(), tmp_path / "mlp")
    language = draw_all(synthetic.language_model(n_sites=9), [], tmp_path / "lm")
    assert {"neuron_contributions", "causal_importance"} <= {one.name for one in mlp}
    assert [one.name for one in language] == [
        "ablations",
        "sites",
        "ci_histogram",
        "mean_ci",
        "activation_density",
    ]


@pytest.mark.slow
def test_thirty_sites_are_drawn_readably_and_into_small_files(synthetic: Any, tmp_path: Path) -> None:
    evaluation = synthetic.language_model(n_sites=30, C=500)
    history = synthetic.history(sites=tuple(evaluation.sites), C=500)
    for row in history:
        if row["split"] == "eval":
            row |= {"ce/ci": 3.4 + row["step"] / 1e5, "l0/total": 400 - row["step"] / 50}
    drawn = draw_all(evaluation, history, tmp_path)
    assert [one.name for one in drawn] == [
        "ablations", "trade_off", "sites", "ci_histogram", "mean_ci", "activation_density", "losses",
        "sparsity",
    ]  # fmt: skip
    for one in drawn:
        data = one.path.read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        assert width <= 1700, one.name
        assert height <= 1700, one.name
        assert len(data) < 400_000, one.name


# ---- which apply ------------------------------------------------------------------------------------


def test_polygons_need_two_hidden_dimensions(synthetic: Any) -> None:
    assert draw_polygon(synthetic.resid_mlp(), []) is None


def test_heatmaps_need_probes(synthetic: Any) -> None:
    assert draw_causal_importance(synthetic.language_model(n_sites=1), []) is None


def test_scatter_needs_contributions(synthetic: Any) -> None:
    assert draw_contributions(synthetic.tms(), []) is None


def test_ablations_and_sites_are_for_models_without_a_known_answer(synthetic: Any) -> None:
    tms = synthetic.tms()
    assert draw_ablations(tms, []) is None
    assert draw_sites(tms, []) is None
    assert draw_trade_off(tms, synthetic.history()) is None
    assert draw_weights(synthetic.language_model(n_sites=5), []) is None


def test_curves_need_history(synthetic: Any) -> None:
    assert draw_losses(synthetic.tms(), []) is None
    assert draw_sparsity(synthetic.tms(), []) is None


# ---- what they show ---------------------------------------------------------------------------------


@pytest.mark.parametrize("solved", [True, False])
def test_heatmaps_show_the_probes_in_the_order_of_the_site(synthetic: Any, solved: bool) -> None:
    evaluation = synthetic.tms(solved=solved)
    images = _images(draw_causal_importance(evaluation, []))
    site = evaluation.sites["embed"]
    np.testing.assert_array_equal(images[0], site.probe_lower[:, site.order])
    site = evaluation.sites["unembed"]  # its upper-leaky ones differ beyond 1 alone, where colours end
    np.testing.assert_array_equal(images[1], site.probe_lower[:, site.order])
    assert len(images) == 2


def test_heatmaps_of_a_solved_run_are_the_identity(synthetic: Any) -> None:
    lower = _images(draw_causal_importance(synthetic.tms(), []))[0]
    np.testing.assert_allclose(lower[:, :5], np.eye(5), atol=0.04)


def test_heatmaps_name_the_input_magnitude_and_the_errors(synthetic: Any) -> None:
    texts = _texts(draw_causal_importance(synthetic.tms(solved=False), []))
    assert "magnitude 0.75" in texts
    assert "embed: identity of 5\nerrors 7 at tolerance 0.1, 6 at tolerance 0.2" in texts


def test_framed_entries_are_as_many_as_the_error(synthetic: Any) -> None:
    picture: Any = draw_causal_importance(synthetic.tms(solved=False), [])
    assert [len(axes.patches) for axes in picture.axes if axes.get_title()] == [7, 7]  # of two sites


def test_a_second_panel_is_drawn_where_it_has_other_colours(synthetic: Any) -> None:
    evaluation = synthetic.tms(solved=False)
    site = evaluation.sites["embed"]
    higher = np.array(site.probe_lower)
    higher[0, site.order[7]] = 0.9  # one entry
    evaluation.sites["embed"] = dataclasses.replace(site, probe_upper=higher)
    picture: Any = draw_causal_importance(evaluation, [])
    shown = [axes for axes in picture.axes if axes.get_title()]
    assert [axes.get_title()[:5] for axes in shown] == ["lower", "upper", "lower"]
    np.testing.assert_array_equal(shown[1].images[0].get_array(), higher[:, site.order])
    assert [len(axes.patches) for axes in shown] == [7, 0, 7]


def test_errors_that_are_too_many_to_frame_are_counted_in_the_title(synthetic: Any) -> None:
    evaluation = synthetic.resid_mlp()
    site = evaluation.sites["layers.0.mlp_in"]
    everything = np.ones_like(site.probe_lower)
    evaluation.sites["layers.0.mlp_in"] = dataclasses.replace(
        site, probe_lower=everything, probe_upper=everything
    )
    picture: Any = draw_causal_importance(evaluation, [])
    first, second = (axes for axes in picture.axes if axes.get_title())
    assert first.get_title() == "lower-leaky g (masks), 9,900 errors, too many to frame"  # 100 · 100 - 100
    assert len(first.patches) == 0
    assert second.get_title() == "lower-leaky g (masks)"
    assert len(second.patches) > 0


def test_weights_show_v_in_the_basis_of_the_features(synthetic: Any) -> None:
    evaluation = synthetic.tms()
    site = evaluation.sites["unembed"]
    V, U = balanced(site)
    images = _images(draw_weights(evaluation, []))  # V and U of embed, V and U of unembed, then colour bars
    shown = [image for image in images if image.shape[1] == 20]
    np.testing.assert_allclose(shown[2], (site.directions @ V)[:, site.order])
    np.testing.assert_allclose(shown[3], U.T[:, site.order])


def test_weight_colours_are_symmetric_about_zero(synthetic: Any) -> None:
    picture: Any = draw_weights(synthetic.tms(), [])
    limits = [image.get_clim() for axes in picture.axes for image in axes.images]
    assert all(low == -high for low, high in limits[:2]), limits


def test_balancing_equalises_norms_and_keeps_the_product() -> None:
    rng = np.random.default_rng(0)
    site = dataclasses.replace(
        _site(6, alive=[0]), V=rng.normal(size=(4, 6)) * 100, U=rng.normal(size=(6, 3))
    )
    V, U = balanced(site)
    np.testing.assert_allclose(V @ U, site.V @ site.U)
    np.testing.assert_allclose(np.linalg.norm(V, axis=0), np.linalg.norm(U, axis=1))


def test_balancing_blanks_a_subcomponent_without_a_product() -> None:
    site = dataclasses.replace(_site(2, alive=[0]), V=np.ones((4, 2)), U=np.array([[1.0, 1, 1], [0, 0, 0]]))
    V, U = balanced(site)
    assert np.isfinite(V).all()
    assert not V[:, 1].any()
    assert not U[1].any()


def test_plane_vectors_are_columns_of_the_embedding_and_rows_of_the_unembedding(synthetic: Any) -> None:
    sites = synthetic.tms().sites
    for name in ("embed", "unembed"):
        found = plane_vectors(sites[name])
        assert found is not None
        target, subcomponents = found
        np.testing.assert_allclose(target, sites["embed"].weight.T)
        np.testing.assert_allclose(
            subcomponents.sum(axis=0), (sites["embed"].V @ sites["embed"].U), atol=1e-12
        )


def test_polygon_names_the_largest_subcomponents_first(synthetic: Any) -> None:
    evaluation = synthetic.tms()
    picture: Any = draw_polygon(evaluation, [])
    titles = [axes.get_title() for axes in picture.axes[:10]]
    norms = [float(title.split(": ")[1].split(",")[0]) for title in titles[2:]]
    assert norms == sorted(norms, reverse=True)
    assert [title.endswith("dead") for title in titles[2:]] == [False] * 5 + [True] * 3
    assert "off by 1.1%" in titles[1]


def test_loss_curves_leave_out_terms_that_are_always_zero(synthetic: Any) -> None:
    picture: Any = draw_losses(synthetic.tms(), synthetic.history())
    labels = [text.get_text() for text in picture.legends[0].get_texts()]
    assert labels[0] == "total"
    assert "importance_minimality" in labels
    assert "faithfulness" not in labels
    assert "ci_masked_recon (eval)" in labels


def test_sparsity_draws_the_ideal_and_the_expected_counts(synthetic: Any) -> None:
    picture: Any = draw_sparsity(synthetic.tms(), synthetic.history())
    levels = [
        {float(line.get_ydata()[0]) for line in axes.lines if line.get_linestyle() == "--"}
        for axes in picture.axes
    ]
    assert levels == [{0.25}, {5.0}]
    assert [axes.get_xlim()[0] for axes in picture.axes] == [0, 0]
    assert [axes.texts[0].get_text() for axes in picture.axes] == ["0.25 (2 sites)", "5 (2 sites)"]
    assert "log scale" in picture.axes[0].get_ylabel()


def test_ablations_show_a_point_per_kind_of_mask_and_the_targets_line(synthetic: Any) -> None:
    evaluation = synthetic.language_model(n_sites=1)
    picture: Any = draw_ablations(evaluation, [])
    ce, kl = picture.axes
    names = [label.get_text() for label in ce.get_yticklabels()]
    assert names == [
        "unmasked", "stochastic", "ci", "rounded 0", "rounded 0.5", "random", "zero", "pgd 20", "pgd 320",
    ]  # fmt: skip
    points = {names[int(y)]: x for x, y in zip(*next(iter(ce.lines)).get_data(), strict=True)}
    assert points == {
        name.removeprefix("ce/").replace("_", " "): value
        for name, value in evaluation.metrics.items()
        if name.startswith("ce/") and name != "ce/target"
    }
    assert 3.212 in {float(np.atleast_1d(line.get_xdata())[0]) for line in ce.lines[1:]}
    assert {float(x) for x in kl.lines[0].get_xdata()} >= {0.83, 4.1}


def test_the_trade_off_has_a_point_per_evaluation(synthetic: Any) -> None:
    rows = [
        {"step": step, "split": "eval", "l0/total": 50.0 - step, "ce/ci": 3.0 + step / 10}
        for step in (0, 10, 20)
    ]
    train = [{"step": 5, "split": "train", "l0/total": 99.0}]
    picture: Any = draw_trade_off(synthetic.language_model(n_sites=1), [*rows, *train])
    line = picture.axes[0].lines[0]
    assert line.get_xdata().tolist() == [50.0, 40.0, 30.0]
    assert line.get_ydata().tolist() == [3.0, 4.0, 5.0]


def test_a_trade_off_needs_two_evaluations(synthetic: Any) -> None:
    rows = [{"step": 10, "split": "eval", "l0/total": 5.0, "ce/ci": 3.0}]
    assert draw_trade_off(synthetic.language_model(n_sites=1), rows) is None


@pytest.mark.parametrize(("least", "most"), [(0.055, 0.44), (0.03, 0.11), (0.011, 0.06), (2e-3, 0.09)])
def test_a_logarithmic_mean_ci_has_at_least_two_labels(synthetic: Any, least: float, most: float) -> None:
    evaluation = synthetic.language_model(n_sites=1, C=16)
    (name, site), *_ = evaluation.sites.items()
    own = dataclasses.replace(site, mean_ci=np.geomspace(most, least, 16))
    picture: Any = draw_mean_ci(dataclasses.replace(evaluation, sites={name: own}, ci_threshold=0.0), [])
    picture.canvas.draw()
    axis = picture.axes[1].yaxis
    low, high = picture.axes[1].get_ylim()
    shown = [tick for tick in axis.get_majorticklocs() if low <= tick <= high]
    assert len(shown) >= 2
    assert all(float(axis.get_major_formatter()(tick)) == pytest.approx(tick) for tick in shown)


def test_ticks_of_the_trade_off_are_whole_numbers_without_an_offset(synthetic: Any) -> None:
    rows = [
        {"step": step, "split": "eval", "l0/total": 5.0 - step, "mse/ci": 4.1585e-3 + 1e-8 * step}
        for step in range(4)
    ]
    picture: Any = draw_trade_off(synthetic.tms(), rows)
    picture.canvas.draw()
    assert picture.axes[0].yaxis.get_offset_text().get_text() == ""


def test_sites_show_alive_of_all_and_l0(synthetic: Any) -> None:
    evaluation = synthetic.language_model(n_sites=3, C=40)
    picture: Any = draw_sites(evaluation, [])
    left, right = picture.axes
    widths = [patch.get_width() for patch in left.patches]
    assert widths == [40] * 3 + [int((site.density > 0).sum()) for site in evaluation.sites.values()]
    np.testing.assert_allclose(
        [patch.get_width() for patch in right.patches],
        [site.density.sum() for site in evaluation.sites.values()],
    )


@pytest.mark.parametrize("draw", [draw_histogram, draw_mean_ci, draw_density])
def test_many_sites_are_strips_of_one_image(synthetic: Any, draw: Any) -> None:
    evaluation = synthetic.language_model(n_sites=13, C=30, d=4)
    picture = draw(evaluation, [])
    (image,) = [image for axes in picture.axes for image in axes.images if image.get_array().ndim == 2]
    assert image.get_array().shape[0] == 13
    assert [label.get_text() for label in picture.axes[0].get_yticklabels()] == [
        name.replace("$", r"\$") for name in evaluation.sites
    ]


# ---- the arithmetic behind --------------------------------------------------------------------------


def test_small_sites_are_shown_whole() -> None:
    order = list(reversed(range(60)))
    columns = columns_of(_site(60, alive=[3], order=order), expected=2)
    assert columns.shown.tolist() == order
    assert columns.note == ""


def test_large_sites_are_cropped_to_expected_and_alive_in_order() -> None:
    order = [5, 7, *[c for c in range(100) if c not in (5, 7)]]
    columns = columns_of(_site(100, alive=[7, 90, 20], order=order), expected=2)
    assert columns.shown.tolist() == [5, 7, 20, 90]
    assert columns.note == "96 subcomponents of 100 left out, none of them alive"


def test_the_note_says_when_alive_subcomponents_do_not_fit() -> None:
    columns = columns_of(_site(1000, alive=list(range(500))), expected=None)
    assert len(columns.shown) == 400
    assert columns.note == "600 subcomponents of 1,000 left out, 100 of them alive"


def test_a_large_dead_site_still_has_columns() -> None:
    assert len(columns_of(_site(100, alive=[]), expected=None).shown) == 60


@pytest.mark.parametrize(
    ("name", "expected", "importances", "error"),
    [
        ("identity", 2, [[1.0, 0.0, 0.0], [0.0, 0.9, 0.1]], 0),  # on the tolerance is not beyond it
        ("identity", 2, [[0.8, 0.0, 0.0], [0.0, 1.0, 0.0]], 1),
        ("identity", 2, [[1.0, 0.3, 0.0], [0.0, 0.5, 0.2]], 3),
        ("dense", 1, [[0.2, 0.0, 0.0], [0.95, 0.1, 0.0]], 0),
        ("dense", 2, [[0.2, 0.0, 0.0], [0.95, 0.1, 0.0]], 1),  # the second column has no entry near 1
        ("dense", 1, [[1.0, 0.3, 0.2], [1.0, 0.0, 0.5]], 3),
    ],
)
def test_wrong_entries_count_as_the_check_does(
    name: str, expected: int, importances: list[list[float]], error: int
) -> None:
    check = SiteCheck(name=name, site="a", tolerance=0.1, error=error, expected=expected)
    assert int(wrong_entries(check, np.array(importances)).sum()) == error


def test_density_bins_hold_every_subcomponent() -> None:
    density = np.array([0.0, 0.0, 1e-9, 0.05, 0.05, 1.0])
    dead, edges, counts = binned(density, n_positions=1000)
    assert (dead, int(counts.sum())) == (2, 4)
    assert edges[0] == pytest.approx(1e-3)
    assert counts[-1] == 1
    assert counts[0] == 1


def test_series_take_the_last_value_of_a_step_and_pass_over_nulls() -> None:
    rows = [
        {"step": 2, "split": "train", "loss/a": 1.0},
        {"step": 1, "split": "train", "loss/a": 5.0, "loss/b": None, "lr": 1},
        {"step": 2, "split": "train", "loss/a": 3.0},
        {"step": 2, "split": "eval", "loss/a": 9.0},
        {"step": 3, "split": "train", "loss/a": float("nan")},
    ]
    found = series(rows, "train", "loss")
    assert list(found) == ["a"]
    assert [array.tolist() for array in found["a"]] == [[1, 2], [5.0, 3.0]]


def test_thinning_keeps_the_first_and_the_last_point() -> None:
    steps, values = thinned((np.arange(10_000), np.arange(10_000.0)))
    assert len(steps) <= 1500
    assert (steps[0], steps[-1], values[-1]) == (0, 9999, 9999.0)
