import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from spd_hydra.report import sweep_rows, sweep_table, with_replicas, write_sweep
from spd_hydra.report.sweep import sweep_groups


def _job(sweep: Path, job: int, overrides: list[str], status: Any = None, summary: Any = None) -> None:
    directory = sweep / str(job)
    directory.mkdir(parents=True)
    (directory / "overrides.json").write_text(json.dumps(overrides))
    if status is not None:
        (directory / "status.json").write_text(status if isinstance(status, str) else json.dumps(status))
    if summary is not None:
        (directory / "summary.json").write_text(summary if isinstance(summary, str) else json.dumps(summary))


@pytest.fixture
def sweep(tmp_path: Path, synthetic: Any, summaries: Any) -> Path:
    """Six jobs: two solved, one not, one failed, one running, one that left nothing but its overrides."""
    directory = tmp_path / "2026-01-01_abc"
    for job, solved in enumerate([True, True, False]):
        summary = summaries.summary_of(synthetic.tms(solved=solved), seed=job)
        _job(directory, job, ["experiment=tms_5-2", f"seed={job}"], {"status": "done"}, summary)
    failed = {"status": "failed", "error": "\nRuntimeError: no room <b>left</b>\nTraceback …", "step": 3}
    _job(directory, 3, ["experiment=tms_5-2", "seed=3"], failed)
    _job(directory, 4, ["experiment=tms_40-10", "seed=0", "+train.steps=5"], {"status": "running", "step": 9})
    _job(directory, 10, ["experiment=tms_40-10", "seed=1", "+train.steps=5"])
    (directory / "0" / "report.html").write_text("report")
    (directory / "notes").mkdir()
    return directory


@pytest.fixture
def language_sweep(tmp_path: Path, synthetic: Any, summaries: Any) -> Path:
    """Two jobs of a language model, of which nobody knows the answer; at the second all off is no worse."""
    evaluation = synthetic.language_model(n_sites=2, C=50)
    for job, share in enumerate([{"ce_recovered": 0.95}, {}]):
        summary = summaries.summary_of(evaluation, "lm_tiny", seed=job)
        summary["target"]["measurements"] = []
        masks = {"ci": {"ce": 3.3, "kl": 0.25} | share, "zero": {"ce": 9.0 * bool(share), "kl": 6.0}}
        summary["ablations"] = {"target": {"ce": 3.0}, **masks}
        summary["objective"] = share.get("ce_recovered")
        _job(tmp_path, job, [f"seed={job}"], {"status": "done"}, summary)
    return tmp_path


def test_rows_are_in_the_order_of_the_jobs_with_their_states(sweep: Path) -> None:
    found = [(row.job, row.state, row.seed, row.solved) for row in sweep_rows(sweep)]
    assert found == [
        (0, "done", 0, True), (1, "done", 1, True), (2, "done", 2, False),
        (3, "failed", 3, None), (4, "running", 0, None), (10, "missing", 1, None),
    ]  # fmt: skip


def test_a_row_holds_totals_and_single_sites(sweep: Path) -> None:
    row = sweep_rows(sweep)[2]
    assert row.overrides == {"experiment": "tms_5-2", "seed": "2"}
    assert row.numbers["alive"] == 12
    assert row.numbers["alive.embed"] == 6
    assert row.numbers["l0"] == pytest.approx(2 * 0.687)
    assert row.numbers["error_0.1"] == 14
    assert row.numbers["loss"] == 4.1e-3


def test_a_row_holds_what_masks_of_causal_importances_keep(language_sweep: Path) -> None:
    first, second = (row.numbers for row in sweep_rows(language_sweep))
    assert (first["ce_recovered"], first["ce"], first["kl"]) == (0.95, 3.3, 0.25)
    assert (second["ce"], second["kl"]) == (3.3, 0.25)
    assert not {"ce_recovered", "mse", "mmcs"} & second.keys()


def test_a_share_that_is_not_there_is_no_number_for_a_sweeper(language_sweep: Path) -> None:
    first, second = sweep_rows(language_sweep)
    assert first.objective == 0.95
    assert math.isnan(second.objective)


def test_a_target_that_nothing_was_measured_of_is_neither_certified_nor_not(
    language_sweep: Path, sweep: Path
) -> None:
    assert [row.certified for row in sweep_rows(language_sweep)] == [None, None]
    assert sweep_rows(sweep)[0].certified is True


