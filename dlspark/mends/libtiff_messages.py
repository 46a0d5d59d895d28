"""libtiff writes what it finds damaged to stderr, and Pillow returns pixels as if nothing had happened.

libtiff continues after a bad code word in CCITT, LZW or PackBits data. Pillow has no interface to its error handler. Needed
until ``Image.load`` raises for what libtiff reports.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import threading
from collections.abc import Iterator

_REPORT = re.compile(r"(?:tempfile\.tif|Fax\w+|\w*Decode\w*|\w*TIFF\w*): (.+)")  # Pillow names each file tempfile.tif
_HARMLESS = re.compile(r"Warning, (?!Line length|Premature EOL)")  # of tags that nobody reads
_lock = threading.Lock()


@contextlib.contextmanager
def reported() -> Iterator[list[str]]:
    """Catch what libtiff reports about damaged pixels in the block; the list is complete after it.

    Anything else that this process writes to stderr meanwhile is written afterwards.
    """
    found: list[str] = []
    with _lock, tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield found
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            for line in file.read().decode(errors="backslashreplace").splitlines(keepends=True):
                report = _REPORT.match(line)
                if report is None:
                    os.write(2, line.encode(errors="replace"))
                elif not _HARMLESS.match(report[1]):
                    found.append(report[1].rstrip().rstrip("."))
