#!/usr/bin/env python3
"""Install a set of requirements and this tree's projects. `make` runs this; it returns at once if nothing changed.

There are two sets. "all" has all engines, with Spark 3.5, and goes into .venv; "current" (--set current) has today's
versions with Spark 4, without the engines whose pins forbid them, and goes into .venv-current.

uv installs everything. Each step stores a digest of its inputs in .venv/set-up.json and runs again only if that digest
changes. While an environment is incomplete it holds a file `unfinished`; after an interruption the next run creates it
anew, from uv's cache. Without a C++ compiler the Horovod backend is skipped; the first run that finds a compiler adds it.

--jax also creates .venv-jax, with jax and without TensorFlow or Spark: the tests prove there that neither is needed.
"""

import argparse
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
JAX_LOCK = ROOT / "requirements-jax.lock"
JAX_VENV = ROOT / ".venv-jax"
FIRST = ("pip", "setuptools", "uv", "wheel")  # pip installs uv; uv builds source distributions with the others
ENGINES = ("mirrored", "horovod", "elephas")
MISSING = 3  # exit code of tools/build_horovod.py when this machine lacks something; it has printed the message


@dataclass(frozen=True)
class Set:
    """A set of requirements.

    Attributes:
        name: as --set takes it.
        lock: its file.
        venv: its environment.
        pythons: the versions that it is for.
        engines: those that it has, of ENGINES.
        size: of the download, in words.
    """

    name: str
    lock: Path
    venv: Path
    pythons: tuple[tuple[int, int], ...]
    engines: tuple[str, ...]
    size: str

    @property
    def python(self) -> Path:
        return self.venv / "bin" / "python"

    @property
    def stamp(self) -> Path:
        return self.venv / "set-up.json"

    @property
    def unfinished(self) -> Path:
        return self.venv / "unfinished"


ALL = Set("all", ROOT / "requirements.lock", ROOT / ".venv", ((3, 11),), ENGINES, "1.3 GB")
CURRENT = Set(
    "current", ROOT / "requirements-current.lock", ROOT / ".venv-current", ((3, 12), (3, 13)), ENGINES[:1], "1.2 GB"
)


class SetUpError(Exception):
    """Set-up failed; the text says why and what to do."""


def say(text: str) -> None:
    print(f"set-up: {text}", flush=True)


def digest(*parts: Path | str) -> str:
    total = hashlib.sha256()
    for part in parts:
        data = part.read_bytes() if isinstance(part, Path) else part.encode()
        total.update(hashlib.sha256(data).digest())
    return total.hexdigest()


def projects(chosen: Set) -> list[Path]:
    """The folders of this tree that are distributions: the root, the backends of the set, the benchmarks."""
    return [ROOT, *(ROOT / "backends" / engine for engine in sorted(chosen.engines)), ROOT / "benchmarks"]


def read_stamp(chosen: Set) -> dict[str, str]:
    try:
        return dict(json.loads(chosen.stamp.read_text()))
    except (OSError, ValueError):
        return {}


def write_stamp(chosen: Set, stamp: dict[str, str]) -> None:
    new = chosen.stamp.with_suffix(".new")
    new.write_text(json.dumps(stamp, indent=1) + "\n")
    os.replace(new, chosen.stamp)


@contextmanager
def only_one() -> Iterator[None]:
    """Let one set-up run at a time: a second one waits, then finds everything done."""
    with ALL.lock.open() as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("waiting for another set-up of this tree")
            fcntl.flock(held, fcntl.LOCK_EX)
        os.set_inheritable(held.fileno(), True)  # an installer that outlives this process keeps the lock
        yield


def run(what: str, *command: str | Path, stdin: str | None = None) -> None:
    done = subprocess.run([str(part) for part in command], input=stdin, text=True, close_fds=False, check=False)
    if done.returncode:
        raise SetUpError(
            f"Expected {what} to succeed; got exit code {done.returncode}. Fix the error above and run it again."
        )


def uv(home: Path, *arguments: str | Path) -> None:
    run(f"uv {arguments[0]} {arguments[1]}", home / "bin" / "uv", *arguments)


def sync(home: Path, venv: Path, lock: Path) -> None:
    uv(home, "pip", "sync", "--python", venv, "--require-hashes", "--no-build-isolation", lock)


def install_editable(home: Path, venv: Path, folders: list[Path]) -> None:
    editable = [f"--editable={folder}" for folder in folders]
    uv(home, "pip", "install", "--python", venv, "--offline", "--no-deps", "--no-build-isolation", *editable)


