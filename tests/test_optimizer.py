"""The optimiser's state as named tensors: a stopped optimisation goes on as if it had not been."""

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from spd_hydra.optimizer import NamedParameters, adamw, load_state_tensors, state_tensors


def parameters() -> NamedParameters:
    generator = torch.Generator().manual_seed(0)
    return [
        ("sites.a.V", nn.Parameter(torch.randn(3, 2, generator=generator))),
        ("ci.b", nn.Parameter(torch.randn(4, generator=generator))),
        ("ci.idle", nn.Parameter(torch.zeros(1))),
    ]


def optimizer_of(named: NamedParameters) -> torch.optim.AdamW:
    (_, first), *rest = named
    return adamw([[first], [p for _, p in rest]], lr=0.1, weight_decay=0.0)


def step(optimizer: torch.optim.Optimizer, named: NamedParameters) -> None:
    optimizer.zero_grad()
    loss = torch.stack([(p - 1).pow(4).sum() for name, p in named if name != "ci.idle"]).sum()
    torch.autograd.backward(loss)
    optimizer.step()


def values(named: NamedParameters) -> list[Tensor]:
    return [p.detach().clone() for _, p in named]


def test_going_on_from_saved_state_is_bit_identical() -> None:
    whole = parameters()
    optimizer = optimizer_of(whole)
    for _ in range(3):
        step(optimizer, whole)
    saved, saved_values = state_tensors(optimizer, whole), values(whole)
    stored = safetensors.torch.load(safetensors.torch.save({k: v.contiguous() for k, v in saved.items()}))
    for _ in range(3):
        step(optimizer, whole)

    resumed = [(name, nn.Parameter(v)) for (name, _), v in zip(whole, saved_values, strict=True)]
    again = optimizer_of(resumed)
    load_state_tensors(again, resumed, stored)
    for _ in range(3):
        step(again, resumed)
    for ours, theirs in zip(values(resumed), values(whole), strict=True):
        assert torch.equal(ours, theirs)
    assert state_tensors(again, resumed).keys() == state_tensors(optimizer, whole).keys()


def test_loaded_state_shares_no_memory_with_what_was_loaded() -> None:
    named = parameters()
    optimizer = optimizer_of(named)
    step(optimizer, named)
    saved = {key: value.clone() for key, value in state_tensors(optimizer, named).items()}
    load_state_tensors(optimizer, named, saved)
    before = saved["exp_avg.ci.b"].clone()
    step(optimizer, named)
    assert torch.equal(saved["exp_avg.ci.b"], before)


def test_state_is_named_by_quantity_and_parameter() -> None:
    named = parameters()
    optimizer = optimizer_of(named)
    assert state_tensors(optimizer, named) == {}
    step(optimizer, named)
    quantities = ("step", "exp_avg", "exp_avg_sq")
    assert set(state_tensors(optimizer, named)) == {
        f"{q}.{n}" for q in quantities for n in ("sites.a.V", "ci.b")
    }


def test_the_order_of_the_state_does_not_depend_on_the_order_in_which_it_was_loaded() -> None:
    # Ranks send it to each other as one row of numbers; files give it in an order of each process's own.
    named = parameters()
    optimizer = optimizer_of(named)
    step(optimizer, named)
    saved = state_tensors(optimizer, named)
    backwards = optimizer_of(named)
    load_state_tensors(backwards, named, dict(reversed(saved.items())))
    assert list(state_tensors(backwards, named)) == list(saved) == sorted(saved)


def test_state_of_another_model_is_refused() -> None:
    named = parameters()
    with pytest.raises(ValueError, match=r"'ci\.other' fits no parameter"):
        load_state_tensors(optimizer_of(named), named, {"exp_avg.ci.other": torch.zeros(4)})


def test_decay_is_decoupled_and_only_where_asked_for() -> None:
    still, shrinking = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    for parameter, decay in [(still, 0.0), (shrinking, 0.1)]:
        optimizer = adamw([[parameter]], lr=0.5, weight_decay=decay)
        parameter.grad = torch.zeros(2)
        optimizer.step()
    assert still.tolist() == [1, 1]
    assert shrinking.tolist() == pytest.approx([1 - 0.5 * 0.1] * 2)
