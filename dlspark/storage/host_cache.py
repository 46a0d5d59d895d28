"""HostCache: one local copy of each remote file per host, in a cache of limited size."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dlspark.errors import ConfigError, DataError, DlsparkError
from dlspark.storage.checksum import crc32_of

BOUND = "DLSPARK_CACHE_BYTES"
"""Environment variable: the maximum size of the cache in bytes. The default is half of its disk."""

WAIT_SECONDS = 3600.0
"""How long a process waits for another process that copies the same file."""

OF_THE_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG})
"""Errors of a local disk, never of a remote store."""

_POLL_SECONDS = 0.05
_TEMPORARY = ".copying-"
_STALE_SECONDS = 24 * 3600.0  # a copy in progress that is older belongs to a dead process


class CacheError(DlsparkError, OSError):
    """The cache of this host cannot be used: its folder is not writable, or its disk is full. The data may be intact."""


class HostCache:
    """A folder of copies, shared by all processes of a host and user.

    Guarantees: a copy appears complete and verified, or not at all. While one process copies a file, others wait for that
    copy. When a new copy exceeds the limit, the least recently used copies are removed; a process that has mapped one can
    still read it, and its space is freed when that process closes it.

    Args:
        folder: the folder; created if missing.
        max_bytes: the maximum size of all copies; None for the value of `BOUND`, or half of the disk.

    Raises:
        ConfigError: `BOUND` is not a whole number of bytes.
        CacheError: the folder cannot be created.
    """

    def __init__(self, folder: Path, max_bytes: int | None = None) -> None:
        with _explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self.folder = folder
            self.max_bytes = _bound(folder) if max_bytes is None else max_bytes

    @classmethod
    def of_user(cls) -> HostCache:
        """The cache in ``$XDG_CACHE_HOME/dlspark/files`` (``~/.cache/dlspark/files``)."""
        try:
            home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        except RuntimeError as error:  # a user without an entry in the passwords' file, as in some containers
            raise CacheError(
                f"Expected a home for the cache of remote files; got none on {socket.gethostname()}: {error} Set "
                "XDG_CACHE_HOME to a folder."
            ) from error
        return cls(Path(home, "dlspark", "files"))

    def get(self, key: str, size: Callable[[], int], fetch: Callable[[Path], object], *, crc32: int | None = None) -> Path:
        """The copy called ``key``, fetched if missing.

        Args:
            key: a file name that identifies the content.
            size: returns the size in bytes; called only if there is no copy.
            fetch: writes the file to the given path.
            crc32: the expected CRC-32 (RFC 1952); None if unknown.

        Raises:
            DataError: the fetched file has another size or CRC-32; it is removed.
            ConfigError: the file is larger than the cache.
            CacheError: the cache cannot be written. Errors of ``fetch`` that are not of the disk are raised as they are.
            DlsparkError: another process has been copying the file for `WAIT_SECONDS`.
        """
        path = self.folder / key
        if not self._touch(path):
            expected = size()
            if expected > self.max_bytes:
                raise ConfigError(
                    f"Expected a file of at most {self.max_bytes:,} bytes for the cache in {str(self.folder)!r}; got "
                    f"{expected:,} bytes in {key!r}. Set {BOUND} to more, or XDG_CACHE_HOME to a larger disk."
                )
            with _locked(self.folder / f"{key}.lock"):
                if not self._touch(path):  # the holder of the lock may have copied it
                    self._copy(path, expected, fetch, crc32)
        return path

    def _copy(self, path: Path, size: int, fetch: Callable[[Path], object], crc32: int | None) -> None:
        temporary = self.folder / f"{_TEMPORARY}{uuid.uuid4().hex}"
        with _explained(self.folder):
            self._make_room(size)
            temporary.touch()
        try:
            try:
                fetch(temporary)
            except OSError as error:
                if error.errno in OF_THE_DISK:
                    raise _trouble(self.folder, error) from error
                raise
            copied = temporary.stat().st_size
            if copied != size:
                raise DataError(f"Expected {size:,} bytes in {path.name!r}; got {copied:,}. Try again, or prepare it again.")
            if crc32 is not None and (found := crc32_of(temporary)) != crc32:
                raise DataError(
                    f"Expected the CRC-32 {crc32:08x} for {path.name!r}; got {found:08x}: the file is damaged, in the store "
                    "or by the copy. Try again, or prepare it again."
                )
            with _explained(self.folder):
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        """Remove the least recently used copies until ``size`` more bytes fit."""
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
        """Mark a copy as used now; returns whether it exists."""
        with _explained(self.folder):
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
        raise ConfigError(f"Expected {BOUND} as a whole number of bytes, such as 100000000000; got {text!r}.")
    return int(text)


def _trouble(folder: Path, error: OSError) -> CacheError:
    return CacheError(
        f"The cache of remote files {str(folder)!r} on {socket.gethostname()} cannot be used: {error.strerror or error}. "
        f"Set XDG_CACHE_HOME to a folder that this user can write, on a disk with room, or {BOUND} to a smaller size."
    )


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _trouble(folder, error) from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lock ``path`` against all other processes of this host; the kernel releases the lock when the holder dies."""
    deadline = time.monotonic() + WAIT_SECONDS
    with _explained(path.parent):
        handle = path.open("w")
    with handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DlsparkError(
                        f"Expected another process to copy a file within {WAIT_SECONDS:.0f} s; it still holds "
                        f"{str(path)!r}. End that process if it hangs."
                    ) from None
                time.sleep(_POLL_SECONDS)
        yield
