"""Which text a name stands for: a dataset on the hub, local files, or a dataset saved to disk."""

from pathlib import Path

from spd_hydra.data.hub_text import on_hub
from spd_hydra.data.local_text import KINDS, files_of, is_saved, of_files, of_folder, saved
from spd_hydra.data.text_source import TextSource, Wanted
from spd_hydra.model import hub
from spd_hydra.section import ConfigError


def find_text(wanted: Wanted) -> TextSource:
    """The source that a name stands for.

    Raises:
        ConfigError: there is none, or it cannot be reached.
    """
    path = Path(wanted.name).expanduser()
    if is_saved(path):
        return saved(path, wanted)
    if files := files_of(path):
        return of_folder(path, files, wanted) if path.is_dir() else of_files(files, wanted)
    if path.exists() or not hub.is_id(wanted.name):  # which no pattern is
        raise ConfigError(
            f"{wanted.key('name')}: got {wanted.name}, where there is no file of {', '.join(KINDS)} and no "
            "saved dataset; give the id of a dataset on the hub, a file, a folder, or a pattern"
        )
    return on_hub(wanted)


def whole_name(name: str) -> str:
    """A name that means the same from any directory: the whole path of local data, an id as it is."""
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() or not hub.is_id(name) else name
