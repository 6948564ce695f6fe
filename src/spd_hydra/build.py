"""From a configuration to the objects of a run."""

import dataclasses
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from spd_hydra import distributed, rng
from spd_hydra.ci_fn.base import SiteActivation
from spd_hydra.config import Device, RunConfig
from spd_hydra.data.base import Batches
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.decomposition.detector_init import start_as_detectors
from spd_hydra.decomposition.fitting import fitting
from spd_hydra.decomposition.identities import identity_groups
from spd_hydra.decomposition.input_init import require_vectors, start_from_inputs
from spd_hydra.decomposition.inputs import real_positions
from spd_hydra.decomposition.roots import find_roots, require_values_that_stay
from spd_hydra.decomposition.sites import site_groups, unfit_sites
from spd_hydra.decomposition.subcomponents import Init
from spd_hydra.loss.objective import Objective
from spd_hydra.loss.pgd_recon import PGDRecon
from spd_hydra.metric.ablations import AblationSettings
from spd_hydra.metric.evaluate import evaluate
from spd_hydra.metric.evaluation import Evaluation
from spd_hydra.metric.text import look
from spd_hydra.model.base import KnownAnswer
from spd_hydra.model.obtain import TargetProgress, TrainedTarget, obtain_target
from spd_hydra.model.tokens_in import TokensIn
from spd_hydra.model.users_code import told_of
from spd_hydra.sampler import Sampler
from spd_hydra.section import ConfigError

_CANDIDATES = 16  # inputs per subcomponent from which `init=inputs` chooses
_DETECTED = 2**15  # inputs that `init=detectors` looks at: a feature that is on in 1 % of them is in 300


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a decomposition is made of.

    `known` is the known answer of a toy target, or None; `position_shape` the shape of the positions of
    one row of data; `reads_tokens` whether a row is a sequence of token ids.
    """

    config: RunConfig
    batches: Batches
    eval_batches: Batches
    model: DecomposedModel
    objective: Objective
    known: KnownAnswer | None
    position_shape: tuple[int, ...]
    reads_tokens: bool

    def initial_state(self, number: int) -> dict[str, torch.Tensor]:
        """Untrained subcomponents and causal-importance function of the `number`-th initialisation."""
        config = self.config
        seed = rng.derived_seed(config.seed, "restart", number) if number else config.seed
        model = DecomposedModel(
            self.model.target,
            config.decomposition,
            config.ci_fn,
            seed=seed,
            passed_over=self.model.passed_over,
        )
        model.to(self.model.device)
        _start(model, self.batches, config, seed)
        return model.trainable_state()

    def content(self) -> dict[str, str]:
        """Digests of the rows by what they are for, as far as they are known."""
        digests = {"train": self.batches.content(), "evaluate": self.eval_batches.content()}
        return {what: digest for what, digest in digests.items() if digest is not None}

    def train_sampler(self) -> Sampler:
        """Training batches and the random numbers of the active loss terms."""
        config = self.config
        return Sampler(
            self.batches,
            seed=config.seed,
            purpose="train",
            rows=_own_rows(config.train.batch_size, self.model.device),
            rows_per_step=config.train.batch_size,
            columns=self.objective.columns(config.loss.active_terms()),
            position_shape=self.position_shape,
            compile=config.train.compile,
        )

    def eval_sampler(self) -> Sampler:
        """Held-out batches, the same for every evaluation, and the random numbers of the terms measured."""
        config = self.config
        return Sampler(
            self.eval_batches,
            seed=config.seed,
            purpose="eval",
            rows=_own_rows(config.eval.batch_size, self.model.device),
            rows_per_step=config.eval.batch_size,
            columns=self.objective.columns(config.loss.measured_terms(config.eval.also)),
            position_shape=self.position_shape,
        )

    def evaluate(self, step: int, *, certified: bool, last: bool = False) -> Evaluation:
        """Measure the model as it is after `step` steps, on held-out data.

        The last evaluation, at the last step or where `last` says so, also looks at the text.
        """
        config, sampler = self.config, self.eval_sampler()
        found = evaluate(
            self.objective,
            sampler,
            step=step,
            progress=step / config.train.steps,
            batches=config.eval.batches,
            reference_positions=config.train.batch_size * torch.Size(self.position_shape).numel(),
            known=self.known,
            certified=certified,
            ideal_l0=self.ideal_l0(),
            ablations=self.ablations(),
            also=config.eval.also,
        )
        if not (self.reads_tokens and config.eval.subcomponents and (last or step == config.train.steps)):
            return found
        text = look(
            self.objective,
            [sampler.batch(number) for number in range(config.eval.batches)],
            found.sites,
            decode=self.batches.decode,
            subcomponents=config.eval.subcomponents,
            contexts=config.eval.contexts,
        )
        return dataclasses.replace(found, text=text)

    def ablations(self) -> AblationSettings | None:
        """What evaluations measure of ablated models, if they do."""
        config = self.config.eval
        masks = self.reads_tokens if config.ablations is None else config.ablations
        if not masks and not config.pgd_steps:
            return None
        return AblationSettings(
            next_token=self.config.model.predicts_next_token(),
            fills_masks=self.config.model.fills_masks(),
            rounded=config.rounded,
            groups=self.groups() if masks else {},
            adversaries={
                f"pgd/{n}": PGDRecon(n_steps=n, step_size=config.pgd_step_size) for n in config.pgd_steps
            },
            masks=masks,
        )

    def groups(self) -> dict[str, list[str]]:
        """The sites of every pattern of the configuration, by its name; `<name>.identity` for identities."""
        model, patterns = self.model, self.config.decomposition
        matrices = model.matrix_names
        inserted = [site for site in model.site_names if site not in matrices]
        return site_groups(matrices, patterns.sites) | identity_groups(inserted, patterns.identities)

    def ideal_l0(self) -> dict[str, float]:
        """L0 of a perfect decomposition at sites with one subcomponent per feature: features x chance."""
        probability = getattr(self.config.data, "feature_probability", None)
        if self.known is None or probability is None:
            return {}
        return {
            site: n * probability for site, n in self.known.identity.items() if site in self.model.site_names
        }


def device_of(config: RunConfig) -> torch.device:
    """The device of a run; of several ranks, each has its own.

    Raises:
        ConfigError: a GPU was asked for and there is none.
    """
    if config.device is Device.cuda and not torch.cuda.is_available():
        raise ConfigError("device: got cuda, but torch sees no GPU; use device=cpu or device=auto")
    if config.device is Device.cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    if distributed.started_with() > 1:
        return torch.device("cuda", distributed.device_index())
    return torch.device("cuda")


def obtain(config: RunConfig, device: torch.device, progress: TargetProgress | None = None) -> TrainedTarget:
    """The certified target of a configuration, trained or from the cache."""
    return obtain_target(
        config.model,
        bound(config),
        seed=config.seed,
        device=device,
        cache_dir=config.cache_dir,
        held_out=bound(config, held_out=True),
        progress=progress,
    )


def untrained_target(config: RunConfig) -> nn.Module:
    """The target's architecture with weights nobody trained: to check sites."""
    with told_of("model", config.model, "skeleton"):
        return config.model.skeleton()


