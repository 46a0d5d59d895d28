from __future__ import annotations

import os
from pathlib import Path

from PIL import Image

from dlspark.data.split import Split
from tests.images.given import Given, image


def classes(root: Path, *names: str, count: int = 4) -> None:
    for name in names:
        for number in range(count):
            image(root / name / f"{number}.jpg")


def linked(root: Path) -> None:
    classes(root, "cat")
    classes(root.parent / "elsewhere", "dog", "wolf")
    (root / "dog").symlink_to(root.parent / "elsewhere" / "dog")
    (root / "cat" / "more").symlink_to("../../elsewhere/wolf")
    (root / "cat" / "one.jpg").symlink_to("0.jpg")
    (root / "cat" / "gone.jpg").symlink_to("nowhere.jpg")
    (root / "cat" / "gone").symlink_to("nowhere")
    (root / "cat" / "itself").symlink_to("itself")
    (root / "cat" / "up").symlink_to("..")
    (root / "cat" / "deep").mkdir()
    (root / "cat" / "deep" / "across").symlink_to(root / "dog")  # followed: the dogs again
    (root.parent / "elsewhere" / "wolf" / "back").symlink_to(root / "cat")  # not followed: it holds the link to here


def dangling(root: Path) -> None:
    classes(root, "cat")
    (root / "dog").symlink_to("nowhere")


def too_deep(root: Path) -> None:
    """A folder whose path is longer than the system allows, which only relative paths reach."""
    classes(root, "cat")
    there = os.open(root / "cat", os.O_RDONLY)
    for _ in range(20):
        os.mkdir("x" * 250, dir_fd=there)
        below = os.open("x" * 250, os.O_RDONLY, dir_fd=there)
        os.close(there)
        there = below
    os.close(there)


def named(root: Path) -> None:
    """Names with and without extensions; the content decides for those without."""
    for number, name in enumerate(("a.jfif", "b.JPE", "c.apng", "d", "e.001", "f v1.2 final")):
        image(root / "cat" / f"{number}.png").rename(root / "cat" / name)
    Image.new("RGB", (8, 8)).save(root / "cat" / "g", "BMP")
    Image.new("RGB", (8, 8)).save(root / "cat" / "h", "WEBP")
    Image.new("RGB", (8, 8)).save(root / "cat" / "i", "TIFF")
    image(root / "dog" / "1.jpg")
    image(root / "dog" / "2.jpg").rename(root / "dog" / "2.jpg_original")
    Image.new("RGB", (8, 8)).save(root / "dog" / "raw.nef", "TIFF")
    for name in (
        "Thumbs.db",
        "notes.txt",
        "more.txt",
        "README",
        ".hidden.jpg",
        ".git/a.jpg",
        "__MACOSX/._1.jpg",
        "@eaDir/1.jpg",
    ):
        (root / "dog" / name).parent.mkdir(exist_ok=True)
        (root / "dog" / name).write_bytes(b"BMI of the patients")
    os.mkfifo(root / "dog" / "pipe.jpg")
    (root / "empty" / "below").mkdir(parents=True)
    (root / "labels.csv").touch()


def parted(*folders: str) -> object:
    def make(root: Path) -> None:
        for folder in folders:
            classes(root / folder, "cat", "dog")

    return make


def unlabelled(root: Path) -> None:
    classes(root / "train", "cat", "dog")
    classes(root, "test")


def nested(root: Path) -> None:
    classes(root / "train", "cat", "dog")
    classes(root / "test", "test")


def mixed(root: Path) -> None:
    classes(root, "test", "cat", "dog")


def odd_names(root: Path) -> None:
    """Names that are not UTF-8, that look encoded, or that have characters of URIs."""
    os.makedirs(os.fsencode(root / "cat") + b"/caf\xe9")
    for name in (
        b"caf\xe9/1.jpg",
        b"caf\xe9.jpg",
        b"caf\xe8.jpg",
        b"100%25.jpg",
        b"100%.jpg",
        b"a b#c?d.jpg",
        "ß猫.jpg".encode(),
    ):
        image(root / "one.jpg").rename(os.fsdecode(os.fsencode(root / "cat") + b"/" + name))
    for name in ("caf\udce9", "caf\udce8"):
        (root / "cat" / f"{name}.png").write_bytes(b"no image")
    classes(root, "d%6fg #1")


def odd_class(root: Path) -> None:
    classes(root, "cat")
    os.makedirs(os.fsencode(root) + b"/caf\xe9")


def spark_paths(source: str, spark: object) -> object:
    """The images of a folder, with the paths that Spark gives them."""
    files = spark.read.format("binaryFile").option("recursiveFileLookup", "true").load(source)  # type: ignore[attr-defined]
    encoded = files.selectExpr("_metadata.file_path AS path", "concat('encoded ', path) AS id", "'cat' AS label")
    by_name = files.selectExpr("input_file_name() AS path", "concat('by name ', path) AS id", "'cat' AS label")
    return encoded.union(by_name).union(files.selectExpr("path", "concat('as it is ', path) AS id", "'cat' AS label"))


