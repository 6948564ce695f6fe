"""A suite stands for its experiments: its word is replaced by theirs before anything is planned."""

from collections.abc import Sequence

from spd_hydra.composer import Composer
from spd_hydra.overrides import read
from spd_hydra.section import ConfigError

GROUP = "suite"
NONE = "none"


def expanded(composer: Composer, overrides: Sequence[str]) -> list[str]:
    """The words with `experiment=a,b,…` in the place of `suite=<name>`; without a suite the same words.

    Raises:
        ConfigError: there is no such suite, it names no experiment, or an experiment is chosen beside it.
    """
    words = [read(text) for text in overrides]
    places = [n for n, word in enumerate(words) if word is not None and word.key_or_group == GROUP]
    if not places:
        return list(overrides)
    experiments = _experiments(composer, overrides[places[-1]])  # the last one counts, as for every word
    if not experiments:
        return list(overrides)
    text = overrides[places[-1]]
    for word in words:
        if word is not None and word.key_or_group == "experiment":
            own = str(word.input_line)
            raise ConfigError(
                f"experiment: got {own.partition('=')[2] or own} beside {text}, which runs "
                f"{', '.join(experiments)}; leave out {text} or {own}"
            )
    found = list(overrides)
    found[places[-1]] = f"experiment={','.join(experiments)}"
    return [text for place, text in enumerate(found) if place not in places[:-1]]


def require_none(composer: Composer, overrides: Sequence[str]) -> None:
    """Refuse a suite where one configuration is asked for.

    Raises:
        ConfigError: a suite is chosen.
    """
    if expanded(composer, overrides) != list(overrides):
        raise ConfigError(
            f"{GROUP}: stands for several configurations, and one can be shown; give one of its experiments "
            "instead, e.g. experiment=paper/tms_5-2"
        )


def _experiments(composer: Composer, text: str) -> list[str]:
    """The experiments of the suite that a word chooses; none for `suite=none`."""
    word = read(text)
    assert word is not None, "it was read before"
    if word.is_sweep_override():
        names = ", ".join(composer.groups()[GROUP])
        given = text.partition("=")[2]
        raise ConfigError(f"{GROUP}: got {given}, must be one of {names}; start a sweep for each")
    found = [str(name) for name in composer.composed([text])[GROUP]["experiments"]]
    if not found and word.value() != NONE:
        raise ConfigError(
            f"{GROUP}: got {word.value()}, which names no experiment; list some in its YAML file, "
            "e.g. experiments: [tms_5-2, resid_mlp1]"
        )
    return found
