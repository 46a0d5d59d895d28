"""``dlspark evaluate``: evaluate a trained model on a part of a prepared dataset."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dlspark._require import known, require, whole_number
from dlspark.cli.arguments import add_command, banded_columns, words
from dlspark.cli.output import Block, Facts, Report, Table
from dlspark.errors import ConfigError, DataError
from dlspark.mends.tensorflow_start_up import without_noise

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dlspark.data import ShardedRows
    from dlspark.evaluation import Evaluation, Predictions
    from dlspark.images import ImageDataset

PAGE = "evaluation.html"
PREDICTIONS = "predictions.parquet"
_EXAMPLE = """
dlspark evaluate runs/first/model.keras store/photos
dlspark evaluate runs/first/model.keras store/ham --by sex,localization,age:20 --first mel --out pages/first
"""
_PARTS = ("test", "validation", "train")


def add_parser(commands: Any) -> None:
    """Add ``evaluate``."""
    parser = add_command(
        commands, "evaluate", summary="loss, metrics, scores and confusion of a model", example=_EXAMPLE, run=run
    )
    parser.add_argument("model", metavar="MODEL", help="a .keras file, or a folder written by `dlspark train`")
    parser.add_argument("data", metavar="DATA", help="folder or URI of a prepared dataset")
    parser.add_argument("--part", choices=_PARTS, default="test", help="which rows (default: test)")
    parser.add_argument("--batch-size", metavar="N", type=int, default=32, help="rows in a batch (default: 32)")
    parser.add_argument(
        "--by",
        metavar="NAME,NAME:WIDTH",
        action="extend",
        type=banded_columns,
        default=[],
        help="columns for which to show scores by value; numbers in bands of WIDTH, such as age:20",
    )
    parser.add_argument(
        "--first", metavar="CLASS,CLASS", action="extend", type=words, default=[], help="classes to show first"
    )
    parser.add_argument(
        "--bootstrap", metavar="N", type=int, default=1000, help="resamples for the 95 %% intervals (default: 1000; 0: none)"
    )
    parser.add_argument(
        "--group",
        metavar="NAME",
        help="column whose groups are resampled whole, or 'none' (default: the column of the split, or group)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the resamples (default: 0)")
    parser.add_argument("--out", metavar="FOLDER", help=f"folder or URI for {PAGE}, its pictures and {PREDICTIONS}")


def run(options: argparse.Namespace) -> Report:
    """Predict in this process, batch by batch, then evaluate."""
    from dlspark.images import ImageDataset, show_progress

    dataset = ImageDataset.open(options.data)
    rows = getattr(dataset, options.part)
    if rows is None:
        parts = ", ".join(part for part in _PARTS if getattr(dataset, part) is not None)
        raise DataError(f"Expected a part of {dataset.uri!r}; got {options.part!r}. Choose one with --part: {parts}.")
    for name in options.first:
        known("classes after --first", name, dataset.classes)
    group = _group(dataset, options.group)
    columns = _columns(dataset, rows, options, group)
    _check_early(options)

    from dlspark.evaluation import evaluate_predictions, predict_rows, value_texts
    from dlspark.model_files import load_model

    by = {name: value_texts(name, columns[name], width) for name, width in options.by}
    with without_noise():
        model = load_model(options.model)
    done = [0]
    with show_progress("evaluated", rows.rows, lambda: done[-1]):
        found = predict_rows(model, rows, batch_size=options.batch_size, on_batch=lambda seen, _: done.append(seen))
    evaluation = evaluate_predictions(
        found.labels,
        found.probabilities,
        found.classes,
        groups=columns[group] if group else None,
        by=by,
        bootstrap=options.bootstrap,
        seed=options.seed,
    ).reordered(options.first)
    return _report(options, dataset, found, columns["id"], evaluation, group)


def _check_early(options: argparse.Namespace) -> None:
    """Check numbers and packages that are needed only after the predictions, which take long."""
    from dlspark.evaluation import scores
    from dlspark.report import figure

    whole_number("bootstrap", options.bootstrap, least=0)
    whole_number("seed", options.seed, least=0)
    require("sklearn.metrics", install=scores.INSTALL, purpose="Evaluating")
    for module in ("matplotlib", "jinja2") if options.out is not None else ():
        require(module, install=figure.INSTALL, purpose="Writing a report")


def _report(
    options: argparse.Namespace,
    dataset: ImageDataset,
    found: Predictions,
    ids: NDArray[Any],
    evaluation: Evaluation,
    group: str | None,
) -> Report:
    from dlspark.evaluation import intervals_in_words, score_tables

    facts = {
        "model": options.model,
        "data": dataset.uri,
        "rows": f"{evaluation.rows} ({options.part})",
        **found.metrics,
        "intervals": intervals_in_words(evaluation, group),
    }
    document = {
        "model": options.model,
        "data": dataset.uri,
        "part": options.part,
        "seconds": found.seconds,
        "metrics": found.metrics,
        "recall": {each.name: each.recall.value for each in evaluation.by_class},
        "group": group,
        **json.loads(evaluation.to_json()),
    }
    tables = score_tables(evaluation, first=options.first)
    if options.out is not None:
        document["page"] = _written(options, found, ids, evaluation, facts)
        facts["page"] = document["page"]
    blocks: list[Block] = [Facts(facts)]
    blocks += [Table(each.columns, each.rows, title=each.title) for each in tables.values()]
    return Report(document, blocks)


def _written(
    options: argparse.Namespace, found: Predictions, ids: NDArray[Any], evaluation: Evaluation, facts: dict[str, Any]
) -> str:
    """Write predictions, pictures and finally the page; return its URI."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from dlspark.evaluation import evaluation_page, figures_of
    from dlspark.report import png, write_page
    from dlspark.storage import Store

    out, names = Store(options.out), found.classes
    columns = {
        "id": ids,
        "label": [names[label] for label in found.labels],
        "predicted": [names[label] for label in found.probabilities.argmax(axis=1)],
        **{f"probability_{name}": found.probabilities[:, label] for label, name in enumerate(names)},
    }
    with out.open_writer(PREDICTIONS) as path:
        pq.write_table(pa.table(columns), path)
    pictures = {name: png(figure) for name, figure in figures_of(evaluation).items()}
    title = f"Evaluation of {options.model}"
    write_page(out, PAGE, evaluation_page(title, evaluation, pictures, facts=facts, first=options.first), pictures)
    return f"{out.uri}/{PAGE}"


def _group(dataset: ImageDataset, asked: str | None) -> str | None:
    """The column whose groups are resampled whole."""
    if asked == "none":
        return None
    if asked is not None:
        return _known(dataset, [asked], "--group")[0]
    candidates = (dataset.manifest["settings"]["split"]["group"], "group")
    return next((name for name in candidates if name in dataset.manifest["columns"]), None)


def _columns(
    dataset: ImageDataset, rows: ShardedRows, options: argparse.Namespace, group: str | None
) -> dict[str, NDArray[Any]]:
    """The needed columns other than the images."""
    import numpy as np

    by = _known(dataset, [name for name, _ in options.by], "--by")
    for name in by:
        if by.count(name) > 1:
            raise ConfigError(f"Expected different columns after --by; got {name!r} twice. Choose one width for its bands.")
    names = ["id", *by, *([group] if group else [])]
    with rows.open() as reader:
        return reader.take(np.arange(rows.rows), list(dict.fromkeys(names)))


def _known(dataset: ImageDataset, names: Sequence[str], flag: str) -> list[str]:
    offered = [name for name in dataset.manifest["columns"] if name not in {"image", "label"}]
    for name in names:
        known(f"a column of the dataset after {flag}", name, offered)
    return list(names)
