"""The training step as one would write it down from the formulas: the yardstick of `step_time.py`.

Uncompiled PyTorch throughout: weight deltas formed, private causal-importance MLPs as einsums over a
`[batch, C, hidden]` tensor, one whole forward pass per reconstruction term, nothing shared between
them. It takes the initial weights of a `DecomposedModel` and imports none of its arithmetic, so that
equal losses and gradients say something about both. What is random it is given: batches, draws,
and where the ascents of adversaries start.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spd_hydra.build import Parts
from spd_hydra.ci_fn.mlp import MLPCausalImportance
from spd_hydra.ci_fn.shared_mlp import SharedMLPCausalImportance
from spd_hydra.ci_fn.sigmoid import Sigmoid
from spd_hydra.ci_fn.vector_mlp import VectorMLPCausalImportance
from spd_hydra.data.sparse_features import SparseFeatures
from spd_hydra.decomposition.masks import MaskSource
from spd_hydra.decomposition.routing import Routing
from spd_hydra.loss.ascent import Scope
from spd_hydra.loss.divergence import Divergence
from spd_hydra.loss.pgd_recon import PGDRecon
from spd_hydra.loss.recon import Recon, RoutedRecon

LEAK = 0.01
ROUTINGS = (Routing.all, Routing.layerwise, Routing.uniform_k)
CI_FNS = (MLPCausalImportance, SharedMLPCausalImportance, VectorMLPCausalImportance)


@dataclasses.dataclass(frozen=True)
class Mask:
    """How one site is masked: m on its subcomponents, δ on its weight delta, and the rows where it is."""

    m: Float[Tensor, "batch C"]
    delta: Float[Tensor, "batch 1"]
    rows: Tensor | None = None

    @classmethod
    def of(cls, g: Tensor, r: Tensor, rows: Tensor | None) -> "Mask":
        """m = g + (1 - g)·r, with the source of the weight delta in the last column of r."""
        return cls(g + (1 - g) * r[:, :-1], r[:, -1:], rows)


Sources = dict[str, Float[Tensor, "#batch columns"]]
"""By site: the C sources of the masks, then that of the weight delta."""

Rows = dict[str, Tensor | None]
"""By site: the rows in which it is masked; None: in all of them."""


class PlainStep:
    """One training step: plain losses, `backward`, AdamW.

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
        self._model = model  # names the sources that ascents start from, as it does the draws
        self.site_names = model.site_names
        self.tied = dict(model.config.tied)
        self.batch_size = parts.config.train.batch_size
        self.n_features = int(parts.config.model.n_features)  # type: ignore[attr-defined]  # a toy has them
        self.parameters = {
            name: p.detach().to(dtype, copy=True).requires_grad_()
            for name, p in model.named_parameters()
            if p.requires_grad
        }
        self.dtype, self.device = dtype, model.device
        self.target = copy.deepcopy(model.target).to(dtype)
        self.sites = {name: _Site(self.target.get_submodule(name)) for name in self.site_names}
        for name, site in self.sites.items():
            parent, _, attribute = name.rpartition(".")
            setattr(self.target.get_submodule(parent), attribute, site)
        self.ci_kind = type(parts.config.ci_fn)
        self.steps_done = 0
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
        self.steps_done += 1
        return {name: term.detach() for name, term in terms.items()}

    def sample(self) -> tuple[Tensor, Tensor]:
        """A batch and uniform random numbers, as `losses` takes them, by torch's own generator."""
        data = cast(SparseFeatures, self.config.data)
        shape = (self.batch_size, self.n_features)
        values = data.low + (data.high - data.low) * torch.rand(shape, device=self.device)
        active = torch.rand(shape, device=self.device) < data.feature_probability
        width = sum(term.columns(self._model) for term in self._recon_terms().values())
        return values * active, torch.rand(self.batch_size, width, device=self.device)

    def losses(
        self, batch: Float[Tensor, "batch n"], draws: Float[Tensor, "batch columns"]
    ) -> dict[str, Tensor]:
        """Every active term, and their weighted sum as `total`.

        Args:
            batch: input of the target.
            draws: U(0, 1); per recon term those of the routing, then per site C sources and one for the
                weight delta.
        """
        with torch.no_grad():
            clean = self._run(batch, {})
            inputs = {name: site.seen for name, site in self.sites.items()}
        z = {name: self._pre_sigmoid(name, x) for name, x in inputs.items()}
        lower: dict[str, Tensor] = {name: LowerLeaky.apply(value) for name, value in z.items()}  # type: ignore[no-untyped-call]
        terms: dict[str, Tensor] = {}
        if self.config.loss.faithfulness.coeff > 0:
            terms["faithfulness"] = self._faithfulness()
        terms["importance_minimality"] = self._importance_minimality(z)
        recon = self._recon_terms()
        widths = [term.columns(self._model) for term in recon.values()]
        for (name, term), own in zip(recon.items(), torch.split(draws, widths, dim=1), strict=True):
            terms[name] = self._recon(term, lower, own, batch, clean)
        active = self.config.loss.active_terms()
        pressure = active["importance_minimality"].scheduled(self._progress).get("pressure", 1.0)
        weights = {name: active[name].coeff for name in terms}
        weights["importance_minimality"] *= pressure
        terms["total"] = torch.stack([weights[name] * value for name, value in terms.items()]).sum()
        return terms

    @property
    def _progress(self) -> float:
        return self.steps_done / self.config.train.steps

    def _recon_terms(self) -> dict[str, RoutedRecon]:
        terms = self.config.loss.active_terms().items()
        return {name: term for name, term in terms if isinstance(term, RoutedRecon)}

    def _recon(
        self, term: RoutedRecon, lower: dict[str, Tensor], draws: Tensor, batch: Tensor, clean: Tensor
    ) -> Tensor:
        """Mean over the masked passes of a term of their mean squared errors."""
        n_routing = term.route_columns(self._model)
        if isinstance(term, PGDRecon):
            sources = term.start_sources(self._model, draws)
        else:
            columns = [self._V(name).shape[1] + 1 for name in self.site_names]
            of_sites = torch.split(draws[:, n_routing:], columns, dim=1)
            sources = dict(zip(self.site_names, of_sites, strict=True))
        fixed = {name: g.detach() for name, g in lower.items()}
        errors = []
        for rows in self._passes(term, draws[:, :n_routing]):
            r = {name: sources[name] for name in rows}
            if isinstance(term, PGDRecon):
                r = _worst(term, functools.partial(self._error, batch, clean, rows, fixed), r)
            errors.append(self._error(batch, clean, rows, lower, r))
        return torch.stack(errors).mean()

    def _error(self, batch: Tensor, clean: Tensor, rows: Rows, ci: dict[str, Tensor], r: Sources) -> Tensor:
        masks = {name: Mask.of(ci[name], r[name], own) for name, own in rows.items()}
        return ((self._run(batch, masks) - clean) ** 2).mean()

    def _passes(self, term: RoutedRecon, draws: Tensor) -> list[Rows]:
        """The rows that every forward pass of a term masks, by site; an absent site keeps its own layer."""
        if term.routing is Routing.layerwise:
            return [{name: None} for name in self.site_names]
        if term.routing is Routing.uniform_k:
            n_sites = len(self.site_names)
            k = 1 + (draws[:, -1:] * n_sites).floor()
            rank = draws[:, :-1].argsort(dim=1).argsort(dim=1)  # a random permutation of the sites
            chosen = torch.split(rank < k, 1, dim=1)
            return [dict(zip(self.site_names, chosen, strict=True))]
        return [dict.fromkeys(self.site_names)]

    def _run(self, batch: Tensor, masks: dict[str, Mask]) -> Tensor:
        for name, site in self.sites.items():
            site.masked = None
            if name in masks:
                site.masked = (self._V(name), self._U(name), self._delta(name), masks[name])
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
        prefix = f"ci_fn.sites.{name.replace('.', '/')}."
        own = {key.removeprefix(prefix): p for key, p in self.parameters.items() if key.startswith(prefix)}
        if self.ci_kind is SharedMLPCausalImportance:
            return mlp(own, x)
        if self.ci_kind is VectorMLPCausalImportance:
            before = torch.einsum("bi,ich->bch", x, own["w_in"])
        else:
            before = torch.einsum("bc,ch->bch", torch.einsum("bi,ic->bc", x, self._V(name)), own["w_in"])
        hidden = nn.functional.gelu(before + own["b_in"])
        return torch.einsum("bch,ch->bc", hidden, own["w_out"]) + own["b_out"]

    def _faithfulness(self) -> Tensor:
        deltas = [self._delta(name) for name in self.site_names]
        return torch.stack([(d**2).sum() for d in deltas]).sum() / sum(d.numel() for d in deltas)

    def _importance_minimality(self, z: dict[str, Tensor]) -> Tensor:
        term = self.config.loss.importance_minimality
        total = torch.zeros((), device=self.device)
        for value in z.values():
            upper = torch.where(value > 1, 1 + LEAK * (value - 1), value.clamp(0, 1))
            f = ((upper + term.eps) ** term.p(self._progress)).mean(dim=0)
            total = total + (f * (1 + term.beta * torch.log2(1 + len(value) * f))).sum()
        return total


