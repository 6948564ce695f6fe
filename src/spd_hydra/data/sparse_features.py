"""Sparse feature vectors: the inputs of the toy models."""

import dataclasses
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from spd_hydra import rng
from spd_hydra.data.base import Batches, DataSource
from spd_hydra.model.base import TargetSpec
from spd_hydra.section import ConfigError, Problem, kind_of, option, register


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseFeatureBatches(Batches):
    """The stream of sparse feature vectors for one number of features."""

    n_features: int
    feature_probability: float
    low: float
    high: float
    traceable = True

    def __call__(
        self, key: Int32[Tensor, "2"], rows: Int32[Tensor, " batch"]
    ) -> Float[Tensor, "batch n_features"]:
        """x = value * active, with value ~ U[low, high) and active ~ Bernoulli(p), all independent.

        Args:
            key: of the purpose and step.
            rows: indices in the global batch; a row depends on nothing but the key and its index.
        """
        columns = torch.arange(2 * self.n_features, dtype=torch.int32, device=rows.device)
        draws = rng.uniform(key, rows, columns)
        active = draws[..., self.n_features :] < self.feature_probability
        return (self.low + (self.high - self.low) * draws[..., : self.n_features]) * active


@register("data", "sparse_features")
@dataclasses.dataclass(kw_only=True)
class SparseFeatures(DataSource):
    """Feature vectors in which each feature is active now and then, independently of the others."""

    feature_probability: float = option(0.05, "chance that a feature is active", gt=0, le=1)
    low: float = option(0.0, "smallest value of an active feature")
    high: float = option(1.0, "largest value of an active feature")

    def problems(self) -> Iterator[Problem]:
        """Adds: the range of values must not be empty."""
        yield from super().problems()
        if not self.low < self.high:
            yield Problem("high", f"got {self.high}, must be > low ({self.low})")

    def bind(self, target: TargetSpec) -> SparseFeatureBatches:
        """The stream for a target's number of features.

        Raises:
            ConfigError: the target has no `n_features`.
        """
        n_features = getattr(target, "n_features", None)
        if n_features is None:
            name = kind_of(type(target)) or type(target).__name__
            raise ConfigError(
                f"data: sparse_features cannot feed {name}, which has no n_features; choose a toy model "
                "(model=tms_5-2, model=resid_mlp1, …) or the data source made for this model"
            )
        return SparseFeatureBatches(
            n_features=n_features,
            feature_probability=self.feature_probability,
            low=self.low,
            high=self.high,
        )
