"""What large language models rely on: no matrix of a weight's size per pass, bf16, recomputing."""

import copy
import itertools
from typing import Any

import pytest
import torch
from tests.loss.conftest import MakeModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from spd_hydra import rng
from spd_hydra.ci_fn.shared_mlp import SharedMLPCausalImportance
from spd_hydra.decomposition.config import Decomposition, SitePattern
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.decomposition.routing import Routing
from spd_hydra.loss.ascent import Scope, Start
from spd_hydra.loss.divergence import Divergence
from spd_hydra.loss.faithfulness import Faithfulness
from spd_hydra.loss.importance_minimality import ImportanceMinimality
from spd_hydra.loss.loss_set import LossSet
from spd_hydra.loss.objective import Objective
from spd_hydra.loss.persistent_recon import PersistentPGDRecon
from spd_hydra.loss.pgd_recon import PGDRecon
from spd_hydra.loss.recon import Recon, RoutedRecon
from spd_hydra.optimizer import adamw
from spd_hydra.precision import Precision
from spd_hydra.step import Ascent, Step

VOCABULARY, LENGTH, WIDTH, INNER, C = 31, 6, 10, 22, 7


class Block(nn.Module):
    """Embedding, a residual block of a Linear and a Conv1D, and logits: no two matrices of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, INNER), Conv1D(WIDTH, INNER)
        self.unembed = nn.Linear(WIDTH, VOCABULARY, bias=False)
        generator = rng.generator(0, "block")
        with torch.no_grad():
            for parameter in self.parameters():
                fresh = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(fresh / parameter.shape[-1] ** 0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        r = self.embed(tokens)
        r = r + self.down(torch.relu(self.up(self.norm(r))))
        logits: Tensor = self.unembed(r)
        return logits


def objective(
    *,
    precision: Precision = Precision.fp32,
    recompute: bool = False,
    faithfulness: float = 0.0,
    n_samples: int = 2,
) -> Objective:
    sites = {name: SitePattern(pattern=name, C=C) for name in ("up", "down")}
    model = DecomposedModel(
        Block(), Decomposition(sites=sites), SharedMLPCausalImportance(hidden=[8]), seed=0
    )
    losses = LossSet(
        divergence=Divergence.kl,
        faithfulness=Faithfulness(coeff=faithfulness),
        stochastic_recon=Recon(coeff=1.0, n_samples=n_samples),
        stochastic_recon_layerwise=Recon(coeff=1.0, routing=Routing.layerwise),
        stochastic_recon_subset=Recon(coeff=1.0, routing=Routing.uniform_k),
        importance_minimality=ImportanceMinimality(coeff=1e-2, beta=0.5),
    )
    return Objective(model, losses, precision=precision, ci_threshold=0.1, recompute=recompute)


def sample(of: Objective, rows: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (rows, LENGTH), generator=generator)
    columns = len(of.columns(of.losses.active_terms()))
    return tokens, torch.rand(rows, LENGTH, columns, generator=generator)


class Made(TorchDispatchMode):
    """Shapes of all tensors that operations make; views of tensors that were there are not made."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        there = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in there:
                self.shapes.add(tuple(leaf.shape))
        return out


# ---- weight deltas -------------------------------------------------------------------------------------


@pytest.mark.parametrize("faithfulness", [0.0, 1.0])
def test_a_step_forms_weight_deltas_for_the_faithfulness_loss_alone(faithfulness: float) -> None:
    of = objective(faithfulness=faithfulness)
    batch, draws = sample(of)
    with Made() as made:
        loss = of(batch, draws, {})
        torch.autograd.backward(loss.total)
    of_weights = {(WIDTH, INNER), (INNER, WIDTH)}
    assert bool(made.shapes & of_weights) == (faithfulness > 0)


# ---- precision -----------------------------------------------------------------------------------------


def test_bf16_keeps_sums_gradients_moments_and_weights_in_fp32() -> None:
    of = objective(precision=Precision.bf16, faithfulness=0.1)
    batch, draws = sample(of)
    inputs = of.inputs(batch)
    assert inputs.clean.output.dtype is torch.bfloat16  # so that the passes really are
    for name, own in of.statistics(inputs, of.losses.active_terms(), draws, {}).items():
        for key, value in own.items():
            assert value.dtype is torch.float32, f"{name}/{key}"
    parts = [list(of.model.component_parameters()), list(of.model.ci_parameters())]
    optimizer = adamw(parts, lr=1e-3, weight_decay=0.0)
    loss = Step(of, compile=False)(batch, draws, {})
    optimizer.step()
    assert {value.dtype for value in [loss.total, *loss.terms.values(), *loss.l0.values()]} == {torch.float32}
    for name, parameter in of.model.named_parameters():
        assert parameter.dtype is torch.float32, name
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.dtype is torch.float32, name
            assert {moment.dtype for moment in optimizer.state[parameter].values()} == {torch.float32}, name


def test_the_divergence_of_bf16_logits_is_taken_in_fp32() -> None:
    # Logits that bf16 holds exactly, so that only the arithmetic after them can differ.
    of = objective(precision=Precision.bf16)
    masked, target = (torch.randn(2, 5, 64, generator=rng.generator(0, n)).bfloat16() for n in ("a", "b"))
    p, q = (torch.softmax(x.double(), -1) for x in (target, masked))
    expected = (p * (p / q).log()).sum()
    from spd_hydra.loss.divergence import divergence_sum

    with of._autocast():
        found, _ = divergence_sum(Divergence.kl, masked, target)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_the_loss_in_bf16_is_close_to_that_in_fp32() -> None:
    losses = {}
    for precision in Precision:
        of = objective(precision=precision)
        losses[precision] = of(*sample(of, rows=16), {})
    for name, value in losses[Precision.fp32].terms.items():
        torch.testing.assert_close(losses[Precision.bf16].terms[name], value, rtol=2e-2, atol=1e-4, msg=name)


