"""The program that test_s3 runs in a separate process: images, dataset and run in a bucket, nothing on the local disk.

Arguments: the bucket's URI and the file for the results. Credentials and endpoint are in the environment, which the
executors inherit.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import fsspec
import numpy as np
from PIL import Image

IMAGES = 48


def main(bucket: str, out: str) -> None:
    """Write images to the bucket, prepare them there, train on them and write the results."""
    import keras

    from dlspark import ImageDataset, Split, Trainer, prepare_images

    draw = np.random.default_rng(0)
    for i in range(IMAGES):
        buffer = io.BytesIO()
        Image.fromarray(draw.integers(0, 80, (20, 30, 3), np.uint8) + np.uint8(i % 2 * 160)).save(buffer, "PNG")
        with fsspec.open(f"{bucket}/photos/{'dark' if i % 2 == 0 else 'light'}/{i:02d}.png", "wb") as file:
            file.write(buffer.getvalue())
    with fsspec.open(f"{bucket}/photos/dark/broken.png", "wb") as file:
        file.write(b"not an image")

    def prepared() -> ImageDataset:
        return prepare_images(
            f"{bucket}/photos",
            f"{bucket}/data",
            layout="folders",
            image_size=(8, 8),
            split=Split(test=0.25),
            max_rejected_fraction=0.1,
        )

    data = prepared()
    again = prepared()
    keras.utils.set_random_seed(1)
    layers = [
        keras.layers.Rescaling(1 / 127.5, offset=-1),
        keras.layers.Flatten(),
        keras.layers.Dense(2, activation="softmax"),
    ]
    model = keras.Sequential([keras.layers.Input((*data.image_size, 3)), *layers])
    model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy", metrics=["accuracy"])
    trainer = Trainer("mirrored", num_workers=2, store=f"{bucket}/runs/1")
    result = trainer.fit(model, data.train, validation_data=data.test, epochs=12, batch_size=12)
    told = {
        "summary": data.summary(),
        "recognised": again == data,  # the same file names; a second preparation would choose others
        "rows": sum(worker.rows for worker in result.workers),
        "history": result.history,
        "cache": sorted(path.name for path in Path.home().joinpath(".cache/dlspark/files").glob("*.arrow")),
    }
    Path(out).write_text(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
