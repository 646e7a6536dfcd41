"""The model card of a converted model: README.md with the Hub's header, licence and origin of the weights."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from yaml import YAMLError

CARD_NAME = "README.md"
ADAPTER_FOLDER = "lora"
_LICENSE_NAMES = ("LICENSE", "LICENSE.txt", "LICENSE.md")
_OTHER = "other"
_ORIGIN = "## Origin"
_CHANGES = "## Changed since"
MODEL_PLACE = "path/to/this/folder"
"""Stands for the model's folder, or its name on the Hub, in the code of a card."""
_LORA_CALL = re.compile(r"^.*\bload_lora_\w+\(.*\n", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class License:
    """Under which terms the weights may be used.

    Attributes:
        name: the Hub's name, such as "apache-2.0"; None where only the text is known.
        text: file that holds it; None where there is none.
        found: where it was said.
    """

    name: str | None
    text: Path | None
    found: str


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A file that a part of the model was made of.

    Attributes:
        part: of the model, in words.
        file: its name.
        sha256: of its content.
        license: the Hub's name of its licence, or of the file that holds it; None where nobody says.
    """

    part: str
    file: str
    sha256: str
    license: str | None = None


def find_license(given: str | None, source: Path) -> License | None:
    """The licence that the user gave, or what stands beside the source; None where nobody says.

    Args:
        given: the Hub's name of it.
        source: file or folder of the weights.
    """
    folder = source if source.is_dir() else source.parent
    text = next((folder / name for name in _LICENSE_NAMES if (folder / name).is_file()), None)
    if given is not None:
        return License(name=given, text=text, found="given")
    if (name := _license_in_card(folder / CARD_NAME)) is not None:
        return License(name=name, text=text, found=CARD_NAME)
    return None if text is None else License(name=None, text=text, found=text.name)


def license_of(file: Path) -> str | None:
    """What stands beside a weight file or in the model folder above it: the Hub's name, or a file's."""
    for folder in (file.parent, file.parent.parent):
        if (found := find_license(None, folder)) is not None:
            return found.name or found.found
    return None


@dataclass(frozen=True, kw_only=True)
class ConversionCard:
    """What the card says.

    Attributes:
        title: of the card.
        library: that loads the model, by the Hub's name.
        usage: Python code that loads it.
        notes: what was done, a sentence each.
        origins: of all parts.
        terms: licence of the transformer; None where it is not known.
        source: file or folder of the weights; the origins that its own card tells are told here too.
    """

    title: str
    task: str
    library: str
    usage: str
    notes: Sequence[str]
    origins: Sequence[Origin]
    terms: License | None
    source: Path

    def write(self, folder: Path) -> None:
        """Write README.md into `folder`, and the text of the licence beside it."""
        header = "| part | file | licence | sha256 |\n|---|---|---|---|\n"
        rows = [
            f"| {origin.part} | `{origin.file}` | {origin.license or 'not known'} | `{origin.sha256}` |"
            for origin in self.origins
        ]
        parts = [
            f"# {self.title}",
            f"```python\n{self.usage}\n```",
            f"## Licence\n\n{self._terms_in_words()}.",
            _ORIGIN + "\n\n" + header + "\n".join(rows),
            "\n".join(f"- {note}" for note in self.notes),
            *_origin_before(self.source),
        ]
        ModelCard(f"---\n{self._header()}\n---\n\n" + "\n\n".join(parts) + "\n").save(folder / CARD_NAME)
        if self.terms is not None and self.terms.text is not None:
            shutil.copyfile(self.terms.text, folder / _LICENSE_NAMES[0])

    @property
    def _others(self) -> list[str]:
        """Licences of parts that are not the transformer's."""
        own = None if self.terms is None else self.terms.name or self.terms.found
        told = dict.fromkeys(origin.license for origin in self.origins if origin.license is not None)
        return [name for name in told if name != own]

    def _terms_in_words(self) -> str:
        if not self._others:
            return _told(self.terms)
        return f"Several: {_told(self.terms)} for the transformer; for other parts {', '.join(self._others)}"

    def _header(self) -> str:
        """The Hub takes licences from its list; any other one is "other", with its text linked."""
        data = ModelCardData(library_name=self.library, pipeline_tag=self.task, tags=["genstream"])
        if self._others:
            data.license, data.license_name = _OTHER, "several"
            data.license_link = CARD_NAME
        elif self.terms is not None:
            data.license = self.terms.name or _OTHER
            if self.terms.name is None:
                data.license_name = "see-license-file"
                data.license_link = _LICENSE_NAMES[0]
        return str(data.to_yaml())


def copy_companions(source: Path, target: Path, changes: Sequence[str], *, with_adapter: bool) -> None:
    """Copy card, licence and adapter from one model folder to another, where there are any.

    Args:
        source: folder that a model was loaded from.
        target: folder that it was saved to.
        changes: made to the model in between, a sentence each, for the card.
        with_adapter: whether the adapter still goes with the weights.
    """
    if source.resolve() != target.resolve():
        for name in (CARD_NAME, _LICENSE_NAMES[0]):
            if (source / name).is_file():
                shutil.copyfile(source / name, target / name)
        if with_adapter and (source / ADAPTER_FOLDER).is_dir():
            shutil.copytree(source / ADAPTER_FOLDER, target / ADAPTER_FOLDER, dirs_exist_ok=True)
    if changes and (target / CARD_NAME).is_file():
        text = (target / CARD_NAME).read_text(encoding="utf-8")
        if not with_adapter:
            text = _LORA_CALL.sub("", text)
        text, _, known = text.rstrip().partition(f"\n\n{_CHANGES}\n\n")
        told = dict.fromkeys([*known.splitlines(), *(f"- {change}" for change in changes)])
        text = f"{text}\n\n{_CHANGES}\n\n" + "\n".join(told) + "\n"
        (target / CARD_NAME).write_text(text, encoding="utf-8")


def _told(terms: License | None) -> str:
    if terms is None:
        return "Not known: none was given, and none stood beside the source"
    linked = f"[{_LICENSE_NAMES[0]}]({_LICENSE_NAMES[0]})"
    return f"See {linked}" if terms.name is None else terms.name


def _origin_before(source: Path) -> list[str]:
    """What the source's own card says about where its files come from."""
    path = source / CARD_NAME
    if not path.is_file() or f"\n{_ORIGIN}\n" not in (text := path.read_text(encoding="utf-8")):
        return []
    return [f"## Origin of {source.name}\n\n{text.partition(f'{_ORIGIN}')[2].strip()}"]


def _license_in_card(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        data = ModelCard.load(path, ignore_metadata_errors=True).data
    except YAMLError as error:
        raise ValueError(f"card {str(path)!r} must begin with valid yaml: {error}") from error
    if data.license == _OTHER and data.license_name:
        return str(data.license_name)
    return None if data.license is None else str(data.license)
