"""An application for spark-submit, whose command line sets master, executors and cores.

spark-submit --master spark://host:7077 examples/submit.py --backend mirrored --workers 2 --store /shared/runs
"""

from __future__ import annotations

import argparse
from pathlib import Path

import keras
import numpy as np

from dlspark import Trainer
from dlspark.spark import get_session


def classifier() -> keras.Model:
    model = keras.Sequential(
        [
            keras.layers.Input((8,)),
            keras.layers.Dense(32, activation="relu"),
            keras.layers.Dense(3, activation="softmax"),
        ]
    )
    model.compile(optimizer="adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="mirrored")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--store", help="folder or URI that the driver and all executors can access")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()

    x = np.random.default_rng(0).normal(size=(1000, 8)).astype("float32")
    y = x[:, :3].argmax(axis=1)
    spark = get_session(arguments.workers)  # the session of spark-submit, or a local one without it
    keras.utils.set_random_seed(7)  # the same seed lets a killed run resume when it is submitted again
    trainer = Trainer(backend=arguments.backend, num_workers=arguments.workers, store=arguments.store)
    result = trainer.fit(classifier(), (x, y), epochs=arguments.epochs, batch_size=50)
    for worker in result.workers:
        print(f"rank {worker.rank} on {worker.host}: {worker.rows} rows in {worker.seconds:.1f} s on {worker.device}")
    if arguments.out:
        arguments.out.write_text(result.to_json())
    spark.stop()


if __name__ == "__main__":
    main()
