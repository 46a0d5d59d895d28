"""prepare_images: turn a collection of image files into a dataset, atomically.

The table of paths is split first. Then executors read and decode images and write shards; the driver receives counts, names
and rejected images. In each part, rows are ordered by id on any cluster. The manifest is written last; without it there is
no dataset.
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
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from dlspark._require import choice, installed_versions, number, require
from dlspark.data import PARTS, Split, assign, leak_warning, split_report, undersampled
from dlspark.errors import ConfigError, DataError
from dlspark.images.dataset import FORMAT, MANIFEST, ImageDataset
from dlspark.images.decode import BITS, RESIZES
from dlspark.images.files import EMPTY, MISNAMED
from dlspark.images.layouts import Layout, describe, find_layout, reads
from dlspark.images.progress import show_progress
from dlspark.images.rejected import MAX_LISTED, REJECTED, Rejected, judge
from dlspark.images.sharding import numbered, shards_of
from dlspark.images.table import (
    cleaning,
    counted,
    given_split,
    normalised,
    reasons_in_words,
    without_passed_over,
)
from dlspark.images.write import SOURCE_SIZE, ShardTask, column_kind, dark_warning, write_counted
from dlspark.spark import available_slots, get_session, local_cores, told_plainly
from dlspark.storage import Store

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

logger = logging.getLogger(__name__)

UNFINISHED = "unfinished.json"

_OURS = re.compile(rf"^((train|validation|test)-\d{{5}}-[0-9a-f-]+\.arrow|{re.escape(REJECTED)}|{re.escape(UNFINISHED)})$")

_SHARDS_PER_TASK = 16
_VERSIONS_OF = ("dlspark", "numpy", "pillow", "simplejpeg", "pyarrow", "pyspark")


def prepare_images(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    layout: str | Layout,
    image_size: tuple[int, int],
    resize: str = "fit",
    bits: int = 16,
    split: Split | None = None,
    strict: bool = False,
    max_rejected_fraction: float = 0.01,
    spark: SparkSession | None = None,
) -> ImageDataset:
    """Read, decode, scale and split a collection of images into a dataset.

    If ``out`` has a finished dataset with the same settings, it is opened and returned. The remains of an interrupted run
    are removed first. Two runs must not write to one folder at the same time. Memory of the driver does not grow with the
    collection; a task holds one shard, at most 64 MiB of pixels.

    Args:
        source: path or URI of the folder that the layout reads. All executors must reach it, and ``out`` too.
        out: path or URI of the folder to create. It must not exist, be empty, or have the remains of an interrupted run.
        layout: how the collection is stored: a name, such as ``"folders"`` or ``"csv"``, or a function; see
            `dlspark.images.layouts`.
        image_size: (height, width) in pixels; every image is scaled to it, bilinearly.
        resize: ``"fit"`` keeps the whole image and distorts it; ``"crop"`` keeps the aspect ratio and the middle of the
            longer side.
        bits: how many bits the values of 16-bit images use, 8 to 16. Many cameras and scanners use 12, which come out dark
            by default; a warning says so.
        split: the split into parts; ``Split()`` when None. The default keeps the parts of a collection that has them.
        strict: fail if a single image cannot be read.
        max_rejected_fraction: otherwise, the largest fraction of images that may be unreadable. They are left out and
            listed with path and reason in ``rejected.parquet``.
        spark: the session; `get_session` on all cores when None.

    Raises:
        ConfigError: a setting is invalid, or ``out`` has other content or a dataset with other settings.
        DataError: there are no images, a row has no label, an id occurs twice, a requested part has no rows, or too many
            images cannot be read. ``out`` is removed.
    """
    split = split or Split()
    height, width = _checked(image_size, max_rejected_fraction)
    choice("resize", resize, RESIZES)
    choice("bits", bits, BITS)
    find_layout(layout)
    store = Store(out)
    settings = {
        "source": Store(source).uri,
        "layout": describe(layout),
        "image_size": [height, width],
        "resize": resize,
        "bits": bits,
        "split": json.loads(json.dumps(asdict(split))),  # as in the manifest: lists for tuples
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
    table = layout(settings["source"], spark).persist()
    cached = [table]
    useless = Rejected((), 0, 0)
    try:
        images, passed_over = without_passed_over(table)
        rows = normalised(images)
        cleaned = cleaning(images)
        if "problem" in rows.columns:
            aside = rows.filter("problem IS NOT NULL")
            listed = tuple((row["path"], row["problem"]) for row in aside.limit(MAX_LISTED).collect())
            useless = Rejected(listed, aside.count(), rows.count())
            # Checked before decoding too: the collection may not fit the layout at all.
            judge(useless.summary(), strict, max_rejected_fraction)
            rows = rows.filter("problem IS NULL").drop("problem")
        total, classes = counted(rows, settings, reads(layout), reasons_in_words(passed_over))
        if passed_over:
            lost = passed_over.keys() & {EMPTY} or [reason for reason in passed_over if reason.startswith(MISNAMED)]
            logger.log(logging.WARNING if lost else logging.INFO, "passed over: %s", reasons_in_words(passed_over))
        if len(classes) == 1:
            logger.warning("All images have the label %r. Is %r a folder above the classes?", classes[0], settings["source"])
        split = given_split(rows, split, settings["source"])
        known = {"path", "label", "part", "given_part"}
        kinds = tuple((name, column_kind(name, kind)) for name, kind in rows.dtypes if name not in known)
        parted = assign(rows, split)
        if split.undersample:
            parted = undersampled(parted, seed=split.seed)
        cached.append(parted.persist())
        drawn = {**split_report(parted), "column": split.column}
        drawn["left_out"] = total - sum(part["rows"] for part in drawn["parts"].values())
        warning = leak_warning(drawn)
        if warning:
            logger.warning("%s", warning)
        sizes = {part: of["rows"] for part, of in drawn["parts"].items()}
        _none_missing(sizes, split)
        height, width = settings["image_size"]
        shards = shards_of(sizes, total, height * width * 3)
        count = sum(shards.values())
        task = ShardTask(
            uri=store.uri,
            run=uuid.uuid4().hex[:8],
            image_size=(height, width),
            resize=settings["resize"],
            classes=classes,
            columns=kinds,
            max_listed=max(10, MAX_LISTED // count),
            bits=settings["bits"],
        )
        logger.info("preparing %s images into %d shards", f"{total:,}", count)
        work = numbered(parted, shards, [name for name, _ in kinds])
        # Enough tasks per slot to balance, with a few shards each.
        tasks = min(count, max(4 * available_slots(spark), -(-count // _SHARDS_PER_TASK)))
        done = spark.sparkContext.accumulator(0)  # updated when a task ends; for the progress display only
        work = work.partitionBy(tasks, int).mapPartitions(partial(write_counted, task, done))
        with show_progress("prepared", sum(sizes.values()), lambda: done.value):
            summaries = work.collect()
    finally:
        for each in cached:
            each.unpersist()
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
    dark = dark_warning(summaries, settings["bits"])
    if dark:
        logger.warning("%s", dark)
    return {
        "format": FORMAT,
        "classes": list(classes),
        "image_size": settings["image_size"],
        "columns": ["image", "label", *SOURCE_SIZE, *(name for name, _ in kinds)],
        "parts": {part: _part(part, classes, summaries) for part in PARTS},
        "rejected": rejected.summary(),
        "passed_over": passed_over,
        **cleaned,
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
        raise ConfigError(f"Expected image_size as (height, width) in pixels; got {image_size!r}.")
    number("max_rejected_fraction", max_rejected_fraction, "as a number from 0 to 1", lambda fraction: 0 <= fraction <= 1)
    return height, width


def _finished(store: Store, settings: dict[str, Any]) -> ImageDataset | None:
    """The finished dataset with these settings; None if a new one may be written."""
    names = store.list()
    if MANIFEST not in names:
        foreign = [name for name in names if not _OURS.match(name)]
        if foreign and UNFINISHED not in names:
            raise ConfigError(
                f"Expected an empty or new folder for the dataset; got {store.uri!r} with {foreign[0]!r} and "
                f"{len(names) - 1} more. Give another one. Nothing there was changed."
            )
        return None
    dataset = ImageDataset.open(store.uri)
    before = {"bits": 16, **dataset.manifest["settings"]}  # the default, which earlier versions do not state
    differing = [key for key in settings if before.get(key) != settings[key]]
    if differing:
        told = "; ".join(f"{key}: {before.get(key)!r} there, {settings[key]!r} requested" for key in differing)
        raise ConfigError(
            f"Expected the settings of the dataset at {store.uri!r}; got others. {told}. Give another folder, or delete it."
        )
    return dataset


def _none_missing(sizes: dict[str, int], split: Split) -> None:
    if split.column is not None:
        return
    asked = {"train": 1.0, "validation": split.validation, "test": split.test}
    for part, fraction in asked.items():
        if fraction and not sizes.get(part):
            raise DataError(
                f"Expected rows in the part {part!r}, of size {fraction}; got none of {sum(sizes.values())} rows"
                f"{' in too few groups' if split.group else ''} ({sizes}). Give a larger size or 0, or turn stratify off."
            )


def _part(part: str, classes: Sequence[str], summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    mine = sorted((summary for summary in summaries if summary["part"] == part), key=lambda summary: summary["shard"])
    by_class = {name: sum(summary["by_class"].get(name, 0) for summary in mine) for name in classes}
    files = [summary["file"] for summary in mine if summary["file"]]
    return {"rows": sum(by_class.values()), "by_class": by_class, "files": files}


def _all_there(store: Store, summaries: Sequence[dict[str, Any]]) -> None:
    """Check that the driver sees the files of the executors, and remove files that no task reported."""
    files = {summary["file"]["file"] for summary in summaries if summary["file"]}
    for left in store.require(files) - files - {UNFINISHED, REJECTED}:
        store.delete(left, missing_ok=True)
    store.delete_unfinished()  # of killed tasks, and of workers that briefly outlived an earlier driver
