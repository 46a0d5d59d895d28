"""The last steps of a study: average predictions, evaluate them, collect all results in one document and page."""

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

from dlspark._require import known
from dlspark.errors import ConfigError, DataError, did_you_mean
from dlspark.evaluation import Evaluation, ScoreTable, evaluate_predictions, figures_of, score_tables, value_texts
from dlspark.ml.tables import read_local
from dlspark.report import png
from dlspark.storage import Document, Folder, Result, Step, Store
from dlspark.study.page import study_figures, study_page
from dlspark.study.settings import EvaluateSettings, StudySettings, banded
from dlspark.study.study_file import StudyFile

PAGE = "study.html"


def check_against_data(settings: StudySettings, prepared: Document, rows: Result) -> None:
    """Reject settings that name columns or classes missing from the data.

    Args:
        settings: of the study.
        prepared: the document of the step ``prepare``.
        rows: the result of the step ``rows``.

    Raises:
        ConfigError: an unknown column or class, a column name that Spark ML cannot handle, or a column with too many values.
        DataError: strings in a column that must hold numbers.
    """
    table = read_local(rows.store, rows.document["table"])
    offered = [name for name in table.column_names if name not in ("id", "label", "part", "fold")]
    metadata, evaluate = settings.metadata, settings.evaluate
    for name in [*metadata.categorical, *metadata.numeric, *(banded(text)[0] for text in evaluate.by)]:
        known("a column of the data", name, offered)
        if "." in name or "`" in name:
            raise ConfigError(f"Expected a column name without dots and backticks; got {name!r}. Rename it in the source.")
    for name in metadata.numeric:
        try:
            table[name].cast(pa.float64())
        except pa.ArrowInvalid as error:
            raise DataError(f"metadata.numeric: expected numbers in column {name!r}; got: {error}.") from error
    test = table.filter(pc.equal(table["part"], "test"))
    for text in evaluate.by:
        name, width = banded(text)
        try:
            value_texts(name, test[name].to_pylist(), width)
        except DataError as error:
            raise ConfigError(f"evaluate.by: {text!r}: {error}") from error
    for name in evaluate.first:
        if name not in prepared["classes"]:
            raise ConfigError(f"evaluate.first: expected a class; got {name!r}. {did_you_mean(name, prepared['classes'])}")


def mean_of_predictions(folder: Folder) -> Document:
    """Keep the mean of the probabilities of several models."""
    ids, first = _probabilities(folder.results[0])
    total = first
    for result in folder.results[1:]:
        others, more = _probabilities(result)
        if not np.array_equal(ids, others):
            raise DataError(f"Expected predictions of the same rows from all models; got others in {result.store.uri!r}.")
        total = total + more
    name = "predictions.parquet"
    table = pa.table({"id": pa.array(ids), "probabilities": pa.array((total / len(folder.results)).tolist())})
    with folder.store.open_writer(name) as path:
        pq.write_table(table, path)
    return {"table": {"files": [name], "rows": [len(ids)]}}


def judge(folder: Folder, *, by: Sequence[str], bootstrap: int, seed: int, group: str | None) -> Document:
    """Evaluate the predictions of a model on the test part; resample whole groups if the data has groups."""
    prepared, rows, predicted = folder.results
    ids, probabilities = _probabilities(predicted)
    table = read_local(rows.store, rows.document["table"]).to_pydict()
    place = {
        name: number for number, (name, part) in enumerate(zip(table["id"], table["part"], strict=True)) if part == "test"
    }
    if set(place) != set(ids):
        raise DataError(
            f"Expected predictions of the {len(place)} test rows; got {len(ids)} predictions, some of other rows."
        )
    order = [place[name] for name in ids]
    columns = {name: [values[number] for number in order] for name, values in table.items()}
    groups = columns.get(group) if group is not None else columns.get("group")
    texts = {}
    for name in by:
        column, width = banded(name)
        texts[name] = value_texts(column, columns[column], width)
    found = evaluate_predictions(
        np.array(columns["label"]),
        probabilities,
        prepared.document["classes"],
        groups=groups,
        by=texts,
        bootstrap=bootstrap,
        seed=seed,
    )
    evaluated: Document = json.loads(found.to_json())
    return evaluated


def report(file: StudyFile, steps: Sequence[Step], results: Mapping[str, Result], kept: Mapping[str, bool]) -> Document:
    """All results of a study, as plain data."""
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
    """Write the self-contained page ``study.html``, and its pictures as ``<split>-<name>.png``."""
    pictures: dict[str, dict[str, bytes]] = {}
    parts: dict[str, list[ScoreTable]] = {}
    for name, split in document["splits"].items():
        figures, parts[name] = study_figures(split), []
        for model, found in split["models"].items():
            evaluation = Evaluation.from_json(json.dumps(found)).reordered(split["first"])
            drawn = figures_of(evaluation)
            chosen = drawn if model == split["best"] else {"confusion": drawn["confusion"]}
            figures.update({f"{what} of {model}": figure for what, figure in chosen.items()})
            if model == split["best"]:
                tables = score_tables(evaluation, first=split["first"])
                parts[name] = [table for key, table in tables.items() if key.startswith("by-")]
        pictures[name] = {what: png(figure) for what, figure in figures.items()}
        for what, picture in pictures[name].items():
            store.write_bytes(f"{name}-{what.replace('/', '-').replace(' ', '-').replace(':', '-')}.png", picture)
    data = next(iter(document["splits"].values()))["explored"]
    folder = Store(data["folder"])
    explored = {_caption(name): folder.read_bytes(name) for name in data["pictures"] if name != "by-part.png"}
    page = study_page(document, pictures, explored=explored, parts=parts)
    store.write_bytes(PAGE, page.render().encode())


def _caption(picture: str) -> str:
    """The caption of a picture of the step ``explore``."""
    name = picture.removesuffix(".png")
    return (
        "sample images, a row for each class" if name == "samples" else f"images of each class {name.replace('-', ' ', 1)}"
    )
