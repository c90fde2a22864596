"""A vector: one direction a layer, with its metadata, and the arithmetic on it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

import numpy as np
import numpy.typing as npt

from .errors import ModelMismatch, VectorError
from .fingerprint import Fingerprint
from .recipe import WINDOWS
from .spans import CUT, coordinates, orthonormal, reading

Floats: TypeAlias = npt.NDArray[np.float32]
MetaValue: TypeAlias = str | int | float | bool | list[float] | list[int] | list[str]

# Places in a transformer block where a program may act. A row at each is: of residual, attention and mlp
# n_embd floats; of heads those of all heads one after another, before the output projection; of neurons
# the MLP's activated product, before the down projection; of experts the router's logits.
SITES = ("residual", "attention", "mlp", "heads", "neurons", "experts")
_FLOAT32 = float(np.finfo(np.float32).max)


@dataclass(frozen=True, eq=False)
class Vector:
    """A named set of directions, immutable.

    layers: the blocks, counted from 0, where each direction belongs; ascending, and at the residual
    stream never 0 (llama.cpp's format has no place for it). rows: float32, shape (len(layers), width),
    in the units of the site; row i belongs to layers[i]. A subspace has several directions a layer:
    (len(layers), rank, width). fingerprint: the model it was made on, None where the file does not say.
    model_hint: the architecture's name. meta: the file's `mien.` keys without that prefix. site: one of
    SITES.

    Three keys of meta belong to the floats. bias: one number a layer, of a linear probe <direction, h> +
    bias. center: what `readouts` take for zero, one number a direction, in the readout's own units. when:
    the tokens that it is made to act on, one of WINDOWS, where a recipe says nothing else.

    Raises VectorError for a shape, layer or number that can't be.
    """

    name: str
    layers: tuple[int, ...]
    rows: Floats
    fingerprint: Fingerprint | None = None
    model_hint: str = ""
    meta: Mapping[str, MetaValue] = field(default_factory=dict)
    site: str = "residual"

    def __post_init__(self) -> None:
        with np.errstate(over="ignore"):  # what float32 can't hold is infinite, and refused below
            rows = np.ascontiguousarray(self.rows, dtype=np.float32)
        layers = tuple(int(layer) for layer in self.layers)
        if self.site not in SITES:
            raise VectorError(f"{self.name}: site: expected one of {', '.join(SITES)}, got {self.site!r}")
        if rows.ndim not in (2, 3) or rows.shape[0] != len(layers) or rows.size == 0:
            raise VectorError(
                f"{self.name}: expected rows of shape ({len(layers)}, n_embd), got {rows.shape}"
            )
        if rows.ndim == 3 and rows.shape[1] == 1:
            rows = rows[:, 0]
        first = 1 if self.site == "residual" else 0
        if layers[0] < first or any(a >= b for a, b in pairwise(layers)):
            raise VectorError(f"{self.name}: layers must ascend from {first} or more, got {list(layers)}")
        bad = np.flatnonzero(~np.isfinite(rows).reshape(len(layers), -1).all(axis=1))
        if bad.size:
            raise VectorError(f"{self.name}: layer {layers[bad[0]]} holds NaN or infinity")
        if rows is self.rows or rows.base is not None:
            rows = rows.copy()
        rows.setflags(write=False)
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "layers", layers)
        self._check_numbers("bias", len(layers))
        self._check_numbers("center", len(layers) * self.rank)
        if self.when not in WINDOWS:
            raise VectorError(f"{self.name}: when: expected one of {', '.join(WINDOWS)}, got {self.when!r}")
        if self.fingerprint is not None:
            wide = self.site in ("residual", "attention", "mlp") and self.width != self.fingerprint.n_embd
            if wide or layers[-1] >= self.fingerprint.n_layer:
                raise VectorError(
                    f"{self.name}: {self.width} values at layers up to {layers[-1]} can't belong to "
                    f"{self.fingerprint}"
                )
            object.__setattr__(self, "model_hint", self.fingerprint.architecture)

    def _check_numbers(self, key: str, count: int) -> None:
        values = self.meta.get(key)
        if values is None:
            return
        if not isinstance(values, list) or len(values) != count or not all(map(_is_number, values)):
            raise VectorError(f"{self.name}: {key}: expected {count} finite numbers")
        object.__setattr__(self, "meta", {**self.meta, key: [float(value) for value in values]})

    @classmethod
    def from_directions(
        cls,
        name: str,
        directions: Mapping[int, npt.ArrayLike],
        fingerprint: Fingerprint | None = None,
        model_hint: str = "",
        meta: Mapping[str, MetaValue] | None = None,
        site: str = "residual",
    ) -> Vector:
        """From {layer: width floats}. Raises VectorError for other shapes, a layer that can't be, NaN."""
        if not directions:
            raise VectorError(f"{name}: a vector needs at least one direction")
        layers = tuple(sorted(directions))
        with np.errstate(over="ignore"):
            arrays = [np.asarray(directions[layer], dtype=np.float32) for layer in layers]
        for layer, array in zip(layers, arrays):
            if array.ndim != 1 or array.shape != arrays[0].shape:
                raise VectorError(
                    f"{name}: layer {layer} has shape {array.shape}, layer {layers[0]} {arrays[0].shape}"
                )
        return cls(name, layers, np.stack(arrays), fingerprint, model_hint, meta or {}, site)

    @property
    def width(self) -> int:
        """How many floats a direction has: n_embd at the residual stream."""
        return int(self.rows.shape[-1])

    @property
    def rank(self) -> int:
        """How many directions a layer has: 1, or those of a subspace."""
        return int(self.rows.shape[1]) if self.rows.ndim == 3 else 1

    @property
    def is_control_vector(self) -> bool:
        """Whether it is one direction a layer of the residual stream: what other programs know, too."""
        return self.site == "residual" and self.rank == 1

    @property
    def spans(self) -> Floats:
        """The directions of each layer, float32 (len(layers), rank, width), read-only."""
        return self.rows if self.rows.ndim == 3 else self.rows[:, None]

    @cached_property
    def basis(self) -> Floats:
        """An orthonormal basis of each layer's span, float32 (len(layers), rank, width), read-only.

        Where directions depend on each other, or are zero, the rows that are left over are zero.
        """
        basis = np.stack([orthonormal(span) for span in self.spans.astype(np.float64)])
        return _read_only(basis.astype(np.float32))

    @cached_property
    def readouts(self) -> Floats:
        """What reads a row in calibrated units, float32 (len(layers), rank, width), read-only.

        <readouts[i, j], h> is the coordinate of h along direction j of layers[i]: 1 is what coefficient
        1 adds. Of one direction v that is v / <v, v>; of a subspace the rows of its pseudo-inverse.
        A zero direction reads 0. `center` is not taken off here. Raises VectorError for a direction so
        short that float32 can't hold what reads it.
        """
        with np.errstate(over="ignore"):
            readouts = reading(self.spans).astype(np.float32)
        if not np.isfinite(readouts).all():
            raise VectorError(f"{self.name}: a direction is too short to be read")
        return _read_only(readouts)

    @cached_property
    def center(self) -> npt.NDArray[np.float64]:
        """What each coordinate has for zero, float64 (len(layers), rank); zeros where it was not measured."""
        values = self.meta.get("center")
        shape = len(self.layers), self.rank
        return np.array(values, dtype=np.float64).reshape(shape) if values is not None else np.zeros(shape)

    @cached_property
    def bias(self) -> npt.NDArray[np.float64] | None:
        """Of a linear probe, float64 (len(layers),): <direction, h> + bias is the logit. None for others."""
        values = self.meta.get("bias")
        return None if values is None else np.array(values, dtype=np.float64)

    @property
    def when(self) -> MetaValue:
        """One of WINDOWS; "all" where the file does not say."""
        return self.meta.get("when", "all")

    @cached_property
    def calibrated(self) -> tuple[float, float] | None:
        """The least and the greatest dose whose replies were measured; None if it was not calibrated."""
        curve = self.meta.get("calibration.dose")
        if not isinstance(curve, list) or not curve or not all(map(_is_number, curve)):
            return None
        doses = [float(dose) for dose in curve if not isinstance(dose, str)]
        return min(doses), max(doses)

    @cached_property
    def limits(self) -> tuple[float, float] | None:
        """The least and the greatest dose that pass without a DoseWarning; None if it was not calibrated.

        They are the ends of what was measured. If only positive doses were, negative ones pass down to -1,
        and down to -0.5 for an emotion, whose negative side is not a pole of its own. The result of
        arithmetic passes where each of its parts does.
        """
        if self.calibrated is None:
            kept = self.meta.get("limits")
            return (float(kept[0]), float(kept[1])) if _are_limits(kept) else None
        least, greatest = self.calibrated
        unmeasured = -0.5 if self.meta.get("kind") == "emotion" else -1.0
        return least if least < 0 else unmeasured, greatest

    @cached_property
    def layer_ids(self) -> npt.NDArray[np.int32]:
        """The layers as an int32 array, as the engine takes them."""
        ids = np.array(self.layers, dtype=np.int32)
        ids.setflags(write=False)
        return ids

    @cached_property
    def kept(self) -> dict[str, Any]:
        """What a user of the vector makes of it once and keeps, by a name of its own: see engine.py."""
        return {}

    @property
    def directions(self) -> dict[int, Floats]:
        """{layer: float32 array of width, or (rank, width)}, read-only views."""
        return dict(zip(self.layers, self.rows))

    @cached_property
    def digest(self) -> str:
        """SHA-256 over layers and floats: the same digest is the same steering."""
        what = "" if self.is_control_vector else f"{self.site}:{self.rank}:"
        head = f"{what}{self.width}:{','.join(map(str, self.layers))}:".encode()
        return hashlib.sha256(head + self.rows.astype("<f4", copy=False).tobytes()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the GGUF file; a file already there is replaced only once the new one is whole."""
        from .vectorfile import write  # gguf loads slowly, and most commands never write

        write(self, path)

    # Arithmetic. Results carry no calibration: a sum has not been measured. But what counts as zero follows
    # from that of the parts, and so does the bias of a probe that is only made longer or turned round. And
    # where the parts are made for the same tokens, so is the result.

    def __mul__(self, factor: float) -> Vector:
        if not isinstance(factor, (int, float, np.integer, np.floating)):
            return NotImplemented
        try:
            factor = float(factor)
        except OverflowError:  # an int beyond every float
            factor = math.inf
        if not math.isfinite(factor):
            raise VectorError(f"{self.name}: the factor {factor} is not finite")
        with np.errstate(over="ignore"):  # the result is checked, with a message of its own
            rows = (self.rows.astype(np.float64) * factor).astype(np.float32)
        return self._derived(f"{factor:g}*{self.name}", self.layers, rows, self._scaled_meta(factor))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Vector:
        if not isinstance(divisor, (int, float, np.integer, np.floating)):
            return NotImplemented
        if divisor == 0:
            raise VectorError(f"{self.name}: division by zero")
        return self * (1.0 / float(divisor))

    def __neg__(self) -> Vector:
        return self._derived(f"-{self.name}", self.layers, -self.rows, self._scaled_meta(-1.0))

    def _scaled_meta(self, factor: float) -> dict[str, MetaValue]:
        meta = _when(self)
        with np.errstate(over="ignore"):  # as in __mul__
            if self.bias is not None:
                meta["bias"] = (self.bias * factor).tolist()
            if "center" in self.meta and factor != 0:
                meta["center"] = (self.center / factor).ravel().tolist()
            if self.limits is not None and factor != 0:
                meta["limits"] = sorted(float(np.float64(limit) / factor) for limit in self.limits)
        return meta

    def __add__(self, other: Vector) -> Vector:
        if not isinstance(other, Vector):
            return NotImplemented
        self._require_same_model(other)
        if self.rank != 1 or other.rank != 1:
            raise VectorError(f"{self.name} and {other.name}: subspaces don't add up")
        mine, theirs = self.directions, other.directions
        layers = tuple(sorted({*self.layers, *other.layers}))
        zero = np.zeros(self.width, dtype=np.float32)
        with np.errstate(over="ignore"):
            rows = np.stack([mine.get(layer, zero) + theirs.get(layer, zero) for layer in layers])
        means = np.zeros((len(layers), 1))
        for vector in (self, other):
            means[[layers.index(layer) for layer in vector.layers]] += vector._means()
        measured = "center" in self.meta and "center" in other.meta
        meta = _when(self, other) | (_center(rows[:, None], means) if measured else {})
        if limits := [vector.limits for vector in (self, other) if vector.limits is not None]:
            least, greatest = max(low for low, _ in limits), min(high for _, high in limits)
            meta["limits"] = [least, greatest] if least <= greatest else [0.0, 0.0]
        return self._derived(f"{self.name} + {other.name}", layers, rows, meta)

    def __sub__(self, other: Vector) -> Vector:
        if not isinstance(other, Vector):
            return NotImplemented
        return self + -other

    def dot(self, other: Vector) -> float:
        """The sum of the inner products over the layers that both have."""
        return sum(float(np.dot(a.astype(np.float64), b)) for a, b in self._shared(other))

    def norm(self) -> float:
        """Euclidean length over all layers together."""
        return float(np.linalg.norm(self.rows.astype(np.float64)))

    def cosine(self, other: Vector) -> float:
        """Cosine similarity over the layers that both have. Raises VectorError where one is zero."""
        pairs = list(self._shared(other))
        lengths = [
            math.sqrt(sum(float(np.dot(v.astype(np.float64), v)) for v in side)) for side in zip(*pairs)
        ]
        if not pairs or 0.0 in lengths:
            raise VectorError(f"cosine of {self.name} and {other.name}: nothing to compare")
        return self.dot(other) / (lengths[0] * lengths[1])

    def _shared(self, other: Vector) -> Iterator[tuple[Floats, Floats]]:
        self._require_same_model(other)
        if self.rank != 1 or other.rank != 1:
            raise VectorError(f"{self.name} and {other.name}: subspaces have no inner product")
        theirs = other.directions
        return ((row, theirs[layer]) for layer, row in self.directions.items() if layer in theirs)

    def _require_same_model(self, other: Vector) -> None:
        if self.site != other.site:
            raise VectorError(
                f"{self.name} and {other.name} are of different sites: {self.site}, {other.site}"
            )
        differences = []
        if self.fingerprint and other.fingerprint:
            differences = self.fingerprint.differences(other.fingerprint)
        elif self.model_hint and other.model_hint and self.model_hint != other.model_hint:
            differences = [f"architecture {self.model_hint} and {other.model_hint}"]
        if not differences and self.width != other.width:
            word = "n_embd" if self.site == "residual" else "width"
            differences = [f"{word} {self.width} and {other.width}"]
        if differences:
            raise ModelMismatch(f"{self.name} and {other.name} are for different models", differences)

    def _means(self) -> npt.NDArray[np.float64]:
        """<m, v> for each direction v, m being what reads `center`. float64 (len(layers), rank)."""
        spans = self.spans.astype(np.float64)
        means: npt.NDArray[np.float64] = (spans @ spans.swapaxes(1, 2) @ self.center[..., None])[..., 0]
        return means

    def _derived(
        self, name: str, layers: tuple[int, ...], rows: Floats, meta: Mapping[str, MetaValue]
    ) -> Vector:
        return Vector(name, layers, rows, self.fingerprint, self.model_hint, meta, self.site)

    def __repr__(self) -> str:
        span = f"{self.layers[0]}-{self.layers[-1]}" if len(self.layers) > 1 else str(self.layers[0])
        rank = f"{self.rank} x " if self.rank > 1 else ""
        site = "" if self.site == "residual" else f" of {self.site}"
        return f"<Vector {self.name}: {len(self.layers)} layers ({span}) x {rank}{self.width}{site}>"


def purified(vector: Vector, others: Sequence[Vector]) -> Vector:
    """`vector` with the span of `others` removed, layer by layer: v - Q Q^T v.

    Where another has no direction at a layer nothing of it is removed there. What is left is not made
    longer; what is less than a millionth is rounding, and becomes zero. "Personality as a Probe for LLM
    Evaluation", arXiv 2509.04794, orthogonalises traits so.
    Raises VectorError and ModelMismatch where they do not belong together.
    """
    for other in others:
        vector._require_same_model(other)
    rows, means = vector.spans.astype(np.float64), vector._means()
    theirs = [(other, other._means()) for other in others]
    for i, layer in enumerate(vector.layers):
        at = [(*each, each[0].layers.index(layer)) for each in theirs if layer in each[0].layers]
        if at:
            span = np.concatenate([other.spans[k] for other, _, k in at]).astype(np.float64)
            basis = orthonormal(span)
            removed = rows[i] @ basis.T @ basis
            came = np.linalg.norm(rows[i], axis=-1, keepdims=True)
            rows[i] -= removed
            rows[i] *= np.linalg.norm(rows[i], axis=-1, keepdims=True) > CUT * came
            # What is removed is a sum of their directions, and so its mean one of theirs.
            means[i] -= removed @ reading(span).T @ np.concatenate([known[k] for _, known, k in at])
    left = rows.astype(np.float32)
    meta = _when(vector)
    if all("center" in v.meta for v in (vector, *others)):
        meta |= _center(left, means)
    name = f"purify({', '.join(v.name for v in (vector, *others))})"
    return vector._derived(name, vector.layers, left.reshape(vector.rows.shape), meta)


def stacked(vectors: Sequence[Vector], *, apart: bool = False) -> Vector:
    """The subspace that `vectors` span together, layer by layer; `center` is kept.

    At a layer that one of them does not have, its directions are zero. apart: other directions of the same
    span, of which each moves the readout of one vector and of no other: so that a clamp of all is the clamp
    of each. Where they depend on each other that is so as nearly as can be.
    """
    first, *others = vectors
    if not others:
        return first
    for other in others:
        first._require_same_model(other)
    layers = tuple(sorted({layer for vector in vectors for layer in vector.layers}))
    ranks = [vector.rank for vector in vectors]
    rows = np.zeros((len(layers), sum(ranks), first.width), dtype=np.float64)
    center = np.zeros(rows.shape[:2])
    start = 0
    for vector, rank in zip(vectors, ranks):
        at = [layers.index(layer) for layer in vector.layers]
        rows[at, start : start + rank] = reading(vector.spans) if apart else vector.spans
        center[at, start : start + rank] = vector.center
        start += rank
    rows = reading(rows) if apart else rows
    name = ", ".join(vector.name for vector in vectors)
    meta = _when(*vectors)
    if center.any():
        meta["center"] = center.ravel().tolist()
    with np.errstate(over="ignore"):
        return first._derived(name, layers, rows.astype(np.float32), meta)


def _when(*vectors: Vector) -> dict[str, MetaValue]:
    """The metadata that says on which tokens all of them act; empty where that is all, or they differ."""
    whens = {vector.when for vector in vectors}
    return {"when": whens.pop()} if len(whens) == 1 and whens != {"all"} else {}


def _center(spans: Floats, means: npt.NDArray[np.float64]) -> dict[str, MetaValue]:
    """The metadata that says where zero is, of <m, v> for each direction: see Vector._means."""
    return {"center": coordinates(spans, means).ravel().tolist()}


def _read_only(array: Floats) -> Floats:
    array.setflags(write=False)
    return array


def _are_limits(value: object) -> TypeGuard[list[float]]:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))


def _is_number(value: object) -> bool:
    """Whether a file, which has float32, can hold it."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _FLOAT32
