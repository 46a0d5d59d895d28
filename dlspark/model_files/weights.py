"""Weights files, compared with the model layer by layer before any variable is assigned.

Two layouts are supported, as in Keras: Keras 3 (``.weights.h5``, and inside ``.keras``), a tree of groups; and Keras 2
(``.h5``, as the ImageNet files), an ordered list of layers. Neither can hold code; from a ``.h5`` file of a whole legacy
model only the weights are read.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

from dlspark.errors import ConfigError
from dlspark.model_files.archive import WEIGHTS, open_archive
from dlspark.model_files.hdf5 import open_hdf5

_Shape = tuple[int, ...]
_OLD_LAYERS = "_layer_checkpoint_dependencies"  # the group "layers" in files of TensorFlow 2.13, which Keras still reads


def load_weights(model: Any, path: Path, *, hint: str) -> None:
    """Load the weights of a file into a built model.

    Args:
        model: on any error its weights are bit-identical to those before.
        path: ``.h5``, ``.weights.h5`` or ``.keras``.
        hint: the end of the message for a file that does not fit.

    Raises:
        ConfigError: the file is damaged or truncated, points to other files, or does not fit the model. The message names
            the first variable that does not fit, with both shapes.
    """
    with _hdf5_of(path) as (hdf5, name):
        with open_hdf5(hdf5, name, hdf5.stat().st_size) as file:
            if hdf5.name.endswith(".weights.h5"):
                _check_tree(model, file, path, hint)
            else:
                _check_list(model, file, path, hint)
        variables = [*model.variables, *(model.optimizer.variables if getattr(model, "optimizer", None) else ())]
        before = [variable.numpy() for variable in variables]
        try:
            with warnings.catch_warnings():
                # Keras warns about containers without variables, which older files do not have.
                warnings.filterwarnings("ignore", message="Skipping nested container")
                model.load_weights(hdf5)
        except Exception as error:  # such as a chunk that cannot be unpacked; h5py and Keras raise many kinds
            for variable, value in zip(variables, before, strict=True):
                variable.assign(value)
            raise ConfigError(
                f"The weights {str(path)!r} could not be loaded ({type(error).__name__}: {error}). {hint}"
            ) from error


@contextmanager
def _hdf5_of(path: Path) -> Iterator[tuple[Path, str]]:
    """The HDF5 file with the weights, and its name for messages.

    A file in an archive is unpacked, so that the checked file is the loaded one, and Keras takes 1 s for ResNet50, not 7.
    """
    if path.suffix != ".keras":
        yield path, repr(str(path))
        return
    with tempfile.TemporaryDirectory(prefix="dlspark-") as folder:
        with open_archive(path, str(path)) as archive:
            archive.extract(WEIGHTS, folder)
        yield Path(folder, WEIGHTS), f"{WEIGHTS} of {str(path)!r}"


# Keras 3 ---------------------------------------------------------------------------------------------------------------


def _check_tree(model: Any, file: Any, path: Path, hint: str) -> None:
    import h5py

    if _names(_root_of_list(file), "layer_names") and "layers" not in file:
        raise ConfigError(
            f"{str(path)!r} has the layout of Keras 2. Rename it: '.h5' at its end, without '.weights' before."
        )
    # A saved copy of the model shows the groups that Keras expects, for all kinds of layers.
    with tempfile.TemporaryDirectory(prefix="dlspark-") as folder:
        reference = Path(folder, "expected.weights.h5")
        model.save_weights(reference)
        with h5py.File(reference, "r") as expected_file:
            expected = _shapes(expected_file)
            names = {group: expected_file[group].attrs.get("name", "") for group, _ in expected}
            layers = {group: _top_layer(expected_file, group) for group, _ in expected}
    found = _shapes(file)
    positions = {layer.name: number for number, layer in enumerate(model.layers)}
    variables = {layer.name: [variable.name for variable in layer.weights] for layer in model.layers}

    def in_order(key: tuple[str, str]) -> tuple[int, list[tuple[int, str]]]:
        natural = [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", "/".join(key))]
        return positions.get(layers[key[0]], len(positions)), natural

    for key in sorted(expected, key=in_order):
        group, number = key
        there = found.get(key, found.get((group.replace("layers", _OLD_LAYERS), number)))
        if there != expected[key]:
            layer = names[group] or layers[group] or group
            called = variables.get(layer, [])
            variable = called[int(number)] if number.isdigit() and int(number) < len(called) else f"number {number}"
            raise _mismatch(path, layer, variable, expected[key], there, f" at {group!r}", hint)
    for group, number in sorted(found):
        if group.startswith("layers/") and (group, number) not in expected:
            layer = file[group].attrs.get("name", "") or group
            raise _mismatch(path, layer, f"number {number}", None, found[group, number], f" at {group!r}", hint)


def _shapes(file: Any) -> Mapping[tuple[str, str], _Shape]:
    """Shape by (group, name) of all variables of layers, without those of optimizers and random generators."""
    import h5py

    shapes: dict[tuple[str, str], _Shape] = {}

    def note(name: str, member: Any) -> None:
        group, _, variable = name.rpartition("/")
        wanted = group.split("/")[0] != "optimizer" and "seed_generator" not in group.split("/")
        if isinstance(member, h5py.Dataset) and wanted:
            shapes[group, variable] = tuple(member.shape)

    file.visititems(note)
    return shapes


def _top_layer(file: Any, group: str) -> str:
    """The name of the model's layer that a group belongs to, directly or as a part."""
    top = "/".join([*group.split("/")[:2], "vars"])
    return str(file[top].attrs.get("name", "")) if top in file else ""