def test_a_secret_among_the_overrides_is_in_no_row(tmp_path: Path) -> None:
    _job(tmp_path, 0, ["seed=1", "+my.api_token=canary-4711"])
    given = {0: ["seed=1", "+my.api_token=canary-4711"]}
    for rows in (sweep_rows(tmp_path), sweep_rows(tmp_path, given)):
        assert rows[0].overrides == {"seed": "1", "my.api_token": "<redacted>"}


def test_a_failed_job_keeps_the_first_line_of_its_error(sweep: Path) -> None:
    assert sweep_rows(sweep)[3].error == "RuntimeError: no room <b>left</b>"


def test_jobs_that_never_began_are_listed_when_the_caller_knows_them(sweep: Path) -> None:
    rows = sweep_rows(sweep, {11: ["experiment=tms_5-2", "seed=9"]})
    assert (rows[-1].job, rows[-1].state, rows[-1].seed) == (11, "missing", 9)


def test_experiment_and_seed_as_planned_fill_in_for_jobs_without_a_summary(sweep: Path) -> None:
    _job(sweep, 11, ["train.steps=5"], {"status": "failed", "error": "early"})
    planned = {0: ("other", 7), 11: ("mine", 4), 12: ("mine", 5)}
    rows = {row.job: row for row in sweep_rows(sweep, {12: ["train.steps=6"]}, planned)}
    assert [(rows[job].experiment, rows[job].seed) for job in planned] == [
        ("tms_5-2", 0), ("mine", 4), ("mine", 5),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("status", "summary", "state"),
    [
        ("{half", None, "missing"),
        ({"status": "done"}, None, "failed"),
        ({"status": "done"}, '{"solved": tr', "failed"),
        ({"status": "failed", "error": "late"}, {"solved": True, "mmcs": 1.0}, "failed"),
    ],
)
def test_damaged_or_missing_files_never_count_as_done(
    tmp_path: Path, status: Any, summary: Any, state: str
) -> None:
    _job(tmp_path, 0, [], status, summary)
    (row,) = sweep_rows(tmp_path)
    assert (row.state, row.solved, row.numbers) == (state, None, {})


def test_groups_are_the_settings_without_the_seed(sweep: Path) -> None:
    first, second = sweep_groups(sweep_rows(sweep))
    assert first.label() == "experiment=tms_5-2"
    assert first.fraction == "2 of 3, 67 % [21, 94]"
    assert first.unfinished == "1 failed"
    assert first.spread["mmcs"] == "0.9705 ± 0.051"  # 0.9998, 0.9998, 0.912
    assert second.label() == "experiment=tms_40-10 train.steps=5"
    assert second.fraction == "–"
    assert second.unfinished == "1 missing, 1 running"


def test_the_csv_has_a_row_per_job_and_a_column_per_override(sweep: Path) -> None:
    path, _ = write_sweep(sweep, sweep_rows(sweep))
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["job"] for row in rows] == ["0", "1", "2", "3", "4", "10"]
    assert [row["state"] for row in rows] == ["done", "done", "done", "failed", "running", "missing"]
    assert rows[4]["train.steps"] == "5"
    assert rows[2]["solved"] == "False"
    assert rows[3]["solved"] == ""
    assert float(rows[0]["mmcs"]) == 0.9998
    assert rows[0]["report"] == "0/report.html"


def test_the_page_leaves_out_what_no_job_has_and_the_csv_does_not(language_sweep: Path) -> None:
    table, page = write_sweep(language_sweep, sweep_rows(language_sweep))
    _, text = page.read_text().split("<main>")
    groups, jobs = text[: text.index("<h2>Jobs</h2>")], text[text.index("<h2>Jobs</h2>") :]
    heads = "<th>CE recovered</th><th>CE</th><th>KL</th><th>alive</th>"
    assert f"<th>jobs</th>{heads}" in groups
    assert "<td>2</td><td>95 %</td><td>3.3 ± 0</td><td>0.25 ± 0</td>" in groups
    assert '<td data-value="0.95">95.0 %</td>' in jobs
    assert '<td data-value="">–</td>' in jobs
    assert not any(word in text for word in ("solved", "strict", "certified", "MMCS", "ML2R", "MSE"))
    with table.open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["solved"], first["strict"], first["certified"]) == ("", "", "")
    assert (first["ce_recovered"], second["ce_recovered"], second["kl"]) == ("0.95", "", "0.25")


def test_the_page_keeps_what_toys_have(sweep: Path) -> None:
    page = write_sweep(sweep, sweep_rows(sweep))[1].read_text()
    heads = ["job", "experiment", "train.steps", "seed", "state", "solved", "strict", "certified", "MMCS",
             "ML2R", "alive", "L0", "loss", "seconds", "steps/s"]  # fmt: skip
    assert re.findall('<button type="button">([^<]*)</button>', page) == heads
    first = "<th>jobs</th><th>solved, 95 % interval</th><th>MMCS</th><th>ML2R</th><th>alive</th><th>L0</th>"
    assert first in page


