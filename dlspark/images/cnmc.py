"""The layout of C-NMC 2019."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dlspark.data import try_cast
from dlspark.images.files import images
from dlspark.storage import Store

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

_NAME = r"^UID_(H?\d+)_(\d{1,9})_(\d{1,9})_(all|hem)\.[A-Za-z]+$"


def cnmc(source: str, spark: SparkSession) -> DataFrame:
    """C-NMC 2019, labelled cells: images at any depth named ``UID_<subject>_<image>_<cell>_<all or hem>``.

    The label is ``all`` (malignant) or ``hem`` (healthy), the group the subject as written: ``11``, or ``H12`` for a
    healthy one. The columns ``subject``, ``image_number`` and ``cell`` are kept. The id is the path within ``source``. An
    image with another name, or whose label contradicts its subject, is rejected: nothing is guessed.
    """
    from pyspark.sql import functions as F

    root = Store(source).uri
    found = spark.createDataFrame(sorted(images(root)), "path string, id string, passed_over string")
    name = F.element_at(F.split("id", "/"), -1)

    def field(number: int) -> Any:
        return F.regexp_extract(name, _NAME, number)

    parsed = name.rlike(_NAME)
    consistent = field(1).startswith("H") == (field(4) == "hem")
    texts = found.select(
        "path",
        "id",
        field(4).alias("label"),
        field(1).alias("group"),
        field(1).alias("subject"),
        field(2).alias("image_number"),
        field(3).alias("cell"),
        F.when(~parsed, "its name is not UID_<subject>_<image>_<cell>_<all or hem>")
        .when(~consistent, "its name gives a diagnosis that contradicts its subject")
        .alias("problem"),
        "passed_over",
    )
    for number in ("image_number", "cell"):
        texts = texts.withColumn(number, try_cast(number, "int"))
    return texts
