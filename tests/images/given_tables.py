"""Tables as people have them: cells, columns, delimiters, encodings and places."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dlspark.data import Split
from dlspark.images import CsvLayout, KnownLayout
from tests.images.given import Given, image

_TWO = "image_id,label\na,nv\nb,mel\n"


def _table(
    folder: Path, text: str | bytes, *, name: str = "metadata.csv", images: Sequence[str] = ("a.jpg", "b.jpg")
) -> None:
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    for each in images:
        image(folder / each)


def _csv(text: str | bytes, **more: Any) -> Callable[[Path], None]:
    return partial(_table, text=text, **more)


def _frame(schema: str, *rows: tuple[Any, ...]) -> Callable[[str, Any], Any]:
    """A layout of one's own: a DataFrame. A path "x.jpg" is in the source."""

    def layout(source: str, spark: Any) -> Any:
        return spark.createDataFrame([(f"{source}/{path}", *others) for path, *others in rows], f"path string, {schema}")

    return layout


def _apart(folder: Path) -> None:
    """The table and the images outside the source."""
    (folder / "source").mkdir()
    image(folder / "elsewhere" / "a.jpg")
    image(folder / "elsewhere" / "b.png")
    (folder / "list.csv").write_text(f"image_id,label\n{folder}/elsewhere/a,nv\n{folder}/elsewhere/b.png,mel\n")


def _given(name: str, make: Any, rows: Any = None, rejected: Any = None, *, split: Any = None, **more: Any) -> Given:
    """A row of the table, by default of the layout csv and without a part for testing."""
    settings = {"split": split or Split(test=0.0)}
    return Given(name, make, rows or {}, rejected or {}, settings=settings, **{"layout": "csv", **more})


class _Outside:
    """The layout csv with a file outside the source, whose place the test makes."""

    def __call__(self, source: str, spark: Any) -> Any:
        return CsvLayout(csv=f"{Path(source).parent}/list.csv")(source, spark)


_SPACES = "image_id,label,sex\na ,nv,male\nb,nv\u00a0, male\nc,\ufeffnv,male\t\nd,\u200bmel,female\n"
_HAM = "lesion_id{0}image_id{0}dx{0}dx_type{0}age{0}sex{0}localization\n" + "".join(
    f"L{n}{{0}}{name} {{0}}nv{{0}}histo{{0}}{age}{{0}}male{{0}}back\n"
    for n, (name, age) in enumerate({"a": "", "b": "old"}.items())
)
_NAN = float("nan")
_BOTH = {"mel": 1, "nv": 1}

