"""Evaluations made by hand, like those of real runs: TMS, a residual MLP, a language model."""

from typing import Any

import numpy as np

from spd_hydra.metric.evaluation import (
    Context,
    Evaluation,
    NeuronContributions,
    SiteCheck,
    SiteEvaluation,
    SubcomponentText,
    Text,
    TextExample,
    TokenResponse,
)

POSITIONS = 100_000
BINS = 50


def _site(
    weight: np.ndarray,
    V: np.ndarray,
    U: np.ndarray,
    probe: np.ndarray | None,
    frequency: np.ndarray,
    order: np.ndarray,
    rng: np.random.Generator,
    directions: np.ndarray | None = None,
) -> SiteEvaluation:
    histogram = np.zeros(BINS, dtype=np.int64)
    alive = frequency > 0
    histogram[0] = int((1 - frequency[alive]).sum() * POSITIONS) + int((~alive).sum()) * POSITIONS
    histogram[-1] = int(frequency.sum() * POSITIONS * 0.9)
    middle = np.exp(-np.linspace(0, 6, BINS - 2)) + 0.02
    histogram[1:-1] = (middle / middle.sum() * frequency.sum() * POSITIONS * 0.1).astype(np.int64)
    mean = np.where(alive, frequency * 0.93, 10 ** rng.uniform(-9, -6.2, len(frequency)))
    mean[np.flatnonzero(~alive)[:2]] = 0.0
    return SiteEvaluation(
        weight=weight, V=V, U=U, mean_ci=mean, density=frequency, histogram=histogram, order=order,
        probe_lower=None if probe is None else np.clip(probe, 0, 1),
        probe_upper=None if probe is None else np.where(probe > 1, 1 + 0.01 * (probe - 1), probe.clip(0)),
        directions=directions,
    )  # fmt: skip


def _checks(site: str, name: str, expected: int, errors: tuple[int, int]) -> list[SiteCheck]:
    return [
        SiteCheck(name=name, site=site, tolerance=tolerance, error=error, expected=expected)
        for tolerance, error in zip((0.1, 0.2), errors, strict=True)
    ]


def tms(*, solved: bool = True, n_features: int = 5, C: int = 20, seed: int = 0) -> Evaluation:
    """TMS with 5 features in 2 hidden dimensions, tied; unsolved: features 1 and 2 share a subcomponent."""
    rng = np.random.default_rng(seed)
    angles = 2 * np.pi * np.arange(n_features) / n_features + 0.3
    weight = np.stack([np.cos(angles), np.sin(angles)]) * 1.02
    owners = rng.permutation(C)[:n_features]
    V, U = rng.normal(0, 0.004, (n_features, C)), rng.normal(0, 0.05, (C, 2))
    probe = rng.uniform(-0.02, 0.03, (n_features, C))
    frequency = np.zeros(C)
    for feature, owner in enumerate(owners):
        V[feature, owner] += 1.0
        U[owner] = weight[:, feature] * 0.995
        probe[feature, owner] = rng.uniform(0.99, 1.3)
        frequency[owner] = 0.048
    if not solved:
        V[2, owners[1]], U[owners[1]] = 1.0, (weight[:, 1] + weight[:, 2]) / 2
        V[2, owners[2]] = 0.2
        probe[2, owners[1]], probe[2, owners[2]] = 1.1, 0.35
        extra = next(c for c in range(C) if c not in owners)
        probe[:, extra] = 0.15 + 0.4 * rng.random(n_features)
        frequency[extra], frequency[owners[1]] = 0.4, 0.095
        V[:, extra], U[extra] = rng.normal(0, 0.4, n_features), rng.normal(0, 0.5, 2)
    rest = [c for c in range(C) if c not in owners]
    order = np.array([*owners, *sorted(rest, key=lambda c: -frequency[c])])
    args = (probe, frequency, order, rng)
    checks = []
    for site in ("embed", "unembed"):
        checks += _checks(site, "identity", n_features, (0, 0) if solved else (7, 6))
    sites = {
        "embed": _site(weight, V, U, *args, directions=np.eye(n_features)),
        "unembed": _site(weight.T, U.T, V.T, *args, directions=weight.T),
    }
    alive = float((frequency > 0).sum())
    metrics = {
        "loss/total": 4.1e-3, "loss/stochastic_recon": 1.3e-5, "loss/importance_minimality": 0.47,
        "l0/embed": 0.2512, "l0/unembed": 0.2507, "l0/total": 0.5019,
        "alive/embed": alive, "alive/unembed": alive,
        "recovery/mmcs": 0.9998 if solved else 0.912, "recovery/ml2r": 0.995 if solved else 0.83,
        "l0_ideal/embed": 0.25, "l0_ideal/unembed": 0.25,
    }  # fmt: skip
    return Evaluation(
        step=10_000, n_positions=POSITIONS, ci_threshold=0.1, metrics=metrics, sites=sites, checks=checks,
        mmcs=metrics["recovery/mmcs"], ml2r=metrics["recovery/ml2r"], ml2r_plain=0.99,
        solved=solved, strict=solved,
    )  # fmt: skip


