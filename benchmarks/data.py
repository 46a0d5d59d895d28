"""How fast data gets to a model: preparing images (P9) and feeding them (P10), and what a worker's memory does.

.venv/bin/python benchmarks/data.py prepare     # / plain Pillow, times cores
.venv/bin/python benchmarks/data.py feed        # images a second on one core, and resident memory
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

IMAGE_SIZE = (224, 224)
BATCH_SIZE = 32


def write_photographs(folder: Path, count: int) -> list[Path]:
    """JPEG files of 600 x 450 pixels as smooth and as noisy as photographs, in two class folders."""
    draw = np.random.default_rng(0)
    paths = []
    for i in range(count):
        path = folder / f"class-{i % 2}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        smooth = Image.fromarray(draw.integers(0, 256, (15, 20, 3), np.uint8)).resize((600, 450), Image.Resampling.BICUBIC)
        noise = draw.normal(0, 6, (450, 600, 1))
        Image.fromarray(np.clip(np.asarray(smooth) + noise, 0, 255).astype(np.uint8)).save(path, quality=90)
        paths.append(path)
    return paths


def prepare(images: int, pairs: int) -> dict[str, object]:
    """P9: images a second of prepare_images over those of one process of plain Pillow times the cores, interleaved."""
    from dlspark import Split, prepare_images
    from dlspark.spark import get_session

    cores = len(os.sched_getaffinity(0))
    get_session(cores)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = write_photographs(folder / "photos", images)
        ours, plain = [], []
        for pair in range(pairs + 1):
            started = time.perf_counter()
            prepare_images(
                folder / "photos", folder / f"out-{pair}", layout="folders", image_size=IMAGE_SIZE, split=Split(test=0.2)
            )
            prepared = images / (time.perf_counter() - started)
            started = time.perf_counter()
            for path in paths[: images // 4]:
                with Image.open(path) as image:
                    np.asarray(image.convert("RGB").resize(IMAGE_SIZE, Image.Resampling.BILINEAR))
            alone = len(paths[: images // 4]) / (time.perf_counter() - started)
            if pair:  # the first one warms up Python workers and page cache
                ours.append(prepared)
                plain.append(alone * cores)
    ratios = [a / b for a, b in zip(ours, plain, strict=True)]
    return {
        "figure": "P9",
        "images": images,
        "cores": cores,
        "images_per_second": ours,
        "pillow_times_cores": plain,
        "ratio": statistics.median(ratios),
        "spread": [min(ratios), max(ratios)],
    }


def feed_once(images: int) -> dict[str, object]:
    """Write ``images`` of noise and feed them twice in this process, on one core: the second pass counts."""
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
    import resource

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
        return
    found = (
        prepare(options.images, options.repeats)
        if options.what == "prepare"
        else feed(options.repeats)
        if options.what == "feed"
        else feed_once(options.images)
    )
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
