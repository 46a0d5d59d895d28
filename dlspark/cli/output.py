"""The output of a command: tables for people or JSON for programs, alone on stdout."""

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
    """Names and values, one pair per line."""

    values: Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows with column names."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    title: str = ""


Block: TypeAlias = "Facts | Table | str"


@dataclass(frozen=True)
class Report:
    """The result of a command.

    Attributes:
        document: the result as plain data, for ``--format json``.
        blocks: the result for people; a str is a line of text.
        exit_code: the exit code of the process.
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
    """``value`` as JSON: tuples as lists, null for numbers that are not finite."""
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
        console = Console(file=stream, highlight=False, markup=False, emoji=False, width=100_000)  # no line is cut
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
            for place, column in enumerate(block.columns):
                cells = [row[place] for row in block.rows]
                numbers = all(isinstance(cell, int | float | None) and not isinstance(cell, bool) for cell in cells)
                grid.add_column(Text(column), justify="right" if numbers and cells else "left", overflow="fold")
            for row in block.rows:
                grid.add_row(*(Text(_text(cell)) for cell in row))
        with console.capture() as capture:
            console.print(grid)
        # rich pads lines with blanks, which programs would have to strip.
        stream.write("".join(line.rstrip() + "\n" for line in capture.get().splitlines()))


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
    """Yield the real stdout, and send the output of engines, frameworks and the JVM to stderr during the block."""
    results = sys.stdout
    with contextlib.ExitStack() as stack:
        if _descriptor(results) == 1:  # not if a test or a notebook has replaced stdout
            results.flush()
            kept = os.dup(1)
            results = stack.enter_context(os.fdopen(kept, "w", encoding=sys.stdout.encoding, errors="replace"))
            os.dup2(2, 1)
            stack.callback(os.dup2, kept, 1)
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield results


@contextlib.contextmanager
def logs_on_stderr(*, debug: bool) -> Iterator[None]:
    """Log dlspark's messages during the block; those of other loggers from warnings up, as by default in Python."""
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
    """False for the tracebacks that py4j logs by the root logger: it also raises those errors."""
    return "py4j" not in record.pathname


def _descriptor(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError, AttributeError):
        return None
