"""``.keras`` files as archives: only the files that Keras writes, each once, and limited in their unpacked size."""

from __future__ import annotations

import io
import stat
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dlspark.errors import ConfigError
from dlspark.model_files.hdf5 import open_hdf5

CONFIG, WEIGHTS = "config.json", "model.weights.h5"
_METADATA, _ASSETS = "metadata.json", "assets/"
_MAX_CONFIG_BYTES = 32 << 20  # ResNet152's has 0.4 MB
_MAX_EXPANSION = 20  # times the bytes of the archive; Keras stores without compression
_FREE_BYTES = 64 << 20  # up to this size any expansion is accepted


def is_archive(path: Path) -> bool:
    """Whether the file starts as a zip archive; a zip after other content is rejected."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


@contextmanager
def open_archive(path: Path, name: str) -> Iterator[zipfile.ZipFile]:
    """Check the list of contents of a ``.keras`` file and give its archive.

    Args:
        path: the file.
        name: for messages.

    Raises:
        ConfigError: it is damaged or truncated, found here or inside the block; it lacks a file that Keras writes, holds
            another one, or would unpack to more than 64 MiB and 20 times its size.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _check_members(archive, name, path.stat().st_size)
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError) as error:
        raise ConfigError(
            f"Expected a .keras file: {name!r} is damaged or truncated ({error}). Fetch or save it again."
        ) from error


@contextmanager
def open_weights(archive: zipfile.ZipFile, name: str) -> Iterator[Any]:
    """Check the weights of an archive and give their ``h5py.File``."""
    # In memory, as in Keras: h5py seeks often, and in an archive each seek reads from the start again.
    content = archive.read(WEIGHTS)
    with open_hdf5(io.BytesIO(content), f"{WEIGHTS} of {name!r}", len(content)) as file:
        yield file


def _check_members(archive: zipfile.ZipFile, name: str, size_bytes: int) -> None:
    members = archive.infolist()
    names = [member.filename for member in members]
    for needed in (CONFIG, WEIGHTS):
        if needed not in names:
            raise ConfigError(
                f"The model {name!r} cannot be loaded: a .keras file holds {CONFIG} and {WEIGHTS}, and this one lacks "
                f"{needed}. Save it again with Keras' model.save."
            )
    for member in members:
        known = member.filename in (CONFIG, _METADATA, WEIGHTS) or member.filename.startswith(_ASSETS)
        parts = member.filename.rstrip("/").split("/")
        if not known or {"", ".", ".."} & set(parts) or "\\" in member.filename or stat.S_ISLNK(member.external_attr >> 16):
            raise _refusal(name, f"it holds {member.filename!r}, which Keras does not write")
    if len(set(names)) < len(names):
        raise _refusal(name, "it holds one file twice")
    claimed = sum(member.file_size for member in members)
    packed = sum(member.compress_size for member in members)
    if packed > size_bytes or claimed > max(_FREE_BYTES, _MAX_EXPANSION * size_bytes):
        raise _refusal(name, f"it has {size_bytes:,} bytes and would unpack to {claimed:,}")
    if archive.getinfo(CONFIG).file_size > _MAX_CONFIG_BYTES:
        raise _refusal(name, f"its {CONFIG} has {archive.getinfo(CONFIG).file_size:,} bytes")


def _refusal(name: str, why: str) -> ConfigError:
    return ConfigError(
        f"The model {name!r} cannot be loaded: {why}. Expected a file as Keras' model.save writes it. Do not use this one "
        "unless you know where it comes from; then load it there and save it again."
    )
