"""A run directory, opened from Python: its numbers, its model, and ways to look into its subcomponents."""

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spd_hydra.checkpoint import Checkpoint, load_checkpoint, load_newest
from spd_hydra.config import RunConfig
from spd_hydra.data.tokenizing import decoded
from spd_hydra.decomposition.ablation import Chosen
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.decomposition.fitting import passed_over_in
from spd_hydra.decomposition.inputs import as_batch, real_positions
from spd_hydra.explore.effects import (
    Decode,
    Effects,
    JointEffect,
    ablation_effects,
    joint_ablation_effect,
)
from spd_hydra.explore.matching import Matching, match_models
from spd_hydra.explore.prompt import Prompt, look_at
from spd_hydra.loss.divergence import Divergence
from spd_hydra.metric.activity import Activity
from spd_hydra.model.obtain import TrainedTarget
from spd_hydra.model.tokens_in import TokensIn
from spd_hydra.remeasured import Remeasured
from spd_hydra.run_dir import RunDirectory, RunDirectoryError
from spd_hydra.run_tokenizer import tokenizer_of
from spd_hydra.saved_run import read_target, require_same_target, require_trust, target_digest
from spd_hydra.section import ConfigError

Given = Tensor | Mapping[str, Any] | Prompt | str
"""Inputs of a target: a tensor, what a tokenizer returns, a prompt or a text."""


