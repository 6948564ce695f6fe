"""Targets from Hugging Face: any model of transformers that takes tokens."""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from spd_hydra.model import hf_config, hub
from spd_hydra.model.base import TargetSpec
from spd_hydra.model.tokens_in import TokensIn, adapt
from spd_hydra.section import ConfigError, Problem, option, register

_SMALL = 256 * 2**20  # bytes of weights that are copied into every run directory without asking


class AutoClass(Enum):
    """Which head a model has; each also by its name in transformers, under which nothing is saved."""

    causal_lm = "causal_lm"
    base = "base"
    masked_lm = "masked_lm"
    sequence_classification = "sequence_classification"
    token_classification = "token_classification"
    question_answering = "question_answering"
    pre_training = "pre_training"

    AutoModelForCausalLM = causal_lm
    AutoModel = base
    AutoModelForMaskedLM = masked_lm
    AutoModelForSequenceClassification = sequence_classification
    AutoModelForTokenClassification = token_classification
    AutoModelForQuestionAnswering = question_answering
    AutoModelForPreTraining = pre_training


class KeepWeights(Enum):
    """Whether a run directory holds a copy of the target's weights, or their digest and where they are."""

    auto = "auto"
    always = "always"
    never = "never"


_TRANSFORMERS_NAMES = {own: name for name, own in AutoClass.__members__.items() if name.startswith("Auto")}


