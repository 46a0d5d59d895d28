"""``dlspark train``: a classifier for a prepared dataset, on any backend."""

from __future__ import annotations

import argparse
import json
import shlex
from typing import Any

from dlspark.cli.arguments import add_command, add_options, key_value, typed
from dlspark.cli.output import Block, Facts, Report, Table, plain
from dlspark.errors import ConfigError, DataError, DlsparkError
from dlspark.mends.tensorflow_start_up import without_noise
from dlspark.models import ClassifierOptions, build_from_options

HISTORY = "history.json"
_NOT_SETTINGS = ("run", "command", "arguments", "format", "debug")

_EXAMPLE = """
dlspark train store/photos --out runs/first --backbone mobilenetv2 --epochs 5
dlspark train store/ham --out runs/ham --backend horovod --workers 6 --option cycle_time_ms=20 \\
    --backbone resnet50 --augment flip,rotation --dense 512 --dropout 0.3 --batch-size 192
"""


def add_parser(commands: Any) -> None:
    """Add ``train``."""
    parser = add_command(commands, "train", summary="train a classifier on a prepared dataset", example=_EXAMPLE, run=run)
    parser.add_argument("data", metavar="DATA", help="folder or URI of a prepared dataset")
    parser.add_argument("--out", metavar="FOLDER", required=True, help=f"folder or URI for model.keras and {HISTORY}")
    parser.add_argument("--overwrite", action="store_true", help="replace the model in that folder")
    group = parser.add_argument_group("where it trains")
    group.add_argument("--backend", default="local", help="see `dlspark backends` (default: local)")
    group.add_argument("--workers", metavar="N", type=int, default=1, help="number of workers (default: 1)")
    group.add_argument(
        "--option", metavar="K=V", action="append", type=key_value, default=[], help="option of the backend; repeatable"
    )
    group.add_argument("--store", metavar="URI", help="folder or URI that all workers reach, for the run's files")
    group = parser.add_argument_group("when something fails", "With --store, the same command resumes an interrupted run.")
    group.add_argument("--no-resume", action="store_true", help="start a new run in the store")
    group.add_argument("--max-restarts", metavar="N", type=int, default=0, help="restarts after failures (default: 0)")
    group.add_argument("--checkpoint-steps", metavar="N", type=int, help="checkpoint every N steps, and after each epoch")
    group.add_argument(
        "--timeout",
        metavar="K=V",
        action="append",
        type=key_value,
        default=[],
        help="such as step_seconds=60; repeatable",
    )
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", metavar="N", type=int, default=1, help="passes over the data (default: 1)")
    group.add_argument(
        "--batch-size", metavar="N", type=int, default=32, help="rows per step over all workers (default: 32)"
    )
    group.add_argument(
        "--class-weight",
        choices=("none", "balanced"),
        default="none",
        help="balanced: all classes have the same weight in the loss (default: none)",
    )
    add_options(group, ClassifierOptions, training=True, defaults={})
    group.add_argument("--seed", type=int, default=0, help="seed of weights, order and augmentation (default: 0)")
    group.add_argument(
        "--verbose", choices=("auto", "0", "1", "2"), default="auto", help="0 silent, 1 live, 2 lines (default: auto)"
    )
    group = parser.add_argument_group("model")
    add_options(group, ClassifierOptions, training=False, defaults={"backbone": "resnet50"})


def run(options: argparse.Namespace) -> Report:
    """Train, and write the model and its history to ``--out``."""
    from dlspark.images import ImageDataset
    from dlspark.model_files import MODEL
    from dlspark.registry import load_backend
    from dlspark.storage import Store
    from dlspark.timeouts import Timeouts
    from dlspark.trainer import Trainer

    settings = {name: value for name, value in vars(options).items() if name not in _NOT_SETTINGS}
    backend_options = typed(options.option, load_backend(options.backend).options_type)
    trainer = Trainer(
        options.backend,
        num_workers=options.workers,
        options=backend_options,
        store=options.store,
        max_restarts=options.max_restarts,
        timeouts=typed(options.timeout, Timeouts, flag="--timeout"),
        checkpoint_steps=options.checkpoint_steps,
    )
    dataset = ImageDataset.open(options.data)
    if dataset.train is None:
        raise DataError(f"Expected rows to train on: the dataset at {dataset.uri!r} has none in its part 'train'.")
    part = next((name for name in ("validation", "test") if getattr(dataset, name) is not None), None)
    out = Store(options.out)
    if out.exists(MODEL) and not options.overwrite:
        raise ConfigError(f"{out.uri!r} already holds a {MODEL}. Give another --out, or --overwrite to replace it.")

    with without_noise():
        import keras

    keras.utils.set_random_seed(options.seed)
    classifier = ClassifierOptions.from_plain(vars(options))
    model = build_from_options(classifier, dataset.num_classes, image_size=dataset.image_size)
    _writable(out)
    result = trainer.fit(
        model,
        dataset.train,
        validation_data=None if part is None else getattr(dataset, part),
        epochs=options.epochs,
        batch_size=options.batch_size,
        seed=options.seed,
        class_weight=dataset.class_weight() if options.class_weight == "balanced" else None,
        verbose="auto" if options.verbose == "auto" else int(options.verbose),  # type: ignore[arg-type]
        resume=not options.no_resume,
    )
    with out.open_writer(MODEL) as path:
        result.model.save(path)
    document = {
        "command": shlex.join(["dlspark", *options.arguments]),
        "settings": {**settings, "option": backend_options},
        "data": {"uri": dataset.uri, "classes": dataset.classes, "image_size": dataset.image_size, "validation": part},
        **json.loads(result.to_json()),
    }
    out.write_json(HISTORY, plain(document))
    document = {"model": f"{out.uri}/{MODEL}", **document}
    return Report(document, _blocks(document, options))


def _writable(out: Any) -> None:
    """Check before the training that files can be written."""
    probe = ".dlspark-writable"
    try:
        out.write_bytes(probe, b"")
        out.delete(probe)
    except DlsparkError as error:
        raise ConfigError(f"Expected --out to be a writable folder: {error}") from error


def _blocks(document: dict[str, Any], options: argparse.Namespace) -> list[Block]:
    history, seconds = document["history"], document["epoch_seconds"]
    facts = {
        "backend": document["backend"],
        "workers": f"{options.workers}: " + ", ".join(f"{w['host']} ({w['device']})" for w in document["workers"]),
        "first step after": f"{document['time_to_first_step_seconds']:.1f} s",
        "validated on": f"part {document['data']['validation']!r}" if document["data"]["validation"] else "nothing",
        "model": document["model"],
    }
    names = sorted(history, key=lambda name: (name.startswith("val_"), name.removeprefix("val_") != "loss"))
    epochs = [
        [number + 1, round(seconds[number], 1), *(history[name][number] for name in names)] for number in range(len(seconds))
    ]
    return [Facts(facts), Table(["epoch", "seconds", *names], epochs)]
