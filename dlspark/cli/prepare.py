"""``dlspark prepare``: a collection of image files becomes a dataset."""

from __future__ import annotations

import argparse
from typing import Any

from dlspark.cli.arguments import add_command, image_size, key_value, typed
from dlspark.cli.output import Block, Facts, Report, Table
from dlspark.errors import ConfigError

_EXAMPLE = """
dlspark prepare photos/ store/photos --layout folders --image-size 224 --test 0.2 --seed 7
dlspark prepare ham10000/ store/ham --layout ham10000 --image-size 450x600 --group lesion_id
dlspark prepare scans/ store/scans --layout csv --layout-option label_column=finding --image-size 224
"""


def add_parser(commands: Any) -> None:
    """Add ``prepare``."""
    parser = add_command(
        commands, "prepare", summary="read, scale and split a collection of images", example=_EXAMPLE, run=run
    )
    parser.add_argument("source", metavar="SOURCE", help="folder or URI of the images")
    parser.add_argument("out", metavar="OUT", help="folder or URI of the dataset to make")
    parser.add_argument("--layout", required=True, help="how images and labels are found: folders, csv or ham10000")
    parser.add_argument(
        "--layout-option",
        metavar="K=V",
        action="append",
        type=key_value,
        default=[],
        help="of layout csv: csv, image_column, label_column, group_column, extension or folder; repeatable",
    )
    parser.add_argument("--image-size", metavar="SIZE", required=True, type=image_size, help="pixels: 224, or HEIGHTxWIDTH")
    group = parser.add_argument_group("split")
    group.add_argument("--test", metavar="FRACTION", type=float, default=0.2, help="to test on (default: 0.2)")
    group.add_argument("--validation", metavar="FRACTION", type=float, default=0.0, help="to validate on (default: 0)")
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
    from dlspark.data.split import PARTS, Split
    from dlspark.images.prepare import prepare_images

    dataset = prepare_images(
        options.source,
        options.out,
        layout=_layout(options.layout, options.layout_option),
        image_size=options.image_size,
        split=Split(
            test=options.test,
            validation=options.validation,
            stratify=not options.no_stratify,
            group=options.group,
            seed=options.seed,
            column=options.split_column,
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
    blocks: list[Block] = [Facts(facts), Table(["class", *parts], [*counts, total])]
    if rejected["first"]:
        blocks.append(Table(["left out", "why"], rejected["first"]))
    return Report(summary, blocks)


def _layout(name: str, pairs: list[tuple[str, str]]) -> Any:
    if not pairs:
        return name
    from dataclasses import fields

    from dlspark.errors import did_you_mean
    from dlspark.images.layouts import CsvLayout, find_layout

    if not isinstance(find_layout(name), CsvLayout):
        raise ConfigError(f"Layout {name!r} has no options; layout 'csv' has. Leave --layout-option out.")
    known = [field.name for field in fields(CsvLayout)]
    for option, _ in pairs:
        if option not in known:
            raise ConfigError(f"Layout {name!r} has no option {option!r}. {did_you_mean(option, known)}")
    return CsvLayout(**typed(pairs, CsvLayout, flag="--layout-option"))
