"""Read image files, local or remote, through fsspec."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import unquote

import fsspec

from dlspark.errors import ConfigError
from dlspark.storage import spelled

MAX_FILE_BYTES = 512 * 2**20
"""Larger files are rejected without reading: no image of `decode.MAX_PIXELS` needs more."""

READ_AT_ONCE = 16
"""The number of remote files fetched concurrently, to hide the latency of the store."""


def read_files(paths: Sequence[str | None]) -> Iterator[tuple[bytes | None, str]]:
    """Yield the content of each file, or None and the reason why it cannot be read.

    Args:
        paths: local paths, or URIs that fsspec supports, also as Spark and pathlib write them: ``file:/a%20b``.
    """
    for start in range(0, len(paths), READ_AT_ONCE):
        some = [_known(path) for path in paths[start : start + READ_AT_ONCE]]
        remote = [path for path, _ in some if "://" in path]
        fetched = {}
        if remote:
            with ThreadPoolExecutor(READ_AT_ONCE) as pool:
                fetched = dict(zip(remote, pool.map(_fetch, remote), strict=True))
        for path, reason in some:
            yield (None, reason) if reason else fetched[path] if path in fetched else _read_file(path)


def _known(path: str | None) -> tuple[str, str]:
    """A path or URI in the spelling that can be read; or a reason why there is none."""
    if not path:
        return "", "there is no path"
    try:
        return spelled(path), ""
    except ConfigError as error:
        return "", f"cannot be read: {error}"


def _read_file(path: str) -> tuple[bytes | None, str]:
    try:
        with open(path, "rb", opener=_open) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                return None, "cannot be read: not a regular file"
            if status.st_size > MAX_FILE_BYTES:
                return None, f"{status.st_size:,} bytes are more than the {MAX_FILE_BYTES:,} allowed"
            return file.read(), ""
    except OSError as error:
        return None, f"cannot be read: {error.strerror or error}"
    except ValueError as error:  # a null byte
        return None, f"cannot be read: {error}"


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # or a named pipe would wait for a writer


def _fetch(path: str) -> tuple[bytes | None, str]:
    try:
        filesystem, bare = fsspec.core.url_to_fs(path)
        try:
            return bytes(filesystem.cat_file(bare)), ""
        except FileNotFoundError:
            # Keys are not encoded, but Spark encodes them in _metadata.file_path.
            if unquote(bare) == bare:
                raise
            return bytes(filesystem.cat_file(unquote(bare))), ""
    except Exception as error:  # clients raise their own classes; an error in one file must not affect others
        return None, f"cannot be read: {type(error).__name__}: {error}"
