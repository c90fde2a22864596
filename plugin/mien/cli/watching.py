"""Readouts on a terminal: a line of bars for each watched vector."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..watch import Watch

_BARS = "▁▂▃▄▅▆▇█"
_NOTHING = "·"


def sparkline(values: Sequence[float], width: int, low: float, high: float) -> str:
    """`values` from left to right as bars between `low` and `high`, at most `width` of them.

    Of more values each bar is the mean of its share; what is not a number is a dot.
    """
    count = min(len(values), width)
    cuts = [len(values) * i // max(count, 1) for i in range(count + 1)]
    return "".join(_bar(values[start:end], low, high) for start, end in pairwise(cuts))


def _bar(values: Sequence[float], low: float, high: float) -> str:
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return _NOTHING
    share = (sum(known) / len(known) - low) / (high - low) if high > low else 0.5
    return _BARS[min(int(share * len(_BARS)), len(_BARS) - 1)]


def watch_lines(watch: Watch, width: int = 60) -> list[str]:
    """A line for each watched vector: the reply's tokens as they were steered, and how they would begin and
    end, in calibrated units; all on one scale, which has 0 in it."""
    series = {name: watch.series(name).tolist() for name in watch.names}
    known = [value for values in series.values() for value in values if math.isfinite(value)]
    low, high = min([0.0, *known]), max([0.0, *known])
    title = max(map(len, series), default=0)
    return [
        f"{name:{title}}  {sparkline(values, width, low, high)}  {_summary(values, watch, name)}"
        for name, values in series.items()
    ]


def _summary(values: Sequence[float], watch: Watch, name: str) -> str:
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return "no tokens"
    mean = sum(known) / len(known)
    before = [value for value in watch.series(name, after=False).tolist() if math.isfinite(value)]
    came = sum(before) / len(before)
    return f"mean {mean:+.2f} ({came:+.2f} before steering), {min(known):+.2f} to {max(known):+.2f}"


def watch_json(watch: Watch) -> dict[str, Any]:
    """{name: {"before": [...], "after": [...]}}, a number for each token of the reply; null for none."""
    return {
        name: {
            side: [
                value if math.isfinite(value) else None for value in watch.series(name, after=after).tolist()
            ]
            for side, after in (("before", False), ("after", True))
        }
        for name in watch.names
    }
