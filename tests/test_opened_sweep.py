"""A sweep opened from Python: rows of a table and runs, read anew from the runs."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import Call, spd_run  # noqa: F401 (a fixture)

from spd_hydra import Run, load_run, load_sweep
from spd_hydra.opened_sweep import plain_value
from spd_hydra.section import ConfigError

GUIDE = Path(__file__).parents[1] / "docs" / "guide" / "sweeps.md"


def test_what_an_override_says_is_a_plain_value() -> None:
    texts = ["1e-3", "7", "-0.5", "true", "false", "null", "vpd", "[1,2]"]
    assert [plain_value(text) for text in texts] == [1e-3, 7, -0.5, True, False, None, "vpd", "[1,2]"]
    assert [type(plain_value(text)) for text in ("7", "7.0")] == [int, float]


@pytest.fixture
def sweep(spd_run: Call) -> Path:  # noqa: F811
    """Two rates, one of which no run survives, and two seeds, one of whose jobs is then lost."""
    spd_run("-m", "debug=smoke", "train.lr=1e-3,1e30", "seed=0,1", "train.restarts.number=1")
    (path,) = Path("outputs/sweeps").iterdir()
    (path / "1" / "status.json").unlink()
    return path.absolute()


@pytest.mark.slow
def test_the_rows_of_a_sweep_are_read_from_its_runs_and_what_is_not_done_is_told(
    sweep: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (sweep / "sweep.csv").write_text("stale")
    summary = json.loads((sweep / "0" / "summary.json").read_text())
    summary["mmcs"] = 0.125  # as of a run that was measured again since
    (sweep / "0" / "summary.json").write_text(json.dumps(summary))
    opened = load_sweep(sweep)
    rows = opened.rows
    assert [(row["folder"], row["state"], row["train.lr"], row["seed"]) for row in rows] == [
        ("0", "done", 1e-3, 0),
        ("1", "missing", 1e-3, 1),
        ("2", "failed", 1e30, 0),
        ("3", "failed", 1e30, 1),
    ]
    assert len({tuple(row) for row in rows}) == 1
    assert (rows[0]["mmcs"], rows[0]["alive"], rows[0]["error"]) == (
        0.125,
        sum(summary["alive"].values()),
        None,
    )
    assert rows[2]["mmcs"] is None
    assert rows[2]["error"]
    assert repr(opened) == f"Sweep(4 runs: 1 done, 1 missing, 2 failed, {str(sweep)!r})"
    (told,) = [record.message for record in caplog.records if record.name == "spd_hydra.opened_sweep"]
    assert told.startswith(
        f"3 runs of {sweep} not done: 1 missing; 2 failed ({rows[2]['error']}); 3 failed ("
    )
    runs = opened.runs
    assert {folder: (run.config.seed, run.config.train.lr) for folder, run in runs.items()} == {
        "0": (0, 1e-3),
        "1": (1, 1e-3),
        "2": (0, 1e30),
        "3": (1, 1e30),
    }
    assert runs["0"].summary["mmcs"] == 0.125
    assert isinstance(runs["0"], Run)
    with pytest.raises(ConfigError) as caught:
        load_run(sweep)
    assert str(caught.value) == (
        f"{sweep} is a sweep: open it with load_sweep, or one of its runs, {sweep / '0'}"
    )
    (block,) = re.findall(
        r"```python\n(from spd_hydra import load_sweep.*?)```", GUIDE.read_text(), re.DOTALL
    )
    names: dict[str, Any] = {}
    exec(block.replace("outputs/sweeps/<time>_<id>", str(sweep)), names)
    assert names["lost"] == ["1", "2", "3"]
    assert names["found"] == {1e-3: [0.125]}


def test_a_directory_that_holds_no_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no directory of a sweep: it holds no sweep\.json"):
        load_sweep(tmp_path)
