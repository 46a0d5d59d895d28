"""Layouts by name: dlspark's own, and a third-party one that only an entry point adds."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dlspark.cli.main import main
from dlspark.errors import ConfigError
from dlspark.images import LAYOUTS, CsvLayout, csv_table, find_layout, prepare_images
from dlspark.images.layouts import csv_layout, describe, folders

STRANGER = Path(__file__).parent / "stranger"


@pytest.fixture
def stranger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the layout's folder on the path, as an installation does."""
    monkeypatch.syspath_prepend(str(STRANGER))


def test_names_and_options() -> None:
    assert list(LAYOUTS) == ["cnmc", "csv", "folders", "ham10000"]
    assert find_layout("csv", {"label_column": "finding"}) == CsvLayout(label_column="finding")
    assert find_layout("csv") == csv_layout()
    assert find_layout("folders") is find_layout(folders) is folders
    with pytest.raises(ConfigError, match="Layout 'folders' has no options; got csv"):
        find_layout("folders", {"csv": "a.csv"})
    with pytest.raises(ConfigError, match=r"Unknown layout 'ham1000'. Did you mean 'ham10000'"):
        find_layout("ham1000")


def test_the_options_of_csv_are_checked() -> None:
    assert find_layout("csv", {"delimiter": "tab", "encoding": "latin-1"}) == CsvLayout(delimiter="tab", encoding="latin-1")
    with pytest.raises(ConfigError, match=r"delimiter as one character.*; got ';;'"):
        CsvLayout(delimiter=";;")
    with pytest.raises(ConfigError, match=r"encoding as 'utf-8', .*; got 'latin-99'"):
        CsvLayout(encoding="latin-99")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"a,b\n1,2\n", ""),
        (b"a\n1\n", ""),
        (b"a;b\n1;2\n", r"x\.csv: read with delimiter ';' and encoding utf-8"),
        ("a,b\n1,2\n".encode("utf-16"), "delimiter ',' and encoding utf-16"),
        (b'a;"b,c"\n1;2\n', "delimiter ';'"),
        (b"a|b;c\n" + b'1|"2"\n' * 300_000, r"delimiter '\|'"),  # longer than what is looked at
    ],
)
def test_what_a_csv_is_read_as_is_logged(
    content: bytes, told: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "x.csv").write_bytes(content)
    with caplog.at_level("INFO"):
        csv_table._examined(str(tmp_path / "x.csv"), None, None)
    assert bool(caplog.text) == bool(told)
    assert re.search(told, caplog.text)


def test_csvs_own_limit_is_left_as_it_is(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    (tmp_path / "x.csv").write_text("a,b\n1," + "2" * (limit + 1) + "\n")
    rows = list(csv_table._data_rows(csv_table._Form(str(tmp_path / "x.csv"), ",", "utf-8")))
    assert [len(row[1]) for row in rows] == [limit + 1]
    assert csv.field_size_limit() == limit


def test_a_layout_and_its_name_are_one_setting() -> None:
    assert describe(csv_layout()) == describe("csv") == "csv"
    assert describe(folders) == "folders"
    assert describe(csv_layout(csv="a.csv")).startswith("CsvLayout(csv='a.csv', ")


def test_two_layouts_of_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "rival-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: rival\nVersion: 1\n")
    (folder / "entry_points.txt").write_text("[dlspark.layouts]\ncsv = rival:Rival\npi = math:pi\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"claim the layout name 'csv'.*rival:Rival.*Uninstall"):
        find_layout("csv")
    assert find_layout("folders") is folders
    assert describe(folders) == "folders"
    with pytest.raises(ConfigError, match=r"entry point of layout 'pi' to be a function or a dataclass; got 3\.14"):
        find_layout("pi")
    with pytest.raises(ConfigError, match=r"Unknown layout 'folder'. Did you mean 'folders'"):
        find_layout("folder")
    assert main(["prepare", "--help"]) == 0


@pytest.mark.spark
def test_a_strangers_layout(spark: Any, stranger: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for number in range(10):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(source / f"{'ab'[number % 2]}_{number}.bmp")
    prepare = ["prepare", str(source), str(tmp_path / "out"), "--layout", "slides", "--image-size", "8"]
    assert main(["prepare", "--help"]) == 0
    assert "ham10000, slides" in " ".join(capsys.readouterr().out.split())
    assert main(prepare) == 2
    assert "layout 'slides'. It reads: Files named ``<label>_<number>``, of one type." in capsys.readouterr().err
    assert main([*prepare, "--layout-option", "extention=.bmp"]) == 2
    assert "Layout 'slides' has no option 'extention'. Did you mean 'extension'?" in capsys.readouterr().err
    assert main([*prepare, "--layout-option", "extension=.bmp", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["classes"] == ["a", "b"]
    layout = find_layout("slides", {"extension": ".bmp"})
    assert prepare_images(source, tmp_path / "out", layout=layout, image_size=(8, 8)).num_classes == 2  # only opened
