"""``dlspark doctor``: would a training work here? Looks at Java, Spark, the executors, the store and the way back."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dlspark.cli.arguments import add_command
from dlspark.cli.output import Block, Report, Table
from dlspark.errors import ConfigError, DlsparkError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from dlspark.cli.checks import Check

_EXAMPLE = """
dlspark doctor --workers 2 --store runs
spark-submit --master spark://host:7077 \\
    "$(python -c 'import dlspark; print(*dlspark.__path__)')/__main__.py" doctor --workers 6 --store s3://bucket/runs
"""
# Beside those that every training needs: which engine will be used is not known here.
_MORE_PACKAGES = ("jax", "torch", "pandas", "horovod", "elephas", "spark-tensorflow-distributor")
_WORDS = {True: "ok", False: "WRONG", None: "note"}


def add_parser(commands: Any) -> None:
    """Add ``doctor``."""
    summary = "check that a training would work here, on this Spark session"
    parser = add_command(commands, "doctor", summary=summary, example=_EXAMPLE, run=run)
    parser.add_argument("--workers", metavar="N", type=int, help="how many must fit (default: look at every slot)")
    parser.add_argument("--store", metavar="URI", help="a store to write to and read from, here and on executors")


def run(options: argparse.Namespace) -> Report:
    """Look at everything; exit code 1 when something is wrong."""
    if options.workers is not None and options.workers < 1:
        raise ConfigError(f"Expected --workers as a whole number of at least 1; got {options.workers}.")
    found = list(diagnose(options.workers, options.store))
    wrong = sum(check.ok is False for check in found)
    blocks: list[Block] = [Table(["check", "", "found"], [[each.name, _WORDS[each.ok], each.found] for each in found])]
    advice = [f"{each.name}: {each.advice}" for each in found if each.advice]
    verdict = f"{wrong} of {len(found)} checks found something wrong." if wrong else "Nothing wrong was found."
    document = {"ok": not wrong, "checks": [asdict(each) for each in found]}
    return Report(document, [*blocks, *advice, verdict], exit_code=1 if wrong else 0)


def diagnose(workers: int | None, store: str | None) -> Iterator[Check]:
    """All checks, in the order in which one builds on another; it ends where the rest cannot be looked at.

    Args:
        workers: how many must fit; None looks at as many as there are slots.
        store: URI of a store to try; None tries none.
    """
    from dlspark.cli import checks
    from dlspark.cli.checks import Check
    from dlspark.spark import preflight

    yield checks.python()
    yield checks.backends()
    try:
        spark = _session(workers)
    except Exception as error:  # ours say what to do; the JVM has many of its own
        told = isinstance(error, DlsparkError)
        cure = str(error) if told else "Start a session with pyspark alone, to see all that Spark says."
        yield Check("spark", False, "no session" if told else f"no session: {preflight.cause(error)}", cure)
        return
    yield from checks.cluster(spark, workers or 1)
    from dlspark.spark import available_slots, is_local

    tasks = min(available_slots(spark), workers or sys.maxsize)
    if tasks < 1:
        return
    packages = (*preflight.PACKAGES, *_MORE_PACKAGES)
    try:
        found = preflight.ask_executors(spark, tasks, packages, at_once=True)
    except ConfigError as error:
        yield Check("executors", False, "no answer", str(error))
        return
    here = preflight.describe_process(packages)
    yield from checks.executors(found, here)
    if not all(each["versions"]["dlspark"] for each in found):
        return
    yield checks.way_to_driver(spark, tasks)
    if store is not None:
        yield checks.store(spark, tasks, store)
    elif not is_local(spark):
        yield Check("store", None, "not looked at", "Give --store URI to see whether the executors reach it.")


def _session(workers: int | None) -> SparkSession:
    from dlspark.spark import get_session, local_cores

    return get_session(workers or local_cores())
