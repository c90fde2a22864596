"""A vector: one direction a layer, with its metadata, and the arithmetic on it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from .errors import ModelMismatch, VectorError
from .fingerprint import Fingerprint

Floats: TypeAlias = npt.NDArray[np.float32]
MetaValue: TypeAlias = str | int | float | bool | list[float] | list[int] | list[str]


@dataclass(frozen=True, eq=False)
class Vector:
    """A named set of directions, immutable.

    layers: the blocks, counted from 0, whose output each direction is added to; ascending, and
    never 0 (llama.cpp's format has no place for it). rows: float32, shape (len(layers), n_embd),
    in the units of the residual stream; row i belongs to layers[i]. fingerprint: the model it was
    made on, None where the file does not say. model_hint: the architecture's name. meta: the
    file's `mien.` keys without that prefix.

    Raises VectorError for a shape, layer or number that can't be.
    """

    name: str
    layers: tuple[int, ...]
    rows: Floats
    fingerprint: Fingerprint | None = None
    model_hint: str = ""
    meta: Mapping[str, MetaValue] = field(default_factory=dict)

    def __post_init__(self) -> None:
        with np.errstate(over="ignore"):  # what float32 can't hold is infinite, and refused below
            rows = np.ascontiguousarray(self.rows, dtype=np.float32)
        layers = tuple(int(layer) for layer in self.layers)
        if rows.ndim != 2 or rows.shape[0] != len(layers) or rows.size == 0:
            raise VectorError(
                f"{self.name}: expected rows of shape ({len(layers)}, n_embd), got {rows.shape}"
            )
        if layers[0] < 1 or any(a >= b for a, b in pairwise(layers)):
            raise VectorError(f"{self.name}: layers must ascend from 1 or more, got {list(layers)}")
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if bad.size:
            raise VectorError(f"{self.name}: layer {layers[bad[0]]} holds NaN or infinity")
        if rows is self.rows or rows.base is not None:
            rows = rows.copy()
        rows.setflags(write=False)
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "layers", layers)
        if self.fingerprint is not None:
            if rows.shape[1] != self.fingerprint.n_embd or layers[-1] >= self.fingerprint.n_layer:
                raise VectorError(
                    f"{self.name}: {rows.shape[1]} values at layers up to {layers[-1]} can't belong to "
                    f"{self.fingerprint}"
                )
            object.__setattr__(self, "model_hint", self.fingerprint.architecture)

    @classmethod
    def from_directions(
        cls,
        name: str,
        directions: Mapping[int, npt.ArrayLike],
        fingerprint: Fingerprint | None = None,
        model_hint: str = "",
        meta: Mapping[str, MetaValue] | None = None,
    ) -> Vector:
        """From {layer: n_embd floats}. Raises VectorError for shapes that differ, layer 0, NaN."""
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
        return cls(name, layers, np.stack(arrays), fingerprint, model_hint, meta or {})

    @property
    def n_embd(self) -> int:
        return int(self.rows.shape[1])

    @cached_property
    def layer_ids(self) -> npt.NDArray[np.int32]:
        """The layers as an int32 array, as the engine takes them."""
        ids = np.array(self.layers, dtype=np.int32)
        ids.setflags(write=False)
        return ids

    @property
    def directions(self) -> dict[int, Floats]:
        """{layer: float32 array of n_embd}, read-only views."""
        return dict(zip(self.layers, self.rows))

    @cached_property
    def digest(self) -> str:
        """SHA-256 over layers and floats: the same digest is the same steering."""
        head = f"{self.n_embd}:{','.join(map(str, self.layers))}:".encode()
        return hashlib.sha256(head + self.rows.astype("<f4", copy=False).tobytes()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the GGUF file; a file already there is replaced only once the new one is whole."""
        from .vectorfile import write  # gguf loads slowly, and most commands never write

        write(self, path)

    # Arithmetic. Results carry no calibration: a sum has not been measured.

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
        return self._derived(f"{factor:g}*{self.name}", self.layers, rows)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Vector:
        if not isinstance(divisor, (int, float, np.integer, np.floating)):
            return NotImplemented
        if divisor == 0:
            raise VectorError(f"{self.name}: division by zero")
        return self * (1.0 / float(divisor))

    def __neg__(self) -> Vector:
        return self._derived(f"-{self.name}", self.layers, -self.rows)

    def __add__(self, other: Vector) -> Vector:
        if not isinstance(other, Vector):
            return NotImplemented
        self._require_same_model(other)
        mine, theirs = self.directions, other.directions
        layers = tuple(sorted({*self.layers, *other.layers}))
        zero = np.zeros(self.n_embd, dtype=np.float32)
        with np.errstate(over="ignore"):
            rows = np.stack([mine.get(layer, zero) + theirs.get(layer, zero) for layer in layers])
        return self._derived(f"{self.name} + {other.name}", layers, rows)

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
        theirs = other.directions
        return ((row, theirs[layer]) for layer, row in self.directions.items() if layer in theirs)

    def _require_same_model(self, other: Vector) -> None:
        differences = []
        if self.fingerprint and other.fingerprint:
            differences = self.fingerprint.differences(other.fingerprint)
        elif self.n_embd != other.n_embd:
            differences = [f"n_embd {self.n_embd} and {other.n_embd}"]
        elif self.model_hint and other.model_hint and self.model_hint != other.model_hint:
            differences = [f"architecture {self.model_hint} and {other.model_hint}"]
        if differences:
            raise ModelMismatch(f"{self.name} and {other.name} are for different models", differences)

    def _derived(self, name: str, layers: tuple[int, ...], rows: Floats) -> Vector:
        return Vector(name, layers, rows, self.fingerprint, self.model_hint)

    def __repr__(self) -> str:
        span = f"{self.layers[0]}-{self.layers[-1]}" if len(self.layers) > 1 else str(self.layers[0])
        return f"<Vector {self.name}: {len(self.layers)} layers ({span}) x {self.n_embd}>"
