"""``dlspark explore``: count and show the content of a prepared dataset."""

from __future__ import annotations

import argparse
from typing import Any

from dlspark.cli.arguments import add_command, words
from dlspark.cli.output import Block, Facts, Report, Table

PAGE = "explore.html"
_EXAMPLE = """
dlspark explore store/ham
dlspark explore store/ham --columns sex,age,localization --out pages/ham
"""


def add_parser(commands: Any) -> None:
    """Add ``explore``."""
    parser = add_command(
        commands, "explore", summary="count and show the content of a prepared dataset", example=_EXAMPLE, run=run
    )
    parser.add_argument("data", metavar="DATA", help="folder or URI of a prepared dataset")
    parser.add_argument(
        "--columns",
        metavar="NAME,NAME",
        action="extend",
        type=words,
        help="columns to count by (default: all but ids and groups)",
    )
    parser.add_argument(
        "--samples", metavar="N", type=int, default=8, help="number of images of each class to show (default: 8)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of samples (default: 0)")
    parser.add_argument("--out", metavar="FOLDER", help=f"folder for {PAGE}, which needs no network, and the pictures")


def run(options: argparse.Namespace) -> Report:
    """Count, and draw if ``--out`` is given."""
    from dlspark.images import ImageDataset, explore, rows_of
    from dlspark.report import png, write_page
    from dlspark.storage import Store

    dataset = ImageDataset.open(options.data)
    found = explore(dataset, columns=options.columns, samples=options.samples, seed=options.seed)
    facts = {
        "dataset": dataset.uri,
        "images": sum(rows for _, rows in found.sizes),
        "sizes as found": ", ".join(f"{height} x {width} ({rows:,})" for (height, width), rows in found.sizes[:3])
        + (f" and {len(found.sizes) - 3:,} more" if len(found.sizes) > 3 else ""),
        "equal images": f"{len(found.duplicates):,} sets, {found.leaking:,} of them in more than one part",
    }
    if options.out is not None:
        out = Store(options.out)
        pictures = {name: png(figure) for name, figure in found.figures().items()}
        write_page(out, PAGE, found.page(pictures), pictures)
        facts["page"] = f"{out.uri}/{PAGE}"
    for number, warning in enumerate(found.warnings(), start=1):
        facts[f"warning {number}"] = warning
    blocks: list[Block] = [Facts(facts)]
    blocks += [Table([each.column, *dataset.classes, "all"], rows_of(each)) for each in found.counts]
    document = found.to_dict()
    if options.out is not None:
        document["page"] = facts["page"]
    return Report(document, blocks)
