"""A small study by the command line: from images to a table of models, repeated, changed and killed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest

from dlspark.cli.main import main
from dlspark.study.study import Study
from dlspark.study.study_file import StudyFile
from dlspark.testing.cells import cell_files

pytestmark = [pytest.mark.spark, pytest.mark.slow, pytest.mark.timeout(600)]

EPOCHS = 10
STUDY = """\
name: cells
store: store
seed: 3
data: {source: "s3://clinic/cells", layout: cnmc, image_size: 32}
splits:
  by_patient: {test: 0.34, group: subject}
networks:
  plain: {backbone: mobilenet, weights: none}
  tuned:
    backbone: mobilenet
    weights: none
    dense: [4]
    augment: [flip]
    batch_size: 16
    backend: mirrored
    workers: 2
    phases: [{epochs: 10, fine_tune: head, learning_rate: 1e-3}]
metadata: {numeric: [cell]}
features:
  dense: {networks: [tuned], layer: dense_1}
  pooled: {networks: [plain], pca: 3}
classifiers:
  forest: {algorithm: random_forest, features: [pooled], params: {maxDepth: 1, numTrees: 2}}
  lr: {algorithm: logistic_regression, features: [dense], params: {maxIter: 2}, grid: {regParam: [0.1, 0.3]}}
cross_validation: {folds: 2}
ensembles:
  both: {models: [tuned, lr/dense]}
evaluate: {bootstrap: 20, by: ["cell:2"], first: [hem, all]}
"""

NETWORK = "networks: {n: {backbone: mobilenet, weights: none}}\n"


def write_cells(folder: str, **numbers: int) -> None:
    for name, content in cell_files(**numbers):
        with fsspec.open(f"{folder}/{name}", "wb") as file:
            file.write(content)


@pytest.fixture(scope="module")
def finished(endpoint: str, spark: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study of S3 images, killed in training and run again in a session that does not know the bucket."""
    folder = tmp_path_factory.mktemp("finished")
    write_cells("s3://clinic/cells", ill=4, healthy=4, cells=6)
    (folder / "cells.yaml").write_text(STUDY)
    command = [sys.executable, "-m", "dlspark", "study", "cells.yaml", "--format", "json"]
    with (folder / "output").open("w") as output:
        victim = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output)
        try:
            until = time.monotonic() + 250
            while len(list(folder.glob("store/train-*/runs/*/checkpoints/*.json"))) < 2:
                assert victim.poll() is None, (folder / "output").read_text()[-2000:]
                assert time.monotonic() < until
                time.sleep(0.05)
        finally:
            victim.kill()
            victim.wait(30)
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(command[3:]) == 0
    assert json.loads(printed.getvalue()) == json.loads((folder / "store/study.json").read_text())
    (folder / "resumed.json").write_text(printed.getvalue())
    return folder


def test_a_study_goes_from_images_in_s3_to_a_table(finished: Path) -> None:
    report = json.loads((finished / "store/study.json").read_text())
    by_patient = report["splits"]["by_patient"]
    assert set(by_patient["models"]) == {"tuned", "forest/pooled", "lr/dense", "both"}
    assert by_patient["best"] in by_patient["models"]
    assert by_patient["data"]["leak"] is None
    assert by_patient["data"]["split"]["groups"]["torn"] == 0
    assert report["warnings"] == []
    assert len(by_patient["networks"]["tuned"]["history"]["loss"]) == EPOCHS
    regression = by_patient["fits"]["lr/dense"]
    assert regression["inputs"] == 4 + 1
    assert [each["params"] for each in regression["tried"]] == [{"regParam": 0.1}, {"regParam": 0.3}]
    forest = by_patient["fits"]["forest/pooled"]
    assert forest["inputs"] == 3 + 1
    assert len(forest["explained"]) == 3
    assert sum(forest["explained"]) <= 1
    assert sum(by_patient["data"]["split"]["parts"]["test"]["groups_by_class"].values()) == 2
    for model in by_patient["models"].values():
        assert model["rows"] == by_patient["data"]["parts"]["test"]["rows"]
        assert 0 <= model["scores"]["weighted_f1"]["low"] <= model["scores"]["weighted_f1"]["high"] <= 1
        assert set(model["by"]) == {"cell:2"}


