"""``dlspark prepare``: turn a collection of image files into a dataset."""

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
    parser.add_argument("out", metavar="OUT", help="folder or URI of the dataset to create")
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
        help="fit: the whole image, distorted; crop: its middle, with its aspect ratio (default: fit)",
    )
    parser.add_argument(
        "--bits", metavar="N", type=int, default=16, help="bits that the values of 16-bit images use, 8 to 16 (default: 16)"
    )
    group = parser.add_argument_group("split")
    group.add_argument(
        "--test",
        metavar="SIZE",
        type=part_size,
        help="size of the part test: a fraction, or a number of rows (default: 0.2)",
    )
    group.add_argument(
        "--validation", metavar="SIZE", type=part_size, default=0.0, help="size of the part validation (default: 0)"
    )
    group.add_argument("--fold", metavar="I/K", type=fold, help="test on fold I of K, from 1, instead of --test")
    group.add_argument("--undersample", action="store_true", help="train on as many rows of each class as of the rarest")
    group.add_argument("--group", metavar="COLUMN", help="keep rows with the same value (patient, lesion) in one part")
    group.add_argument("--no-stratify", action="store_true", help="do not keep the ratio of the classes in each part")
    group.add_argument("--split-column", metavar="COLUMN", help="a column with train, validation or test in each row")
    group.add_argument("--seed", type=int, default=0, help="seed of the random split (default: 0)")
    group = parser.add_argument_group("images that cannot be read")
    group.add_argument("--strict", action="store_true", help="fail if a single image cannot be read")
    group.add_argument(
        "--max-rejected",
        metavar="FRACTION",
        type=float,
        default=0.01,
        help="fail if more than this fraction cannot be read (default: 0.01)",
    )


def run(options: argparse.Namespace) -> Report:
    """Prepare the dataset and count its rows."""
    from dlspark.data import PARTS, Split, leak_warning
    from dlspark.images import in_words, prepare_images, reasons_in_words

    dataset = prepare_images(
        options.source,
        options.out,
        layout=_layout(options.layout, options.layout_option),
        image_size=options.image_size,
        resize=options.resize,
        bits=options.bits,
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
    facts |= {"passed over": reasons_in_words(summary["passed_over"])} if summary["passed_over"] else {}
    facts |= {name: in_words(summary[name]) for name in ("missing", "trimmed") if summary[name]}
    drawn = summary["split"]
    if drawn.get("column") == "given_part":
        facts["split"] = "kept, as the folders give it"
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
    """``0.2``, a fraction, as a float; ``2000``, a number of rows, as an int."""
    return int(text) if text.isdigit() else float(text)


def fold(text: str) -> tuple[int, int]:
    """``2/5``, the second of five folds, as (1, 5)."""
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count) >= 2):
        raise argparse.ArgumentTypeError(f"expected I/K, such as 1/5 for the first of five folds; got {text!r}")
    return int(number) - 1, int(count)


def _test_size(options: argparse.Namespace) -> float:
    if options.fold is None:
        return 0.2 if options.test is None else options.test
    if options.test is not None:
        raise ConfigError("Expected --test or --fold; got both. With --fold, the part test is one K-th of the rows.")
    return float(1 / options.fold[1])


def _layout(name: str, pairs: list[tuple[str, str]]) -> Any:
    if not pairs:
        return name
    from dlspark.images import find_layout

    kind = LAYOUTS.find(name)
    return find_layout(name, typed(pairs, kind, flag="--layout-option") if isinstance(kind, type) else dict(pairs))
