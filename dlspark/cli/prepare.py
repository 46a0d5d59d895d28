"""``dlspark prepare``: a collection of image files becomes a dataset."""

from __future__ import annotations

import argparse
from typing import Any

from dlspark._require import LAYOUTS
from dlspark.cli.arguments import add_command, image_size, key_value, typed
from dlspark.cli.output import Block, Facts, Report, Table
from dlspark.errors import ConfigError

_EXAMPLE = """
dlspark prepare photos/ store/photos --layout folders --image-size 224 --test 0.2 --seed 7
dlspark prepare ham10000/ store/ham --layout ham10000 --image-size 450x600 --group lesion_id
dlspark prepare cells/ store/cells-1 --layout cnmc --image-size 224 --group subject --fold 1/5
dlspark prepare scans/ store/scans --layout csv --layout-option label_column=finding --image-size 224
"""


def add_parser(commands: Any) -> None:
    """Add ``prepare``."""
    parser = add_command(
        commands, "prepare", summary="read, scale and split a collection of images", example=_EXAMPLE, run=run
    )
    parser.add_argument("source", metavar="SOURCE", help="folder or URI of the images")
    parser.add_argument("out", metavar="OUT", help="folder or URI of the dataset to make")
    parser.add_argument("--layout", required=True, help=f"how the collection is stored: {', '.join(LAYOUTS)}")
    parser.add_argument(
        "--layout-option",
        metavar="K=V",
        action="append",
        type=key_value,
        default=[],
        help="an option of the layout, such as label_column=finding of csv; repeatable",
    )
    parser.add_argument("--image-size", metavar="SIZE", required=True, type=image_size, help="pixels: 224, or HEIGHTxWIDTH")
    parser.add_argument(
        "--resize",
        choices=("fit", "crop"),
        default="fit",
        help="fit: all of an image, not in proportion; crop: the middle of it, in proportion (default: fit)",
    )
    group = parser.add_argument_group("split")
    group.add_argument(
        "--test", metavar="SIZE", type=part_size, help="to test on: a fraction, or a number of rows (default: 0.2)"
    )
    group.add_argument("--validation", metavar="SIZE", type=part_size, default=0.0, help="to validate on (default: 0)")
    group.add_argument("--fold", metavar="I/K", type=fold, help="test on the I-th of K folds, I from 1, in place of --test")
    group.add_argument("--undersample", action="store_true", help="train on as many rows of each class as the rarest has")
    group.add_argument("--group", metavar="COLUMN", help="values of this column (patient, lesion) stay on one side")
    group.add_argument("--no-stratify", action="store_true", help="do not keep the ratio of the classes in each part")
    group.add_argument("--split-column", metavar="COLUMN", help="a column that says train, validation or test already")
    group.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    group = parser.add_argument_group("images that cannot be read")
    group.add_argument("--strict", action="store_true", help="fail at the first one")
    group.add_argument(
        "--max-rejected",
        metavar="FRACTION",
        type=float,
        default=0.01,
        help="fail when there are more than that (default: 0.01)",
    )


def run(options: argparse.Namespace) -> Report:
    """Prepare, and count what came out."""
    from dlspark.data import PARTS, Split, leak_warning
    from dlspark.images import prepare_images

    dataset = prepare_images(
        options.source,
        options.out,
        layout=_layout(options.layout, options.layout_option),
        image_size=options.image_size,
        resize=options.resize,
        split=Split(
            test=_test_size(options),
            validation=options.validation,
            stratify=not options.no_stratify,
            group=options.group,
            seed=options.seed,
            column=options.split_column,
            fold=options.fold,
            undersample=options.undersample,
        ),
        strict=options.strict,
        max_rejected_fraction=options.max_rejected,
    )
    summary = dataset.summary()
    parts = [part for part in PARTS if getattr(dataset, part) is not None]
    counts = [[name, *(summary["parts"][part]["by_class"][name] for part in parts)] for name in dataset.classes]
    total = ["(all)", *(summary["parts"][part]["rows"] for part in parts)]
    height, width = dataset.image_size
    rejected = dataset.manifest["rejected"]
    facts = {
        "dataset": dataset.uri,
        "image size": f"{height} x {width}",
        "on disk": f"{summary['size_bytes'] / 1e6:.1f} MB",
        "rejected": f"{rejected['rows']} of {rejected['of']}" + (f", see {rejected['file']}" if rejected["file"] else ""),
    }
    drawn = summary["split"]
    if drawn["left_out"]:
        facts["left out"] = f"{drawn['left_out']} training rows, by --undersample"
    warning = leak_warning(drawn)
    if warning:
        facts["warning"] = warning
    if drawn["groups"]:
        total_groups = ["(groups)", *(drawn["parts"].get(part, {}).get("groups", 0) for part in parts)]
        counts.append(total_groups)
    blocks: list[Block] = [Facts(facts), Table(["class", *parts], [*counts, total])]
    if rejected["first"]:
        blocks.append(Table(["left out", "why"], rejected["first"]))
    return Report(summary, blocks)


def part_size(text: str) -> float:
    """A fraction as a float, or a number of rows as an int: ``0.2`` or ``2000``."""
    return int(text) if text.isdigit() else float(text)


def fold(text: str) -> tuple[int, int]:
    """``2/5``, the second of five folds, as (1, 5)."""
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count) >= 2):
        raise argparse.ArgumentTypeError(f"expected I/K, such as 1/5 for the first of five folds: received {text!r}")
    return int(number) - 1, int(count)


def _test_size(options: argparse.Namespace) -> float:
    if options.fold is None:
        return 0.2 if options.test is None else options.test
    if options.test is not None:
        raise ConfigError("Give --test or --fold: with folds the test part is one K-th of the rows.")
    return float(1 / options.fold[1])


def _layout(name: str, pairs: list[tuple[str, str]]) -> Any:
    if not pairs:
        return name
    from dlspark.images import find_layout

    kind = LAYOUTS.find(name)
    return find_layout(name, typed(pairs, kind, flag="--layout-option") if isinstance(kind, type) else dict(pairs))
