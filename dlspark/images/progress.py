"""A progress bar on a terminal, or a line every few seconds elsewhere; on stderr, in the driver."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LOOK_SECONDS = 0.25
LINE_SECONDS = 10.0


@contextmanager
def show_progress(verb: str, total: int, done: Callable[[], int]) -> Iterator[None]:
    """Show progress during the block.

    Args:
        verb: what is done to the images: ``"prepared"``.
        total: the number of images.
        done: returns how many of them are done; a thread calls it every `LOOK_SECONDS`.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn(verb), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    over = threading.Event()

    def follow() -> None:
        started = last = time.monotonic()
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
            bar = bars.add_task("", total=total)
            while not over.wait(LOOK_SECONDS):
                bars.update(bar, completed=done())
                now = time.monotonic()
                if not console.is_terminal and now - last >= LINE_SECONDS:
                    last = now
                    console.print(f"{verb} {done():,} of {total:,} images in {now - started:.0f} s", highlight=False)

    thread = threading.Thread(target=follow, name="dlspark-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(10)
