"""What a target model must offer to be decomposed."""

import dataclasses
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spd_hydra import rng
from spd_hydra.section import Section


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One number measured on a trained target and the closed interval in which it must lie."""

    name: str
    value: float
    lower: float
    upper: float

    @property
    def passed(self) -> bool:
        """Whether the value lies in the interval; NaN never does."""
        return self.lower <= self.value <= self.upper


def interval(lower: float | None, upper: float | None) -> str:
    """A closed interval as people read it: 69 to 75, ≥ 0.5, ≤ 3, > 0; empty without bounds."""
    has_lower, has_upper = (bound is not None and math.isfinite(bound) for bound in (lower, upper))
    if has_lower and has_upper:
        return f"{lower:g}" if lower == upper else f"{lower:g} to {upper:g}"
    if has_lower:
        return "> 0" if lower == math.ulp(0.0) else f"≥ {lower:g}"  # the least positive number there is
    return f"≤ {upper:g}" if has_upper else ""


@dataclass(frozen=True, kw_only=True)
class KnownAnswer:
    """What a correct decomposition of a toy target looks like. Sites are named by module path.

    Attributes:
        probe: one row per input feature: that feature alone, at magnitude 0.75.
        identity: sites where each feature has one subcomponent of its own, with their number of features.
        dense: sites where a fixed number of subcomponents is needed by many inputs, with that number.
        directions: per site, the input vector that each feature sends there, `[n_features, d_in]`; the
            feature's column of the weight matrix is `W @ directions[j]`.
        cosine_decides: whether MMCS and ML2R are part of the verdict (TMS) or only reported (ResidMLP).
        expected_alive: number of subcomponents that should be alive, per site.
    """

    probe: Float[Tensor, "n_features n_inputs"]
    identity: dict[str, int]
    dense: dict[str, int]
    directions: dict[str, Float[Tensor, "n_features d_in"]]
    cosine_decides: bool
    expected_alive: dict[str, int]


@dataclasses.dataclass(kw_only=True)
class TargetSpec(Section):
    """The target model: how to build it; for toys also how to train it and what it decomposes into."""

    def build(self, generator: torch.Generator) -> nn.Module:
        """The untrained module, its weights drawn from the generator."""
        raise NotImplementedError

    def skeleton(self, architecture: str | None = None) -> nn.Module:
        """A module of the same shapes whose weights are nobody's: to check sites, or to load weights into.

        Args:
            architecture: what `architecture` said of a saved target; None: ask where the target is from.
        """
        return self.build(rng.generator(0, "untrained_target"))

    def architecture(self, module: nn.Module) -> str | None:
        """What `skeleton` needs and this section does not say, to be saved with the weights."""
        return None

    def keeps_weights(self, module: nn.Module) -> bool:
        """Whether a run directory gets a copy of the weights; if not, `build` must find the same again."""
        return True

    def foreign_code(self) -> str | None:
        """Whose Python code `build` runs, for people; None: that of installed packages alone."""
        return None

    def prefetch(self) -> list[str]:
        """Download what `build` needs to where it finds it without a network; a line for each thing."""
        return []

    def commits(self) -> dict[str, str]:
        """What `build` takes from a hub now, as a commit for each field `revision` or `<what>_revision`."""
        return {}

    def names(self) -> dict[str, str]:
        """What is read, by field, with local paths whole, so that it means the same from any directory."""
        return {}

    def vocab_size(self) -> int | None:
        """Number of tokens of a target that takes tokens."""
        return None

    def padding_token(self) -> int | None:
        """The token that stands for padding, if the target knows one."""
        return None

    def tokenizer_name(self) -> str | None:
        """The tokenizer that belongs to the target, as transformers finds it."""
        return None

    def tokenizer_revision(self) -> str | None:
        """Branch, tag or commit of the tokenizer on the hub; None: main, or it is local."""
        return None

    def trusts_tokenizer_code(self) -> bool:
        """Whether Python code that comes with that tokenizer may run."""
        return False

    def context_length(self) -> int | None:
        """Most tokens that the target takes at once."""
        return None

    def certify(self, module: nn.Module) -> list[Measurement]:
        """Measurements that decide whether a trained target is fit for decomposition; empty: no checks."""
        return []

    def known_answer(self, module: nn.Module) -> KnownAnswer | None:
        """The known answer for this trained target, or None where nobody knows it."""
        return None

    def predicts_next_token(self) -> bool:
        """Whether the output at position t are logits of token t + 1: then there is a cross-entropy."""
        return False

    def fills_masks(self) -> bool:
        """Whether the output at a position are logits of the token that a mask token there stands for."""
        return False

    def gives_logits(self) -> bool:
        """Whether the output are logits, whose softmax are chances: then `loss.divergence=auto` is `kl`."""
        return self.predicts_next_token()
