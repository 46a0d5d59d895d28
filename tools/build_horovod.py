#!/usr/bin/env python3
"""Build Horovod for the Python environment that runs this file, and install it there.

    python tools/build_horovod.py              build (or take from the cache) and install
    python tools/build_horovod.py --wheel      build (or take from the cache) and print the wheel's path

Horovod is distributed as source only, and its last release does not compile against current TensorFlow wheels.
This script downloads that release (version and sha256: tools/horovod/requirements.txt), applies
tools/horovod/*.patch and compiles it once, which takes a few minutes. It caches the wheel in
${XDG_CACHE_HOME:-~/.cache}/dlspark/wheels, in a folder named after everything that the wheel depends on, and only
after a test import has succeeded.

The environment needs tensorflow, setuptools<80, wheel, cmake, packaging, cffi, cloudpickle, psutil and pyyaml;
the machine needs make and a C++ compiler. Horovod's build variables (HOROVOD_GPU_OPERATIONS=NCCL,
HOROVOD_WITH_MPI=1, ...) override the defaults below and are part of the name.

Exit code: 0 success; 1 the build failed; 3 this machine lacks something, which the message names.
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
    """This machine lacks something that only the user can install."""


class Failed(Exception):
    """The build failed."""


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
        raise Failed(f"Expected a line horovod==VERSION in {REQUIREMENTS}; got none. Restore the file.")
    return found[1]


def build_choices() -> dict[str, str]:
    """Return the variables that select what is compiled: the defaults, overridden by the environment."""
    choices = dict(DEFAULTS)
    for name, value in os.environ.items():
        if name.startswith(CHOICES):
            opposite = name.replace("_WITH_", "_WITHOUT_") if "_WITH_" in name else name.replace("_WITHOUT_", "_WITH_")
            if opposite != name:
                choices.pop(opposite, None)
            choices[name] = value
    return choices


def cache_key() -> str:
    """Return the name of the wheel's folder, derived from everything that the compiled code depends on."""
    tensorflow = installed_version("tensorflow")
    if tensorflow is None:
        raise Missing(f"Expected TensorFlow for {sys.executable}; got none. Run pip install tensorflow.")
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
            "Expected a C++ compiler; got none. Install g++ (Debian/Ubuntu: apt-get install g++) to build the Horovod "
            "backend; everything else works without it."
        )
    if not shutil.which("make"):
        raise Missing(
            "Expected make; got none. Install it (Debian/Ubuntu: apt-get install make) to build the Horovod backend; "
            "everything else works without it."
        )
    absent = [name for name in NEEDED if installed_version(name) is None]
    if absent:
        names = " ".join("'setuptools<80'" if name == "setuptools" else name for name in absent)
        raise Missing(f"Expected the packages that build Horovod; got an environment without some. Run pip install {names}.")


def apply_patch(patch: Path, root: Path) -> None:
    """Apply a unified diff to existing files, without the `patch` program. Lines must match exactly."""
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
                    raise Failed(f"Expected line {position + 1} of {target} as in {patch.name}; got another. Fix the patch.")
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
        raise Failed(f"{what} failed. The log is {log}; it ends with:\n{tail}")


def build(folder: Path) -> Path:
    """Build the wheel and move it into `folder` atomically."""
    check_tools()
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "build.log"
    log.write_text("")
    jobs = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    say(f"building {pinned_version()} for TensorFlow {installed_version('tensorflow')}, once; this takes a few minutes")
    say(f"log: {log}")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    env = {name: value for name, value in os.environ.items() if name not in ("MAKELEVEL", "MFLAGS")}
    env |= build_choices()
    env |= {
        "MAKEFLAGS": f"-j{jobs}",
        "CMAKE_POLICY_VERSION_MINIMUM": "3.5",  # cmake 4 rejects gloo's older declarations
        "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]),
    }
    with tempfile.TemporaryDirectory(prefix="dlspark-horovod-") as temporary:
        work = Path(temporary)
        # Build isolation would fetch unpinned build tools.
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
        shutil.rmtree(source)  # the trial import below must not use it
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
    """Return whether this environment already has exactly this wheel."""
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
