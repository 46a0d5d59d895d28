"""``.keras`` files as archives: only what Keras writes, nothing twice, nothing that unpacks to far more than it is."""

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
_FREE_BYTES = 64 << 20  # up to here no expansion is held against a file


def is_archive(path: Path) -> bool:
    """Whether the file begins as a zip archive does; a zip behind other content is not taken."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


@contextmanager
def open_archive(path: Path, name: str) -> Iterator[zipfile.ZipFile]:
    """Give the archive of a ``.keras`` file whose list of contents was found harmless.

    Args:
        path: the file.
        name: what the user calls it, for messages.

    Raises:
        ConfigError: it is damaged or truncated, as found here or inside the block; it lacks what Keras writes, holds
            anything else, or would unpack to more than 64 MiB and 20 times its size.
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
    """Give the checked ``h5py.File`` that an archive's weights are."""
    # In memory, as Keras does it: h5py jumps about in a file, and inside an archive every jump reads from the start again.
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
