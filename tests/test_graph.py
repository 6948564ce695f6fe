"""A step that is recorded and replayed: the same numbers, whatever changes between steps.

A tape stands in for CUDA graphs. Like them it keeps the operations with the tensors they worked on and the
numbers they were called with, runs no Python when it is replayed, and can record nothing that waits.
"""

import contextlib
import dataclasses
import gc
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spd_hydra.finite import TrainingError
from spd_hydra.graph import REHEARSALS, CudaRecorder, GraphedStep, StepInputs, graphed_step, obstacle
from spd_hydra.loss.base import Loss, LossInputs, Statistics
from spd_hydra.metric.evaluation import Evaluation
from spd_hydra.replicas import Alone, Replicas
from spd_hydra.restarts import begin_with_best
from spd_hydra.trainer import Trainer

Make = Callable[..., Trainer]
T = TypeVar("T")
STEPS = 33
# Learning rates of which float32 has the exact value, as a graph reads them: 2^-10 · (1 - k/32).
EXACT = ("train.lr=0.0009765625", "train.lr_schedule.kind=linear", "train.log_every=8")
CASES = {
    "adversarial": ["loss.pgd_recon.coeff=1"],
    "annealed": ["loss.importance_minimality={p_end:0.5,squeeze:3.0,squeeze_from:0.3,squeeze_to:0.6}"],
    "clipped, subsets": [
        "train.clip_components=0.01",
        "train.clip_ci_fn=0.02",
        "loss.stochastic_recon_subset.coeff=1",
    ],
    "untied, shared_mlp": [
        "decomposition=tms_5-2-untied",
        "decomposition.sites.embed.lr_factor=0.25",
        "ci_fn=shared_mlp",
        "ci_fn.hidden=[8]",
    ],
}


def leaves(value: Any) -> list[Tensor]:
    """The tensors in tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    return [leaf for part in value for leaf in leaves(part)] if isinstance(value, Iterable) else []


class Tape(TorchDispatchMode):
    """Operations, their arguments and their results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        found = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, found))
        return found

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, found in self.calls:
            for place, value in zip(leaves(found), leaves(func(*args, **kwargs)), strict=True):
                if place.data_ptr() != value.data_ptr():
                    place.copy_(value)


class TapeRecorder:
    """Counts what it does."""

    def __init__(self) -> None:
        self.rehearsed, self.replays = 0, 0
        self.tapes: list[Tape] = []

    def rehearse(self, work: Callable[[], T]) -> T:
        self.rehearsed += 1
        return work()

    def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        with Tape() as tape:
            results = work()
        self.tapes.append(tape)

        def replay() -> None:
            self.replays += 1
            tape.replay()

        return results, replay


class Unrecordable(TapeRecorder):
    """Cannot record the n-th piece: Python has run its work and nothing was done to memory."""

    def __init__(self, number: int, protected: Callable[[], Iterable[Tensor]]) -> None:
        super().__init__()
        self.number, self.asked = number, 0
        self._protected = protected

    def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        self.asked += 1
        if self.asked - 1 != self.number:
            return super().record(work)
        before = [(tensor, tensor.detach().clone()) for tensor in self._protected()]
        work()
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
        try:
            raise RuntimeError("operation not permitted\nand much more")
        finally:
            raise RuntimeError("operation failed due to a previous error\nand much more")


Record = Callable[[TapeRecorder], None]


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Record:
    """Let trainers that take their first step from now on record it with this recorder."""

    def with_recorder(recorder: TapeRecorder) -> None:
        def graphed(wanted: bool, **parts: Any) -> GraphedStep | None:
            return GraphedStep(**parts, recorder=recorder) if wanted else None

        monkeypatch.setattr("spd_hydra.trainer.graphed_step", graphed)
        monkeypatch.setattr("spd_hydra.replicas.graphed_step", graphed)

    return with_recorder


def assert_same(trainer: Trainer, wanted: Trainer) -> None:
    for own, other in zip(trainer.state(), wanted.state(), strict=True):
        assert own.keys() == other.keys()
        for name, value in other.items():
            assert torch.equal(own[name], value), name
    assert trainer.run.read_metrics() == wanted.run.read_metrics()


