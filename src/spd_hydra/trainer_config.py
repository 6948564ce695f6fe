"""How a decomposition is trained and when it is measured."""

import dataclasses
from collections.abc import Iterator
from enum import Enum

from spd_hydra.precision import Precision
from spd_hydra.schedule import Schedule, ScheduleKind
from spd_hydra.section import Problem, Section, option


class Sharding(Enum):
    """What ranks share out among themselves; the numbers are the same up to rounding.

    `none`: nothing. `optimizer`: each keeps, of V, U and the causal-importance function, the moments and the
    summed gradients of its part alone, 1/ranks of them. Parameters and the target are whole on each.
    """

    none = "none"
    optimizer = "optimizer"


@dataclasses.dataclass(kw_only=True)
class FaithfulnessWarmup(Section):
    """Steps before training in which V and U alone learn to sum to the weights, with their own optimiser."""

    steps: int = option(200, "number of steps; 0: none", ge=0)
    lr: float = option(1e-2, "learning rate of the warmup's AdamW", gt=0)
    weight_decay: float = option(0.1, "decoupled weight decay of the warmup's AdamW", ge=0)


@dataclasses.dataclass(kw_only=True)
class Restarts(Section):
    """Several initialisations of one decomposition, of which the one with the lowest loss goes on.

    A decomposition can start in a basin whose best loss is above that of the solution: two features that
    share a subcomponent, say. The choice is by the training loss on held-out batches, which needs no known
    answer. It is made by successive halving: after the first share of the steps the worse half ends, after
    twice as many steps the worse half of the rest, and so on.
    """

    number: int = option(1, "initialisations to choose from; 1: no choice", ge=1)
    fraction: float = option(
        0.2, "share of train.steps that each of them gets before the first comparison", gt=0, le=1
    )


@dataclasses.dataclass(kw_only=True)
class Training(Section):
    """One AdamW, without weight decay, on V, U and the causal-importance function."""

    steps: int = option(10_000, "training steps; schedules and anneals stretch over them", ge=1)
    batch_size: int = option(4096, "rows of the global batch", ge=1)
    accumulate: int = option(
        1, "parts that each rank's rows are taken in, one after the other, to save memory", ge=1
    )
    lr: float = option(1e-3, "learning rate of AdamW", gt=0)
    lr_schedule: Schedule = option(
        default_factory=lambda: Schedule(kind=ScheduleKind.cosine), help="how the learning rate moves"
    )
    faithfulness_warmup: FaithfulnessWarmup = option(
        default_factory=FaithfulnessWarmup, help="fit the weights before training"
    )
    restarts: Restarts = option(default_factory=Restarts, help="choose among several initialisations")
    replicas: int = option(
        1, "decompositions trained at once in one process, of the seeds seed, seed + 1, ...", ge=1
    )
    shard: Sharding = option(
        Sharding.none,
        "none | optimizer: of several ranks each keeps its part of AdamW's moments and gradients alone",
    )
    join_every: float = option(
        0.0,
        "fraction of training, after each of which one subcomponent takes over from two; 0: never",
        ge=0,
        le=1,
    )
    clip_components: float | None = option(
        None, "largest gradient norm of V and U together; null: no limit", gt=0
    )
    clip_ci_fn: float | None = option(None, "largest gradient norm of the ci_fn; null: no limit", gt=0)
    precision: Precision = option(Precision.fp32, "fp32 | tf32 (matrix products, on a GPU) | bf16 (autocast)")
    checkpoint_activations: bool = option(
        False,
        "masked passes keep inputs of blocks alone and compute each block again: less memory, slower",
    )
    compile: bool = option(True, "compile the step, where a C++ compiler or Triton is at hand")
    compile_blocks: bool | None = option(
        None,
        "compile the target's blocks one by one, not the step as a whole; null: where that is too large",
    )
    cuda_graphs: bool = option(True, "replay the compiled step as CUDA graphs, on a GPU")
    log_every: int = option(100, "steps between rows of the metrics log", ge=1)
    checkpoint_every: int = option(2000, "steps between checkpoints; the last step always has one", ge=1)
    keep_checkpoints: int = option(2, "how many of the newest checkpoints to keep", ge=1)

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.accumulate > self.batch_size:
            yield Problem(
                "accumulate",
                f"got {self.accumulate}, must be ≤ batch_size, which is {self.batch_size}: a part has a row "
                "at least",
            )
        if self.compile_blocks and self.replicas > 1:
            yield Problem(
                "compile_blocks",
                f"got true with {self.replicas} replicas, whose step is compiled as a whole; leave it out",
            )
        if self.accumulate > 1 and self.replicas > 1:
            yield Problem(
                "accumulate",
                f"got {self.accumulate} with train.replicas={self.replicas}, must be 1: replicas take whole "
                "batches; use train.replicas=1 and a sweep over seeds, or a smaller batch",
            )
        if self.checkpoint_activations and self.replicas > 1:
            yield Problem(
                "checkpoint_activations",
                f"got true with train.replicas={self.replicas}, must be false: what is mapped over replicas "
                "cannot be computed again; use train.replicas=1 and a sweep over seeds",
            )
        if self.shard is not Sharding.none and self.replicas > 1:
            yield Problem(
                "shard",
                f"got {self.shard.name} with train.replicas={self.replicas}, must be none: replicas have one "
                "process, and nothing to share out over several",
            )
        if self.replicas > 1 and self.keep_checkpoints < 2:
            yield Problem(
                "keep_checkpoints",
                f"got {self.keep_checkpoints}, must be ≥ 2 with train.replicas={self.replicas}: killed while "
                "they save, they go on from a step that all of them have",
            )


@dataclasses.dataclass(kw_only=True)
class Evaluation(Section):
    """Measurements on data that training never saw, the same for every evaluation of a run."""

    every: int = option(1000, "steps between evaluations; the last step always has one", ge=1)
    figures: bool = option(
        True, "draw figures, which takes seconds; false: later, with task=analyse eval.figures=true"
    )
    figures_every: int = option(0, "steps between drawing figures; 0: only at the end", ge=0)
    batches: int = option(5, "batches per evaluation", ge=1)
    batch_size: int = option(4096, "rows per batch", ge=1)
    ci_threshold: float = option(
        0.1, "causal importance above which a subcomponent counts as active", ge=0, lt=1
    )
    also: list[str] = option(
        default_factory=list,
        help="loss terms to measure besides, where they are not trained on, e.g. [hidden_acts_recon]",
    )
    ablations: bool | None = option(
        None, "measure the model with its sites ablated in several ways; null: of models that read tokens"
    )
    rounded: list[float] = option(
        default_factory=lambda: [0.0, 0.5],
        help="ablations: thresholds of rounded masks, which are 1 where g is above and 0 elsewhere",
        ge=0,
        lt=1,
    )
    pgd_steps: list[int] = option(
        default_factory=list,
        help="steps of adversarial ascents on the masks, each measured apart, e.g. [20,40,80,160,320]; 20 "
        "take about 1.5 times as long as the rest of an evaluation of lm_tiny",
        ge=1,
    )
    pgd_step_size: float = option(0.1, "length of a step of these ascents", gt=0, le=1)
    subcomponents: int = option(
        20, "models that read tokens: subcomponents of each site whose contexts are kept; 0: none", ge=0
    )
    contexts: int = option(8, "contexts kept of each of them", ge=1)
