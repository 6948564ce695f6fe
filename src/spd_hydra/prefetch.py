"""`task=prefetch`: what a run needs from elsewhere, fetched and prepared where there is a network."""

from spd_hydra.config import RunConfig
from spd_hydra.distributed import say


def prefetch(config: RunConfig) -> dict[str, list[str]]:
    """Fetch the target, fetch and tokenise its data, and say what lies where.

    A target that is trained and data that are drawn need nothing.

    Raises:
        ConfigError: something cannot be found or reached, or the data do not fit the target.
    """
    lines = config.model.prefetch()
    lines += config.data.prefetch(config.model)
    say(f"{config.name}: " + ("nothing has to be fetched" if not lines else "ready to run without a network"))
    for line in lines:
        say(f"  {line}")
    return {"prefetched": lines}
