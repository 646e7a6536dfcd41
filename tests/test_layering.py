"""Who may import whom. A part of the program may use the parts below it, never the ones above."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import genstream

ROOT = Path(__file__).resolve().parent.parent
SIDE_FOLDERS = ("app", "kernels", "pipelines", "vae")

# Part of the program -> the parts it may import besides itself. Lowest first.
MAY_IMPORT: dict[str, set[str]] = {
    "shapes": set(),
    "io": {"shapes"},
    "data": {"shapes"},
    "kernels": set(),
    "schedulers": {"shapes"},
    "cache": {"shapes", "kernels"},
    "vae": {"shapes", "kernels", "io"},
    "transformer": {"shapes", "kernels", "cache"},
    "conditioning": {"shapes"},
}
MAY_IMPORT["streaming"] = set(MAY_IMPORT) - {"io"}
MAY_IMPORT["pipelines"] = set(MAY_IMPORT)
MAY_IMPORT["training"] = set(MAY_IMPORT)
MAY_IMPORT["evaluation"] = {"shapes", "io", "data"}
MAY_IMPORT["app"] = {"pipelines", "streaming", "conditioning", "io"}
MAY_IMPORT["cli"] = set(MAY_IMPORT)

# Optional dependency -> the only folder that imports it.
ONLY_IN = {"triton": "kernels", "gradio": "app", "peft": "transformer", "torchao": "pipelines"}


def _source_files() -> list[Path]:
    folders = [ROOT / "genstream", *(ROOT / name for name in SIDE_FOLDERS)]
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def _part(path: Path) -> str:
    """The part of the program a file belongs to; `genstream` for the package's own __init__."""
    top, *rest = path.relative_to(ROOT).with_suffix("").parts
    if top != "genstream":
        return top
    return "genstream" if rest == ["__init__"] else rest[0]


def _imported_names(source: str) -> Iterator[str]:
    """Dotted names of everything a file imports; `from a import b` gives a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


def _imported_part(name: str) -> str | None:
    """The part of the program that a dotted name belongs to, None if it is none of ours."""
    top, _, rest = name.partition(".")
    if top != "genstream" or not rest:
        return None
    first = rest.partition(".")[0]
    if first in genstream._EXPORTS:
        return _imported_part(f"{genstream._EXPORTS[first]}.{first}")
    return None if first == "__version__" else first


def _violations(part: str, source: str) -> list[str]:
    found = []
    for name in _imported_names(source):
        imported = _imported_part(name)
        if imported not in (None, part) and imported not in MAY_IMPORT[part]:
            found.append(f"{part} may not import {name}")
        top = name.partition(".")[0]
        if top in ONLY_IN and ONLY_IN[top] != part:
            found.append(f"only {ONLY_IN[top]}/ may import {top}, not {part}")
        if name.startswith("."):
            found.append(f"relative import {name}")
    return found


@pytest.mark.parametrize("path", _source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_file_imports_only_what_is_below_it(path):
    part = _part(path)
    if part == "genstream":
        assert not [name for name in _imported_names(path.read_text()) if _imported_part(name)]
        return
    assert part in MAY_IMPORT, f"{path.name}: say in MAY_IMPORT what {part!r} may import"
    assert _violations(part, path.read_text()) == []


@pytest.mark.parametrize(
    ("part", "line"),
    [
        ("cache", "from genstream.streaming.state import StreamState"),
        ("streaming", "import genstream.io.writer"),
        ("streaming", "from genstream import io"),
        ("vae", "from genstream import CausalDiT"),
        ("evaluation", "def f():\n    from genstream.vae import tiny"),
        ("cache", "from genstream.shapes_of_others import x"),
        ("cache", "import triton.language as tl"),
        ("cli", "import gradio"),
        ("cache", "from . import layout"),
    ],
)
def test_a_forbidden_import_is_found(part, line):
    assert len(_violations(part, line)) == 1


@pytest.mark.parametrize(
    ("part", "line"),
    [
        ("cache", "from genstream.cache.layout import CacheLayout"),
        ("cache", "from genstream.shapes import frames_of"),
        ("kernels", "import triton"),
        ("streaming", "from genstream import CausalDiT, __version__"),
        ("cli", "from genstream.evaluation import toyworld"),
    ],
)
def test_an_allowed_import_passes(part, line):
    assert _violations(part, line) == []


def test_importing_the_package_loads_no_torch():
    code = "import sys, genstream; sys.exit(bool({'torch', 'diffusers', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
