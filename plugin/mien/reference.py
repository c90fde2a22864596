"""The formulas, in NumPy: what the C engine and every runtime are tested against.

h is a row of activations, v a direction, c a coefficient; sums of products are float64, rows float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from .program import Dose, OpenWhen, doses_at
from .vector import Floats, Vector

Bools: TypeAlias = npt.NDArray[np.bool_]


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


# ---- operators: each takes rows (n, width) and gives new ones ----


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


def ablate(rows: Floats, basis: Floats, strength: float = 1.0) -> Floats:
    """`ablate`: h' = h - s * sum_j <q_j, h> q_j, the q_j being an orthonormal basis (rank, width)."""
    return clamp(rows, basis, np.zeros(rows.shape[-1], dtype=np.float32), strength)


def clamp(rows: Floats, basis: Floats, target: Floats, strength: float = 1.0) -> Floats:
    """`clamp`: h' = h + s * (t - sum_j <q_j, h> q_j): what h has in the span of the q_j becomes t.

    basis: orthonormal (rank, width). target: (width,), in the span.
    """
    wide, q = rows.astype(np.float64), basis.astype(np.float64)
    steered: Floats = (wide + strength * (target.astype(np.float64) - wide @ q.T @ q)).astype(np.float32)
    return steered


def edit(rows: Floats, probe: Floats, bias: float, margin: float, strength: float = 1.0) -> Floats:
    """`edit`: with s = <w, h> + b, h' = h + c * (m - s) / <w, w> * w where s < m, and h elsewhere.

    The nearest row at which the probe's logit is m (arXiv 2504.10227); rows there already stay as they are.
    """
    wide, w = rows.astype(np.float64), probe.astype(np.float64)
    short = margin - (wide @ w + bias)
    moved = wide + strength * short[..., None] / (float(w @ w) or 1.0) * w
    return np.where(short[..., None] > 0, moved.astype(np.float32), rows)


def scale(rows: Floats, gains: Floats, coefficient: float = 1.0) -> Floats:
    """`scale`: h'_i = h_i * (1 + c * v_i), in float32."""
    return rows * (np.float32(1) + np.float32(coefficient) * gains)


def forbid(rows: Floats, marked: Bools) -> Floats:
    """`forbid`: the marked experts' logits become -infinity, so that none of them is chosen."""
    return np.where(marked, np.float32(-np.inf), rows)


def force(rows: Floats, marked: Bools) -> Floats:
    """`force`: the marked experts' logits become 2^-10 more than the row's greatest, or the float after it.

    So they are chosen before all others, after a softmax as well, and weigh as much as the strongest.
    """
    greatest = rows.max(axis=-1, keepdims=True)
    above = np.maximum(np.nextafter(greatest, np.float32(np.inf)), greatest + np.float32(2**-10))
    return np.where(marked, above, rows)


def readout(rows: Floats, vector: Vector, layer: int) -> npt.NDArray[np.float64]:
    """How much of `vector` each row holds, in calibrated units: <h, v> / <v, v> - center, float64 (n,)."""
    at = vector.layers.index(layer)
    found: npt.NDArray[np.float64] = rows.astype(np.float64) @ vector.readouts[at, 0].astype(np.float64)
    found -= vector.center[at, 0]
    return found


# ---- gates, and everything together ----


def is_open(
    gate: OpenWhen, readouts: npt.NDArray[np.float64], replies: Sequence[int], before: bool = False
) -> Bools:
    """For each token of one sequence in order whether `gate` is open.

    replies: each token's number in the reply from 0; -1 is a prompt's. before: whether it was open on the
    token before the first. Memory begins anew with each reply.
    """
    found = np.zeros(len(replies), dtype=bool)
    for i, (value, reply) in enumerate(zip(readouts, replies)):
        before = before and reply > 0
        slack = gate.hysteresis if before else 0.0
        found[i] = gate.above - slack < value < gate.below + slack or (gate.latch and before)
        before = bool(found[i])
    return found


# Of one sequence: which gates were open on its last token, by (gate's key, site, layer).
Memory: TypeAlias = dict[tuple[str, str, int], bool]


def apply(
    doses: Sequence[Dose],
    site: str,
    layer: int,
    rows: Floats,
    replies: Sequence[int] | None = None,
    memory: Memory | None = None,
) -> Floats:
    """What a part's `doses` make of `rows` at one place: tokens of one sequence, in order.

    replies: as in is_open, all of a prompt by default. memory: changed. Every gate reads the rows as they
    came, before anything acts. Returns new rows.
    """
    replies = [-1] * len(rows) if replies is None else replies
    memory = {} if memory is None else memory
    came, acting = rows, doses_at(doses, site, layer)
    opened: dict[str, Bools] = {}
    for gate in (gate for dose in acting for gate in dose.gates):
        if gate.key not in opened and len(rows):
            place = gate.key, site, layer
            read = readout(came, gate.vector, layer)
            opened[gate.key] = is_open(gate, read, replies, memory.get(place, False))
            memory[place] = bool(opened[gate.key][-1])
    for _, members in groupby(acting, key=lambda dose: dose.manner):
        group = list(members)
        shares = np.array([group[0].window.at(reply) for reply in replies])
        for gate in group[0].gates:
            shares = shares * opened.get(gate.key, np.zeros(len(rows), dtype=bool))
        for share in sorted(set(shares) - {0.0}):
            chosen = shares == share
            rows = rows.copy()
            rows[chosen] = _acted(group, layer, rows[chosen], share)
    return rows


def _acted(group: Sequence[Dose], layer: int, rows: Floats, share: float) -> Floats:
    """`rows` after the doses of one manner, which add up where they can, at that share of them."""
    operation = group[0].operation
    if operation in ("add", "add_keep_norm", "scale"):
        direction = combine([(dose.coefficient, dose.vector) for dose in group], layer)
        if direction is None:
            return rows
        if operation == "scale":
            return scale(rows, direction, share)
        direction = np.float32(share) * direction
        return add(rows, direction) if operation == "add" else add_keep_norm(rows, direction)
    if operation in ("force", "forbid"):
        marked = np.any([dose.vector.directions[layer] != 0 for dose in group], axis=0)
        return (force if operation == "force" else forbid)(rows, marked)
    for dose in group:
        at = dose.vector.layers.index(layer)
        strength = dose.coefficient * share
        if operation == "edit":
            assert dose.vector.bias is not None
            rows = edit(rows, dose.vector.rows[at], float(dose.vector.bias[at]), dose.values[0], strength)
        else:
            rows = clamp(rows, dose.vector.basis[at], target(dose, at), strength)
    return rows


def target(dose: Dose, at: int) -> Floats:
    """What a clamp puts into the span at its layer number `at`: sum of (x_j + center_j) v_j; of ablate 0."""
    values = np.array(dose.values) + dose.vector.center[at] if dose.values else np.zeros(dose.vector.rank)
    found: Floats = (values @ dose.vector.spans[at].astype(np.float64)).astype(np.float32)
    return found
