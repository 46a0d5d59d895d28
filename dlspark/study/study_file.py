"""The file of a study: YAML, checked against a schema before anything starts, with defaults filled in."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from dlspark._require import require
from dlspark.errors import ConfigError, did_you_mean
from dlspark.images import LAYOUTS, CsvLayout
from dlspark.models import AUGMENTATIONS, BACKBONES
from dlspark.registry import available_backends
from dlspark.study.classifiers import available_classifiers
from dlspark.study.settings import StudySettings

INSTALL = "dlspark[study]"
EXAMPLES = ("cnmc", "ham10000")
"""Names of the studies that are shipped as examples."""

# YAML 1.1 takes 1e-4 for a text, as it has no dot; everybody means a number.
_NUMBER = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")
_TYPES = {"object": "names with values", "array": "a list", "string": "a text", "integer": "a whole number"}
_TYPES |= {"number": "a number", "boolean": "true or false", "null": "null"}

Place = tuple[str | int, ...]


@dataclass(frozen=True)
class StudyFile:
    """A study as it was written down, checked.

    Attributes:
        path: of the file.
        plain: all settings, defaults included, as plain data that keeps to `study_schema.json`.
        settings: the same, typed.
    """

    path: str
    plain: Mapping[str, Any]
    settings: StudySettings

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> StudyFile:
        """Read and check a file.

        Raises:
            ConfigError: there is no such file, it is no YAML, or something in it cannot be; the message has the line and the
                place in the file.
            MissingDependencyError: PyYAML or jsonschema is not installed.
        """
        name = os.fspath(path)
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"Expected a study's YAML file at {name!r}: {error}. `dlspark study init` writes an example."
            ) from error
        settings, lines = _parse(text, name)
        checker = _Checker(name, lines)
        checker.schema(settings)
        filled = _with_defaults(settings, schema())
        typed = StudySettings.of(filled)
        checker.references(typed)
        return cls(name, filled, typed)


def schema() -> dict[str, Any]:
    """The JSON schema of a study."""
    found: dict[str, Any] = json.loads(files(__package__).joinpath("study_schema.json").read_text(encoding="utf-8"))
    classifier = found["properties"]["classifiers"]["additionalProperties"]
    classifier["properties"]["algorithm"]["enum"] = available_classifiers()
    return found


def example(name: str) -> str:
    """The text of an example study, with comments.

    Raises:
        ConfigError: an unknown name.
    """
    if name not in EXAMPLES:
        raise ConfigError(f"There is no example study {name!r}. {did_you_mean(name, EXAMPLES)}")
    return files(__package__).joinpath("studies", f"{name}.yaml").read_text(encoding="utf-8")


def _parse(text: str, name: str) -> tuple[Any, dict[Place, int]]:
    """The document, and the line of every place in it."""
    yaml = require("yaml", install=INSTALL, purpose="Reading a study")

    class Loader(yaml.SafeLoader):  # type: ignore[name-defined]
        pass

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))
    try:
        root = yaml.compose(text, Loader)
        lines = dict(_lines(root, (), name)) if root is not None else {}
        return yaml.load(text, Loader), lines
    except yaml.YAMLError as error:
        raise ConfigError(f"{name!r} is no YAML: {' '.join(str(error).split())}.") from error


def _lines(node: Any, place: Place, name: str) -> Iterator[tuple[Place, int]]:
    yield place, node.start_mark.line + 1
    if node.id == "mapping":
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.tag != "tag:yaml.org,2002:str" and key.value != "<<":
                raise ConfigError(f"{name}, line {line}: expected a name, {key.value} came. Put it in quotes if it is one.")
            if key.value in seen and key.value != "<<":  # YAML would take the last one and say nothing
                raise ConfigError(
                    f"{name}, line {line}: {_told((*place, key.value))} is there already, in line {seen[key.value]}. "
                    "Give every name once."
                )
            seen[key.value] = line
            if key.value == "<<":  # what is merged is at fault where it is written
                for merged in value.value if value.id == "sequence" else [value]:
                    yield from ((found, at) for found, at in _lines(merged, place, name) if found != place)
                continue
            yield from _lines(value, (*place, key.value), name)
            yield (*place, key.value), line
    elif node.id == "sequence":
        for number, item in enumerate(node.value):
            yield from _lines(item, (*place, number), name)


def _told(place: Place) -> str:
    return ".".join(str(part) for part in place) or "the file"


@dataclass(frozen=True)
class _Checker:
    name: str
    lines: Mapping[Place, int]

    def refusal(self, place: Place, message: str) -> ConfigError:
        known = next((place[:end] for end in range(len(place), -1, -1) if place[:end] in self.lines), ())
        return ConfigError(f"{self.name}, line {self.lines.get(known, 1)}: {_told(place)}: {message}")

    def schema(self, settings: Any) -> None:
        if settings is None:
            raise ConfigError(f"{self.name!r} is empty. `dlspark study init` writes an example.")
        jsonschema = require("jsonschema", install=INSTALL, purpose="Checking a study")
        # What is missing comes last: mostly it is there under a mistyped name.
        found = sorted(
            jsonschema.Draft202012Validator(schema()).iter_errors(settings),
            key=lambda error: (error.validator == "required", list(map(str, error.path))),
        )
        for error in found:
            raise self._explained(error)

    def _explained(self, error: Any) -> ConfigError:
        place: Place = tuple(error.absolute_path)
        came = json.dumps(error.instance, default=str, ensure_ascii=False)
        came = came if len(came) <= 60 else f"{came[:57]}…"
        rule, value = error.validator, error.validator_value
        if rule == "additionalProperties":
            known = error.schema["properties"]
            free = "patternProperties" in error.schema
            unknown = next(key for key in error.instance if key not in known and not (free and str(key).startswith("x-")))
            return self.refusal((*place, unknown), f"there is no such setting. {did_you_mean(str(unknown), known)}")
        if rule == "required":
            missing = next(key for key in value if key not in error.instance)
            return self.refusal(place, f"{missing!r} is missing; expected {', '.join(value)}.")
        if rule == "enum":
            return self.refusal(place, f"{came} came. {did_you_mean(str(error.instance), map(str, value))}")
        if rule in ("type", "oneOf"):
            kinds = (
                [value]
                if isinstance(value, str)
                else value
                if rule == "type"
                else [one.get("type", "array") for one in value]
            )
            expected = " or ".join(_TYPES[kind] for kind in kinds)
            told = error.schema.get("description")
            return self.refusal(place, f"expected {expected}{f' ({told})' if told else ''}; {came} came.")
        if rule == "pattern" and error.parent is None and "propertyNames" not in error.schema_path:
            return self.refusal(place, f"{came} came; expected a text like {value}.")
        if rule == "minItems":
            return self.refusal(place, f"expected {value} or more; {came} came.")
        if rule == "uniqueItems":
            return self.refusal(place, f"something is there twice; {came} came.")
        return self.refusal(place, f"{error.message}.")

    def references(self, settings: StudySettings) -> None:
        """Reject names of nothing, and what a schema cannot express."""
        data, networks, sets = settings.data, settings.networks, settings.features
        self._known(("data", "layout"), data.layout, LAYOUTS, "layout")
        for option in data.layout_options:
            if data.layout != "csv":
                raise self.refusal(("data", "layout_options"), "only the layout csv has options. Leave them out.")
            options = [field.name for field in fields(CsvLayout)]
            self._known(("data", "layout_options", option), option, options, "option of the layout csv")
        for number, column in enumerate(settings.evaluate.by):
            name, colon, width = column.partition(":")
            if colon and not (name and _NUMBER.match(width) and float(width) > 0):
                message = f"expected a column, or numbers in bands as age:20; {column!r} came."
                raise self.refusal(("evaluate", "by", number), message)
        backends = available_backends()
        for name, network in networks.items():
            self._known(("networks", name, "backbone"), network.backbone, BACKBONES, "backbone")
            self._known(("networks", name, "backend"), network.backend, backends, "backend")
            for number, augment in enumerate(network.augment):
                place = ("networks", name, "augment", number)
                self._known(place, augment.partition(":")[0], AUGMENTATIONS, "augmentation")
            for number, phase in enumerate(network.phases):
                if not math.isfinite(phase.learning_rate):
                    rate = ("networks", name, "phases", number, "learning_rate")
                    raise self.refusal(rate, f"expected a number; {phase.learning_rate} came.")
                if phase.depth_decay != 1 and phase.fine_tune == "head":
                    message = "a frozen backbone has no learning rates. Leave it at 1, or give another fine_tune."
                    raise self.refusal(("networks", name, "phases", number, "depth_decay"), message)
        for name, made in sets.items():
            for number, each in enumerate(made.networks):
                self._known(("features", name, "networks", number), each, networks, "network")
                dense = [f"dense_{i}" for i, _ in enumerate(networks[each].dense, start=1)]
                if made.layer.startswith("dense_") and made.layer not in dense:
                    layers = ", ".join(["pooling", *dense])
                    message = f"the network {each!r} has no layer {made.layer!r}. Known: {layers}, and its backbone."
                    raise self.refusal(("features", name, "layer"), message)
        for name, classifier in settings.classifiers.items():
            for number, each in enumerate(classifier.features):
                self._known(("classifiers", name, "features", number), each, sets, "set of features")
            for param in classifier.grid:
                if param in classifier.params:
                    raise self.refusal(("classifiers", name, "grid", param), "it is among the params too. Give it once.")
        for name, members in settings.ensembles.items():
            if name in settings.models:
                raise self.refusal(("ensembles", name), "a network has that name. Choose another one.")
            for number, model in enumerate(members):
                self._known(("ensembles", name, "models", number), model, settings.models, "model")

    def _known(self, place: Place, name: str, known: Any, what: str) -> None:
        if name not in known:
            raise self.refusal(place, f"there is no {what} {name!r}. {did_you_mean(name, known)}")


def _with_defaults(value: Any, of: Mapping[str, Any]) -> Any:
    """``value`` with what its schema says of settings that are not given."""
    if not isinstance(value, dict):
        if isinstance(value, list) and isinstance(of.get("items"), dict):
            return [_with_defaults(item, of["items"]) for item in value]
        return value
    properties = of.get("properties", {})
    others = of.get("additionalProperties")
    filled = {}
    for key in [*properties, *(key for key in value if key not in properties)]:
        inner = properties.get(key, others if isinstance(others, dict) else {})
        if key in value:
            filled[key] = _with_defaults(value[key], inner)
        elif "default" in inner:
            filled[key] = _with_defaults(inner["default"], inner)
    return {key: item for key, item in filled.items() if not str(key).startswith("x-")} if others is False else filled
