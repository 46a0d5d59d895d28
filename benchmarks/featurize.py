"""Compare ImageFeaturizer with Keras' predict on decoded arrays (P7) and with loading the model per batch (P8).

.venv/bin/python benchmarks/featurize.py --backbone resnet50 --images 256
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from prepare import IMAGE_SIZE, write_photographs

BATCH = 64


def plainly(data: bytes) -> Any:
    """Decode an image as ImageFeaturizer does, so that outputs are comparable."""
    image: Any = Image.open(io.BytesIO(data))
    image.draft("RGB", IMAGE_SIZE[::-1])
    return np.asarray(image.convert("RGB").resize(IMAGE_SIZE[::-1], Image.Resampling.BILINEAR))


def one_thread() -> None:
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def start_predicting(model: str, paths: list[Path]) -> None:
    """Initialise the process that predicts; it holds the model and the decoded arrays."""
    one_thread()
    import keras

    global _model, _arrays
    _model = keras.saving.load_model(model)
    _arrays = np.stack([plainly(path.read_bytes()) for path in paths])
    _model.predict(_arrays[:BATCH], verbose=0)


def predict(_: int) -> float:
    started = time.perf_counter()
    _model.predict(_arrays, verbose=0)
    return time.perf_counter() - started


def loading_per_batch(model: str) -> Callable[[Any], Any]:
    """Return a function that loads the model for every batch, the mistake that stopped study B."""

    def features(images: Any) -> Any:
        import keras
        import pandas as pd
        import tensorflow as tf

        if tf.config.threading.get_intra_op_parallelism_threads() != 1:  # once per process
            one_thread()
        found = []
        for start in range(0, len(images), BATCH):
            loaded = keras.saving.load_model(model)
            found += list(loaded.predict(np.stack([plainly(data) for data in images[start : start + BATCH]]), verbose=0))
        return pd.Series(found)

    return features


def conditions(backbone: str) -> dict[str, object]:
    """Return the settings that a figure depends on."""
    from dlspark_bench.hardware import versions

    return {
        "backbone": backbone,
        "image size": IMAGE_SIZE,
        "dtype": "float32",
        "threads": 1,
        "versions": versions(),
    }


def measure(backbone: str, images: int, repeats: int) -> dict[str, object]:
    """Time interleaved turns, each on one thread of one Spark slot or process; the first turns are dropped."""
    from pyspark.ml.functions import vector_to_array
    from pyspark.sql.functions import PandasUDFType, pandas_udf

    from dlspark.ml import ImageFeaturizer
    from dlspark.spark import get_session

    spark = get_session(1)
    found: dict[str, list[float]] = {"featurize": [], "predict": [], "load per batch": []}
    with tempfile.TemporaryDirectory() as name:
        paths = write_photographs(Path(name, "photos"), images)
        rows = spark.createDataFrame([(n, path.read_bytes()) for n, path in enumerate(paths)], "id int, image binary")
        rows.coalesce(1).write.parquet(f"{name}/rows")
        rows = spark.read.parquet(f"{name}/rows")
        stage = ImageFeaturizer(inputCol="image", outputCol="features", backbone=backbone, weights=None)
        stage.save(f"{name}/stage")
        model = f"{name}/stage/network.keras"
        reloading = pandas_udf(loading_per_batch(model), "array<float>", PandasUDFType.SCALAR)
        featurized = stage.transform(rows).select("id", vector_to_array("features", "float32").alias("features"))
        reloaded = rows.select("id", reloading("image").alias("features"))

        def seconds(table: Any) -> float:
            started = time.perf_counter()
            table.write.format("noop").mode("overwrite").save()
            return time.perf_counter() - started

        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn, initializer=start_predicting, initargs=(model, paths)) as pool:
            turns: dict[str, Callable[[], float]] = {
                "featurize": lambda: seconds(featurized),
                "predict": lambda: pool.submit(predict, 0).result(),
                "load per batch": lambda: seconds(reloaded),
            }
            for repeat in range(repeats + 1):
                for subject, turn in turns.items():
                    taken = turn()
                    if repeat:
                        found[subject].append(round(taken, 3))
        ours, theirs = (
            np.array([row[0] for row in t.orderBy("id").select("features").collect()]) for t in (featurized, reloaded)
        )

    def ratio(subject: str) -> dict[str, object]:
        ratios = [other / own for other, own in zip(found[subject], found["featurize"], strict=True)]
        return {"median": round(statistics.median(ratios), 3), "from": round(min(ratios), 3), "to": round(max(ratios), 3)}

    return {
        **conditions(backbone),
        "images": images,
        "images of a batch": {"featurize": "4 MiB of pixels: 27", "predict": 32, "load per batch": BATCH},
        "seconds": found,
        "P7": ratio("predict"),
        "P8": ratio("load per batch"),
        "largest difference, of the largest value": float(np.abs(ours - theirs).max() / np.abs(theirs).max()),
    }


def memory(backbone: str, rows: int) -> dict[str, object]:
    """Return the peak memory of Spark's Python workers after rows / 8 images, and after another ``rows`` images."""
    import psutil
    from pyspark.sql import functions as F

    from dlspark.ml import ImageFeaturizer
    from dlspark.spark import get_session

    spark = get_session(1)
    stage = ImageFeaturizer(inputCol="image", outputCol="features", backbone=backbone, weights=None)
    with tempfile.TemporaryDirectory() as name:
        image = F.lit(write_photographs(Path(name), 1)[0].read_bytes())
    found = {}
    for count in (rows // 8, rows):
        images = spark.range(count, numPartitions=1).select(image.alias("image"))
        stage.transform(images).write.format("noop").mode("overwrite").save()
        daemons = [each for each in psutil.Process().children(recursive=True) if "pyspark.daemon" in each.cmdline()]
        peaks = [Path(f"/proc/{each.pid}/status").read_text().partition("VmHWM:")[2].split()[0] for each in daemons]
        found[f"{count} rows"] = round(max(int(kibibytes) for kibibytes in peaks) / 1024)
    return {**conditions(backbone), "peak of a Python worker, MiB, after": found}


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--pin",
        action="store_true",
        help="pin all processes, including the JVM, to one core, as if every core had a slot",
    )
    parser.add_argument("--memory", metavar="ROWS", type=int, help="measure only memory, with ROWS images")
    options = parser.parse_args()
    if options.memory:
        print(json.dumps(memory(options.backbone, options.memory), indent=1))
        return
    if options.pin:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # the JVM and the Python workers inherit it
    found = measure(options.backbone, options.images, options.repeats)
    print(json.dumps({**found, "pinned to one core": options.pin}, indent=1))


if __name__ == "__main__":
    main()
