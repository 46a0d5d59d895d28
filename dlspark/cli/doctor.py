"""``dlspark doctor``: check Java, Spark, executors, the store and the connection to the driver before a training."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dlspark._require import DISTRIBUTION
from dlspark.cli.arguments import add_command
from dlspark.cli.output import Block, Report, Table
from dlspark.errors import ConfigError, DlsparkError

if TYPE_CHECKING:
    from dlspark.cli.checks import Check

_EXAMPLE = """
dlspark doctor --workers 2 --store runs
spark-submit --master spark://host:7077 \\
    "$(python -c 'import dlspark; print(*dlspark.__path__)')/__main__.py" doctor --workers 6 --store s3://bucket/runs
"""
_MORE_PACKAGES = ("jax", "torch", "pandas")  # besides those of every training and those of the installed engines
_WORDS = {True: "ok", False: "WRONG", None: "note"}


def add_parser(commands: Any) -> None:
    """Add ``doctor``."""
    summary = "check that a training can run on this Spark session"
    parser = add_command(commands, "doctor", summary=summary, example=_EXAMPLE, run=run)
    parser.add_argument(
        "--workers", metavar="N", type=int, help="number of workers that must fit (default: check every slot)"
    )
    parser.add_argument("--store", metavar="URI", help="a store to test, on the driver and on executors")


def run(options: argparse.Namespace) -> Report:
    """Run all checks; exit code 1 if one fails."""
    if options.workers is not None and options.workers < 1:
        raise ConfigError(f"Expected --workers as a whole number of at least 1; got {options.workers}.")
    found = list(diagnose(options.workers, options.store))
    wrong = sum(check.ok is False for check in found)
    blocks: list[Block] = [Table(["check", "", "found"], [[each.name, _WORDS[each.ok], each.found] for each in found])]
    advice = [f"{each.name}: {each.advice}" for each in found if each.advice]
    verdict = f"{wrong} of {len(found)} checks found a problem." if wrong else "No problems found."
    document = {"ok": not wrong, "checks": [asdict(each) for each in found]}
    return Report(document, [*blocks, *advice, verdict], exit_code=1 if wrong else 0)


def diagnose(workers: int | None, store: str | None) -> Iterator[Check]:
    """Run the checks in order, each of which needs the ones before it; stop when the rest cannot run.

    Args:
        workers: the number of workers that must fit; None checks every slot.
        store: URI of a store to test; None for none.
    """
    from dlspark.cli import checks
    from dlspark.cli.checks import Check
    from dlspark.registry import installed_engines
    from dlspark.spark import (
        PACKAGES,
        ask_executors,
        available_slots,
        cause,
        describe_process,
        get_session,
        is_local,
        local_cores,
    )

    yield checks.python()
    yield checks.backends()
    try:
        spark = get_session(workers or local_cores())
    except Exception as error:  # dlspark's own, or any of the JVM
        told = isinstance(error, DlsparkError)
        cure = str(error) if told else "Start a session with pyspark alone to see all of Spark's messages."
        yield Check("spark", False, "no session" if told else f"no session: {cause(error)}", cure)
        return
    yield from checks.cluster(spark, workers or 1)
    tasks = min(available_slots(spark), workers or sys.maxsize)
    if tasks < 1:
        return
    engines = [package for engine in installed_engines().values() for package in engine.packages]
    packages = (*PACKAGES, *_MORE_PACKAGES, *engines)
    try:
        found = ask_executors(spark, tasks, packages, at_once=True)
    except ConfigError as error:
        yield Check("executors", False, "no answer", str(error))
        return
    here = describe_process(packages)
    yield from checks.executors(found, here)
    if not all(each["versions"][DISTRIBUTION] for each in found):
        return
    yield checks.way_to_driver(spark, tasks)
    if store is not None:
        yield checks.store(spark, tasks, store)
    elif not is_local(spark):
        yield Check("store", None, "not checked", "Give --store URI to check that executors reach it.")