def resid_mlp(*, n_features: int = 100, n_neurons: int = 50, C: int = 140, seed: int = 0) -> Evaluation:
    """A residual MLP of one layer: identity at mlp_in, dense at mlp_out with two alive ones too many."""
    rng = np.random.default_rng(seed)
    d_embed = 300
    directions = rng.normal(size=(n_features, d_embed))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    features = rng.gamma(0.5, 0.4, (n_neurons, n_features)) * (rng.random((n_neurons, n_features)) < 0.3)
    W_in = features @ directions
    W_out = rng.normal(0, 0.3, (d_embed, n_neurons))
    owners = rng.permutation(C)[:n_features]
    V_in, U_in = rng.normal(0, 1e-3, (d_embed, C)), rng.normal(0, 1e-3, (C, n_neurons))
    V_in[:, owners], U_in[owners] = directions.T, features.T
    probe = rng.uniform(-0.01, 0.02, (n_features, C))
    probe[np.arange(n_features), owners] = rng.uniform(0.97, 1.2, n_features)
    frequency = np.zeros(C)
    frequency[owners] = 0.0098
    order = np.array([*owners, *[c for c in range(C) if c not in owners]])
    mlp_in = _site(W_in, V_in, U_in, probe, frequency, order, rng, directions)

    heavy = rng.permutation(C)[: n_neurons + 2]
    V_out, U_out = rng.normal(0, 1e-3, (n_neurons, C)), rng.normal(0, 1e-3, (C, d_embed))
    V_out[:, heavy[:n_neurons]], U_out[heavy[:n_neurons]] = np.eye(n_neurons), W_out.T
    dense = rng.uniform(-0.01, 0.02, (n_features, C))
    dense[:, heavy] = (rng.random((n_features, len(heavy))) < 0.35) * rng.uniform(
        0.5, 1.1, (n_features, len(heavy))
    )
    dense[0, heavy[:n_neurons]] = 1.05
    dense[:, heavy[n_neurons:]] *= rng.random((n_features, 2)) < 0.05
    dense_frequency = np.zeros(C)
    dense_frequency[heavy] = rng.uniform(0.1, 0.3, len(heavy))
    dense_order = np.array([*heavy, *[c for c in range(C) if c not in heavy]])
    mlp_out = _site(W_out, V_out, U_out, dense, dense_frequency, dense_order, rng)

    wrong = int((np.clip(dense, 0, 1)[:, heavy[n_neurons:]] > 0.1).sum())
    target = (features.T * rng.normal(0.3, 0.1, (n_features, n_neurons))).clip(-0.1)
    contributions = NeuronContributions(
        layer="layers.0", target=target, subcomponents=target * 0.97 + rng.normal(0, 0.004, target.shape)
    )
    checks = _checks("layers.0.mlp_in", "identity", n_features, (0, 0))
    checks += _checks("layers.0.mlp_out", "dense", n_neurons, (wrong, wrong))
    metrics = {"loss/total": 1e-3, "l0/total": 9.0, "recovery/mmcs": 0.99, "l0_ideal/layers.0.mlp_in": 1.0}
    return Evaluation(
        step=20_000, n_positions=POSITIONS, ci_threshold=0.1, metrics=metrics, checks=checks,
        sites={"layers.0.mlp_in": mlp_in, "layers.0.mlp_out": mlp_out}, contributions=[contributions],
        mmcs=0.99, ml2r=1.01, ml2r_plain=1.0, solved=wrong == 0, strict=False,
    )  # fmt: skip


def language_model(*, n_sites: int = 10, C: int = 512, d: int = 64, seed: int = 0) -> Evaluation:
    """Many sites without probes and without a known answer, threshold 0."""
    rng = np.random.default_rng(seed)
    sites = {}
    for index in range(n_sites):
        frequency = np.where(rng.random(C) < 0.3, 10 ** rng.uniform(-4.5, 0, C), 0.0)
        V, U = rng.normal(0, d**-0.5, (d, C)), rng.normal(0, C**-0.5, (C, d)) * (frequency[:, None] > 0)
        order = np.argsort(-frequency, kind="stable")
        sites[f"transformer.h.{index}.attn.c_proj_$x"] = _site((V @ U).T, V, U, None, frequency, order, rng)
    return Evaluation(
        step=500, n_positions=8192, ci_threshold=0.0, metrics={"loss/total": 0.2} | ABLATED, sites=sites,
        text=_text(sites, rng),
    )  # fmt: skip


