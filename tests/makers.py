"""Vectors, models and registries for the tests of vector, recipe, engine and steering."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from mien.errors import NameNotFound
from mien.fingerprint import Fingerprint
from mien.vector import Floats, MetaValue, Vector

N_LAYER, N_EMBD = 6, 5
MODEL = Fingerprint("llama", N_LAYER, N_EMBD, "ab" * 32, "tiny")


def make_vector(
    name: str = "joy",
    layers: Sequence[int] = (1, 2),
    seed: int = 0,
    fingerprint: Fingerprint | None = MODEL,
    n_embd: int | None = None,
    model_hint: str = "",
    meta: Mapping[str, MetaValue] | None = None,
    site: str = "residual",
    rank: int = 1,
) -> Vector:
    """A vector of random directions, for MODEL unless told otherwise. n_embd: its width."""
    width = n_embd or (fingerprint.n_embd if fingerprint else N_EMBD)
    rows = np.random.default_rng(seed).standard_normal((len(layers), rank, width)).astype(np.float32)
    return Vector(name, tuple(layers), rows, fingerprint, model_hint, meta or {}, site)


def floats(limit: float = 2.0**100) -> st.SearchStrategy[float]:
    """Float32 values, denormals and zeros of both signs among them."""
    return st.floats(-limit, limit, width=32)


@st.composite
def vectors(draw: st.DrawFn, name: str = "v", limit: float = 2.0**100) -> Vector:
    """Vectors for MODEL with any layers and any floats of at most `limit`."""
    layers = draw(st.sets(st.integers(1, N_LAYER - 1), min_size=1))
    rows: Floats = draw(arrays(np.float32, (len(layers), N_EMBD), elements=floats(limit)))
    return Vector(name, tuple(sorted(layers)), rows, MODEL)


def same_bits(a: Any, b: Any) -> bool:
    """Whether two float32 arrays are the same to the sign of a zero."""
    a, b = np.asarray(a), np.asarray(b)
    return a.shape == b.shape and a.dtype == b.dtype == np.float32 and a.tobytes() == b.tobytes()


class DictRegistry:
    """A registry that knows these vectors and no file; `asked` counts what was looked up."""

    def __init__(self, *vectors: Vector) -> None:
        self.vectors = {vector.name: vector for vector in vectors}
        self.asked: list[tuple[str, Fingerprint | None]] = []

    def find(self, name: str, model: Fingerprint | None = None) -> Vector:
        self.asked.append((name, model))
        if name not in self.vectors:
            raise NameNotFound(name, self.vectors)
        return self.vectors[name]