def adversarial(precision: Precision) -> Objective:
    """Every kind of adversary, with all sites masked, one by one, and by subsets."""
    single = objective(precision=precision)
    terms: dict[str, RoutedRecon] = {
        "pgd_recon": PGDRecon(coeff=1.0, n_steps=5, step_size=0.2),
        "pgd_recon_layerwise": PGDRecon(
            coeff=1.0, routing=Routing.layerwise, scope=Scope.per_datapoint, start=Start.zeros
        ),
        "pgd_recon_subset": PGDRecon(coeff=1.0, routing=Routing.uniform_k, scope=Scope.per_datapoint),
        "persistent_pgd_recon": PersistentPGDRecon(coeff=1.0, ascents=2),
    }
    losses = LossSet(divergence=Divergence.kl, **terms)
    return Objective(single.model, losses, precision=precision, ci_threshold=0.1, seed=0)


def test_sums_and_gradients_of_adversaries_stay_fp32_in_bf16() -> None:
    of = adversarial(Precision.bf16)
    batch, draws = sample(of)
    inputs = of.inputs(batch)
    assert inputs.clean.output.dtype is torch.bfloat16
    statistics = of.statistics(inputs, of.losses.active_terms(), draws, {})
    assert {value.dtype for own in statistics.values() for value in own.values()} == {torch.float32}
    with torch.no_grad():  # as an evaluation does
        again = of.statistics(inputs, of.losses.active_terms(), draws, {})
    for name, own in statistics.items():
        assert torch.equal(own["sum"], again[name]["sum"]), name
    Step(of, compile=False)(batch, draws, {})
    trained = [*of.model.component_parameters(), *of.model.ci_parameters(), *of.adversary.parameters()]
    for parameter in trained:
        assert parameter.grad is not None
        assert parameter.grad.dtype is torch.float32
        assert parameter.grad.isfinite().all()


def test_what_adversaries_find_in_bf16_is_close_to_what_they_find_in_fp32() -> None:
    losses, sources = {}, {}
    for precision in Precision:
        of = adversarial(precision)
        batch, draws = sample(of, rows=16)
        Ascent(of, compile=False)([(batch, draws)])
        of.adversary.ascend(left=1)
        losses[precision] = Step(of, compile=False)(batch, draws, {})
        of.adversary.ascend()
        sources[precision] = of.adversary.state()
    for name, value in losses[Precision.fp32].terms.items():
        torch.testing.assert_close(losses[Precision.bf16].terms[name], value, rtol=3e-2, atol=1e-4, msg=name)
    for name, value in sources[Precision.bf16].items():
        assert value.dtype is torch.float32, name
        assert value.isfinite().all(), name


# ---- recomputed masked passes --------------------------------------------------------------------------


@pytest.mark.parametrize("precision", Precision)
def test_recomputing_masked_passes_changes_no_number(precision: Precision) -> None:
    losses, gradients = [], []
    for recompute in (False, True):
        of = objective(precision=precision, recompute=recompute)
        losses.append(Step(of, compile=False)(*sample(of), {}))
        gradients.append({name: p.grad for name, p in of.model.named_parameters() if p.grad is not None})
    assert torch.equal(losses[0].total, losses[1].total)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name


def most_bytes_of_a_step(of: Objective, rows: int) -> int:
    batch, draws = sample(of, rows=rows)
    loss_and_gradients = Step(of, compile=False)
    loss_and_gradients(batch, draws, {})
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as watched:
        loss_and_gradients(batch, draws, {})
    assert watched.profiler is not None
    events = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(max(itertools.accumulate(sizes)))


def test_a_further_masked_pass_takes_less_memory_than_its_activations() -> None:
    most = {n: most_bytes_of_a_step(objective(n_samples=n), rows=256) for n in (1, 9)}
    more = (most[9] - most[1]) / 8
    # A pass leaves gradients of masks and of inner activations: [positions, C] for two sites each. Its own
    # logits alone, which the backward pass needs, are [positions, vocabulary].
    positions = 256 * LENGTH
    assert more < 4 * positions * (4 * C + 8)
    assert 4 * C + 8 < 2 * VOCABULARY


@pytest.mark.slow
def test_a_compiled_step_recomputes_with_the_parameters_it_is_given(chain: MakeModel) -> None:
    # A pass that is computed again after its parameters were put back would see those of the first step.
    losses = LossSet(stochastic_recon=Recon(coeff=1.0), importance_minimality=ImportanceMinimality(coeff=0.1))
    model = chain()
    other = copy.deepcopy(model)
    compiled = Step(
        Objective(model, losses, precision=Precision.fp32, ci_threshold=0.1, recompute=True), compile=True
    )
    plain = Step(Objective(other, losses, precision=Precision.fp32, ci_threshold=0.1), compile=False)
    columns = len(plain._objective.columns(losses.active_terms()))
    for number in range(2):
        generator = torch.Generator().manual_seed(number)
        batch, draws = torch.randn(9, 5, generator=generator), torch.rand(9, columns, generator=generator)
        compiled(batch, draws, {})
        plain(batch, draws, {})
        for (name, own), wanted in zip(model.named_parameters(), other.parameters(), strict=True):
            if own.requires_grad:
                torch.testing.assert_close(own.grad, wanted.grad, rtol=1e-4, atol=1e-6, msg=name)
                with torch.no_grad():
                    own.add_(0.1)
                    wanted.add_(0.1)
