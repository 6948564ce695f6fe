"""Short names of sites, for paths of several families of models."""

import dataclasses
from typing import Any

import pytest

from spd_hydra.figure.activation_density import draw as draw_density
from spd_hydra.figure.ci_histogram import draw as draw_histogram
from spd_hydra.figure.mean_ci import draw as draw_mean_ci
from spd_hydra.figure.site_names import site_labels
from spd_hydra.figure.sites import draw as draw_sites
from spd_hydra.figure.sparsity import draw as draw_sparsity

BLOCKS = range(12)
SELF_ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]


def paths(block: str, parts: list[str], *others: str) -> list[str]:
    return [*(f"{block.format(i)}.{part}" for i in BLOCKS for part in parts), *others]


BERT = paths(
    "bert.encoder.layer.{}",
    ["attention.self.query", "attention.self.key", "attention.output.dense", "output.dense"],
    "bert.pooler.dense",
    "cls.predictions.transform.dense",
)
FAMILIES = {
    "gpt2": paths("transformer.h.{}", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"], "lm_head"),
    "llama": paths("model.layers.{}", [*SELF_ATTENTION, "mlp.gate_proj", "mlp.down_proj"], "lm_head"),
    "bert": BERT,
    "t5": [
        name
        for stack in ("encoder", "decoder")
        for name in paths(
            f"{stack}.block.{{}}.layer", ["0.SelfAttention.q", "1.EncDecAttention.q", "2.DenseReluDense.wi_0"]
        )
    ],
    "gemma3": [
        *paths("model.language_model.layers.{}", SELF_ATTENTION),
        *paths("model.vision_tower.vision_model.encoder.layers.{}", SELF_ATTENTION),
        "model.multi_modal_projector.mm_input_projection",
    ],
    "mixtral": paths(
        "model.layers.{}",
        [f"block_sparse_moe.experts.{expert}.w{w}" for expert in range(8) for w in (1, 2, 3)],
    ),
}
LIMITS = (30, 34, 40)  # those of the figures


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_different_sites_have_different_names_that_fit(family: str, limit: int) -> None:
    labels = site_labels(FAMILIES[family], limit)
    assert list(labels) == FAMILIES[family]
    assert len(set(labels.values())) == len(labels)
    assert max(map(len, labels.values())) <= limit


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_numbers_of_blocks_are_never_cut(family: str, limit: int) -> None:
    for name, label in site_labels(FAMILIES[family], limit).items():
        numbers = [part for part in name.split(".") if part.isdecimal()]
        assert [part for part in label.replace("…", ".").split(".") if part.isdecimal()] == numbers


def test_names_that_fit_stay_as_they_are() -> None:
    names = ["layers.0.mlp_in", "layers.0.mlp_out"]
    assert site_labels(names, 16) == dict(zip(names, names, strict=True))
    assert site_labels([], 16) == {}


def test_a_common_beginning_goes_in_whole_parts() -> None:
    names = ["model.layers.10.self_attn.q_proj", "model.layers.11.self_attn.q_proj", "model.layers.1.x"]
    assert list(site_labels(names, 20).values()) == ["10.self_attn.q_proj", "11.self_attn.q_proj", "1.x"]
    assert list(site_labels(["a.first.long", "a.first"], 10).values()) == ["first.long", "first"]


def test_what_stands_before_the_number_goes_before_anything_else() -> None:
    names = ["bert.encoder.layer.10.attention.output.dense", "cls.dense"]
    assert list(site_labels(names, 34).values()) == ["bert…10.attention.output.dense", "cls.dense"]


def test_the_longest_part_without_a_digit_is_cut_first() -> None:
    assert list(site_labels(["h1.attention.key"], 14).values()) == ["h1.att…ion.key"]
    assert list(site_labels(["h10.query.projection"], 13).values()) == ["h10.q…ry.p…on"]
    assert list(site_labels(["h123456789.key"], 10).values()) == ["h1…789.key"]  # nothing else is left


def test_names_that_cutting_would_make_alike_get_more_room() -> None:
    names = [f"{'x' * 20}{middle}{'y' * 20}" for middle in "ab"]
    labels = site_labels(names, 10)
    assert len(set(labels.values())) == 2
    ways = [f"{stack}.layer.0.{'q' * 30}" for stack in ("same.one", "same.other")]
    assert len(set(site_labels([*ways, "else"], 20).values())) == 3


def evaluation_of(synthetic: Any, names: list[str]) -> Any:
    evaluation = synthetic.language_model(n_sites=len(names), C=20, d=4)
    return dataclasses.replace(
        evaluation, sites=dict(zip(names, evaluation.sites.values(), strict=True)), text=None
    )


def shown(picture: Any) -> list[str]:
    """Texts of panels, rows and legends; of a panel's title the first line."""
    texts = [text.get_text() for legend in picture.legends for text in legend.get_texts()]
    for axes in picture.axes:
        rows = [] if axes.get_yscale() == "log" else [text.get_text() for text in axes.get_yticklabels()]
        texts += [axes.get_title().partition("\n")[0], *rows]
    return texts


@pytest.mark.parametrize(
    ("draw", "number", "limit"),
    [
        *((draw_histogram, 8, 34), (draw_mean_ci, 8, 30), (draw_density, 8, 34), (draw_sparsity, 8, 30)),
        *((draw, 20, 40) for draw in (draw_histogram, draw_mean_ci, draw_density, draw_sites)),
    ],
)
def test_a_figure_names_each_site_once_and_no_two_alike(
    synthetic: Any, draw: Any, number: int, limit: int
) -> None:
    names = BERT[-number:]  # the last blocks and beyond
    picture = draw(evaluation_of(synthetic, names), synthetic.history(sites=tuple(names)))
    labels = site_labels(names, limit).values()
    assert len(set(labels)) == number
    assert sorted(text for text in shown(picture) if text in labels) == sorted(labels)
