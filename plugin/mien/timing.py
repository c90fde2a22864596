"""Measuring what something costs: paired and interleaved cases, in one process.

Every round runs each case once, in a random order, and a case's figure is the median over the rounds of
its time divided by the baseline's time in the same round: the machine's drift cancels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

import numpy as np

Cases = Mapping[str, Callable[[int], object]]
Times = dict[str, list[float]]  # seconds of each case in each round
TOO_FEW = "too few rounds to tell"


@dataclass(frozen=True)
class Row:
    """One line of the table. value: a ratio to `against`, or a figure in `unit`.

    reach: what it should be at most; at_least: the same the other way round. margin: how far the value may
    be from what endless rounds would give, see `margin_of`; None if that is not known.
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
    margin: float | None = 0.0

    @property
    def verdict(self) -> str:
        """'ok' or 'MISSED' against the target, TOO_FEW if the margin is wider than the distance to it."""
        target = self.at_least if self.reach is None else self.reach
        if target is None:
            return ""
        if self.margin is None or self.margin > abs(self.value - target):
            return TOO_FEW
        met = self.value >= target if self.reach is None else self.value <= target
        return "ok" if met else "MISSED"


@dataclass(frozen=True)
class Progress:
    """A measurement that is going on. done, total: rounds. rows: what it would say if it ended here."""

    what: str
    done: int
    total: int
    rows: Callable[[], list[Row]]


Tell = Callable[[Progress], None]  # is called after every round


def silent(_: Progress) -> None:
    """No one is told."""


def ratios(
    what: str,
    cases: Cases,
    baseline: str,
    rounds: int,
    reach: Mapping[str, float],
    tell: Tell = silent,
) -> list[Row]:
    """The baseline in ms, and the other cases as ratios to it; reach: by case."""

    def rows(times: Times) -> list[Row]:
        base = times[baseline]
        found = [row(f"{what}, {baseline}", [1e3 * t for t in base], "ms")]
        for name in cases:
            if name != baseline:
                shares = [t / b for t, b in zip(times[name], base)]
                found.append(row(f"{what}, {name}", shares, "x", baseline, reach.get(name)))
        return found

    def after(done: int, times: Times) -> None:
        tell(Progress(what, done, rounds, lambda: rows(times)))

    return rows(interleaved(cases, rounds, after))


def interleaved(cases: Cases, rounds: int, after: Callable[[int, Times], None] | None = None) -> Times:
    """Seconds of each case in each round; three rounds before that are not counted.

    after: is called after each round with the number of rounds, and the times so far.
    """
    times: Times = {name: [] for name in cases}
    names = list(cases)
    order = np.random.default_rng(0)  # of cases: what ran just before leaves its traces in the caches
    for i in range(-3, rounds):
        for name in order.permutation(names):
            start = time.perf_counter()
            cases[name](i)
            if i >= 0:
                times[name].append(time.perf_counter() - start)
        if after and i >= 0:
            after(i + 1, times)
    return times


def row(what: str, values: Sequence[float], unit: str, against: str = "", reach: float | None = None) -> Row:
    """One line: the median of `values`, and the 10th and 90th percentile."""
    low, *_, high = quantiles(values, n=10) if len(values) > 1 else [values[0]] * 2
    margin = margin_of(low, high, len(values))
    return Row(what, median(values), low, high, unit, against, reach, len(values), margin=margin)


def margin_of(low: float, high: float, samples: int) -> float | None:
    """Half of the 95% interval of a median, from the 10th and 90th percentile of the samples; None for one.

    For a normal distribution those are 2.56 standard deviations s apart, and the median's standard error is
    1.25 s / sqrt(samples): 1.96 of these are 0.96 (high - low) / sqrt(samples), and here simply
    (high - low) / sqrt(samples).
    """
    return (high - low) / math.sqrt(samples) if samples > 1 else None


def table(rows: Sequence[Row]) -> str:
    """The rows for a terminal: median, the 10th and 90th percentile, and the target."""
    width = max(len(row.what) for row in rows)
    return "\n".join([head(width), *(line(row, width) for row in rows)])


def head(width: int) -> str:
    """The titles above `line`s of that width."""
    return f"{'':{width}}  {'median':>9}  {'p10':>8}  {'p90':>8}        target"


def line(row: Row, width: int) -> str:
    """One row of a table; width: of its first column."""
    target = ""
    if row.reach is not None:
        target = f"<= {row.reach:.4g}  {row.verdict}"
    elif row.at_least is not None:
        target = f">= {row.at_least:.4g}  {row.verdict}"
    figures = f"{row.value:9.4g}  {row.low:8.4g}  {row.high:8.4g}  {row.unit:4}"
    return f"{row.what:{width}}  {figures}  {target}".rstrip()
