"""Command-line options from the fields of a settings dataclass, so that every option is listed once."""

import argparse
import dataclasses
import inspect
import json
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from genstream.cli.parser import Parser
from genstream.io.model_folder import read_json

S = TypeVar("S")

_JSON_TYPES: dict[object, tuple[type, ...]] = {int: (int,), float: (int, float), str: (str,), Path: (str,)}


def parse_settings(prog: str, kind: type[S], texts: list[str]) -> tuple[S, Path]:
    """Settings of class `kind` and the output folder, from `--output FOLDER --config FILE --field value`.

    A field takes its value from the option, else from the config file, else from its default.
    """
    parser = _parser(prog, kind)
    given = vars(parser.parse_args(texts))
    output: Path = given.pop("output")
    config = given.pop("config")
    values = _read_config(config, kind) if config is not None else {}
    values |= given
    missing = [
        f"--{_option(field)}" for field in _fields(kind) if _required(field) and field.name not in values
    ]
    if missing:
        raise ValueError(f"{prog} needs {', '.join(missing)}")
    return kind(**values), output


def _parser(prog: str, kind: type[object]) -> argparse.ArgumentParser:
    # Settings that are taken over from another class are told by that one.
    told = [inspect.getdoc(base) or "" for base in kind.__mro__ if dataclasses.is_dataclass(base)]
    parser = Parser(prog=prog, description="\n\n".join(told), allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    folder = Path("runs") / prog.removeprefix("genstream ").removeprefix("train ").replace(" ", "-")
    parser.add_argument(
        "--output", type=Path, default=folder, help=f"folder for the result and its checkpoints ({folder})"
    )
    parser.add_argument("--config", type=Path, help="json file with any of the settings below")
    hints = typing.get_type_hints(kind)
    for field in _fields(kind):
        parser.add_argument(
            f"--{_option(field)}",
            dest=field.name,
            type=_converter(hints[field.name]),
            default=argparse.SUPPRESS,
            metavar=field.name.upper(),
            help="(required)" if _required(field) else f"({_default(field)})",
        )
    return parser


def _fields(kind: type[object]) -> tuple[dataclasses.Field[Any], ...]:
    assert dataclasses.is_dataclass(kind)
    return tuple(field for field in dataclasses.fields(kind) if field.init)


def _option(field: "dataclasses.Field[Any]") -> str:
    return field.name.replace("_", "-")


def _required(field: "dataclasses.Field[Any]") -> bool:
    return _default(field) is dataclasses.MISSING


def _default(field: "dataclasses.Field[Any]") -> object:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _read_config(path: Path, kind: type[object]) -> dict[str, object]:
    """Fields from a json file; an unknown one is an error that lists those that exist."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"config {str(path)!r} must be a json object, got {type(content).__name__}")
    hints = typing.get_type_hints(kind)
    names = [field.name for field in _fields(kind)]
    for name in content:
        if name not in names:
            raise ValueError(f"config {str(path)!r} has no setting {name!r}; allowed: {', '.join(names)}")
    for name, value in content.items():
        allowed = _JSON_TYPES.get(hints[name])
        if allowed is not None and (not isinstance(value, allowed) or isinstance(value, bool)):
            kind = hints[name].__name__
            raise ValueError(f"{name} in config {str(path)!r} must be of type {kind}, got {value!r}")
    return {name: _from_json(value, hints[name]) for name, value in content.items()}


def _from_json(value: object, hint: object) -> object:
    """Json knows neither paths nor tuples."""
    if isinstance(value, str) and Path in (hint, *typing.get_args(hint)):
        return Path(value)
    return tuple(value) if isinstance(value, list) else value


def _converter(hint: object) -> Callable[[str], object]:
    """Turns the text of an option into a value of type `hint`; "none" is None where that is allowed."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        (inner,) = (_converter(kind) for kind in typing.get_args(hint) if kind is not types.NoneType)
        return lambda text: None if text == "none" else inner(text)
    for kind in (str, Path, int, float):
        if hint is kind:
            return kind
    if typing.get_origin(hint) is typing.Literal:
        return type(typing.get_args(hint)[0])
    return lambda text: _from_json(_json_value(text), hint)


def _json_value(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be json such as true or '[80, 64]', got {text!r}") from error
