"""prepare_images: a collection of image files becomes a dataset to train on, all of it or nothing.

The split comes first, on the table of paths alone. Then every executor reads, decodes and writes its own shards; the
driver sees counts, names and what was rejected. Rows are in the order of their ids within each part, whatever the
cluster, and the manifest is written last: without it there is no dataset.
"""

from __future__ import annotations

import json
import logging
import operator
import os
import platform
import re
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from dlspark._require import choice, installed_versions, require
from dlspark.data import PARTS, SHARD_BYTES, Split, assign, leak_warning, quoted, split_report, undersampled
from dlspark.errors import ConfigError, DataError
from dlspark.images.dataset import FORMAT, MANIFEST, ImageDataset
from dlspark.images.decode import RESIZES
from dlspark.images.layouts import Layout, describe, find_layout, reads
from dlspark.images.progress import show_progress
from dlspark.images.rejected import MAX_LISTED, REJECTED, Rejected, judge
from dlspark.images.table import counted, normalised
from dlspark.images.write import SOURCE_SIZE, ShardTask, column_kind, write_counted
from dlspark.mends import zip_directories
from dlspark.spark import available_slots, get_session, local_cores, told_plainly
from dlspark.storage import Store

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

logger = logging.getLogger(__name__)

UNFINISHED = "unfinished.json"

_OURS = re.compile(rf"^((train|validation|test)-\d{{5}}-[0-9a-f-]+\.arrow|{re.escape(REJECTED)}|{re.escape(UNFINISHED)})$")
_SHARDS = 64  # as many as that at least, where rows allow: enough for a small cluster, the same on any
_FEWEST_ROWS = 32
_SHARDS_PER_TASK = 16
_VERSIONS_OF = ("dlspark", "numpy", "pillow", "pyarrow", "pyspark")


def prepare_images(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    layout: str | Layout,
    image_size: tuple[int, int],
    resize: str = "fit",
    split: Split | None = None,
    strict: bool = False,
    max_rejected_fraction: float = 0.01,
    spark: SparkSession | None = None,
) -> ImageDataset:
    """Read, decode, scale and split a collection of images into a dataset.

    A finished dataset of the same settings is opened and returned at once; what an interrupted run left is removed first.
    Two runs must not write to one folder at a time. Memory on the driver does not grow with the collection; an
    executor's task holds one shard, at most 64 MiB of pixels.

    Args:
        source: path or URI of the folder that the layout reads. On a cluster, one that all executors reach, as ``out``.
        out: path or URI of the folder to make. It must not exist, be empty, or be the remains of an earlier run.
        layout: how to find images and labels: ``"folders"``, ``"csv"``, ``"ham10000"``, or a function; see
            `dlspark.images.layouts`.
        image_size: (height, width) in pixels that every image is scaled to, bilinearly.
        resize: ``"fit"``: all of an image is kept, its proportions are not. ``"crop"``: its proportions are kept, and of
            the longer side only the middle.
        split: who trains and who tests; ``Split()`` when None.
        strict: whether one image that cannot be read is enough to fail.
        max_rejected_fraction: the most images that may be unreadable, as a fraction of all, otherwise. Those are left
            out and listed with path and reason in ``rejected.parquet``.
        spark: the session; `get_session` on all cores when None.

    Raises:
        ConfigError: a setting that cannot be, ``out`` in use by something else or by a dataset of other settings (the
            message says which).
        DataError: nothing found, a row without label, an id twice, a part without rows that was asked for, or too many
            images that cannot be read. Nothing is left in ``out``.
    """
    split = split or Split()
    height, width = _checked(image_size, max_rejected_fraction)
    choice("resize", resize, RESIZES)
    find_layout(layout)
    store = Store(out)
    settings = {
        "source": Store(source).uri,
        "layout": describe(layout),
        "image_size": [height, width],
        "resize": resize,
        "split": json.loads(json.dumps(asdict(split))),  # as the manifest will have it: lists for tuples
    }
    finished = _finished(store, settings)
    if finished is not None:
        judge(finished.manifest["rejected"], strict, max_rejected_fraction)
        return finished
    require("PIL", install="pillow", purpose="Reading images")
    spark = spark or get_session(local_cores())
    started = time.monotonic()
    store.delete_all()
    store.write_json(UNFINISHED, {"started_by": "dlspark.prepare_images", "settings": settings})
    try:
        with told_plainly():
            manifest = _prepare(spark, store, find_layout(layout), split, settings, strict, max_rejected_fraction)
        store.write_json(MANIFEST, manifest)
    except BaseException:
        store.delete_all()
        raise
    store.delete(UNFINISHED, missing_ok=True)
    dataset = ImageDataset.open(store.uri)
    rejected = dataset.manifest["rejected"]
    logger.info("prepared %s images in %.1f s", f"{rejected['of'] - rejected['rows']:,}", time.monotonic() - started)
    return dataset


