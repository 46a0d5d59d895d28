"""From a folder of images to a classifier: prepare_images, build_classifier, Trainer. Needs no download."""

from __future__ import annotations

import tempfile
from pathlib import Path

import keras
import numpy as np
from PIL import Image

from dlspark import Split, Trainer, build_classifier, prepare_images

HUES = {"leaf": (40, 160, 40), "sky": (60, 110, 220)}


def draw_photos(folder: Path, each: int = 40) -> Path:
    """Write folder/<class>/<number>.png: noise around the class' colour."""
    draw = np.random.default_rng(0)
    for name, hue in HUES.items():
        (folder / name).mkdir(parents=True)
        for number in range(each):
            pixels = np.clip(draw.normal(hue, 40, size=(48, 64, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        photos = draw_photos(Path(folder, "photos"))
        data = prepare_images(
            photos, Path(folder, "prepared"), layout="folders", image_size=(32, 32), split=Split(test=0.25, seed=7)
        )
        for part, found in data.summary()["parts"].items():
            print(f"{part}: {found['rows']} images {found['by_class']}")

        keras.utils.set_random_seed(1)
        model = build_classifier(
            "mobilenet",
            num_classes=data.num_classes,
            image_size=data.image_size,
            weights=None,
            augment=("flip",),
            learning_rate=1e-3,
        )
        result = Trainer("local").fit(model, data.train, validation_data=data.test, epochs=2, batch_size=20, seed=7)
        loss = ", ".join(f"{value:.3f}" for value in result.history["loss"])
        print(f"classes {', '.join(data.classes)}; loss by epoch {loss}; {result.workers[0].rows} images seen")


if __name__ == "__main__":
    main()
