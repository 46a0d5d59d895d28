"""An evaluation as tables, for the command line too, and as one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dlspark.report import Page

if TYPE_CHECKING:
    from dlspark.evaluation.evaluation import Estimate, Evaluation

_PICTURES = {
    "confusion": "confusion matrix: rows by true and predicted class",
    "recall": "recall of each class with its 95 % interval",
    "roc": "ROC curves of each class and their micro average",
    "precision-recall": "precision-recall curves of each class and their micro average",
}
_LIMITS = ("95 % low", "95 % high")


@dataclass(frozen=True)
class ScoreTable:
    """A table with a title."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


def score_tables(evaluation: Evaluation, *, first: Sequence[str] = ()) -> dict[str, ScoreTable]:
    """The tables ``scores``, ``classes``, ``confusion`` and ``by-<column>``.

    Args:
        evaluation: to show.
        first: classes whose recall is shown for every value of a column.
    """
    scores = [[name.replace("_", " "), *_numbers(score)] for name, score in evaluation.scores.items()]
    classes = [
        [each.name, each.rows, each.predicted, *_numbers(each.recall)]
        + [score.value for score in (each.precision, each.f1, each.auroc, each.average_precision)]
        for each in evaluation.by_class
    ]
    columns = ["class", "rows", "predicted", "recall", *_LIMITS, "precision", "f1", "auroc", "average precision"]
    confusion = [[name, *counts] for name, counts in zip(evaluation.classes, evaluation.confusion, strict=True)]
    tables = {
        "scores": ScoreTable("scores", ["score", "value", *_LIMITS], scores),
        "classes": ScoreTable("by class", columns, classes),
        "confusion": ScoreTable("confusion", ["true \\ predicted", *evaluation.classes], confusion),
    }
    for column, parts in evaluation.by.items():
        names = [column, "rows", "accuracy", *_LIMITS, "balanced accuracy", "weighted f1", "auroc micro"]
        rows = [[value, part.rows, *_part(part, first)] for value, part in parts.items()]
        tables[f"by-{column}"] = ScoreTable(f"by {column}", [*names, *(f"recall {name}" for name in first)], rows)
    return tables


def intervals_in_words(evaluation: Evaluation, group: str | None) -> str:
    """A description of the intervals."""
    if not evaluation.bootstrap:
        return "none"
    what = f"{evaluation.groups:,} groups ({group})" if group else f"{evaluation.rows:,} rows"
    return f"95 %, by {evaluation.bootstrap:,} resamples of {what}"


def evaluation_page(
    title: str,
    evaluation: Evaluation,
    pictures: Mapping[str, bytes],
    *,
    facts: Mapping[str, Any],
    first: Sequence[str] = (),
) -> Page:
    """The page of an evaluation.

    Args:
        title: of the page.
        evaluation: to show.
        pictures: PNG files of the figures of `figures_of`.
        facts: shown at the top by name, such as model, data and intervals.
        first: see `score_tables`.
    """
    page = Page(title)
    page.table(["", ""], [[name, value] for name, value in facts.items()])
    for name, table in score_tables(evaluation, first=first).items():
        page.heading(table.title.capitalize())
        page.table(table.columns, table.rows)
        for picture in ("recall",) if name == "classes" else (name,):
            if picture in pictures:
                page.picture(pictures[picture], _PICTURES.get(picture, f"accuracy {table.title} with its 95 % interval"))
    if "roc" in pictures:
        page.heading("ROC and precision-recall curves")
        for name in ("roc", "precision-recall"):
            page.picture(pictures[name], _PICTURES[name])
    return page


def _part(part: Evaluation, first: Sequence[str]) -> list[Any]:
    recalls = {each.name: each.recall.value for each in part.by_class}
    others = [part.scores[name].value for name in ("balanced_accuracy", "weighted_f1", "auroc_micro")]
    return [*_numbers(part.scores["accuracy"]), *others, *(recalls[name] for name in first)]


def _numbers(estimate: Estimate) -> list[float | None]:
    return [estimate.value, estimate.low, estimate.high]
