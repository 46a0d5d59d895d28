"""Compare the speed of prepare_images with plain Pillow on the same cores (P9).

.venv/bin/python benchmarks/prepare.py --images 10000
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

IMAGE_SIZE = (224, 224)


def write_photographs(folder: Path, count: int) -> list[Path]:
    """Write JPEG files of 600 x 450 pixels, as smooth and noisy as photographs, in two class folders; 1,000 are distinct."""
    draw = np.random.default_rng(0)
    paths: list[Path] = []
    for i in range(count):
        path = folder / f"class-{i % 2}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if i < 1000:
            blobs = Image.fromarray(draw.integers(0, 256, (15, 20, 3), np.uint8))
            smooth = np.asarray(blobs.resize((600, 450), Image.Resampling.BICUBIC))
            noise = draw.normal(0, 6, (450, 600, 1))
            Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8)).save(path, quality=90)
        else:
            shutil.copyfile(paths[i % 1000], path)
        paths.append(path)
    return paths


def read_plainly(paths: Sequence[Path]) -> float:
    """Decode and resize with Pillow alone; return images per second."""
    started = time.perf_counter()
    for path in paths:
        with Image.open(path) as image:
            np.asarray(image.convert("RGB").resize(IMAGE_SIZE, Image.Resampling.BILINEAR))
    return len(paths) / (time.perf_counter() - started)


def prepare(images: int, pairs: int) -> dict[str, object]:
    """Return P9: images per second of prepare_images over those of plain Pillow on the same cores, interleaved.

    Pillow is timed in one process, whose rate is multiplied by the number of cores, and in one process per core. These
    processes are new: where other work has run before, malloc may keep an image's memory instead of returning it, and the
    same loop takes a quarter less time.
    """
    from dlspark import Split, prepare_images
    from dlspark.spark import get_session

    cores = len(os.sched_getaffinity(0))
    get_session(cores)
    found: dict[str, list[float]] = {"images_per_second": [], "pillow_times_cores": [], "pillow_on_all_cores": []}
    with (
        tempfile.TemporaryDirectory() as name,
        ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        folder = Path(name)
        paths = write_photographs(folder / "photos", images)
        some = paths[: images // 4]
        for pair in range(pairs + 1):
            started = time.perf_counter()
            prepare_images(
                folder / "photos", folder / f"out-{pair}", layout="folders", image_size=IMAGE_SIZE, split=Split(test=0.2)
            )
            rates = [images / (time.perf_counter() - started)]
            rates.append(pool.submit(read_plainly, some).result() * cores)
            rates.append(sum(pool.map(read_plainly, [some[core::cores] for core in range(cores)])))
            if pair:  # the first pair warms up Python workers and the page cache
                for each, rate in zip(found.values(), rates, strict=True):
                    each.append(rate)
    ours, alone, pooled = found.values()
    ratios = [a / b for a, b in zip(ours, alone, strict=True)]
    return {
        "figure": "P9",
        "images": images,
        "cores": cores,
        **found,
        "ratio": statistics.median(ratios),
        "spread": [min(ratios), max(ratios)],
        "ratio_to_all_cores": statistics.median(a / b for a, b in zip(ours, pooled, strict=True)),
    }


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(json.dumps(prepare(options.images, options.repeats), indent=1))


if __name__ == "__main__":
    main()
