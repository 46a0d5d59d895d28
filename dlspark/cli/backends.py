"""``dlspark backends``: the installed backends, their capabilities, and how to install the others."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import typing
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from dlspark._require import DISTRIBUTION, installed_versions
from dlspark.cli.arguments import add_command
from dlspark.cli.output import Block, Report, Table

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

_EXAMPLE = """
dlspark backends
dlspark backends --format json
"""
_OF_SPARK = re.compile(r"""extra == ['"]spark['"]""")
_FRAMEWORKS = ("tensorflow", "jax", "torch")


def add_parser(commands: Any) -> None:
    """Add ``backends``."""
    add_command(
        commands, "backends", summary="list the installed backends, and how to install the others", example=_EXAMPLE, run=run
    )


def run(options: argparse.Namespace) -> Report:
    """List the backends."""
    found = describe_backends()
    rows = [[each["name"], each["status"], _workers(each["capabilities"]), _kept(each["capabilities"])] for each in found]
    versions = [
        [each["name"], ", ".join(f"{package} {version}" for package, version in each["versions"].items())]
        for each in found
        if each["versions"]
    ]
    blocks: list[Block] = [Table(["backend", "status", "workers", "guarantees"], rows)]
    blocks.append(Table(["backend", "packages"], versions))
    settable = [
        [each["name"], name, option["type"], "none" if option["default"] is None else option["default"]]
        for each in found
        for name, option in each["options"].items()
    ]
    if settable:
        blocks.append(Table(["backend", "option", "type", "default"], settable, title="options (--option NAME=VALUE)"))
    for each in found:
        if each["error"]:
            blocks.append(f"{each['name']}: {each['error']}")
        if each["install"]:
            lacking = f" ({', '.join(each['missing'])} missing)" if each["missing"] else ""
            blocks.append(f"{each['name']}{lacking}, run: {each['install']}")
    return Report(found, blocks)


def describe_backends() -> list[dict[str, Any]]:
    """Describe every backend that is installed or known. Imports no engine; a plug-in that cannot be imported says why.

    ``status`` is "ready", "incomplete" (a package that it requires is missing), "broken" or "not installed".
    """
    from dlspark.registry import BACKENDS, PLUGINS, install_command

    found = [_describe(point) for point in BACKENDS.points().values()]
    for name in PLUGINS:
        if name not in BACKENDS:
            found.append({**_blank(name), "status": "not installed", "install": install_command(name)})
    return sorted(found, key=lambda each: str(each["name"]))


def _blank(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "status": "ready",
        "capabilities": {},
        "options": {},
        "versions": {},
        "missing": [],
        "install": None,
        "error": None,
    }


def _describe(point: EntryPoint) -> dict[str, Any]:
    from dlspark.registry import PLUGINS, install_command, load_backend

    document = _blank(point.name)
    document["versions"], document["missing"] = _requirements(point)
    if document["missing"]:
        document["status"] = "incomplete"
        missing = f"pip install {' '.join(document['missing'])}"
        document["install"] = install_command(point.name) if point.name in PLUGINS else missing
    try:
        backend = load_backend(point.name)
        document["capabilities"] = dataclasses.asdict(backend.capabilities)
        document["options"] = _options(backend.options_type)
    except Exception as error:  # a plug-in's module may raise anything, and the others must still be listed
        document.update(status="broken", error=f"{type(error).__name__}: {error}")
    return document


def _requirements(point: EntryPoint) -> tuple[dict[str, str], list[str]]:
    """Versions of the packages that the plug-in's distribution and its extra ``spark`` require, and the missing ones."""
    if point.dist is None:
        return {}, []
    if point.dist.name == DISTRIBUTION:  # local: whichever framework Keras computes with
        there = [name for name in _FRAMEWORKS if find_spec(name) is not None]
        chosen = os.environ.get("KERAS_BACKEND") or (there[0] if there else _FRAMEWORKS[0])
        return _split(["keras", chosen])
    needed = [text for text in point.dist.requires or () if "extra ==" not in text or _OF_SPARK.search(text)]
    named = [re.match(r"[\w.-]+", text) for text in needed]
    return _split([*dict.fromkeys(match[0] for match in named if match and match[0] != DISTRIBUTION)])


def _split(names: list[str]) -> tuple[dict[str, str], list[str]]:
    versions = installed_versions(names)
    if "pyspark" in names and "pyspark" not in versions and find_spec("pyspark"):
        versions["pyspark"] = import_module("pyspark").__version__  # the copy in SPARK_HOME has no metadata
    return versions, [name for name in names if name not in versions]


def _options(options_type: type) -> dict[str, dict[str, Any]]:
    hints = typing.get_type_hints(options_type)
    return {
        field.name: {
            "type": hint.__name__ if isinstance(hint := hints[field.name], type) else str(hint),
            "default": None if field.default is dataclasses.MISSING else field.default,
        }
        for field in dataclasses.fields(options_type)
    }


def _workers(capabilities: dict[str, Any]) -> Any:
    return (capabilities["max_workers"] or "any") if capabilities else None


def _kept(capabilities: dict[str, Any]) -> Any:
    """The optional clauses of the contract that it keeps."""
    return [name.replace("_", " ") for name, value in capabilities.items() if value is True] or None
