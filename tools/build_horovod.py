#!/usr/bin/env python3
"""Build Horovod for the Python environment that runs this file, and install it there.

    python tools/build_horovod.py              build (or take from the cache) and install
    python tools/build_horovod.py --wheel      build (or take from the cache) and print the wheel's path

Horovod ships source only, and its last release does not compile against today's TensorFlow wheels. This
downloads that release (version and sha256: tools/horovod/requirements.txt), applies tools/horovod/*.patch and
compiles it once, which takes some minutes. The wheel stays in ${XDG_CACHE_HOME:-~/.cache}/dlspark/wheels, under a
name made of everything it depends on, and appears there only when it is complete and has been imported.

The environment needs tensorflow, setuptools<80, wheel, cmake, packaging, cffi, cloudpickle, psutil and pyyaml;
the machine needs make and a C++ compiler. Build variables of Horovod that are set (HOROVOD_GPU_OPERATIONS=NCCL,
HOROVOD_WITH_MPI=1, ...) take the place of those below and are part of the name.

Exit status: 0 done; 3 something is missing on this machine, and the message says what; 1 the build failed.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE / "horovod" / "requirements.txt"
PATCHES = sorted((HERE / "horovod").glob("*.patch"))
DEFAULTS = {
    "HOROVOD_WITH_TENSORFLOW": "1",
    "HOROVOD_WITHOUT_PYTORCH": "1",
    "HOROVOD_WITHOUT_MXNET": "1",
    "HOROVOD_WITHOUT_MPI": "1",
    "HOROVOD_WITH_GLOO": "1",
}
CHOICES = ("HOROVOD_BUILD", "HOROVOD_CUDA", "HOROVOD_GPU", "HOROVOD_NCCL", "HOROVOD_ROCM", "HOROVOD_WITH")
NEEDED = ("setuptools", "wheel", "cmake", "packaging", "cffi", "cloudpickle", "psutil", "pyyaml")
MISSING = 3


class Missing(Exception):
    """Something that only the user can install is not there."""


class Failed(Exception):
    """The build did not work."""


def say(text: str) -> None:
    print(f"horovod: {text}", file=sys.stderr, flush=True)


def installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def pinned_version() -> str:
    found = re.search(r"^horovod==(\S+)", REQUIREMENTS.read_text(), re.MULTILINE)
    if not found:
        raise Failed(f"{REQUIREMENTS} names no horovod==VERSION")
    return found[1]


def build_choices() -> dict[str, str]:
    """Returns the variables that decide what is compiled: ours, and over them those the user has set."""
    choices = dict(DEFAULTS)
    for name, value in os.environ.items():
        if name.startswith(CHOICES):
            opposite = name.replace("_WITH_", "_WITHOUT_") if "_WITH_" in name else name.replace("_WITHOUT_", "_WITH_")
            if opposite != name:
                choices.pop(opposite, None)
            choices[name] = value
    return choices


def cache_key() -> str:
    """Returns the name of the wheel's folder: everything that the compiled code depends on."""
    tensorflow = installed_version("tensorflow")
    if tensorflow is None:
        raise Missing(f"TensorFlow is not installed for {sys.executable}: install it first (pip install tensorflow).")
    recipe = hashlib.sha256(REQUIREMENTS.read_bytes())
    for patch in PATCHES:
        recipe.update(patch.read_bytes())
    recipe.update(json.dumps(build_choices(), sort_keys=True).encode())
    parts = [pinned_version(), sys.implementation.cache_tag, "tensorflow", tensorflow, sysconfig.get_platform()]
    return "-".join(["horovod", *parts, recipe.hexdigest()[:12]])


def cache_folder() -> Path:
    # The XDG specification: an empty or relative value counts as unset.
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "dlspark" / "wheels" / cache_key()


