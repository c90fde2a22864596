"""What takes longer than a moment says so on stderr."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

AFTER = 2.0  # seconds of silence at most at the beginning
EVERY = 10.0  # and then


@contextmanager
def noticed(what: str) -> Iterator[None]:
    """Print `what` if the block takes more than AFTER seconds."""
    timer = threading.Timer(AFTER, click.echo, [f"{what} ..."], {"err": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def stages(announced: bool = False) -> Callable[[str], Callable[[int, int], None]]:
    """Gives the progress for each stage: a bar on a terminal, elsewhere a line now and then.

    announced: print the name of each stage when it begins, which may be long before its first progress.
    """
    line = Ticker()
    last = ""

    def stage(label: str) -> Callable[[int, int], None]:
        bar: Any = None
        nonlocal last
        if announced and label != last:
            click.echo(f"{label} ...", err=True)
            last = label

        def progress(done: int, total: int) -> None:
            nonlocal bar
            if sys.stderr.isatty():
                if bar is None:
                    bar = click.progressbar(length=total, label=f"{label:28}", file=sys.stderr)
                    bar.render_progress()
                bar.update(done - bar.pos)
                if done >= total:
                    bar.render_finish()
                    bar = None
            elif line.due():
                click.echo(f"{label}: {done} of {total}", err=True)

        return progress

    return stage


class Ticker:
    """Says when it is time for another line: after AFTER seconds, and then EVERY few."""

    def __init__(self) -> None:
        self._next = time.monotonic() + AFTER

    def due(self) -> bool:
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + EVERY
        return True