def test_a_person_sees_all_of_it_on_its_page(finished: Path, browser: Any) -> None:
    """In Chromium, offline, on screen and in print."""
    with browser.new_context(offline=True, viewport={"width": 1000, "height": 800}) as context:
        page = context.new_page()
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("request", lambda request: complaints.append(request.url) if request.url.startswith("http") else None)
        page.goto((finished / "store/study.html").as_uri())
        assert page.title() == "Study cells"
        headings = page.locator("h1, h2").all_inner_texts()
        for told in (
            "Study cells",
            "Split by_patient: models on the test part",
            "Split by_patient: recall by class",
            "Split by_patient: f1 by class",
            "Split by_patient: data",
            "Split by_patient: classifiers",
            "Data",
            "Times",
            "Versions",
        ):
            assert told in headings
        models = page.locator("table").first
        assert models.is_visible()
        rows = [row.split("\t") for row in models.locator("tbody tr").all_inner_texts()]
        assert {row[0] for row in rows} == {"tuned", "forest/pooled", "lr/dense", "both"}
        assert sum(row[-1] == "best" for row in rows) == 1
        assert "weighted f1" in models.locator("th").all_inner_texts()
        first = page.locator("table").nth(1)
        assert first.locator("th").all_inner_texts() == ["model", "recall hem", "f1 hem", "recall all", "f1 all"]
        assert first.locator("tbody tr").count() == 4
        recalls = page.locator("h2", has_text="recall by class").locator("xpath=following-sibling::table[1]")
        assert recalls.locator("th").all_inner_texts() == ["model", "all", "hem"]
        times = page.locator("h2", has_text="Times").locator("xpath=following-sibling::table[1]").locator("tbody tr")
        told = [row.split("\t") for row in times.all_inner_texts()]
        assert {"prepare", "train", "featurize", "fit", "evaluate"} <= {row[0] for row in told}
        assert all(float(row[2].replace(",", "")) > 0 for row in told)
        assert page.get_by_text("dlspark study cells.yaml").is_visible()
        assert page.locator("td", has_text="keras").first.is_visible()
        pictures = page.locator("img")
        assert pictures.count() >= 2 + 4 + 3  # groups, learning, confusion of each, more of the best
        for picture in pictures.all():
            assert picture.evaluate("each => each.complete && each.naturalWidth > 300"), "it is not shown"
            assert len(picture.get_attribute("alt")) > 10
        shown = " | ".join(picture.get_attribute("alt") for picture in pictures.all())
        for what in (
            "groups by class",
            "learning curves",
            "variance explained",
            "confusion of tuned",
            "roc of",
            "recall of",
            "sample images",
        ):
            assert what in shown
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "wider than the window"
        page.emulate_media(media="print")
        page.set_viewport_size({"width": 718, "height": 1000})  # A4 at 96 dots an inch, less margins of 1 cm
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "wider than the paper"
        assert complaints == []


def test_it_repeats_only_what_changed(
    finished: Path, spark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished)

    def run(text: str, *more: str) -> Any:
        Path("cells.yaml").write_text(text)
        assert main(["study", "cells.yaml", *more, "--format", "json"]) == 0
        return json.loads(capsys.readouterr().out)

    report = json.loads(Path("store/study.json").read_text())
    assert {step["state"] for step in run(STUDY, "--plan")["steps"]} == {"kept"}
    assert {step["state"] for step in run(STUDY.replace("seed: 3", "seed: 4"), "--plan")["steps"]} == {"to do"}
    plan = run(STUDY.replace("\nnetworks:", "\n  by_image: {test: 0.4}\nnetworks:"), "--plan")["steps"]
    assert [step["kind"] for step in plan[:6]] == ["prepare", "explore", "rows"] * 2, "all data before any training"
    Path("cells.yaml").write_text(STUDY)
    assert main(["study", "cells.yaml"]) == 0
    printed = capsys.readouterr().out
    assert "split by_patient" in printed
    assert "recall hem" in printed
    again = json.loads(Path("store/study.json").read_text())
    assert all(step["kept"] for step in again["steps"])
    assert again["splits"] == report["splits"]
    changed = run(STUDY.replace("regParam: [0.1", "regParam: [0.2"))
    done = [(step["kind"], step["name"].removeprefix("by_patient ")) for step in changed["steps"] if not step["kept"]]
    assert done == [("fit", "lr/dense"), ("ensemble", "both"), ("evaluate", "lr/dense"), ("evaluate", "both")]
    assert changed["splits"]["by_patient"]["models"]["tuned"] == report["splits"]["by_patient"]["models"]["tuned"]
    assert {"by_patient-learning-curves.png", "by_patient-variance-explained.png"} <= {
        p.name for p in Path("store").iterdir()
    }


def test_a_killed_study_resumes_within_its_training(finished: Path) -> None:
    report = json.loads((finished / "resumed.json").read_text())
    assert len(report["splits"]["by_patient"]["networks"]["tuned"]["history"]["loss"]) == EPOCHS
    kept = {step["kind"]: step["kept"] for step in report["steps"]}
    assert kept["prepare"]
    assert not kept["train"]
    (events,) = finished.glob("store/train-*/runs/*/events.jsonl")  # one run, not two
    done = [event["epoch"] for event in map(json.loads, events.read_text().splitlines()) if event["kind"] == "epoch"]
    assert len(done) <= 2 * (EPOCHS + 1), "only the interrupted epoch is trained again"


