"""The plan of a study: its steps, what each needs, and the settings that determine its result."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlspark.errors import ConfigError, DataError
from dlspark.images import stamps
from dlspark.job import versions
from dlspark.models import check_augment, check_backbone
from dlspark.spark import get_session, local_cores
from dlspark.storage import Document, Folder, Step, Store
from dlspark.study import judge as judging
from dlspark.study.classifiers import load_classifier
from dlspark.study.fits import keep_fit
from dlspark.study.networks import keep_features, keep_predictions, keep_untrained, train_phase, trainer_of
from dlspark.study.pipelines import FitSettings, check_params
from dlspark.study.settings import ClassifierSettings, FeatureSettings, NetworkSettings, StudySettings, at_place
from dlspark.study.steps import explore_data, keep_rows, prepare_data, prepared_dataset

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

Work = Callable[[Folder], Document]
_KERAS = ("keras", "tensorflow")
_KERAS_ON_SPARK = (*_KERAS, "pyspark")


class StudyPlan:
    """Turns settings into steps.

    Args:
        settings: of the study.
        store: where results are kept.
    """

    def __init__(self, settings: StudySettings, store: Store) -> None:
        self._settings = settings
        self._store = store
        self._slots = max([local_cores(), *(network.workers for network in settings.networks.values())])

    def spark(self) -> SparkSession:
        """The session of all steps, with slots for the network with the most workers."""
        return get_session(self._slots)

    def steps(self) -> list[Step]:
        """All steps, each after the steps that it needs; checks what can be checked without running one."""
        settings = self._settings
        for name, network in settings.networks.items():
            with at_place(f"networks.{name}"):
                trainer_of(network)
                check_backbone(network.classifier["backbone"], settings.data.size)
                check_augment(network.classifier["augment"])
        data = {key: value for key, value in vars(settings.data).items() if key != "max_rejected_fraction"}
        if settings.data.bits == 16:
            del data["bits"]  # the default, which steps of earlier versions do not state
        with at_place("data.source"):
            data["files"] = _fingerprint(settings.data.source, self._store)
        if settings.classifiers:
            self.spark()  # the JVM knows the parameters of Spark's classifiers
            for name, made in settings.classifiers.items():
                with at_place(f"classifiers.{name}"):
                    check_params(self._fit(made, settings.features[made.features[0]]))
        # The data steps of all splits come first, so that wrong data is found before hours of training.
        begun = {name: self._data_steps(name, data) for name in settings.splits}
        steps = [step for some in begun.values() for step in some]
        return steps + [step for name, (prepared, _, rows) in begun.items() for step in self._of_split(name, prepared, rows)]

    def _data_steps(self, name: str, data: Mapping[str, Any]) -> tuple[Step, Step, Step]:
        settings, split = self._settings, self._settings.splits[name]
        drawn = {key: value for key, value in vars(split).items() if key not in ("seed", "column", "fold")}
        prepared = Step(
            "prepare",
            name,
            {"data": data, "split": drawn, "seed": settings.seed},
            lambda folder: prepare_data(folder, self.spark(), settings.data, split),
            packages=("numpy", "pillow", "pyarrow"),
            resumes=True,
        )
        explored = {**vars(settings.explore), "seed": settings.seed}
        folds = {"folds": settings.cross_validation.folds, "group": split.group, "stratify": split.stratify}
        folds["seed"] = settings.seed
        all_folds = any(made.grid for made in settings.classifiers.values())
        keep = self._on_dataset(keep_rows, spark=True, **folds, all_folds=all_folds)
        return (
            prepared,
            Step("explore", name, explored, self._on_dataset(explore_data, **explored), [prepared]),
            Step("rows", name, folds, keep, [prepared], ("pyspark", "pyarrow")),
        )

    def _of_split(self, split: str, prepared: Step, rows: Step) -> list[Step]:
        settings = self._settings
        steps: list[Step] = []
        networks: dict[str, Step] = {}
        for name, network in settings.networks.items():
            trained = self._network(split, name, network, prepared)
            networks[name] = trained[-1]
            steps += trained
        features: dict[tuple[str, str], Step] = {}
        for made in settings.features.values():
            for name in made.networks:
                place = (name, made.layer)
                if place not in features:
                    of = {"layer": made.layer, "trained": bool(settings.networks[name].phases)}
                    run = self._on_dataset(keep_features, spark=True, **of)
                    needs = [prepared, networks[name]]
                    features[place] = Step("featurize", f"{split} {name} {made.layer}", of, run, needs, _KERAS_ON_SPARK)
        steps += features.values()
        predictions: dict[str, Step] = {}
        for name, network in settings.networks.items():
            if network.phases:
                # Predictions are kept with the features of the first layer by name; without features they need another pass.
                source = next((features[place] for place in sorted(features) if place[0] == name), networks[name])
                run = self._on_dataset(keep_predictions, spark=True)
                predictions[name] = Step("predict", f"{split} {name}", {}, run, [prepared, source], _KERAS_ON_SPARK)
        steps += predictions.values()
        for name, classifier in settings.classifiers.items():
            for each in classifier.features:
                of_features = settings.features[each]
                fit = self._fit(classifier, of_features)
                needs = [prepared, rows, *(features[network, of_features.layer] for network in of_features.networks)]
                plain = {key: value for key, value in vars(fit).items() if fit.grid or key not in ("folds", "metric")}
                model = f"{name}/{each}"
                packages = load_classifier(fit.algorithm).packages
                predictions[model] = Step("fit", f"{split} {model}", plain, self._fitting(fit), needs, packages)
                steps.append(predictions[model])
        for name, members in settings.ensembles.items():
            needs = [predictions[member] for member in members]
            predictions[name] = Step("ensemble", f"{split} {name}", {}, judging.mean_of_predictions, needs, ("numpy",))
            steps.append(predictions[name])
        judge: dict[str, Any] = {"by": settings.evaluate.by, "bootstrap": settings.evaluate.bootstrap, "seed": settings.seed}
        judge["group"] = settings.splits[split].group
        for name, predicted in predictions.items():
            needs = [prepared, rows, predicted]
            run = partial(judging.judge, **judge)
            steps.append(Step("evaluate", f"{split} {name}", judge, run, needs, ("scikit-learn", "numpy")))
        return steps

    def _network(self, split: str, name: str, network: NetworkSettings, prepared: Step) -> list[Step]:
        seed = self._settings.seed
        import keras

        with at_place(f"networks.{name}"):
            weights = network.classifier["weights"]
            weights = weights if weights in ("imagenet", "none") else _digest(weights)
        common = {key: value for key, value in network.plain().items() if key != "max_restarts"}
        common |= {"weights": weights, "seed": seed, "keras_backend": keras.backend.backend()}
        if not network.phases:
            drawn = {key: common[key] for key in ("backbone", "weights", "dense", "dtype", "seed", "keras_backend")}
            run = self._on_dataset(keep_untrained, network=network, seed=seed)
            return [Step("network", f"{split} {name}", drawn, run, [prepared], _KERAS)]
        # A killed run is resumed under the same versions only: under others this is another step.
        common["versions"] = versions()
        steps: list[Step] = []
        for number, phase in enumerate(network.phases, start=1):
            title = f"{split} {name}" + (f" phase {number}" if len(network.phases) > 1 else "")
            run = self._on_dataset(train_phase, network=network, phase=phase, seed=seed)
            if network.backend != "local":
                run = self._after_spark(run)
            settings = {**common, "phase": phase.plain()}
            steps.append(Step("train", title, settings, run, [prepared, *steps[-1:]], _KERAS_ON_SPARK, resumes=True))
        return steps

    def _fit(self, classifier: ClassifierSettings, features: FeatureSettings) -> FitSettings:
        settings = self._settings
        return FitSettings(
            algorithm=classifier.algorithm,
            vectors=tuple(f"features_{number}" for number in range(len(features.networks))),
            categorical=tuple(settings.metadata.categorical) if features.metadata else (),
            numeric=tuple(settings.metadata.numeric) if features.metadata else (),
            pca=features.pca,
            params=classifier.params,
            grid=classifier.grid,
            folds=settings.cross_validation.folds,
            metric=settings.cross_validation.metric,
            undersample=classifier.undersample,
            seed=settings.seed,
        )

    def _on_dataset(self, run: Callable[..., Document], *, spark: bool = False, **given: Any) -> Work:
        """Work that calls ``run`` with the folder, the prepared dataset, the session if ``spark``, and ``given``.

        The first step that the step needs must be ``prepare``.
        """
        return lambda folder: run(folder, prepared_dataset(folder.results[0]), *([self.spark()] if spark else []), **given)

    def _fitting(self, fit: FitSettings) -> Work:
        return lambda folder: keep_fit(folder, self.spark(), fit)

    def _after_spark(self, run: Work) -> Work:
        """``run`` after the session has been started with enough slots."""

        def work(folder: Folder) -> Document:
            self.spark()
            return run(folder)

        return work


def _fingerprint(source: str, store: Store) -> str:
    """A digest of the names, sizes and modification times of the files in a folder; hidden ones are left out."""
    uri = Store(source).uri
    if f"{store.uri}/".startswith(f"{uri.rstrip('/')}/"):
        raise ConfigError(
            f"Expected the store outside the images' folder; got {store.uri!r} in {uri!r}, where results would count as "
            "changed images. Set another store."
        )
    try:
        found = sorted(stamps(uri))
    except DataError as error:
        raise ConfigError(f"{error} Correct data.source.") from error
    except Exception as error:  # every file system has its own errors: no credentials, no such bucket, no network
        raise ConfigError(f"Expected a folder of images; got an error when listing {uri!r}: {error}") from error
    if not found:
        raise ConfigError(f"Expected a folder of images; got no file in {uri!r}. Correct data.source.")
    digest = hashlib.sha256()
    for name, size, changed in found:
        digest.update(f"{name}\0{size}\0{changed}\n".encode())
    return digest.hexdigest()


def _digest(file: str) -> str:
    """The SHA-256 digest of a file."""
    path = Path(file).expanduser()
    if not path.is_file():
        raise ConfigError(f"Expected 'imagenet', 'none' or a file as weights; got {file!r}, which does not exist.")
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
