"""The spellings of a path or URI, as people, pathlib, Spark and fsspec write them."""

from __future__ import annotations

import os
import re
from urllib.parse import unquote_to_bytes

import fsspec

from dlspark.errors import ConfigError

OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci", "r2"})
"""Protocols whose URIs begin with a bucket or container."""

_LOCAL = frozenset({"file", "local"})
_HOST_OR_PATH = frozenset({"hdfs", "arrow_hdfs", "viewfs", "webhdfs"})  # after one slash, either may follow
_INSTEAD = {"s3n": "s3", "wasb": "abfs", "wasbs": "abfss"}  # Hadoop's, which fsspec does not know
_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(/*)(.*)", re.DOTALL)  # two letters or more: C: is a drive
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]")


def spelled(uri: str) -> str:
    """A path or URI in its one spelling: a plain local path, or ``protocol://…``.

    ``file:`` URIs become paths (see `local_path`). pathlib's ``s3:/bucket/a`` becomes ``s3://bucket/a``. Plain paths and
    chained URIs of fsspec are returned as they are.

    Raises:
        ConfigError: the spelling has no meaning here, or two; the message says what to write.
    """
    if _WINDOWS.match(uri):
        raise ConfigError(f"Expected a path or a URI; got {uri!r}, a path of Windows. Write the path on this machine.")
    match = _URI.match(uri)
    if match is None or ("::" in uri and "://" in uri):
        return uri
    scheme, slashes, rest = match[1].lower(), len(match[2]), match[3]
    if scheme in _LOCAL:
        return local_path(uri)
    if scheme == "dbfs" and (slashes or rest):
        mounted = f"/{rest}" if rest.startswith("Volumes/") else f"/dbfs/{rest}"
        raise ConfigError(f"Expected a mounted path; got {uri!r}. Write {mounted!r}, where Databricks mounts it.")
    if slashes == 0:
        if scheme in OBJECT_STORES | _HOST_OR_PATH | set(_INSTEAD):
            raise ConfigError(f"Expected '{scheme}://…'; got {uri!r}. Write '{scheme}://{rest}', or './{uri}' for a path.")
        return uri
    if scheme in _INSTEAD:
        raise ConfigError(f"Expected a protocol that fsspec supports; got {uri!r}. Write '{_INSTEAD[scheme]}://{rest}'.")
    if slashes == 1 and scheme in _HOST_OR_PATH:
        raise ConfigError(
            f"Expected {scheme}://HOST:PORT/PATH or {scheme}:///PATH; got {uri!r}, which may be either. Write all slashes, "
            "and give it as text: pathlib drops one."
        )
    if slashes > 2 and scheme in OBJECT_STORES:
        raise ConfigError(f"Expected a bucket or container in the URI; got {uri!r}. Write '{scheme}://{rest}'.")
    return f"{scheme}:{match[2] if slashes > 1 else '//'}{rest}"


def local_path(uri: str) -> str:
    """The path of a ``file:`` URI, with one to three slashes or the host ``localhost``.

    A URI is percent-encoded: ``Path.as_uri()``, ``input_file_name()`` and ``_metadata.file_path`` write ``a%20b``. Paths of
    Spark's ``binaryFile`` are not, so if only the path as written exists, that is the one.

    Raises:
        ConfigError: a relative path, another host, or both paths exist.
    """
    rest = uri.partition(":")[2]
    host, slash, path = rest[2:].partition("/") if rest.startswith("//") else ("", rest[:1], rest[1:])
    if slash != "/":
        raise ConfigError(f"Expected an absolute path in a file: URI; got {uri!r}. Write the path alone, or file:///PATH.")
    if host.lower() not in {"", "localhost"}:
        raise ConfigError(f"Expected a file on this machine; got {uri!r}, on {host!r}. Write file:///PATH.")
    written = "/" + path.lstrip("/")
    decoded = os.fsdecode(unquote_to_bytes(os.fsencode(written)))
    if decoded == written or not os.path.lexists(written):
        return decoded
    if os.path.lexists(decoded):
        raise ConfigError(f"Expected one file for {uri!r}; got two, {written!r} and {decoded!r}. Write the path alone.")
    return written


def check_path(path: str) -> str:
    """An absolute local path that was not meant as a URI.

    Raises:
        ConfigError: a folder of it is named like the start of a URI, or like a home that does not exist.
    """
    if path.startswith("~") and (path := os.path.expanduser(path)).startswith("~"):
        raise ConfigError(f"Expected the home of a user; got {path!r}, who is unknown here. Write './{path}' for a path.")
    path = os.path.abspath(path)
    for part in path.split("/"):
        if part.endswith(":") and (part[:-1].lower() in fsspec.available_protocols() or part[:-1].lower() in _INSTEAD):
            raise ConfigError(
                f"Expected a local path; got {path!r}, where {part!r} is the start of a URI. Write the URI as text: pathlib "
                "and os.path make it a path."
            )
    return path
