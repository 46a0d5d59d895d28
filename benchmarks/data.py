"""How fast data gets to a model: preparing images (P9) and feeding them (P10), and what a worker's memory does.

.venv/bin/python benchmarks/data.py prepare --images 20000 --repeats 3  # / plain Pillow, times cores
.venv/bin/python benchmarks/data.py feed  # images a second on one core, and resident memory
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

IMAGE_SIZE = (224, 224)
BATCH_SIZE = 32


def write_photographs(folder: Path, count: int) -> list[Path]:
    """JPEG files of 600 x 450 pixels as smooth and as noisy as photographs, in two class folders; 1,000 are distinct."""
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
    """What anybody would write who has Pillow alone; images a second."""
    started = time.perf_counter()
    for path in paths:
        with Image.open(path) as image:
            np.asarray(image.convert("RGB").resize(IMAGE_SIZE, Image.Resampling.BILINEAR))
    return len(paths) / (time.perf_counter() - started)


def prepare(images: int, pairs: int) -> dict[str, object]:
    """P9: images a second of prepare_images over those of plain Pillow on the same cores, interleaved.

    Pillow is timed in one process, whose rate is multiplied by the cores, and in as many processes as there are cores.
    They are fresh ones: in a process that has done other work malloc may keep an image's memory instead of returning it,
    and the same loop takes a quarter less.
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
            if pair:  # the first one warms up Python workers and page cache
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


def feed_once(images: int) -> dict[str, object]:
    """Write ``images`` of noise and feed them in this process, on one core, for three epochs; the first maps the files."""
    from dlspark.data.feed import Feed
    from dlspark.data.shards import ShardedRows

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, __file__, "write", name, "--images", str(images)]
        subprocess.run(command, check=True)  # elsewhere, so that this process' peak is the feed's
        rows = ShardedRows.from_json(Path(name, "rows.json").read_text())
        rates = []
        with Feed(rows, batch_size=BATCH_SIZE, seed=0) as feed:
            for epoch in range(3):
                feed.epoch = epoch
                started = time.perf_counter()
                seen = sum(len(y) for _, y in feed)
                rates.append(seen / (time.perf_counter() - started))
    return {
        "images": images,
        "images_per_second": rates,
        "peak_resident_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def write(folder: Path, images: int) -> None:
    """Shards of noise, in pieces, so that memory stays small."""
    from dlspark.data.shard_writer import write_rows
    from dlspark.data.shards import ShardedRows
    from dlspark.store import Store

    draw = np.random.default_rng(0)
    parts = []
    for start in range(0, images, 1000):
        count = min(1000, images - start)
        pixels = draw.integers(0, 256, (count, *IMAGE_SIZE, 3), np.uint8)
        parts.append(write_rows(Store(folder), f"part-{start:06d}", pixels, np.zeros(count, np.int32)))
    rows = ShardedRows(
        uri=str(folder),
        files=tuple(f"{Path(part.uri).name}/{file}" for part in parts for file in part.files),
        rows_per_file=tuple(n for part in parts for n in part.rows_per_file),
        x="x",
        y="y",
    )
    (folder / "rows.json").write_text(rows.to_json())


def feed(repeats: int) -> dict[str, object]:
    """P10, and the peak resident memory with 2,000 and with 20,000 images, each in a process of its own."""
    found: dict[int, list[dict[str, object]]] = {2_000: [], 20_000: []}
    for _ in range(repeats):
        for images, runs in found.items():
            command = [sys.executable, __file__, "feed-once", "--images", str(images)]
            runs.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    return {"figure": "P10", "batch_size": BATCH_SIZE, "runs": found}


def main() -> None:
    """Measure, and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("prepare", "feed", "feed-once", "write"))
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if options.what == "write":
        write(options.folder, options.images)
    elif options.what == "prepare":
        print(json.dumps(prepare(options.images, options.repeats), indent=1))
    elif options.what == "feed":
        print(json.dumps(feed(options.repeats), indent=1))
    else:
        print(json.dumps(feed_once(options.images), indent=1))


if __name__ == "__main__":
    main()
