"""make demo: train ResNet50 on two Spark workers, on real images from scikit-image.

The folder demo-output/ receives the images, the prepared dataset and, for each backend, the model (.keras), the history
(JSON) and the learning curves (PNG).
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # hide TensorFlow's messages about a missing GPU

import keras
import matplotlib as mpl
from patches import write_patches
from rich.console import Console
from rich.table import Table

from dlspark import (
    ConfigError,
    DlsparkError,
    FitResult,
    ImageDataset,
    MissingDependencyError,
    Split,
    Trainer,
    available_backends,
    build_classifier,
    prepare_images,
)
from dlspark.cli.arguments import local_folder
from dlspark.images.layouts import csv_layout

mpl.use("Agg")

IMAGE_SIZE = (64, 64)
BATCH_SIZE = 48
EPOCHS = 4
LEARNING_RATE = 1e-3
BATCH_NORM_MOMENTUM = 0.8
ORDER = ("mirrored", "horovod", "elephas")

console = Console(stderr=True)


def make_model(data: ImageDataset, epochs: int) -> keras.Model:
    """Return a ResNet50 with random weights, and with augmentation for images without an orientation."""
    keras.utils.set_random_seed(1)
    steps = epochs * -(-data.train.rows // BATCH_SIZE)
    warmup = steps // 5
    schedule = keras.optimizers.schedules.CosineDecay(0.0, steps - warmup, warmup_target=LEARNING_RATE, warmup_steps=warmup)
    model = build_classifier(
        "resnet50",
        num_classes=data.num_classes,
        image_size=data.image_size,
        weights=None,
        augment=("flip", "rotation"),
        learning_rate=schedule,
    )
    # Keras' default of 0.99 averages batch-norm statistics over hundreds of steps. In a run this short, statistics of the
    # first, untrained steps would dominate the evaluation.
    for layer in layers_of(model):
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = BATCH_NORM_MOMENTUM
            # Every residual block starts as the identity, so a deep network learns from the first step
            # (arXiv:1706.02677, section 5.1).
            if layer.name.endswith("_3_bn"):
                layer.gamma.assign(keras.ops.zeros_like(layer.gamma))
    return model


def layers_of(model: keras.Model) -> Iterator[keras.Layer]:
    """Yield all layers, including those of nested models."""
    for layer in model.layers:
        yield layer
        if isinstance(layer, keras.Model):
            yield from layers_of(layer)


def save_curves(result: FitResult, path: Path) -> None:
    """Plot training and validation loss and accuracy by epoch."""
    from matplotlib import pyplot as plt

    epochs = range(1, len(result.history["loss"]) + 1)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, name in zip(axes, ("loss", "accuracy"), strict=True):
        axis.plot(epochs, result.history[name], marker="o", label="training (augmented)")
        axis.plot(epochs, result.history[f"val_{name}"], marker="o", label="validation")
        axis.set(xlabel="epoch", ylabel=name, title=f"{result.backend}: {name}", xticks=list(epochs))
        axis.grid(alpha=0.3)
        axis.legend()
    axes[1].set_ylim(0, 1.02)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def train(backend: str, data: ImageDataset, epochs: int, out: Path) -> FitResult:
    """Train a new model on two workers and save the results in ``out``."""
    result = Trainer(backend, num_workers=2).fit(
        make_model(data, epochs), data.train, validation_data=data.test, epochs=epochs, batch_size=BATCH_SIZE, seed=7
    )
    out.mkdir(parents=True, exist_ok=True)
    result.model.save(out / "model.keras")
    (out / "history.json").write_text(result.to_json())
    save_curves(result, out / "curves.png")
    return result


def table_of(results: list[FitResult]) -> Table:
    """Return a table that compares the engines."""
    table = Table(title="ResNet50, 64 px, random weights, 2 Spark workers")
    for heading in ("backend", "epoch, s", "first step after, s", "train accuracy", "validation accuracy", "final loss"):
        table.add_column(heading, justify="left" if heading == "backend" else "right")
    for result in results:
        last = {name: values[-1] for name, values in result.history.items()}
        seconds = sorted(result.epoch_seconds)[len(result.epoch_seconds) // 2]
        table.add_row(
            result.backend,
            f"{seconds:.1f}",
            f"{result.time_to_first_step_seconds:.1f}",
            f"{last['accuracy']:.3f}",
            f"{last['val_accuracy']:.3f}",
            f"{last['loss']:.3f}",
        )
    return table


def main() -> int:
    """Run the demo; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "engines", nargs="*", default=["mirrored"], help=f"of {', '.join(ORDER)}, in turn, or all (default: mirrored)"
    )
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--out", type=local_folder, default=Path("demo-output"))
    options = parser.parse_args()
    started = time.monotonic()
    asked = ORDER if "all" in options.engines else options.engines
    installed = available_backends()
    for name in asked:
        if name not in ORDER:
            raise ConfigError(f"Expected engines of {', '.join(ORDER)}, or all; got {name!r}.")
        if name not in installed:
            console.print(f"Skipping {name}, which is not installed. `dlspark backends` shows how to install it.")
    backends = [name for name in asked if name in installed]

    console.print(f"Cutting photographs of materials into patches in {options.out / 'images'}")
    images = write_patches(options.out / "images")
    console.print("Preparing the patches with Spark: decode, resize to 64 px, write shards")
    layout = csv_layout(image_column="file", extension="")
    data = prepare_images(images, options.out / "data", layout=layout, image_size=IMAGE_SIZE, split=Split(column="part"))
    console.print(f"{data.train.rows} training and {data.test.rows} test images of {', '.join(data.classes)}")

    results = []
    for backend in backends:
        console.rule(backend)
        try:
            results.append(train(backend, data, options.epochs, options.out / backend))
        except MissingDependencyError as error:
            console.print(f"Skipped: {error}", markup=False)
    Console().print(table_of(results))
    (options.out / "results.json").write_text(json.dumps([json.loads(result.to_json()) for result in results], indent=2))
    console.print(
        f"{time.monotonic() - started:.0f} s in total. Models, histories and curves are in "
        f"{', '.join(str(options.out / result.backend) for result in results)}.\n"
        "Spark has prepared the images, and two of its workers have trained one Keras model, each on its part of every "
        "batch. Next: make demo ENGINES=all compares the engines, and the README's script trains on your images."
    )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DlsparkError as error:
        console.print(f"demo: {error}", markup=False)
        sys.exit(1)
    except KeyboardInterrupt:
        console.print("demo: stopped")
        sys.exit(130)
