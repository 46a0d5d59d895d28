"""HDF5 files from anywhere: opened only if nothing in them points to other files or unpacks to far more than its size.

An HDF5 file can refer to other files of this machine (external links, external and virtual datasets), and readers follow
such references silently: the content would become part of a model's weights, and leave with them. Keras checks some of
them while it reads; this module checks the whole file before any of it is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from dlspark.errors import ConfigError

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_LATEST_SIGNATURE = 1 << 20  # it may follow a user block, at 0, 512, 1024, …: HDF5 File Format 3.0, II.A
_MAX_OBJECTS = 200_000  # ResNet152 has 2,000; checking this many takes a second or two
_MAX_EXPANSION = 20  # times the bytes of the file; Keras does not compress
_FREE_BYTES = 64 << 20  # up to this size any expansion is accepted
_NUMBERS = "biufc"


def is_hdf5(path: Path) -> bool:
    """Whether the content is HDF5, regardless of the name."""
    with path.open("rb") as file:
        position = 0
        while position <= _LATEST_SIGNATURE:
            file.seek(position)
            start = file.read(len(_SIGNATURE))
            if start == _SIGNATURE:
                return True
            if not start:
                return False
            position = position * 2 or 512
    return False


@contextmanager
def open_hdf5(source: Path | IO[bytes], name: str, size_bytes: int) -> Iterator[Any]:
    """Check a file and give its ``h5py.File``.

    Args:
        source: the file, or an open one.
        name: for messages.
        size_bytes: of the file.

    Raises:
        ConfigError: it is damaged, points to other files, holds values other than numbers, or would unpack to more than
            64 MiB and 20 times its size.
    """
    import h5py

    try:
        file = h5py.File(source, "r")
    except OSError as error:
        raise ConfigError(
            f"{name} is truncated, damaged or no HDF5 file ({error}). Fetch or save it again, and compare its size and "
            "checksum with the original's."
        ) from error
    with file:
        try:
            _check(file, name, size_bytes)
        except ConfigError:
            raise
        except Exception as error:  # h5py raises KeyError, RuntimeError, OSError and more for what libhdf5 cannot parse
            raise ConfigError(f"{name} is damaged ({type(error).__name__}: {error}). Fetch or save it again.") from error
        yield file


def _check(file: Any, name: str, size_bytes: int) -> None:
    import h5py

    seen: set[int] = set()
    groups, objects, declared = [file["/"]], 0, 0
    while groups:
        group = groups.pop()
        address = h5py.h5o.get_info(group.id).addr
        if address in seen:
            raise ConfigError(f"{name} holds a group that is linked twice ({group.name}). {_SAVE_AGAIN}")
        seen.add(address)
        for key in group:
            objects += 1
            if objects > _MAX_OBJECTS:
                raise ConfigError(f"{name} holds more than {_MAX_OBJECTS:,} objects, which no weights need. {_SAVE_AGAIN}")
            where = f"{group.name.rstrip('/')}/{key}"
            link = group.get(key, getlink=True)
            if not isinstance(link, h5py.HardLink):
                target = f" to {link.filename!r}" if isinstance(link, h5py.ExternalLink) else ""
                raise ConfigError(f"{name} holds a {type(link).__name__}{target} at {where}. {_SAVE_AGAIN}")
            member = group[key]
            if isinstance(member, h5py.Group):
                groups.append(member)
                continue
            if not isinstance(member, h5py.Dataset):
                raise ConfigError(f"{name} holds a {type(member).__name__} at {where}, not an array. {_SAVE_AGAIN}")
            if member.external or member.is_virtual:
                raise ConfigError(f"{name} holds an array at {where} whose values lie in other files. {_SAVE_AGAIN}")
            # bfloat16 is stored as two opaque bytes.
            if member.dtype.kind not in _NUMBERS and (member.dtype.kind, member.dtype.itemsize) != ("V", 2):
                raise ConfigError(f"{name} holds {member.dtype} at {where}; weights are numbers. {_SAVE_AGAIN}")
            declared += member.nbytes
            if declared > max(_FREE_BYTES, _MAX_EXPANSION * size_bytes):
                raise ConfigError(f"{name} has {size_bytes:,} bytes and would unpack to {declared:,} or more. {_SAVE_AGAIN}")


_SAVE_AGAIN = (
    "Expected arrays of numbers inside the file itself. Do not use the file unless you know where it comes from; then "
    "load it there and save it anew with Keras' save_weights."
)
