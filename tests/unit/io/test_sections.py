from pathlib import Path

from genstream.io.sections import write_section


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
