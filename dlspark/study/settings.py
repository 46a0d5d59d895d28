"""The settings of a study, typed. `study_schema.json` has their defaults and limits; `StudyFile` reads and checks them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dlspark.data import Split
from dlspark.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Images, and how they are prepared; the arguments of `prepare_images`.

    Attributes:
        source: folder or URI of the images.
        layout: name of a layout.
        layout_options: options of the layout csv.
        image_size: pixels: a side, or height and width.
        resize: "fit" or "crop".
        known: columns; rows without a value in one of them are left out.
        max_rejected_fraction: the largest fraction of images that may be unreadable.
    """

    source: str
    layout: str
    layout_options: Mapping[str, Any]
    image_size: int | Sequence[int]
    resize: str
    known: Sequence[str]
    max_rejected_fraction: float

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size
        return height, width


@dataclass(frozen=True, kw_only=True)
class ExploreSettings:
    """Columns to count, None for all that can be counted, and how many sample images to show of each class."""

    columns: Sequence[str] | None
    samples: int


@dataclass(frozen=True, kw_only=True)
class PhaseSettings:
    """One training of a network; each phase starts with the weights of the one before."""

    epochs: int
    fine_tune: str
    learning_rate: float
    schedule: str
    depth_decay: float


@dataclass(frozen=True, kw_only=True)
class NetworkSettings:
    """A network: the options of `build_classifier`, of `Trainer` and of its ``fit``.

    Attributes:
        weights: "imagenet", "none" or a file.
        dtype: name of the dtype policy.
        batch_size: *global* rows of a step.
        class_weight: "none" or "balanced".
        phases: empty for a network that is not trained and only gives features.
    """

    backbone: str
    weights: str
    batch_norm: str
    dense: Sequence[int]
    dropout: float
    augment: Sequence[str]
    dtype: str
    batch_size: int
    class_weight: str
    backend: str
    workers: int
    options: Mapping[str, Any]
    max_restarts: int
    phases: Sequence[PhaseSettings]


@dataclass(frozen=True, kw_only=True)
class MetadataSettings:
    """Columns that are joined to the features: texts, and numbers."""

    categorical: Sequence[str]
    numeric: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class FeatureSettings:
    """A set of features.

    Attributes:
        networks: their outputs are concatenated.
        layer: "pooling", "dense_N" or the name of the backbone.
        metadata: add the columns of `MetadataSettings`.
        pca: number of principal components; None for all numbers of the layer.
    """

    networks: Sequence[str]
    layer: str
    metadata: bool
    pca: int | None


@dataclass(frozen=True, kw_only=True)
class CrossValidation:
    """Number of folds, and the metric by which a grid is decided: "f1" (weighted) or "accuracy"."""

    folds: int
    metric: str


@dataclass(frozen=True, kw_only=True)
class ClassifierSettings:
    """A classifier, fitted on each of the named sets of features; see `FitSettings`."""

    algorithm: str
    features: Sequence[str]
    params: Mapping[str, Any]
    grid: Mapping[str, Sequence[Any]]
    undersample: bool


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """How models are evaluated on the test part.

    Attributes:
        by: columns, numeric ones with the width of their bands (see `banded`).
        bootstrap: number of resamples.
        first: classes to show first.
        best_by: name of the score that decides which model is the best.
    """

    by: Sequence[str]
    bootstrap: int
    first: Sequence[str]
    best_by: str


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """All settings of a study; mappings are from the names that the file gives."""

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
        """From plain data that keeps to the schema, defaults included.

        Raises:
            ConfigError: a split that is not possible.
        """
        splits = {}
        for name, each in plain["splits"].items():
            with told_at(f"splits.{name}"):
                splits[name] = Split(**each, seed=plain["seed"])
        networks = {}
        for name, each in plain["networks"].items():
            phases = tuple(PhaseSettings(**phase) for phase in each["phases"])
            networks[name] = NetworkSettings(**{**each, "phases": phases})
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


def banded(text: str) -> tuple[str, float | None]:
    """``"age:20"`` as a column and the width of its bands; ``"sex"`` as a column and None."""
    name, colon, width = text.partition(":")
    return name, float(width) if colon else None


@contextmanager
def told_at(place: str) -> Iterator[None]:
    """Add the place in the study's file to the message of a ConfigError."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error
