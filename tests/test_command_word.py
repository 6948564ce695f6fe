"""A word that is printed to be typed arrives as it was meant, through the shell and Hydra's grammar."""

import itertools
import shlex

import pytest

from spd_hydra.command_word import command_word, quoted
from spd_hydra.overrides import read

PIECES = [
    "a",
    "Z_9",
    "0",
    "-1",
    "1e3",
    "2026_11",
    "null",
    "true",
    "inf",
    ".",
    "..",
    "~",
    "$HOME",
    "ü",
    "模型",
]
PIECES += [
    " ",
    "\t",
    "=",
    "(1)",
    "[2]",
    "{b:c}",
    "#",
    "'",
    '"',
    "\\",
    "\\'",
    "\\\\",
    "&",
    ",",
    "a, b",
    ":",
    ";",
]
PIECES += ["*", "?", "!", "%", "@", "|", "+", "-", "x=1,2", "int(3)", "range(3)"]
TEXTS = [
    f"{first}{between}{last}" for first, last in itertools.product(PIECES, PIECES) for between in ("", "/")
]


def test_any_text_arrives_as_it_is() -> None:
    for text in [*PIECES, *TEXTS, *(f"/tmp/{piece}" for piece in PIECES)]:
        (word,) = shlex.split(command_word("resume", text))
        override = read(word)
        assert override is not None, text
        assert (override.key_or_group, override.value()) == ("resume", text)


def test_a_quoted_text_is_that_text_whatever_it_holds() -> None:
    for text in ["", *PIECES, *TEXTS]:
        override = read(f"key={quoted(text)}")
        assert override is not None, text
        assert override.value() == text


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("/data/outputs/tms_5-2/2026-01-02_03.04+x", "sweep=/data/outputs/tms_5-2/2026-01-02_03.04+x"),
        ("/tmp/ü (1)/x", "'sweep=\"/tmp/ü (1)/x\"'"),
        ("7", "'sweep=\"7\"'"),
    ],
)
def test_a_word_is_quoted_only_where_it_has_to_be(path: str, word: str) -> None:
    assert command_word("sweep", path) == word
