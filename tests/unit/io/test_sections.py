import errno
import os
from pathlib import Path

import pytest

from genstream.io.sections import check_section_file, write_section


def test_sections_are_replaced_and_the_rest_stays(tmp_path: Path):
    path = tmp_path / "table.md"
    path.write_text("# Title\n\nText.\n", encoding="utf-8")
    write_section(path, "First", "one")
    write_section(path, "Second", "two")
    write_section(path, "First", "three\n\n| a |\n")
    write_section(path, "First", "four")
    assert path.read_text() == "# Title\n\nText.\n\n## First\n\nfour\n\n## Second\n\ntwo\n"
    write_section(path, "Second", "five")
    assert path.read_text() == "# Title\n\nText.\n\n## First\n\nfour\n\n## Second\n\nfive\n"


def test_a_new_file_holds_the_section(tmp_path: Path):
    write_section(tmp_path / "new.md", "First", "one")
    write_section(tmp_path / "new.md", "First", "two")
    assert (tmp_path / "new.md").read_text() == "## First\n\ntwo\n"


PROSE = "# Title\n\nText by André.\n\n## First\n\none\n\n## Second\n\ntwo\n"


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_line_ends_stay_those_of_the_file(tmp_path: Path, line_end):
    path = tmp_path / "page.md"
    path.write_bytes(PROSE.replace("\n", line_end).encode())
    write_section(path, "First", "three\n\n| a |\n")
    assert path.read_bytes() == PROSE.replace("one", "three\n\n| a |").replace("\n", line_end).encode()


def test_a_link_stays_one(tmp_path: Path):
    path, link = tmp_path / "page.md", tmp_path / "link.md"
    path.write_text(PROSE, encoding="utf-8")
    link.symlink_to(path)
    write_section(link, "First", "three")
    assert link.is_symlink()
    assert "three" in path.read_text(encoding="utf-8")


def test_a_full_disk_costs_nothing_of_what_is_there(tmp_path: Path, monkeypatch):
    path = tmp_path / "page.md"
    path.write_text(PROSE, encoding="utf-8")

    def write_half(self, text, **how):
        with self.open("w", encoding="utf-8") as file:
            file.write(text[:9])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(OSError, match="No space left"):
        write_section(path, "First", "three")
    assert path.read_text(encoding="utf-8") == PROSE


def test_what_is_no_file_is_not_replaced_by_one():
    with pytest.raises(
        ValueError, match=f"must be a markdown file in a folder that exists, got '{os.devnull}'"
    ):
        check_section_file(Path(os.devnull))


@pytest.mark.parametrize("closed", ["file", "folder"])
def test_what_may_not_be_written_is_refused_beforehand(tmp_path: Path, monkeypatch, closed):
    """To whoever may write everywhere, modes of files forbid nothing."""
    path = tmp_path / "page.md"
    path.write_text(PROSE, encoding="utf-8")
    shut = {"file": path, "folder": tmp_path}[closed]
    monkeypatch.setattr(os, "access", lambda asked, mode: asked != shut)
    with pytest.raises(ValueError, match="output must be a file that may be written"):
        check_section_file(path)
