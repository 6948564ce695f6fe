"""The training step as one would write it down from the formulas: the yardstick of `step_time.py`.

Uncompiled PyTorch throughout: weight deltas formed, causal-importance MLPs as einsums over a
`[batch, C, hidden]` tensor, one whole forward pass per reconstruction term, nothing shared between
them. It takes the initial weights of a `DecomposedModel` and imports none of its arithmetic, so that
equal losses and gradients say something about both.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spd_hydra.build import Parts
from spd_hydra.ci_fn.mlp import MLPCausalImportance
from spd_hydra.ci_fn.sigmoid import Sigmoid
from spd_hydra.data.sparse_features import SparseFeatures
from spd_hydra.loss.divergence import Divergence

LEAK = 0.01
RECON_TERMS = ("stochastic_recon", "stochastic_recon_layerwise")

Masks = dict[str, tuple[Float[Tensor, "batch C"], Float[Tensor, "batch 1"]]]
"""By site: the mask on the subcomponents and the mask on the weight delta."""


class PlainStep:
    """One training step of the settings `delta`: plain losses, `backward`, AdamW.

    Args:
        parts: what the project would train; its weights are copied, its configuration is read.
        dtype: of all arithmetic; float64 for a reference that is exact beside float32.

    Raises:
        ValueError: the configuration asks for something that the plain step does not know.
    """

    def __init__(self, parts: Parts, dtype: torch.dtype = torch.float32) -> None:
        _require_known(parts)
        model = parts.model
        self.config = parts.config
        self.site_names = model.site_names
        self.tied = dict(model.config.tied)
        self.batch_size = parts.config.train.batch_size
        self.n_features = int(parts.config.model.n_features)  # type: ignore[attr-defined]  # a toy has them
        self.parameters = {
            name: p.detach().to(dtype, copy=True).requires_grad_()
            for name, p in model.named_parameters()
            if p.requires_grad
        }
        self.dtype = dtype
        self.target = copy.deepcopy(model.target).to(dtype)
        self.sites = {name: _Site(self.target.get_submodule(name)) for name in self.site_names}
        for name, site in self.sites.items():
            parent, _, attribute = name.rpartition(".")
            setattr(self.target.get_submodule(parent), attribute, site)
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=parts.config.train.lr, weight_decay=0.0
        )

    def step(self, sample: tuple[Tensor, Tensor] | None = None) -> dict[str, Tensor]:
        """One update, on the given batch and draws or on new ones; returns every term and `total`."""
        batch, draws = self.sample() if sample is None else sample
        terms = self.losses(batch.to(self.dtype), draws.to(self.dtype))
        self.optimizer.zero_grad()
        torch.autograd.backward(terms["total"])
        self.optimizer.step()
        return {name: term.detach() for name, term in terms.items()}

    def sample(self) -> tuple[Tensor, Tensor]:
        """A batch and uniform random numbers, as `losses` takes them, by torch's own generator."""
        data = cast(SparseFeatures, self.config.data)
        shape = (self.batch_size, self.n_features)
        values = data.low + (data.high - data.low) * torch.rand(shape)
        active = torch.rand(shape) < data.feature_probability
        width = len(self._recon_terms()) * sum(self._V(name).shape[1] + 1 for name in self.site_names)
        return values * active, torch.rand(self.batch_size, width)

    def losses(
        self, batch: Float[Tensor, "batch n"], draws: Float[Tensor, "batch columns"]
    ) -> dict[str, Tensor]:
        """Every active term, and their weighted sum as `total`.

        Args:
            batch: input of the target.
            draws: U(0, 1); per recon term and site C sources, then one for the weight delta.
        """
        with torch.no_grad():
            clean = self._run(batch, {})
            inputs = {name: site.seen for name, site in self.sites.items()}
        z = {name: self._pre_sigmoid(name, x) for name, x in inputs.items()}
        lower: dict[str, Tensor] = {name: _LowerLeaky.apply(value) for name, value in z.items()}  # type: ignore[no-untyped-call]
        terms: dict[str, Tensor] = {}
        if self.config.loss.faithfulness.coeff > 0:
            terms["faithfulness"] = self._faithfulness()
        terms["importance_minimality"] = self._importance_minimality(z)
        for name, draws_of_term in zip(
            self._recon_terms(), draws.chunk(len(self._recon_terms()), dim=1), strict=True
        ):
            masks = self._masks(lower, draws_of_term)
            passes = [masks] if name == "stochastic_recon" else [{site: masks[site]} for site in masks]
            outputs = [self._run(batch, masked) for masked in passes]
            terms[name] = torch.stack([((output - clean) ** 2).mean() for output in outputs]).mean()
        active = self.config.loss.active_terms()
        terms["total"] = torch.stack([active[name].coeff * value for name, value in terms.items()]).sum()
        return terms

    def _recon_terms(self) -> list[str]:
        return [name for name in self.config.loss.active_terms() if name in RECON_TERMS]

    def _run(self, batch: Tensor, masks: Masks) -> Tensor:
        for name, site in self.sites.items():
            site.masked = None
            if name in masks:
                mask, delta_mask = masks[name]
                site.masked = (self._V(name), self._U(name), self._delta(name), mask, delta_mask)
        return cast(Tensor, self.target(batch))

    def _V(self, name: str) -> Tensor:
        if name in self.tied:
            return self._U(self.tied[name]).T
        return self.parameters[f"subcomponents.{name.replace('.', '/')}.V"]

    def _U(self, name: str) -> Tensor:
        if name in self.tied:
            return self._V(self.tied[name]).T
        return self.parameters[f"subcomponents.{name.replace('.', '/')}.U"]

    def _delta(self, name: str) -> Float[Tensor, "d_out d_in"]:
        return cast(Tensor, self.sites[name].layer.weight) - (self._V(name) @ self._U(name)).T

    def _pre_sigmoid(self, name: str, x: Tensor) -> Float[Tensor, "batch C"]:
        prefix = f"ci_fn.sites.{name.replace('.', '/')}"
        w_in, b_in, w_out, b_out = (
            self.parameters[f"{prefix}.{p}"] for p in ("w_in", "b_in", "w_out", "b_out")
        )
        h = torch.einsum("bi,ic->bc", x, self._V(name))
        hidden = nn.functional.gelu(torch.einsum("bc,ch->bch", h, w_in) + b_in)
        return torch.einsum("bch,ch->bc", hidden, w_out) + b_out

    def _masks(self, lower: dict[str, Tensor], draws: Tensor) -> Masks:
        widths = [self._V(name).shape[1] + 1 for name in self.site_names]
        masks: Masks = {}
        for name, own in zip(self.site_names, torch.split(draws, widths, dim=1), strict=True):
            g, source, delta_mask = lower[name], own[:, :-1], own[:, -1:]
            masks[name] = (g + (1 - g) * source, delta_mask)
        return masks

    def _faithfulness(self) -> Tensor:
        deltas = [self._delta(name) for name in self.site_names]
        return torch.stack([(d**2).sum() for d in deltas]).sum() / sum(d.numel() for d in deltas)

    def _importance_minimality(self, z: dict[str, Tensor]) -> Tensor:
        term = self.config.loss.importance_minimality
        total = torch.zeros(())
        for value in z.values():
            upper = torch.where(value > 1, 1 + LEAK * (value - 1), value.clamp(0, 1))
            f = ((upper + term.eps) ** term.p_start).mean(dim=0)
            total = total + (f * (1 + term.beta * torch.log2(1 + len(value) * f))).sum()
        return total


