"""The second table of a sweep: its toys beside what is published of them."""

from typing import Any

import pytest

from spd_hydra.report import published_table, write_sweep
from spd_hydra.report.published import HEADER, beside_the_paper, published_of
from spd_hydra.report.sweep import SweepRow


def row(
    job: int, experiment: str, seed: int, *, mmcs: float = 1.0, ml2r: float = 1.0, **others: Any
) -> SweepRow:
    values = {"state": "done", "solved": True, "strict": True, "numbers": {"mmcs": mmcs, "ml2r": ml2r}}
    given = {"experiment": experiment, "seed": str(seed), **others.pop("overrides", {})}
    return SweepRow(job=job, experiment=experiment, seed=seed, overrides=given, **(values | others))


def test_a_toy_stands_above_what_is_published_of_it() -> None:
    rows = [
        row(0, "tms_5-2", 0, mmcs=0.999, ml2r=0.99),
        row(1, "tms_5-2", 1, mmcs=0.998, ml2r=1.01, strict=False),
        row(2, "tms_5-2", 2, mmcs=0.994, ml2r=1.03, solved=False, strict=False),
        row(3, "tms_5-2", 3, state="failed", solved=None, strict=None, numbers={}),
    ]
    # mean 0.997, deviations 0.002, 0.001, -0.003: √(14e-6 / 2) = 0.00265; 1.01 ± √(8e-4 / 2) = 0.02.
    # Wilson: 2 of 3 and 77 of 90 by its formula with z² = 3.841459.
    assert beside_the_paper(rows) == [
        ["tms_5-2", "here", "0–2", "2 of 3, 67 % [21, 94]", "1", "0.997 ± 0.003", "1.010 ± 0.020"],
        ["", "paper", "–", "77 of 90, 86 % [77, 91]", "–", "1.000", "0.993 ± 0.002"],
    ]


@pytest.mark.parametrize(
    ("toy", "mmcs", "ml2r", "solved"),
    [
        ("tms_5-2", "1.000", "0.993 ± 0.002", (90 - 13, 90)),
        ("tms_40-10", "1.000", "1.010 ± 0.007", (19 - 4, 19)),
        ("tms_5-2-id", "1.000", "0.992 ± 0.010", None),
        ("tms_40-10-id", "1.000", "1.031 ± 0.001", None),
    ],
)
def test_both_settings_of_a_toy_compare_with_table_1(
    toy: str, mmcs: str, ml2r: str, solved: tuple[int, int] | None
) -> None:
    for experiment in (toy, f"paper/{toy}"):
        published = published_of(experiment)
        assert published is not None
        assert (f"{published.mmcs:.3f}", published.ml2r_text, published.solved) == (mmcs, ml2r, solved)


@pytest.mark.parametrize("experiment", ["resid_mlp1", "paper/resid_mlp3", "tms_5-2-untied", "mine", None])
def test_of_the_others_nothing_is_published(experiment: str | None) -> None:
    assert published_of(experiment) is None


def test_an_experiment_of_which_nothing_is_published_has_a_line_without_the_papers() -> None:
    rows = [
        row(0, "paper/tms_40-10-id", 4, mmcs=0.5),
        row(1, "paper/resid_mlp1", 4, solved=None, strict=None),
    ]
    cells = beside_the_paper(rows)
    assert [line[:4] for line in cells] == [
        ["paper/tms_40-10-id", "here", "4", "1 of 1, 100 % [21, 100]"],
        ["", "paper", "–", "–"],
        ["paper/resid_mlp1", "here", "4", "–"],
    ]
    assert cells[0][5] == "0.500"  # of one seed there is no deviation
    assert cells[2][4] == "–"


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [row(0, "resid_mlp1", 0)],
        [row(0, "tms_5-2", 0, state="failed"), row(1, "resid_mlp1", 0)],
    ],
)
def test_without_a_finished_job_to_compare_there_is_no_table(rows: list[SweepRow]) -> None:
    assert (beside_the_paper(rows), published_table(rows)) == ([], "")


