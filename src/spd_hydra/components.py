"""Everything that can be chosen in the configuration, imported so that it is registered."""

import importlib.metadata

import spd_hydra.ci_fn.global_mlp
import spd_hydra.ci_fn.global_transformer
import spd_hydra.ci_fn.mlp
import spd_hydra.ci_fn.shared_mlp
import spd_hydra.ci_fn.vector_mlp
import spd_hydra.data.induction
import spd_hydra.data.python_text
import spd_hydra.data.sparse_features
import spd_hydra.data.tokens
import spd_hydra.logger.files
import spd_hydra.logger.wandb
import spd_hydra.model.hf
import spd_hydra.model.induction
import spd_hydra.model.lm_tiny
import spd_hydra.model.resid_mlp
import spd_hydra.model.tms  # noqa: F401
from spd_hydra.section import ConfigError

PLUGINS = "spd_hydra.plugins"


def load_plugins() -> None:
    """Import the modules that other packages offer under the entry points `spd_hydra.plugins`.

    Raises:
        ConfigError: one of them cannot be imported.
    """
    for plugin in importlib.metadata.entry_points(group=PLUGINS):
        try:
            plugin.load()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise ConfigError(
                f"the plug-in {plugin.name} ({plugin.value}) cannot be loaded: {reason}"
            ) from error
