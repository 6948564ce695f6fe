"""The printed command that goes on with a run."""

import shlex
from pathlib import Path

import pytest

from spd_hydra.composition import compose
from spd_hydra.going_on import going_on


def test_a_run_alone_needs_its_directory_only() -> None:
    assert going_on(Path("/there/0"), compose([]).launcher, 1) == "spd-run resume=/there/0"


def test_ranks_are_asked_for_again() -> None:
    launcher = compose(["launcher.ranks_per_node=2"]).launcher
    assert going_on(Path("/there/0"), launcher, 2) == "spd-run resume=/there/0 launcher.ranks_per_node=2"


@pytest.mark.parametrize(
    "words",
    [
        ["launcher=local_parallel", "launcher.jobs=3"],
        ["launcher=slurm", "launcher.partition=gpu", "launcher.time=90", "launcher.qos='a,b'"],
        ["launcher=slurm", "launcher.setup=['source ~/it\\'s here.sh', 'a, \"b\"']", "launcher.account=null"],
        ["launcher=slurm", "++launcher.additional={comment: 'two words', exclusive: true}"],
    ],
)
def test_the_words_of_a_launcher_make_the_same_one_after_the_shell(words: list[str]) -> None:
    launcher = compose(words).launcher
    command, resume, *again = shlex.split(going_on(Path("/there/a b"), launcher, 1))
    assert (command, resume) == ("spd-run", 'resume="/there/a b"')
    assert compose(again).launcher == launcher


def test_words_that_hydra_reads_as_they_are_have_no_quotes() -> None:
    launcher = compose(["launcher=slurm", "launcher.partition=gpu"]).launcher
    assert going_on(Path("/there/0"), launcher, 1).endswith(" launcher=slurm launcher.partition=gpu")
