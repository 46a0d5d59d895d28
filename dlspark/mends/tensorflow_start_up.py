"""TensorFlow logs messages about GPU libraries when it is imported on a host without a GPU; no setting disables them.

About six lines, such as "Unable to register cuDNN factory", are logged before absl's log is initialised, so
TF_CPP_MIN_LOG_LEVEL has no effect (tensorflow#62075, tensorflow#74523; 2.19.1). Every Python worker of Spark that loads a
network repeats them. Needed until TensorFlow drops them.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator

_NOISE = re.compile(r"WARNING: All log messages before absl::InitializeLog|[IWE]0000 00:00:\d+\.\d+ ")


@contextlib.contextmanager
def without_noise() -> Iterator[None]:
    """Buffer stderr during the block and drop those lines. For the first import of Keras."""
    try:
        written = sys.stderr.fileno()
    except (OSError, ValueError, AttributeError):  # a test or a notebook has replaced stderr
        written = -1
    if written != 2:
        yield
        return
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            held.seek(0)
            for line in held.read().decode(errors="replace").splitlines(keepends=True):
                if not _NOISE.match(line):
                    sys.stderr.write(line)
            sys.stderr.flush()
