from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest

from dlspark.errors import ConfigError, DlsparkError, MissingDependencyError
from dlspark.storage.store import Store, StoreError


@pytest.fixture(params=["local", "remote"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Store(tmp_path / "runs" if request.param == "local" else f"memory://{uuid.uuid4().hex}/runs")


def leftovers(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(".")]


def test_local_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Store("a/../b").uri == str(tmp_path / "b")
    assert Store(Path("b")) == Store("b/") == Store((tmp_path / "b").as_uri())
    assert Store("b").is_local
    assert not Store("memory://bucket/b").is_local
    assert Store("memory://bucket/b/").uri == "memory://bucket/b"


@pytest.mark.parametrize(
    ("given", "uri"),
    [
        (Path("s3://bucket/out"), "s3://bucket/out"),
        ("s3:/bucket/out/", "s3://bucket/out"),
        ("S3A://bucket/out", "s3a://bucket/out"),
        (Path("memory://a b%20/c"), "memory://a b%20/c"),
        ("file:/data/o", "/data/o"),
        ("file:///data/a%20b%C3%9F", "/data/a bß"),
        ("FILE://localhost/data/../o", "/o"),
        (Path("file:///data/o"), "/data/o"),
        ("local:///data/o", "/data/o"),
        ("~/o", str(Path.home() / "o")),
        ("/data/100%25", "/data/100%25"),
        ("/data/run:1/a::b", "/data/run:1/a::b"),
    ],
)
def test_spellings_of_spark_and_pathlib(given: str | Path, uri: str) -> None:
    assert Store(given).uri == uri
    assert Store(uri) == Store(given)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("dbfs:/mnt/o", "Write '/dbfs/mnt/o'"),
        ("dbfs:///Volumes/a/o", "Write '/Volumes/a/o'"),
        ("hdfs:/o", r"hdfs://HOST:PORT/PATH or hdfs:///PATH"),
        ("s3:bucket/o", "Write 's3://bucket/o'"),
        ("s3:///bucket/o", "Write 's3://bucket/o'"),
        ("s3n://bucket/o", "Write 's3://bucket/o'"),
        ("wasbs://c@account/o", "Write 'abfss://c@account/o'"),
        ("s33:/bucket/o", "a URI that fsspec supports"),
        ("file:o", "Write the path alone"),
        ("file://o/a", "on 'o'. Write file:///PATH"),
        (Path("s3://bucket/o").absolute(), "'s3:' is the start of a URI"),
        ("runs/file:/o", "'file:' is the start of a URI"),
        ("~nobody-of-this-name/o", "the home of a user"),
        (r"C:\runs\o", "a path of Windows"),
        ("caf\udce9", "in UTF-8"),
        ("file:///caf%E9", "in UTF-8"),
        ("a\0b", "null character"),
    ],
)
def test_other_spellings_are_told_what_to_write(given: str | Path, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Store(given)


def test_a_file_uri_is_decoded_unless_only_the_path_as_written_exists(tmp_path: Path) -> None:
    (tmp_path / "a%20b").mkdir()
    assert Store(f"file:{tmp_path}/a%20b").uri == f"{tmp_path}/a%20b"
    assert Store((tmp_path / "a%20b").as_uri()).uri == f"{tmp_path}/a%20b"
    (tmp_path / "a b").mkdir()
    assert Store(f"{tmp_path}/a%20b").uri == f"{tmp_path}/a%20b"
    with pytest.raises(ConfigError, match="got two"):
        Store(f"file:{tmp_path}/a%20b")


def test_files_come_and_go(store: Store) -> None:
    assert store.list() == ()
    assert not store.exists("a")
    store.write_bytes("a", b"one")
    store.write_json("deep/down/b.json", {"é": [1, 2.5, None]})
    assert store.exists("a")
    assert store.exists("deep")
    assert store.read_bytes("a") == b"one"
    assert store.size("a") == 3
    assert store.read_json("deep/down/b.json") == {"é": [1, 2.5, None]}
    assert store.list() == ("a", "deep")
    assert store.child("deep", "down").list() == ("b.json",)
    store.write_bytes("a", b"three")
    assert store.read_bytes("a") == b"three"
    store.delete("a")
    assert store.list() == ("deep",)
    store.delete_all()
    store.delete_all()
    assert store.list() == ()


def test_deletion_takes_no_name_for_a_pattern(tmp_path: Path) -> None:
    for root in (str(tmp_path), f"memory://{uuid.uuid4().hex}"):
        for name in ("run[1]", "run1", "run?", "run*"):
            Store(f"{root}/{name}").write_bytes("a", b"one")
        for name in ("run[1]", "run?", "run*"):
            Store(f"{root}/{name}").delete_all()
        assert Store(f"{root}/run1").list() == ("a",)
        assert Store(f"{root}/run*").list() == ()


def test_deletion_keeps_links_and_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    monkeypatch.chdir(tmp_path / "there")
    for given in (tmp_path / "link", "."):
        Store(given).write_bytes("deep/a", b"one")
        Store(given).delete_all()
        assert (tmp_path / "link").is_symlink()
        assert os.listdir(tmp_path / "there") == []


def test_missing_files_are_named(store: Store) -> None:
    for action in (store.read_bytes, store.size, store.local_file, store.delete):
        with pytest.raises(StoreError, match="nothing-here"):
            action("nothing-here")
    store.delete("nothing-here", missing_ok=True)
    with pytest.raises(OSError):  # the matching builtin
        store.read_bytes("nothing-here")


def test_broken_json_is_named(store: Store) -> None:
    store.write_bytes("a.json", b'{"half": ')
    with pytest.raises(StoreError, match=r"a\.json"):
        store.read_json("a.json")


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../up", "a/../../up", "a//b", "./a"])
def test_names_stay_inside(store: Store, name: str) -> None:
    with pytest.raises(ConfigError, match="relative name"):
        store.write_bytes(name, b"")


def test_a_writer_publishes_all_or_nothing(store: Store) -> None:
    with store.open_writer("x/model") as path:
        path.write_bytes(b"old")
        assert not store.exists("x/model")
    with suppress(ZeroDivisionError), store.open_writer("x/model") as path:
        path.write_bytes(b"half of the n")
        raise ZeroDivisionError
    assert store.read_bytes("x/model") == b"old"
    assert store.child("x").list() == ("model",)
    assert not path.exists()


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write_bytes("model", b"old")
    code = (
        "import os, sys; from dlspark.storage.store import Store\n"
        "with Store(sys.argv[1]).open_writer('model') as path:\n"
        "    path.write_bytes(b'half'); os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60, check=False).returncode == -9
    assert store.read_bytes("model") == b"old"
    assert store.list() == ("model",)


def test_a_full_disk_names_path_and_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = Store(tmp_path)
    store.write_bytes("model", b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"1,234 bytes.*model.*No space left"):
        store.write_bytes("model", bytes(1234))
    monkeypatch.undo()
    assert store.read_bytes("model") == b"old"
    assert leftovers(tmp_path) == []


def test_local_file_of_a_local_store_is_the_file_itself(tmp_path: Path) -> None:
    Store(tmp_path).write_bytes("a", b"one")
    assert Store(tmp_path).local_file("a") == tmp_path / "a"


def test_what_cannot_be_read_is_not_said_to_be_missing(tmp_path: Path) -> None:
    """By another user, as root reads everything; tmp_path is readable by its owner only."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").touch()
    tmp_path.chmod(0o700 if os.getuid() == 0 else 0)
    code = (
        "import os, sys\n"
        "from dlspark.images.files import images\n"
        "from dlspark.storage import Store\n"
        "if os.getuid() == 0: os.setuid(54321)\n"
        "for read in (lambda: Store(sys.argv[1]).exists('manifest.json'), Store(sys.argv[1]).list,\n"
        "             lambda: list(images(sys.argv[1]))):\n"
        "    try: print(read())\n"
        "    except Exception as error: print(type(error).__name__, error)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "data")]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    tmp_path.chmod(0o700)
    assert [line.partition(" ")[0] for line in told.stdout.splitlines()] == ["StoreError", "StoreError", "DataError"], told
    assert told.stdout.count("Permission denied") == 3


@pytest.mark.parametrize("cache", ["a file", "no home", "a full disk"])
def test_trouble_of_the_cache_names_the_cache(cache: str, tmp_path: Path) -> None:
    """Not the dataset. In another process, as limits and the user's number stay."""
    (tmp_path / "file").touch()
    code = (
        "import os, resource, signal, sys\n"
        "from dlspark.data.shards import ShardedRows\n"
        "from dlspark.storage import CacheError, Store\n"
        "Store('memory://data').write_bytes('shard', bytes(100_000))\n"
        f"if {cache!r} == 'a full disk': resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        f"if {cache!r} == 'no home': os.setuid(54321) if os.getuid() == 0 else sys.exit('/XDG_CACHE_HOME to a folder')\n"
        "try: ShardedRows(uri='memory://data', files=('shard',), rows_per_file=(1,), x='x').open()\n"
        "except CacheError as error: sys.exit(str(error))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("XDG_CACHE_HOME", "HOME")}
    if cache != "no home":
        environment["XDG_CACHE_HOME"] = str(tmp_path / "file" if cache == "a file" else tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert "XDG_CACHE_HOME to a folder" in run.stderr, run.stderr
    assert "repare" not in run.stderr
    assert {"a file": "Not a directory", "no home": "", "a full disk": "File too large"}[cache] in run.stderr
    assert [path.name for path in tmp_path.glob("**/*") if path.is_file() and path.suffix != ".lock"] == ["file"]


def test_a_full_temporary_folder_is_named(tmp_path: Path) -> None:
    code = (
        "import resource\n"
        "from dlspark.storage.store import Store\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "Store('memory://data').write_bytes('shard', bytes(100_000))\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert f"the temporary folder '{tmp_path}' has no room (File too large). Set TMPDIR" in run.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_remote_file_is_copied_once_and_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store = Store(f"memory://{uuid.uuid4().hex}/data")
    store.write_bytes("shard", b"one")
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(store.local_file, ["shard"] * 8))
    (path,) = paths
    assert path.read_bytes() == b"one"
    assert path.is_relative_to(tmp_path / "dlspark")
    copied = path.stat().st_ino  # not the time, which records the last use
    assert store.local_file("shard").stat().st_ino == copied
    store.write_bytes("shard", b"two")
    assert store.local_file("shard").read_bytes() == b"two"
    assert leftovers(path.parent) == []


@pytest.mark.parametrize("uri", ["ftp://me:hunter2@host/runs", "https://host/runs?X-Amz-Signature=hunter2"])
def test_secrets_are_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(ConfigError, match="password") as caught:
        Store(uri)
    assert "hunter2" not in str(caught.value)


def test_uris_that_cannot_be() -> None:
    for uri in ("", "memory://", "nosuchprotocol://bucket/runs"):
        with pytest.raises(ConfigError):
            Store(uri)


@pytest.mark.skipif(find_spec("gcsfs") is not None, reason="gcsfs is installed, and this is about its absence")
def test_a_missing_protocol_package_is_named() -> None:
    with pytest.raises(MissingDependencyError, match="gcsfs"):
        Store("gs://bucket/runs")


def test_it_is_small_plain_data(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert pickle.loads(pickle.dumps(store)) == store
    assert len(pickle.dumps(store)) < 300
    assert hash(store) == hash(Store(tmp_path))
    with pytest.raises(AttributeError):
        store.uri = "elsewhere"  # type: ignore[misc]
    assert issubclass(StoreError, DlsparkError)
    error = StoreError("told")
    assert str(pickle.loads(pickle.dumps(error))) == "told"
