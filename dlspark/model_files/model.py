"""Model files from anywhere: a ``.keras`` file is checked as data before Keras builds anything from it.

A ``.keras`` file is a zip archive of a description in JSON and weights in HDF5. Keras' safe mode refuses pickled code, but
``keras.config.enable_unsafe_deserialization()``, called by any code in this process, overrides ``safe_mode=True``. So this
module has its own lists of allowed content: the files of the archive, their unpacked size, the classes and functions that
the description names, and the place of the weights. Formats that run code when they are read (legacy HDF5 models,
SavedModel folders) are rejected.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Container
from importlib import import_module
from pathlib import Path
from typing import Any

from dlspark.errors import ConfigError, DataError
from dlspark.model_files.archive import CONFIG, is_archive, open_archive, open_weights
from dlspark.model_files.hdf5 import is_hdf5
from dlspark.storage import Store

MODEL = "model.keras"
"""The file in the folder that ``dlspark train`` writes."""

_OWN_CLASSES = "dlspark.models.optimizers"  # importing it registers the classes that a file names "dlspark>…"

# Parts of keras (or of keras.src, in configs of functional models and of operations) that a file may use.
# Not included, among others: applications and datasets (download), callbacks, export, saving, utils (read and write files).
_FUNCTIONS = frozenset({"activations", "constraints", "initializers", "losses", "metrics", "ops", "regularizers"})
_MODELLING = _FUNCTIONS | {"dtype_policies", "layers", "models", "optimizers", "quantizers", "random"}
_NO_FUNCTIONS = frozenset({"deserialize", "get", "serialize"})
# Layers with code, or made of other files or objects.
_CODE = frozenset({"FlaxLayer", "JaxLayer", "Lambda", "TFSMLayer", "TorchModuleWrapper", "__lambda__"})
_VALUES = frozenset({"__bytes__", "__ellipsis__", "__keras_tensor__", "__numpy__", "__slice__", "__tensor__"})

_INSTEAD = (
    "Build the model by code and load the file's weights into it (build_classifier(…, weights=FILE), or Keras' "
    "load_weights); or, if you trust who made it, convert it once in a sandbox: keras.saving.load_model(FILE)"
    ".save('model.keras')."
)


def load_model(path_or_uri: str | os.PathLike[str], *, compiled: bool = True) -> Any:
    """The model of a ``.keras`` file, loaded in safe mode: code in the file is rejected, not run.

    Args:
        path_or_uri: a ``.keras`` file, or a folder that holds a ``model.keras``, on this machine or in any store.
        compiled: with its optimizer, loss and metrics, if they were saved.

    Raises:
        ConfigError: another kind of file; a damaged file; one that holds code, names classes that are neither Keras' own
            nor registered, points to other files, or unpacks to far more than its size. No code of it was run.
        DataError: the file does not exist.
    """
    name = os.fspath(path_or_uri)
    path = _local_file(name)

    import keras

    import_module(_OWN_CLASSES)

    check_model_file(path, name, registered=keras.saving.get_custom_objects())
    try:
        return keras.saving.load_model(path, compile=compiled, safe_mode=True)
    except Exception as error:  # Keras and h5py raise many kinds here
        raise _refusal(name, f"{type(error).__name__}: {error}") from error


def check_model_file(path: Path, name: str, *, registered: Container[str] = ()) -> None:
    """Check a ``.keras`` file without building anything from it. The whole file is read once, for its checksums.

    Args:
        path: the file.
        name: for messages.
        registered: names of the classes and functions that the caller registered with Keras.

    Raises:
        ConfigError: see `load_model`.
    """
    if not is_archive(path):
        if is_hdf5(path):
            raise _legacy(name)
        raise ConfigError(f"Expected a .keras file: {name!r} is damaged, or a file of another kind. {_INSTEAD}")
    with open_archive(path, name) as archive:
        _check_config(archive.read(CONFIG), name, registered)
        with open_weights(archive, name):
            pass
        broken = archive.testzip()  # Keras does not compare the checksums where memory is short
        if broken is not None:
            raise zipfile.BadZipFile(f"{broken} has another checksum than the archive says")


def _local_file(name: str) -> Path:
    """The model's file on this machine."""
    store = Store(name)
    folder, _, last = store.uri.rpartition("/")
    if last.lower().endswith((".h5", ".hdf5")):
        raise _legacy(name)
    if last.endswith(".keras") and not os.path.isdir(store.uri):
        store = Store(folder or "/")
        if not store.exists(last):
            raise DataError(f"Expected a model at {name!r}; got no such file.")
        return store.local_file(last)
    if store.exists("saved_model.pb"):
        raise ConfigError(
            f"{name!r} is a SavedModel folder, whose graph can read and write files when it runs; only .keras files are "
            f"taken. {_INSTEAD}"
        )
    if not store.exists(MODEL):
        raise ConfigError(f"Expected a .keras file, or a folder with a {MODEL}: {name!r} is neither.")
    return store.local_file(MODEL)


def _check_config(data: bytes, name: str, registered: Container[str]) -> None:
    """Reject classes and functions that are neither Keras' own parts of models nor registered."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _refusal(name, f"its {CONFIG} is no JSON that can be parsed ({error})") from error
    if not isinstance(document, dict) or "class_name" not in document:
        raise _refusal(name, f"its {CONFIG} does not describe a model")
    pending: list[Any] = [document]
    while pending:
        value = pending.pop()
        if isinstance(value, list):
            pending.extend(value)
        elif isinstance(value, dict):
            pending.extend(value.values())
            if isinstance(value.get("vocabulary"), str):
                raise _refusal(name, f"it would read {value['vocabulary']!r} of this machine as a vocabulary")
            if "class_name" in value:
                _check_object(value, name, registered)


def _check_object(value: dict[str, Any], name: str, registered: Container[str]) -> None:
    kind, module = value["class_name"], value.get("module")
    if not isinstance(kind, str):
        raise _refusal(name, f"it names a class {kind!r}")
    if kind in _CODE:
        raise _refusal(name, f"it holds a {kind}, which is code or made of what lies elsewhere")
    if kind in _VALUES:
        return
    function = kind == "function"
    what = value.get("config") if function else kind
    by_name = what if function else value.get("registered_name") or kind
    if isinstance(by_name, str) and by_name in registered:
        return
    parts = module.split(".") if isinstance(module, str) else [""]
    if parts[:2] == ["keras", "src"]:
        del parts[1]
    part = parts[1] if len(parts) > 1 and parts[0] == "keras" else None
    if function:
        known = (parts == ["builtins"] or part in _FUNCTIONS) and isinstance(what, str) and what not in _NO_FUNCTIONS
    else:
        known = parts == ["keras"] or part in _MODELLING
    if not known:
        raise _refusal(
            name,
            f"it needs {what!r} of module {module!r}, which is neither a part for models of Keras' own nor registered here "
            "(keras.saving.register_keras_serializable)",
        )


def _legacy(name: str) -> ConfigError:
    return ConfigError(
        f"{name!r} is a legacy HDF5 model, which can run any code when it is loaded; only .keras files are taken. {_INSTEAD}"
    )


def _refusal(name: str, why: str) -> ConfigError:
    return ConfigError(
        f"The model {name!r} cannot be loaded: {why}. Expected a .keras file without Lambda layers, of Keras' own classes, "
        f"whose weights fit its layers. {_INSTEAD}"
    )
