"""A network as a stage of a Spark ML pipeline: extract features, fit a classifier, and save both together.

python spark_ml.py
"""

from __future__ import annotations

import io
import tempfile

import numpy as np
from PIL import Image
from pyspark.ml import PipelineModel
from pyspark.ml.classification import LogisticRegression
from pyspark.sql import DataFrame

from dlspark.ml import ImageFeaturizer
from dlspark.spark import get_session


def photo(number: int) -> bytes:
    """Return a PNG of noise around red (even numbers) or blue (odd)."""
    colour = (60, 60, 200) if number % 2 else (200, 60, 60)
    pixels = np.random.default_rng(number).normal(colour, 40, (48, 48, 3)).clip(0, 255).astype("uint8")
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def photos(rows: int) -> DataFrame:
    """Return the columns id, image (bytes) and label; row 3 is not a valid image."""
    data = [(n, b"broken" if n == 3 else photo(n), float(n % 2)) for n in range(rows)]
    return get_session(2).createDataFrame(data, "id int, image binary, label double")


def main() -> None:
    # Real tasks need weights="imagenet"; random weights need no download and suffice for two colours.
    featurizer = ImageFeaturizer(
        inputCol="image", outputCol="features", backbone="mobilenetv2", weights=None, imageSize=(32, 32)
    )
    looked_at = featurizer.transform(photos(40)).cache()
    for row in looked_at.filter("features_error IS NOT NULL").collect():
        print(f"row {row.id}: {row.features_error}")
    good = looked_at.filter("features_error IS NULL")
    classifier = LogisticRegression().fit(good)
    pipeline = PipelineModel(stages=[featurizer, classifier])  # both are fitted, so nothing is recomputed
    with tempfile.TemporaryDirectory() as folder:
        pipeline.save(f"{folder}/pipeline")
        again = PipelineModel.load(f"{folder}/pipeline")
        found = again.transform(photos(40).filter("id != 3"))
        print(f"accuracy {found.filter('prediction = label').count() / found.count():.3f}")


if __name__ == "__main__":
    main()
