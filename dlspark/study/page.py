"""The page of a study: warnings, tables of models, charts, data, times and versions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dlspark.evaluation import ScoreTable
from dlspark.report import Page, new_figure, shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCORES = ("accuracy", "weighted_precision", "weighted_recall", "weighted_f1", "balanced_accuracy", "auroc_micro")
"""The columns of the table of models."""

_STYLES = ("-", "--", "-.", ":")


def model_table(split: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows; one row for each model, the best is marked."""
    rows = []
    for name, found in split["models"].items():
        scores = [found["scores"][score]["value"] for score in SCORES]
        rows.append([name, *scores, "best" if name == split["best"] else ""])
    return ["model", *(name.replace("_", " ") for name in SCORES), ""], rows


def first_table(split: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows: recall and F1 of the classes in ``evaluate.first``, for each model."""
    rows = []
    for name, found in split["models"].items():
        of_class = {of["name"]: of for of in found["by_class"]}
        rows.append([name, *(of_class[each][score]["value"] for each in split["first"] for score in ("recall", "f1"))])
    return ["model", *(f"{score} {name}" for name in split["first"] for score in ("recall", "f1"))], rows


def study_figures(split: Mapping[str, Any]) -> dict[str, Figure]:
    """Charts of groups by class, learning curves and explained variance, as far as the split has them."""
    found = {}
    if split["data"]["split"]["groups"]:
        found["groups by class"] = groups_by_class(split["data"])
    if any(phase["history"] for phase in split["networks"].values()):
        found["learning curves"] = learning_curves(split["networks"])
    explained = {name: fit["explained"] for name, fit in split["fits"].items() if fit["explained"]}
    if explained:
        found["variance explained"] = variance_explained(explained)
    return found


def groups_by_class(data: Mapping[str, Any]) -> Figure:
    """Bars: the number of groups, such as patients or lesions, with images of each class, for each part."""
    classes, parts = data["classes"], data["split"]["parts"]
    figure = new_figure(8, 0.9 + 0.25 * len(classes) * len(parts))
    axis: Any = figure.subplots()
    height = 0.8 / len(parts)
    for number, (name, part) in enumerate(parts.items()):
        places = [row + (number - (len(parts) - 1) / 2) * height for row in range(len(classes))]
        bars = axis.barh(
            places, [part.get("groups_by_class", {}).get(each, 0) for each in classes], height * 0.9, label=name
        )
        axis.bar_label(bars, padding=3)
    axis.set_yticks(range(len(classes)), [shown(name) for name in classes])
    axis.invert_yaxis()
    axis.margins(x=0.1)  # space for the labels of the bars
    axis.set(xlabel="groups", title="Groups by class")
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def learning_curves(networks: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Loss and accuracy by epoch, for training and validation; the phases of a network are concatenated."""
    whole: dict[str, dict[str, list[float]]] = {}
    for name, network in networks.items():
        curves = whole.setdefault(name.partition(" phase ")[0], {})
        for key, values in network["history"].items():
            curves.setdefault(key, []).extend(float("nan") if value is None else value for value in values)
    figure = new_figure(10, 4)
    for axis, metric in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for number, (name, curves) in enumerate(whole.items()):
            for style, key, more in (("-", metric, ""), ("--", f"val_{metric}", ", validation")):
                if key in curves:
                    epochs = range(1, len(curves[key]) + 1)
                    label = f"{shown(name)}{more}"
                    axis.plot(epochs, curves[key], style, color=f"C{number}", marker="o", markersize=3, label=label)
        axis.set(xlabel="epoch", title=metric)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(color="#eeeeee")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure


def variance_explained(explained: Mapping[str, Sequence[float]]) -> Figure:
    """The cumulative fraction of the variance of the standardised features, by number of components."""
    figure = new_figure(8, 4)
    axis: Any = figure.subplots()
    for number, (name, parts) in enumerate(explained.items()):
        together = [sum(parts[: end + 1]) for end in range(len(parts))]
        axis.plot(range(1, len(parts) + 1), together, linestyle=_STYLES[number % 4], marker=".", label=shown(name))
    axis.set(xlabel="principal components", ylabel="variance explained", ylim=(0, 1.01), title="Variance explained")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(color="#eeeeee")
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def study_page(
    document: Mapping[str, Any],
    pictures: Mapping[str, Mapping[str, bytes]],
    *,
    explored: Mapping[str, bytes],
    parts: Mapping[str, Sequence[ScoreTable]],
) -> Page:
    """The page of a study.

    Args:
        document: the content of ``study.json``.
        pictures: for each split, PNG files by caption: the figures of `study_figures`, and others.
        explored: PNG files of the data, by caption.
        parts: for each split, tables of the scores of its best model by the columns of ``evaluate.by``.
    """
    page = Page(f"Study {document['name']}")
    page.text(f"Command: {document['command']}" if document["command"] else f"File: {document['file']}")
    for warning in document["warnings"]:
        page.warning(warning)
    for name, split in document["splits"].items():
        _add_split(page, name, split, pictures[name], parts[name])
    _add_data(page, next(iter(document["splits"].values())), explored)
    page.heading("Times")
    page.table(["step", "name", "seconds", ""], [_step(step) for step in document["steps"]])
    page.text(f"{document['seconds']:,.0f} s in total.")
    page.heading("Versions")
    page.table(["package", "version"], sorted(document["versions"].items()))
    return page


def _add_data(page: Page, split: Mapping[str, Any], explored: Mapping[str, bytes]) -> None:
    """Counts and pictures of the data, which are the same in all splits."""
    page.heading("Data")
    classes = split["data"]["classes"]
    for column, values in split["explored"]["counts"].items():
        if column != "part":
            counted = [[value, *(of[each] for each in classes), sum(of.values())] for value, of in values.items()]
            page.table([column, *classes, "all"], counted)
    for caption, picture in explored.items():
        page.picture(picture, caption)


def _add_split(
    page: Page, name: str, split: Mapping[str, Any], pictures: Mapping[str, bytes], parts: Sequence[ScoreTable]
) -> None:
    page.heading(f"Split {name}: models on the test part")
    page.table(*model_table(split))
    if split["first"]:
        page.table(*first_table(split))
    if len(split["models"]) > 1:
        page.text("The best model is chosen on these rows, so its scores are slightly too high.")
    intervals = [
        [model, *(_interval(found["scores"][score]) for score in ("accuracy", "weighted_f1", "auroc_micro"))]
        for model, found in split["models"].items()
    ]
    page.table(["95 % intervals", "accuracy", "weighted f1", "auroc micro"], intervals)
    classes = split["data"]["classes"]
    for score in ("recall", "f1"):
        page.heading(f"Split {name}: {score} by class")
        scores = [
            [model, *({of["name"]: of[score]["value"] for of in found["by_class"]}[each] for each in classes)]
            for model, found in split["models"].items()
        ]
        page.table(["model", *classes], scores)
    for table in parts:
        page.heading(f"Split {name}: {split['best']} {table.title}")
        page.table(table.columns, table.rows)
    page.heading(f"Split {name}: data")
    _add_counts(page, split["data"]["split"]["parts"], classes)
    groups = split["data"]["split"]["groups"]
    page.text(
        f"{split['data']['rejected']:,} images were rejected. "
        + (f"{groups['torn']:,} of {groups['of']:,} groups are in more than one part." if groups else "There are no groups.")
    )
    if split["fits"]:
        page.heading(f"Split {name}: classifiers")
        page.table(
            ["classifier", "inputs", "parameters", "tried", "seconds"], [_fit(*item) for item in split["fits"].items()]
        )
    page.heading(f"Split {name}: pictures")
    for caption, picture in pictures.items():
        page.text(f"ROC{caption[3:]}:" if caption.startswith("roc ") else f"{caption[0].upper()}{caption[1:]}:")
        page.picture(picture, f"{caption}, split {name}")


def _add_counts(page: Page, parts: Mapping[str, Any], classes: Sequence[str]) -> None:
    """Add a table of images, and groups if there are any, by class and part."""
    grouped = {name: of["groups_by_class"] for name, of in parts.items() if "groups_by_class" in of}
    columns = ["class", *(f"{name} images" for name in parts), *(f"{name} groups" for name in grouped)]
    counts = [of["by_class"] for of in parts.values()] + list(grouped.values())
    page.table(columns, [[each, *(of.get(each, 0) for of in counts)] for each in classes])


def _fit(name: str, fit: Mapping[str, Any]) -> list[Any]:
    parameters = ", ".join(f"{key} {value}" for key, value in fit["params"].items())
    return [name, fit["inputs"], parameters, len(fit["tried"]) or None, fit["seconds"]]


def _step(step: Mapping[str, Any]) -> list[Any]:
    return [step["kind"], step["name"], step["seconds"], "kept" if step["kept"] else ""]


def _interval(score: Mapping[str, Any]) -> str:
    return "" if score["low"] is None else f"{score['low']:.3f} – {score['high']:.3f}"
