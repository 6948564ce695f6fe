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
class Context:
    """A place in a text where a subcomponent is needed: tokens around it, with g at each of them."""

    tokens: list[str]
    ci: list[float]
    at: int  # which of the tokens is the place itself


@dataclass(frozen=True, kw_only=True)
class TokenResponse:
    """How much a subcomponent is needed at one token of the vocabulary: mean g over its occurrences."""

    token: str
    mean_ci: float
    count: int


@dataclass(frozen=True, kw_only=True)
class SubcomponentText:
    """What one subcomponent responds to: the places, and the tokens, of largest g.

    `mean_ci` and `density` are over the evaluation data, as in SiteEvaluation.
    """

    index: int
    mean_ci: float
    density: float
    tokens: list[TokenResponse]
    contexts: list[Context]


@dataclass(frozen=True, kw_only=True)
class TextExample:
    """A sequence; by site, at every token, how many subcomponents are active and the sum of their g."""

    tokens: list[str]
    active: dict[str, list[int]]
    total_ci: dict[str, list[float]]


@dataclass(frozen=True, kw_only=True)
class Text:
    """Examples and contexts from the evaluation data of a model that reads tokens.

    From `positions` of all ranks, each row counted once; the examples are from rank 0.
    """

    positions: int
    examples: list[TextExample]
    sites: dict[str, list[SubcomponentText]]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Everything that one evaluation measured.

    `metrics` are the numbers of the metrics log (`loss/<term>`, `l0/<site>`, `alive/<site>`,
    `recovery/mmcs`, …); `extra` are those among them that plug-ins measured. `mmcs`, `ml2r` and `solved`
    are None where there is no known answer, `text` where the model reads no tokens, or where nobody looked.
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
    text: Text | None = None
    extra: dict[str, float] = field(default_factory=dict)

    def row(self) -> dict[str, float]:
        """What the metrics log holds of it: the numbers, and what has to be alike in two to be compared."""
        return self.metrics | {"n_positions": float(self.n_positions), "ci_threshold": self.ci_threshold}
