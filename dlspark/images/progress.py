"""How far a prepare has come: a bar on a terminal, a line now and then elsewhere; on stderr, from the driver."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LOOK_SECONDS = 0.25
LINE_SECONDS = 10.0


@contextmanager
def shown(total: int, done: Callable[[], int]) -> Iterator[None]:
    """Show progress during the block.

    Args:
        total: images that there are.
        done: how many of them are ready; called from a thread, every `LOOK_SECONDS`.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    over = threading.Event()
    columns = (TextColumn("preparing images"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())

    def follow() -> None:
        started = last = time.monotonic()
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            bar = progress.add_task("", total=total)
            while not over.wait(LOOK_SECONDS):
                progress.update(bar, completed=done())
                now = time.monotonic()
                if not console.is_terminal and now - last >= LINE_SECONDS:
                    last = now
                    console.print(f"prepared {done():,} of {total:,} images in {now - started:.0f} s", highlight=False)

    thread = threading.Thread(target=follow, name="dlspark-prepare-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(10)
