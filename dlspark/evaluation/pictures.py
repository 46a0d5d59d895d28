"""Pictures of an evaluation, with colours for the colour-blind (Okabe and Ito) and line styles for black-and-white print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dlspark.report import new_figure, shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dlspark.evaluation.evaluation import Estimate, Evaluation
    from dlspark.evaluation.scores import Curve

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C510A")
_STYLES = ("-", "--", "-.", ":")
_MOST_NAMED = 4 * len(_COLOURS)  # more curves cannot be told apart
_MOST_CELLS = 20  # classes of a confusion matrix with readable numbers


def figures_of(evaluation: Evaluation) -> dict[str, Figure]:
    """Figures by name, in the order of a report: confusion, recall, ``by-<column>``; with curves also roc, precision-recall.

    Raises:
        MissingDependencyError: Matplotlib is not installed.
    """
    found = {"confusion": confusion(evaluation), "recall": recall(evaluation)}
    found.update({f"by-{column}": accuracy_by(evaluation, column) for column in evaluation.by})
    if evaluation.roc:
        found["roc"] = roc(evaluation)
        found["precision-recall"] = precision_recall(evaluation)
    return found


def confusion(evaluation: Evaluation) -> Figure:
    """The confusion matrix, with rows and the percentage of the true class in each cell."""
    counts = np.array(evaluation.confusion)
    rows = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, rows, out=np.zeros(counts.shape), where=rows > 0)
    names, classes = [shown(name) for name in evaluation.classes], len(evaluation.classes)
    longest = max(map(len, names))
    figure = new_figure(*(side + 0.08 * longest for side in (_side(classes) + 0.6, _side(classes))))
    axis: Any = figure.subplots()
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    slanted = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if longest > 6 or classes > _MOST_CELLS else {}
    axis.set_xticks(range(classes), names, **slanted)
    axis.set_yticks(range(classes), names)
    axis.set(xlabel="predicted class", ylabel="true class", title="Confusion: rows, and % of the true class")
    axis.set_xticks(np.arange(classes + 1) - 0.5, minor=True)
    axis.set_yticks(np.arange(classes + 1) - 0.5, minor=True)
    axis.grid(which="minor", color="#bbbbbb", linewidth=0.5)
    axis.tick_params(which="minor", length=0)
    if classes <= _MOST_CELLS:
        for (true, said), count in np.ndenumerate(counts):
            text = f"{count:,}\n{shares[true, said]:.0%}" if rows[true, 0] else "–"
            colour = "white" if shares[true, said] > 0.55 else "black"
            weight = "bold" if true == said else "normal"
            axis.text(said, true, text, ha="center", va="center", fontsize=9, color=colour, fontweight=weight)
    return figure


def recall(evaluation: Evaluation) -> Figure:
    """The recall of each class with its interval, and the mean."""
    names = [f"{shown(each.name)} ({each.rows:,})" for each in evaluation.by_class]
    figure, axis = _with_intervals(names, [each.recall for each in evaluation.by_class])
    axis.set(xlabel="recall", title="Recall by class (rows)")
    _mean_line(axis, evaluation.scores["balanced_accuracy"], "mean of the classes (balanced accuracy)")
    return figure


def accuracy_by(evaluation: Evaluation, column: str) -> Figure:
    """The accuracy for each value of a column with its interval."""
    parts = evaluation.by[column]
    names = [f"{shown(value)} ({part.rows:,})" for value, part in parts.items()]
    figure, axis = _with_intervals(names, [part.scores["accuracy"] for part in parts.values()])
    axis.set(xlabel="accuracy", title=f"Accuracy by {shown(column)} (rows)")
    _mean_line(axis, evaluation.scores["accuracy"], "all rows")
    return figure


def roc(evaluation: Evaluation) -> Figure:
    """ROC curves of each class against the rest, and the micro average."""
    areas = {each.name: each.auroc for each in evaluation.by_class}
    figure, axis = _curves(evaluation.roc, areas, evaluation.scores["auroc_micro"], "area", drawstyle="default")
    axis.plot([0, 1], [0, 1], color="#999999", linewidth=0.8, linestyle=":")
    axis.set(xlabel="false positive rate", ylabel="true positive rate (recall)", title="ROC, each class against the rest")
    return figure


def precision_recall(evaluation: Evaluation) -> Figure:
    """Precision-recall curves of each class against the rest, and the micro average."""
    areas = {each.name: each.average_precision for each in evaluation.by_class}
    micro = evaluation.scores["average_precision_micro"]
    figure, axis = _curves(evaluation.precision_recall, areas, micro, "average precision", drawstyle="steps-pre")
    axis.set(xlabel="recall", ylabel="precision", title="Precision and recall, each class against the rest")
    return figure


def _side(classes: int) -> float:
    """The side of a confusion matrix in inches."""
    return 1.4 + (0.72 * classes if classes <= _MOST_CELLS else min(0.2 * classes, 30))


def _curves(
    curves: Sequence[Curve], areas: dict[str, Estimate], micro: Estimate, what: str, *, drawstyle: str
) -> tuple[Figure, Any]:
    *of_classes, average = curves
    named = len(of_classes) <= _MOST_NAMED
    longest = max((len(_legend(curve.name, areas[curve.name])) for curve in of_classes if named), default=30)
    figure = new_figure(6.2 + 0.078 * max(longest, 30), max(5.4, 0.23 * len(of_classes) + 1) if named else 5.4)
    axis: Any = figure.subplots()
    for number, curve in enumerate(of_classes):
        style = {"color": "#bbbbbb", "linewidth": 0.7}
        if named:
            style = {
                "color": _COLOURS[number % len(_COLOURS)],
                "linestyle": _STYLES[(number + number // len(_COLOURS)) % len(_STYLES)],
                "linewidth": 1.5,
                "label": _legend(curve.name, areas[curve.name]),
            }
        axis.plot(curve.x, curve.y, drawstyle=drawstyle, **style)
    axis.plot(average.x, average.y, drawstyle=drawstyle, color="black", linewidth=2.4, label=_legend("micro average", micro))
    axis.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    axis.grid(color="#eeeeee")
    axis.set_axisbelow(True)
    figure.legend(loc="outside right upper", frameon=False, title=f"{what} (95 %)", alignment="left")
    return figure, axis


def _legend(name: str, area: Estimate) -> str:
    value = "–" if area.value is None else f"{area.value:.3f}"
    return f"{shown(name)}  {value}" + ("" if area.low is None else f" ({area.low:.3f} – {area.high:.3f})")


def _with_intervals(names: Sequence[str], estimates: Sequence[Estimate]) -> tuple[Figure, Any]:
    figure = new_figure(7.5, 1.6 + 0.34 * len(names))
    axis: Any = figure.subplots()
    for place, estimate in enumerate(estimates):
        if estimate.value is None:
            axis.text(0.01, place, "undefined", va="center", color="#666666", fontsize=9)
            continue
        if estimate.low is not None:
            axis.plot([estimate.low, estimate.high], [place, place], color=_COLOURS[0], linewidth=2, solid_capstyle="butt")
        axis.plot(estimate.value, place, "o", color=_COLOURS[0], markersize=6)
        axis.annotate(
            f"{estimate.value:.3f}", (1, place), (6, 0), ("axes fraction", "data"), "offset points", va="center", fontsize=9
        )
    axis.set_yticks(range(len(names)), names)
    axis.set(xlim=(-0.02, 1.02), ylim=(len(names) - 0.4, -0.6))
    axis.grid(axis="x", color="#dddddd")
    axis.set_axisbelow(True)
    return figure, axis


def _mean_line(axis: Any, estimate: Estimate, what: str) -> None:
    if estimate.value is not None:
        axis.axvline(estimate.value, color=_COLOURS[1], linestyle="--", linewidth=1.2, zorder=1, label=what)
        axis.figure.legend(loc="outside lower right", frameon=False)
