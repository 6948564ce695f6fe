"""The table of a sweep as the terminal shows it, of rows made by hand."""

import dataclasses
from typing import Any

from spd_hydra.report import sweep_table
from spd_hydra.report.sweep import SweepRow

COEFF = "loss.importance_minimality.coeff"
SHORT = "importance_minimality.coeff"  # where the whole key has no room
# Printed by `spd-run -m debug=smoke 'seed=range(3)'` before there were sweeps of language models.
TOY = """
  job  setting  state  solved  seed    MMCS    ML2R  alive      L0      loss  seconds
  ───  ───────  ─────  ──────  ────  ──────  ──────  ─────  ──────  ────────  ───────
  0    tms_5-2  done   no         0  0.9697  0.3139     12  0.7656  0.001637   2.7330
  1    tms_5-2  done   no         1  0.9683  0.3269      5  0.2656  9.26e-04   0.3556
  2    tms_5-2  done   no         2  0.9991  0.5806      8  0.2188  9.84e-04   0.3522

  debug=smoke: solved 0 of 3, 0 % [0, 56]; MMCS 0.979 ± 0.017
"""


def toy(job: int, **others: Any) -> SweepRow:
    mmcs, ml2r, alive, l0, loss, seconds = [
        (0.9697, 0.3139, 12, 0.7656, 0.001637, 2.733),
        (0.9683, 0.3269, 5, 0.2656, 9.26e-04, 0.3556),
        (0.9991, 0.5806, 8, 0.2188, 9.84e-04, 0.3522),
    ][job]
    numbers = {"mmcs": mmcs, "ml2r": ml2r, "alive": alive, "l0": l0, "loss": loss, "seconds": seconds}
    given = {"debug": "smoke", "seed": str(job)}
    own = {"state": "done", "solved": False, "numbers": numbers, "overrides": given, "experiment": "tms_5-2"}
    return SweepRow(job=job, seed=job, **(own | others))


def language(job: int, coeff: str, share: float | None, **others: Any) -> SweepRow:
    numbers = {"ce": 3.3, "kl": 0.25 + job / 100, "alive": 40, "l0": 12.5, "loss": 0.2, "seconds": 60.0}
    numbers |= {} if share is None else {"ce_recovered": share}
    given = {COEFF: coeff, "seed": str(job)}
    own = {"state": "done", "numbers": numbers, "overrides": given, "experiment": "lm_tiny"}
    return SweepRow(job=job, seed=job, **(own | others))


def cells(rows: list[SweepRow]) -> list[list[str]]:
    return [line.split() for line in sweep_table(rows).splitlines()]


def test_the_table_of_toys_is_what_it_was() -> None:
    assert sweep_table([toy(job) for job in range(3)]) == TOY


def test_a_language_models_table_shows_what_masked_models_keep_and_nothing_that_nobody_has() -> None:
    rows = [language(0, "1e-4", 0.95), language(1, "1e-4", 0.93), language(2, "1e-3", 0.8)]
    found = cells(rows)
    assert " ".join(found[1]) == "job setting state seed recovered CE KL alive L0 loss seconds"
    assert " ".join(found[3][2:]) == "done 0 95.0 % 3.3000 0.2500 40 12.5 0.2000 60"
    assert max(map(len, sweep_table(rows).splitlines())) <= 100
    # mean 0.94 ± √(2 · 0.01²) = 0.0141, and 0.255 ± √(2 · 0.005²) = 0.0071
    assert sweep_table(rows).splitlines()[7:9] == [
        f"  {SHORT}=1e-4: CE recovered 94 ± 1.4 %; KL 0.255 ± 0.0071",
        f"  {SHORT}=1e-3: CE recovered 80 %; KL 0.2700",
    ]


def test_a_job_without_a_share_has_a_dash_beside_those_that_have_one() -> None:
    found = cells([language(0, "1e-4", None), language(1, "1e-3", 0.5)])
    assert found[3][4:7] == ["–", "3.3000", "0.2500"]
    assert found[4][4:7] == ["50.0", "%", "3.3000"]
    assert f"{SHORT}=1e-4: KL 0.2500" in sweep_table([language(0, "1e-4", None), language(1, "1e-3", 0.5)])


def test_a_suite_of_toys_and_language_models_has_the_columns_of_both() -> None:
    found = cells([toy(0), language(1, "1e-3", 0.5)])
    header = "job setting state solved seed MMCS ML2R recovered CE KL alive L0 loss seconds"
    assert " ".join(found[1]) == header


def test_while_nothing_is_done_the_columns_of_verdicts_wait() -> None:
    rows = [toy(0, state="running", solved=None, numbers={}), toy(1, state="failed", solved=None, numbers={})]
    assert cells(rows)[1] == TOY.splitlines()[1].split()
    assert "  debug=smoke: solved –; 1 failed, 1 running" in sweep_table(rows).splitlines()


PGD = "loss.pgd_recon_subset.coeff"


def over_two_keys() -> list[SweepRow]:
    settings = [(first, second) for first in ("0.001", "0.01") for second in ("0", "0.5")]
    return [
        dataclasses.replace(toy(job % 3), job=job, overrides={COEFF: first, PGD: second})
        for job, (first, second) in enumerate(settings)
    ]


def test_settings_of_two_long_keys_are_all_told_and_told_apart() -> None:
    lines = sweep_table(over_two_keys()).splitlines()
    wanted = [
        f"importance_minimality.coeff={first} pgd_recon_subset.coeff={second}"
        for first in ("0.001", "0.01")
        for second in ("0", "0.5")
    ]
    for job, text in enumerate(wanted):
        assert sum(f"  {text}  " in line and line.split()[0] == str(job) for line in lines) == 1
        assert sum(line.startswith(f"  {text}: solved") for line in lines) == 1


def test_one_key_that_varies_is_the_title_of_its_column_by_its_last_two_parts() -> None:
    rows = [toy(n, overrides={"decomposition.sites.embed.ci_fn.hidden": str(n)}) for n in range(2)]
    lines = sweep_table(rows).splitlines()
    assert [line.split()[1] for line in (lines[1], *lines[3:5])] == ["ci_fn.hidden", "0", "1"]
    assert [line.split(":")[0].strip() for line in lines[6:8]] == ["ci_fn.hidden=0", "ci_fn.hidden=1"]


def test_one_key_without_room_above_its_values_is_named_whole_below_the_table() -> None:
    rows = [toy(n, overrides={COEFF: value}) for n, value in enumerate(["0.0006", "0.006"])]
    lines = sweep_table(rows).splitlines()
    assert [line.split()[1] for line in (lines[1], *lines[3:5])] == ["setting", "0.0006", "0.006"]
    assert [line.split(":")[0].strip() for line in lines[6:8]] == [f"{SHORT}=0.0006", f"{SHORT}=0.006"]