def start_venv(chosen: Set) -> None:
    """Create an environment that holds uv, and mark it unfinished."""
    say(f"creating {chosen.venv.name} with Python {sys.version.split()[0]}")
    if len(chosen.engines) < len(ENGINES):
        lacking = ", ".join(sorted(set(ENGINES) - set(chosen.engines)))
        say(f"the set {chosen.name!r} lacks {lacking}, which need TensorFlow below 2.20; the set 'all' has them")
    shutil.rmtree(chosen.venv, ignore_errors=True)
    chosen.venv.mkdir()
    chosen.unfinished.touch()
    made = subprocess.run([sys.executable, "-m", "venv", str(chosen.venv)], capture_output=True, text=True, check=False)
    if made.returncode:
        version = ".".join(map(str, sys.version_info[:2]))
        told = f"{made.stdout}{made.stderr}"
        raise SetUpError(f"{sys.executable} -m venv failed. Debian/Ubuntu: apt-get install python{version}-venv.\n{told}")
    blocks = re.split(r"\n(?=\S)", chosen.lock.read_text())
    first = "\n".join(block for block in blocks if block.startswith(tuple(f"{name}==" for name in FIRST)))
    flags = ("--quiet", "--disable-pip-version-check", "--require-hashes", "--no-deps", "--requirement=/dev/stdin")
    run("pip install uv", chosen.python, "-m", "pip", "install", *flags, stdin=first)


def set_up(chosen: Set) -> None:
    if sys.version_info[:2] not in chosen.pythons:
        wanted = " or ".join(".".join(map(str, version)) for version in chosen.pythons)
        raise SetUpError(
            f"Expected Python {wanted}, as in {chosen.lock.name}; got {sys.version.split()[0]}. "
            f"Run make SET={chosen.name} PYTHON=/path/to/python."
        )
    folders, horovod = projects(chosen), ROOT / "tools" / "build_horovod.py"
    wanted = {
        # The path too: an environment that was copied or moved with its tree still points to its old place.
        "venv": digest(str(chosen.venv), sys.version),
        "lock": digest(chosen.lock),
        "projects": digest(*(folder / name for folder in folders for name in ("setup.cfg", "pyproject.toml"))),
    }
    if "horovod" in chosen.engines:
        wanted["horovod"] = digest(chosen.lock, horovod, *sorted((ROOT / "tools" / "horovod").iterdir()))
    stamp = read_stamp(chosen)
    if stamp == wanted and chosen.python.exists() and not chosen.unfinished.exists():
        return

    if chosen.unfinished.exists():
        say("the last set-up was interrupted")
    if chosen.unfinished.exists() or stamp.get("venv") != wanted["venv"] or not chosen.python.exists():
        start_venv(chosen)
        stamp = {"venv": wanted["venv"]}
        write_stamp(chosen, stamp)
    changed = [name for name in ("lock", "projects") if stamp.get(name) != wanted[name]]
    if changed:
        chosen.unfinished.touch()
        if "lock" in changed:
            say(f"installing {chosen.lock.name} ({chosen.size} to download the first time)")
            sync(chosen.venv, chosen.venv, chosen.lock)
        install_editable(chosen.venv, chosen.venv, folders)
        chosen.unfinished.unlink()
        stamp |= {name: wanted[name] for name in ("lock", "projects")}
        write_stamp(chosen, stamp)
    if stamp.get("horovod") != wanted.get("horovod"):
        status = subprocess.run([str(chosen.python), str(horovod)], check=False).returncode
        if status == 0:
            write_stamp(chosen, stamp | {"horovod": wanted["horovod"]})
        elif status != MISSING:
            say("skipped the Horovod backend; everything else works without it")
    if changed:
        say("done")


def set_up_jax() -> None:
    """Create .venv-jax. Its stamp is written last; without it the next run starts anew."""
    stamp = JAX_VENV / "set-up.json"
    wanted = digest(str(JAX_VENV), sys.version, JAX_LOCK, ROOT / "setup.cfg", ROOT / "benchmarks" / "setup.cfg")
    if stamp.exists() and stamp.read_text() == wanted:
        return
    say("creating .venv-jax: jax, without TensorFlow or Spark (150 MB to download)")
    shutil.rmtree(JAX_VENV, ignore_errors=True)
    uv(ALL.venv, "venv", "--quiet", "--python", sys.executable, JAX_VENV)
    sync(ALL.venv, JAX_VENV, JAX_LOCK)
    install_editable(ALL.venv, JAX_VENV, [ROOT, ROOT / "benchmarks"])
    stamp.write_text(wanted)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", choices=["all", "current"], default="all")
    parser.add_argument("--jax", action="store_true", help="create .venv-jax, too")
    options = parser.parse_args()
    try:
        with only_one():
            set_up({each.name: each for each in (ALL, CURRENT)}[options.set])
            if options.jax and options.set == "all":
                set_up_jax()
    except SetUpError as error:
        print(f"set-up: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nset-up: interrupted; the next run recovers", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
