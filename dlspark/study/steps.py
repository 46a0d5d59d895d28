"""The first steps of a study: prepare the images, explore them, keep the other columns with folds."""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING

from dlspark.data import Split, assign, leak_warning
from dlspark.errors import DataError
from dlspark.images import ImageDataset, KnownLayout, Layout, explore, find_layout, prepare_images
from dlspark.ml.tables import dataset_rows, write_table
from dlspark.report import picture_file, png, write_page
from dlspark.storage import Document, Folder, Result
from dlspark.study.settings import DataSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyspark.sql import DataFrame, SparkSession

_DATA = "data"


def prepared_dataset(prepared: Result) -> ImageDataset:
    """The dataset of the step ``prepare``."""
    return ImageDataset.open(prepared.store.child(_DATA).uri)  # found by the step: a store can be moved


def prepare_data(folder: Folder, spark: SparkSession, data: DataSettings, split: Split) -> Document:
    """Prepare the images with one split."""
    # A name without options stays a name, so that datasets of older studies are recognised.
    layout: str | Layout = find_layout(data.layout, data.layout_options) if data.layout_options else data.layout
    if data.known:
        layout = KnownLayout(layout=layout, columns=tuple(data.known))
    dataset = prepare_images(
        data.source,
        folder.store.child(_DATA).uri,
        layout=layout,
        image_size=data.size,
        resize=data.resize,
        bits=data.bits,
        split=split,
        max_rejected_fraction=data.max_rejected_fraction,
        spark=spark,
    )
    return {**dataset.summary(), "leak": leak_warning(dataset.manifest["split"])}


def explore_data(
    folder: Folder, dataset: ImageDataset, *, columns: Sequence[str] | None, samples: int, seed: int
) -> Document:
    """Count values by class, and keep charts of the counts and sample images."""
    found = explore(dataset, columns=columns, samples=samples, seed=seed)
    pictures = {name: png(figure) for name, figure in found.figures().items()}
    write_page(folder.store, "explore.html", found.page(pictures), pictures)
    return {**found.to_dict(), "pictures": [picture_file(name) for name in pictures]}


def keep_rows(
    folder: Folder,
    dataset: ImageDataset,
    spark: SparkSession,
    *,
    folds: int,
    group: str | None,
    seed: int,
    stratify: bool,
    all_folds: bool,
) -> Document:
    """Keep all columns except the images, with the fold of each training row; see `with_folds`.

    Raises:
        DataError: a fold is empty, and ``all_folds`` says that all folds are needed.
    """
    rows = dataset_rows(spark, dataset).persist()
    try:
        train = with_folds(rows.filter("part = 'train'"), folds, stratify=stratify, group=group, seed=seed)
        filled = train.select("fold").distinct().count()
        if filled < folds and all_folds:
            raise DataError(
                f"Expected training rows in each of {folds} folds; got rows in {filled} folds"
                f"{f', because rows of one {group} stay together' if group else ''}. Set cross_validation.folds lower."
            )
        # One partition is enough for strings and numbers.
        table = rows.join(train.select("id", "fold"), "id", "left").coalesce(1).sortWithinPartitions("id")
        return {"table": write_table(folder.store, table)}
    finally:
        rows.unpersist()


def with_folds(rows: DataFrame, folds: int, *, stratify: bool, group: str | None, seed: int) -> DataFrame:
    """Add the column ``fold``, from 0 to ``folds`` - 1; see `dlspark.data.split.assign`.

    Args:
        rows: training rows: ids, labels and the column named by ``group``.
        folds: number of folds.
        stratify: keep the ratio of the classes in each fold.
        group: a column; rows with the same value get the same fold. None for no such column.
        seed: for the assignment.
    """
    from pyspark.sql import functions as F

    splits = Split.kfold(folds, stratify=stratify, group=group, seed=seed)
    assigned = [
        assign(rows, split).filter("part = 'test'").select("id", F.lit(i).alias("fold")) for i, split in enumerate(splits)
    ]
    return rows.join(reduce(lambda some, more: some.unionByName(more), assigned), "id")
