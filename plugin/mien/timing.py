"""Measuring what something costs: paired and interleaved cases, in one process.

Every round runs each case once, in a random order, and a case's figure is the median over the rounds of
its time divided by the baseline's time in the same round: the machine's drift cancels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

import numpy as np

Cases = Mapping[str, Callable[[int], object]]


@dataclass(frozen=True)
class Row:
    """One line of the table. value: a ratio to `against`, or a figure in `unit`.

    reach: what it should be at most; at_least: the same the other way round.
    """

    what: str
    value: float
    low: float
    high: float
    unit: str
    against: str = ""
    reach: float | None = None
    samples: int = 0
    at_least: float | None = None


def ratios(
    what: str,
    cases: Cases,
    baseline: str,
    rounds: int,
    reach: Mapping[str, float],
) -> list[Row]:
    """The baseline in ms, and the other cases as ratios to it; reach: by case."""
    times = interleaved(cases, rounds)
    base = times[baseline]
    rows = [row(f"{what}, {baseline}", [1e3 * t for t in base], "ms")]
    for name in cases:
        if name != baseline:
            found = [t / b for t, b in zip(times[name], base)]
            rows.append(row(f"{what}, {name}", found, "x", baseline, reach.get(name)))
    return rows


def interleaved(cases: Cases, rounds: int) -> dict[str, list[float]]:
    """Seconds of each case in each round; three rounds before that are not counted."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    names = list(cases)
    order = np.random.default_rng(0)  # of cases: what ran just before leaves its traces in the caches
    for i in range(-3, rounds):
        for name in order.permutation(names):
            start = time.perf_counter()
            cases[name](i)
            if i >= 0:
                times[name].append(time.perf_counter() - start)
    return times


def row(what: str, values: Sequence[float], unit: str, against: str = "", reach: float | None = None) -> Row:
    """One line: the median of `values`, and the 10th and 90th percentile."""
    low, *_, high = quantiles(values, n=10)
    return Row(what, median(values), low, high, unit, against, reach, len(values))


def table(rows: list[Row]) -> str:
    """The rows for a terminal: median, the 10th and 90th percentile, and what was to be reached."""
    width = max(len(row.what) for row in rows)
    lines = [f"{'':{width}}  {'median':>9}  {'p10':>8}  {'p90':>8}        reach"]
    for row in rows:
        verdict = ""
        if row.reach is not None:
            verdict = f"<= {row.reach:.4g}  {'ok' if row.value <= row.reach else 'MISSED'}"
        if row.at_least is not None:
            verdict = f">= {row.at_least:.4g}  {'ok' if row.value >= row.at_least else 'MISSED'}"
        lines.append(
            f"{row.what:{width}}  {row.value:9.4g}  {row.low:8.4g}  {row.high:8.4g}  {row.unit:4}  {verdict}"
        )
    return "\n".join(lines)
