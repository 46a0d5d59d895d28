"""What pip gets: the distributions' names, what they require, and the files that `make dist` builds."""

from __future__ import annotations

import email
import re
import subprocess
import tarfile
import zipfile
from email.message import Message
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dlspark._require import DISTRIBUTION, installed_version
from dlspark.registry import PLUGINS, installed_engines

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    DISTRIBUTION: ROOT,
    "dlspark-keras-bench": ROOT / "benchmarks",
    **{f"dlspark-keras-{name}": ROOT / "backends" / name for name in PLUGINS},
}
INSTALLED = [name for name in FOLDERS if installed_version(name)]
EXTRAS = sorted(metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or ())
# What must not be written anywhere: the name on PyPI that is another project's, and the plug-ins' former names.
WRONG = re.compile(
    r"dlspark\[[a-z]"
    r"|pip install[^\n]*[\s'\"]dlspark(?=[\s'\"<>=!~;,]|$)"
    r"|dlspark-(mirrored|horovod|elephas)(?![-\w])",
    re.MULTILINE,
)


def required(name: str, extra: str = "") -> set[str]:
    """Names of all distributions that pip installs with ``name``, as far as their metadata is installed here."""
    found: set[str] = set()
    wanted = {(canonicalize_name(name), extra)}
    seen = set(wanted)
    while wanted:
        name, extra = wanted.pop()
        found.add(name)
        try:
            texts = metadata.requires(name) or ()
        except metadata.PackageNotFoundError:
            continue
        for each in map(Requirement, texts):
            if each.marker is None or each.marker.evaluate({"extra": extra}):
                new = {(canonicalize_name(each.name), option) for option in ("", *each.extras)} - seen
                wanted |= new
                seen |= new
    return found


@pytest.mark.parametrize("name", INSTALLED)
def test_only_the_extra_spark_brings_pyspark(name: str) -> None:
    assert "pyspark" not in required(name)
    if name != "dlspark-keras-bench":
        assert "pyspark" in required(name, "spark")


@pytest.mark.parametrize("extra", [extra for extra in EXTRAS if extra != "spark"])
def test_no_other_extra_brings_pyspark(extra: str) -> None:
    assert "pyspark" not in required(DISTRIBUTION, extra)


def test_engines_name_distributions_that_are_installed() -> None:
    engines = installed_engines()
    assert "mirrored" in engines
    for name, engine in engines.items():
        for package in engine.packages:
            assert installed_version(package), f"{name} names {package}"


def test_the_command_for_elephas_installs_the_version_that_the_plugin_requires() -> None:
    (line,) = re.findall(r"^ +(elephas==.*)$", (FOLDERS["dlspark-keras-elephas"] / "setup.cfg").read_text(), re.MULTILINE)
    assert f"--no-deps {line} " in PLUGINS["elephas"]


def test_nothing_tells_anybody_to_install_another_project() -> None:
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        path = ROOT / name
        if path.is_file() and path != Path(__file__):
            found = WRONG.search(path.read_bytes().decode(errors="replace"))
            assert found is None, f"{name}: {found and found[0]}"


@pytest.mark.parametrize(
    "text", ["pip install dlspark", "pip install 'dlspark>=1'", "Run: pip install 'dlspark[spark]'.", '"dlspark-elephas"']
)
def test_what_counts_as_another_project(text: str) -> None:
    assert WRONG.search(text)
    assert not WRONG.search(re.sub("dlspark", "dlspark-keras", text))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `make dist` fills; it runs `twine check --strict`."""
    folder = tmp_path_factory.mktemp("dist")
    ran = subprocess.run(
        ["make", "--old-file=set-up", "dist", f"DIST={folder}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count("PASSED") == 2 * len(FOLDERS)
    return folder


def files_and_metadata(archive: Path) -> tuple[set[str], Message]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            names = wheel.namelist()
            (about,) = (name for name in names if name.endswith(".dist-info/METADATA"))
            return set(names), email.message_from_bytes(wheel.read(about))
    with tarfile.open(archive) as sdist:
        names = [name.partition("/")[2] for name in sdist.getnames()]
        content = sdist.extractfile(f"{archive.name.removesuffix('.tar.gz')}/PKG-INFO")
        assert content is not None
        return set(names), email.message_from_bytes(content.read())


@pytest.mark.full
@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("kind", ["-py3-none-any.whl", ".tar.gz"])
def test_what_make_dist_builds(built: Path, name: str, kind: str) -> None:
    (archive,) = built.glob(f"{name.replace('-', '_')}-[0-9]*{kind}")
    files, about = files_and_metadata(archive)
    assert about["Name"] == name
    unconditional = [Requirement(text) for text in about.get_all("Requires-Dist") or () if "extra ==" not in text]
    assert not {"pyspark", "dlspark"} & {each.name for each in unconditional}
    assert about["Description-Content-Type"] == "text/markdown"
    assert about.get_payload(decode=True).decode().strip() == (FOLDERS[name] / "README.md").read_text().strip()
    package = next(FOLDERS[name].glob("dlspark*/__init__.py")).parent
    ours = {path for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert {path.relative_to(FOLDERS[name]).as_posix() for path in ours} <= files
