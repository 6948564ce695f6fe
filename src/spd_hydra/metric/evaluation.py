"""What an evaluation found, as plain NumPy arrays: the input of figures, the report and the summary."""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int

FloatArray = np.ndarray  # shapes are given in the docstrings of the attributes


@dataclass(frozen=True, kw_only=True)
class SiteCheck:
    """Distance of one site from its known answer at one tolerance: 0 means that it was found."""

    name: str  # identity or dense
    site: str
    tolerance: float
    error: int
    expected: int  # features (identity) or needed subcomponents (dense)


@dataclass(frozen=True, kw_only=True)
class SiteEvaluation:
    """Weights and causal importances of one site.

    `g` below is the lower-leaky causal importance over the evaluation data unless `upper` is named;
    `probe_*` is g on single-feature inputs of magnitude 0.75. `order` lists the subcomponents so that
    the matched or heaviest ones come first: identity sites by matched feature, dense ones by weight.
    """

    weight: Float[FloatArray, "d_out d_in"]
    V: Float[FloatArray, "d_in C"]
    U: Float[FloatArray, "C d_out"]
    mean_ci: Float[FloatArray, " C"]
    density: Float[FloatArray, " C"]  # fraction of positions with g above the threshold
    histogram: Int[FloatArray, " bins"]  # counts of g in equal bins over [0, 1]
    order: Int[FloatArray, " C"]
    probe_lower: Float[FloatArray, "n_features C"] | None = None
    probe_upper: Float[FloatArray, "n_features C"] | None = None
    directions: Float[FloatArray, "n_features d_in"] | None = None


@dataclass(frozen=True, kw_only=True)
class NeuronContributions:
    """How much each neuron contributes to each feature's own output, in the target and in the decomposition.

    For a residual MLP layer: `(W_U[i] · W_out) ⊙ (W_in · W_E[:, i])`; in the decomposition the one
    subcomponent of W_in that counts most stands for W_in.
    """

    layer: str
    target: Float[FloatArray, "n_features n_neurons"]
    subcomponents: Float[FloatArray, "n_features n_neurons"]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Everything that one evaluation measured.

    `metrics` are the numbers of the metrics log (`loss/<term>`, `l0/<site>`, `alive/<site>`,
    `recovery/mmcs`, …). `mmcs`, `ml2r` and `solved` are None where there is no known answer.
    """

    step: int
    n_positions: int
    ci_threshold: float
    metrics: dict[str, float]
    sites: dict[str, SiteEvaluation]
    checks: list[SiteCheck] = field(default_factory=list)
    contributions: list[NeuronContributions] = field(default_factory=list)
    mmcs: float | None = None
    ml2r: float | None = None
    ml2r_plain: float | None = None
    solved: bool | None = None
    strict: bool | None = None
