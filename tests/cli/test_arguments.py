"""Arguments: from text to values."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from dlspark.cli.arguments import image_size, key_value, local_folder, typed, whole_numbers, words
from dlspark.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Options:
    count: int = 1
    rate: float = 0.5
    limit: float | None = None
    name: str = "x"
    nics: str | None = None
    fast: bool = False
    mode: Literal["a", "b"] = "a"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("count=12", 12),
        ("count=25_000_000", 25_000_000),
        ("rate=1", 1.0),
        ("rate=1e-3", 0.001),
        ("limit=none", None),
        ("limit=5", 5.0),
        ("name=none", "none"),
        ("name=a=b", "a=b"),
        ("nics=None", None),
        ("nics=lo,eth0", "lo,eth0"),
        ("fast=true", True),
        ("fast=No", False),
        ("mode=b", "b"),
        ("unknown=1", "1"),
    ],
)
def test_values_get_the_types_of_the_fields(text: str, value: Any) -> None:
    name = text.partition("=")[0]
    found = typed([key_value(text)], Options)[name]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("count=1.5", "a whole number"),
        ("rate=fast", "a number"),
        ("limit=fast", "a number or none"),
        ("fast=maybe", "true or false"),
    ],
)
def test_a_value_of_another_type_is_refused(text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=f"to be {expected}"):
        typed([key_value(text)], Options)


def test_the_last_of_two_counts() -> None:
    assert typed([("count", "1"), ("count", "2")], Options) == {"count": 2}


def test_a_local_folder_is_no_uri() -> None:
    assert local_folder("file:///data/a%20b") == Path("/data/a b")
    for other in ("s3://bucket/out", "s3:/bucket/out", "dbfs:/out"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"on this machine|Write '/dbfs/out'"):
            local_folder(other)


def test_sizes_and_lists() -> None:
    assert image_size("224") == (224, 224)
    assert image_size("450x600") == (450, 600)
    assert words("flip, rotation:0.1") == ["flip", "rotation:0.1"]
    assert whole_numbers("512,128") == [512, 128]
    with pytest.raises(argparse.ArgumentTypeError):
        image_size("450x600x3")