@register("model", "hf")
@dataclasses.dataclass(kw_only=True)
class HuggingFace(TargetSpec):
    """A trained model of transformers, in float32, from the hub or from a local directory."""

    name: str = option(help="id on the hub, e.g. gpt2, or a local directory with config.json and safetensors")
    auto_class: AutoClass = option(
        AutoClass.causal_lm,
        "causal_lm | base (no head) | masked_lm | sequence_classification | token_classification | "
        "question_answering | pre_training, or as transformers calls it, e.g. AutoModelForMaskedLM",
    )
    output: str | None = option(
        None,
        "which output is compared: logits | last_hidden_state | 0 | …; null: logits, of base "
        "last_hidden_state",
    )
    revision: str | None = option(None, "branch, tag or commit on the hub; null: main")
    trust_remote_code: bool = option(
        False,
        "run Python code that comes with model and tokenizer; from the hub it asks for a commit as revision",
    )
    keep_weights: KeepWeights = option(
        KeepWeights.auto,
        "copy the weights into the run directory: auto (up to 256 MiB) | always | never (their digest)",
    )

    def problems(self) -> Iterator[Problem]:
        """Adds: code from the hub is run only as it was at one commit; a directory has but one state."""
        yield from super().problems()
        from_hub = hub.is_id(self.name) and not hub.is_local(self.name)
        if self.trust_remote_code and from_hub and not hub.COMMIT.fullmatch(self.revision or ""):
            yield Problem(
                "trust_remote_code",
                f"got true with revision {self.revision}; give the full commit hash (40 hexadecimal digits) "
                "whose code you have read",
            )

    def build(self, generator: torch.Generator) -> TokensIn:
        """The trained model; nothing is drawn.

        Raises:
            ConfigError: it cannot be found, read or reached, or its weights are those of another class.
        """
        directory = self._directory(hub.WEIGHTS)
        with _without_progress_bar():
            model, report = self._made("from_pretrained", directory)
        lacking = sorted([*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])])
        lacking = [key for key in lacking if not (self._leaves_pooler_out and key.startswith("pooler."))]
        if lacking:
            raise ConfigError(
                f"model.auto_class: got {self.auto_class.name}, but the weights of {self.name} lack "
                f"{_shortened(lacking)}; choose the class that it was trained as"
            )
        return self._adapted(model)

    def skeleton(self, architecture: str | None = None) -> TokensIn:
        """The model without its weights, from its configuration alone.

        Raises:
            ConfigError: the configuration cannot be found, read or reached; or nothing can be fetched for
                `build`, and weights that it could read are not there.
        """
        if architecture is not None and not self.trust_remote_code:
            config = hf_config.restored(architecture)
        else:
            config = self._config()
        if architecture is None and (hub.is_local(self.name) or hub.is_offline()):
            self._directory(hub.WEIGHTS)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            model = self._made("from_config", config)
        return self._adapted(model)

    def architecture(self, module: nn.Module) -> str:
        """The configuration of the model as JSON."""
        return cast(str, cast(Any, module).config.to_json_string())

    def keeps_weights(self, module: nn.Module) -> bool:
        """Whether a run directory gets a copy of the weights."""
        if self.keep_weights is KeepWeights.auto:
            return sum(p.numel() * p.element_size() for p in module.parameters()) <= _SMALL
        return self.keep_weights is KeepWeights.always

    def foreign_code(self) -> str | None:
        """The repository and the commit, or the directory, whose code is run, if any is."""
        if not self.trust_remote_code:
            return None
        is_hub = self.revision is not None
        return (
            f"{self.name} at commit {self.revision}" if is_hub else f"{self.name}, a directory, as it is now"
        )

    def prefetch(self) -> list[str]:
        """Download the model and its tokenizer into Hugging Face's cache; nothing for a local directory."""
        wanted = [*hub.WEIGHTS, *hub.TOKENIZER, *(hub.CODE if self.trust_remote_code else ())]
        if hub.is_local(self.name):
            return [f"model {self.name}: a local directory, nothing to fetch"]
        directory = hub.download(self.name, self.revision, wanted)
        return [f"model {self.name}: {directory}"]

    def commits(self) -> dict[str, str]:
        """The commit of the snapshot in the cache; nothing for a local directory."""
        commit = hub.commit_of(self.name, self._directory(hub.CONFIG))
        return {} if commit is None else {"revision": commit}

    def names(self) -> dict[str, str]:
        """The directory or the id of the model."""
        return {"name": hub.whole_name(self.name)}

    def vocab_size(self) -> int | None:
        """Number of tokens that the model knows."""
        return cast("int | None", getattr(self._config().get_text_config(), "vocab_size", None))

    def padding_token(self) -> int | None:
        """The token that the model's configuration says stands for padding."""
        return hf_config.padding_token(self._config())

    def tokenizer_name(self) -> str:
        """The model's own tokenizer comes with it."""
        return self.name

    def tokenizer_revision(self) -> str | None:
        """The same as the model's."""
        return self.revision

    def trusts_tokenizer_code(self) -> bool:
        """As the model's: it comes from the same place, at the same commit."""
        return self.trust_remote_code

    def context_length(self) -> int | None:
        """Longest text that the model takes, in tokens."""

        def modules() -> Iterable[tuple[str, nn.Module]]:
            with torch.device("meta"):
                module: nn.Module = self.skeleton()
            return list(module.named_modules())

        return hf_config.longest_text(self._config().get_text_config(), modules)

    def predicts_next_token(self) -> bool:
        """Whether what is compared are the logits of a causal language model."""
        return self.auto_class is AutoClass.causal_lm and self.gives_logits()

    def fills_masks(self) -> bool:
        """Whether what is compared are the logits of a masked language model."""
        return self.auto_class is AutoClass.masked_lm and self.gives_logits()

    def gives_logits(self) -> bool:
        """Whether what is compared are a head's logits of tokens or of classes of which one is right."""
        if self.auto_class is AutoClass.base or self.output_path not in {"logits", "0"}:
            return False
        classifies = self.auto_class in {AutoClass.sequence_classification, AutoClass.token_classification}
        if not classifies and self.auto_class is not AutoClass.pre_training:
            return True
        try:
            config = self._config()
            return (
                hf_config.has_exclusive_classes(config)
                if classifies
                else not hf_config.tells_replaced_tokens(config)
            )
        except ConfigError:  # is told by what builds the model
            return True

    @property
    def output_path(self) -> str:
        """Where in the model's output the tensor is that is compared."""
        if self.output is not None:
            return self.output
        return "last_hidden_state" if self.auto_class is AutoClass.base else "logits"

    @property
    def _leaves_pooler_out(self) -> bool:
        return self.auto_class is AutoClass.base and self.output_path in {"last_hidden_state", "0"}

    def _adapted(self, model: Any) -> TokensIn:
        # What follows the compared output is left out: few who trained another head have weights for it.
        if self._leaves_pooler_out and getattr(model, "pooler", None) is not None:
            model.pooler = nn.Identity()
        return adapt(model, self.output_path)

    def _directory(self, files: tuple[str, ...]) -> Path:
        code = hub.CODE if self.trust_remote_code else ()
        return hub.directory(self.name, self.revision, (*files, *code))

    def _config(self) -> Any:
        directory = self._directory(hub.CONFIG)
        config = hf_config.read(self.name, directory, trusts_code=self.trust_remote_code)
        if self.auto_class is AutoClass.causal_lm and hf_config.sees_what_follows(config):
            raise ConfigError(
                f"model.auto_class: got causal_lm, but {self.name}, a {config.model_type}, sees the tokens "
                "that it would have to predict; use model.auto_class=masked_lm or base"
            )
        is_sequence = self.auto_class is AutoClass.sequence_classification
        if (
            is_sequence
            and hf_config.padding_token(config) is None
            and hf_config.classifies_at_the_end(config)
        ):
            raise ConfigError(
                f"model.auto_class: got sequence_classification, but {self.name} has no padding token, "
                "by which it knows where a text ends; give a local copy with pad_token_id in its config.json"
            )
        return config

    def _made(self, method: str, source: Any) -> Any:
        """The model by `from_config`, or by `from_pretrained` with a report of what did not fit."""
        import transformers

        arguments: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": self.trust_remote_code}
        if method == "from_pretrained":
            arguments |= {"config": self._config(), "use_safetensors": True, "output_loading_info": True}
        auto_class = getattr(transformers, _TRANSFORMERS_NAMES[self.auto_class])
        try:
            return getattr(auto_class, method)(source, **arguments)
        except hf_config.unusable(self.trust_remote_code) as error:
            reason = hf_config.first_line(error)
            raise hf_config.untrusted(self.name, error) or ConfigError(
                f"model: {self.name} cannot be loaded as {self.auto_class.name}: {reason}"
            ) from error


@contextlib.contextmanager
def _without_progress_bar() -> Iterator[None]:
    import transformers

    logging: Any = transformers.utils.logging  # has no types
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _shortened(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f", … ({len(names)} in all)" if len(names) > most else "")
