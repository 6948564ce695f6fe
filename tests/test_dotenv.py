"""A .env file fills gaps in the environment and its values show up nowhere else."""

import logging
import os
from pathlib import Path

import pytest

from spd_hydra.dotenv import load_dotenv, parse_dotenv


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("A=b", "b"),
        ("  A = b  ", "b"),
        ("export A=b", "b"),
        ("A=", ""),
        ("A=b # comment", "b"),
        ("A=# comment", ""),
        ("A=b#c", "b#c"),
        ("A=a=b==", "a=b=="),
        ("A='single $x \\n # kept'", "single $x \\n # kept"),
        ("A='x' # comment", "x"),
        ('A="two\\nlines \\"quoted\\" \\\\ # kept"', 'two\nlines "quoted" \\ # kept'),
        ('A="" # comment', ""),
        ("A=$HOME", "$HOME"),
        ("A=β", "β"),
    ],
)
def test_values_are_read_as_a_shell_user_expects(line: str, expected: str) -> None:
    assert parse_dotenv(line) == ({"A": expected}, [])


def test_comments_blank_lines_and_windows_line_ends_are_nothing() -> None:
    assert parse_dotenv("# A=1\r\n\r\n   # B=2\r\nC=3\r\n") == ({"C": "3"}, [])


def test_the_last_line_of_a_name_wins() -> None:
    assert parse_dotenv("A=1\nA=2") == ({"A": "2"}, [])


@pytest.mark.parametrize("line", ["A", "=b", "1A=b", "A b=c", "A='open", 'A="open', "A-B=c", "A='x' y"])
def test_unreadable_lines_are_named_by_number(line: str) -> None:
    assert parse_dotenv(f"B=1\n{line}\nC=2") == ({"B": "1", "C": "2"}, [2])


def test_what_the_environment_has_already_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPD_TEST_A", "outside")
    monkeypatch.setenv("SPD_TEST_B", "to be removed")
    monkeypatch.delenv("SPD_TEST_B")
    (tmp_path / ".env").write_text("\ufeffSPD_TEST_A=file\nSPD_TEST_B=file\n", encoding="utf-8")
    assert load_dotenv(tmp_path / ".env") == ["SPD_TEST_B"]
    assert (os.environ["SPD_TEST_A"], os.environ["SPD_TEST_B"]) == ("outside", "file")


def test_a_missing_file_is_nothing(tmp_path: Path) -> None:
    assert load_dotenv(tmp_path / ".env") == []


def test_warnings_never_show_a_value(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / ".env").write_text("SPD_TEST_TOKEN canary-4711\n")
    with caplog.at_level(logging.DEBUG):
        assert load_dotenv(tmp_path / ".env") == []
    assert "Line 1" in caplog.text
    assert "canary" not in caplog.text


@pytest.mark.parametrize("make", [lambda p: p.mkdir(), lambda p: p.write_bytes(b"A=\xff\xfe\n")])
def test_an_unreadable_file_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, make: object
) -> None:
    assert callable(make)
    make(tmp_path / ".env")
    assert load_dotenv(tmp_path / ".env") == []
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(tmp_path / ".env") in caplog.text
