#!/usr/bin/env python3
"""Bring .venv to what requirements.lock and the setup.cfg files say. `make` runs this; doing it again costs nothing.

Each step leaves a digest of what it was made from in .venv/set-up.json, and runs again only when that digest
changes. A step that was cut short leaves .venv/unfinished behind: half an installation cannot be told from a whole
one, so the next run starts .venv anew (downloads are still in pip's cache). Without a C++ compiler everything but
the Horovod backend is set up, and the first run that finds a compiler adds it.

With --jax it also makes .venv-jax, which holds jax and no TensorFlow or Spark: the tests prove there that they are not
needed.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
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
LOG = VENV / "set-up.log"
LOCKED_PYTHON = (3, 11)
FIRST = ("pip", "setuptools", "wheel")  # what builds the few packages that come as source
MISSING = 3  # tools/build_horovod.py: something is not on this machine, and it has said what


class SetUpError(Exception):
    """Set-up cannot go on; the text says why and what to do."""


def say(text: str) -> None:
    print(f"set-up: {text}", flush=True)


def digest(*parts: Path | str) -> str:
    total = hashlib.sha256()
    for part in parts:
        data = part.read_bytes() if isinstance(part, Path) else part.encode()
        total.update(hashlib.sha256(data).digest())
    return total.hexdigest()


def projects() -> list[Path]:
    """Returns the folders of this tree that are distributions: the root, each backend, the benchmarks."""
    candidates = [ROOT, *sorted((ROOT / "backends").glob("*")), ROOT / "benchmarks"]
    return [folder for folder in candidates if (folder / "setup.cfg").exists()]


def read_stamp() -> dict[str, str]:
    try:
        return dict(json.loads(STAMP.read_text()))
    except (OSError, ValueError):
        return {}


def write_stamp(stamp: dict[str, str]) -> None:
    unfinished = STAMP.with_suffix(".new")
    unfinished.write_text(json.dumps(stamp, indent=1) + "\n")
    os.replace(unfinished, STAMP)


@contextmanager
def only_one() -> Iterator[None]:
    """Keeps two runs in one tree apart: the second waits, then finds everything done."""
    with LOCK.open() as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("waiting for another set-up of this tree to end")
            fcntl.flock(held, fcntl.LOCK_EX)
        os.set_inheritable(held.fileno(), True)  # a pip that outlives us keeps the lock until it ends
        yield


def pip(*arguments: str, python: Path = PYTHON) -> None:
    """Runs pip in .venv; its output goes to the log, and of it only the long downloads to the screen."""
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *arguments, "--progress-bar=off"]
    recent: list[str] = []
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    env = os.environ | {"PYTHONUNBUFFERED": "1"}
    with LOG.open("a", buffering=1) as log, subprocess.Popen(command, env=env, close_fds=False, **pipe) as run:
        for line in run.stdout or ():
            log.write(line)
            recent = [*recent, line][-15:]
            if (large := re.search(r"Downloading (\S+) \((\d+)(\.\d+)? MB\)", line)) and int(large[2]) >= 100:
                say(f"  downloading {large[1]} ({large[2]} MB)")
    if run.returncode > 0 and UNFINISHED.exists():
        UNFINISHED.unlink()  # pip ended by itself, and what it was changing it has put back
    if run.returncode:
        tail = "".join(f"  | {line}" for line in recent)
        failed = "failed" if run.returncode > 0 else f"was killed by signal {-run.returncode}"
        raise SetUpError(f"pip {arguments[0]} {failed} (the whole log: {LOG}):\n{tail}Mend that and run it again.")


def start_venv() -> None:
    """Makes an empty .venv that counts as unfinished until the lock is installed."""
    say(f"creating .venv with Python {sys.version.split()[0]}")
    shutil.rmtree(VENV, ignore_errors=True)
    VENV.mkdir()
    UNFINISHED.touch()
    made = subprocess.run([sys.executable, "-m", "venv", str(VENV)], capture_output=True, text=True, check=False)
    if made.returncode:
        raise SetUpError(
            f"{sys.executable} -m venv failed; on Debian/Ubuntu: apt-get install python3.11-venv\n{made.stdout}{made.stderr}"
        )


def install_lock() -> None:
    blocks = re.split(r"\n(?=\S)", LOCK.read_text())
    first = [block for block in blocks if block.startswith(tuple(f"{name}==" for name in FIRST))]
    count = sum("==" in block.splitlines()[0] for block in blocks)
    say(f"installing the {count} packages of requirements.lock (the first time 1.3 GB to download, some minutes)")
    with tempfile.TemporaryDirectory(prefix="dlspark-set-up-") as temporary:
        part = Path(temporary, "first.txt")
        part.write_text("\n".join(first) + "\n")
        pip("install", "--require-hashes", "--no-deps", f"--requirement={part}")
    pip("install", "--require-hashes", "--no-deps", "--no-build-isolation", f"--requirement={LOCK}")


def install_projects(folders: list[Path]) -> None:
    names = ", ".join("dlspark" if folder == ROOT else str(folder.relative_to(ROOT)) for folder in folders)
    say(f"installing this tree, editable: {names}")
    editable = [f"--editable={folder}" for folder in folders]
    pip("install", "--no-index", "--no-deps", "--no-build-isolation", *editable)


def set_up() -> None:
    if sys.version_info[:2] != LOCKED_PYTHON:
        wanted = ".".join(map(str, LOCKED_PYTHON))
        raise SetUpError(
            f"requirements.lock is for Python {wanted} and this is {sys.version.split()[0]}: "
            f"run make PYTHON=/path/to/python{wanted}."
        )
    started = time.monotonic()
    folders = projects()
    horovod = ROOT / "tools" / "build_horovod.py"
    wanted = {
        # The place too: a .venv that was copied or moved along with its tree still points to where it was.
        "venv": digest(str(VENV), sys.version),
        "lock": digest(LOCK),
        "projects": digest(*(folder / name for folder in folders for name in ("setup.cfg", "pyproject.toml"))),
        "horovod": digest(LOCK, horovod, *sorted((ROOT / "tools" / "horovod").iterdir())),
    }
    stamp = read_stamp()
    if stamp == wanted and PYTHON.exists() and not UNFINISHED.exists():
        return

    if UNFINISHED.exists():
        say("the last set-up was cut short: starting .venv anew")
    if UNFINISHED.exists() or stamp.get("venv") != wanted["venv"] or not PYTHON.exists():
        start_venv()
        stamp = {"venv": wanted["venv"]}
        write_stamp(stamp)
    changed = [name for name in ("lock", "projects") if stamp.get(name) != wanted[name]]
    if "lock" in changed:
        UNFINISHED.touch()
        install_lock()
        UNFINISHED.unlink()
    if changed:
        install_projects(folders)
        stamp |= {name: wanted[name] for name in ("lock", "projects")}
        write_stamp(stamp)
    if stamp.get("horovod") != wanted["horovod"]:
        status = subprocess.run([str(PYTHON), str(horovod)], check=False).returncode
        if status == 0:
            write_stamp(stamp | {"horovod": wanted["horovod"]})
        elif status != MISSING:
            say("the Horovod backend is left out this time; everything else works without it")
    if changed:
        say(f"done in {time.monotonic() - started:.0f} s")


def set_up_jax() -> None:
    """Makes .venv-jax, complete or not at all: its stamp is written last, and without it the next run starts anew."""
    stamp = JAX_VENV / "set-up.json"
    wanted = digest(str(JAX_VENV), sys.version, JAX_LOCK, ROOT / "setup.cfg", ROOT / "benchmarks" / "setup.cfg")
    if stamp.exists() and stamp.read_text() == wanted:
        return
    say("creating .venv-jax: jax, without TensorFlow or Spark (150 MB to download)")
    shutil.rmtree(JAX_VENV, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(JAX_VENV)], check=True)
    python = JAX_VENV / "bin" / "python"
    pip("install", "--require-hashes", "--no-deps", f"--requirement={JAX_LOCK}", python=python)
    folders = (ROOT, ROOT / "benchmarks")
    pip("install", "--no-index", "--no-deps", "--no-build-isolation", *(f"--editable={f}" for f in folders), python=python)
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
