"""What is installed is what stands in the tree, and what the README says to type works as it stands."""

import importlib
import importlib.metadata
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import diffusers.pipelines
import pytest
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import genstream
from genstream.cli.settings import parse_settings
from genstream.cli.trainers import TRAINERS
from genstream.pipelines.folders import FolderPipeline
from genstream.vae.native import NativeDecoder, NativeVAE

ROOT = Path(__file__).resolve().parent.parent
SIDE_FOLDERS = [name for name in ("app", "kernels", "pipelines", "vae") if (ROOT / name).is_dir()]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]

MAIN_COMMAND = '.venv/bin/genstream generate "a red circle moving right" -o out.mp4'
INSTALL_AND_GENERATE = (
    f"python3 -m venv .venv && .venv/bin/pip install -c constraints.txt . && {MAIN_COMMAND}"
)
INSTALL_AND_TEST = (
    'python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e ".[test]" && .venv/bin/pytest'
)


def _folders() -> dict[str, Path]:
    """Dotted name of every folder that holds modules -> the folder."""
    tops = {"genstream": ROOT / "genstream"} | {f"genstream.{name}": ROOT / name for name in SIDE_FOLDERS}
    return {
        ".".join([top, *module.parent.relative_to(folder).parts]): module.parent
        for top, folder in tops.items()
        for module in folder.rglob("*.py")
    }


