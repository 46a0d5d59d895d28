"""Spark's Python daemon with Keras already imported. Its workers are forks of it, so they need not import it again.

The import takes five seconds of a core. The session of the tests uses this daemon; clusters, examples and commands that
tests start do not.
"""

import keras  # noqa: F401
from pyspark.daemon import manager

if __name__ == "__main__":
    manager()
