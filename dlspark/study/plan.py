"""The steps of a study: which there are, what each needs, what decides its result, and what it does."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec

from dlspark.data import Split, leak_warning
from dlspark.errors import ConfigError, DataError
from dlspark.images import CsvLayout, ImageDataset, KnownLayout, Layout, explore, prepare_images
from dlspark.job import versions
from dlspark.ml.tables import dataset_rows, write_table
from dlspark.models import check_augment, check_backbone
from dlspark.report import png
from dlspark.spark import get_session, local_cores
from dlspark.storage import Document, Folder, Result, Step, Store
from dlspark.study import judge as judging
from dlspark.study.classifiers import ClassifierSettings, check_params, with_folds
from dlspark.study.fits import keep_fit
from dlspark.study.networks import check_networks, keep_features, keep_predictions, keep_untrained, train_phase, trainer_of
from dlspark.study.settings import told_at

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

_DATA = "data"
_KERAS = ("keras", "tensorflow")
_CHANGED = ("ETag", "etag", "mtime", "LastModified", "last_modified")  # each file system has its own word for it


class StudyPlan:
    """From settings to steps.

    Args:
        settings: of a `StudyFile`.
        store: where results are kept.
    """

    def __init__(self, settings: Mapping[str, Any], store: Store) -> None:
        self._settings = settings
        self._store = store
        self._slots = max([local_cores(), *(network["workers"] for network in settings["networks"].values())])

    def spark(self) -> SparkSession:
        """The session of all steps, with slots for the network that has most workers."""
        return get_session(self._slots)

    def check_networks(self, prepared: Result) -> None:
        """Refuse networks and features that cannot be, once the data is there and before any training."""
        check_networks(self._settings, _dataset(prepared.store))

    def steps(self) -> list[Step]:
        """All of them, each after those that it needs; checks what can be checked without doing any work."""
        settings = self._settings
        size = settings["data"]["image_size"]
        for name, network in settings["networks"].items():
            with told_at(f"networks.{name}"):
                trainer_of(network)
                check_backbone(network["backbone"], (size, size) if isinstance(size, int) else size)
                check_augment(network["augment"])
        for name, drawn in settings["splits"].items():
            with told_at(f"splits.{name}"):
                Split(**drawn, seed=settings["seed"])
        data = {key: value for key, value in settings["data"].items() if key != "max_rejected_fraction"}
        with told_at("data.source"):
            data["files"] = _fingerprint(settings["data"]["source"], self._store)
        if settings["classifiers"]:
            self.spark()  # Spark's classifiers know their parameters when there is a JVM only
            for name, made in settings["classifiers"].items():
                with told_at(f"classifiers.{name}"):
                    check_params(self._classifier(made, settings["features"][made["features"][0]]))
        # What is wrong with the data of any split is found before hours of training on another.
        begun = {name: self._data_steps(name, data) for name in settings["splits"]}
        steps = [step for some in begun.values() for step in some]
        return steps + [step for name, (prepared, _, rows) in begun.items() for step in self._of_split(name, prepared, rows)]

    def _data_steps(self, split: str, data: Mapping[str, Any]) -> tuple[Step, Step, Step]:
        settings = self._settings
        seed, drawn = settings["seed"], settings["splits"][split]
        prepared = Step(
            "prepare",
            split,
            {"data": data, "split": drawn, "seed": seed},
            partial(self._prepare, split=drawn),
            packages=("numpy", "pillow", "pyarrow"),
            resumes=True,
        )
        explored = Step("explore", split, {**settings["explore"], "seed": seed}, self._explore, [prepared])
        folds = {"folds": settings["cross_validation"]["folds"], "group": drawn["group"], "seed": seed}
        folds["stratify"] = drawn["stratify"]
        rows = Step("rows", split, folds, partial(self._rows, **folds), [prepared], ("pyspark", "pyarrow"))
        return prepared, explored, rows

    def _of_split(self, split: str, prepared: Step, rows: Step) -> list[Step]:
        settings = self._settings
        seed, drawn = settings["seed"], settings["splits"][split]
        steps: list[Step] = []
        networks: dict[str, Step] = {}
        for name, network in settings["networks"].items():
            trained = self._network(split, name, network, prepared)
            networks[name] = trained[-1]
            steps += trained
        features: dict[tuple[str, str], Step] = {}
        for made in settings["features"].values():
            for name in made["networks"]:
                place = (name, made["layer"])
                if place not in features:
                    of = {"layer": made["layer"], "trained": bool(settings["networks"][name]["phases"])}
                    told = f"{split} {name} {made['layer']}"
                    needs = [prepared, networks[name]]
                    features[place] = Step("featurize", told, of, partial(self._features, **of), needs, (*_KERAS, "pyspark"))
        steps += features.values()
        predictions: dict[str, Step] = {}
        for name, network in settings["networks"].items():
            if network["phases"]:
                # They come with features, of the same layer in whatever order; without any, of a pass over test images.
                source = next((features[place] for place in sorted(features) if place[0] == name), networks[name])
                needs = [prepared, source]
                predictions[name] = Step("predict", f"{split} {name}", {}, self._predict, needs, (*_KERAS, "pyspark"))
        steps += predictions.values()
        for name, made in settings["classifiers"].items():
            for each in made["features"]:
                chosen = self._classifier(made, settings["features"][each])
                of = settings["features"][each]
                needs = [prepared, rows, *(features[network, of["layer"]] for network in of["networks"])]
                model = f"{name}/{each}"
                run = partial(self._fit, settings=chosen)
                plain = {key: value for key, value in vars(chosen).items() if chosen.grid or key not in ("folds", "metric")}
                predictions[model] = Step("fit", f"{split} {model}", plain, run, needs, ("pyspark",))
                steps.append(predictions[model])
        for name, made in settings["ensembles"].items():
            needs = [predictions[member] for member in made["models"]]
            predictions[name] = Step("ensemble", f"{split} {name}", {}, judging.mean_of_predictions, needs, ("numpy",))
            steps.append(predictions[name])
        judge = {key: value for key, value in settings["evaluate"].items() if key not in ("best_by", "first")}
        judge["seed"] = seed
        judge["group"] = drawn["group"]
        for name, predicted in predictions.items():
            needs = [prepared, rows, predicted]
            run = partial(judging.judge, **judge)
            steps.append(Step("evaluate", f"{split} {name}", judge, run, needs, ("scikit-learn", "numpy")))
        return steps

    def _network(self, split: str, name: str, network: Mapping[str, Any], prepared: Step) -> list[Step]:
        seed = self._settings["seed"]
        import keras

        with told_at(f"networks.{name}"):
            weights = network["weights"] if network["weights"] in ("imagenet", "none") else _digest(network["weights"])
        common = {key: value for key, value in network.items() if key not in ("phases", "max_restarts")}
        common |= {"weights": weights, "seed": seed, "keras_backend": keras.backend.backend()}
        if not network["phases"]:
            drawn = {key: common[key] for key in ("backbone", "weights", "dense", "dtype", "seed", "keras_backend")}
            run: Callable[[Folder], Document] = partial(self._untrained, network=network)
            return [Step("network", f"{split} {name}", drawn, run, [prepared], _KERAS)]
        # A run that was killed is gone on with under the same versions only: under others this is another step.
        common["versions"] = versions()
        steps: list[Step] = []
        for number, phase in enumerate(network["phases"], start=1):
            told = f"{split} {name}" + (f" phase {number}" if len(network["phases"]) > 1 else "")
            run = partial(self._train, network=network, phase=phase)
            needs = [prepared, *steps[-1:]]
            steps.append(Step("train", told, {**common, "phase": phase}, run, needs, (*_KERAS, "pyspark"), resumes=True))
        return steps

    def _classifier(self, made: Mapping[str, Any], of: Mapping[str, Any]) -> ClassifierSettings:
        settings = self._settings
        metadata = settings["metadata"] if of["metadata"] else {"categorical": [], "numeric": []}
        return ClassifierSettings(
            algorithm=made["algorithm"],
            vectors=tuple(f"features_{number}" for number in range(len(of["networks"]))),
            categorical=tuple(metadata["categorical"]),
            numeric=tuple(metadata["numeric"]),
            pca=of["pca"],
            params=made["params"],
            grid=made["grid"],
            folds=settings["cross_validation"]["folds"],
            metric=settings["cross_validation"]["metric"],
            undersample=made["undersample"],
            seed=settings["seed"],
        )

    # What the steps do.

    def _prepare(self, folder: Folder, *, split: Mapping[str, Any]) -> Document:
        data = self._settings["data"]
        layout: str | Layout = data["layout"]
        if data["layout_options"]:
            layout = CsvLayout(**data["layout_options"])
        if data["known"]:
            layout = KnownLayout(layout=layout, columns=tuple(data["known"]))
        size = data["image_size"]
        dataset = prepare_images(
            data["source"],
            folder.store.child(_DATA).uri,
            layout=layout,
            image_size=(size, size) if isinstance(size, int) else (size[0], size[1]),
            resize=data["resize"],
            split=Split(**split, seed=self._settings["seed"]),
            max_rejected_fraction=data["max_rejected_fraction"],
            spark=self.spark(),
        )
        return {**dataset.summary(), "leak": leak_warning(dataset.manifest["split"])}

    def _explore(self, folder: Folder) -> Document:
        settings = self._settings["explore"]
        found = explore(
            _dataset(folder.results[0].store),
            columns=settings["columns"],
            samples=settings["samples"],
            seed=self._settings["seed"],
        )
        figures = found.figures()
        folder.store.write_bytes("explore.html", found.page(figures).render().encode())
        for name, figure in figures.items():
            folder.store.write_bytes(f"{name}.png", png(figure))
        return {**found.to_dict(), "pictures": [f"{name}.png" for name in figures]}

    def _rows(self, folder: Folder, *, folds: int, group: str | None, seed: int, stratify: bool) -> Document:
        rows = dataset_rows(self.spark(), _dataset(folder.results[0].store)).persist()
        try:
            train = with_folds(rows.filter("part = 'train'"), folds, stratify=stratify, group=group, seed=seed)
            there = train.select("fold").distinct().count()
            if there < folds and any(made["grid"] for made in self._settings["classifiers"].values()):
                raise DataError(
                    f"Expected training rows in each of {folds} folds: there are some in {there} of them"
                    f"{f', as rows of one {group} stay together' if group else ''}. Set cross_validation.folds lower."
                )
            # Partitions of equal rows are joined to features later: one is enough for texts and numbers.
            table = rows.join(train.select("id", "fold"), "id", "left").coalesce(1).sortWithinPartitions("id")
            return {"table": write_table(folder.store, table)}
        finally:
            rows.unpersist()

    def _untrained(self, folder: Folder, *, network: Mapping[str, Any]) -> Document:
        return keep_untrained(folder, _dataset(folder.results[0].store), network, self._settings["seed"])

    def _train(self, folder: Folder, *, network: Mapping[str, Any], phase: Mapping[str, Any]) -> Document:
        if network["backend"] != "local":
            self.spark()  # with slots enough
        return train_phase(folder, _dataset(folder.results[0].store), network, phase, self._settings["seed"])

    def _features(self, folder: Folder, *, layer: str, trained: bool) -> Document:
        return keep_features(folder, self.spark(), _dataset(folder.results[0].store), layer, trained=trained)

    def _predict(self, folder: Folder) -> Document:
        return keep_predictions(folder, self.spark(), _dataset(folder.results[0].store))

    def _fit(self, folder: Folder, *, settings: ClassifierSettings) -> Document:
        return keep_fit(folder, self.spark(), settings)


def _dataset(prepared: Store) -> ImageDataset:
    """The dataset in the folder of the step that prepares, which is the first that any other one needs."""
    return ImageDataset.open(prepared.child(_DATA).uri)  # not where it was: a store can be moved


def _fingerprint(source: str, store: Store) -> str:
    """A digest of the names, sizes and times of the files in a folder: another one when any of them has changed.

    Hidden files do not count, as they are no images.
    """
    uri = Store(source).uri
    if f"{store.uri}/".startswith(f"{uri.rstrip('/')}/"):
        raise ConfigError(
            f"Expected the store outside the images' folder: {store.uri!r} lies in {uri!r}, and what the study keeps there "
            "would be taken for changed images. Set another store."
        )
    try:
        filesystem, root = fsspec.core.url_to_fs(uri)
        found = filesystem.find(root, detail=True)
    except Exception as error:  # every file system has errors of its own: no credentials, no such bucket, no network
        raise ConfigError(f"Expected a folder of images, and {uri!r} cannot be listed: {error}") from error
    if not found:
        raise ConfigError(f"Expected a folder of images: there is no file in {uri!r}.")
    digest = hashlib.sha256()
    for path, about in sorted(found.items()):
        name = path[len(root) :].lstrip("/")
        if any(part.startswith(".") for part in name.split("/")):
            continue
        changed = next((about[word] for word in _CHANGED if word in about), "")
        digest.update(f"{name}\0{about['size']}\0{changed}\n".encode())
    return digest.hexdigest()


def _digest(file: str) -> str:
    """Of a file's content."""
    path = Path(file).expanduser()
    if not path.is_file():
        raise ConfigError(f"weights must be 'imagenet', 'none' or a file; got {file!r}, and there is no such file.")
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
