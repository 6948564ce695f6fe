"""Pages from the templates beside this file, every inserted value escaped."""

from importlib.resources import files
from typing import Any

import jinja2

from spd_hydra.report.numbers import number


def _read(name: str) -> str:
    return files("spd_hydra.report").joinpath(name).read_text(encoding="utf-8")


def render(template: str, **values: Any) -> str:
    """Fill a template with values.

    Raises:
        jinja2.UndefinedError: the template names a value that was not given.
    """
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_read),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    return environment.get_template(template).render(**values)