def _installed_files() -> set[str]:
    """Path inside the installed package of every file in the tree."""
    tops = {"genstream": ROOT / "genstream"} | {f"genstream/{name}": ROOT / name for name in SIDE_FOLDERS}
    return {
        f"{top}/{path.relative_to(folder).as_posix()}"
        for top, folder in tops.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def _requirements() -> list[Requirement]:
    extras = PROJECT["project"]["optional-dependencies"]
    return [
        Requirement(line) for line in PROJECT["project"]["dependencies"] + extras["test"] + extras["train"]
    ]


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_every_package_is_listed():
    assert sorted(SETUPTOOLS["packages"]) == sorted(_folders())


def test_every_side_folder_is_mapped():
    mapped = {name: folder for name, folder in SETUPTOOLS["package-dir"].items() if name != "genstream"}
    used = {name for name in SIDE_FOLDERS if any((ROOT / name).rglob("*.py"))}
    assert mapped == {f"genstream.{name}": name for name in used}


def test_kernels_is_a_namespace():
    # A regular package of this name hides Hugging Face's `kernels` from transformers and diffusers.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_all_other_packages_are_regular():
    packages = {name: folder for name, folder in _folders().items() if name != "genstream.kernels"}
    assert [name for name, folder in packages.items() if not (folder / "__init__.py").is_file()] == []


def test_tests_are_no_package():
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_no_folder_is_named_like_a_diffusers_pipeline():
    # diffusers saves a component of such a folder under the folder's name and cannot load it again.
    names = {name.rpartition(".")[2] for name in _folders()}
    assert [name for name in sorted(names) if hasattr(diffusers.pipelines, name)] == []


def test_no_module_is_named_like_a_dependency():
    # Running a file by its path puts its folder first on sys.path.
    ours = {path.stem for folder in _folders().values() for path in folder.glob("*.py")}
    ours |= {name.rpartition(".")[2] for name in _folders() if name != "genstream.kernels"}
    assert ours & {name.replace("-", "_") for name in [*_pins(), "triton", "gradio"]} == set()


def test_console_script_is_declared():
    assert PROJECT["project"]["scripts"] == {"genstream": "genstream.cli.__main__:main"}


def test_pins_are_exact_and_torch_is_first():
    pins = _pins()
    assert next(iter(pins)) == "torch"
    assert [version for version in pins.values() if not version.replace(".", "").isalnum()] == []
    assert [name for name in pins if name != canonicalize_name(name)] == []


@pytest.mark.parametrize("requirement", _requirements(), ids=lambda requirement: requirement.name)
def test_pins_satisfy_the_requirements(requirement):
    assert requirement.specifier.contains(_pins()[canonicalize_name(requirement.name)])


def test_pins_cover_what_the_requirements_pull_in():
    waiting, seen = _requirements(), set()
    while waiting:
        name = canonicalize_name(waiting.pop().name)
        if name in seen:
            continue
        seen.add(name)
        waiting += _pulled_in_by(name)
    assert sorted(seen - set(_pins())) == []


def _pulled_in_by(name: str) -> list[Requirement]:
    """Requirements of an installed distribution that it does not itself pin (torch pins CUDA packages)."""
    try:
        lines = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return []  # an extra that this environment was made without
    requirements = [Requirement(line) for line in lines]
    return [
        requirement
        for requirement in requirements
        if (requirement.marker is None or requirement.marker.evaluate({"extra": ""}))
        and not any(specifier.operator == "==" for specifier in requirement.specifier)
    ]


@pytest.mark.parametrize("command", [INSTALL_AND_GENERATE, INSTALL_AND_TEST])
def test_readme_has_the_command(command):
    assert command in (ROOT / "README.md").read_text().splitlines()


def test_each_training_command_of_the_readme_starts_from_what_those_in_front_of_it_make():
    lines = [line.partition("#")[0] for line in (ROOT / "README.md").read_text().splitlines()]
    commands = [
        shlex.split(part) for line in lines if line.startswith("genstream ") for part in line.split("&&")
    ]
    made = []
    for words in commands:
        if (trainer := TRAINERS.get(part := " ".join(words[1:3]))) is None:
            continue
        settings, output = parse_settings(f"genstream {part}", trainer.load()[0], words[3:])
        for name in ("vae", "text_encoder", "initial", "teacher"):
            place = getattr(settings, name, None)
            if place is not None and place.startswith("runs/"):
                assert Path(*Path(place).parts[:2]) in made, (part, name)
        made.append(output)
    assert len(made) > 5


@pytest.mark.parametrize("command", [INSTALL_AND_TEST, MAIN_COMMAND])
def test_ci_runs_the_readme_command(command):
    assert command in (line.strip() for line in (ROOT / ".ci" / "run").read_text().splitlines())


def test_ruff_check():
    _run("ruff", "check", "--no-cache", ".", cwd=ROOT)


def test_ruff_format():
    _run("ruff", "format", "--no-cache", "--check", ".", cwd=ROOT)


@pytest.mark.slow
def test_mypy(tmp_path):
    # Checked through links under one package: as top-level folders each class would have two names.
    package = tmp_path / "genstream"
    package.mkdir()
    for path in [*(ROOT / "genstream").iterdir(), *(ROOT / name for name in SIDE_FOLDERS)]:
        (package / path.name).symlink_to(path)
    config = f"--config-file={ROOT / 'pyproject.toml'}"
    _run("mypy", config, f"--cache-dir={ROOT / '.mypy_cache'}", "genstream", cwd=tmp_path)


@pytest.mark.slow
def test_wheel_holds_every_file(tmp_path):
    source = tmp_path / "source"
    for name in ("genstream", *SIDE_FOLDERS):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = ("pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation")
    _run(*build, "--wheel-dir", str(tmp_path), ".", cwd=source)
    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == _installed_files()


def _run(*module_and_arguments: str, cwd: Path) -> None:
    command = [sys.executable, "-m", *module_and_arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_components_are_found_where_model_folders_look_for_them():
    for name in ("schedulers.few_step", "pipelines.causal_video", "vae.loading", "vae.turbo"):
        importlib.import_module(f"genstream.{name}")
    kinds: list[type] = [ModelMixin, SchedulerMixin, DiffusionPipeline]
    for kind in kinds:
        kinds += kind.__subclasses__()
    ours = {kind for kind in kinds if kind.__module__.startswith("genstream.") and kind.__name__[0] != "_"}
    ours -= {NativeDecoder, NativeVAE, FolderPipeline}  # no folder holds one: what others have in common
    assert len(ours) >= 8
    assert all(getattr(genstream, kind.__name__, None) is kind for kind in ours)
