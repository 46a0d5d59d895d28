"""Scenario: the measured model, images, batch size and subjects, as plain data."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlspark import ConfigError, load_backend

BUILT_IN = Path(__file__).parent / "scenarios"
BARE = ("bare-elephas", "bare-horovod", "bare-mirrored")
"""Subjects that are an engine without dlspark."""

ALONE = {"loop", "local", "feed"}
"""Subjects whose workers are independent processes."""

_SUBJECT = re.compile(r"([a-z][a-z0-9_-]*)(?::(\d+)x(\d+))?(@[a-z0-9]+)?")


@dataclass(frozen=True)
class Subject:
    """What is measured: ``name:WORKERSxTHREADS``. An ``@label`` repeats a subject, to show the noise.

    Attributes:
        name: ``loop``, a hand-written loop with Keras' ``fit``, one independent process per worker; ``bare-elephas``,
            ``bare-horovod`` or ``bare-mirrored``, the engine without dlspark; ``feed``, which reads without a model; or a
            backend of dlspark. ``local`` with several workers runs independently: a worker's loop without the all-reduce.
        workers: number of training processes.
        threads: per worker.
        label: the label, including the ``@``.
    """

    name: str
    workers: int = 1
    threads: int = 1
    label: str = ""

    def __str__(self) -> str:
        return f"{self.name}:{self.workers}x{self.threads}{self.label}"

    @property
    def cores(self) -> int:
        """Total number of threads."""
        return self.workers * self.threads

    @property
    def alone(self) -> bool:
        """Whether its workers are independent."""
        return self.name in ALONE

    @property
    def processes(self) -> int:
        """Processes that the harness starts: one driver, or one for each independent worker."""
        return self.workers if self.alone else 1

    @property
    def told_by_driver(self) -> bool:
        """Whether the driver reports its epochs, without steps (Elephas)."""
        return self.name.endswith("elephas")

    @property
    def trains(self) -> bool:
        """Whether it has a model."""
        return self.name != "feed"

    def check(self) -> None:
        """Reject an unknown name or a backend that is not installed.

        Raises:
            ConfigError: the subject does not exist.
            MissingDependencyError: the backend's distribution or a dependency is not installed.
        """
        if self.name not in {"loop", "feed", *BARE}:
            load_backend(self.name)

    @classmethod
    def parse(cls, text: str) -> Subject:
        """Parse the text of ``str(subject)``; the numbers default to one worker with one thread."""
        match = _SUBJECT.fullmatch(text)
        if match is None or "0" in match.groups()[1:3]:
            raise ConfigError(f"Expected a subject as NAME:WORKERSxTHREADS, such as 'horovod:2x1'; got {text!r}.")
        name, workers, threads, label = match.groups()
        return cls(name, int(workers or 1), int(threads or 1), label or "")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A ratio of two subjects, or a quantity of one, with a goal.

    Attributes:
        id: its short name, such as "P2".
        title: a short description.
        of: the numerator.
        over: the denominator; with None, the figure is the quantity of ``of``.
        quantity: "images_per_second", "step_seconds", "launch_seconds" or "warm_launch_seconds". For launches, the
            figure is the difference in seconds.
        goal: the target value.
        at_least: whether the goal is a lower bound; otherwise it is an upper bound.
    """

    id: str
    title: str
    of: str
    over: str | None = None
    quantity: str = "images_per_second"
    goal: float
    at_least: bool = True


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One measurement. Work grows with a subject's cores, so that all subjects take the same number of steps.

    Attributes:
        name: name of the scenario; results of equal scenarios are comparable.
        model: "small_cnn", or a backbone of `dlspark.build_classifier`, with random weights and ten classes.
        image_size: side length in pixels.
        rows_per_core: images per epoch, for each thread of each worker.
        batch_per_core: images per step, for each thread of each worker.
        dtype: the dtype policy: "float32", "mixed_bfloat16" or "mixed_float16".
        fine_tune: as in `dlspark.build_classifier`.
        jit_compile: as in Keras' ``compile``: "auto", true or false. True means XLA, or torch.compile under torch.
        device: "cpu" hides GPUs; "gpu" requires one.
        epochs: per turn; reported seconds are per epoch.
        repeats: measured turns per subject, after a first epoch that traces the model.
        warm_launches: further launches of one epoch in the same Spark session, for engines that report steps.
        seed: seed of images and weights.
        data: folder or URI of a prepared dataset, whose first training images replace generated ones.
        subjects: the subjects, in the order of the first turn.
        figures: figures to compute from the results.
    """

    name: str
    model: str = "resnet50"
    image_size: int = 96
    rows_per_core: int = 128
    batch_per_core: int = 32
    dtype: str = "float32"
    fine_tune: str = "all"
    jit_compile: str | bool = "auto"
    device: str = "cpu"
    epochs: int = 1
    repeats: int = 5
    warm_launches: int = 0
    seed: int = 0
    data: str | None = None
    subjects: tuple[str, ...] = ("loop:1x1", "local:1x1")
    figures: tuple[Figure, ...] = ()

    def __post_init__(self) -> None:
        for name in ("image_size", "rows_per_core", "batch_per_core", "epochs", "repeats"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ConfigError(f"Expected {name} as a whole number of at least 1; got {getattr(self, name)!r}.")
        for name, known in {"device": ("cpu", "gpu"), "dtype": ("float32", "mixed_bfloat16", "mixed_float16")}.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"Expected {name} as one of {', '.join(known)}; got {getattr(self, name)!r}.")
        names = [str(Subject.parse(text)) for text in self.subjects]
        if len(set(names)) < len(names) or not names:
            raise ConfigError(
                f"Expected at least one subject, each of them once; got {', '.join(names) or 'none'}. Add @labels."
            )
        object.__setattr__(self, "subjects", tuple(names))
        for figure in self.figures:
            for subject in (figure.of, figure.over):
                if subject is not None and subject not in names:
                    raise ConfigError(f"Expected subject {subject!r} for figure {figure.id!r}; got none. Add it.")

    def rows(self, subject: Subject) -> int:
        """Return the images per epoch, over all workers."""
        return self.rows_per_core * subject.cores

    def batch_size(self, subject: Subject) -> int:
        """Return the images per step, over all workers."""
        return self.batch_per_core * subject.cores

    @property
    def all_epochs(self) -> int:
        """Epochs per subject: the first and those of its turns."""
        return 1 + self.epochs * self.repeats

    @property
    def work(self) -> dict[str, Any]:
        """Settings that must be equal in comparable results; batches and dtypes may differ."""
        return {name: getattr(self, name) for name in ("model", "image_size", "fine_tune")}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Scenario:
        """Build a scenario from plain data, such as a parsed file."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = set(values) - known
        if unknown:
            raise ConfigError(
                f"Expected settings among {', '.join(sorted(known))}; got {', '.join(sorted(unknown))}. Remove it."
            )
        figures = tuple(Figure(**figure) for figure in values.get("figures", ()))
        return cls(**{**values, "subjects": tuple(values.get("subjects", cls.subjects)), "figures": figures})


def find(name_or_file: str) -> Scenario:
    """Return a built-in scenario by name, or read one from a TOML file.

    Raises:
        ConfigError: the scenario does not exist or is invalid.
    """
    path = Path(name_or_file)
    if path.suffix != ".toml":
        path = BUILT_IN / f"{name_or_file}.toml"
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"Expected a built-in scenario or a .toml file; got {name_or_file!r}. Known: {', '.join(built_in())}."
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"Expected TOML in {str(path)!r}; got an error: {error}. Fix the file.") from error
    return Scenario.from_dict({"name": path.stem, **values})


def built_in() -> list[str]:
    """Return the names of the built-in scenarios."""
    return sorted(path.stem for path in BUILT_IN.glob("*.toml"))