# Keras 2 ---------------------------------------------------------------------------------------------------------------


def _check_list(model: Any, file: Any, path: Path, hint: str) -> None:
    root = _root_of_list(file)
    names = _names(root, "layer_names")
    if not names and ("layers" in file or _OLD_LAYERS in file):
        raise ConfigError(f"{str(path)!r} has the layout of Keras 3. Rename it: '.weights.h5' at its end.")
    try:
        shapes = {name: [tuple(root[name][each].shape) for each in _names(root[name], "weight_names")] for name in names}
    except (KeyError, AttributeError) as error:
        raise ConfigError(f"{str(path)!r} is damaged: it lists weights that it does not hold ({error}). {hint}") from error
    there: Sequence[tuple[str, list[_Shape]]] = [(name, shapes[name]) for name in names if shapes[name]]
    # In the order of Keras 2, which Keras 3 still reads: trainable weights first.
    expected = [
        (layer.name, [(each.name, tuple(each.shape)) for each in (*layer.trainable_weights, *layer.non_trainable_weights)])
        for layer in model.layers
        if layer.weights
    ]
    for ours, theirs in zip_longest(expected, there):
        layer, variables = ours or (theirs[0], [])
        name, found = theirs or ("", [])
        where = f" in its layer {name!r}" if theirs else f", where its {len(there)} layers with weights end"
        for variable, shape in zip_longest(variables, found):
            if variable is None or variable[1] != shape:
                called, wanted = variable or ("one more", None)
                raise _mismatch(path, layer, called, wanted, shape, where, hint)


def _root_of_list(file: Any) -> Any:
    """The group with the list: the root of a weights file, or a group in the file of a whole model."""
    return file["model_weights"] if not _names(file, "layer_names") and "model_weights" in file else file


def _names(group: Any, attribute: str) -> list[str]:
    """A list of names. Keras 2 split a list that exceeds HDF5's 64 KiB header into numbered pieces."""
    pieces = [attribute] if attribute in group.attrs else []
    while not pieces or pieces[0] != attribute:
        piece = f"{attribute}{len(pieces)}"
        if piece not in group.attrs:
            break
        pieces.append(piece)
    return [each.decode() if isinstance(each, bytes) else str(each) for piece in pieces for each in group.attrs[piece]]


def _mismatch(
    path: Path, layer: str, variable: str, expected: _Shape | None, found: _Shape | None, where: str, hint: str
) -> ConfigError:
    return ConfigError(
        f"The weights {str(path)!r} do not fit: layer {layer!r}, variable {variable!r} expects "
        f"{'nothing' if expected is None else f'the shape {expected}'}; the file has "
        f"{'nothing' if found is None else f'the shape {found}'}{where}. {hint}"
    )
