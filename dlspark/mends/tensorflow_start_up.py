"""TensorFlow tells of GPU libraries when it is imported where there is no GPU, and cannot be told not to.

Half a dozen lines such as "Unable to register cuDNN factory" come before absl's log is initialised, so that
TF_CPP_MIN_LOG_LEVEL is not asked (tensorflow#62075, tensorflow#74523; 2.19.1). Every Python worker of Spark that loads a
network says them again, between the lines that matter. Needed until TensorFlow keeps quiet.
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
    """Hold stderr back for the length of a block, and leave those lines out of it. For the first import of Keras."""
    try:
        written = sys.stderr.fileno()
    except (OSError, ValueError, AttributeError):  # a test or a notebook has put something else in its place
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
