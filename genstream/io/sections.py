"""Markdown files that several commands write to, each its own section."""

import os
from pathlib import Path

from genstream.io.partial import write_whole


def check_section_file(path: Path) -> None:
    """Raise ValueError, before any work is done, if no section can be written there."""
    if (path.exists() and not path.is_file()) or not path.parent.is_dir():
        raise ValueError(f"output must be a markdown file in a folder that exists, got {str(path)!r}")
    # The folder too: a file becomes whole beside the one that is there.
    if not all(os.access(each, os.W_OK) for each in (path, path.resolve().parent) if each.exists()):
        raise ValueError(f"output must be a file that may be written, got {str(path)!r}")


def write_section(path: Path, title: str, text: str) -> None:
    """Replace the section `## title` of the file with `text`, or append it; the rest stays as it is."""
    path = path.resolve()  # else a link would become a file
    before = path.read_bytes().decode("utf-8") if path.is_file() else ""
    line_end = "\r\n" if "\r\n" in before else "\n"
    before = before.replace("\r\n", "\n")
    # The empty line in front lets a heading in the first line be found like all others.
    front, *sections = f"\n{before}".split("\n## ")
    section = f"{title}\n\n{text}"
    titles = [part.partition("\n")[0] for part in sections]
    if title in titles:
        sections[titles.index(title)] = section
    else:
        sections.append(section)
    parts = [front, *(f"## {part}" for part in sections)]
    after = "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"
    write_whole(path, after.replace("\n", line_end))
