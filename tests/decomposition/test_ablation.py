"""Subcomponents as a person may name them."""

from typing import Any

import numpy as np
import pytest
import torch

from spd_hydra.decomposition.ablation import chosen_indices, without

SITES = {"a": 4, "b": 1}
MASK = [True, False, False, True]


@pytest.mark.parametrize(
    "given",
    [
        [0, 3],
        (0, 3),
        (c for c in (0, 3)),
        iter([0, 3, 3]),
        {0: "x", 3: "y"},
        [np.int64(0), np.int64(3)],
        [torch.tensor(0), torch.tensor(3)],
        torch.tensor([0, 3]),
        torch.tensor([0, 3], dtype=torch.int32),
        np.array([0, 3], dtype=np.uint8),
        torch.tensor(MASK),
        torch.tensor(MASK).nonzero().flatten(),
        np.array(MASK),
        MASK,
        list(np.array(MASK)),
        range(0, 4, 3),
    ],
)
def test_indices_and_masks_in_every_usual_form_are_the_same(given: Any) -> None:
    assert chosen_indices({"a": given}, SITES) == {"a": [0, 3]}


@pytest.mark.parametrize("given", [2, np.int64(2), torch.tensor(2), np.array(2), [2], np.uint8(2)])
def test_one_index_in_every_usual_form_is_the_same(given: Any) -> None:
    assert chosen_indices({"a": given}, SITES) == {"a": [2]}


@pytest.mark.parametrize("given", [[], (), torch.tensor([]), np.array([], dtype=int), torch.zeros(4) > 0])
def test_none_may_be_named(given: Any) -> None:
    assert chosen_indices({"a": given}, SITES) == {"a": []}


@pytest.mark.parametrize(
    ("given", "what"),
    [
        (torch.tensor([True, False]), r"a Tensor of shape \[2\], bool"),
        (torch.tensor([0.0, 1.0]), r"a Tensor of shape \[2\], float32"),
        (torch.tensor([[0], [3]]), r"a Tensor of shape \[2, 1\], int64"),
        (np.array([True]), r"a ndarray of shape \[1\], bool"),
        ([0, True], r"the list \[0, True\]"),
        ("0", "the str 0"),
        (True, "the bool True"),
        (None, "the NoneType None"),
        ([1.0], r"the list \[1.0\]"),
    ],
)
def test_anything_else_is_refused_with_what_is_allowed(given: Any, what: str) -> None:
    allowed = "must be an index from 0 to 3, several of them in one row, or a boolean mask of length 4"
    with pytest.raises(ValueError, match=rf"subcomponents\['a'\]: got {what}; {allowed}"):
        chosen_indices({"a": given}, SITES)


def test_one_truth_value_is_no_mask_of_a_site_of_one_subcomponent() -> None:
    assert chosen_indices({"b": [True]}, SITES) == {"b": [0]}
    lone: list[Any] = [True, torch.tensor(True), np.bool_(True)]
    for given in lone:
        with pytest.raises(ValueError, match="a boolean mask of length 1"):
            chosen_indices({"b": given}, SITES)


def test_indices_without_a_site_are_refused() -> None:
    given: Any = [0, 3]
    with pytest.raises(
        TypeError, match=r"subcomponents: got a list, must be indices by site: \{site: \[0, 3\]"
    ):
        chosen_indices(given, SITES)
    with pytest.raises(ValueError, match=r"no such site: \['c'\]; the sites are \['a', 'b'\]"):
        chosen_indices({"c": 0}, SITES)


def test_the_mask_has_the_type_of_the_model() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        mask = without([1], 3, torch.zeros(1, dtype=dtype))
        assert mask.mask is not None
        assert mask.delta is not None
        assert (mask.mask.tolist(), mask.delta.item()) == ([1, 0, 1], 1)
        assert mask.mask.dtype == mask.delta.dtype == dtype
