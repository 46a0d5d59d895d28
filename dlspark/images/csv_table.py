"""CSV tables read through fsspec, whatever their delimiter, encoding and compression."""

from __future__ import annotations

import codecs
import csv
import io
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import fsspec

from dlspark.data import BLANKS
from dlspark.errors import ConfigError, DataError

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

logger = logging.getLogger(__name__)

_DELIMITERS = (",", ";", "\t", "|")
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_SAMPLE_BYTES = 1 << 20
_SAMPLE_ROWS = 100
_SPACED_QUOTES = re.compile(r'(\s+)"([^"]*)"\s*')  # csv takes quotes after a space for characters of the cell
_LONGEST_CELL = 2**31 - 1  # csv's own limit is 131,072 characters; a run-length encoded mask may be longer


@dataclass(frozen=True)
class _Form:
    """Where a table is and how it is written."""

    uri: str
    delimiter: str
    encoding: str


def check_form(delimiter: str | None, encoding: str | None) -> None:
    """Reject a delimiter or an encoding that does not exist.

    Raises:
        ConfigError: the delimiter is not one character, or Python does not know the encoding.
    """
    one = isinstance(delimiter, str) and len(_character(delimiter)) == 1
    if delimiter is not None and (not one or delimiter in '"\r\n'):
        raise ConfigError(
            f"Expected delimiter as one character, other than a quote or the end of a line, or 'tab'; got {delimiter!r}."
        )
    try:
        "".encode(encoding or "utf-8")  # codecs.lookup knows codecs that are not of text, such as base64
    except (LookupError, TypeError, ValueError) as error:
        raise ConfigError(f"Expected encoding as 'utf-8', 'latin-1', 'utf-16' or the like; got {encoding!r}.") from error


def read_csv(uri: str, spark: SparkSession, *, delimiter: str | None = None, encoding: str | None = None) -> DataFrame:
    """Read a CSV file with a header in one executor; all cells are text, and empty lines are skipped.

    Args:
        uri: a path or URI. fsspec decompresses ``.gz``, ``.bz2``, ``.xz`` and ``.zip``.
        spark: the session.
        delimiter: between cells; ``"tab"`` is a tab. None takes the one of comma, semicolon, tab and bar that fits.
        encoding: of the text. None takes UTF-8, or UTF-16 or UTF-32 if the file begins with its mark.

    Raises:
        ConfigError: see `check_form`.
        DataError: there is no such file; it has no header, or two columns of one name; the delimiter is ambiguous; or it has
            another encoding. Line and option are named. A wrong line fails the job that reads it.
    """
    from pyspark.sql.types import StringType, StructField, StructType

    check_form(delimiter, encoding)
    form, header = _examined(uri, delimiter and _character(delimiter), encoding)
    rows = spark.sparkContext.parallelize([form], 1).flatMap(_data_rows)
    return spark.createDataFrame(rows, StructType([StructField(name, StringType()) for name in header]))


def _character(delimiter: str) -> str:
    return "\t" if delimiter in ("tab", "\\t") else delimiter


def _examined(uri: str, delimiter: str | None, encoding: str | None) -> tuple[_Form, list[str]]:
    """The form of a file, and the names of its columns."""
    try:
        with _opened(uri) as file:
            start = file.read(_SAMPLE_BYTES)
    except FileNotFoundError as error:
        raise DataError(f"Expected a CSV file; got {uri!r}, which does not exist.") from error
    encoding = encoding or next((name for mark, name in _MARKS.items() if start.startswith(mark)), "utf-8")
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(start, final=len(start) < _SAMPLE_BYTES)
    except UnicodeError as error:
        raise _undecodable(uri, encoding) from error
    if "\0" in text:
        raise DataError(
            f"Expected text in {uri!r}; got null bytes. If it is UTF-16 without a mark, set the layout's option encoding to "
            "utf-16-le."
        )
    form = _Form(uri, delimiter or _sniffed(uri, text, cut=len(start) == _SAMPLE_BYTES), encoding)
    if (form.delimiter, encoding) != (",", "utf-8"):
        logger.info("%s: read with delimiter %r and encoding %s", uri, form.delimiter, encoding)
    header = [name.strip(BLANKS) for name in next(_cells(form, io.StringIO(text, newline="")), [])]
    # pandas writes its index as a column without a name.
    names = [name or f"column_{number}" for number, name in enumerate(header, start=1)]
    twice = [name for name in names if [other.lower() for other in names].count(name.lower()) > 1]
    if not any(header) or twice:  # Spark ignores the case of column names
        raise DataError(
            f"Expected a header with distinct column names in line 1 of {uri!r}; got {twice or header}. Correct that line."
        )
    return form, names


