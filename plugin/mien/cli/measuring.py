"""`mien bench`: what steering costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .options import json_option, model_option, print_json, threads_option
from .progress import Ticker

if TYPE_CHECKING:
    from ..timing import Progress, Row

WIDTH = 68  # of a row's name


@click.command()
@model_option
@threads_option
@click.option(
    "--rounds", type=click.IntRange(1), default=200, show_default=True, help="Tokens to time per case."
)
@click.option(
    "--out",
    "-o",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the figures as JSON to this file, too.",
)
@json_option
def bench(model: str | None, threads: int | None, rounds: int, out: Path | None, as_json: bool) -> None:
    """Benchmark steering overhead against the unsteered model.

    Each result is printed as soon as it is measured; Ctrl-C ends with those that there are. A figure is the
    median over the rounds. If its 95% interval, plus or minus (p90 - p10) / sqrt(rounds), contains the
    target, it says "too few rounds to tell" in place of ok or MISSED.
    """
    from .. import bench as measure
    from ..models import find_model
    from ..pack import write_whole
    from ..threads import default_threads
    from ..timing import head, line
    from ..wholefile import replaceable

    path, threads = find_model(model), threads or default_threads()
    if out:
        replaceable(out).parent.mkdir(parents=True, exist_ok=True)  # before minutes of measuring, not after
    rows: list[Row] = []
    live = _Live()

    def take(row: Row) -> None:
        if not as_json:
            click.echo(line(row, WIDTH) if rows else f"{head(WIDTH)}\n{line(row, WIDTH)}")
        rows.append(row)

    interrupted = False
    try:
        for row in measure.run(path, threads, rounds, live.begin, live.tell):
            take(row)
    except KeyboardInterrupt:
        interrupted = True
        known = {row.what for row in rows}
        for row in live.rows():
            if row.what not in known:
                take(row)
    data = {**measure.as_json(rows, path, threads), "complete": not interrupted}
    if out:
        write_whole(out, (json.dumps(data, indent=2) + "\n").encode())
    if as_json:
        print_json(data)
    if interrupted:
        raise click.Abort


class _Live:
    """How far the measurement is, on stderr."""

    def __init__(self) -> None:
        self._ticker = Ticker()
        self._last: Progress | None = None

    def begin(self, what: str) -> None:
        click.echo(f"measuring {what}", err=True)
        self._last = None

    def tell(self, progress: Progress) -> None:
        self._last = progress
        if self._ticker.due():
            so_far = ", ".join(f"{row.what.rpartition(', ')[2]} {row.value:.3g}" for row in progress.rows())
            click.echo(f"{progress.what}: {progress.done} of {progress.total} rounds: {so_far}", err=True)

    def rows(self) -> list[Row]:
        """What there is of the last measurement, which may be done."""
        return self._last.rows() if self._last else []
