"""The file of a study: read YAML, check it against a schema, fill in defaults."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from dlspark._require import extra, known, require
from dlspark.errors import ConfigError, did_you_mean
from dlspark.images import LAYOUTS, find_layout
from dlspark.models import AUGMENTATIONS, ClassifierOptions, option_schemas
from dlspark.registry import available_backends
from dlspark.study.classifiers import available_classifiers
from dlspark.study.settings import StudySettings

INSTALL = extra("study")
EXAMPLES = ("cnmc", "ham10000")
"""Names of the example studies."""

# YAML 1.1 reads 1e-4 as a string, because it has no dot.
_NUMBER = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")
_TYPES = {"object": "names with values", "array": "a list", "string": "a string", "integer": "a whole number"}
_TYPES |= {"number": "a number", "boolean": "true or false", "null": "null"}

Place = tuple[str | int, ...]


@dataclass(frozen=True)
class StudyFile:
    """A study's file, checked.

    Attributes:
        path: path of the file.
        plain: all settings, defaults included, as plain data that follows `study_schema.json`.
        settings: the same settings, typed.
    """

    path: str
    plain: Mapping[str, Any]
    settings: StudySettings

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> StudyFile:
        """Read and check a file.

        Raises:
            ConfigError: the file does not exist, is not valid YAML or has an invalid setting; the message has the line and
                the place in the file.
            MissingDependencyError: PyYAML or jsonschema is not installed.
        """
        name = os.fspath(path)
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            got = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(
                f"Expected a study's YAML file at {name!r}; got: {got}. Write an example with `dlspark study init`."
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
    network = found["properties"]["networks"]["additionalProperties"]
    for place, training in ((network, False), (network["properties"]["phases"]["items"], True)):
        place["properties"] = {**option_schemas(ClassifierOptions, training=training), **place["properties"]}
    classifier = found["properties"]["classifiers"]["additionalProperties"]
    classifier["properties"]["algorithm"]["enum"] = available_classifiers()
    return found


def example(name: str) -> str:
    """The text of an example study, with comments.

    Raises:
        ConfigError: an unknown name.
    """
    known("the name of an example study", name, EXAMPLES)
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
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # also an impossible date, or a list within itself
        raise ConfigError(f"Expected YAML in {name!r}; got: {' '.join(str(error).split())}.") from error


def _lines(node: Any, place: Place, name: str) -> Iterator[tuple[Place, int]]:
    yield place, node.start_mark.line + 1
    if node.id == "mapping":
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.tag != "tag:yaml.org,2002:str" and key.value != "<<":
                raise ConfigError(f"{name}, line {line}: expected a name; got {key.value}. Put a name in quotes.")
            if key.value in seen and key.value != "<<":  # YAML would silently use the last one
                raise ConfigError(
                    f"{name}, line {line}: expected every name once; got {_dotted((*place, key.value))} in line "
                    f"{seen[key.value]} too. Remove one."
                )
            seen[key.value] = line
            if key.value == "<<":  # merged settings have the line of their anchor
                for merged in value.value if value.id == "sequence" else [value]:
                    yield from ((found, at) for found, at in _lines(merged, place, name) if found != place)
                continue
            yield from _lines(value, (*place, key.value), name)
            yield (*place, key.value), line
    elif node.id == "sequence":
        for number, item in enumerate(node.value):
            yield from _lines(item, (*place, number), name)


def _dotted(place: Place) -> str:
    return ".".join(str(part) for part in place) or "the file"


@dataclass(frozen=True)
class _Checker:
    name: str
    lines: Mapping[Place, int]

    def refusal(self, place: Place, message: str) -> ConfigError:
        known = next((place[:end] for end in range(len(place), -1, -1) if place[:end] in self.lines), ())
        return ConfigError(f"{self.name}, line {self.lines.get(known, 1)}: {_dotted(place)}: {message}")

    def schema(self, settings: Any) -> None:
        if settings is None:
            raise ConfigError(f"Expected settings in {self.name!r}; got an empty file. Write one with `dlspark study init`.")
        jsonschema = require("jsonschema", install=INSTALL, purpose="Checking a study")
        # Missing settings are reported last: usually the name is mistyped.
        found = sorted(
            jsonschema.Draft202012Validator(schema()).iter_errors(settings),
            key=lambda error: (error.validator == "required", list(map(str, error.path))),
        )
        for error in found:
            raise self._explained(error)

    def _explained(self, error: Any) -> ConfigError:
        place: Place = tuple(error.absolute_path)
        got = json.dumps(error.instance, default=str, ensure_ascii=False)
        got = got if len(got) <= 60 else f"{got[:57]}…"
        rule, value = error.validator, error.validator_value
        if rule == "additionalProperties":
            known = error.schema["properties"]
            free = "patternProperties" in error.schema
            unknown = next(key for key in error.instance if key not in known and not (free and str(key).startswith("x-")))
            return self.refusal((*place, unknown), f"unknown setting. {did_you_mean(str(unknown), known)}")
        if rule == "required":
            missing = next(key for key in value if key not in error.instance)
            return self.refusal(place, f"expected {', '.join(value)}; got no {missing!r}.")
        if rule == "enum":
            return self.refusal(place, f"got {got}. {did_you_mean(str(error.instance), map(str, value))}")
        if rule in ("type", "oneOf"):
            given = [value] if isinstance(value, str) else value
            expected = " or ".join(_TYPES[kind if isinstance(kind, str) else kind.get("type", "array")] for kind in given)
            about = error.schema.get("description")
            return self.refusal(place, f"expected {expected}{f' ({about})' if about else ''}; got {got}.")
        if rule == "pattern" and error.parent is None and "propertyNames" not in error.schema_path:
            return self.refusal(place, f"expected a match of {value}; got {got}.")
        if rule == "minItems":
            return self.refusal(place, f"expected {value} or more; got {got}.")
        if rule == "uniqueItems":
            return self.refusal(place, f"expected no duplicates; got {got}.")
        return self.refusal(place, f"{error.message}.")

    def references(self, settings: StudySettings) -> None:
        """Reject unknown names, and whatever else a schema cannot express."""
        data, networks, sets = settings.data, settings.networks, settings.features
        self._known(("data", "layout"), data.layout, LAYOUTS, "layout")
        try:
            find_layout(data.layout, data.layout_options)
        except ConfigError as error:
            raise self.refusal(("data", "layout_options"), str(error)) from error
        for number, column in enumerate(settings.evaluate.by):
            name, colon, width = column.partition(":")
            if colon and not (name and _NUMBER.match(width) and float(width) > 0):
                message = f"expected a column, or a column and a width like age:20; got {column!r}."
                raise self.refusal(("evaluate", "by", number), message)
        backends = available_backends()
        for name, network in networks.items():
            self._known(("networks", name, "backend"), network.backend, backends, "backend")
            for number, augment in enumerate(network.classifier["augment"]):
                place = ("networks", name, "augment", number)
                self._known(place, augment.partition(":")[0], AUGMENTATIONS, "augmentation")
            for number, phase in enumerate(network.phases):
                trained = phase.classifier
                if not math.isfinite(trained["learning_rate"]):
                    rate = ("networks", name, "phases", number, "learning_rate")
                    raise self.refusal(rate, f"expected a finite number; got {trained['learning_rate']}.")
                if trained["depth_decay"] != 1 and trained["fine_tune"] == "head":
                    message = "a frozen backbone has no learning rates. Set 1, or another fine_tune."
                    raise self.refusal(("networks", name, "phases", number, "depth_decay"), message)
        for name, made in sets.items():
            for number, each in enumerate(made.networks):
                self._known(("features", name, "networks", number), each, networks, "network")
                dense = [f"dense_{i}" for i, _ in enumerate(networks[each].classifier["dense"], start=1)]
                if made.layer.startswith("dense_") and made.layer not in dense:
                    layers = ", ".join(["pooling", *dense])
                    message = f"the network {each!r} has no layer {made.layer!r}. Known: {layers}, and its backbone."
                    raise self.refusal(("features", name, "layer"), message)
        for name, classifier in settings.classifiers.items():
            for number, each in enumerate(classifier.features):
                self._known(("classifiers", name, "features", number), each, sets, "set of features")
            for param in classifier.grid:
                if param in classifier.params:
                    raise self.refusal(("classifiers", name, "grid", param), "is among the params too. Remove one.")
        for name, members in settings.ensembles.items():
            if name in settings.models:
                raise self.refusal(("ensembles", name), "a network has this name. Choose another.")
            for number, model in enumerate(members):
                self._known(("ensembles", name, "models", number), model, settings.models, "model")

    def _known(self, place: Place, name: str, known: Any, what: str) -> None:
        if name not in known:
            raise self.refusal(place, f"unknown {what} {name!r}. {did_you_mean(name, known)}")


def _with_defaults(value: Any, of: Mapping[str, Any]) -> Any:
    """``value`` with the defaults of its schema."""
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
