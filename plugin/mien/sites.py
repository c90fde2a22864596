"""Vectors of other sites than the residual stream, from what they are: heads, neurons, experts.

    quiet = mien.of_heads("quiet", {(3, 1): -1.0}, n_head=9, head_dim=64)    scale(quiet) silences that head
    grammar = mien.of_neurons("grammar", {5: {7: 0.5}}, n_ff=1536)
    poets = mien.of_experts("poets", {2: [0, 5]}, n_expert=8)                force(poets), forbid(poets)

To be saved a vector needs its model's fingerprint, or the architecture's name as model_hint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from .errors import VectorError
from .fingerprint import Fingerprint
from .spans import Doubles
from .vector import MetaValue, Vector

Meta: TypeAlias = "Mapping[str, MetaValue] | None"


def of_heads(
    name: str,
    heads: Mapping[tuple[int, int], npt.ArrayLike],
    n_head: int,
    head_dim: int,
    *,
    fingerprint: Fingerprint | None = None,
    model_hint: str = "",
    meta: Meta = None,
) -> Vector:
    """Of attention heads, before the output projection: {(layer, head): a row of head_dim floats, or a gain}.

    A gain stands for a row of that number: in `scale` -1 silences the head and 1 doubles it. n_head: how
    many heads of the query a layer has. Raises VectorError for a head that there is not, another length, NaN.
    """
    rows: dict[int, Doubles] = {}
    for (layer, head), values in heads.items():
        _require_below(name, layer, "head", head, n_head)
        row = np.asarray(values, dtype=np.float64)
        if row.shape not in ((), (head_dim,)):
            raise VectorError(
                f"{name}: layer {layer}, head {head}: expected {head_dim} floats or a gain, got {row.shape}"
            )
        _row(rows, layer, n_head * head_dim).reshape(n_head, head_dim)[head] = row
    known: dict[str, MetaValue] = {**(meta or {}), "head_dim": head_dim}
    return Vector.from_directions(name, rows, fingerprint, model_hint, known, "heads")


def of_neurons(
    name: str,
    neurons: Mapping[int, Mapping[int, float]],
    n_ff: int,
    *,
    fingerprint: Fingerprint | None = None,
    model_hint: str = "",
    meta: Meta = None,
) -> Vector:
    """Of MLP neurons, before the down projection: {layer: {neuron: value}}, all others zero.

    n_ff: how many a layer has. Raises VectorError for a neuron that there is not, and NaN.
    """
    rows = _of_entries(name, neurons, "neuron", n_ff)
    return Vector.from_directions(name, rows, fingerprint, model_hint, meta, "neurons")


def of_experts(
    name: str,
    experts: Mapping[int, Iterable[int]],
    n_expert: int,
    *,
    fingerprint: Fingerprint | None = None,
    model_hint: str = "",
    meta: Meta = None,
) -> Vector:
    """Of a mixture's experts, by the router's logits: {layer: the experts that are marked}, with 1.

    n_expert: how many a layer has. Raises VectorError for an expert that there is not.
    """
    marked = {layer: dict.fromkeys(chosen, 1.0) for layer, chosen in experts.items()}
    rows = _of_entries(name, marked, "expert", n_expert)
    return Vector.from_directions(name, rows, fingerprint, model_hint, meta, "experts")


def _of_entries(
    name: str, entries: Mapping[int, Mapping[int, float]], what: str, count: int
) -> dict[int, Doubles]:
    rows: dict[int, Doubles] = {}
    for layer, values in entries.items():
        row = _row(rows, layer, count)
        for number, value in values.items():
            _require_below(name, layer, what, number, count)
            row[number] = value
    return rows


def _row(rows: dict[int, Doubles], layer: int, width: int) -> Doubles:
    """The row of that layer, zeros at first."""
    return rows.setdefault(layer, np.zeros(width, dtype=np.float64))


def _require_below(name: str, layer: int, what: str, number: int, count: int) -> None:
    if not 0 <= number < count:
        raise VectorError(f"{name}: layer {layer}: expected {what} 0 to {count - 1}, got {number}")
