"""The end of a study: predictions judged and averaged, and all results in one document."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dlspark.errors import ConfigError, DataError, did_you_mean
from dlspark.evaluation import Evaluation, ScoreTable, bands, evaluate_predictions, figures_of, score_tables, value_texts
from dlspark.ml.tables import read_local
from dlspark.report import png
from dlspark.storage import Document, Folder, Result, Step, Store
from dlspark.study.page import study_figures, study_page
from dlspark.study.settings import EvaluateSettings, StudySettings, banded
from dlspark.study.study_file import StudyFile

PAGE = "study.html"


def check_against_data(settings: StudySettings, prepared: Document, rows: Result) -> None:
    """Refuse what a study's settings say of columns and classes and the data does not have.

    Args:
        settings: the study's.
        prepared: what the step ``prepare`` returned.
        rows: what the step ``rows`` left.

    Raises:
        ConfigError: no such column or class; a column that Spark ML cannot take, or with too many values to tell apart.
        DataError: texts where numbers are needed.
    """
    table = read_local(rows.store, rows.document["table"])
    known = [name for name in table.column_names if name not in ("id", "label", "part", "fold")]
    metadata, evaluate = settings.metadata, settings.evaluate
    for name in [*metadata.categorical, *metadata.numeric, *(banded(text)[0] for text in evaluate.by)]:
        if name not in known:
            raise ConfigError(f"There is no column {name!r} beside the images. {did_you_mean(name, known)}")
        if "." in name or "`" in name:
            raise ConfigError(
                f"Spark ML cannot take a column named {name!r}: rename it where it comes from, without the dot."
            )
    for name in metadata.numeric:
        try:
            table[name].cast(pa.float64())
        except pa.ArrowInvalid as error:
            raise DataError(f"metadata.numeric: column {name!r} holds what is no number: {error}.") from error
    test = table.filter(pc.equal(table["part"], "test"))
    for text in evaluate.by:
        name, width = banded(text)
        found = test[name].to_pylist()
        try:
            value_texts(name, found if width is None else bands(found, width))
        except DataError as error:
            raise ConfigError(f"evaluate.by: {text!r}: {error}") from error
    for name in evaluate.first:
        if name not in prepared["classes"]:
            raise ConfigError(f"evaluate.first: there is no class {name!r}. {did_you_mean(name, prepared['classes'])}")


def mean_of_predictions(folder: Folder) -> Document:
    """The mean of the probabilities that the models needed give."""
    ids, first = _probabilities(folder.results[0])
    total = first
    for result in folder.results[1:]:
        others, more = _probabilities(result)
        if not np.array_equal(ids, others):
            raise DataError(f"Expected predictions of the same rows from all models: {result.store.uri!r} has others.")
        total = total + more
    name = "predictions.parquet"
    table = pa.table({"id": pa.array(ids), "probabilities": pa.array((total / len(folder.results)).tolist())})
    with folder.store.open_writer(name) as path:
        pq.write_table(table, path)
    return {"table": {"files": [name], "rows": [len(ids)]}}


def judge(folder: Folder, *, by: Sequence[str], bootstrap: int, seed: int, group: str | None) -> Document:
    """Evaluate the predictions of a model on the test part; by whole groups where the data has some."""
    prepared, rows, predicted = folder.results
    ids, probabilities = _probabilities(predicted)
    table = read_local(rows.store, rows.document["table"]).to_pydict()
    place = {
        name: number for number, (name, part) in enumerate(zip(table["id"], table["part"], strict=True)) if part == "test"
    }
    if set(place) != set(ids):
        raise DataError(
            f"Expected predictions of the {len(place)} test rows: there are {len(ids)}, not all of the same rows."
        )
    order = [place[name] for name in ids]
    columns = {name: [values[number] for number in order] for name, values in table.items()}
    groups = columns.get(group) if group is not None else columns.get("group")
    told = {}
    for name in by:
        column, width = banded(name)
        told[name] = columns[column] if width is None else bands(columns[column], width)
    found = evaluate_predictions(
        np.array(columns["label"]),
        probabilities,
        prepared.document["classes"],
        groups=groups,
        by=told,
        bootstrap=bootstrap,
        seed=seed,
    )
    evaluated: Document = json.loads(found.to_json())
    return evaluated


def report(file: StudyFile, steps: Sequence[Step], results: Mapping[str, Result], kept: Mapping[str, bool]) -> Document:
    """Everything that a study has found, as plain data."""
    settings = file.settings
    splits = {name: _of_split(name, settings.evaluate, steps, results) for name in settings.splits}
    return {
        "name": settings.name,
        "file": file.path,
        "settings": file.plain,
        "splits": splits,
        "warnings": [f"{name}: {warning}" for name, split in splits.items() for warning in split["warnings"]],
        "steps": [
            {
                "kind": step.kind,
                "name": step.name,
                "seconds": results[step.key].seconds,
                "kept": kept[step.key],
                "folder": results[step.key].store.uri,
            }
            for step in steps
        ],
        "seconds": sum({step.key: results[step.key].seconds for step in steps}.values()),
        "versions": {"python": platform.python_version()}
        | {name: of for step in steps for name, of in results[step.key].versions.items()},
    }


def _of_split(
    split: str, evaluate: EvaluateSettings, steps: Sequence[Step], results: Mapping[str, Result]
) -> dict[str, Any]:
    def found(kind: str) -> dict[str, Result]:
        prefix = f"{split} "
        mine = [step for step in steps if step.kind == kind and (step.name == split or step.name.startswith(prefix))]
        return {step.name.removeprefix(prefix): results[step.key] for step in mine}

    prepared, explored = found("prepare")[split].document, found("explore")[split]
    fits = {name: result.document for name, result in found("fit").items()}
    models = {name: result.document for name, result in found("evaluate").items()}
    scored = {name: score for name, of in models.items() if (score := of["scores"][evaluate.best_by]["value"]) is not None}
    return {
        "data": prepared,
        "explored": {**explored.document, "folder": explored.store.uri},
        "warnings": explored.document["warnings"],
        "networks": {
            name: {**result.document, "folder": result.store.uri, "seconds": result.seconds}
            for name, result in found("train").items()
        },
        "fits": {
            name: {key: of[key] for key in ("params", "tried", "explained", "inputs")}
            | {"seconds": found("fit")[name].seconds}
            for name, of in fits.items()
        },
        "models": models,
        "first": evaluate.first,
        "best": max(scored, key=lambda name: scored[name]) if scored else None,
    }


def _probabilities(result: Result) -> tuple[list[str], NDArray[np.float64]]:
    """Ids in order, and an array of shape (rows, classes)."""
    table = read_local(result.store, result.document["table"])
    table = table.sort_by("id")
    return table["id"].to_pylist(), np.array(table["probabilities"].to_pylist(), np.float64)


def write_page(document: Mapping[str, Any], store: Store) -> None:
    """Draw the page ``study.html``, which needs no other file, and its pictures, ``<split>-<what>.png``, beside it."""
    figures: dict[str, dict[str, Any]] = {}
    parts: dict[str, list[ScoreTable]] = {}
    for name, split in document["splits"].items():
        figures[name], parts[name] = study_figures(split), []
        for model, found in split["models"].items():
            evaluation = Evaluation.from_json(json.dumps(found)).reordered(split["first"])
            drawn = figures_of(evaluation)
            chosen = drawn if model == split["best"] else {"confusion": drawn["confusion"]}
            figures[name].update({f"{what} of {model}": figure for what, figure in chosen.items()})
            if model == split["best"]:
                tables = score_tables(evaluation, first=split["first"])
                parts[name] = [table for told, table in tables.items() if told.startswith("by-")]
        for what, figure in figures[name].items():
            store.write_bytes(f"{name}-{what.replace('/', '-').replace(' ', '-').replace(':', '-')}.png", png(figure))
    data = next(iter(document["splits"].values()))["explored"]
    folder = Store(data["folder"])
    explored = {_shown(name): folder.read_bytes(name) for name in data["pictures"] if name != "by-part.png"}
    page = study_page(document, figures, explored=explored, parts=parts)
    store.write_bytes(PAGE, page.render().encode())


def _shown(picture: str) -> str:
    """What `explore`'s picture of this name shows."""
    name = picture.removesuffix(".png")
    return (
        "sample images, a row for each class" if name == "samples" else f"images of each class {name.replace('-', ' ', 1)}"
    )
