"""The files of a collection, at any depth, and which of them are images."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast
from urllib.parse import quote

import fsspec

from dlspark.errors import DataError
from dlspark.storage import OBJECT_STORES, Store, spelled

_JPEG = (".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".jif", ".pjpeg", ".pjp", ".mpo")
EXTENSIONS = (*_JPEG, ".png", ".apng", ".bmp", ".webp", ".tif", ".tiff")
"""File names that layouts treat as images. Once a file is read, only its content matters."""

HIDDEN = "hidden"
LOOP = "a link to a folder that holds it"
SPECIAL = "neither a file nor a folder"
BESIDE = "beside the class folders"
EMPTY = "a class folder without images"
MISNAMED = "an image by its content, of an unknown extension"

_MARKS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_START_BYTES = 18
# Folders that macOS, Synology, Windows and ext4 add. Those of Synology hold smaller copies of the images.
_OF_SYSTEMS = frozenset({"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"})
_CHANGED = ("ETag", "etag", "mtime", "LastModified", "last_modified")  # each file system has its own name for it
_AT_ONCE = 256


class Found(NamedTuple):
    """A file of a collection.

    Attributes:
        path: the local path or URI. A local path that is not UTF-8 becomes a percent-encoded ``file:`` URI.
        name: the path within the collection, percent-encoded if it is not UTF-8.
        passed_over: why it is not taken as an image; None for an image.
    """

    path: str
    name: str
    passed_over: str | None


def images(uri: str) -> Iterator[Found]:
    """Yield all files at any depth in a folder, in no fixed order; a hidden folder counts as one.

    Symbolic links are followed. A file with one of `EXTENSIONS` is an image, and a file without an extension if it begins
    as one. A link without a target is an image, too, so that it is rejected by name.

    Raises:
        DataError: a folder cannot be listed.
    """
    unknown = []
    for found in _files(uri):
        if found.passed_over is None and not is_image(found.name):
            unknown.append(found)
        else:
            yield found
    for start in range(0, len(unknown), _AT_ONCE):
        some = unknown[start : start + _AT_ONCE]
        for found, start_of in zip(some, _starts(uri, [each.path for each in some]), strict=True):
            yield found._replace(passed_over=_judged(_extension(found.name), start_of))


def stamps(uri: str) -> Iterator[tuple[str, int, Any]]:
    """Yield name, size and time or tag of the last change of all files at any depth, hidden ones excepted.

    Raises:
        DataError: a folder cannot be listed.
    """
    if not Store(uri).is_local:
        for name, about in _remote_entries(uri):
            if not any(_is_hidden(part) for part in name.split("/")):
                yield name, about["size"], next((about[word] for word in _CHANGED if word in about), "")
        return
    for found in _files(uri):
        if found.passed_over is None:
            try:
                status = os.stat(_readable(found.path))
            except OSError:  # a link without a target
                yield found.name, 0, ""
            else:
                yield found.name, status.st_size, status.st_mtime


def is_image(path: str) -> bool:
    """Whether a file has the extension of an image."""
    return path.lower().endswith(EXTENSIONS)


def subfolders(uri: str) -> tuple[list[str], list[Found]]:
    """The names of the folders in a folder, sorted, and the other entries, which are passed over.

    Raises:
        DataError: the folder cannot be listed, or a name is a link without a target, or is not UTF-8.
    """
    reasons = dict(_local_children(uri) if Store(uri).is_local else _remote_children(uri))
    folders = sorted(name for name, reason in reasons.items() if reason is None)
    return folders, [Found(f"{uri}/{name}", name, reason) for name, reason in reasons.items() if reason]


def _local_children(uri: str) -> Iterator[tuple[str, str | None]]:
    with _listing(uri):
        entries = list(os.scandir(uri))
    for entry in entries:
        kind = _kind(entry)
        if _is_hidden(entry.name):
            yield entry.name, HIDDEN
        elif kind is None and entry.is_symlink():
            target = os.readlink(entry.path)
            raise DataError(
                f"Expected a folder at {entry.path!r}; got a link to {target!r}, which does not exist. Correct or remove it."
            )
        elif not _is_utf8(entry.name):
            raise DataError(f"Expected names in UTF-8 in {uri!r}; got {os.fsencode(entry.name)!r}. Rename it.")
        elif kind == "folder" and entry.is_symlink() and _is_inside(os.path.realpath(uri), os.path.realpath(entry.path)):
            yield entry.name, LOOP
        else:
            yield entry.name, None if kind == "folder" else BESIDE


def _remote_children(uri: str) -> Iterator[tuple[str, str | None]]:
    filesystem, root = fsspec.core.url_to_fs(uri)
    filesystem.invalidate_cache()  # after `find`, s3fs 2026.9 does not list folders that are only marked
    with _listing(uri):
        entries = filesystem.ls(root, detail=True)
    for entry in entries:
        path = entry["name"].rstrip("/")
        name = path.rpartition("/")[2]
        if path != root:  # the empty object by which S3's console marks a folder
            yield name, HIDDEN if _is_hidden(name) else None if entry["type"] == "directory" else BESIDE


def _files(uri: str) -> Iterator[Found]:
    """All files; only reasons that need no look into the file are given."""
    return _local_files(uri) if Store(uri).is_local else _remote_files(uri)


def _local_files(root: str) -> Iterator[Found]:
    start = len(root.rstrip("/")) + 1
    # A folder, its real path once a link was followed, and the real folders in which links were followed on the way.
    pending: list[tuple[str, tuple[str, ...]]] = [(root, ())]
    while pending:
        folder, through = pending.pop()
        with _listing(folder):
            entries = list(os.scandir(folder))
        for entry in entries:
            reason, kind = None, _kind(entry)
            if _is_hidden(entry.name):
                reason = HIDDEN
            elif kind == "folder":
                if not entry.is_symlink():
                    pending.append((entry.path, through))
                    continue
                real, target = os.path.realpath(folder), os.path.realpath(entry.path)
                if not any(_is_inside(each, target) for each in (*through, real)):
                    pending.append((entry.path, (*through, real)))
                    continue
                reason = LOOP
            elif kind is None and not entry.is_symlink():
                reason = SPECIAL
            path = entry.path
            if path.isascii() or _is_utf8(path):
                yield Found(path, path[start:], reason)
            else:
                yield Found(f"file://{quote(os.fsencode(path))}", quote(os.fsencode(path[start:])), reason)


def _kind(entry: os.DirEntry[str]) -> str | None:
    """``"folder"`` or ``"file"``, of a link that of its target; None for a link without a target, or a pipe or device."""
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else None
    except OSError:  # a link to itself, or into a folder that cannot be read
        return None


def _remote_files(uri: str) -> Iterator[Found]:
    for name, about in _remote_entries(uri):
        reason = None
        if any(_is_hidden(part) for part in name.split("/")):
            reason = HIDDEN
        elif not about["size"] and not is_image(name):  # S3 has no first bytes of an empty object
            reason = _judged(_extension(name), b"")
        yield Found(f"{uri.rstrip('/')}/{name}", name, reason)


def _remote_entries(uri: str) -> Iterator[tuple[str, dict[str, Any]]]:
    filesystem, root = fsspec.core.url_to_fs(uri)
    with _listing(uri):
        if uri.partition("://")[0] in OBJECT_STORES:
            entries = filesystem.find(root, detail=True)  # all keys, in few requests
        else:
            folders = filesystem.walk(root, detail=True, on_error="raise")
            entries = {about["name"]: about for _, _, files in folders for about in files.values()}
    for path, about in entries.items():
        name = path[len(root) :].lstrip("/")
        if name and not name.endswith("/"):  # not the empty object by which S3's console marks a folder
            yield name, about


@contextmanager
def _listing(folder: str) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except NotADirectoryError as error:
        raise DataError(f"Expected a folder; got {folder!r}, which is a file, or in one.") from error
    except FileNotFoundError as error:
        raise DataError(f"Expected a folder; got {folder!r}, which does not exist.") from error
    except OSError as error:
        raise DataError(f"Expected a readable folder {folder!r}; got {error.strerror or error}.") from error


def _starts(uri: str, paths: Sequence[str]) -> Sequence[bytes | Exception]:
    """The first bytes of files."""
    if not Store(uri).is_local:
        filesystem = fsspec.core.url_to_fs(uri)[0]
        found = filesystem.cat_ranges(list(paths), [0] * len(paths), [_START_BYTES] * len(paths), on_error="return")
        return cast("Sequence[bytes | Exception]", found)
    starts: list[bytes | Exception] = []
    for path in paths:
        try:
            with open(_readable(path), "rb") as file:
                starts.append(file.read(_START_BYTES))
        except OSError as error:
            starts.append(error)
    return starts


def _readable(path: str) -> str:
    return spelled(path) if path.startswith("file:") else path


def _judged(extension: str, start: bytes | Exception) -> str | None:
    if isinstance(start, Exception):
        return None  # reading it as an image will say why it cannot be read
    if not begins_as_image(start):
        return f"not an image ({extension or 'no extension'})"
    # Not taken: a name.jpg_original or name.thm is a second copy, a .nef a TIFF that begins with a thumbnail.
    return f"{MISNAMED} ({extension})" if extension else None


def begins_as_image(start: bytes) -> bool:
    """Whether the first `_START_BYTES` of a file are those of `decode.FORMATS`."""
    if start.startswith(b"BM"):  # a short mark, so the size of the header is compared, too
        return int.from_bytes(start[14:18], "little") in {12, 16, 40, 52, 56, 64, 108, 124}
    return start.startswith(_MARKS) or (start.startswith(b"RIFF") and start[8:12] == b"WEBP")


def _extension(name: str) -> str:
    """A suffix that begins with a letter, such as ``.txt``; empty for ``scan.001``."""
    stem, _, suffix = name.rpartition("/")[2].rpartition(".")
    return f".{suffix.lower()}" if stem and re.fullmatch(r"[A-Za-z][\w~-]{0,15}", suffix) else ""


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _OF_SYSTEMS


def _is_inside(path: str, folder: str) -> bool:
    """Whether a real path is ``folder`` or in it."""
    return path == folder or path.startswith(f"{folder.rstrip('/')}/")


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # Python writes other bytes as surrogates
        return False
    return True