TABLES: list[Given] = [
    # Missing values and spaces.
    _given(
        "spaces make no classes",
        _csv(_SPACES, images=["a.jpg", "b.jpg", "c.jpg", "d.jpg"]),
        {"mel": 1, "nv": 3},
        warning=r"Removed spaces.* id 1, label 3, sex 2",
    ),
    _given("an empty label", _csv("image_id,label\na,nv\nb,\n"), error=r"Expected a label for .* for 1 of 2.*b\.jpg"),
    _given(
        "one image in two rows",
        _csv("image_id,label\na,nv\na.jpg,mel\n"),
        {"mel": 1, "nv": 1},
        warning=r"1 images are in the table more than once.*a\.jpg', 2 times",
    ),
    _given("a label nan", _csv("image_id,label\na,nv\nb,nan\n"), error="Expected a label for .* for 1 of 2"),
    _given("a blank id", _csv("image_id,label\na,nv\n\u00a0,mel\n"), error="Expected an id for .* for 1 of 2"),
    _given(
        "a label that is a null",
        _csv(_TWO),
        layout=_frame("id int, label string", ("a.jpg", 1, "nv"), ("b.jpg", 2, None)),
        error="Expected a label for .* for 1 of 2",
    ),
    _given(
        "a label that is NaN",
        _csv(_TWO),
        layout=_frame("id int, label double", ("a.jpg", 1, 1.0), ("b.jpg", 2, _NAN)),
        error="Expected a label for .* for 1 of 2",
    ),
    _given(
        "a missing label put aside",
        _csv("image_id,label\na,nv\nb,NaN\n"),
        {"nv": 1},
        {"b.jpg": "its label is not known"},
        layout=KnownLayout(layout="csv", columns=("label",)),
    ),
    _given(
        "classes that may mean missing",
        _csv("image_id,label\na,NA\nb,None\n"),
        {"NA": 1, "None": 1},
        warning="The classes include 'NA', 'None', whose rows are kept",
    ),
    _given(
        "classes that look alike",
        _csv("image_id,label\na,nv\nb,NV\n"),
        {"NV": 1, "nv": 1},
        warning="The classes 'NV' and 'nv' differ only in case",
    ),
    _given(
        "a group that is NaN",
        _csv(_TWO),
        layout=_frame("id int, label string, group double", ("a.jpg", 1, "nv", 1.0), ("b.jpg", 2, "mel", _NAN)),
        split=Split(group="group"),
        error="Expected a group in every row, to split by; got none in row '2'",
    ),
    _given(
        "a group of spaces",
        _csv("image_id,label,patient\na,nv,p1\nb,mel,\u00a0\n"),
        layout=CsvLayout(group_column="patient"),
        split=Split(group="group"),
        error="Expected a group in every row, to split by; got none in row 'b'",
    ),
    _given(
        "a group of two spellings",
        _csv("image_id,label,patient\na,nv,p1\nb,mel,p1 \n"),
        _BOTH,
        layout=CsvLayout(group_column="patient"),
        split=Split(test=0.5, group="group", stratify=False),
        error=r"Expected rows in the part",
    ),
    _given(
        "a part with a space",
        _csv("image_id,label,part\na,nv,train\nb,mel,test \n"),
        _BOTH,
        split=Split(column="part"),
        warning="Removed spaces.* part 1",
    ),
    _given("rows of empty cells", _csv("image_id,label\na,nv\n,\nb,mel\n , \n"), _BOTH),
    # Columns.
    _given(
        "columns that are ours but for case",
        _csv("image_id,label,ID,Group,Path,Part,Image\na,nv,1,2,3,4,5\nb,mel,1,2,3,4,5\n"),
        _BOTH,
    ),
    _given("a column without a name", _csv(",image_id,label\n0,a,nv\n1,b,mel\n"), _BOTH),
    _given("spaces in the header", _csv("image_id , label\na,nv\nb,mel\n"), _BOTH),
    _given(
        "two columns of one name",
        _csv("image_id,label,Label\na,nv,x\n"),
        error=r"distinct column names in line 1 of .*metadata\.csv.*'label', 'Label'",
    ),
    _given(
        "a frame with two columns of one name",
        _csv(_TWO),
        layout=_frame("id int, label string, id string", ("a.jpg", 1, "nv", "x")),
        error="distinct names.*'id' and 'id'",
    ),
    _given(
        "a frame with other case",
        _csv(_TWO),
        layout=_frame("ID int, label string", ("a.jpg", 1, "nv")),
        error="Expected 'id' as the name of a column of the layout; got 'ID'",
    ),
    # How a file is written.
    _given("semicolons", _csv("image_id;label;note\na;nv;1,5\nb;mel;2,5\n"), _BOTH),
    _given("tabs", _csv('image_id\t"label"\na\t"n,v"\nb\tmel\n'), {"mel": 1, "n,v": 1}),
    _given("quotes after a space", _csv('image_id, label, "sex"\na, "nv", "male"\nb, nv , f\n'), {"nv": 2}),
    _given(
        "two delimiters",
        _csv("image_id,label;x\na,nv;1\nb,mel;2\n"),
        error=r"one delimiter in line 1 of .*metadata\.csv.*',' and ';'. Set the layout's option delimiter",
    ),
    _given("a given delimiter", _csv("image_id:label\na:nv\nb:mel\n"), _BOTH, layout=CsvLayout(delimiter=":")),
    _given(
        "the delimiter tab",
        _csv("image_id\tlabel,x\na\tnv\nb\tmel\n"),
        _BOTH,
        layout=CsvLayout(delimiter="tab", label_column="label,x"),
    ),
    _given(
        "latin-1",
        _csv("image_id,label\na,nv\nb,m\u00e9l\n".encode("latin-1")),
        error=r"text in utf-8 in .*metadata\.csv.* line 3. Set the layout's option encoding, such as latin-1",
    ),
    _given(
        "latin-1 with the option",
        _csv("image_id,label\na,nv\nb,m\u00e9l\n".encode("latin-1")),
        {"m\u00e9l": 1, "nv": 1},
        layout=CsvLayout(encoding="latin-1"),
    ),
    _given(
        "latin-1 far down",
        _csv(("image_id,label\n" + "a,nv\n" * 300_000 + "b,m\u00e9l\n").encode("latin-1")),
        error=r"utf-8 in .* line 300002. Set",
    ),
    _given("UTF-16", _csv(_TWO.encode("utf-16")), _BOTH),
    _given("UTF-16 without a mark", _csv(_TWO.encode("utf-16-le")), error="null bytes.*option encoding to utf-16-le"),
    _given("UTF-8 with a mark", _csv(_TWO.encode("utf-8-sig")), _BOTH, layout=CsvLayout(encoding="utf-8")),
    _given("compressed", _csv(gzip.compress(_TWO.encode()), name="m.csv.gz"), _BOTH, layout=CsvLayout(csv="m.csv.gz")),
    _given(
        "damaged compression",
        _csv(gzip.compress(_TWO.encode())[:-9], name="m.csv.gz"),
        layout=CsvLayout(csv="m.csv.gz"),
        error=r"Expected a CSV file at .*m\.csv\.gz.*ended before",
    ),
    _given("a long cell", _csv(f"image_id,label,mask\na,nv,{'1 ' * 100_000}\nb,mel,\n"), _BOTH),
    _given(
        "a quote that is not closed",
        _csv('image_id,label\na,"nv\nb,mel\n'),
        error=r"from line 2 of .*metadata\.csv.*unexpected end of data",
    ),
    _given(
        "a row that is too short",
        _csv("image_id,label,sex\na,nv,male\nb,mel\n"),
        error=r"Expected 3 cells in line 3 of .*metadata\.csv.*; got 2",
    ),
    # Where the images are.
    _given("names with an extension", _csv("image_id,label\na.jpg,nv\n./b.PNG,mel\n", images=["a.jpg", "b.PNG"]), _BOTH),
    _given(
        "another extension",
        _csv(_TWO, images=["a.png", "b.png"]),
        error=r"none at the first 2 paths. .*/collection/a\.jpg: cannot be read: No such file.*extension",
    ),
    _given("one image is missing", _csv(_TWO, images=["b.jpg"]), {"mel": 1, "nv": 0}, {"a.jpg": "No such file"}),
    _given("everything outside the source", _apart, _BOTH, layout=_Outside(), source=lambda folder: folder / "source"),
    # Collections with a layout of their own.
    _given(
        "HAM10000 as Dataverse has it",
        _csv(_HAM.format("\t"), name="HAM10000_metadata.tab"),
        {"nv": 2},
        layout="ham10000",
        warning=r"Removed spaces.* id 2",
    ),
    _given(
        "HAM10000 without a column",
        _csv("image_id,dx\na,nv\n", name="HAM10000_metadata"),
        layout="ham10000",
        error="Expected a column of .*HAM10000_metadata'; got 'lesion_id'",
    ),
    _given(
        "C-NMC with a stray file",
        _csv("", images=["UID_1_1_1_all.bmp", "UID_H2_1_1_hem.bmp", "thumb.bmp"]),
        {"all": 1, "hem": 1},
        {"thumb.bmp": "its name is not UID_"},
        layout="cnmc",
        passed_over={"not an image (.csv)": 1},
    ),
]
