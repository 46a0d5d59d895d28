"""Compare training a head on cached features with recomputing the frozen backbone in every epoch (P11).

.venv/bin/python benchmarks/cached_features.py --data store/ham10000 --weights mobilenet_v2.h5 --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from prepare import IMAGE_SIZE, write_photographs

BATCH = 32


def accuracy(model: Any, rows: Any) -> float:
    """Return the whole model's accuracy on images."""
    right = [model.predict_on_batch(x).argmax(axis=1) == y for x, y in rows.batches(BATCH)]
    return float(np.concatenate(right).mean())


def measure(data: Any, store: str, options: argparse.Namespace) -> dict[str, object]:
    """Measure turns of two epochs: the first traces the model; the second counts, including its validation.

    Both models start with equal weights and keep training from turn to turn, so both end after the same number of epochs.
    """
    import keras

    from dlspark import Trainer, build_classifier
    from dlspark.ml import cache_features
    from dlspark.spark import get_session
    from dlspark_bench.hardware import versions

    held_out = data.validation or data.test
    models = {}
    for subject in ("recompute", "kept"):
        keras.utils.set_random_seed(options.seed)
        models[subject] = build_classifier(
            options.backbone,
            data.num_classes,
            image_size=data.image_size,
            weights=None if options.weights == "none" else options.weights,
            fine_tune="head",
            dense=tuple(options.dense),
            augment=tuple(options.augment),
            learning_rate=options.learning_rate,
        )
    spark = get_session(options.slots)
    started = time.perf_counter()
    kept = cache_features(models["kept"], data, store, views=options.views, seed=options.seed, spark=spark)
    once = time.perf_counter() - started
    turns = {
        "recompute": (models["recompute"], data.train, held_out),
        "kept": (kept.head, kept.train, kept.validation or kept.test),
    }
    seconds: dict[str, list[float]] = {subject: [] for subject in turns}
    for number in range(options.rounds):
        for subject, (model, train, validation) in turns.items():
            fit = {"epochs": 2, "batch_size": BATCH, "seed": options.seed + number, "verbose": 0}
            if options.balanced:
                fit["class_weight"] = data.class_weight()
            result = Trainer("local").fit(model, train, validation_data=validation, **fit)
            seconds[subject].append(round(result.epoch_seconds[-1], 3))
    ratios = [slow / fast for slow, fast in zip(seconds["recompute"], seconds["kept"], strict=True)]
    saved = statistics.median(seconds["recompute"]) - statistics.median(seconds["kept"])
    width = models["kept"].get_layer("pooling").output.shape[1]
    return {
        "backbone": options.backbone,
        "image size": data.image_size,
        "dtype": "float32",
        "threads": len(os.sched_getaffinity(0)),
        "batch": BATCH,
        "versions": versions(),
        "rows": data.train.rows,
        "views": options.views,
        "epochs": 2 * options.rounds,
        "seconds of an epoch": seconds,
        "P11": {"median": round(statistics.median(ratios), 1), "from": round(min(ratios), 1), "to": round(max(ratios), 1)},
        "seconds to compute the features, all parts": round(once, 1),
        "paid back after epochs": round(once / saved, 1) if saved > 0 else None,
        "megabytes of features to train on": round(data.train.rows * options.views * width * 4 / 1e6, 1),
        "rows held out": held_out.rows,
        "accuracy": {subject: round(accuracy(model, held_out), 4) for subject, model in models.items()},
    }


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="prepared dataset (default: generate photographs)")
    parser.add_argument("--images", type=int, default=256, help="number of generated photographs")
    parser.add_argument("--store", help="store of the features; existing features are not timed")
    parser.add_argument("--backbone", default="mobilenetv2")
    parser.add_argument("--weights", default="none", help="'imagenet', a file or 'none'")
    parser.add_argument("--augment", nargs="*", default=["flip"])
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--dense", nargs="*", type=int, default=[])
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--balanced", action="store_true", help="weight classes equally in the loss")
    parser.add_argument("--rounds", type=int, default=5, help="number of turns of two epochs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slots", type=int, default=2, help="task slots of the Spark session that computes the features")
    options = parser.parse_args()

    from dlspark import ImageDataset, Split, prepare_images

    with tempfile.TemporaryDirectory() as name:
        if options.data:
            data = ImageDataset.open(options.data)
        else:
            write_photographs(Path(name, "photos"), options.images)
            split = Split(test=0.0, validation=0.2)
            data = prepare_images(f"{name}/photos", f"{name}/data", layout="folders", image_size=IMAGE_SIZE, split=split)
        print(json.dumps(measure(data, options.store or f"{name}/features", options), indent=1))


if __name__ == "__main__":
    main()