def test_what_varies_besides_seed_and_experiment_makes_lines_of_its_own() -> None:
    rows = [row(n, "tms_5-2", n % 2, overrides={"train.lr": "1e-3" if n < 2 else "2e-3"}) for n in range(4)]
    own = [line for line in beside_the_paper(rows) if line[1] == "here*"]
    assert [line[0] for line in own] == ["tms_5-2 train.lr=1e-3", "tms_5-2 train.lr=2e-3"]
    assert [line[2] for line in own] == ["0–1", "0–1"]


@pytest.mark.parametrize(
    "overrides",
    [{"debug": "smoke"}, {"model": "tms_40-10"}, {"model.n_features": "6"}, {"train.steps": "20"}],
)
def test_another_toy_or_a_run_cut_short_is_not_beside_the_paper(overrides: dict[str, str]) -> None:
    other = row(0, "tms_5-2", 0, overrides=overrides)
    assert beside_the_paper([other]) == []
    mixed = beside_the_paper([other, row(1, "tms_40-10", 0)])
    assert [line[1] for line in mixed] == ["here*", "here", "paper"]


def test_other_settings_than_an_experiments_own_are_marked_and_explained() -> None:
    changed = row(0, "tms_5-2", 0, overrides={"loss.importance_minimality.coeff": "1e-3"})
    told = row(0, "tms_5-2", 0, overrides={"eval.every": "5", "logger": "wandb", "debug": "none"})
    assert [line[1] for line in beside_the_paper([changed])] == ["here*", "paper"]
    assert "*: with other settings than the experiment's own" in published_table([changed])
    assert [line[1] for line in beside_the_paper([told])] == ["here", "paper"]
    assert "*:" not in published_table([told])


def test_one_key_without_room_is_named_once_below_the_table() -> None:
    key = "loss.importance_minimality.coeff"
    rows = [row(n, "tms_5-2", 0, overrides={key: value}) for n, value in enumerate(["0.0006", "0.006"])]
    lines = [line.strip() for line in published_table(rows).splitlines()]
    own = [line for line in lines if " here* " in line]
    assert [line.split()[:2] for line in own] == [["tms_5-2", "0.0006"], ["tms_5-2", "0.006"]]
    assert f"behind the experiment: {key}." in lines


def test_the_table_for_the_terminal_says_its_sources_in_100_columns() -> None:
    rows = [
        row(n, "paper/tms_40-10-id", n, overrides={"a.long.key": "x" * 60 + str(n % 2)}) for n in range(20)
    ]
    rows += [row(20 + n, "tms_5-2", 2 * n) for n in range(9)]
    lines = published_table(rows).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0].split() == list(HEADER)
    assert any("arXiv 2506.20790, Table 1" in line for line in lines)


def test_settings_of_two_long_keys_are_told_apart_for_the_terminal_and_whole_on_the_page() -> None:
    keys = ["loss.importance_minimality.coeff", "loss.pgd_recon_subset.coeff"]
    rows = [
        row(n, "tms_5-2", 0, overrides={keys[0]: str(0.001 * (1 + n // 2)), keys[1]: str(n % 2 / 2)})
        for n in range(4)
    ]
    starts = [line.split("  ")[0] for line in published_table(rows).replace("\n  ", "\n").splitlines()]
    wanted = {
        f"tms_5-2 importance_minimality.coeff={a} pgd_recon_subset.coeff={b}"
        for a in ("0.001", "0.002")
        for b in ("0.0", "0.5")
    }
    assert wanted <= set(starts)
    assert beside_the_paper(rows)[0][0] == f"tms_5-2 {keys[0]}=0.001 {keys[1]}=0.0"


def test_the_page_of_a_sweep_has_the_table_where_there_is_something_to_compare(tmp_path: Any) -> None:
    _, page = write_sweep(tmp_path, [row(0, "tms_5-2", 0), row(1, "resid_mlp1", 0)])
    text = page.read_text()
    assert "<h2>Beside the paper</h2>" in text
    assert text.count('<td class="text">paper</td>') == 1
    assert "0.993 ± 0.002" in text
    _, page = write_sweep(tmp_path, [row(0, "resid_mlp1", 0)])
    assert "Beside the paper" not in page.read_text()
