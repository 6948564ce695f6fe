"""Target training: the optimiser, the data it sees, early ends, and shortcuts that change no number."""

import pytest
import torch
from jaxtyping import Float, Int32
from torch import Tensor, nn

from spd_hydra import rng
from spd_hydra.compiling import can_compile
from spd_hydra.data.sparse_features import SparseFeatures
from spd_hydra.model import training
from spd_hydra.model.base import TargetSpec
from spd_hydra.model.resid_mlp import ResidMLP
from spd_hydra.model.tms import TMS, TMSModel
from spd_hydra.model.training import TargetTraining, TrainableTarget, fresh_loss, train, trained_parameters
from spd_hydra.schedule import Schedule, ScheduleKind
from spd_hydra.section import ConfigError

SPECS = [
    TMS(n_features=6, n_hidden=3),
    TMS(n_features=6, n_hidden=3, n_hidden_layers=1),
    ResidMLP(n_features=7, d_embed=20, d_mlp=5, n_layers=1),
    ResidMLP(n_features=7, d_embed=20, d_mlp=5, n_layers=3),
]


@pytest.mark.parametrize("spec", SPECS, ids=["tms", "tms-id", "resid_mlp1", "resid_mlp3"])
def test_the_fast_gradients_are_those_of_the_loss(spec: TrainableTarget) -> None:
    module = spec.build(rng.generator(0, "t")).double()
    batches = SparseFeatures(feature_probability=0.2, low=-1).bind(spec)
    batch = batches(rng.key(0, "t"), torch.arange(64, dtype=torch.int32)).double()
    expected = torch.autograd.grad(spec.training_loss(module, batch), trained_parameters(module))
    torch.testing.assert_close(spec.gradients(module, batch), list(expected))


@pytest.mark.parametrize("n_layers", [1, 3])
def test_training_is_adamw_of_torch_with_the_schedule(n_layers: int) -> None:
    schedule = Schedule(kind=ScheduleKind.cosine, warmup_fraction=0.25)
    recipe = TargetTraining(steps=40, batch_size=16, lr=0.02, lr_schedule=schedule, weight_decay=0.1)
    spec = ResidMLP(n_features=7, d_embed=20, d_mlp=5, n_layers=n_layers, training=recipe)
    batches = SparseFeatures(feature_probability=0.3).bind(spec)
    trained, expected = (spec.build(rng.generator(0, "t")) for _ in range(2))
    assert train(spec, trained, batches, rng.key(0, "t"))

    optimiser = torch.optim.AdamW(expected.parameters(), lr=0.02, weight_decay=0.1)
    for step in range(40):
        optimiser.param_groups[0]["lr"] = 0.02 * schedule.factor(step, 40)
        rows = torch.arange(16 * step, 16 * (step + 1), dtype=torch.int32)
        optimiser.zero_grad()
        spec.training_loss(expected, batches(rng.key(0, "t"), rows)).backward()
        optimiser.step()
    torch.testing.assert_close(trained.state_dict(), expected.state_dict(), rtol=1e-3, atol=1e-4)


class Recorded:
    """A data source that remembers which rows were drawn."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, key: Int32[Tensor, "2"], rows: Int32[Tensor, " batch"]) -> Float[Tensor, "batch 5"]:
        self.rows += rows.tolist()
        return torch.ones(len(rows), 5)


@pytest.mark.parametrize("block", [1, 35, 1000, 10**9])
def test_each_row_is_seen_once_however_the_draws_are_grouped(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_EAGER_BLOCK", block)
    source = Recorded()
    recipe = TargetTraining(steps=7, batch_size=3)
    seen = list(training._stream(recipe, source, rng.key(0, "t")))
    assert [len(batch) for batch in seen] == [3] * 7
    assert source.rows == [0, *range(21)]  # the first one to learn the width


def test_only_free_parameters_move() -> None:
    spec = TMS(n_hidden=3, n_hidden_layers=1, training=TargetTraining(steps=3, batch_size=8))
    module = spec.build(rng.generator(0, "t"))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    train(spec, module, SparseFeatures(feature_probability=1).bind(spec), rng.key(0, "t"))
    moved = {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"embed.weight", "unembed.shared", "unembed.bias"}
    assert module.unembed.shared is module.embed.weight


def test_training_takes_no_numbers_from_the_global_generator_and_keeps_the_threads() -> None:
    spec = TMS(training=TargetTraining(steps=3, batch_size=8))
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    train(spec, spec.build(rng.generator(0, "t")), SparseFeatures().bind(spec), rng.key(0, "t"))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_a_tms_with_an_output_that_no_input_can_raise_is_hopeless() -> None:
    weight = torch.tensor([[1.0, -1.0, 0.5]])
    # highest pre-activations: b + 1 + 0.5, b + 1, b + 0.5 + 0.25
    assert not TMS(n_features=3).hopeless(TMSModel(weight, torch.tensor([-1.4, -0.9, -0.7]), 0))
    assert TMS(n_features=3).hopeless(TMSModel(weight, torch.tensor([-1.6, -0.9, -0.7]), 0))
    assert TMS(n_features=3).hopeless(TMSModel(weight, torch.tensor([-1.4, -1.1, -0.7]), 0))


def test_a_hopeless_run_ends_early_unless_it_may_not() -> None:
    spec = TMS(training=TargetTraining(steps=100, batch_size=8))
    batches = SparseFeatures().bind(spec)
    steps: list[int] = []
    dead = TMSModel(torch.zeros(2, 5), torch.full((5,), -1.0), 0)
    assert not train(spec, dead, batches, rng.key(0, "t"), report=steps.append)
    assert steps == [5]
    assert train(spec, dead, batches, rng.key(0, "t"), may_give_up=False, report=steps.append)
    assert steps[-1] == 100


def test_fresh_loss_is_the_mean_over_rows_of_the_key() -> None:
    spec = TMS(n_features=3)
    module = TMSModel(torch.zeros(2, 3), torch.zeros(3), 0)  # always outputs 0: the loss is E x² = p / 3
    batches = SparseFeatures(feature_probability=0.3).bind(spec)
    assert fresh_loss(spec, module, batches, rng.key(0, "t")) == pytest.approx(0.1, rel=0.02)


def test_more_rows_than_can_be_numbered_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"steps: got 300000, must be < 2\^31 / batch_size = 262144"):
        TargetTraining(steps=300_000, batch_size=8192)


def test_a_base_target_has_no_loss() -> None:
    with pytest.raises(NotImplementedError):
        TrainableTarget().training_loss(nn.Identity(), torch.zeros(1))
    assert not isinstance(TargetSpec(), TrainableTarget)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
def test_compiled_draws_give_the_batches_of_eager_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    if not can_compile("cpu"):
        pytest.skip("no C++ compiler")
    spec = TMS(n_features=40, training=TargetTraining(steps=2, batch_size=64))
    batches, key = SparseFeatures().bind(spec), rng.key(0, "t")
    eager = list(training._stream(spec.training, batches, key))
    monkeypatch.setattr(training, "_COMPILE_ABOVE", 0)
    compiled = list(training._stream(spec.training, batches, key))
    assert torch.equal(torch.stack(eager), torch.stack(compiled))
