"""``dlspark evaluate``: how a trained model does on a part of a prepared dataset."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dlspark.cli.arguments import add_command
from dlspark.cli.output import Facts, Report, Table, without_start_up_noise
from dlspark.errors import ConfigError, DataError

_EXAMPLE = """
dlspark evaluate runs/first/model.keras store/photos
dlspark evaluate runs/first/model.keras store/photos --part validation --format json
"""
_PARTS = ("test", "validation", "train")


def add_parser(commands: Any) -> None:
    """Add ``evaluate``."""
    parser = add_command(
        commands, "evaluate", summary="loss, metrics, recall and confusion of a model", example=_EXAMPLE, run=run
    )
    parser.add_argument("model", metavar="MODEL", help="a .keras file, or the folder that `dlspark train` wrote it to")
    parser.add_argument("data", metavar="DATA", help="folder or URI of a prepared dataset")
    parser.add_argument("--part", choices=_PARTS, default="test", help="which rows (default: test)")
    parser.add_argument("--batch-size", metavar="N", type=int, default=32, help="rows at a time (default: 32)")


def run(options: argparse.Namespace) -> Report:
    """Evaluate in this process, batch by batch."""
    from dlspark.images.dataset import ImageDataset

    dataset = ImageDataset.open(options.data)
    rows = getattr(dataset, options.part)
    if rows is None:
        there = ", ".join(part for part in _PARTS if getattr(dataset, part) is not None)
        raise DataError(f"The dataset at {dataset.uri!r} has no part {options.part!r}; it has: {there}. Choose by --part.")
    path = _model_file(options.model)

    from dlspark.evaluation import evaluate_classifier, load_classifier

    with without_start_up_noise():
        model = load_classifier(path)
    with _progress(f"evaluating {rows.rows} rows") as on_batch:
        found = evaluate_classifier(model, rows, batch_size=options.batch_size, on_batch=on_batch)
    document = {
        "model": options.model,
        "data": dataset.uri,
        "part": options.part,
        **asdict(found),
        "recall": found.recall,
    }
    facts = {"model": options.model, "rows": f"{found.rows} ({options.part})", **found.metrics}
    recalls = [[name, sum(counts), found.recall[name]] for name, counts in zip(found.classes, found.confusion, strict=True)]
    confusion = [[name, *counts] for name, counts in zip(found.classes, found.confusion, strict=True)]
    return Report(
        document,
        [
            Facts(facts),
            Table(["class", "rows", "recall"], recalls),
            Table(["true \\ predicted", *found.classes], confusion, title="confusion"),
        ],
    )


def _model_file(name: str) -> Path:
    """The model's file on this machine."""
    from dlspark.cli.train import MODEL
    from dlspark.store import Store

    ending = name.rstrip("/").rpartition("/")[2].rpartition(".")[2].lower()
    if ending in ("h5", "hdf5"):
        raise ConfigError(
            f"{name!r} is a legacy HDF5 model, which can run any code when it is loaded; only .keras files are taken. "
            "Load it where you trust it and save it as model.keras."
        )
    if ending != "keras":
        if not Store(name).exists(MODEL):
            raise ConfigError(f"Expected a .keras file, or a folder with a {MODEL}: {name!r} is neither.")
        return Store(name).local_file(MODEL)
    folder, _, file = name.rpartition("/")
    store = Store(folder or ("/" if name.startswith("/") else "."))
    if not store.exists(file):
        raise DataError(f"Expected a model at {name!r}: there is no such file.")
    return store.local_file(file)


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what)
        yield lambda done, total: progress.update(task, completed=done, total=total)
