"""The files of a collection, listed at any depth."""

from __future__ import annotations

import os
from collections.abc import Iterator

import fsspec

from dlspark.images.decode import EXTENSIONS
from dlspark.storage import Store


def walk(uri: str) -> Iterator[str]:
    """Yield the paths or URIs of all files at any depth in a folder, in no fixed order; hidden files are skipped."""
    if Store(uri).is_local:
        for folder, children, names in os.walk(uri):
            children[:] = [name for name in children if not name.startswith(".")]
            yield from (f"{folder}/{name}" for name in names if not name.startswith("."))
        return
    filesystem, root = fsspec.core.url_to_fs(uri)
    for path in filesystem.find(root):
        name = path[len(root) :].lstrip("/")
        if not any(part.startswith(".") for part in name.split("/")):
            yield f"{uri.rstrip('/')}/{name}"


def is_image(path: str) -> bool:
    """Whether a file has the extension of an image."""
    return path.lower().endswith(EXTENSIONS)