def bound(config: RunConfig, *, held_out: bool = False) -> Batches:
    """The batches to train on, or the held-out ones, for the target of a configuration.

    Raises:
        ConfigError: the data do not fit the target, or cannot be read.
    """
    with told_of("data", config.data, "bind_eval" if held_out else "bind"):
        return (config.data.bind_eval if held_out else config.data.bind)(config.model)


def assemble(
    config: RunConfig,
    target: nn.Module,
    device: torch.device,
    *,
    untrained: bool = True,
    takes_padding: bool = False,
    passes: AbstractContextManager[Any] | None = None,
) -> Parts:
    """Decomposed model, objective and data for a target; on the meta device without a known answer.

    With `untrained=False` initial values that need data are left out: trained ones will be loaded. With
    `takes_padding=True` the model takes padded tokens also where the run's own rows have no padding. The
    target runs within `passes`.

    Raises:
        ConfigError: sites, ties, data or causal-importance function do not fit the target.
    """
    batches = bound(config)
    _require_drawn(batches, config)
    if isinstance(target, TokensIn):
        target.expect_padding(takes_padding or batches.padded)
    example = batches(rng.key(config.seed, "example").to(device), _rows(8, device))
    has_values = device.type != "meta"

    def make(passed_over: Mapping[str, str]) -> DecomposedModel:
        sites, ci_fn, seed = config.decomposition, config.ci_fn, config.seed
        return DecomposedModel(target.to(device), sites, ci_fn, seed=seed, passed_over=passed_over).to(device)

    def check(model: DecomposedModel) -> tuple[int, ...]:
        with passes or nullcontext(), torch.no_grad():
            return _checked(model, example, padded=batches.padded)

    model, positions = fitting(make, check)
    if has_values and untrained:
        _start(model, batches, config, config.seed)
    return Parts(
        config=config,
        batches=batches,
        eval_batches=bound(config, held_out=True),
        model=model,
        objective=Objective(
            model,
            config.loss,
            precision=config.train.precision,
            ci_threshold=config.eval.ci_threshold,
            padded=batches.padded,
            recompute=config.train.checkpoint_activations,
            seed=config.seed,
        ),
        known=config.model.known_answer(target) if has_values else None,
        position_shape=positions,
        reads_tokens=example.dim() == 2 and not example.is_floating_point(),
    )