@pytest.mark.parametrize("words", CASES.values(), ids=CASES.keys())
def test_a_replayed_training_has_the_bits_of_a_launched_one(
    make: Make, record: Record, words: list[str]
) -> None:
    launched = make(*EXACT, *words, "train.cuda_graphs=false", steps=STEPS)
    launched.fit()
    record(recorder := TapeRecorder())
    replayed = make(*EXACT, *words, steps=STEPS)
    replayed.fit()
    assert_same(replayed, launched)
    assert [row["step"] for row in replayed.run.read_metrics() if row["split"] == "train"] == [
        8,
        16,
        24,
        32,
        33,
    ]
    assert len(recorder.tapes) == 2
    assert recorder.rehearsed == 2 * REHEARSALS
    assert recorder.replays == 2 * (STEPS - REHEARSALS - 1)


def test_rates_that_float32_rounds_change_the_weights_by_rounding_alone(make: Make, record: Record) -> None:
    launched = make(steps=12)
    launched.fit()
    record(TapeRecorder())
    replayed = make(steps=12)
    replayed.fit()
    for name, value in launched.model.trainable_state().items():
        torch.testing.assert_close(replayed.model.trainable_state()[name], value, rtol=1e-5, atol=1e-6)
    lrs = [[row.get("lr") for row in trainer.run.read_metrics()] for trainer in (replayed, launched)]
    assert lrs[0] == lrs[1]


def test_replayed_replicas_have_the_bits_of_launched_ones(make: Make, record: Record) -> None:
    words = (*EXACT, *CASES["annealed"], *CASES["clipped, subsets"])
    launched = [make(*words, f"seed={seed}", steps=STEPS) for seed in range(3)]
    Replicas(launched).fit()
    record(recorder := TapeRecorder())
    replayed = [make(*words, f"seed={seed}", steps=STEPS) for seed in range(3)]
    Replicas(replayed).fit()
    for own, wanted in zip(replayed, launched, strict=True):
        assert_same(own, wanted)
    assert recorder.replays == 2 * (STEPS - REHEARSALS - 1)


# ---- other states --------------------------------------------------------------------------------------


def steps_from(trainer: Trainer, state: Any, *, to: int) -> None:
    trainer.set_state(*state, step=4)
    while trainer.step < to:
        trainer.train_step()


def copied(state: Any) -> Any:
    return tuple({name: value.clone() for name, value in part.items()} for part in state)


@pytest.mark.parametrize("with_moments", [True, False])
def test_a_recorded_training_goes_on_from_another_state(
    make: Make, record: Record, with_moments: bool
) -> None:
    other = make(*EXACT, "seed=5", steps=STEPS)
    for _ in range(4):
        other.train_step()
    parameters, moments = copied(other.state())
    state = (parameters, moments if with_moments else {})
    launched = make(*EXACT, steps=STEPS)
    steps_from(launched, state, to=12)
    record(recorder := TapeRecorder())
    replayed = make(*EXACT, steps=STEPS)
    for _ in range(REHEARSALS + 3):
        replayed.train_step()
    before = recorder.replays
    places = [tensor.data_ptr() for part in replayed.state() for tensor in part.values()]
    steps_from(replayed, state, to=12)
    assert recorder.replays == before + 2 * 8
    assert places == [tensor.data_ptr() for part in replayed.state() for tensor in part.values()]
    assert_same(replayed, launched)
    assert all(torch.equal(value, state[1][name]) for name, value in moments.items() if with_moments)


@pytest.mark.parametrize("together", [True, False])
def test_initialisations_compete_with_one_recording(make: Make, record: Record, together: bool) -> None:
    words = (*EXACT, "train.restarts.number=3", "train.restarts.fraction=0.2", "eval.every=100")

    def chosen() -> list[Trainer]:
        trainers = [make(*words, f"seed={seed}", steps=STEPS) for seed in range(2 if together else 1)]
        first = [copied(trainer.state())[0] for trainer in trainers]
        initial = [
            lambda number, own=own: {k: v * (1 + number / 10) for k, v in own.items()} for own in first
        ]
        for trainer in trainers:  # the second initialisation wins every comparison
            losses = iter([3.0, 1.0, 2.0, 1.0, 2.0])
            trainer.evaluate = lambda step, losses=losses: Evaluation(  # type: ignore[misc]
                step=step,
                n_positions=1,
                ci_threshold=0.1,
                sites={},
                metrics={"loss/total": next(losses, 0.0)},
            )
        group = Replicas(trainers) if together else Alone(trainers[0])
        assert begin_with_best(group, initial) == [None] * len(trainers)
        assert [trainer.facts["restarts"]["chosen"] for trainer in trainers] == [1] * len(trainers)
        group.begin()
        for _ in range(3):
            group.train_step()
        return trainers

    launched = chosen()
    record(recorder := TapeRecorder())
    for own, wanted in zip(chosen(), launched, strict=True):
        assert_same(own, wanted)
    assert len(recorder.tapes) == 2


