"""A run directory, opened from Python: its numbers, its model, and ways to look into its subcomponents."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spd_hydra.build import assemble, bound
from spd_hydra.checkpoint import Checkpoint, load_checkpoint, load_newest
from spd_hydra.config import RunConfig
from spd_hydra.data.token_batches import TokenBatches
from spd_hydra.data.tokenizing import Reader, decoded
from spd_hydra.data.tokens import Tokens
from spd_hydra.decomposition.ablation import Chosen
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.decomposition.inputs import as_batch, real_positions
from spd_hydra.explore.effects import Decode, Effects, ablation_effects
from spd_hydra.explore.matching import Matching, best_matching, cosines
from spd_hydra.explore.prompt import Prompt, look_at
from spd_hydra.loss.divergence import Divergence
from spd_hydra.metric.activity import Activity
from spd_hydra.model.tokens_in import TokensIn
from spd_hydra.run_dir import RunDirectory, RunDirectoryError
from spd_hydra.saved_run import read_target, require_same_data, require_trust
from spd_hydra.section import ConfigError


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

    def __repr__(self) -> str:
        status, solved = self.status, self.summary.get("solved")
        steps = self.step if self.step is not None else status.get("step", 0)
        verdict = {True: "solved", False: "not solved", None: "no verdict"}[solved]
        return (
            f"Run({self.config.name}, seed {self.config.seed}, step {steps} of {self.config.train.steps}, "
            f"{status.get('status', 'no status')}, {verdict}, {str(self.path)!r})"
        )

    @cached_property
    def model(self) -> DecomposedModel:
        """The decomposed model with its target, from the newest whole checkpoint, on the CPU.

        `model(batch)` is the target's output, `model(batch, masks)` a masked pass, `model.ablated(batch,
        {site: [c]})` one without some subcomponents, `model.causal_importances(batch)` the causal importances
        by site.

        Raises:
            RunDirectoryError: there is no checkpoint yet.
            ConfigError: the target has Python code of its own, which was not allowed.
        """
        return self.model_at(self.step)

    def model_at(self, step: int | None) -> DecomposedModel:
        """The decomposed model as it was saved at a step; None: the newest. No data are read for it."""
        self._require_trust()
        checkpoint = self._checkpoint(step)
        config = self.config
        target = read_target(config, self.path, torch.device("cpu")).module
        if isinstance(target, TokensIn):
            target.expect_padding(True)
        model = DecomposedModel(target, config.decomposition, config.ci_fn, seed=config.seed)
        model.load_trainable_state(checkpoint.tensors["model"])
        return model.eval()

    def at(self, step: int) -> "Run":
        """The same run, its model as it was saved at a step; `steps` lists them."""
        self._require_step(step)
        return dataclasses.replace(self, step=step)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the run's text: that of the data, or of the target; read from this machine.

        Raises:
            ConfigError: the run reads no text, or its tokenizer cannot be found.
        """
        data, model = self.config.data, self.config.model
        name, revision, trusts_code = model.tokenizer_name(), model.tokenizer_revision(), False
        if isinstance(data, Tokens) and data.tokenizer is not None:
            name, revision = data.tokenizer, data.tokenizer_revision
        elif model.trusts_tokenizer_code():
            self._require_trust()
            trusts_code = True
        if name is not None:
            return Reader(
                column="",
                tokenised=True,
                name=name,
                revision=revision,
                trusts_code=trusts_code,
                special_tokens=True,
                processes=1,
            ).tokenizer()
        batches = bound(self.config)
        if not isinstance(batches, TokenBatches):
            raise ConfigError(
                f"tokenizer: the run {self.path} has none; give token ids or other inputs as a tensor"
            )
        checkpoint = self._checkpoint(self.step)  # another Python has other text, so another tokenizer
        require_same_data({"train": batches.content()}, checkpoint.state, checkpoint.path.name)
        return batches.tokenizer()

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
        batch: Tensor | Mapping[str, Any] | Prompt | str,
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
        if isinstance(batch, str):
            batch = self.prompt(batch)
        if isinstance(batch, Prompt):
            batch = batch.tokens
        predicts = self.config.model.predicts_next_token()
        return ablation_effects(
            self.model,
            batch,
            subcomponents,
            kind=Divergence.kl if predicts else self.config.loss.divergence,
            threshold=self.config.eval.ci_threshold if threshold is None else threshold,
            names=self._names_of_tokens(),
            at_once=at_once,
        )

    def alive(self, batch: Tensor | Mapping[str, Any] | None = None) -> dict[str, list[int]]:
        """By site, the subcomponents with g above `eval.ci_threshold` anywhere in the data.

        Args:
            batch: where to look; None: the held-out batches of the run's evaluations.
        """
        activity = Activity(self.config.eval.ci_threshold)
        if batch is not None:
            batch = as_batch(batch, self.model.target).to(self.model.device)
            with torch.no_grad():
                importances = self.model.causal_importances(batch)
            positions = next(iter(importances.values())).lower.shape[:-1]
            lower = {site: ci.lower for site, ci in importances.items()}
            activity.add(lower, real_positions(batch, positions))
        else:
            self._add_held_out(activity)
        return {
            site: (own.peak > activity.threshold).nonzero().flatten().tolist()
            for site, own in activity.sites.items()
        }

    def match(self, other: "Run", batch: Tensor | Mapping[str, Any] | None = None) -> dict[str, Matching]:
        """Which alive subcomponent is which of another run, by site: as rank-one matrices, by |cosine|.

        Says something where both have the same target: coefficients, checkpoints (`run.at(step)`), seeds of a
        target that is not trained anew.

        Args:
            other: of the same sites, with matrices of the same shapes.
            batch: where both look for what is alive; None: each on its own held-out data.

        Raises:
            ValueError: sites or shapes differ.
        """
        if set(self.model.site_names) != set(other.model.site_names):
            raise ValueError(
                f"other: got a run of the sites {_few(other.model.site_names)}, must have those of this one, "
                f"{_few(self.model.site_names)}"
            )
        own_alive, other_alive = self.alive(batch), other.alive(batch)
        found = {}
        for site in self.model.site_names:
            mine, its = self.model.pieces(site), other.model.pieces(site)
            shapes = [[pieces.U.shape[1], pieces.V.shape[0]] for pieces in (mine, its)]
            if shapes[0] != shapes[1]:
                raise ValueError(f"other: at {site} its matrix is {shapes[1]}, here it is {shapes[0]}")
            of_all = cosines(*(each.detach().cpu() for each in (mine.V, mine.U, its.V, its.U)))
            found[site] = best_matching(of_all, own_alive[site], other_alive[site])
        return found

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
        """The result: verdict, checks, losses, L0, times; empty while the run goes on."""
        return RunDirectory.view(self.path).read_summary() or {}

    @property
    def subcomponents(self) -> dict[str, Any]:
        """Of a model that reads tokens, what the heaviest subcomponents of every site respond to.

        `["sites"][site]` lists them, each with `index`, `mean_ci`, `density`, `tokens` and `contexts`;
        `["examples"]` are sequences with the number of active subcomponents per token. Empty for others.
        """
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

    @torch.no_grad()
    def _add_held_out(self, activity: Activity) -> None:
        """Count the held-out batches as evaluations do, in the precision of training."""
        own = self.model
        parts = assemble(self.config, own.target, own.device, untrained=False, takes_padding=True)
        parts.model.load_trainable_state(own.trainable_state())
        sampler = parts.eval_sampler()
        for number in range(self.config.eval.batches):
            inputs = parts.objective.inputs(sampler.batch(number))
            activity.add({site: ci.lower for site, ci in inputs.ci.items()}, inputs.valid)

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


def _few(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f", … ({len(names)} in all)" if len(names) > most else "")