@dataclasses.dataclass(frozen=True, repr=False)
class Run:
    """A run directory, opened for reading; the run may still be going on.

    Attributes:
        path: the directory.
        config: the configuration it was started with.
        trust_remote_code: whether the target's own Python code may be run.
        step: of the checkpoint that `model` is from; None: the newest.
    """

    path: Path
    config: RunConfig
    trust_remote_code: bool = False
    step: int | None = None

    def __hash__(self) -> int:
        return hash((self.path, self.step))

    def __repr__(self) -> str:
        status, solved = self.status, self.summary.get("solved")
        verdict = {True: "solved", False: "not solved", None: "no verdict"}[solved]
        if self.step is None:
            steps, how = status.get("step", 0), [status.get("status", "no status"), verdict]
        else:  # how the run stands says nothing of what it was at a step
            steps, how = self.step, [verdict] if self.summary else []
        of_all = f"step {steps} of {self.config.train.steps}"
        words = [self.config.name, f"seed {self.config.seed}", of_all, *how, repr(str(self.path))]
        return f"Run({', '.join(words)})"

    @cached_property
    def model(self) -> DecomposedModel:
        """The decomposed model with its target, from the newest whole checkpoint, on the CPU.

        `model(batch)` is the target's output, `model(batch, masks)` a masked pass, `model.ablated(batch,
        {site: [c]})` one without some subcomponents, `model.causal_importances(batch)` the causal importances
        by site. Its parameters ask for no gradients; `model.requires_grad_()` has V, U and the function of
        the causal importances do so.

        Raises:
            RunDirectoryError: there is no checkpoint yet.
            ConfigError: the target has Python code of its own, which was not allowed.
        """
        return self._loaded[0]

    def model_at(self, step: int | None) -> DecomposedModel:
        """The decomposed model as it was saved at a step; None: the newest. No data are read for it.

        It is for looking: nothing in it asks for gradients, unless `requires_grad_()` is called.
        """
        return self._load(step)[0]

    @cached_property
    def _loaded(self) -> tuple[DecomposedModel, Checkpoint]:
        """`model`, and its checkpoint: a run that goes on has newer ones later."""
        return self._load(self.step)

    def _load(self, step: int | None) -> tuple[DecomposedModel, Checkpoint]:
        self._require_trust()
        checkpoint = self._checkpoint(step)
        require_same_target(target_digest(self.path), checkpoint.state, checkpoint.path.name)
        config = self.config
        target, state = self._target(), checkpoint.tensors["model"]
        passed_over = passed_over_in(state, target, config.decomposition)
        model = DecomposedModel(
            target, config.decomposition, config.ci_fn, seed=config.seed, passed_over=passed_over
        )
        model.load_trainable_state(state)
        del checkpoint.tensors["model"]  # which the model has
        return model.eval().requires_grad_(False), checkpoint

    def at(self, step: int) -> "Run":
        """The same run, its model as it was saved at a step; `steps` lists them."""
        self._require_step(step)
        return dataclasses.replace(self, step=step)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the run's text: that of the data or of the target, from this machine; it can pad.

        Raises:
            ConfigError: the run reads no text, or its tokenizer cannot be found.
        """
        return tokenizer_of(self.config, self.path, lambda: self._checkpoint(self.step), self._require_trust)

    def prompt(self, text: str) -> Prompt:
        """The tokens of a text, and the causal importances of all subcomponents at each.

        Shows itself as a table: for each token the subcomponents of largest g; `.importances[site]` are all.

        Raises:
            ConfigError: the run has no tokenizer.
            ValueError: the text has more tokens than the target takes, or none.
        """
        return look_at(self.model, self.tokenizer, text)

    def effects(
        self,
        batch: Given,
        subcomponents: Mapping[str, Chosen] | None = None,
        *,
        threshold: float | None = None,
        at_once: int | None = None,
    ) -> Effects:
        """What the output loses without each of some subcomponents, all else as it is: `ablation_effects`.

        Args:
            batch: inputs of the target, or a text.
            subcomponents: by site an index, several, or a boolean mask of length C; None: those with g
                above `threshold` in the batch.
            threshold: of g; None: the run's `eval.ci_threshold`.
            at_once: subcomponents per pass; None: by the size of the output.

        Raises:
            ValueError: there is no such site or subcomponent, or the target does not take the batch.
        """
        return ablation_effects(
            self.model, self._batch(batch), subcomponents, at_once=at_once, **self._compared(threshold)
        )

    def joint_effect(
        self, batch: Given, subcomponents: Mapping[str, Chosen], *, threshold: float | None = None
    ) -> JointEffect:
        """What the output loses without all of some subcomponents at once: `joint_ablation_effect`.

        Arguments and errors are those of `effects`.
        """
        return joint_ablation_effect(
            self.model, self._batch(batch), subcomponents, **self._compared(threshold)
        )

    @torch.no_grad()
    def ablated(self, batch: Given, subcomponents: Mapping[str, Chosen]) -> Tensor:
        """The output, such as logits, without all of some subcomponents: `DecomposedModel.ablated`.

        Args:
            batch: inputs of the target, or a text.
            subcomponents: by site an index, several, or a boolean mask of length C.

        Raises:
            ValueError: there is no such site or subcomponent.
        """
        return self.model.ablated(self._batch(batch), subcomponents)

    def alive(self, batch: Given | None = None) -> dict[str, list[int]]:
        """By site, the subcomponents with g above `eval.ci_threshold` anywhere in the data.

        Args:
            batch: where to look, inputs or a text; None: the held-out batches of the run's evaluations.
        """
        if batch is None:
            activity = self._remeasured().activity(self._loaded[1])
        else:
            given = self._batch(batch)
            with torch.no_grad():
                importances = self.model.causal_importances(given)
            positions = next(iter(importances.values())).lower.shape[:-1]
            activity = Activity(self.config.eval.ci_threshold)
            activity.add({s: ci.lower for s, ci in importances.items()}, real_positions(given, positions))
        return {
            site: (own.peak > activity.threshold).nonzero().flatten().tolist()
            for site, own in activity.sites.items()
        }

    def match(self, other: "Run", batch: Given | None = None) -> dict[str, Matching]:
        """Which alive subcomponent is which of another run, by site: as rank-one matrices, by |cosine|.

        Says something where both have the same target: coefficients, checkpoints (`run.at(step)`), seeds of a
        target that is not trained anew.

        Args:
            other: of the same sites, with matrices of the same shapes.
            batch: where both look for what is alive, inputs or a text; None: each on its own held-out data.

        Raises:
            ValueError: sites or shapes differ.
        """
        return match_models(self.model, other.model, lambda: (self.alive(batch), other.alive(batch)))

    def evaluate(self, batches: int | None = None) -> dict[str, float]:
        """The metrics of an evaluation of `model`, named as in `metrics`; nothing is written into the run.

        Losses, L0, what is alive, cross-entropy recovered, recovery of a known answer, metrics of plug-ins.

        Args:
            batches: of the held-out data; None: `eval.batches`.

        Raises:
            ConfigError: the data are not those of the run any more.
        """
        checkpoint = self._loaded[1]
        return self._remeasured(batches).metrics(checkpoint, lambda: self._read_target().certified)

    def matched(self) -> dict[str, list[int]]:
        """Of a target with a known answer, which subcomponent of `model` belongs to which feature.

        `matched()["embed"][i]` is the one of feature i, of the sites where each feature should have one: the
        pairs whose g on the features alone sum to the most. The order of the pictures of causal importances.

        Raises:
            ConfigError: the answer is not known, or a site has fewer subcomponents than features.
        """
        return self._remeasured().matched()

    @property
    def steps(self) -> list[int]:
        """Steps with a checkpoint, ascending."""
        folders = RunDirectory.view(self.path).checkpoints.glob("step_*")
        return sorted(int(f.name.removeprefix("step_")) for f in folders if f.name[5:].isdigit())

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Rows of the metrics log, as a `pandas.DataFrame` takes them: step, split, <group>/<name>."""
        return RunDirectory.view(self.path).read_metrics()

    @property
    def summary(self) -> dict[str, Any]:
        """The result: verdict, checks, losses, L0, times.

        Empty while the run goes on, and of `at(step)` unless it is of that step.
        """
        found = RunDirectory.view(self.path).read_summary() or {}
        return found if self.step in {None, found.get("steps")} else {}

    @property
    def subcomponents(self) -> dict[str, Any]:
        """Of a model that reads tokens, what the heaviest subcomponents of every site respond to.

        `["sites"][site]` lists them, each with `index`, `mean_ci`, `density`, `tokens` and `contexts`;
        `["examples"]` are sequences with the number of active subcomponents per token. Empty for others,
        and of `at(step)` unless the result is of that step.
        """
        if self.step is not None and not self.summary:
            return {}
        return RunDirectory.view(self.path).read_subcomponents() or {}

    @property
    def status(self) -> dict[str, Any]:
        """How far it is: `status`, `step`, `error`, times."""
        return RunDirectory.view(self.path).read_status() or {}

    def _require_trust(self) -> None:
        require_trust(
            self.path,
            self.config,
            trusted=self.trust_remote_code,
            yes="call load_run(..., trust_remote_code=True)",
        )

    def _require_step(self, step: int) -> None:
        if step not in self.steps:
            raise ConfigError(f"step: got {step}; {self.path} has checkpoints of steps {self.steps}")

    def _checkpoint(self, step: int | None) -> Checkpoint:
        directory = RunDirectory.view(self.path)
        if step is not None:
            self._require_step(step)
            return load_checkpoint(directory.checkpoints / f"step_{step}")
        newest = load_newest(directory.checkpoints)
        if newest is None:
            raise RunDirectoryError(
                f"{self.path} holds no checkpoint yet; look again later, or see its status"
            )
        return newest

    def _read_target(self) -> TrainedTarget:
        return read_target(self.config, self.path, torch.device("cpu"))

    def _target(self) -> nn.Module:
        target = self._read_target().module
        if isinstance(target, TokensIn):
            target.expect_padding(True)
        return target

    def _remeasured(self, batches: int | None = None) -> Remeasured:
        return Remeasured(self.config, self.model, self._target, batches)

    def _batch(self, given: Given) -> Tensor:
        """A batch of the target's device, and if it is of real numbers of its type."""
        if isinstance(given, str):
            given = self.prompt(given)
        model = self.model
        batch = as_batch(given.tokens if isinstance(given, Prompt) else given, model.target).to(model.device)
        return batch.to(next(model.target.parameters())) if batch.is_floating_point() else batch

    def _compared(self, threshold: float | None) -> dict[str, Any]:
        """How outputs are compared."""
        predicts = self.config.model.predicts_next_token()
        return {
            "kind": Divergence.kl if predicts else self.config.loss.divergence,
            "threshold": self.config.eval.ci_threshold if threshold is None else threshold,
            "names": self._names_of_tokens(),
        }

    def _names_of_tokens(self) -> Decode | None:
        """How tokens read, where outputs are logits of tokens and the tokenizer is here."""
        head = getattr(self.model.target, "get_output_embeddings", lambda: None)()
        if head is None and not self.config.model.predicts_next_token():
            return None
        try:
            tokenizer = self.tokenizer
        except ConfigError:
            return None
        return lambda ids: decoded(tokenizer, ids) or [str(one) for one in ids]
