"""HostCache: this host's copies of remote files, one of each however many processes want it, in bounded space."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dlspark.errors import ConfigError, DataError, DlsparkError
from dlspark.storage.checksum import crc32_of

BOUND = "DLSPARK_CACHE_BYTES"
"""Environment variable: the most bytes the cache takes. Without it, half of what its disk holds."""

WAIT_SECONDS = 3600.0
"""How long a process waits for another one that copies the same file, before it gives up."""

_POLL_SECONDS = 0.05
_TEMPORARY = ".copying-"
_STALE_SECONDS = 24 * 3600.0  # a copy that nobody has touched for that long belongs to a process that is gone


class HostCache:
    """A folder of copies, shared by all processes of a host and user.

    Guarantees: a file appears whole and checked, or not at all. While one process copies a file the others that want it
    wait for that copy. When a new copy passes the bound, those unused for longest are removed; a process that has one
    mapped keeps reading it, and its space is freed when that process lets go.

    Args:
        folder: where; made if it is not there.
        max_bytes: the most bytes that all copies take together; by `BOUND`, or half the disk, when None.

    Raises:
        ConfigError: the environment's bound is no whole number of bytes.
    """

    def __init__(self, folder: Path, max_bytes: int | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.max_bytes = _bound(folder) if max_bytes is None else max_bytes

    @classmethod
    def of_user(cls) -> HostCache:
        """The cache in ``$XDG_CACHE_HOME/dlspark/files`` (``~/.cache/dlspark/files``)."""
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return cls(Path(home, "dlspark", "files"))

    def get(self, key: str, size: Callable[[], int], fetch: Callable[[Path], object], *, crc32: int | None = None) -> Path:
        """The copy called ``key``, fetched first if there is none.

        Args:
            key: a file name that stands for one content.
            size: gives its bytes; asked only when there is no copy.
            fetch: writes the file to the path that it is given.
            crc32: what the content must have (RFC 1952); None where that is not known.

        Raises:
            DataError: what was fetched has another size or CRC-32; it is not kept.
            ConfigError: the file alone is larger than the cache may be.
            DlsparkError: another process has been copying the file for `WAIT_SECONDS`.
        """
        path = self.folder / key
        if not self._touch(path):
            expected = size()
            if expected > self.max_bytes:
                raise ConfigError(
                    f"The copy of {key!r} takes {expected:,} bytes, and the cache in {str(self.folder)!r} may take "
                    f"{self.max_bytes:,}. Set {BOUND} to more, or XDG_CACHE_HOME to a larger disk."
                )
            with _locked(self.folder / f"{key}.lock"):
                if not self._touch(path):  # whoever held the lock may have copied it
                    self._copy(path, expected, fetch, crc32)
        return path

    def _copy(self, path: Path, size: int, fetch: Callable[[Path], object], crc32: int | None) -> None:
        self._make_room(size)
        temporary = self.folder / f"{_TEMPORARY}{uuid.uuid4().hex}"
        try:
            fetch(temporary)
            came = temporary.stat().st_size
            if came != size:
                raise DataError(f"Expected {size:,} bytes of {path.name!r}: {came:,} came. Try again, or prepare it again.")
            if crc32 is not None and (found := crc32_of(temporary)) != crc32:
                raise DataError(
                    f"Expected {path.name!r} to have the CRC-32 {crc32:08x}: what came has {found:08x}. It was damaged "
                    "where it lies or on the way. Try again, or prepare it again."
                )
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        """Remove what was unused for longest until ``size`` more bytes fit."""
        copies = []
        for entry in os.scandir(self.folder):
            try:
                status = entry.stat()
            except FileNotFoundError:  # another process made room
                continue
            if entry.name.startswith(_TEMPORARY) and status.st_mtime < time.time() - _STALE_SECONDS:
                Path(entry.path).unlink(missing_ok=True)
            elif not entry.name.endswith(".lock"):
                copies.append((status.st_mtime_ns, status.st_size, entry))
        total = sum(bytes_ for _, bytes_, _ in copies) + size
        for _, bytes_, entry in sorted(copies, key=lambda copy: copy[0]):
            if total <= self.max_bytes:
                return
            if not entry.name.startswith(_TEMPORARY):
                Path(entry.path).unlink(missing_ok=True)
                total -= bytes_

    def _touch(self, path: Path) -> bool:
        """Mark a copy as used now; whether there is one."""
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
        return True


def _bound(folder: Path) -> int:
    text = os.environ.get(BOUND)
    if text is None:
        return shutil.disk_usage(folder).total // 2
    if not text.isdigit() or not int(text):
        raise ConfigError(f"Expected {BOUND} as a whole number of bytes, such as 100000000000: received {text!r}.")
    return int(text)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold ``path`` against every other process of this host; the kernel frees it when the holder dies."""
    deadline = time.monotonic() + WAIT_SECONDS
    with path.open("w") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DlsparkError(
                        f"Another process has held {str(path)!r} for {WAIT_SECONDS:.0f} s to copy that file. Look "
                        "whether it still runs, and end it if it hangs."
                    ) from None
                time.sleep(_POLL_SECONDS)
        yield