class _Site(nn.Module):
    """A decomposed layer: itself, or the sum of its masked subcomponents and its masked weight delta."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.masked: tuple[Tensor, Tensor, Tensor, Mask] | None = None
        self.seen = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        if self.masked is None:
            self.seen = x
            return cast(Tensor, self.layer(x))
        V, U, delta, mask = self.masked
        y = torch.einsum("bc,co->bo", torch.einsum("bi,ic->bc", x, V) * mask.m, U)
        y = y + mask.delta * torch.einsum("bi,oi->bo", x, delta)
        bias = getattr(self.layer, "bias", None)
        y = y if bias is None else y + bias
        return y if mask.rows is None else torch.where(mask.rows, y, self.layer(x))


def _worst(term: PGDRecon, error: Callable[[Sources], Tensor], r: Sources) -> Sources:
    """The sources of the largest error on a projected ascent from r, by the signs of its gradient."""
    best, highest = r, None
    for step in range(term.n_steps + 1):
        leaves = {name: own.detach().requires_grad_() for name, own in r.items()}
        value = error(leaves)
        if highest is None or value > highest:
            best, highest = r, value.detach()
        if step < term.n_steps:
            slopes = torch.autograd.grad(value, list(leaves.values()))
            r = {
                name: (own + term.step_size * slope.sign()).clamp(0, 1)
                for (name, own), slope in zip(r.items(), slopes, strict=True)
            }
    return best


def mlp(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    """Linear layers with GELU between them; the parameters are numbered as in `nn.Sequential`."""
    numbers = sorted({int(key.partition(".")[0]) for key in parameters})
    for number in numbers:
        x = torch.einsum("...i,oi->...o", x, parameters[f"{number}.weight"]) + parameters[f"{number}.bias"]
        x = x if number == numbers[-1] else nn.functional.gelu(x)
    return x


class LowerLeaky(torch.autograd.Function):
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
    active = config.loss.active_terms()
    recon = {name: own for name, own in active.items() if isinstance(own, RoutedRecon)}
    drawn = [own for own in recon.values() if isinstance(own, Recon)]
    searching = [own for own in recon.values() if isinstance(own, PGDRecon)]
    known = {"faithfulness", "importance_minimality", *recon}
    needs: list[tuple[str, Callable[[], bool]]] = [
        ("ci_fn=mlp, shared_mlp or vector_mlp", lambda: type(config.ci_fn) in CI_FNS),
        ("data=sparse_features", lambda: isinstance(config.data, SparseFeatures)),
        ("decomposition.sigmoid=leaky_hard", lambda: config.decomposition.sigmoid is Sigmoid.leaky_hard),
        ("decomposition.use_delta=true", lambda: config.decomposition.use_delta),
        ("loss.divergence=mse", lambda: config.loss.divergence is Divergence.mse),
        ("a positive loss.importance_minimality.coeff", lambda: term.coeff > 0),
        ("no loss terms but faithfulness, importance_minimality and recon", lambda: active.keys() <= known),
        ("at least one recon term", lambda: bool(recon)),
        ("no lasting adversary", lambda: len(drawn) + len(searching) == len(recon)),
        (
            "stochastic masks in all recon terms",
            lambda: all(own.masks is MaskSource.stochastic for own in drawn),
        ),
        (
            "routing all, layerwise or uniform_k in all recon terms",
            lambda: all(own.routing in ROUTINGS for own in recon.values()),
        ),
        ("n_samples=1", lambda: all(own.n_samples == 1 for own in drawn)),
        ("adversaries of scope=shared", lambda: all(own.scope is Scope.shared for own in searching)),
    ]
    for text in _unmet(needs):
        raise ValueError(f"{config.name}: the plain step needs {text}")


def _unmet(needs: list[tuple[str, Callable[[], bool]]]) -> Iterator[str]:
    return (text for text, holds in needs if not holds())
