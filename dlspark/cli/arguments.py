"""Command-line arguments: their types, the options that all commands share, and errors in one line."""

from __future__ import annotations

import argparse
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from dlspark.errors import ConfigError, did_you_mean

_READ = {"integer": int, "number": float, "string": str}
_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class Parser(argparse.ArgumentParser):
    """An argument parser that raises ConfigError instead of printing its usage and exiting."""

    def __init__(self, **settings: Any) -> None:
        # No abbreviations: a script with --wor would break once a second option has this prefix.
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. See: {self.prog} --help")

    def refuse_unknown_options(self, arguments: Sequence[str]) -> None:
        """Report an unknown option before argparse rejects its value."""
        known = [name for name in self._option_string_actions if name.startswith("--")]
        for argument in arguments:
            if argument == "--":
                return
            name = argument.partition("=")[0]
            if argument.startswith("--") and name not in known:
                raise ConfigError(f"{self.prog!r} has no option {name!r}. {did_you_mean(name, known)}")


def add_command(commands: Any, name: str, *, summary: str, example: str, run: Any) -> Parser:
    """Add a command with the options that all have: its line in ``dlspark --help``, an example, and the function to run."""
    sentence = summary[0].upper() + summary[1:] + "."
    epilog = "\n".join(["example:", *(f"  {line}" for line in example.strip().splitlines())])
    parser: Parser = commands.add_parser(name, help=summary, description=sentence, epilog=epilog)
    group = parser.add_argument_group("output")
    group.add_argument("--format", choices=("table", "json"), default="table", help="format of the output (default: table)")
    group.add_argument("--debug", action="store_true", help="log more, and show tracebacks")
    parser.set_defaults(run=run, command=name)
    return parser


def add_options(group: Any, options: type, *, training: bool, defaults: Mapping[str, Any]) -> None:
    """Add a flag for each option of a classifier.

    Args:
        group: of a parser.
        options: `ClassifierOptions`, or a subclass.
        training: add the options of a training, or those of the network.
        defaults: of options that have none.
    """
    for each in fields(options):
        about, schema = each.metadata, each.metadata["schema"]
        if about["training"] is not training:
            continue
        settings: dict[str, Any] = {"metavar": about["metavar"], "help": about["help"]}
        if schema.get("type") == "array":
            read = whole_numbers if schema["items"]["type"] == "integer" else words
            settings |= {"action": "extend", "type": read, "default": []}
        else:
            default = defaults.get(each.name, each.default)
            settings |= {"type": _READ[schema.get("type", "string")], "default": default}
            settings["help"] += f" (default: {f'{default:g}' if isinstance(default, float) else default})"
            if "enum" in schema and about["metavar"] is None:
                settings["choices"] = schema["enum"]
        group.add_argument(f"--{each.name.replace('_', '-')}", **settings)


def image_size(text: str) -> tuple[int, int]:
    """``224`` or ``450x600`` (height x width) as (height, width)."""
    match = re.fullmatch(r"(\d+)(?:[x,](\d+))?", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"expected pixels as 224 or HEIGHTxWIDTH, got {text!r}")
    return int(match[1]), int(match[2] or match[1])


def local_folder(text: str) -> Path:
    """A folder on this machine, in any spelling that a `Store` takes."""
    from dlspark.storage import Store  # here, so that the commands start fast

    try:
        store = Store(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not store.is_local:
        raise argparse.ArgumentTypeError(f"expected a folder on this machine, got {text!r}")
    return Path(store.uri)


def words(text: str) -> list[str]:
    """``flip,rotation:0.1`` as a list."""
    return [word.strip() for word in text.split(",") if word.strip()]


def whole_numbers(text: str) -> list[int]:
    """``512,128`` as a list."""
    try:
        return [int(word) for word in words(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers as 512,128, got {text!r}") from None


def banded_columns(text: str) -> list[tuple[str, float | None]]:
    """``sex,age:20`` as pairs of a column's name and the width of its bands, or None."""
    found: list[tuple[str, float | None]] = []
    for word in words(text):
        name, colon, width = word.partition(":")
        try:
            found.append((name, float(width) if colon else None))
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected columns as sex,age:20, got {word!r}") from None
    return found


def key_value(text: str) -> tuple[str, str]:
    """``name=value`` as a pair."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    return name.strip(), value


def typed(pairs: Sequence[tuple[str, str]], options_type: type, *, flag: str = "--option") -> dict[str, Any]:
    """Convert the values of ``pairs`` to the types of a dataclass' fields.

    The value of an unknown name stays a text: the code that uses the options rejects the name and suggests another.

    Args:
        pairs: names and texts; the last value of a repeated name counts.
        options_type: the dataclass; a field is an int, a float, a bool, a str, or one of them or None.
        flag: the option of the command line, for the message.

    Raises:
        ConfigError: a text that is no value of its field's type.
    """
    hints = typing.get_type_hints(options_type)
    return {name: _value(name, text, hints[name], flag) if name in hints else text for name, text in pairs}


def _value(name: str, text: str, hint: Any, flag: str) -> Any:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    members = typing.get_args(hint) if union else (hint,)
    if type(None) in members and text.lower() in ("none", ""):
        return None
    if bool in members and text.lower() in _BOOLEANS:
        return _BOOLEANS[text.lower()]
    for member in (int, float):
        if member in members:
            try:
                return member(text)
            except ValueError:
                continue
    if str in members or not {int, float, bool} & set(members):
        return text  # the dataclass converts and checks other types
    names = {int: "a whole number", float: "a number", bool: "true or false", type(None): "none"}
    expected = " or ".join(word for member, word in names.items() if member in members)
    raise ConfigError(f"Expected {flag} {name} to be {expected}; got {text!r}.")
