"""PySpark has no call for the number of tasks that a cluster can run at once.

SparkStatusTracker lists executors without their cores, and spark.executor.cores is unset on a standalone cluster. The JVM
has ``SparkContext.maxNumConcurrentTasks``, which Spark compares with the size of a barrier stage (SPARK-24819). It is
private in Scala but public in bytecode. Needed until PySpark has such a call.
"""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger(__name__)


def max_concurrent_tasks(context: Any) -> int:
    """The number of tasks of ``context`` (a SparkContext) that can run at once on the registered executors.

    Without that call, the default parallelism divided by ``spark.task.cpus``: the same unless spark.default.parallelism is
    set.
    """
    try:
        scala = context._jsc.sc()
        return int(scala.maxNumConcurrentTasks(scala.resourceProfileManager().resourceProfileFromId(0)))
    except Exception:  # py4j raises several kinds for a missing method
        logger.debug("no maxNumConcurrentTasks; counting by defaultParallelism", exc_info=True)
        return int(context.defaultParallelism) // int(context.getConf().get("spark.task.cpus", "1"))
