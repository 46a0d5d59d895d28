"""``dlspark study``: everything from a collection of images to a table of models, as one file describes it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dlspark.cli.arguments import add_command
from dlspark.cli.output import Block, Facts, Report, Table
from dlspark.errors import ConfigError
from dlspark.mends.tensorflow_start_up import without_noise

_EXAMPLE = """
dlspark study init ham10000
dlspark study ham10000.yaml --plan
dlspark study ham10000.yaml
"""


def add_parser(commands: Any) -> None:
    """Add ``study``."""
    parser = add_command(
        commands,
        "study",
        summary="prepare, train, featurize, classify and evaluate as a file says",
        example=_EXAMPLE,
        run=run,
    )
    parser.add_argument("file", metavar="FILE", help="a study's YAML file, or: init NAME")
    parser.add_argument(
        "name", metavar="NAME", nargs="?", help="after init: ham10000 or cnmc; NAME.yaml is written, with comments"
    )
    parser.add_argument("--plan", action="store_true", help="only list the steps, and which of them are kept from before")


def run(options: argparse.Namespace) -> Report:
    """Run the study, or go on with it; finished steps are not done again."""
    if options.file == "init":
        return _init(options.name)
    if options.name is not None:
        raise ConfigError(f"dlspark study takes one FILE; got {options.name!r} besides. Or write: dlspark study init NAME")
    from dlspark.study import PAGE, Study, StudyFile

    file = StudyFile.read(options.file)
    if file.settings.networks:
        with without_noise():
            import keras  # noqa: F401 - the study's identity has its backend
    study = Study.of(file)
    if options.plan:
        plan = [[step.kind, step.name, "kept" if kept else "to do"] for step, kept in study.plan()]
        document = {"steps": [dict(zip(("kind", "name", "state"), row, strict=True)) for row in plan]}
        return Report(document, [Table(["step", "of", "state"], plan)])
    document = study.run(command=["dlspark", *options.arguments])
    return Report(document, _blocks(document, f"{study.store.uri}/{PAGE}"))


def _init(name: str | None) -> Report:
    from dlspark.study import EXAMPLES, example

    if name is None:
        raise ConfigError(f"dlspark study init takes a NAME: {' or '.join(EXAMPLES)}.")
    text, path = example(name), Path(f"{name}.yaml")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{str(path)!r} is there already. Move it away, or go to another folder.") from None
    return Report({"file": str(path)}, [f"{path} is written: read it, and run dlspark study {path}"])


def _blocks(document: dict[str, Any], where: str) -> list[Block]:
    from dlspark.study import first_table, model_table

    blocks: list[Block] = []
    for name, split in document["splits"].items():
        blocks.append(Table(*model_table(split), title=f"split {name}"))
        if split["first"]:
            blocks.append(Table(*first_table(split), title=f"split {name}: {', '.join(split['first'])}"))
    kept = sum(step["kept"] for step in document["steps"])
    facts = {"report": where, "steps": f"{len(document['steps'])}, {kept} of them kept from before"}
    facts |= {f"warning {number}": text for number, text in enumerate(document["warnings"], start=1)}
    return [*blocks, Facts(facts)]
