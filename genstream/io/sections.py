"""Markdown files that several commands write to, each its own section."""

import os
from pathlib import Path


def check_section_file(path: Path) -> None:
    """Raise ValueError, before any work is done, if no section can be written there."""
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"output must be a markdown file in a folder that exists, got {str(path)!r}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"output must be a file that may be written, got {str(path)!r}")


def write_section(path: Path, title: str, text: str) -> None:
    """Replace the section `## title` of the file with `text`, or append it; the rest stays as it is."""
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    # The empty line in front lets a heading in the first line be found like all others.
    front, *sections = f"\n{before}".split("\n## ")
    section = f"{title}\n\n{text}"
    titles = [part.partition("\n")[0] for part in sections]
    if title in titles:
        sections[titles.index(title)] = section
    else:
        sections.append(section)
    parts = [front, *(f"## {part}" for part in sections)]
    path.write_text("\n\n".join(part.strip() for part in parts if part.strip()) + "\n", encoding="utf-8")
