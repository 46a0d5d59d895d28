"""Python 3.11 reads the directory of every zip archive on its path anew for each Spark task.

PySpark's worker calls ``importlib.invalidate_caches()`` when a task begins, and before Python 3.12 a zip importer does not
forget its directory then but reads it again at once: 0.1 to 0.2 s of CPU a task for pyspark.zip (python/cpython#103200,
fixed by python/cpython#103208; apache/spark#53518 asks less often). Needed until Python 3.12 is the oldest supported.
"""

from __future__ import annotations

import functools
import os
import sys
import weakref
import zipimport

# What each importer last read its archive as: (mtime in ns, bytes).
_read: weakref.WeakKeyDictionary[zipimport.zipimporter, tuple[int, int]] = weakref.WeakKeyDictionary()


def read_when_changed() -> None:
    """From now on this process reads an archive's directory again only when the file has changed; again is fine."""
    original = zipimport.zipimporter.invalidate_caches
    if sys.version_info >= (3, 12) or hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def invalidate_caches(self: zipimport.zipimporter) -> None:
        try:
            status = os.stat(self.archive)
        except OSError:  # gone, or inside another archive: as before
            original(self)
            return
        stamp = (status.st_mtime_ns, status.st_size)
        if _read.get(self) != stamp:
            original(self)
            _read[self] = stamp

    zipimport.zipimporter.invalidate_caches = invalidate_caches  # type: ignore[method-assign]
