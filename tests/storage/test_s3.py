"""Images, dataset and run in S3, against an S3 server on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dlspark.images.dataset import ImageDataset
from dlspark.images.files import images, subfolders
from dlspark.images.read import read_files
from dlspark.storage.host_cache import HostCache
from dlspark.storage.store import Store, StoreError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

BUCKET = "s3://clinic"
JOB = Path(__file__).with_name("s3_job.py")


@pytest.mark.spark
def test_a_whole_run_in_buckets(endpoint: str, tmp_path: Path) -> None:
    out, log = tmp_path / "out.json", tmp_path / "log"
    with log.open("w") as stream:
        command = [sys.executable, str(JOB), BUCKET, str(out)]
        code = subprocess.run(command, cwd=tmp_path, stdout=stream, stderr=stream, timeout=240, check=False).returncode
    assert code == 0, log.read_text()[-4000:]
    told: dict[str, Any] = json.loads(out.read_text())
    assert told["summary"]["rejected"] == 1
    assert told["summary"]["parts"]["train"]["by_class"] == {"dark": 18, "light": 18}
    assert told["rows"] == 12 * 36
    assert told["history"]["val_accuracy"][-1] == 1.0
    assert told["recognised"]
    data = ImageDataset.open(f"{BUCKET}/data")
    assert data.train is not None
    assert data.test is not None
    there = Store(f"{BUCKET}/data").list()
    assert set(there) == {"manifest.json", "rejected.parquet", *data.train.files, *data.test.files}
    # One copy of each shard on this host, although two workers trained on it.
    assert len(told["cache"]) == len(data.train.files) + len(data.test.files)
    assert {name.partition("-")[2] for name in told["cache"]} == {*data.train.files, *data.test.files}
    assert [path for path in tmp_path.iterdir() if path not in (out, log)] == []


def test_a_damaged_copy_is_refused(endpoint: str) -> None:
    store = Store(f"{BUCKET}/damaged")
    store.write_bytes("shard", b"what lies there now")
    with pytest.raises(Exception, match="CRC-32"):
        store.local_file("shard", crc32=0)
    assert not [path for path in HostCache.of_user().folder.iterdir() if path.name.endswith("-shard")]


def test_what_is_not_there_is_said_so(endpoint: str) -> None:
    with pytest.raises(StoreError, match="no such file"):
        Store(f"{BUCKET}/runs").read_bytes("nothing")
    with pytest.raises(StoreError, match="no-such-bucket"):
        Store("s3://no-such-bucket/runs").write_bytes("a", b"b")


def test_a_folder_made_in_a_console_is_empty(endpoint: str) -> None:
    """S3's console makes a folder by an empty object whose key ends with a slash."""
    import s3fs

    def put(key: str, content: bytes = b"") -> None:
        s3fs.S3FileSystem().call_s3("put_object", Bucket="clinic", Key=key, Body=content)

    def names(uri: str) -> dict[str, str | None]:
        return {name: passed_over for _, name, passed_over in sorted(images(uri))}

    for key in ("console/", "console/out/", "console/in/", "console/in/cat/", "console/in/dog/", "console/in/dog/deep/"):
        put(key)
    out = Store(f"{BUCKET}/console/out")
    assert out.list() == ()
    put("console/in/cat/100%25.jpg", b"one")
    put("console/in/cat/a b.jpg", b"two")
    put("console/in/cat/scan.001", b"\xff\xd8\xff and more")
    put("console/in_$folder$")
    put("console/in/cat/deep_$folder$")
    source = Store(f"{BUCKET}/console/in").uri
    assert subfolders(source) == (["cat", "dog"], [])
    assert [found.name for found in subfolders(f"{BUCKET}/console")[1]] == ["in_$folder$"]
    assert names(f"{source}/dog") == {}
    assert subfolders(source) == (["cat", "dog"], [])
    taken = dict.fromkeys(["cat/100%25.jpg", "cat/a b.jpg", "cat/scan.001"])
    assert names(source) == {**taken, "cat/deep_$folder$": "not an image (no extension)"}
    paths = [f"{source}/cat/100%25.jpg", "s3a://clinic/console/in/cat/a%20b.jpg", "s3:/clinic/console/in/cat/a b.jpg"]
    assert [content for content, _ in read_files(paths)] == [b"one", b"two", b"two"]
    out.write_bytes("manifest.json", b"")
    assert out.list() == ("manifest.json",)
    out.delete_all()
    assert out.list() == ()


def test_a_public_bucket_is_read_without_credentials(endpoint: str, tmp_path: Path) -> None:
    import s3fs

    Store(f"{BUCKET}/public").write_bytes("a", b"for all")
    s3fs.S3FileSystem().chmod("clinic/public/a", acl="public-read")
    script = f"from dlspark.storage.store import Store; print(Store('{BUCKET}/public').read_bytes('a').decode())"
    without = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    # fsspec reads the arguments of a protocol's client from these variables.
    environment = {**without, "FSSPEC_S3_ANON": "true", "FSSPEC_S3_ENDPOINT_URL": endpoint}
    told = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert told.stdout.strip() == "for all", told.stderr


@pytest.mark.parametrize("action", [
    lambda store: store.exists("a"), Store.list, lambda store: store.read_bytes("a"),
    lambda store: store.write_bytes("a", b"1"),
])  # fmt: skip
def test_missing_credentials_are_a_store_error(action: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        with pytest.raises(StoreError, match=r"'s3://clinic/none.*NoCredentialsError: Unable to locate credentials"):
            action(Store(f"{BUCKET}/none"))
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
