"""The squeeze and the warmup of sparsity terms, which count in the total alone."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.loss.importance_minimality import ImportanceMinimality
from spd_hydra.loss.loss_set import LossSet
from spd_hydra.loss.objective import Objective, StepLoss
from spd_hydra.loss.smooth_l0 import SmoothL0
from spd_hydra.loss.sparsity import SparsityLoss
from spd_hydra.precision import Precision
from spd_hydra.section import ConfigError
from spd_hydra.step import Step

MakeModel = Callable[..., DecomposedModel]
SQUEEZE = {"squeeze": 3.0, "squeeze_from": 0.25, "squeeze_to": 0.5}
TERMS: dict[str, tuple[type[SparsityLoss], dict[str, float]]] = {
    "importance_minimality": (ImportanceMinimality, {"p_start": 2.0, "p_end": 1.0}),
    "with frequencies": (ImportanceMinimality, {"beta": 0.5}),
    "smooth_l0": (SmoothL0, {}),
}


def trained(
    model: DecomposedModel, term: SparsityLoss, progress: float
) -> tuple[StepLoss, dict[str, Tensor]]:
    """The loss on a batch, and the gradients of the causal importance functions."""
    name = "smooth_l0" if isinstance(term, SmoothL0) else "importance_minimality"
    objective = Objective(model, LossSet(**{name: term}), precision=Precision.fp32, ci_threshold=0.1)
    loss = Step(objective, compile=False)(
        torch.ones(3, 2), torch.zeros(3, 0), objective.scheduled(progress, objective.losses.active_terms())
    )
    return loss, {name: p.grad.clone() for name, p in model.ci_fn.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("kind", "words"), TERMS.values(), ids=TERMS.keys())
def test_squeezed_a_term_counts_more_in_the_loss_and_is_itself_the_same(
    hand_made: MakeModel, kind: type[SparsityLoss], words: dict[str, float]
) -> None:
    for progress, factor in {0.0: 1, 0.24: 1, 0.25: 3, 0.49: 3, 0.5: 1, 1.0: 1}.items():
        plain, slopes = trained(hand_made(), kind(coeff=0.2, **words), progress)
        loss, squeezed = trained(hand_made(), kind(coeff=0.2, **words, **SQUEEZE), progress)
        ((name, value),) = plain.terms.items()
        assert loss.terms[name].item() == pytest.approx(value.item(), rel=1e-6)
        assert loss.total.item() == pytest.approx(0.2 * factor * value.item(), rel=1e-6)
        assert squeezed.keys() == slopes.keys()
        assert any(slope.abs().max() > 0 for slope in slopes.values())
        for name, slope in slopes.items():
            torch.testing.assert_close(squeezed[name], factor * slope)


def test_without_a_squeeze_nothing_is_scheduled() -> None:
    assert ImportanceMinimality(coeff=1.0, squeeze_from=0.1).scheduled(0.2) == {}
    assert ImportanceMinimality(**SQUEEZE).scheduled(0.3) == {"pressure": 3.0}
    assert ImportanceMinimality(**SQUEEZE).scheduled(0.6) == {"pressure": 1.0}


@pytest.mark.parametrize(("kind", "words"), TERMS.values(), ids=TERMS.keys())
def test_during_warmup_a_term_counts_less_in_the_loss_and_is_itself_the_same(
    hand_made: MakeModel, kind: type[SparsityLoss], words: dict[str, float]
) -> None:
    for progress, factor in {0.0: 0, 0.1: 0.25, 0.2: 0.5, 0.4: 1, 0.7: 1, 1.0: 1}.items():
        plain, slopes = trained(hand_made(), kind(coeff=0.2, **words), progress)
        loss, warming = trained(hand_made(), kind(coeff=0.2, warmup=0.4, **words), progress)
        ((name, value),) = plain.terms.items()
        assert loss.terms[name].item() == pytest.approx(value.item(), rel=1e-6)
        assert loss.total.item() == pytest.approx(0.2 * factor * value.item(), rel=1e-6)
        for name, slope in slopes.items():
            torch.testing.assert_close(warming[name], factor * slope)


def test_a_warmup_and_a_squeeze_multiply() -> None:
    both = ImportanceMinimality(warmup=0.5, **SQUEEZE)
    factors = [both.scheduled(progress)["pressure"] for progress in (0.1, 0.4, 0.6)]
    assert factors == pytest.approx([0.2, 0.8 * 3, 1.0])
    assert SmoothL0(warmup=0.4).scheduled(0.1)["pressure"] == 0.25


def test_a_warmup_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^warmup: got 1\.5, must be ≥ 0 and ≤ 1$"):
        ImportanceMinimality(warmup=1.5)


def test_a_squeeze_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^squeeze_from: got 0\.9, must be ≤ squeeze_to, which is 0\.8$"):
        SmoothL0(squeeze_from=0.9)
    with pytest.raises(ConfigError, match=r"^squeeze: got 0\.0, must be > 0$"):
        ImportanceMinimality(squeeze=0.0)
