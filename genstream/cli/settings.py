"""Command-line options from the fields of a settings dataclass, so that every option is listed once."""

import argparse
import dataclasses
import inspect
import json
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from genstream.cli.parser import Parser
from genstream.io.model_folder import read_json

S = TypeVar("S")

_TOLD = {int: "a whole number", float: "a number", str: "a text", Path: "a path", bool: "true or false"}
_EXAMPLES = {int: 1, float: 0.5, bool: True, str: "..."}
_LISTS = (tuple, Sequence)


def parse_settings(
    prog: str, kind: type[S], texts: list[str], others: argparse.ArgumentParser | None = None
) -> tuple[S, Path]:
    """Settings of class `kind` and the output folder, from `--output FOLDER --config FILE --field value`.

    A field takes its value from the option, else from the config file, else from its default. `others` are
    options that have been read before; help lists them too.
    """
    given = vars(_parser(prog, kind, others).parse_args(texts))
    config = given["config"]
    values = _read_config(config, kind) if config is not None else {}
    values |= {field.name: given[field.name] for field in _fields(kind) if field.name in given}
    missing = [
        f"--{_option(field)}" for field in _fields(kind) if _required(field) and field.name not in values
    ]
    if missing:
        raise ValueError(f"{prog} needs {', '.join(missing)}")
    return kind(**values), given["output"]


def _parser(
    prog: str, kind: type[object], others: argparse.ArgumentParser | None = None
) -> argparse.ArgumentParser:
    # Settings that are taken over from another class are told by that one.
    told = [inspect.getdoc(base) or "" for base in kind.__mro__ if dataclasses.is_dataclass(base)]
    parents = [] if others is None else [others]
    parser = Parser(prog=prog, description="\n\n".join(told), allow_abbrev=False, parents=parents)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    folder = Path("runs") / prog.removeprefix("genstream ").removeprefix("train ").replace(" ", "-")
    parser.add_argument(
        "--output", type=_named, default=folder, help=f"folder for the result and its checkpoints ({folder})"
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
            help="(required)" if _required(field) else f"({_shown(_default(field))})",
        )
    return parser


def _named(text: str) -> Path:
    """A folder with a name, which its run takes over."""
    path = Path(text)
    return path if path.name.strip(".") else path.resolve()


def _fields(kind: type[object]) -> tuple[dataclasses.Field[Any], ...]:
    assert dataclasses.is_dataclass(kind)
    return tuple(field for field in dataclasses.fields(kind) if field.init)


def _option(field: "dataclasses.Field[Any]") -> str:
    return field.name.replace("_", "-")


def _required(field: "dataclasses.Field[Any]") -> bool:
    return _default(field) is dataclasses.MISSING


def _default(field: "dataclasses.Field[Any]") -> object:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _shown(value: object) -> str:
    """As it would be given."""
    if isinstance(value, tuple | bool):
        return json.dumps(value)
    return "none" if value is None else str(value)


def _read_config(path: Path, kind: type[object]) -> dict[str, object]:
    """Fields from a json file; an unknown one is an error that lists those that exist."""
    if not path.is_file():
        raise ValueError(f"config must be a json file, got {str(path)!r}")
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"config {str(path)!r} must be a json object, got {type(content).__name__}")
    hints = typing.get_type_hints(kind)
    names = [field.name for field in _fields(kind)]
    for name in content:
        if name not in names:
            raise ValueError(f"config {str(path)!r} has no setting {name!r}; allowed: {', '.join(names)}")
    values = {}
    for name, value in content.items():
        try:
            values[name] = _from_json(value, hints[name])
        except TypeError as error:
            raise ValueError(f"{name} in config {str(path)!r} {error}") from error
    return values


def _from_json(value: object, hint: Any) -> object:  # noqa: ANN401
    """A value of type `hint` from json, which knows neither paths nor tuples.

    Raises:
        TypeError: it is none; the message goes on behind the name of the setting.
    """
    kinds = _kinds(hint)
    if value is None and types.NoneType in kinds:
        return None
    for kind in kinds:
        if typing.get_origin(kind) in _LISTS and isinstance(value, list):
            inner = [each for each in typing.get_args(kind) if each is not ...]
            if len(inner) == 1:
                inner *= len(value)
            if len(inner) == len(value):
                return tuple(map(_from_json, value, inner))
        elif typing.get_origin(kind) is typing.Literal and value in typing.get_args(kind):
            return value
        elif kind is Path and isinstance(value, str):
            return Path(value)
        elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            return value
        elif isinstance(kind, type) and type(value) is kind:
            return value
    raise TypeError(f"must be {_told(hint)}, got {json.dumps(value)}")


def _converter(hint: Any) -> Callable[[str], object]:  # noqa: ANN401
    """Turns the text of an option into a value of type `hint`; "none" is None where that is allowed."""
    kinds = _kinds(hint)
    (kind,) = (kind for kind in kinds if kind is not types.NoneType)
    if kind in (str, Path, int, float):
        convert: Callable[[str], object] = kind
    elif typing.get_origin(kind) is typing.Literal:
        convert = type(typing.get_args(kind)[0])
    else:

        def convert(text: str) -> object:
            try:
                return _from_json(json.loads(text), kind)
            except ValueError as error:
                raise argparse.ArgumentTypeError(f"must be {_told(kind)}, got {text!r}") from error
            except TypeError as error:
                raise argparse.ArgumentTypeError(str(error)) from error

    if types.NoneType in kinds:
        return lambda text: None if text == "none" else convert(text)
    return convert


def _kinds(hint: Any) -> tuple[Any, ...]:  # noqa: ANN401
    """The types that a value may have, of which NoneType can be one."""
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if is_union else (hint,)


def _told(hint: Any) -> str:  # noqa: ANN401
    """What a value of type `hint` is, in words."""
    return " or ".join(map(_told_alone, _kinds(hint)))


def _told_alone(kind: Any) -> str:  # noqa: ANN401
    if kind is types.NoneType:
        return "none"
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(map(repr, inner))
    if typing.get_origin(kind) in _LISTS:
        is_any = ... in inner
        example = json.dumps([_EXAMPLES.get(inner[0], "...")] * (2 if is_any else len(inner)))
        count = "any number" if is_any else len(inner)
        return f"a json list like '{example}', of {count}, each {_told(inner[0])}"
    return _TOLD[kind] if kind in _TOLD else str(kind)
