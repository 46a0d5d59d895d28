"""Tables and JSON."""

from __future__ import annotations

import io
import json

from dlspark.cli.output import Facts, Report, Table, write


def written(report: Report, form: str = "table") -> str:
    stream = io.StringIO()
    write(report, form, stream)
    return stream.getvalue()


def test_nothing_is_cut_or_coloured_in_a_pipe() -> None:
    long = "s3://bucket/" + "x" * 500
    text = written(Report(None, [Facts({"model": long}), Table(["name", "rows"], [[long, 3], ["[red]a[/red]", 12]])]))
    assert text.count(long) == 2
    assert text.splitlines()[-1].split() == ["[red]a[/red]", "12"]
    assert "\x1b" not in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_values_for_people() -> None:
    text = written(Report(None, [Facts({"none": None, "yes": True, "number": 0.123456, "list": (1, 2)}), "a line"]))
    assert text.splitlines() == ["none    -", "yes     yes", "number  0.1235", "list    1, 2", "", "a line"]


def test_json_holds_no_nan() -> None:
    found = json.loads(written(Report({"loss": [float("nan"), 1.0], "size": (32, 32), "ä": "ö"}, []), "json"))
    assert found == {"loss": [None, 1.0], "size": [32, 32], "ä": "ö"}
