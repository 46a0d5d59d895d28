"""For spark-submit, on a session that requests GPUs that no worker has: write how ``fit`` refuses to start.

Arguments: store, a folder that all executors reach; the file to write.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from dlspark import ConfigError, Trainer
from dlspark.testing import toys


def refusal(store: Path | None) -> str:
    """The message with which ``fit`` refuses, or an empty string."""
    try:
        Trainer(backend="mirrored", num_workers=2, store=store).fit(toys.dense_classifier(), toys.separable(101), verbose=0)
    except ConfigError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    refusals = {"no store": refusal(None), "no gpus": refusal(Path(sys.argv[1]))}
    Path(sys.argv[2]).write_text(json.dumps(refusals))
