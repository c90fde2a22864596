"""The formulas, in NumPy: what the C engine and every runtime are tested against."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .vector import Floats, Vector


def combine(terms: Sequence[tuple[float, Vector]], layer: int) -> Floats | None:
    """The direction that `terms` add up to at `layer`: float32(sum of coefficient * row).

    Summed in float64 in the order of the terms, rounded once. None where no term has the layer or the
    sum is zero everywhere.
    """
    rows = [(c, vector.directions[layer]) for c, vector in terms if layer in vector.layers]
    if not rows:
        return None
    total = np.zeros(rows[0][1].shape, dtype=np.float64)
    for coefficient, row in rows:
        total += coefficient * row.astype(np.float64)
    direction = total.astype(np.float32)
    return direction if direction.any() else None


def add(rows: Floats, direction: Floats) -> Floats:
    """`add`: h' = h + v for each row h, in float32. Returns new rows."""
    return rows + direction


def add_keep_norm(rows: Floats, direction: Floats) -> Floats:
    """`add` with the norm restored: h' = (h + v) * |h| / |h + v| for each row h; 0 where h + v is 0.

    h + v is float32, norms and the scale float64, the result is rounded once. Returns new rows. As
    repeng's `normalize=True` (control.py).
    """
    moved = add(rows, direction).astype(np.float64)
    before = (rows.astype(np.float64) ** 2).sum(axis=-1, keepdims=True)
    after = (moved**2).sum(axis=-1, keepdims=True)
    scale = np.sqrt(np.divide(before, after, out=np.zeros_like(after), where=after > 0))
    steered: Floats = (moved * scale).astype(np.float32)
    return steered
