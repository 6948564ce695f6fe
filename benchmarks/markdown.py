"""What generated pages are made of: tables, lists, and sections that one of several programs writes."""

import re
from collections.abc import Sequence
from pathlib import Path


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '∣') for cell in line)} |" for line in lines)


def bullets(items: Sequence[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"- {item}" for item in items)


def section(page: str, title: str) -> str:
    """The section under `## title` with its heading, to the next one; empty if the page has none."""
    found = re.search(rf"^\#\# {re.escape(title)}\n.*?(?=^\#\# |\Z)", page, re.MULTILINE | re.DOTALL)
    return found.group() if found else ""


def with_section(page: str, title: str, text: str) -> str:
    """The page with this text, its heading included, as its last section, in place of one of that title."""
    rest = page.replace(section(page, title), "") if section(page, title) else page
    return "\n\n".join(part for part in (rest.strip(), text.strip()) if part) + "\n"


def write_section(path: Path, title: str, text: str) -> None:
    """Make this text the last section of the page in a file, which need not be there yet."""
    page = path.read_text(encoding="utf-8") if path.exists() else ""
    path.write_text(with_section(page, title, text), encoding="utf-8")
