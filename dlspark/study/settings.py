"""The typed settings of a study. `study_schema.json` has defaults and limits; `StudyFile` reads and checks a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dlspark.data import Split
from dlspark.errors import ConfigError
from dlspark.models import ClassifierOptions, option_schemas


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Images and how to prepare them: arguments of `prepare_images`.

    Attributes:
        source: folder or URI.
        layout: name of a layout.
        layout_options: options of the layout, by name.
        image_size: pixels: a side, or height and width.
        resize: "fit" or "crop".
        bits: how many bits the values of 16-bit images use.
        known: columns; rows without a value in one of them are left out.
        max_rejected_fraction: the largest fraction of images that may be unreadable.
    """

    source: str
    layout: str
    layout_options: Mapping[str, Any]
    image_size: int | Sequence[int]
    resize: str
    bits: int
    known: Sequence[str]
    max_rejected_fraction: float

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size
        return height, width


@dataclass(frozen=True, kw_only=True)
class ExploreSettings:
    """Columns to count (None: all suitable ones), and the number of sample images of each class."""

    columns: Sequence[str] | None
    samples: int


@dataclass(frozen=True, kw_only=True)
class PhaseSettings:
    """One training of a network. Each phase starts with the weights of the previous one.

    Attributes:
        epochs: passes over the training rows.
        schedule: of the learning rate: "constant" or "cosine".
        classifier: the options of `build_classifier` that belong to a training, by name.
    """

    epochs: int
    schedule: str
    classifier: Mapping[str, Any]

    def plain(self) -> dict[str, Any]:
        """All settings by name, as in the file."""
        return {"epochs": self.epochs, "schedule": self.schedule, **self.classifier}


@dataclass(frozen=True, kw_only=True)
class NetworkSettings:
    """A network: the options of `build_classifier`, of `Trainer` and of its ``fit``.

    Attributes:
        classifier: the options of `build_classifier` that do not belong to a training, by name, as in the file.
        dtype: name of the dtype policy.
        batch_size: *global* rows of a step.
        class_weight: "none" or "balanced".
        phases: empty for a network that is not trained and only used for features.
    """

    classifier: Mapping[str, Any]
    dtype: str
    batch_size: int
    class_weight: str
    backend: str
    workers: int
    options: Mapping[str, Any]
    max_restarts: int
    phases: Sequence[PhaseSettings]

    def plain(self) -> dict[str, Any]:
        """All settings except the phases by name, as in the file."""
        return {
            name: value for name, value in {**vars(self), **self.classifier}.items() if name not in ("classifier", "phases")
        }


@dataclass(frozen=True, kw_only=True)
class MetadataSettings:
    """Columns to join to the features: strings, and numbers."""

    categorical: Sequence[str]
    numeric: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class FeatureSettings:
    """A set of features.

    Attributes:
        networks: names of networks; their outputs are concatenated.
        layer: "pooling", "dense_N" or the name of the backbone.
        metadata: add the columns of `MetadataSettings`.
        pca: number of principal components; None for no PCA.
    """

    networks: Sequence[str]
    layer: str
    metadata: bool
    pca: int | None


@dataclass(frozen=True, kw_only=True)
class CrossValidation:
    """Number of folds, and the metric that decides a grid: "f1" (weighted) or "accuracy"."""

    folds: int
    metric: str


@dataclass(frozen=True, kw_only=True)
class ClassifierSettings:
    """A classifier, fitted on each of the named sets of features; attributes as in `FitSettings`."""

    algorithm: str
    features: Sequence[str]
    params: Mapping[str, Any]
    grid: Mapping[str, Sequence[Any]]
    undersample: bool


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """How models are evaluated on the test part.

    Attributes:
        by: columns, with a width for bands of numbers (see `banded`).
        bootstrap: number of resamples.
        first: classes to show first.
        best_by: the score that decides which model is best.
    """

    by: Sequence[str]
    bootstrap: int
    first: Sequence[str]
    best_by: str


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """All settings of a study. The keys of mappings are the names in the file."""

    name: str
    store: str
    seed: int
    data: DataSettings
    splits: Mapping[str, Split]
    explore: ExploreSettings
    networks: Mapping[str, NetworkSettings]
    metadata: MetadataSettings
    features: Mapping[str, FeatureSettings]
    cross_validation: CrossValidation
    classifiers: Mapping[str, ClassifierSettings]
    ensembles: Mapping[str, Sequence[str]]
    evaluate: EvaluateSettings

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> StudySettings:
        """Make settings from plain data that follows the schema, defaults included.

        Raises:
            ConfigError: an invalid split.
        """
        splits = {}
        for name, each in plain["splits"].items():
            with at_place(f"splits.{name}"):
                splits[name] = Split(**each, seed=plain["seed"])
        networks = {}
        for name, each in plain["networks"].items():
            phases = tuple(PhaseSettings(**_grouped(phase, training=True)) for phase in each["phases"])
            networks[name] = NetworkSettings(**_grouped({**each, "phases": phases}, training=False))
        return cls(
            name=plain["name"],
            store=plain["store"],
            seed=plain["seed"],
            data=DataSettings(**plain["data"]),
            splits=splits,
            explore=ExploreSettings(**plain["explore"]),
            networks=networks,
            metadata=MetadataSettings(**plain["metadata"]),
            features={name: FeatureSettings(**each) for name, each in plain["features"].items()},
            cross_validation=CrossValidation(**plain["cross_validation"]),
            classifiers={name: ClassifierSettings(**each) for name, each in plain["classifiers"].items()},
            ensembles={name: each["models"] for name, each in plain["ensembles"].items()},
            evaluate=EvaluateSettings(**plain["evaluate"]),
        )

    @property
    def models(self) -> list[str]:
        """Names of the models that are not ensembles: trained networks, then classifier/features."""
        trained = [name for name, network in self.networks.items() if network.phases]
        return trained + [f"{name}/{each}" for name, made in self.classifiers.items() for each in made.features]


def _grouped(plain: Mapping[str, Any], *, training: bool) -> dict[str, Any]:
    """Move the options of `build_classifier` into a mapping ``classifier``."""
    names = set(option_schemas(ClassifierOptions, training=training))
    grouped: dict[str, Any] = {name: value for name, value in plain.items() if name not in names}
    return {**grouped, "classifier": {name: value for name, value in plain.items() if name in names}}


def banded(text: str) -> tuple[str, float | None]:
    """``"age:20"`` as a column and the width of its bands; ``"sex"`` as a column and None."""
    name, colon, width = text.partition(":")
    return name, float(width) if colon else None


@contextmanager
def at_place(place: str) -> Iterator[None]:
    """Add the place in the study's file to the message of a ConfigError."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error
