"""The terms of an objective, by name."""

import pytest

from spd_hydra.loss.loss_set import LossSet
from spd_hydra.loss.smooth_l0 import SmoothL0
from spd_hydra.section import ConfigError


def test_a_further_term_cannot_take_the_name_of_another() -> None:
    with pytest.raises(ConfigError) as caught:
        LossSet(extra={"stochastic_recon": SmoothL0(coeff=1.0)})
    assert str(caught.value) == (
        "extra.stochastic_recon: has the name of another term; choose a name of its own"
    )
    assert "mine" in LossSet(extra={"mine": SmoothL0(coeff=1.0)}).active_terms()
