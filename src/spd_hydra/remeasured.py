"""An opened run's model on the data of the run, as its evaluations look at it; nothing is written."""

import dataclasses
from collections.abc import Callable

import torch
from torch import nn

from spd_hydra.build import Parts, assemble
from spd_hydra.checkpoint import Checkpoint
from spd_hydra.config import RunConfig
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.metric.activity import Activity
from spd_hydra.metric.known_answer import compare
from spd_hydra.precision import products_in
from spd_hydra.saved_run import require_same_data
from spd_hydra.section import ConfigError


class Remeasured:
    """The parts of a run, with the state that an opened model has now, in the precision of training.

    Args:
        config: of the run.
        model: the opened one; it may have been moved, or changed.
        fresh_target: reads the target again, which is done where the model's is of another type now.
        batches: held-out batches to look at; None: as many as the run's evaluations do.

    Raises:
        ValueError: the model has hooks, with which no evaluation looked at it.
    """

    def __init__(
        self,
        config: RunConfig,
        model: DecomposedModel,
        fresh_target: Callable[[], nn.Module],
        batches: int | None = None,
    ) -> None:
        model.patched.require_current()
        if model.is_hooked:
            raise ValueError(
                "model.hooked: a run measures its own data as it was trained, without hooks; leave the "
                "block, or give what to look at, as alive(batch)"
            )
        is_as_trained = all(p.dtype is torch.float32 for p in model.component_parameters())
        target = model.target if is_as_trained else fresh_target()
        # Without the texts of subcomponents, which take a second look at the data.
        number = config.eval.batches if batches is None else batches
        measured = dataclasses.replace(config.eval, batches=number, subcomponents=0)
        own = dataclasses.replace(config, eval=measured)
        # What the opened model is given may be padded.
        self._parts: Parts = assemble(own, target, model.device, untrained=False, takes_padding=True)
        self._parts.model.load_trainable_state(model.trainable_state())

    @torch.no_grad()
    def activity(self, checkpoint: Checkpoint) -> Activity:
        """What evaluations count of causal importances over the held-out batches.

        Args:
            checkpoint: which the model is from.

        Raises:
            ConfigError: the data are not those of the run any more.
        """
        parts = self._parts
        require_same_data(parts.content(), checkpoint.state, checkpoint.path.name)
        activity = Activity(parts.config.eval.ci_threshold)
        sampler = parts.eval_sampler()
        with products_in(parts.config.train.precision):
            for number in range(parts.config.eval.batches):
                inputs = parts.objective.inputs(sampler.batch(number))
                activity.add({site: ci.lower for site, ci in inputs.ci.items()}, inputs.valid)
        return activity

    def metrics(self, checkpoint: Checkpoint, certified: Callable[[], bool]) -> dict[str, float]:
        """The metrics of an evaluation.

        Args:
            checkpoint: which the model is from.
            certified: whether the target is fit to be decomposed.

        Raises:
            ConfigError: the data are not those of the run any more.
        """
        parts = self._parts
        require_same_data(parts.content(), checkpoint.state, checkpoint.path.name)
        parts.objective.adversary.set_state(checkpoint.tensors["optimizer"])
        with products_in(parts.config.train.precision):
            found = parts.evaluate(checkpoint.step, certified=parts.known is not None and certified())
        return dict(found.metrics)

    @torch.no_grad()
    def matched(self) -> dict[str, list[int]]:
        """By site with a subcomponent per feature, the one of each feature.

        Raises:
            ConfigError: the target has no known answer, or a site has fewer subcomponents than features.
        """
        parts = self._parts
        known = parts.known
        if known is None:
            raise ConfigError(
                f"model: the answer of {parts.config.name} is not known, so nothing is matched with it"
            )
        with products_in(parts.config.train.precision):
            ci = parts.objective.inputs(known.probe.to(parts.model.device)).ci
        verdict = compare(parts.model, known, ci)
        found = {}
        for site in known.identity:
            if site in verdict.order:
                n_features, number = verdict.probes[site].lower.shape
                if number < n_features:
                    raise ConfigError(
                        f"decomposition: {site} has {number} subcomponents, fewer than the {n_features} "
                        "features that would each have one"
                    )
                found[site] = verdict.order[site][:n_features].tolist()
        return found
