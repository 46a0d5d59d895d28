"""Store: the URI under which a run or a dataset lives.

A store is a folder: on this machine (``"runs/1"``), on a shared file system, or in an object store that fsspec knows
(``"s3://bucket/runs/1"``). A file appears in it whole or not at all. What is kept here is only the URI, so a store
travels to executors as a few hundred bytes; credentials come from the environment of whoever opens it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from dlspark.errors import ConfigError, DlsparkError, MissingDependencyError
from dlspark.storage.host_cache import HostCache

_TEMPORARY = ".dlspark-tmp-"
# A put to one of these is whole by itself; any other remote file system gets a temporary name and a rename.
_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci", "r2", "memory"})
_WITH_PASSWORD = re.compile(r"^[a-z0-9+.-]+://[^/@]*:[^/@]*@", re.IGNORECASE)


class StoreError(DlsparkError, OSError):
    """A file of a store cannot be read, written or found; the message names it."""


@dataclass(frozen=True)
class Store:
    """A folder named by a URI. Frozen, picklable, and equal to any other store of the same URI.

    Args:
        uri: a path, or a URI of any file system that fsspec knows. A local path becomes absolute; it need not exist.

    Raises:
        ConfigError: an empty URI, an unknown protocol, or one that carries a password or a signature: those would end
            up in logs and saved files, and belong in the environment.
        MissingDependencyError: the package that speaks this protocol is not installed.
    """

    uri: str

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        object.__setattr__(self, "uri", _normalise(os.fspath(uri)))

    @property
    def is_local(self) -> bool:
        """Whether it is a folder that this machine mounts, shared or not."""
        return "://" not in self.uri

    def child(self, *names: str) -> Store:
        """The store that is the folder ``names`` inside this one; it need not exist."""
        return Store(self._address("/".join(names))) if names else self

    def exists(self, name: str) -> bool:
        """Whether there is a file or folder ``name``."""
        return bool(self._filesystem().exists(self._address(name)))

    def list(self) -> tuple[str, ...]:
        """Names of the files and folders directly inside, sorted; empty when the store does not exist yet."""
        return tuple(sorted(name for name in self._names() if not name.startswith(_TEMPORARY)))

    def require(self, names: Iterable[str]) -> set[str]:
        """Check that this process sees the files that executors wrote; returns the names of all files.

        Raises:
            ConfigError: a file of ``names`` is missing here.
        """
        found = set(self.list())
        missing = set(names) - found
        if missing:
            raise ConfigError(
                f"Expected a store that the driver and all executors share; got {self.uri!r}, where the driver does not see "
                f"{min(missing)!r}, which an executor wrote. Use a shared folder or an object store."
            )
        return found

    def size(self, name: str) -> int:
        """Bytes of the file ``name``."""
        with self._explained("measure", name):
            return int(self._filesystem().size(self._address(name)))

    def read_bytes(self, name: str) -> bytes:
        """The whole content of the file ``name``."""
        with self._explained("read", name):
            return bytes(self._filesystem().cat_file(self._address(name)))

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write the file ``name``, replacing what is there: readers see the old content or the new, never a part."""
        with self._publishing(name, f"write {len(data):,} bytes to") as path:
            path.write_bytes(data)

    def read_json(self, name: str) -> Any:
        """The JSON document ``name``."""
        try:
            return json.loads(self.read_bytes(name))
        except ValueError as error:
            address = self._address(name)
            raise StoreError(f"Expected a JSON document in {address!r}, and it cannot be parsed: {error}.") from error

    def write_json(self, name: str, value: Any) -> None:
        """Write ``value`` as the JSON document ``name``, as whole as `write_bytes` does."""
        self.write_bytes(name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    def delete(self, name: str, *, missing_ok: bool = False) -> None:
        """Remove the file, or the folder with all it holds, called ``name``."""
        with self._explained("delete", name):
            try:
                self._filesystem().rm(self._address(name), recursive=True)
            except FileNotFoundError:
                if not missing_ok:
                    raise

    def delete_all(self) -> None:
        """Remove the store and everything in it; nothing happens when it does not exist."""
        with self._explained("delete", ""), suppress(FileNotFoundError):
            self._filesystem().rm(self.uri, recursive=True)

    def delete_unfinished(self) -> None:
        """Remove what writers left that were killed before their file was whole. Nobody may be writing."""
        for name in self._names():
            if name.startswith(_TEMPORARY):
                self.delete(name, missing_ok=True)

    def open_writer(self, name: str, *, size: int | None = None) -> AbstractContextManager[Path]:
        """Give a local path to write to; on success it is published as ``name`` in one step, otherwise removed.

        The content is on disk (fsync) before it gets its name, so a crash leaves the old file or the new one.

        Args:
            name: the file.
            size: about how many bytes it will have, for the message when it cannot be written.
        """
        return self._publishing(name, "write" if size is None else f"write {size:,} bytes to")

    @contextmanager
    def _publishing(self, name: str, verb: str) -> Iterator[Path]:
        address = self._address(name)
        with self._explained(verb, name):
            folder = Path(address).parent if self.is_local else Path(tempfile.gettempdir())
            folder.mkdir(parents=True, exist_ok=True)
            # The ending stays: some writers choose their format by it.
            temporary = folder / f"{_TEMPORARY}{uuid.uuid4().hex}{Path(name).suffix}"
            try:
                temporary.touch()
                yield temporary
                if self.is_local:
                    _sync(temporary)
                    os.replace(temporary, address)
                    _sync(folder)
                else:
                    self._upload(temporary, address)
            finally:
                temporary.unlink(missing_ok=True)

    def local_file(self, name: str, *, crc32: int | None = None) -> Path:
        """A path on this machine that holds the file ``name``; not to be written to.

        In a local store that is the file itself. A remote file is copied once per host into the `HostCache`, and again when
        the remote one has changed.

        Args:
            name: the file.
            crc32: what a copy must have (RFC 1952).
        """
        address = self._address(name)
        if self.is_local:
            path = Path(address)
            if not path.is_file():
                raise StoreError(f"Expected a file {address!r}: there is none. Was it moved, or written on another host?")
            return path
        with self._explained("copy", name):
            filesystem = self._filesystem()
            key = hashlib.sha256(f"{address}\n{filesystem.checksum(address)}".encode()).hexdigest()[:32]
            return HostCache.of_user().get(
                f"{key}-{name.rpartition('/')[2]}",
                lambda: int(filesystem.size(address)),
                lambda path: filesystem.get_file(address, str(path)),
                crc32=crc32,
            )

    def _names(self) -> set[str]:
        try:
            found = self._filesystem().ls(self.uri, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return set()
        return {str(path).rstrip("/").rpartition("/")[2] for path in found} - {""}

    def _upload(self, source: Path, address: str) -> None:
        filesystem = self._filesystem()
        parent, _, last = address.rpartition("/")
        if self.uri.partition("://")[0] in _OBJECT_STORES:
            filesystem.put_file(str(source), address)
            return
        filesystem.makedirs(parent, exist_ok=True)
        temporary = f"{parent}/{_TEMPORARY}{uuid.uuid4().hex}-{last}"
        filesystem.put_file(str(source), temporary)
        filesystem.mv(temporary, address)

    def _filesystem(self) -> Any:
        filesystem = _filesystem(self.uri)
        if not self.is_local:
            filesystem.invalidate_cache()  # what executors have written since must be seen
        return filesystem

    def _address(self, name: str) -> str:
        parts = name.split("/")
        if any(part in {"", ".", ".."} for part in parts):
            raise ConfigError(f"Expected a relative name inside the store, such as 'epoch-1/weights': received {name!r}.")
        return "/".join([self.uri.rstrip("/"), *parts])

    @contextmanager
    def _explained(self, verb: str, name: str) -> Iterator[None]:
        address = self._address(name) if name else self.uri
        try:
            yield
        except DlsparkError:
            raise
        except FileNotFoundError as error:
            raise StoreError(f"Cannot {verb} {address!r}: there is no such file.") from error
        except OSError as error:
            raise StoreError(f"Cannot {verb} {address!r}: {error}.") from error


def _normalise(uri: str) -> str:
    if not uri:
        raise ConfigError("Expected the URI of a folder, such as 'runs/1' or 's3://bucket/runs/1': received an empty one.")
    protocol, separator, rest = uri.partition("://")
    if not separator or protocol in {"file", "local"}:
        return os.path.abspath(os.path.expanduser(rest if separator else uri))
    if _WITH_PASSWORD.match(uri) or (protocol in {"http", "https"} and "?" in rest):
        raise ConfigError(
            f"A {protocol} URI with a password or a signature in it would end up in logs and saved files. "
            "Give the plain URI, and the credentials by environment or by fsspec's configuration."
        )
    if not rest.strip("/"):
        raise ConfigError(f"Expected a folder inside {uri!r}, such as '{protocol}://bucket/runs/1'.")
    _filesystem(uri)
    return uri.rstrip("/")


def _filesystem(uri: str) -> Any:
    """The fsspec file system of ``uri``; fsspec keeps one per process and protocol."""
    try:
        return fsspec.core.url_to_fs(uri)[0]
    except ImportError as error:
        raise MissingDependencyError(f"The store {uri!r} needs a package that is not installed: {error}.") from error
    except ValueError as error:
        raise ConfigError(f"Expected a local path or a URI that fsspec knows: received {uri!r} ({error}).") from error


def _sync(path: Path) -> None:
    """Have the kernel write a file, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