# ---- what cannot be recorded ---------------------------------------------------------------------------


@pytest.mark.parametrize(("piece", "asked"), [(0, 1), (1, 2)])
def test_a_recording_that_fails_changes_nothing_and_is_told_once(
    make: Make, record: Record, caplog: pytest.LogCaptureFixture, piece: int, asked: int
) -> None:
    words = (*EXACT, *CASES["annealed"], *CASES["clipped, subsets"])
    launched = make(*words, steps=STEPS)
    launched.fit()
    failing: list[Trainer] = []

    def protected() -> list[Tensor]:
        (trainer,) = failing
        gradients = [p.grad for p in trainer.updates.components + trainer.updates.ci_fn if p.grad is not None]
        return [*(t for part in trainer.state() for t in part.values()), *gradients]

    recorder = Unrecordable(piece, protected)
    record(recorder)
    failing.append(make(*words, steps=STEPS))
    failing[0].fit()
    assert_same(failing[0], launched)
    assert recorder.asked == asked  # without fixed gradients the update is not recorded either
    (line,) = [r.getMessage() for r in caplog.records if r.name == "spd_hydra.graph"]
    what = ("the loss", "the update")[piece]
    assert line == (
        f"{what} cannot be recorded as a CUDA graph and is launched kernel by kernel: "
        "operation failed due to a previous error, after: operation not permitted"
    )


@dataclasses.dataclass(kw_only=True)
class Waits(Loss):
    """0; reads a number from the device."""

    def statistics(self, inputs: LossInputs) -> Statistics:
        size = inputs.model.pieces(inputs.model.site_names[0]).V.square().sum()
        return {"sum": 0 * size * size.item(), "count": torch.ones(())}


def test_a_loss_that_waits_for_the_device_is_launched(
    make: Make, record: Record, caplog: pytest.LogCaptureFixture
) -> None:
    record(TapeRecorder())
    trainer = make(extra={"waits": Waits(coeff=1.0)}, steps=REHEARSALS + 3)
    trainer.fit()
    (line,) = [r.getMessage() for r in caplog.records if r.name == "spd_hydra.graph"]
    assert line.startswith("the loss cannot be recorded")
    assert line.endswith("operation not permitted when stream is capturing")
    assert trainer.step == REHEARSALS + 3


def test_a_replayed_loss_that_breaks_stops_the_run_before_the_update(make: Make, record: Record) -> None:
    record(TapeRecorder())
    trainer = make(*EXACT, steps=STEPS)
    for _ in range(REHEARSALS + 2):
        trainer.train_step()
    with torch.no_grad():
        trainer.updates.components[0].fill_(torch.nan)
    before = copied(trainer.state())
    with pytest.raises(TrainingError, match=f"the loss is nan at step {REHEARSALS + 2}, in: "):
        trainer.train_step()
    for own, wanted in zip(trainer.state(), before, strict=True):
        for name, value in wanted.items():
            torch.testing.assert_close(own[name], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("compiled", "from_keys", "lasting", "ranks", "reason"),
    [
        (True, True, False, 1, None),
        (False, True, False, 1, "it is not compiled"),
        (True, False, False, 1, "its data are not drawn on the device"),
        (True, True, True, 1, "adversaries that last are trained along, with optimisers of their own"),
        (True, True, False, 4, "4 ranks exchange messages in it"),
    ],
)
def test_what_keeps_a_step_from_being_recorded_is_named(
    compiled: bool, from_keys: bool, lasting: bool, ranks: int, reason: str | None
) -> None:
    assert obstacle(compiled=compiled, from_keys=from_keys, lasting=lasting, ranks=ranks) == reason