def _prepare(
    spark: SparkSession,
    store: Store,
    layout: Layout,
    split: Split,
    settings: dict[str, Any],
    strict: bool,
    max_rejected_fraction: float,
) -> dict[str, Any]:
    found = normalised(layout(settings["source"], spark)).persist()
    rows, cached = found, [found]
    useless = Rejected((), 0, 0)
    try:
        if "problem" in found.columns:
            aside = found.filter("problem IS NOT NULL")
            listed = tuple((row["path"], row["problem"]) for row in aside.limit(MAX_LISTED).collect())
            useless = Rejected(listed, aside.count(), found.count())
            # Judged now too: a collection that does not fit its layout must not be decoded first.
            judge(useless.summary(), strict, max_rejected_fraction)
            rows = found.filter("problem IS NULL").drop("problem")
        total, classes = counted(rows, settings, reads(layout))
        known = {"path", "label", "part"}
        kinds = tuple((name, column_kind(name, kind)) for name, kind in rows.dtypes if name not in known)
        parted = assign(rows, split)
        if split.undersample:
            parted = undersampled(parted, seed=split.seed)
        cached.append(parted.persist())
        drawn = split_report(parted)
        drawn["left_out"] = total - sum(part["rows"] for part in drawn["parts"].values())
        warning = leak_warning(drawn)
        if warning:
            logger.warning("%s", warning)
        sizes = {part: of["rows"] for part, of in drawn["parts"].items()}
        _none_missing(sizes, split)
        height, width = settings["image_size"]
        shards = _shards(sizes, total, height * width * 3)
        count = sum(shards.values())
        task = ShardTask(
            uri=store.uri,
            run=uuid.uuid4().hex[:8],
            image_size=(height, width),
            resize=settings["resize"],
            classes=classes,
            columns=kinds,
            max_listed=max(10, MAX_LISTED // count),
        )
        logger.info("preparing %s images into %d shards", f"{total:,}", count)
        numbered = _numbered(parted, shards, [name for name, _ in kinds])
        # Enough tasks per slot to even out, and none with more than a few shards.
        tasks = min(count, max(4 * available_slots(spark), -(-count // _SHARDS_PER_TASK)))
        done = spark.sparkContext.accumulator(0)  # counts a task's images when it ends; for the eye only
        work = numbered.partitionBy(tasks, int).mapPartitions(partial(write_counted, task, done))
        with show_progress("prepared", sum(sizes.values()), lambda: done.value):
            summaries = work.collect()
    finally:
        for table in cached:
            table.unpersist()
    for summary in summaries:
        if summary["error"]:
            raise DataError(summary["error"])
    rejected = Rejected(
        (*useless.listed, *((path, reason) for summary in summaries for path, reason in summary["rejected"])),
        rows=useless.rows + sum(summary["rejected_rows"] for summary in summaries),
        of=useless.rows + sum(sizes.values()),
    )
    judge(rejected.summary(), strict, max_rejected_fraction)
    rejected.write(store)
    _all_there(store, summaries)
    return {
        "format": FORMAT,
        "classes": list(classes),
        "image_size": settings["image_size"],
        "columns": ["image", "label", *SOURCE_SIZE, *(name for name, _ in kinds)],
        "parts": {part: _part(part, classes, summaries) for part in PARTS},
        "rejected": rejected.summary(),
        "split": drawn,
        "settings": settings,
        "versions": {"python": platform.python_version(), **installed_versions(_VERSIONS_OF)},
    }


def _checked(image_size: Any, max_rejected_fraction: float) -> tuple[int, int]:
    try:
        height, width = (operator.index(side) for side in image_size)
    except (TypeError, ValueError):
        height = width = 0
    if height < 1 or width < 1:
        raise ConfigError(f"Expected image_size as (height, width) in pixels: received {image_size!r}.")
    if not 0 <= max_rejected_fraction <= 1:
        raise ConfigError(f"Expected max_rejected_fraction from 0 to 1: received {max_rejected_fraction!r}.")
    return height, width


def _finished(store: Store, settings: dict[str, Any]) -> ImageDataset | None:
    """The finished dataset of these settings; None where a new one may be written."""
    names = store.list()
    if MANIFEST not in names:
        foreign = [name for name in names if not _OURS.match(name)]
        if foreign and UNFINISHED not in names:
            raise ConfigError(
                f"Expected an empty or new folder for the dataset: {store.uri!r} holds {foreign[0]!r} and "
                f"{len(names) - 1} more. Give another one; nothing there was touched."
            )
        return None
    dataset = ImageDataset.open(store.uri)
    before = dataset.manifest["settings"]
    differing = [key for key in settings if before.get(key) != settings[key]]
    if differing:
        told = "; ".join(f"{key}: {before.get(key)!r} there, {settings[key]!r} asked for" for key in differing)
        raise ConfigError(
            f"The dataset at {store.uri!r} was prepared with other settings. {told}. Give another folder, or delete it."
        )
    return dataset


def _none_missing(sizes: dict[str, int], split: Split) -> None:
    if split.column is not None:
        return
    asked = {"train": 1.0, "validation": split.validation, "test": split.test}
    for part, fraction in asked.items():
        if fraction and not sizes.get(part):
            raise DataError(
                f"Expected rows in the part {part!r}, {fraction} of the whole: {sum(sizes.values())} rows "
                f"{'in so few groups ' if split.group else ''}leave none for it ({sizes}). Ask for a larger fraction "
                "or for none, or turn stratify off."
            )


def _shards(sizes: dict[str, int], total: int, row_bytes: int) -> dict[str, int]:
    """How many shards each part has; by the rows alone, so that any cluster writes the same ones."""
    most = max(1, SHARD_BYTES // row_bytes)
    rows = min(most, max(_FEWEST_ROWS, -(-total // _SHARDS)))
    return {part: -(-sizes[part] // rows) for part in PARTS if sizes.get(part)}


def _numbered(parted: DataFrame, shards: dict[str, int], columns: Sequence[str]) -> Any:
    """An RDD of (shard number, (part, path, label, *columns)), in no order."""
    from pyspark.sql import Window
    from pyspark.sql import functions as F

    whole = Window.partitionBy("part")
    position = F.row_number().over(whole.orderBy("id")) - 1
    number, first = F.lit(0), 0
    for part, count in shards.items():
        # Shard i of c holds the positions from floor(i n / c): they differ by at most one row.
        within = F.floor(((position + 1) * count - 1) / F.count(F.lit(1)).over(whole))
        number = F.when(F.col("part") == part, within + first).otherwise(number)
        first += count
    kept = [quoted(name) for name in columns]
    table = parted.withColumn("__shard", number.cast("int")).select("__shard", "part", "path", "label", *kept)
    # An RDD, because its partitions are shared out exactly: SQL would hash shards onto tasks, and merge small ones.
    return table.rdd.mapPartitions(_keyed)


def _keyed(rows: Iterable[Any]) -> Iterator[tuple[int, tuple[Any, ...]]]:
    zip_directories.read_when_changed()  # the first task in each Python worker: those that write come next
    for row in rows:
        yield row[0], tuple(row[1:])


def _part(part: str, classes: Sequence[str], summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    mine = sorted((summary for summary in summaries if summary["part"] == part), key=lambda summary: summary["shard"])
    by_class = {name: sum(summary["by_class"].get(name, 0) for summary in mine) for name in classes}
    files = [summary["file"] for summary in mine if summary["file"]]
    return {"rows": sum(by_class.values()), "by_class": by_class, "files": files}


def _all_there(store: Store, summaries: Sequence[dict[str, Any]]) -> None:
    """That what executors wrote is what the driver sees; what nobody reported is removed."""
    files = {summary["file"]["file"] for summary in summaries if summary["file"]}
    for left in store.require(files) - files - {UNFINISHED, REJECTED}:
        store.delete(left, missing_ok=True)
    store.delete_unfinished()  # of tasks that Spark killed, and of workers that outlived an earlier driver for a moment
