from __future__ import annotations

import multiprocessing
import os
import zlib
from pathlib import Path
from typing import Any

import pytest

from dlspark.errors import ConfigError, DataError
from dlspark.storage.host_cache import BOUND, HostCache

CONTENT = b"pixels" * 1000


def put(content: bytes) -> Any:
    return lambda path: path.write_bytes(content)


def names(cache: HostCache) -> set[str]:
    return {path.name for path in cache.folder.iterdir() if path.suffix != ".lock"}


def _want(folder: Path, fetched: Any, holding: Any, go_on: Any) -> None:
    def fetch(path: Path) -> None:
        with fetched.get_lock():
            fetched.value += 1
        holding.set()
        go_on.wait(60)
        path.write_bytes(CONTENT)

    path = HostCache(folder, 10**9).get("shard", lambda: len(CONTENT), fetch)
    os._exit(0 if path.read_bytes() == CONTENT else 1)


def test_other_processes_wait_for_the_one_that_copies(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    fetched, holding, go_on = context.Value("i", 0), context.Event(), context.Event()
    workers = [context.Process(target=_want, args=(tmp_path, fetched, holding, go_on)) for _ in range(3)]
    for worker in workers:
        worker.start()
    assert holding.wait(60)
    assert all(worker.is_alive() for worker in workers)  # one copies, and two wait for it
    go_on.set()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert fetched.value == 1


def test_a_process_that_died_while_copying_is_not_waited_for(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    fetched, holding, go_on = context.Value("i", 0), context.Event(), context.Event()
    victim = context.Process(target=_want, args=(tmp_path, fetched, holding, go_on))
    victim.start()
    assert holding.wait(60)
    victim.kill()
    victim.join(60)
    assert HostCache(tmp_path, 10**9).get("shard", lambda: len(CONTENT), put(CONTENT)).read_bytes() == CONTENT


@pytest.mark.parametrize(("came", "message"), [(b"pixel" * 1000, "got 5,000"), (b"Pixels" * 1000, "CRC-32")])
def test_what_came_damaged_is_not_kept(tmp_path: Path, came: bytes, message: str) -> None:
    cache = HostCache(tmp_path, 10**9)
    with pytest.raises(DataError, match=message):
        cache.get("shard", lambda: len(CONTENT), put(came), crc32=zlib.crc32(CONTENT))
    assert names(cache) == set()
    assert cache.get("shard", lambda: len(CONTENT), put(CONTENT), crc32=zlib.crc32(CONTENT)).read_bytes() == CONTENT


def test_a_copy_that_failed_leaves_nothing(tmp_path: Path) -> None:
    cache = HostCache(tmp_path, 10**9)

    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise ConnectionError("the network is gone")

    with pytest.raises(ConnectionError):
        cache.get("shard", lambda: 8, fail)
    assert names(cache) == set()


def test_what_was_unused_for_longest_makes_room(tmp_path: Path) -> None:
    cache = HostCache(tmp_path, 25)
    for age, name in enumerate(("a", "b")):
        cache.get(name, lambda: 10, put(b"x" * 10))
        os.utime(tmp_path / name, (1000 + age, 1000 + age))
    cache.get("a", lambda: 10, put(b""))  # used again, so b is the least recently used
    cache.get("c", lambda: 10, put(b"y" * 10))
    assert names(cache) == {"a", "c"}
    with pytest.raises(ConfigError, match=rf"at most 25 bytes.*got 26 bytes.*{BOUND}"):
        cache.get("d", lambda: 26, put(b"z" * 26))
    assert names(cache) == {"a", "c"}


def test_a_mapped_copy_outlives_its_removal(tmp_path: Path) -> None:
    cache = HostCache(tmp_path, 10)
    with cache.get("a", lambda: 10, put(b"x" * 10)).open("rb") as file:
        cache.get("b", lambda: 10, put(b"y" * 10))
        assert names(cache) == {"b"}
        assert file.read() == b"x" * 10


def test_the_bound_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BOUND, "1000")
    assert HostCache(tmp_path).max_bytes == 1000
    monkeypatch.setenv(BOUND, "10 GB")
    with pytest.raises(ConfigError, match="'10 GB'"):
        HostCache(tmp_path)
    monkeypatch.delenv(BOUND)
    assert HostCache(tmp_path).max_bytes > 10**6
