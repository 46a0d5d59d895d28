"""Python 3.11 rereads the directory of every zip archive on its path for each Spark task.

PySpark's worker calls ``importlib.invalidate_caches()`` at the start of a task. Before Python 3.12 a zip importer then
rereads its directory at once, which takes 0.1 to 0.2 s of CPU per task for pyspark.zip (python/cpython#103200, fixed by
python/cpython#103208; apache/spark#53518 reduces the calls). Needed until Python 3.12 is the oldest supported version.
"""

from __future__ import annotations

import functools
import os
import sys
import weakref
import zipimport

# (mtime in ns, size in bytes) of each importer's archive when it was last read.
_read: weakref.WeakKeyDictionary[zipimport.zipimporter, tuple[int, int]] = weakref.WeakKeyDictionary()


def read_when_changed() -> None:
    """Make this process reread an archive's directory only if the file has changed. May be called repeatedly."""
    original = zipimport.zipimporter.invalidate_caches
    if sys.version_info >= (3, 12) or hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def invalidate_caches(self: zipimport.zipimporter) -> None:
        try:
            status = os.stat(self.archive)
        except OSError:  # deleted, or inside another archive
            original(self)
            return
        stamp = (status.st_mtime_ns, status.st_size)
        if _read.get(self) != stamp:
            original(self)
            _read[self] = stamp

    zipimport.zipimporter.invalidate_caches = invalidate_caches  # type: ignore[method-assign]
