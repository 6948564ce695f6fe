"""Sections: what a field may hold, which key a message names, how classes are registered."""

import copy
import dataclasses
import math
from collections.abc import Iterator
from enum import Enum

import pytest

from spd_hydra.section import (
    ConfigError,
    Problem,
    Section,
    all_problems,
    checks_deferred,
    children,
    kind_of,
    option,
    register,
    registered,
)


class Colour(Enum):
    red = "red"


@dataclasses.dataclass(kw_only=True)
class Inner(Section):
    share: float = option(0.5, "a share", ge=0, lt=1)
    low: float = option(0.0, "no bounds")

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.low > 10:
            yield Problem("low", f"got {self.low}, must be ≤ 10 for reasons of its own")


@dataclasses.dataclass(kw_only=True)
class Outer(Section):
    count: int = option(1, "a number", ge=1, le=9)
    rate: float | None = option(None, "null is allowed", gt=0)
    widths: list[int] = option(default_factory=lambda: [4], help="each is checked", ge=1)
    flag: bool = option(False, "no bounds")
    colour: Colour = option(Colour.red, "an enum")
    inner: Inner = option(default_factory=Inner, help="a section")
    many: dict[str, Inner] = option(default_factory=dict, help="named sections")


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("count", 0, "count: got 0, must be ≥ 1 and ≤ 9"),
        ("count", 10, "count: got 10, must be ≥ 1 and ≤ 9"),
        ("rate", 0.0, "rate: got 0.0, must be > 0"),
        ("rate", -1, "rate: got -1, must be > 0"),
        ("rate", math.nan, "rate: got nan, must be finite and > 0"),
        ("rate", math.inf, "rate: got inf, must be finite and > 0"),
        ("rate", -math.inf, "rate: got -inf, must be finite and > 0"),
        ("widths", [3, 0, 2], "widths: got [3, 0, 2], must be ≥ 1"),
    ],
)
def test_a_value_out_of_range_is_refused_with_key_value_and_range(
    field: str, value: object, text: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        Outer(**{field: value})
    assert str(caught.value) == text


@pytest.mark.parametrize("share", [1.0, -1e-9, math.nan])
def test_open_and_closed_bounds_are_told_apart(share: float) -> None:
    with pytest.raises(ConfigError, match=r"must be .*≥ 0 and < 1$"):
        Inner(share=share)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("count", 1),
        ("count", 9),
        ("rate", None),
        ("rate", 1e-30),
        ("widths", []),
        ("widths", [1]),
        ("flag", False),
    ],
)
def test_values_on_the_allowed_side_of_a_bound_are_taken(field: str, value: object) -> None:
    assert getattr(Outer(**{field: value}), field) == value


def test_a_field_without_bounds_takes_any_number() -> None:
    assert Inner(low=-math.inf).low == -math.inf


def test_a_users_mistake_is_a_value_error() -> None:
    assert issubclass(ConfigError, ValueError)


def test_positional_arguments_are_refused() -> None:
    with pytest.raises(TypeError):
        Inner(0.5)  # type: ignore[call-arg]


def test_problems_of_nested_sections_carry_the_full_key() -> None:
    with checks_deferred():
        outer = Outer(
            count=0,
            inner=Inner(share=2.0),
            many={"a": Inner(), "b": Inner(low=11.0, share=-1.0)},
        )
    assert [str(problem) for problem in all_problems(outer)] == [
        "count: got 0, must be ≥ 1 and ≤ 9",
        "inner.share: got 2.0, must be ≥ 0 and < 1",
        "many.b.share: got -1.0, must be ≥ 0 and < 1",
        "many.b.low: got 11.0, must be ≤ 10 for reasons of its own",
    ]
    assert [problem.key for problem in all_problems(outer, "top")][:2] == ["top.count", "top.inner.share"]


def test_a_sound_tree_has_no_problems() -> None:
    assert list(all_problems(Outer(many={"a": Inner()}))) == []


def test_a_problem_of_the_whole_section_is_named_by_the_sections_key() -> None:
    @dataclasses.dataclass(kw_only=True)
    class Never(Section):
        def problems(self) -> Iterator[Problem]:
            yield Problem("", "cannot be")

    with checks_deferred():
        never = Never()
    assert [str(p) for p in all_problems(never)] == ["cannot be"]
    assert [str(p) for p in all_problems(never, "a.b")] == ["a.b: cannot be"]


def test_checks_are_deferred_only_inside_the_block_also_after_an_exception() -> None:
    def fail_inside() -> None:
        with checks_deferred():
            raise RuntimeError(f"count is {Outer(count=0).count}")

    with pytest.raises(RuntimeError, match="count is 0"):
        fail_inside()
    with pytest.raises(ConfigError):
        Outer(count=0)


def test_children_are_the_sections_directly_inside() -> None:
    outer = Outer(many={"a": Inner(), "b": Inner()})
    assert [key for key, _ in children(outer)] == ["inner", "many.a", "many.b"]
    assert list(children(outer.inner)) == []


def test_a_registered_class_is_known_by_group_and_kind() -> None:
    @register("test_group", "one")
    @dataclasses.dataclass(kw_only=True)
    class One(Section):
        pass

    assert registered("test_group") == {"one": One}
    assert kind_of(One) == "test_group/one"
    assert kind_of(Inner) is None
    assert registered("no_such_group") == {}


def test_a_kind_cannot_be_taken_twice() -> None:
    @register("test_twice", "one")
    @dataclasses.dataclass(kw_only=True)
    class One(Section):
        pass

    with pytest.raises(ValueError, match=r"test_twice=one is already registered as .*One"):

        @register("test_twice", "one")
        @dataclasses.dataclass(kw_only=True)
        class Two(Section):
            pass

    assert registered("test_twice") == {"one": One}


@pytest.mark.parametrize(
    ("name", "hint"),
    [("shar", "did you mean share?"), ("other", "it has share, low")],
)
def test_a_name_that_is_not_declared_cannot_be_set(name: str, hint: str) -> None:
    inner = Inner()
    with pytest.raises(ConfigError) as caught:
        setattr(inner, name, 0.25)
    assert str(caught.value) == f"{name}: Inner has no such key; {hint}"
    assert inner == Inner()


def test_a_declared_name_can_be_set_also_in_a_copy_and_of_a_base_class() -> None:
    @dataclasses.dataclass(kw_only=True)
    class Derived(Inner):
        more: int = option(1, "one more")

    section = copy.deepcopy(Derived())
    section.share, section.more = 0.25, 3
    assert section == Derived(share=0.25, more=3)


def test_a_mutable_default_is_not_shared_between_sections() -> None:
    first, second = Outer(), Outer()
    first.widths.append(7)
    first.many["a"] = Inner()
    assert second.widths == [4]
    assert second.many == {}


def test_every_option_carries_its_meaning() -> None:
    assert {field.name: field.metadata["help"] for field in dataclasses.fields(Inner)} == {
        "share": "a share",
        "low": "no bounds",
    }
