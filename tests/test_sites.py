from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import mien
import numpy as np
import pytest
from makers import MODEL, same_bits
from mien import vectorfile
from mien.errors import VectorError
from mien.sites import of_experts, of_heads, of_neurons


def test_heads_lie_one_after_another() -> None:
    vector = of_heads("h", {(3, 1): [1, 2], (0, 2): -1.0, (3, 0): 0.5}, n_head=3, head_dim=2)
    assert (vector.site, vector.layers, vector.width) == ("heads", (0, 3), 6)
    assert vector.rows.tolist() == [[0, 0, 0, 0, -1, -1], [0.5, 0.5, 1, 2, 0, 0]]
    assert vector.meta == {"head_dim": 2}


def test_neurons_are_what_is_given_and_zero() -> None:
    vector = of_neurons("n", {2: {0: 1.5, 3: -2}, 1: {3: 1e-45}}, n_ff=4)
    assert (vector.site, vector.layers) == ("neurons", (1, 2))
    expected = np.array([[0, 0, 0, 1e-45], [1.5, 0, 0, -2]], dtype=np.float32)
    assert same_bits(vector.rows, expected)


def test_experts_are_marked_with_one() -> None:
    vector = of_experts("e", {0: [1, 3], 5: {0}}, n_expert=4)
    assert (vector.site, vector.layers) == ("experts", (0, 5))
    assert vector.rows.tolist() == [[0, 1, 0, 1], [1, 0, 0, 0]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: of_heads("v", {(0, 3): 1.0}, 3, 2), "layer 0: expected head 0 to 2, got 3"),
        (lambda: of_heads("v", {(0, -1): 1.0}, 3, 2), "layer 0: expected head 0 to 2, got -1"),
        (
            lambda: of_heads("v", {(4, 1): [1, 2, 3]}, 3, 2),
            "layer 4, head 1: expected 2 floats or a gain, got (3,)",
        ),
        (
            lambda: of_heads("v", {(0, 1): [[1, 2]]}, 3, 2),
            "layer 0, head 1: expected 2 floats or a gain, got (1, 2)",
        ),
        (lambda: of_heads("v", {(-1, 1): 1.0}, 3, 2), "layers must ascend from 0 or more, got [-1]"),
        (lambda: of_heads("v", {(1, 1): math.nan}, 3, 2), "layer 1 holds NaN or infinity"),
        (lambda: of_heads("v", {(1, 1): 1e39}, 3, 2), "layer 1 holds NaN or infinity"),
        (lambda: of_heads("v", {}, 3, 2), "a vector needs at least one direction"),
        (lambda: of_neurons("v", {0: {4: 1.0}}, 4), "layer 0: expected neuron 0 to 3, got 4"),
        (lambda: of_neurons("v", {0: {-1: 1.0}}, 4), "layer 0: expected neuron 0 to 3, got -1"),
        (lambda: of_neurons("v", {2: {1: math.inf}}, 4), "layer 2 holds NaN or infinity"),
        (lambda: of_neurons("v", {2: {1: 1e39}}, 4), "layer 2 holds NaN or infinity"),
        (lambda: of_neurons("v", {}, 4), "a vector needs at least one direction"),
        (lambda: of_experts("v", {1: [0, 8]}, 8), "layer 1: expected expert 0 to 7, got 8"),
        (lambda: of_experts("v", {}, 8), "a vector needs at least one direction"),
    ],
)
def test_what_is_not_there_is_refused(make: Any, message: str) -> None:
    with pytest.raises(VectorError) as caught:
        make()
    assert str(caught.value) == f"v: {message}"


@pytest.mark.parametrize(
    "vector",
    [
        of_heads("v", {(0, 1): [1, 2]}, 3, 2, fingerprint=MODEL, meta={"kind": "trait"}),
        of_neurons("v", {1: {7: 2.5}}, 90, model_hint="llama"),
        of_experts("v", {5: [0]}, 2, fingerprint=MODEL),
    ],
)
def test_they_can_be_saved(vector: mien.Vector, tmp_path: Path) -> None:
    vector.save(tmp_path / "v.gguf")
    found = vectorfile.load(tmp_path / "v.gguf")
    assert (found.site, found.layers, found.fingerprint) == (vector.site, vector.layers, vector.fingerprint)
    assert (found.model_hint, dict(found.meta)) == ("llama", dict(vector.meta))
    assert same_bits(found.rows, vector.rows)


def test_they_belong_to_the_package() -> None:
    assert (mien.of_heads, mien.of_neurons, mien.of_experts) == (of_heads, of_neurons, of_experts)
