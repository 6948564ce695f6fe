"""The tokenizer of a run's text."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spd_hydra.build import bound
from spd_hydra.checkpoint import Checkpoint
from spd_hydra.config import RunConfig
from spd_hydra.data.token_batches import TokenBatches
from spd_hydra.data.tokenizing import Reader
from spd_hydra.data.tokens import Tokens
from spd_hydra.saved_run import require_same_data
from spd_hydra.section import ConfigError


def tokenizer_of(
    config: RunConfig, path: Path, checkpoint: Callable[[], Checkpoint], require_trust: Callable[[], None]
) -> Any:
    """The tokenizer of the data, or of the target, read from this machine; it can pad.

    Args:
        config: of the run.
        path: of the run, for people.
        checkpoint: says which data the run was trained on.
        require_trust: refuses Python code that comes with a tokenizer.

    Raises:
        ConfigError: the run reads no text, or its tokenizer cannot be found.
    """
    data, model = config.data, config.model
    name, revision, trusts_code = model.tokenizer_name(), model.tokenizer_revision(), False
    if isinstance(data, Tokens) and data.tokenizer is not None:
        name, revision = data.tokenizer, data.tokenizer_revision
    elif model.trusts_tokenizer_code():
        require_trust()
        trusts_code = True
    if name is not None:
        return able_to_pad(
            Reader(
                column="",
                tokenised=True,
                name=name,
                revision=revision,
                trusts_code=trusts_code,
                special_tokens=True,
                processes=1,
            ).tokenizer()
        )
    batches = bound(config)
    if not isinstance(batches, TokenBatches):
        raise ConfigError(f"tokenizer: the run {path} has none; give token ids or other inputs as a tensor")
    saved = checkpoint()  # another Python has other text, so another tokenizer
    require_same_data({"train": batches.content()}, saved.state, saved.path.name)
    return able_to_pad(batches.tokenizer())


def able_to_pad(tokenizer: Any) -> Any:
    """The tokenizer, or a copy with a token to pad with: any will do, since masks say where it stands."""
    if tokenizer is None or tokenizer.pad_token is not None:
        return tokenizer
    own = copy.deepcopy(tokenizer)  # that of the data stays as it is, since digests are of it
    own.pad_token = own.eos_token or own.unk_token or own.convert_ids_to_tokens(0)
    return own
