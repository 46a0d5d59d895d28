"""PySpark cannot tell how many tasks a cluster runs at once.

SparkStatusTracker lists executors without their cores, and spark.executor.cores is unset on a standalone cluster. The JVM
knows: ``SparkContext.maxNumConcurrentTasks`` is what Spark holds a barrier stage against, and is private to Scala though
public in bytecode (SPARK-24819 is where that check comes from). Needed until PySpark has a call for it.
"""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger(__name__)


def max_concurrent_tasks(context: Any) -> int:
    """Tasks of ``context`` (a SparkContext) that can run at once on the executors registered now.

    Where the JVM no longer has the call, the cluster's default parallelism over ``spark.task.cpus``, which is the same
    unless somebody has set spark.default.parallelism.
    """
    try:
        scala = context._jsc.sc()
        return int(scala.maxNumConcurrentTasks(scala.resourceProfileManager().resourceProfileFromId(0)))
    except Exception:  # py4j raises several kinds for a method that is not there
        logger.debug("no maxNumConcurrentTasks; counting by defaultParallelism", exc_info=True)
        return int(context.defaultParallelism) // int(context.getConf().get("spark.task.cpus", "1"))
