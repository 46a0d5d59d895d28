#!/usr/bin/env python3
"""Install requirements.lock and this tree's projects into .venv. `make` runs this; it returns at once if nothing changed.

uv installs everything. Each step stores a digest of its inputs in .venv/set-up.json and runs again only if that digest
changes. While .venv is incomplete it holds a file `unfinished`; after an interruption the next run creates .venv anew,
from uv's cache. Without a C++ compiler the Horovod backend is skipped; the first run that finds a compiler adds it.

--jax also creates .venv-jax, with jax and without TensorFlow or Spark: the tests prove there that neither is needed.
"""

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
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
JAX_LOCK = ROOT / "requirements-jax.lock"
JAX_VENV = ROOT / ".venv-jax"
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "set-up.json"
UNFINISHED = VENV / "unfinished"
LOCKED_PYTHON = (3, 11)
FIRST = ("pip", "setuptools", "uv", "wheel")  # pip installs uv; uv builds source distributions with the others
MISSING = 3  # exit code of tools/build_horovod.py when this machine lacks something; it has printed the message


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


def projects() -> list[Path]:
    """Return the folders of this tree that are distributions: the root, each backend, the benchmarks."""
    candidates = [ROOT, *sorted((ROOT / "backends").glob("*")), ROOT / "benchmarks"]
    return [folder for folder in candidates if (folder / "setup.cfg").exists()]


def read_stamp() -> dict[str, str]:
    try:
        return dict(json.loads(STAMP.read_text()))
    except (OSError, ValueError):
        return {}


def write_stamp(stamp: dict[str, str]) -> None:
    new = STAMP.with_suffix(".new")
    new.write_text(json.dumps(stamp, indent=1) + "\n")
    os.replace(new, STAMP)


@contextmanager
def only_one() -> Iterator[None]:
    """Let one set-up run at a time: a second one waits, then finds everything done."""
    with LOCK.open() as held:
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


def uv(*arguments: str | Path) -> None:
    run(f"uv {arguments[0]} {arguments[1]}", VENV / "bin" / "uv", *arguments)


def sync(venv: Path, lock: Path) -> None:
    uv("pip", "sync", "--python", venv, "--require-hashes", "--no-build-isolation", lock)


def install_editable(venv: Path, folders: list[Path]) -> None:
    editable = [f"--editable={folder}" for folder in folders]
    uv("pip", "install", "--python", venv, "--offline", "--no-deps", "--no-build-isolation", *editable)


def start_venv() -> None:
    """Create a .venv that holds uv, and mark it unfinished."""
    say(f"creating .venv with Python {sys.version.split()[0]}")
    shutil.rmtree(VENV, ignore_errors=True)
    VENV.mkdir()
    UNFINISHED.touch()
    made = subprocess.run([sys.executable, "-m", "venv", str(VENV)], capture_output=True, text=True, check=False)
    if made.returncode:
        raise SetUpError(
            f"{sys.executable} -m venv failed. Debian/Ubuntu: apt-get install python3.11-venv.\n{made.stdout}{made.stderr}"
        )
    blocks = re.split(r"\n(?=\S)", LOCK.read_text())
    first = "\n".join(block for block in blocks if block.startswith(tuple(f"{name}==" for name in FIRST)))
    flags = ("--quiet", "--disable-pip-version-check", "--require-hashes", "--no-deps", "--requirement=/dev/stdin")
    run("pip install uv", PYTHON, "-m", "pip", "install", *flags, stdin=first)


def set_up() -> None:
    if sys.version_info[:2] != LOCKED_PYTHON:
        wanted = ".".join(map(str, LOCKED_PYTHON))
        raise SetUpError(
            f"Expected Python {wanted}, as in requirements.lock; got {sys.version.split()[0]}. "
            f"Run make PYTHON=/path/to/python{wanted}."
        )
    folders = projects()
    horovod = ROOT / "tools" / "build_horovod.py"
    wanted = {
        # The path too: a .venv that was copied or moved with its tree still points to its old place.
        "venv": digest(str(VENV), sys.version),
        "lock": digest(LOCK),
        "projects": digest(*(folder / name for folder in folders for name in ("setup.cfg", "pyproject.toml"))),
        "horovod": digest(LOCK, horovod, *sorted((ROOT / "tools" / "horovod").iterdir())),
    }
    stamp = read_stamp()
    if stamp == wanted and PYTHON.exists() and not UNFINISHED.exists():
        return

    if UNFINISHED.exists():
        say("the last set-up was interrupted")
    if UNFINISHED.exists() or stamp.get("venv") != wanted["venv"] or not PYTHON.exists():
        start_venv()
        stamp = {"venv": wanted["venv"]}
        write_stamp(stamp)
    changed = [name for name in ("lock", "projects") if stamp.get(name) != wanted[name]]
    if changed:
        UNFINISHED.touch()
        if "lock" in changed:
            say("installing requirements.lock (1.3 GB to download the first time)")
            sync(VENV, LOCK)
        install_editable(VENV, folders)
        UNFINISHED.unlink()
        stamp |= {name: wanted[name] for name in ("lock", "projects")}
        write_stamp(stamp)
    if stamp.get("horovod") != wanted["horovod"]:
        status = subprocess.run([str(PYTHON), str(horovod)], check=False).returncode
        if status == 0:
            write_stamp(stamp | {"horovod": wanted["horovod"]})
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
    uv("venv", "--quiet", "--python", sys.executable, JAX_VENV)
    sync(JAX_VENV, JAX_LOCK)
    install_editable(JAX_VENV, [ROOT, ROOT / "benchmarks"])
    stamp.write_text(wanted)


def main() -> int:
    try:
        with only_one():
            set_up()
            if "--jax" in sys.argv[1:]:
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
