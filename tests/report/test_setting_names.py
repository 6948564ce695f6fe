"""Short names of keys, and texts of settings in little room."""

import itertools

import pytest

from spd_hydra.report.setting_names import fitted, short_names


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        (["loss.importance_minimality.coeff"], ["importance_minimality.coeff"]),
        (["seed", "train.lr"], ["seed", "train.lr"]),
        (["loss.a.coeff", "loss.b.coeff"], ["a.coeff", "b.coeff"]),
        (["x.a.b.coeff", "y.a.b.coeff", "z.c"], ["x.a.b.coeff", "y.a.b.coeff", "z.c"]),
        (["w.x.a.coeff", "w.y.a.coeff"], ["x.a.coeff", "y.a.coeff"]),
        (["a.coeff", "loss.a.coeff", "v.aa.coeff"], ["a.coeff", "loss.a.coeff", "aa.coeff"]),
    ],
)
def test_a_key_is_named_by_its_shortest_ending_that_no_other_has(keys: list[str], names: list[str]) -> None:
    assert short_names(keys) == dict(zip(keys, names, strict=True))


@pytest.mark.parametrize("keys", [1, 2])
@pytest.mark.parametrize("room", [1, 8, 20])
def test_two_settings_never_become_one_text(room: int, keys: int) -> None:
    texts = [f"a={'x' * 40}{n}{'y' * 40} b={m}" for n, m in itertools.product(range(12), range(3))]
    assert len(set(fitted(texts, room, keys=keys))) == len(texts)
    assert fitted([*texts, texts[0]], room, keys=keys)[-1] == fitted(texts, room, keys=keys)[0]


def test_texts_that_stay_different_are_not_wider_than_the_room() -> None:
    assert fitted(["x" * 50 + "1", "x" * 50 + "2"], 9, keys=1) == ["xxxx…xxx1", "xxxx…xxx2"]
    assert fitted([], 9, keys=1) == []
