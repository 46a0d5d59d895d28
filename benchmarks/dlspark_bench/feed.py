"""Subject ``feed``: read prepared images as a worker does, without a model."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from dlspark import ConfigError, ImageDataset, Split, prepare_images
from dlspark_bench.cores import own_cores
from dlspark_bench.scenario import Scenario, Subject
from dlspark_bench.turns import Clock

_DISTINCT = 500


def prepared(scenario: Scenario, subject: Subject, epochs: int, clock: Clock) -> Callable[[], None]:
    """Prepare images and pin this process to its cores; return a function that reads all images ``epochs`` times."""
    rows, batch_size = scenario.rows(subject), scenario.batch_size(subject)
    folder = tempfile.TemporaryDirectory(prefix="dlspark-feed-")
    uri = scenario.data or str(Path(folder.name, "prepared"))
    if scenario.data is None:
        # In another process, so that this process' peak memory is the feed's.
        writer = multiprocessing.get_context("spawn").Process(
            target=_prepare, args=(folder.name, uri, rows, scenario.image_size, scenario.seed)
        )
        writer.start()
        writer.join()
        if writer.exitcode:
            raise RuntimeError(f"Preparing the images failed with exit code {writer.exitcode}.")
    own_cores(subject.threads)
    train = ImageDataset.open(uri).train
    if train is None or train.rows != rows:
        raise ConfigError(
            f"Expected {rows:,} training images in {uri!r}; got {train.rows if train else 0:,}. Set rows_per_core."
        )

    def read() -> None:
        with folder:
            for epoch in range(epochs):
                clock.epoch_begins(epoch)
                seen = 0
                for _, labels in train.batches(batch_size, seed=scenario.seed, epoch=epoch):
                    seen += len(labels)
                    clock.step_ended()
                if seen != rows:
                    raise RuntimeError(f"Expected {rows:,} images from the feed; got {seen:,}.")
                clock.epoch_ended(epoch, {})
            clock.training_ended()

    return read


def _prepare(folder: str, out: str, rows: int, size: int, seed: int) -> None:
    """Write JPEG files of noise and prepare them."""
    draw = np.random.default_rng(seed)
    photos = Path(folder, "photos", "noise")
    photos.mkdir(parents=True)
    for number in range(rows):
        path = photos / f"{number:06d}.jpg"
        if number < _DISTINCT:
            Image.fromarray(draw.integers(0, 256, (size, size, 3), np.uint8)).save(path)
        else:
            path.hardlink_to(photos / f"{number % _DISTINCT:06d}.jpg")
    prepare_images(photos.parent, out, layout="folders", image_size=(size, size), split=Split(test=0.0))