class _Site(nn.Module):
    """A decomposed layer: itself, or the sum of its masked subcomponents and its masked weight delta."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.masked: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None = None
        self.seen = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        if self.masked is None:
            self.seen = x
            return cast(Tensor, self.layer(x))
        V, U, delta, mask, delta_mask = self.masked
        y = torch.einsum("bc,co->bo", torch.einsum("bi,ic->bc", x, V) * mask, U)
        y = y + delta_mask * torch.einsum("bi,oi->bo", x, delta)
        bias = getattr(self.layer, "bias", None)
        return y if bias is None else y + bias


class _LowerLeaky(torch.autograd.Function):
    """clamp(z, 0, 1); below 0 a negative gradient passes with the leak."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        out: Tensor = z.clamp(0, 1)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        out: Tensor = grad * ((z > 0) & (z <= 1)) + LEAK * grad * ((z <= 0) & (grad < 0))
        return out


def _require_known(parts: Parts) -> None:
    config, term = parts.config, parts.config.loss.importance_minimality
    known = {"faithfulness", "importance_minimality", *RECON_TERMS}
    needs: list[tuple[str, Callable[[], bool]]] = [
        ("ci_fn=mlp", lambda: isinstance(config.ci_fn, MLPCausalImportance)),
        ("data=sparse_features", lambda: isinstance(config.data, SparseFeatures)),
        ("decomposition.sigmoid=leaky_hard", lambda: config.decomposition.sigmoid is Sigmoid.leaky_hard),
        ("decomposition.use_delta=true", lambda: config.decomposition.use_delta),
        ("loss.divergence=mse", lambda: config.loss.divergence is Divergence.mse),
        ("a positive loss.importance_minimality.coeff", lambda: term.coeff > 0),
        ("a constant exponent of importance_minimality", lambda: term.p_start == term.p_end),
        (f"no loss terms but {', '.join(sorted(known))}", lambda: set(config.loss.active_terms()) <= known),
        (
            "at least one stochastic recon term",
            lambda: bool(set(config.loss.active_terms()) & set(RECON_TERMS)),
        ),
        ("n_samples=1", lambda: all(getattr(config.loss, name).n_samples == 1 for name in RECON_TERMS)),
    ]
    for text in _unmet(needs):
        raise ValueError(f"{config.name}: the plain step needs {text}")


def _unmet(needs: list[tuple[str, Callable[[], bool]]]) -> Iterator[str]:
    return (text for text, holds in needs if not holds())
