"""The registry of figures, and drawing all of them that apply to an evaluation into PNG files."""

import io
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from spd_hydra import atomic
from spd_hydra.figure.style import drawing_style
from spd_hydra.metric.evaluation import Evaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

History = Sequence[Mapping[str, Any]]  # rows of metrics.jsonl: step, split, "<group>/<name>": number
Draw = Callable[[Evaluation, History], "Figure | None"]


@dataclass(frozen=True, kw_only=True)
class FigureKind:
    """One kind of figure; `draw` returns None for an evaluation that has nothing to show of it."""

    name: str
    caption: str  # one sentence that tells what to look for, unless the picture has its own
    draw: Draw


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A figure that was written to a PNG file."""

    name: str
    caption: str
    path: Path


_figures: dict[str, FigureKind] = {}
_captions: "WeakKeyDictionary[Figure, str]" = WeakKeyDictionary()  # of pictures with one of their own


def figure(name: str, caption: str) -> Callable[[Draw], Draw]:
    """Decorator: add a drawing function to the figures of every report.

    Args:
        name: file name without suffix, e.g. `losses`.
        caption: the sentence under the figure, saying what to look for; `captioned` gives a picture its own.

    Raises:
        ValueError: another function already has that name.
    """

    def add(draw: Draw) -> Draw:
        known = _figures.get(name)
        if known is not None and known.draw.__module__ != draw.__module__:
            raise ValueError(f"figure {name} is already drawn by {known.draw.__module__}")
        _figures[name] = FigureKind(name=name, caption=caption, draw=draw)
        return draw

    return add


def captioned(picture: "Figure", caption: str) -> "Figure":
    """Give a picture a caption of its own, where that of its kind would not describe it."""
    _captions[picture] = caption
    return picture


def caption_of(picture: "Figure") -> str | None:
    """The caption that `captioned` gave it; None: that of its kind."""
    return _captions.get(picture)


def figures() -> list[FigureKind]:
    """Every registered figure in the order of the report."""
    return list(_figures.values())


def draw_all(
    evaluation: Evaluation,
    history: History,
    directory: Path,
    require_ownership: Callable[[], None] = lambda: None,
) -> list[Drawn]:
    """Draw every figure that applies into `<directory>/<name>.png` and tell which were written.

    Those that are not drawn are removed there: they would be of an earlier evaluation.

    Needs no display and changes no global setting of matplotlib. A figure that fails is logged as a
    warning and left out: a picture is never a reason to lose a run.

    Args:
        evaluation: what to draw.
        history: rows of the metrics log for the curves; may be empty.
        directory: made if it does not exist, in a directory that does.
        require_ownership: called before each file is written; what it raises ends the drawing.
    """
    require_ownership()
    try:
        directory.mkdir(exist_ok=True)
    except OSError as error:
        log.warning("no figures: cannot make %s: %s", directory, error.strerror)
        return []
    drawn = []
    for kind in figures():
        path = directory / f"{kind.name}.png"
        try:
            with drawing_style():
                picture = kind.draw(evaluation, history)
                own_caption = None if picture is None else caption_of(picture)
                png = None if picture is None else as_png(picture)
        except Exception:
            log.warning("figure %s could not be drawn; the run goes on without it", kind.name, exc_info=True)
            continue
        if png is None:
            continue
        require_ownership()
        try:
            atomic.replace(path, png)
        except OSError as error:
            log.warning("figure %s could not be written: %s", kind.name, error)
            continue
        drawn.append(Drawn(name=kind.name, caption=own_caption or kind.caption, path=path))
    remove_figures(directory, kept={one.name for one in drawn})
    return drawn


def remove_figures(directory: Path, kept: Collection[str] = ()) -> None:
    """Remove the pictures of every registered figure but those named; other files stay."""
    for kind in figures():
        if kind.name not in kept:
            try:
                (directory / f"{kind.name}.png").unlink(missing_ok=True)
            except OSError as error:
                log.warning("the old figure %s could not be removed: %s", kind.name, error)


def as_png(picture: "Figure") -> bytes:
    """The picture as the bytes of a PNG file, the same for the same picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(picture)
    layout = picture.get_layout_engine()
    if layout is not None:  # savefig would draw everything twice to lay it out once
        layout.execute(picture)
        picture.set_layout_engine("none")
    png = io.BytesIO()
    canvas.print_png(png, metadata={"Software": None})
    return png.getvalue()
