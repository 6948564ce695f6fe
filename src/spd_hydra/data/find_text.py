"""Which text a name stands for: a dataset on the hub, local files, or a dataset saved to disk."""

import re
from pathlib import Path

from spd_hydra.data.hub_text import on_hub
from spd_hydra.data.local_text import KINDS, files_of, is_saved, of_files, of_folder, saved
from spd_hydra.data.text_source import TextSource, Wanted
from spd_hydra.section import ConfigError

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


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
    is_pattern = any(letter in wanted.name for letter in "*?[")
    if path.exists() or is_pattern or not _HUB_ID.fullmatch(wanted.name):
        raise ConfigError(
            f"{wanted.key('name')}: got {wanted.name}, where there is no file of {', '.join(KINDS)} and no "
            "saved dataset; give the id of a dataset on the hub, a file, a folder, or a pattern"
        )
    return on_hub(wanted)
