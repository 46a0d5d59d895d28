"""What a command says in the end: tables for people or JSON for programs, alone on stdout."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO, TypeAlias


@dataclass(frozen=True)
class Facts:
    """Names and values, one pair a line."""

    values: Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows under column names."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    title: str = ""


Block: TypeAlias = "Facts | Table | str"


@dataclass(frozen=True)
class Report:
    """A command's result.

    Attributes:
        document: all of it as plain data, for ``--format json``.
        blocks: the same for people; a str is a line of text.
        exit_code: of the process.
    """

    document: Any
    blocks: Sequence[Block]
    exit_code: int = 0


def write(report: Report, form: str, stream: TextIO) -> None:
    """Write ``report`` to ``stream`` as ``"table"`` or ``"json"``."""
    if form == "json":
        stream.write(json.dumps(plain(report.document), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    else:
        _write_tables(report.blocks, stream)
    stream.flush()


def plain(value: Any) -> Any:
    """``value`` as JSON can hold it: tuples as lists, and null for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _write_tables(blocks: Sequence[Block], stream: TextIO) -> None:
    from rich import box, table
    from rich.console import Console
    from rich.text import Text

    console = Console(file=stream, highlight=False, markup=False, emoji=False)
    terminal = console.is_terminal
    if not terminal:
        console = Console(file=stream, highlight=False, markup=False, emoji=False, width=100_000)  # nothing is cut
    for number, block in enumerate(blocks):
        if number and not (isinstance(block, str) and isinstance(blocks[number - 1], str)):
            console.print()
        if isinstance(block, str):
            console.print(Text(block), soft_wrap=True)
            continue
        if isinstance(block, Facts):
            grid = table.Table.grid(padding=(0, 2))
            grid.add_column(no_wrap=True, style="dim")
            grid.add_column(overflow="fold")
            for name, value in block.values.items():
                grid.add_row(Text(name), Text(_text(value)))
        else:
            if block.title:
                console.print(Text(block.title, style="bold"))
            grid = table.Table(box=box.SIMPLE_HEAD if terminal else None, pad_edge=False, padding=(0, 2, 0, 0))
            for column, cells in zip(block.columns, _columns(block), strict=True):
                numbers = all(isinstance(cell, int | float | None) and not isinstance(cell, bool) for cell in cells)
                grid.add_column(Text(column), justify="right" if numbers and cells else "left", overflow="fold")
            for row in block.rows:
                grid.add_row(*(Text(_text(cell)) for cell in row))
        with console.capture() as capture:
            console.print(grid)
        # rich fills lines up with blanks, which a program that reads them would have to strip.
        stream.write("".join(line.rstrip() + "\n" for line in capture.get().splitlines()))


def _columns(block: Table) -> list[list[Any]]:
    return [[row[number] for row in block.rows] for number in range(len(block.columns))]


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(_text(item) for item in value)
    return str(value)


@contextlib.contextmanager
def stdout_for_results() -> Iterator[TextIO]:
    """Give the true stdout, and send to stderr what others print meanwhile: engines, frameworks, the JVM."""
    results = sys.stdout
    with contextlib.ExitStack() as stack:
        if _descriptor(results) == 1:  # not where a test or a notebook has put something else in its place
            results.flush()
            kept = os.dup(1)
            results = stack.enter_context(os.fdopen(kept, "w", encoding=sys.stdout.encoding, errors="replace"))
            os.dup2(2, 1)
            stack.callback(os.dup2, kept, 1)
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield results


@contextlib.contextmanager
def logs_on_stderr(*, debug: bool) -> Iterator[None]:
    """Show dlspark's log lines for the length of a block; those of others from warnings up, as is Python's default."""
    logger = logging.getLogger("dlspark")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s" if debug else "%(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    root = logging.getLogger()
    if not debug:
        root.addFilter(_not_of_py4j)
    try:
        yield
    finally:
        root.removeFilter(_not_of_py4j)
        logger.removeHandler(handler)
        logger.setLevel(level)


def _not_of_py4j(record: logging.LogRecord) -> bool:
    """False for the tracebacks that py4j logs, by the root logger, of errors that it raises as well."""
    return "py4j" not in record.pathname


def _descriptor(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError, AttributeError):
        return None
