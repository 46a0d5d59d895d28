"""``dlspark train``: a classifier for a prepared dataset, on any backend."""

from __future__ import annotations

import argparse
import json
import shlex
from typing import Any

from dlspark.cli.arguments import add_command, key_value, typed, whole_numbers, words
from dlspark.cli.output import Block, Facts, Report, Table, plain
from dlspark.errors import ConfigError, DataError, DlsparkError
from dlspark.mends.tensorflow_start_up import without_noise

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
    parser.add_argument("--out", metavar="FOLDER", required=True, help=f"where model.keras and {HISTORY} go, or a URI")
    parser.add_argument("--overwrite", action="store_true", help="replace the model of an earlier run there")
    group = parser.add_argument_group("where it trains")
    group.add_argument("--backend", default="local", help="see `dlspark backends` (default: local)")
    group.add_argument("--workers", metavar="N", type=int, default=1, help="how many (default: 1)")
    group.add_argument(
        "--option", metavar="K=V", action="append", type=key_value, default=[], help="of the backend; repeatable"
    )
    group.add_argument("--store", metavar="URI", help="for the run's files; on a cluster, one that all executors reach")
    group = parser.add_argument_group(
        "when something fails", "With --store, the same command goes on with a run that was cut."
    )
    group.add_argument("--no-resume", action="store_true", help="begin a new run in the store, beside those that are there")
    group.add_argument("--max-restarts", metavar="N", type=int, default=0, help="start again after a failure (default: 0)")
    group.add_argument("--checkpoint-steps", metavar="N", type=int, help="also a checkpoint every N steps")
    group.add_argument(
        "--timeout", metavar="K=V", action="append", type=key_value, default=[], help="seconds, such as step_seconds=60"
    )
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", metavar="N", type=int, default=1, help="passes over the data (default: 1)")
    group.add_argument(
        "--batch-size", metavar="N", type=int, default=32, help="rows of a step, over all workers (default: 32)"
    )
    group.add_argument(
        "--class-weight",
        choices=("none", "balanced"),
        default="none",
        help="balanced: all classes count alike (default: none)",
    )
    group.add_argument("--learning-rate", metavar="RATE", type=float, default=1e-4, help="(default: 0.0001)")
    group.add_argument(
        "--depth-decay",
        metavar="FACTOR",
        type=float,
        default=1.0,
        help="factor on the learning rate from each block of the backbone to the one below (default: 1)",
    )
    group.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation (default: 0)")
    group.add_argument(
        "--verbose", choices=("auto", "0", "1", "2"), default="auto", help="0 silent, 1 live, 2 lines (default: auto)"
    )
    group = parser.add_argument_group("model")
    group.add_argument("--backbone", default="resnet50", help="network of keras.applications (default: resnet50)")
    group.add_argument("--weights", default="imagenet", help="imagenet, none or a file (default: imagenet)")
    group.add_argument("--fine-tune", metavar="WHAT", default="all", help="all, head or top:N (default: all)")
    group.add_argument(
        "--batch-norm", choices=("train", "frozen"), default="train", help="frozen: as the weights come (default: train)"
    )
    group.add_argument("--dense", metavar="N,N", action="extend", type=whole_numbers, default=[], help="layers of the head")
    group.add_argument("--dropout", metavar="FRACTION", type=float, default=0.0, help="before the output (default: 0)")
    group.add_argument(
        "--augment",
        metavar="NAME,NAME",
        action="extend",
        type=words,
        default=[],
        help="flip, horizontal_flip, vertical_flip, rotation or rotation:FRACTION",
    )


def run(options: argparse.Namespace) -> Report:
    """Train, and leave the model and its history in ``--out``."""
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
        raise ConfigError(f"{out.uri!r} holds a {MODEL} already. Give another --out, or --overwrite to replace it.")

    with without_noise():
        import keras

    from dlspark.models import build_classifier

    keras.utils.set_random_seed(options.seed)
    model = build_classifier(
        options.backbone,
        dataset.num_classes,
        image_size=dataset.image_size,
        weights=None if options.weights.lower() == "none" else options.weights,
        fine_tune=options.fine_tune,
        batch_norm=options.batch_norm,
        dense=options.dense,
        dropout=options.dropout,
        augment=options.augment,
        learning_rate=options.learning_rate,
        depth_decay=options.depth_decay,
    )
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
    """Better found out now than after the training."""
    probe = ".dlspark-writable"
    try:
        out.write_bytes(probe, b"")
        out.delete(probe)
    except DlsparkError as error:
        raise ConfigError(f"--out must be a folder that can be written to: {error}") from error


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
