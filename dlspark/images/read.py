"""Read image files, local or remote, through fsspec."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import fsspec

MAX_FILE_BYTES = 512 * 2**20
"""Larger files are rejected without reading: no image of `decode.MAX_PIXELS` needs more."""

READ_AT_ONCE = 16
"""The number of remote files fetched concurrently, to hide the latency of the store."""


def read_files(paths: Sequence[str | None]) -> Iterator[tuple[bytes | None, str]]:
    """Yield the content of each file, or None and the reason why it cannot be read.

    Args:
        paths: local paths, also as Spark writes them (``file:/…``), or URIs that fsspec supports.
    """
    for start in range(0, len(paths), READ_AT_ONCE):
        some = [_local(path) if path and path.startswith("file:") else path for path in paths[start : start + READ_AT_ONCE]]
        remote = [path for path in some if path and "://" in path]
        fetched = {}
        if remote:
            with ThreadPoolExecutor(READ_AT_ONCE) as pool:
                fetched = dict(zip(remote, pool.map(_fetch, remote), strict=True))
        for path in some:
            if not path:
                yield None, "there is no path"
            else:
                yield fetched[path] if path in fetched else _read_file(path)


def _read_file(path: str) -> tuple[bytes | None, str]:
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_FILE_BYTES:
                return None, f"{size:,} bytes are more than the {MAX_FILE_BYTES:,} allowed"
            return file.read(), ""
    except OSError as error:
        return None, f"cannot be read: {error.strerror or error}"
    except ValueError as error:  # a null byte
        return None, f"cannot be read: {error}"


def _fetch(path: str) -> tuple[bytes | None, str]:
    try:
        filesystem, bare = fsspec.core.url_to_fs(path)
        return bytes(filesystem.cat_file(bare)), ""
    except Exception as error:  # clients raise their own classes; an error in one file must not affect others
        return None, f"cannot be read: {type(error).__name__}: {error}"


def _local(uri: str) -> str:
    """The local path of a URI. Hadoop writes both ``file:/a`` and ``file:///a``, and escapes nothing."""
    return "/" + uri.removeprefix("file:").lstrip("/")
