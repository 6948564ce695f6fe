"""`spd-run --help` teaches: examples that work, every preset, every key."""

import re
import shlex
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from spd_hydra.composer import Composer
from spd_hydra.composition import compose
from spd_hydra.config import sections
from spd_hydra.saved_config import to_yaml
from spd_hydra.section import registered
from spd_hydra.suite import expanded

Call = Callable[..., Any]


@pytest.fixture
def text(spd_run: Call) -> str:
    ended = spd_run("--help")
    assert ended.code == 0
    return str(ended.out)


def test_every_key_of_every_section_has_a_line(text: str) -> None:
    # "loss.ci_masked_recon.* … keys as loss.stochastic_recon.*" stands for keys that are listed there
    listed = set(re.findall(r"^    ([\w.<>]+) {2,}\S", text, flags=re.MULTILINE))
    alike = dict(re.findall(r"^    ([\w.<>]+)\.\* .*keys as ([\w.<>]+)\.\*$", text, flags=re.MULTILINE))
    for overrides in (
        ["experiment=tms_5-2"],
        ["experiment=resid_mlp2", "logger=wandb"],
        ["ci_fn=vector_mlp"],
    ):
        for prefix, section in sections(compose(overrides)):
            where = re.sub(r"^decomposition\.sites\.\w+", "decomposition.sites.<name>", prefix)
            where = alike.get(where, where)
            for name, value in vars(section).items():
                is_section = hasattr(value, "problems") or name in {"sites", "identities", "extra"}
                assert is_section or f"{where}.{name}".lstrip(".") in listed, f"{prefix}.{name} has no line"


def test_every_kind_of_a_pluggable_section_is_listed(text: str) -> None:
    for group in ("model", "data", "ci_fn", "logger"):
        for kind in registered(group):
            assert f"{group} of kind {kind}: " in text


def test_every_experiment_has_a_meaning(text: str) -> None:
    table = text.partition("EXPERIMENTS")[2].partition("\nGROUPS")[0].strip().splitlines()[1:]
    assert len(table) == 19
    assert all(re.fullmatch(r"  \S+ {2,}\S.*", line) for line in table)


def test_meaning_default_and_range_stand_in_one_line(text: str) -> None:
    (line,) = re.findall(r"^    train\.batch_size .*$", text, flags=re.MULTILINE)
    assert line.split(maxsplit=2) == ["train.batch_size", "256", "rows of the global batch (≥ 1)"]


def test_every_choice_among_names_is_listed(text: str) -> None:
    lines = {line.split()[0]: line for line in text.splitlines() if line.startswith("    ") and line.split()}
    choices = [
        (
            re.sub(r"^decomposition\.sites\.\w+", "decomposition.sites.<name>", f"{prefix}.{name}").lstrip(
                "."
            ),
            value,
        )
        for prefix, section in sections(compose([]))
        for name, value in vars(section).items()
        if isinstance(value, Enum)
    ]
    assert len(choices) > 8
    for key, value in choices:
        if key in lines:  # else it is like another section, see above
            names = set(re.findall(r"\w+", lines[key].partition(value.name)[2]))
            assert {member.name for member in type(value)} <= names, f"{key} does not say what it may be"


def test_a_mapping_is_shown_as_it_would_be_typed(text: str) -> None:
    (line,) = re.findall(r"^    decomposition\.tied .*$", text, flags=re.MULTILINE)
    assert line.split()[1] == "{unembed:embed}"


def test_the_examples_can_be_composed(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(compose([])))  # of a run to go on with
    found = re.findall(r"^  spd-run(?: {3,}| )(.*?)(?: {3,}|$)", text, flags=re.MULTILINE)
    examples = [shlex.split(words.replace("<run dir>", str(tmp_path))) for words in found]
    assert len(examples) >= 8
    for words in examples:
        typed = [
            word for word in words if "=" in word and "<" not in word and "," not in word and "(" not in word
        ]
        with Composer.open() as composer:  # a suite stands for the words of a sweep
            single = [word for word in expanded(composer, typed) if "," not in word]
        assert compose(single).name