def check_tools() -> None:
    compilers = [os.environ["CXX"].split()[0]] if os.environ.get("CXX", "").strip() else ["c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in compilers):
        raise Missing(
            "No C++ compiler found: install g++ (Debian/Ubuntu: apt-get install g++) to build the Horovod backend; "
            "everything else works without it."
        )
    if not shutil.which("make"):
        raise Missing(
            "No make found: install it (Debian/Ubuntu: apt-get install make) to build the Horovod backend; "
            "everything else works without it."
        )
    absent = [name for name in NEEDED if installed_version(name) is None]
    if absent:
        names = " ".join("'setuptools<80'" if name == "setuptools" else name for name in absent)
        raise Missing(f"To build Horovod, this environment also needs: pip install {names}")


def apply_patch(patch: Path, root: Path) -> None:
    """Applies a unified diff of existing files, every line exactly where it says (no `patch` program needed)."""
    target: Path | None = None
    old: list[str] = []
    new: list[str] = []
    position = remaining_old = remaining_new = 0

    def finish() -> None:
        if target is not None:
            target.write_text("".join([*new, *old[position:]]))

    for line in patch.read_text().splitlines(keepends=True):
        if remaining_old or remaining_new:
            kind, text = line[0], line[1:]
            if kind in " -":
                if position >= len(old) or old[position] != text:
                    raise Failed(f"{patch.name} does not fit {target}, line {position + 1}")
                position, remaining_old = position + 1, remaining_old - 1
            if kind in " +":
                new.append(text)
                remaining_new -= 1
        elif line.startswith("+++ "):
            finish()
            target = root / line[4:].strip().split("/", 1)[1]
            old, new, position = target.read_text().splitlines(keepends=True), [], 0
        elif hunk := re.match(r"@@ -(\d+)(?:,(\d+))? \+\d+(?:,(\d+))? @@", line):
            start = int(hunk[1]) - 1
            new += old[position:start]
            position, remaining_old, remaining_new = start, int(hunk[2] or 1), int(hunk[3] or 1)
    finish()


def run(command: list[str], log: Path, env: dict[str, str], what: str) -> None:
    with log.open("a") as output:
        output.write(f"$ {' '.join(command)}\n")
        output.flush()
        status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=env, check=False).returncode
    if status:
        tail = "".join(f"  | {line[:300]}\n" for line in log.read_text(errors="replace").splitlines()[-15:])
        raise Failed(f"{what} failed (the whole log: {log}):\n{tail}")


def build(folder: Path) -> Path:
    """Builds the wheel and moves it into `folder` in one step."""
    check_tools()
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "build.log"
    log.write_text("")
    jobs = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    say(f"building {pinned_version()} for TensorFlow {installed_version('tensorflow')}, once; this takes some minutes")
    say(f"log: {log}")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    env = {name: value for name, value in os.environ.items() if name not in ("MAKELEVEL", "MFLAGS")}
    env |= build_choices()
    env |= {
        "MAKEFLAGS": f"-j{jobs}",
        "CMAKE_POLICY_VERSION_MINIMUM": "3.5",  # cmake 4 refuses the older declarations of gloo
        "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]),
    }
    with tempfile.TemporaryDirectory(prefix="dlspark-horovod-") as temporary:
        work = Path(temporary)
        # Without isolation: pip would otherwise fetch build tools that nothing pins.
        download = ["download", "--no-deps", "--no-build-isolation", "--no-binary=horovod", "--require-hashes"]
        run([*pip, *download, f"--requirement={REQUIREMENTS}", f"--dest={work}"], log, env, "Downloading Horovod")
        (archive,) = work.glob("horovod-*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(work, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        source = work / archive.name.removesuffix(".tar.gz")
        for patch in PATCHES:
            apply_patch(patch, source)
        wheel_command = ["wheel", "--verbose", "--no-deps", "--no-build-isolation", "--no-cache-dir"]
        run([*pip, *wheel_command, f"--wheel-dir={work / 'out'}", str(source)], log, env, "Compiling Horovod")
        (wheel,) = (work / "out").glob("horovod-*.whl")
        shutil.unpack_archive(wheel, work / "try", "zip")
        shutil.rmtree(source)  # so that nothing compiled can still lean on it
        trial = env | {"PYTHONPATH": str(work / "try"), "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
        run([sys.executable, "-c", "import horovod.tensorflow"], log, trial, "Importing the new Horovod")
        unfinished = folder / f".{wheel.name}.{os.getpid()}"
        shutil.copyfile(wheel, unfinished)
        os.replace(unfinished, folder / wheel.name)
    say(f"built {folder / wheel.name}")
    return folder / wheel.name


def cached_or_built() -> Path:
    folder = cache_folder()
    return next(iter(sorted(folder.glob("horovod-*.whl"))), None) or build(folder)


def is_installed() -> bool:
    """Whether this environment already holds the very wheel that would be installed."""
    try:
        origin = importlib.metadata.distribution("horovod").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return False
    return cache_key() in (origin or "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheel", action="store_true", help="print the path of the wheel instead of installing it")
    arguments = parser.parse_args()
    try:
        if arguments.wheel:
            print(cached_or_built())
        elif is_installed():
            say(f"{pinned_version()} is installed")
        else:
            wheel = cached_or_built()
            install = ["install", "--quiet", "--no-index", "--no-deps", "--force-reinstall", str(wheel)]
            subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *install], check=True)
            say(f"installed {pinned_version()}")
    except Missing as missing:
        print(missing, file=sys.stderr)
        return MISSING
    except Failed as failed:
        print(failed, file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as failed:
        return failed.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