def test_the_page_shows_groups_jobs_and_errors_and_loads_nothing(sweep: Path) -> None:
    _, path = write_sweep(sweep, sweep_rows(sweep))
    page = path.read_text()
    assert page.index("2 of 3, 67 % [21, 94]") < page.index("<h2>Jobs</h2>") < page.index("<h2>Errors</h2>")
    assert 'href="0/report.html"' in page
    assert "no room &lt;b&gt;left&lt;/b&gt;" in page
    assert "//" not in page.replace("</", "")
    assert page.count("<tr><td data-value") == 6


def test_the_first_finding_of_an_unsolved_job_is_on_the_page_and_in_the_csv(
    tmp_path: Path, synthetic: Any, summaries: Any
) -> None:
    for job, solved in enumerate([True, False]):
        summary = summaries.summary_of(synthetic.tms(solved=solved), seed=job)
        found = [{"symptom": f"<b>{word}</b>", "advice": "try a=1", "site": None} for word in ("one", "two")]
        summary["diagnosis"] = [] if solved else found
        _job(tmp_path, job, [f"seed={job}"], {"status": "done"}, summary)
    table, page = write_sweep(tmp_path, sweep_rows(tmp_path))
    assert '<td>1</td><td class="text wrap">&lt;b&gt;one&lt;/b&gt;; try a=1</td>' in page.read_text()
    assert "two" not in page.read_text()
    with table.open(newline="") as file:
        assert [row["finding"] for row in csv.DictReader(file)] == ["", "<b>one</b>; try a=1"]


def test_hostile_overrides_stay_text(tmp_path: Path) -> None:
    _job(tmp_path, 0, ["a=<script>alert(1)</script>"], {"status": "failed", "error": "<script>"})
    _job(tmp_path, 1, ["a=b"])
    _, path = write_sweep(tmp_path, sweep_rows(tmp_path))
    assert path.read_text().count("<script>") == 1  # the page's own


def test_the_text_table_shows_jobs_groups_and_errors_in_100_columns(sweep: Path) -> None:
    table = sweep_table(sweep_rows(sweep, {12: ["experiment=" + "x" * 200, "seed=1"]}))
    lines = table.splitlines()
    assert max(map(len, lines)) <= 100
    assert any(line.split()[:4] == ["2", "experiment=tms_5-2", "done", "no"] for line in lines)
    assert any("solved 2 of 3, 67 % [21, 94]" in line and "1 failed" in line for line in lines)
    assert "  job 3: RuntimeError: no room <b>left</b>" in lines


def test_a_sweep_without_jobs_is_no_error(tmp_path: Path) -> None:
    rows = sweep_rows(tmp_path)
    write_sweep(tmp_path, rows)
    assert rows == []
    assert sweep_table(rows) == "no jobs\n"
    assert (tmp_path / "sweep.html").is_file()


def test_a_job_of_several_replicas_has_a_row_for_each(sweep: Path, synthetic: Any, summaries: Any) -> None:
    _job(sweep, 11, ["experiment=tms_5-2", "seed=7", "train.replicas=2"], {"status": "done"}, {"seed": 7})
    for replica, solved in enumerate([True, False]):
        summary = summaries.summary_of(synthetic.tms(solved=solved), seed=7 + replica)
        _job(sweep / "11", replica, [], {"status": "done"}, summary)
        (sweep / "11" / str(replica) / "config.yaml").write_text("")
    (sweep / "11" / "1" / "report.html").write_text("report")
    rows = with_replicas(sweep, sweep_rows(sweep))
    assert [row.folder for row in rows] == ["0", "1", "2", "3", "4", "10", "11/0", "11/1"]
    assert [(row.seed, row.solved, row.report) for row in rows[-2:]] == [
        (7, True, None),
        (8, False, "11/1/report.html"),
    ]
    assert rows[-1].overrides == {"experiment": "tms_5-2", "train.replicas": "2"}
    assert rows[-1].setting == rows[-2].setting
    assert "11/1" in sweep_table(rows)
    table, page = write_sweep(sweep, rows)
    written = list(csv.DictReader(table.read_text().splitlines()))
    assert [(row["job"], row["replica"]) for row in written][-2:] == [("11", "0"), ("11", "1")]
    assert '<a href="11/1/report.html">11/1</a>' in page.read_text()