# As in a run that went well: what is left of a model with its sites ablated.
ABLATED = {
    "ce/target": 3.212, "ce/unmasked": 3.225, "kl/unmasked": 0.021, "ce/stochastic": 3.31,
    "kl/stochastic": 0.094, "ce/ci": 3.402, "kl/ci": 0.19, "ce/rounded_0": 3.36, "kl/rounded_0": 0.15,
    "ce/rounded_0.5": 3.75, "kl/rounded_0.5": 0.55, "ce/random": 6.4, "kl/random": 3.3, "ce/zero": 9.7,
    "kl/zero": 6.5, "ce_recovered/unmasked": 0.998, "ce_recovered/stochastic": 0.985,
    "ce_recovered/ci": 0.971, "ce_recovered/rounded_0": 0.977, "ce_recovered/rounded_0.5": 0.917,
    "ce_recovered/random": 0.509, "ce_subset/attn": 3.28, "kl_subset/attn": 0.07, "ce_subset/mlp": 3.34,
    "kl_subset/mlp": 0.12, "l0_group/attn": 21.5, "l0_group/mlp": 48.25, "alive_group/attn": 600.0,
    "alive_group/mlp": 900.0, "pgd/20": 0.83, "pgd/320": 4.1,
}  # fmt: skip

WORDS = [
    *("the", "a", "of", "to", "in", "is", "that", "it", "for", "as", "def", "return", "self", "None", "else"),
    *("<b>not</b>", "\n", "\t", "(", ")", ":", "=", ".", ",", "é", "模型", "&amp;", '"quoted"', "function"),
]


def _text(sites: dict[str, SiteEvaluation], rng: np.random.Generator, contexts: int = 8) -> Text:
    """Random words, to which the heaviest twenty subcomponents of each site respond."""

    def words(number: int) -> list[str]:
        return [f" {WORDS[place]}" for place in rng.integers(0, len(WORDS), number)]

    def context() -> Context:
        ci = np.where(rng.random(16) < 0.2, rng.random(16), 0.0)
        ci[10] = rng.uniform(0.6, 1)
        return Context(tokens=words(16), ci=[round(float(g), 4) for g in ci], at=10)

    described = {
        name: [
            SubcomponentText(
                index=int(index),
                mean_ci=float(site.mean_ci[index]),
                density=float(site.density[index]),
                tokens=[TokenResponse(token=word, mean_ci=0.9, count=12) for word in words(8)],
                contexts=[context() for _ in range(contexts)],
            )
            for index in site.order[:20]
        ]
        for name, site in sites.items()
    }
    active = [{name: rng.poisson(2, 128).tolist() for name in sites} for _ in range(4)]
    examples = [
        TextExample(
            tokens=words(128), active=own,
            total_ci={name: [0.9 * count for count in counts] for name, counts in own.items()},
        )
        for own in active
    ]  # fmt: skip
    return Text(positions=8192, examples=examples, sites=described)


def history(
    *,
    sites: tuple[str, ...] = ("embed", "unembed"),
    steps: int = 10_000,
    C: int = 20,
    final: float = 5.0,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Rows of a metrics log whose losses and counts fall towards the known answer."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for step in range(0, steps + 1, steps // 200):
        t = step / steps
        recon = 0.02 * np.exp(-9 * t) + 1.3e-5
        minimality = 0.5 + C * np.exp(-12 * t)
        losses = {
            "loss/total": recon * 2 + 3e-3 * minimality,
            "loss/stochastic_recon": recon,
            "loss/stochastic_recon_layerwise": recon * 0.6,
            "loss/importance_minimality": minimality,
            "loss/faithfulness": 0.0,
        }
        noisy = {name: float(value * np.exp(rng.normal(0, 0.12))) for name, value in losses.items()}
        rows.append(
            {"step": step, "split": "train", **noisy, "lr": 1e-3 * (1 - t), "grad_norm/components": 0.1}
        )
        if step % (steps // 10) == 0:
            active = 0.25 + C * np.exp(-11 * t)
            measured: dict[str, float] = {
                **losses,
                "loss/ci_masked_recon": recon * 0.4 + 2e-6,
                "loss/unmasked_recon": recon * 0.2 + 1e-6,
            }
            measured |= {f"l0/{site}": active * (1 + 0.1 * i) for i, site in enumerate(sites)}
            measured["l0/total"] = active * len(sites)
            measured |= {
                f"alive/{site}": round(final + (C - final) * np.exp(-9 * t)) + i
                for i, site in enumerate(sites)
            }
            measured |= {"recovery/mmcs": 1 - 0.5 * np.exp(-8 * t), "recovery/ml2r": 1 - 0.4 * np.exp(-8 * t)}
            rows.append({"step": step, "split": "eval", **measured})
    return rows