def test_a_split_by_image_is_warned_of(
    spark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_cells("cells", ill=2, healthy=2, cells=4)
    lines = ["name: leak", "store: store", "data: {source: cells, layout: cnmc, image_size: 32}", "splits: {by_image: {}}"]
    Path("leak.yaml").write_text("\n".join(lines))
    assert main(["study", "leak.yaml"]) == 0
    assert "warning 1" in capsys.readouterr().out
    report = json.loads(Path("store/study.json").read_text())
    assert "This split leaks: 4 of 4 groups" in report["warnings"][0]
    assert report["splits"]["by_image"]["data"]["split"]["groups"]["torn"] == 4
    assert "This split leaks" in Path("store/study.html").read_text()

    def states() -> dict[str, str]:
        assert main(["study", "leak.yaml", "--plan", "--format", "json"]) == 0
        return {step["kind"]: step["state"] for step in json.loads(capsys.readouterr().out)["steps"]}

    assert set(states().values()) == {"kept"}
    image = next(Path("cells").rglob("*.bmp"))
    os.utime(image, ns=(0, 0))
    assert set(states().values()) == {"to do"}, "an image was changed"
    assert main(["study", "leak.yaml"]) == 0
    Path("leak.yaml").write_text("\n".join([*lines, NETWORK.replace("none", "weights.h5")]))
    keys = set()
    for content in (b"one", b"other"):
        Path("weights.h5").write_bytes(content)
        keys |= {step.key for step in Study.of(StudyFile.read("leak.yaml")).steps if step.kind == "network"}
    assert len(keys) == 2, "a weights file was changed"
    capsys.readouterr()

    # Settings that do not match the data are found before any training, with kept data too.
    for more, told in (
        ("metadata: {numeric: [cel]}", "Expected a column of the data; got 'cel'. Did you mean 'cell'"),
        ("metadata: {numeric: [subject]}", "expected numbers in column 'subject'"),
        ("evaluate: {by: [imag]}", "Expected a column of the data; got 'imag'"),
        ("evaluate: {by: ['subject:2']}", "Expected numbers to put into bands"),
        ("evaluate: {first: [hemm]}", "evaluate.first: expected a class; got 'hemm'. Did you mean 'hem'"),
        (NETWORK + "features: {a: {networks: [n], layer: poling}}", "features.a: The model has no layer 'poling'"),
        (NETWORK + "features: {a: {networks: [n], pca: 1025}}", "features.a: pca: expected at most 1024 components"),
        (NETWORK.replace("none", "gone.h5"), "networks.n: "),
    ):
        Path("leak.yaml").write_text("\n".join([*lines, more]))
        assert main(["study", "leak.yaml"]) == 2
        assert told in capsys.readouterr().err


def test_a_store_among_the_images_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_cells("cells", ill=1, healthy=1, cells=1)
    lines = ["name: a", "store: cells/store", "data: {source: cells, layout: cnmc, image_size: 8}", "splits: {by_image: {}}"]
    Path("a.yaml").write_text("\n".join(lines))
    assert main(["study", "a.yaml"]) == 2
    assert "Expected the store outside the images' folder" in capsys.readouterr().err
    Path("a.yaml").write_text("\n".join(lines).replace("cells/store", "store").replace("{}", "{test: 0.9, validation: 0.3}"))
    assert main(["study", "a.yaml"]) == 2
    assert "splits.by_image: Expected test and validation" in capsys.readouterr().err


def test_what_cannot_work_is_refused_before_any_work(
    endpoint: str, spark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_cells("cells", ill=1, healthy=1, cells=1)
    study = STUDY.replace("s3://clinic/cells", "cells")
    for old, new, told in (
        ("regParam", "regparam", "classifiers.lr: LogisticRegression has no parameter 'regparam'. Did you mean 'regParam'"),
        ("maxIter: 2", "maxIter: -2", "maxIter given invalid value -2"),
        ("backend: mirrored", "backend: local", "networks.tuned: Expected num_workers of at most 1 for backend 'local'"),
        ("image_size: 32", "image_size: 16", "networks.plain: Expected image_size"),
        ("augment: [flip]", "augment: ['flip:banana']", "networks.tuned: Expected 'flip' without a number"),
        ('source: "cells"', "source: cellz", "data.source: Expected a folder; got"),
        (
            'source: "cells"',
            "source: 's3://nowhere-at-all/cells'",
            "data.source: Expected a folder; got 's3://nowhere-at-all/cells', which does not exist",
        ),
    ):
        assert old in study
        Path("cells.yaml").write_text(study.replace(old, new, 1))
        assert main(["study", "cells.yaml"]) == 2, new
        assert told in capsys.readouterr().err
    assert not Path("store").exists()