def spark_names(root: Path) -> None:
    for name in ("a b#c?d.jpg", "100%25.jpg", "ß.jpg"):
        image(root / "in the hall" / name)


def cells(root: Path) -> None:
    for cell in range(4):
        image(root / "fold" / f"UID_1_1_{cell}_all.jpg")
        image(root.parent / "elsewhere" / f"UID_H2_1_{cell}_hem.jpg")
    (root / "more").symlink_to(root.parent / "elsewhere")
    (root / "fold" / "notes.txt").touch()


def lesions(root: Path) -> None:
    for number in range(7):
        image(root.parent / "elsewhere" / f"ISIC_{number}.jpg")
    (root / "part 1").symlink_to(root.parent / "elsewhere")
    image(root / "part 2" / "ISIC_0.jpg")
    header = "lesion_id,image_id,dx,dx_type,age,sex,localization\n"
    lines = "".join(f"HAM_{number},ISIC_{number},{'nv' if number % 2 else 'mel'},histo,50,male,ear\n" for number in range(6))
    (root / "HAM10000_metadata").write_text(header + lines)
    (root / "notes.txt").touch()


TWO = {"cat": 8, "dog": 8}

PLACES: list[Given] = [
    Given(
        "links",
        linked,
        rows={"cat": 13, "dog": 4},
        rejected={"gone.jpg": "No such file", "gone": "No such file", "itself": "symbolic links"},
        passed_over={"a link to a folder that holds it": 2},
    ),
    Given("links to cells", cells, layout="cnmc", rows={"all": 4, "hem": 4}, passed_over={"not an image (.txt)": 1}),
    Given(
        "links to lesions",
        lesions,
        layout="ham10000",
        rows={"mel": 3, "nv": 3},
        passed_over={"not an image (.txt)": 1, "a second image of one name": 1, "not in the table": 1},
    ),
    Given("a class that links to nothing", dangling, error=r"link to 'nowhere'.*Correct or remove"),
    Given("a folder that cannot be listed", too_deep, error="readable folder .*File name too long"),
    Given(
        "names and content",
        named,
        rows={"cat": 9, "dog": 1},
        passed_over={
            "hidden": 4,
            "not an image (.txt)": 2,
            "not an image (.db)": 1,
            "not an image (no extension)": 1,
            "an image by its content, of an unknown extension (.jpg_original)": 1,
            "an image by its content, of an unknown extension (.nef)": 1,
            "neither a file nor a folder": 1,
            "a class folder without images": 1,
            "beside the class folders": 1,
        },
        warning="passed over: .*a class folder without images",
    ),
    Given("train and test", parted("train", "test"), rows=TWO, parts={"train": 8, "test": 8}),
    Given(
        "three parts, one in two folders",
        parted("Training_set", "VAL", "valid", "test-images"),
        rows={"cat": 16, "dog": 16},
        parts={"train": 8, "validation": 16, "test": 8},
    ),
    Given("a part alone", parted("train"), rows={"cat": 4, "dog": 4}, parts={"train": 6, "test": 2}),
    Given(
        "a test part without labels",
        unlabelled,
        rows={"cat": 4, "dog": 4},
        parts={"train": 6, "test": 2},
        passed_over={"beside the class folders": 4},
    ),
    Given("a folder above the classes", parted("photos"), rows={"photos": 8}, warning="All images have the label 'photos'"),
    Given("parts and another split", parted("train", "test"), settings={"split": Split(test=0.5)}, error="is split already"),
    Given("parts without train", parted("val", "test"), error="Add the part train"),
    Given(
        "parts in parts", parted("train/train", "test/test"), error="got 't[a-z]*', named like a part. Move its content up"
    ),
    Given("an unlabelled part in itself", nested, error="collection/test; got 'test', named like a part"),
    Given("a file as the source", linked, source=lambda root: root / "cat" / "0.jpg", error="0.jpg', which is a file"),
    Given("a part among classes", mixed, error="Move 'cat' away, or rename 'test'"),
    Given(
        "odd names",
        odd_names,
        rows={"cat": 7, "d%6fg #1": 4},
        rejected={"caf%E9.png": "not a JPEG", "caf%E8.png": "not a JPEG"},
    ),
    Given("a class whose name is not UTF-8", odd_class, error=r"names in UTF-8.*caf\\xe9"),
    Given("paths as Spark gives them", spark_names, layout=spark_paths, rows={"cat": 9}),
    Given(
        "a file URI", odd_names, source=Path.as_uri, rows={"cat": 7, "d%6fg #1": 4}, rejected={"%E9.png": "", "%E8.png": ""}
    ),
]