def test_on_a_cpu_nothing_is_recorded_and_nothing_is_said(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make()
    with caplog.at_level(logging.INFO):
        assert (
            graphed_step(
                True,
                sampler=trainer.sampler,
                step=trainer.loss_and_gradients,
                objective=trainer.objective,
                optimizer=trainer.updates.optimizer,
                update=lambda: None,
            )
            is None
        )
    assert caplog.records == []
    assert trainer.updates.optimizer.param_groups[0]["lr"] == trainer.training.lr


# ---- the recorder of a GPU, on one that only writes down what it is asked --------------------------------


class WrittenDown:
    """Stands for `torch.cuda`: what happens on which stream."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.now = "present"
        signature = inspect.signature(torch.cuda.graph.__init__)
        fake = self

        class Stream:
            def __init__(self, device: Any = None, name: str = "side") -> None:
                self.device, self.name = device, name

            def wait_stream(self, other: "Stream") -> None:
                fake.events.append(f"{self.name} waits for {other.name}")

        class Graph:
            def replay(self) -> None:
                fake.events.append(f"replayed on {fake.now}")

        @contextlib.contextmanager
        def stream(chosen: Stream) -> Iterator[None]:
            before, fake.now = fake.now, chosen.name
            yield_failed = True
            try:
                yield
                yield_failed = False
            finally:
                fake.now = before
                fake.events.append(f"left {chosen.name}{' after an error' if yield_failed else ''}")

        class Capture:  # like torch's, it stays on its stream when the recording ends with an error
            def __init__(self, *arguments: Any, **options: Any) -> None:
                bound = signature.bind(None, *arguments, **options).arguments
                assert isinstance(bound["cuda_graph"], Graph)
                assert bound["capture_error_mode"] == "thread_local"
                self.stream = bound["stream"]

            def __enter__(self) -> None:
                fake.events.append(f"recording begins on {fake.now}")

            def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
                fake.events.append("recording ends")
                if error is not None:
                    raise RuntimeError("operation failed due to a previous error")

        for name, value in {"Stream": Stream, "stream": stream, "CUDAGraph": Graph, "graph": Capture}.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(device, "present"))


def test_rehearsals_run_on_the_stream_of_the_recording_between_what_was_and_what_will_be_launched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = WrittenDown(monkeypatch)
    found = CudaRecorder(torch.device("cuda", 0)).rehearse(lambda: cuda.events.append(f"work on {cuda.now}"))
    assert found is None
    assert cuda.events == ["side waits for present", "work on side", "left side", "present waits for side"]


def test_a_recording_is_replayed_at_once_and_collects_no_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = WrittenDown(monkeypatch)

    def work() -> bool:
        cuda.events.append(f"work on {cuda.now}")
        return gc.isenabled()

    collected, replay = CudaRecorder(torch.device("cuda", 0)).record(work)
    assert not collected
    assert gc.isenabled()
    begun = ["recording begins on side", "work on side", "recording ends", "left side", "replayed on present"]
    assert cuda.events == begun
    replay()
    assert cuda.events == [*begun, "replayed on present"]


def test_after_a_failed_recording_the_stream_is_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = WrittenDown(monkeypatch)

    def work() -> None:
        raise RuntimeError("operation not permitted")

    with pytest.raises(RuntimeError, match="previous error"):
        CudaRecorder(torch.device("cuda", 0)).record(work)
    assert cuda.now == "present"
    assert gc.isenabled()
    assert cuda.events == ["recording begins on side", "recording ends", "left side after an error"]


# ---- inputs --------------------------------------------------------------------------------------------


def test_inputs_are_put_where_they_always_are() -> None:
    examples = [torch.zeros(3, 2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32), torch.zeros(())]
    inputs = StepInputs([*examples, torch.zeros(())], torch.device("cpu"))
    places = inputs.tensors
    addresses = [place.data_ptr() for place in places]
    assert [(address - addresses[0]) % 16 for address in addresses] == [0] * 4
    assert len({place.untyped_storage().data_ptr() for place in places}) == 1
    for shift in (0, 7):
        keys = torch.arange(6, dtype=torch.int32).view(3, 2) - 2**31 + shift
        key = torch.tensor([2**31 - 1 - shift, -1], dtype=torch.int32)
        values = [keys, key, torch.tensor(0.1 + shift), torch.tensor(-1e-30)]
        inputs.fill(values)
        for place, value in zip(places, values, strict=True):
            assert place.dtype == value.dtype
            assert torch.equal(place, value)
    assert [place.data_ptr() for place in places] == addresses


def test_inputs_of_another_number_are_refused() -> None:
    inputs = StepInputs([torch.zeros(()), torch.zeros(())], torch.device("cpu"))
    with pytest.raises(ValueError, match="shorter"):
        inputs.fill([torch.zeros(())])
