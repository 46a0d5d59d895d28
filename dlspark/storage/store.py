"""Store: the folder of a run or a dataset, named by a URI.

The folder is on this machine (``"runs/1"``), on a shared file system, or in an object store that fsspec supports
(``"s3://bucket/runs/1"``). Files are written atomically. A `Store` holds only the URI, so it is sent to executors in a few
hundred bytes; each process takes credentials from its environment.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from dlspark.errors import ConfigError, DlsparkError, MissingDependencyError
from dlspark.storage.address import OBJECT_STORES, check_path, spelled
from dlspark.storage.host_cache import OF_THE_DISK, HostCache

_TEMPORARY = ".dlspark-tmp-"
# A put to one of these is atomic. Other remote file systems get a temporary name and a rename.
_ATOMIC = OBJECT_STORES | {"memory"}
_WITH_PASSWORD = re.compile(r"^[a-z0-9+.-]+://[^/@]*:[^/@]*@", re.IGNORECASE)


class StoreError(DlsparkError, OSError):
    """A file of a store cannot be read, written or found; the message names it."""


@dataclass(frozen=True)
class Store:
    """A folder named by a URI. Frozen, picklable, and equal to other stores of the same URI.

    Args:
        uri: a path, or a URI of a file system that fsspec supports, in any spelling of `address.spelled`. A local path
            becomes absolute; it need not exist.

    Raises:
        ConfigError: the URI is empty, has an unknown protocol, is misspelled, or contains a password or a signature, which
            would end up in logs and saved files.
        MissingDependencyError: the package for this protocol is not installed.
    """

    uri: str

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        if not isinstance(uri, str | os.PathLike):
            raise ConfigError(f"Expected the path or URI of a folder, such as 'runs/1'; got {uri!r}.")
        object.__setattr__(self, "uri", _normalise(os.fspath(uri)))

    @property
    def is_local(self) -> bool:
        """Whether it is a folder in a mounted file system, shared or not."""
        return "://" not in self.uri

    def child(self, *names: str) -> Store:
        """The folder ``names`` in this store, as a store; it need not exist."""
        return Store(self._address("/".join(names))) if names else self

    def exists(self, name: str) -> bool:
        """Whether the file or folder ``name`` exists.

        Raises:
            StoreError: it cannot be told, for lack of a permission or a network.
        """
        address = self._address(name)
        with self._explained("look for", name):
            try:
                os.stat(address) if self.is_local else self._filesystem().info(address)
            except (FileNotFoundError, NotADirectoryError):
                return False
            return True

    def list(self) -> tuple[str, ...]:
        """Sorted names of the files and folders in the store; empty if the store does not exist."""
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
        """The size of the file ``name`` in bytes."""
        with self._explained("measure", name):
            return int(self._filesystem().size(self._address(name)))

    def read_bytes(self, name: str) -> bytes:
        """The content of the file ``name``."""
        with self._explained("read", name):
            return bytes(self._filesystem().cat_file(self._address(name)))

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write the file ``name`` atomically: readers see the old content or the new."""
        with self.open_writer(name, size=len(data)) as path:
            path.write_bytes(data)

    def read_json(self, name: str) -> Any:
        """The JSON document ``name``."""
        try:
            return json.loads(self.read_bytes(name))
        except ValueError as error:
            address = self._address(name)
            raise StoreError(f"Expected a JSON document in {address!r}; got other content ({error}).") from error

    def write_json(self, name: str, value: Any) -> None:
        """Write ``value`` as the JSON document ``name`` atomically."""
        self.write_bytes(name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    def delete(self, name: str, *, missing_ok: bool = False) -> None:
        """Remove the file ``name``, or the folder with its content."""
        with self._explained("delete", name):
            try:
                self._remove(self._address(name))
            except FileNotFoundError:
                if not missing_ok:
                    raise

    def delete_all(self) -> None:
        """Remove the store with its content, if it exists. A link, a mount and the working folder are only emptied."""
        with self._explained("delete", ""), suppress(FileNotFoundError):
            if not self.is_local:
                self._remove(self.uri)
                return
            for name in self._names():
                self.delete(name, missing_ok=True)
            if os.path.realpath(self.uri) != os.getcwd():
                with suppress(OSError):
                    os.rmdir(self.uri)

    def delete_unfinished(self) -> None:
        """Remove the temporary files of killed writers. No process may be writing."""
        for name in self._names():
            if name.startswith(_TEMPORARY):
                self.delete(name, missing_ok=True)

    @contextmanager
    def open_writer(self, name: str, *, size: int | None = None) -> Iterator[Path]:
        """Yield a local path to write to. On success it is published atomically as ``name``, otherwise removed.

        The content is synced to disk before it gets its name, so a crash leaves the old file or the new one.

        Args:
            name: the file.
            size: the approximate size in bytes, for the error message.
        """
        address = self._address(name)
        with self._explained("write" if size is None else f"write {size:,} bytes to", name, callers_code=True):
            folder = Path(address).parent if self.is_local else Path(tempfile.gettempdir())
            folder.mkdir(parents=True, exist_ok=True)
            # Keep the suffix: some writers choose the format by it.
            temporary = folder / f"{_TEMPORARY}{uuid.uuid4().hex}{Path(name).suffix}"
            try:
                temporary.touch()
                yield temporary
                if self.is_local:
                    _sync(temporary)
                    os.replace(temporary, address)
                    _sync(folder)
                else:
                    with _as_oserror():
                        self._upload(temporary, address)
            except OSError as error:
                if self.is_local or error.errno not in OF_THE_DISK:
                    raise
                raise StoreError(
                    f"Cannot write {address!r}: the temporary folder {str(folder)!r} has no room ({error.strerror}). Set "
                    "TMPDIR to a larger one."
                ) from error
            finally:
                temporary.unlink(missing_ok=True)

    def local_file(self, name: str, *, crc32: int | None = None) -> Path:
        """A read-only local path of the file ``name``.

        In a local store it is the file itself. A remote file is copied to the `HostCache`, once per host, and again when it
        has changed.

        Args:
            name: the file.
            crc32: the expected CRC-32 of a copy (RFC 1952).
        """
        address = self._address(name)
        if self.is_local:
            path = Path(address)
            if not path.is_file():
                raise StoreError(f"Expected a file {address!r}; got none. Was it moved, or written on another host?")
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

    def _remove(self, address: str) -> None:
        filesystem = self._filesystem()
        if self.is_local or not set("*?[") & set(address):
            filesystem.rm(address, recursive=True)
            return
        files = filesystem.find(address)  # rm would remove all that matches the pattern
        if not files:
            raise FileNotFoundError(address)
        for file in files:
            filesystem.rm_file(file)

    def _names(self) -> set[str]:
        with self._explained("list", ""):
            try:
                found = [str(path) for path in self._filesystem().ls(self.uri, detail=False)]
            except (FileNotFoundError, NotADirectoryError):
                return set()
        # S3's console marks a folder by an empty object "folder/", which is listed in the folder itself.
        marker = f"{fsspec.core.url_to_fs(self.uri)[1]}/"
        return {path.rstrip("/").rpartition("/")[2] for path in found if path != marker} - {""}

    def _upload(self, source: Path, address: str) -> None:
        filesystem = self._filesystem()
        parent, _, last = address.rpartition("/")
        if self.uri.partition("://")[0] in _ATOMIC:
            filesystem.put_file(str(source), address)
            return
        filesystem.makedirs(parent, exist_ok=True)
        temporary = f"{parent}/{_TEMPORARY}{uuid.uuid4().hex}-{last}"
        filesystem.put_file(str(source), temporary)
        filesystem.mv(temporary, address)

    def _filesystem(self) -> Any:
        filesystem = _filesystem(self.uri)
        if not self.is_local:
            filesystem.invalidate_cache()  # executors may have written files since
        return filesystem

    def _address(self, name: str) -> str:
        parts = name.split("/")
        if any(part in {"", ".", ".."} for part in parts):
            raise ConfigError(f"Expected a relative name inside the store, such as 'epoch-1/weights'; got {name!r}.")
        return "/".join([self.uri.rstrip("/"), *parts])

    @contextmanager
    def _explained(self, verb: str, name: str, *, callers_code: bool = False) -> Iterator[None]:
        """Raise a `StoreError` for an error of the operating system or of the file system's driver."""
        address = self._address(name) if name else self.uri
        try:
            with nullcontext() if self.is_local or callers_code else _as_oserror():
                yield
        except DlsparkError:
            raise
        except FileNotFoundError as error:
            raise StoreError(f"Cannot {verb} {address!r}: there is no such file.") from error
        except OSError as error:
            raise StoreError(f"Cannot {verb} {address!r}: {error}.") from error


def _normalise(uri: str) -> str:
    if not uri:
        raise ConfigError("Expected the URI of a folder, such as 'runs/1' or 's3://bucket/runs/1'; got an empty one.")
    uri = spelled(uri)
    try:
        if b"\0" in uri.encode():
            raise ConfigError(f"Expected a path; got {uri!r}, with a null character. Correct it.")
    except UnicodeEncodeError as error:  # Python writes such bytes as surrogates
        raise ConfigError(f"Expected a path in UTF-8; got {uri!r}. Rename the folder.") from error
    protocol, separator, rest = uri.partition("://")
    if not separator:
        return check_path(uri)
    if _WITH_PASSWORD.match(uri) or (protocol in {"http", "https"} and "?" in rest):
        raise ConfigError(
            f"Expected a plain {protocol} URI; got one with a password or a signature, which would end up in logs and saved "
            "files. Put credentials into the environment or fsspec's configuration."
        )
    if not rest.strip("/"):
        raise ConfigError(f"Expected a folder, such as '{protocol}://bucket/runs/1'; got {uri!r}.")
    _filesystem(uri)
    return uri.rstrip("/")


def _filesystem(uri: str) -> Any:
    """The fsspec file system of ``uri``; fsspec caches one per process and protocol."""
    try:
        return fsspec.core.url_to_fs(uri)[0]
    except ImportError as error:
        raise MissingDependencyError(f"The store {uri!r} needs a package that is not installed: {error}.") from error
    except ValueError as error:
        raise ConfigError(f"Expected a local path or a URI that fsspec supports; got {uri!r} ({error}).") from error


@contextmanager
def _as_oserror() -> Iterator[None]:
    """Drivers raise errors of their own too, such as botocore's NoCredentialsError."""
    try:
        yield
    except (DlsparkError, OSError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}".rstrip(".")) from error


def _sync(path: Path) -> None:
    """Sync a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