def _sniffed(uri: str, text: str, *, cut: bool) -> str:
    """The delimiter: the only one in the header, or the only one that gives all rows as many cells as the header.

    `csv.Sniffer` takes frequent letters for delimiters, and fails on files of one column.
    """
    fitting, possible = [], []
    for delimiter in _DELIMITERS:
        lengths: list[int] = []
        with suppress(DataError):  # in a row that the sample cuts, or that is read again with all others
            for row in islice(_cells(_Form(uri, delimiter, ""), io.StringIO(text, newline="")), _SAMPLE_ROWS):
                lengths.append(len(row))
        if cut and 1 < len(lengths) < _SAMPLE_ROWS:
            lengths.pop()
        if lengths and lengths[0] > 1:
            possible.append(delimiter)
            if set(lengths) == {lengths[0]}:
                fitting.append(delimiter)
    found = fitting if len(fitting) == 1 else possible
    if len(found) > 1:
        raise DataError(
            f"Expected one delimiter in line 1 of {uri!r}; got {' and '.join(map(repr, found))}. Set the layout's option "
            "delimiter."
        )
    return found[0] if found else ","


def _data_rows(form: _Form) -> Iterator[list[str]]:
    try:
        with _opened(form.uri) as file, io.TextIOWrapper(file, encoding=form.encoding, newline="") as lines:
            yield from islice(_cells(form, lines, checked=True), 1, None)
    except UnicodeError as error:
        raise _undecodable(form.uri, form.encoding) from error


def _cells(form: _Form, lines: Any, *, checked: bool = False) -> Iterator[list[str]]:
    """The rows with a text in any cell; ``checked``: all as long as the first."""
    # Strict: otherwise a quote that is never closed makes one cell of all further rows.
    reader = csv.reader(lines, delimiter=form.delimiter, strict=True)
    length = 0
    while True:
        first = reader.line_num + 1
        try:
            with _long_cells():
                row = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"Expected a row of CSV from line {first} of {form.uri!r}; got: {error}. Correct its quotes, or set the "
                f"layout's option delimiter, which is {form.delimiter!r}."
            ) from error
        if row is None:
            return
        if any(cell.strip(BLANKS) for cell in row):
            row = [match[1] + match[2] if (match := _SPACED_QUOTES.fullmatch(cell)) else cell for cell in row]
            length = length or len(row)
            if checked and len(row) != length:
                raise DataError(
                    f"Expected {length} cells in line {reader.line_num} of {form.uri!r}; got {len(row)}. Correct that line, "
                    f"or set the layout's option delimiter, which is {form.delimiter!r}."
                )
            yield row


@contextmanager
def _opened(uri: str) -> Iterator[Any]:
    try:
        with fsspec.open(uri, "rb", compression="infer") as file:
            yield file
    except (EOFError, OSError) as error:  # a damaged .gz is an OSError too
        if isinstance(error, FileNotFoundError):
            raise
        raise DataError(f"Expected a CSV file at {uri!r}; got: {error}.") from error


@contextmanager
def _long_cells() -> Iterator[None]:
    before = csv.field_size_limit(_LONGEST_CELL)  # of the process, so for no longer than one row
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _undecodable(uri: str, encoding: str) -> DataError:
    """The error, which names the line; the whole file is read again, as a decoder does not count lines."""
    with _opened(uri) as file:
        data = file.read()
    try:
        data.decode(encoding)
        line = 1
    except UnicodeDecodeError as error:
        line = data[: error.start].decode(encoding, "ignore").count("\n") + 1
    except UnicodeError:  # no mark
        line = 1
    return DataError(
        f"Expected text in {encoding} in {uri!r}; got other bytes in line {line}. Set the layout's option encoding, such as "
        "latin-1, cp1252 or utf-16."
    )