def _checked(model: DecomposedModel, example: torch.Tensor, *, padded: bool) -> tuple[int, ...]:
    """The shape of a row's positions, of a model of which a masked pass could be made; its roots are set.

    Raises:
        ConfigError: it could not.
    """
    require_vectors(model)
    require_values_that_stay(model, example)
    clean = model.clean_pass(example)
    _require_one_tensor(clean.output)
    if not example.is_meta:
        model.roots = find_roots(model, example, clean)
    activations = model.activations(clean)
    positions = _positions(model, activations, example, padded=padded)
    model.importances(activations, valid=real_positions(example, torch.Size((len(example), *positions))))
    return positions


def _require_drawn(batches: Batches, config: RunConfig) -> None:
    """Of data that are read in order there are no rows beside those of the steps, which joins look at."""
    if config.train.join_every and batches.ordered:
        raise ConfigError(
            f"train.join_every: got {config.train.join_every}, must be 0 with data that are read in order, "
            "as text is: what belongs together is judged by rows that are drawn beside those of the steps"
        )


def _require_one_tensor(output: Any) -> None:
    """Refuse a target whose output no divergence could compare.

    Raises:
        ConfigError: it returns something else than a tensor.
    """
    if not isinstance(output, torch.Tensor):
        parts = f" of {', '.join(type(one).__name__ for one in output)}" if isinstance(output, tuple) else ""
        raise ConfigError(
            f"model: the target must return one tensor; got {type(output).__name__}{parts}; wrap it in a "
            "module whose forward returns the one that is to be kept"
        )


def _positions(
    model: DecomposedModel,
    activations: Mapping[str, SiteActivation],
    example: torch.Tensor,
    *,
    padded: bool,
) -> tuple[int, ...]:
    """The shape of a row's positions, which is the same at all sites.

    Raises:
        ConfigError: some sites have other positions, which no mask could fit.
    """
    shapes = {site: tuple(own.inner.shape[:-1]) for site, own in activations.items()}
    of_rows = [shape for shape in shapes.values() if shape[:1] == example.shape[:1]]
    common = tuple(example.shape) if padded else max(of_rows, key=of_rows.count, default=example.shape[:1])
    if others := [site for site, shape in shapes.items() if shape != common]:
        reason = (
            f"which see no vector per row and position ({list(shapes[others[0]])} for {len(example)} rows in "
            f"place of {list(common)})"
        )
        raise unfit_sites(reason, others, model.target, model.matrix_names)
    return common[1:]


def _start(model: DecomposedModel, batches: Batches, config: RunConfig, seed: int) -> None:
    """Initial values that need data."""
    used = {Init.inputs, Init.detectors}.intersection(model.inits.values())
    if not used:
        return
    key = rng.key(seed, "initial_inputs").to(model.device)
    with torch.no_grad():
        first = next(iter(model.causal_importances(batches(key, _rows(1, model.device))).values()))
    positions = first.lower[..., 0].numel()  # of a row

    def first_inputs(number: int) -> torch.Tensor:
        return batches(key, _rows(-(-number // positions), model.device))

    if Init.inputs in used:
        C = max(shape.C for shape in model.site_shapes().values())
        start_from_inputs(model, first_inputs(_CANDIDATES * C))
    if Init.detectors in used:
        start_as_detectors(model, first_inputs(_DETECTED))


def _rows(number: int, device: torch.device) -> torch.Tensor:
    return torch.arange(number, dtype=torch.int32, device=device)


def _own_rows(number: int, device: torch.device) -> torch.Tensor:
    own = distributed.own_rows(number)
    return torch.arange(own.start, own.stop, dtype=torch.int32, device=device)
