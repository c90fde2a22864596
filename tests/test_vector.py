from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from makers import MODEL, N_EMBD, make_vector, same_bits, vectors
from mien.errors import ModelMismatch, VectorError
from mien.fingerprint import Fingerprint
from mien.vector import Vector

factors = st.floats(-1e6, 1e6)
moderate = vectors(limit=2.0**30)


def dense(vector: Vector) -> np.ndarray[Any, Any]:
    """(n_layer, n_embd) float32, zero where the vector has no direction."""
    out = np.zeros((MODEL.n_layer, N_EMBD), dtype=np.float32)
    out[list(vector.layers)] = vector.rows
    return out


# Algebra, against NumPy on dense arrays.


@given(vectors(), vectors())
def test_sum_is_the_float32_sum_over_the_union_of_the_layers(a: Vector, b: Vector) -> None:
    total = a + b
    assert total.layers == tuple(sorted({*a.layers, *b.layers}))
    np.testing.assert_array_equal(dense(total), dense(a) + dense(b))
    np.testing.assert_array_equal(dense(b + a), dense(total))


@given(vectors(), vectors())
def test_difference_is_the_float32_difference(a: Vector, b: Vector) -> None:
    np.testing.assert_array_equal(dense(a - b), dense(a) - dense(b))
    assert not (a - a).rows.any()


@given(moderate, factors)
def test_product_is_rounded_to_float32_once(a: Vector, factor: float) -> None:
    expected = [[np.float32(float(x) * factor) for x in row] for row in a.rows]
    assert same_bits((a * factor).rows, np.array(expected, dtype=np.float32))
    assert same_bits((factor * a).rows, (a * factor).rows)


@given(vectors())
def test_negation_doubling_and_halving_are_exact(a: Vector) -> None:
    assert same_bits((-a).rows, -a.rows)
    assert same_bits((a * 1).rows, a.rows)
    assert same_bits((a * -1).rows, (-a).rows)
    assert same_bits((2 * a).rows, (a + a).rows)
    assert same_bits((a / 2).rows, (0.5 * a).rows)


@pytest.mark.parametrize("factor", [2, 2.0, True, np.float32(2), np.float64(2), np.int64(2)])
def test_a_number_of_any_kind_scales_from_either_side(factor: Any) -> None:
    a = make_vector()
    expected = a.rows * np.float32(factor)
    for product in (a * factor, factor * a):
        assert isinstance(product, Vector)
        assert same_bits(product.rows, expected)


@given(moderate, moderate)
def test_dot_and_norm_are_those_of_the_dense_arrays(a: Vector, b: Vector) -> None:
    x, y = dense(a).astype(np.float64).ravel(), dense(b).astype(np.float64).ravel()
    scale = float(np.linalg.norm(x) * np.linalg.norm(y))
    assert a.dot(b) == pytest.approx(float(x @ y), rel=1e-12, abs=1e-12 * scale)
    assert a.dot(b) == b.dot(a)
    assert a.norm() == pytest.approx(float(np.linalg.norm(x)), rel=1e-12)


@given(st.floats(0.001, 1000))
def test_cosine_forgets_length_and_keeps_direction(factor: float) -> None:
    a, b = make_vector(seed=1), make_vector(seed=2)
    assert a.cosine(a * factor) == pytest.approx(1)
    assert a.cosine(a * -factor) == pytest.approx(-1)
    assert (a * factor).cosine(b) == pytest.approx(a.cosine(b), abs=1e-6)


def test_cosine_is_over_shared_layers_only() -> None:
    a = Vector.from_directions("a", {1: [1, 0], 2: [0, 1]})
    b = Vector.from_directions("b", {2: [0, 2], 3: [5, 5]})
    assert a.dot(b) == 2
    assert a.cosine(b) == pytest.approx(1)


@pytest.mark.parametrize(
    "other", [Vector.from_directions("b", {4: [1, 1]}), Vector.from_directions("b", {1: [0, 0]})]
)
def test_cosine_of_nothing_is_refused(other: Vector) -> None:
    a = Vector.from_directions("a", {1: [1, 0]})
    for pair in ((a, other), (other, a)):
        with pytest.raises(VectorError, match=r"^cosine of \w and \w: nothing to compare$"):
            pair[0].cosine(pair[1])


def test_results_keep_the_model_and_lose_the_metadata() -> None:
    a, b = make_vector("a", meta={"scale": 2.0}), make_vector("b", seed=1)
    for result, name in (
        (a + b, "a + b"),
        (a - b, "a + -b"),
        (a * 0.5, "0.5*a"),
        (a / 4, "0.25*a"),
        (-a, "-a"),
    ):
        assert (result.name, result.fingerprint, result.model_hint) == (name, MODEL, "llama")
        assert not result.meta


# Refusals.


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (lambda v: v * math.nan, "joy: the factor nan is not finite"),
        (lambda v: v * math.inf, "joy: the factor inf is not finite"),
        (lambda v: v * np.float32(np.inf), "joy: the factor inf is not finite"),
        (lambda v: v * 10**400, "joy: the factor inf is not finite"),
        (lambda v: v / 0, "joy: division by zero"),
        (lambda v: v / 0.0, "joy: division by zero"),
        (lambda v: v / 5e-324, "joy: the factor inf is not finite"),
        (lambda v: v / math.nan, "joy: the factor nan is not finite"),
        (lambda v: v * 1e39, "1e+39*joy: layer 1 holds NaN or infinity"),
        (lambda v: v * 1e308, "1e+308*joy: layer 1 holds NaN or infinity"),
        (lambda v: v * 2e38 + v * 2e38, "2e+38*joy + 2e+38*joy: layer 1 holds NaN or infinity"),
        (lambda v: v * 2e38 - v * -2e38, "2e+38*joy + --2e+38*joy: layer 1 holds NaN or infinity"),
    ],
)
def test_arithmetic_that_leaves_float32_is_refused(
    operation: Callable[[Vector], Vector], message: str
) -> None:
    one = Vector("joy", (1,), np.ones((1, 2), dtype=np.float32))
    with pytest.raises(VectorError) as caught:
        operation(one)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "operation",
    [
        lambda v: v + 1,
        lambda v: 1 + v,
        lambda v: v - 1,
        lambda v: v * v,
        lambda v: v * "2",
        lambda v: v / v,
        lambda v: v / "2",
        lambda v: 2 / v,
        lambda v: v * 1j,
    ],
)
def test_operands_of_another_kind_are_type_errors(operation: Callable[[Vector], Any]) -> None:
    with pytest.raises(TypeError):
        operation(make_vector())


ROW = [1.0, 2.0]


@pytest.mark.parametrize(
    ("layers", "rows", "message"),
    [
        ((1,), ROW, "expected rows of shape (1, n_embd), got (2,)"),
        ((1, 2), [ROW], "expected rows of shape (2, n_embd), got (1, 2)"),
        ((), np.zeros((0, 4)), "expected rows of shape (0, n_embd), got (0, 4)"),
        ((1,), np.zeros((1, 0)), "expected rows of shape (1, n_embd), got (1, 0)"),
        ((1,), [[ROW]], "expected rows of shape (1, n_embd), got (1, 1, 2)"),
        ((0,), [ROW], "layers must ascend from 1 or more, got [0]"),
        ((-1,), [ROW], "layers must ascend from 1 or more, got [-1]"),
        ((0, 1), [ROW, ROW], "layers must ascend from 1 or more, got [0, 1]"),
        ((2, 1), [ROW, ROW], "layers must ascend from 1 or more, got [2, 1]"),
        ((2, 2), [ROW, ROW], "layers must ascend from 1 or more, got [2, 2]"),
        ((1, 2), [ROW, [math.nan, 1]], "layer 2 holds NaN or infinity"),
        ((1,), [[1, math.inf]], "layer 1 holds NaN or infinity"),
        ((1,), [[-math.inf, math.inf]], "layer 1 holds NaN or infinity"),
        ((1,), [[1e39, 0]], "layer 1 holds NaN or infinity"),
    ],
)
def test_what_is_no_vector_is_refused(layers: tuple[int, ...], rows: Any, message: str) -> None:
    with pytest.raises(VectorError) as caught:
        Vector("joy", layers, np.asarray(rows))
    assert str(caught.value) == f"joy: {message}"


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        ({}, "a vector needs at least one direction"),
        ({1: ROW, 3: [1.0]}, "layer 3 has shape (1,), layer 1 (2,)"),
        ({1: [ROW]}, "layer 1 has shape (1, 2), layer 1 (1, 2)"),
        ({0: ROW, 2: ROW}, "layers must ascend from 1 or more, got [0, 2]"),
        ({1: [1e300, 0]}, "layer 1 holds NaN or infinity"),
    ],
)
def test_directions_that_are_no_vector_are_refused(directions: dict[int, Any], message: str) -> None:
    with pytest.raises(VectorError) as caught:
        Vector.from_directions("joy", directions)
    assert str(caught.value) == f"joy: {message}"


@pytest.mark.parametrize(("layers", "n_embd"), [((1, MODEL.n_layer), N_EMBD), ((1, 2), N_EMBD + 1)])
def test_a_vector_beyond_its_own_model_is_refused(layers: tuple[int, ...], n_embd: int) -> None:
    message = rf"^joy: {n_embd} values at layers up to {layers[-1]} can't belong to tiny \(llama, 6 layers"
    with pytest.raises(VectorError, match=message):
        make_vector(layers=layers, n_embd=n_embd)


def fingerprinted(**changes: Any) -> Vector:
    return make_vector("b", fingerprint=dataclasses.replace(MODEL, **changes))


def free(n_embd: int = N_EMBD, model_hint: str = "") -> Vector:
    return make_vector("b", fingerprint=None, n_embd=n_embd, model_hint=model_hint)


@pytest.mark.parametrize(
    ("a", "b", "difference"),
    [
        (
            make_vector("a"),
            fingerprinted(architecture="gemma3"),
            "made for architecture llama, the model has gemma3",
        ),
        (make_vector("a"), fingerprinted(n_layer=7), "made for layers 6, the model has 7"),
        (make_vector("a"), fingerprinted(n_embd=9), "made for n_embd 5, the model has 9"),
        (
            make_vector("a"),
            fingerprinted(vocabulary="cd" * 32),
            "made for a vocabulary with digest abababababab, the model's is cdcdcdcdcdcd",
        ),
        (make_vector("a"), free(n_embd=9), "n_embd 5 and 9"),
        (make_vector("a"), free(model_hint="gemma3"), "architecture llama and gemma3"),
    ],
)
def test_vectors_of_different_models_do_not_mix(a: Vector, b: Vector, difference: str) -> None:
    for operation in (lambda: a + b, lambda: a - b, lambda: a.dot(b), lambda: a.cosine(b)):
        with pytest.raises(ModelMismatch) as caught:
            operation()
        assert caught.value.differences == (difference,)
        assert str(caught.value).endswith(f"are for different models: {difference}.")


@pytest.mark.parametrize(
    "b", [free(), free(model_hint="llama"), fingerprinted(vocabulary=""), fingerprinted(name="Q4_0 of it")]
)
def test_vectors_that_may_be_of_one_model_mix(b: Vector) -> None:
    assert same_bits((make_vector("a") + b).rows, make_vector().rows + b.rows)


def test_all_differences_are_named_at_once() -> None:
    other = Fingerprint("gemma3", 9, 7)
    assert MODEL.differences(other) == [
        "made for architecture llama, the model has gemma3",
        "made for layers 6, the model has 9",
        "made for n_embd 5, the model has 7",
    ]


# Immutability and identity.


def test_no_array_of_a_vector_can_be_written() -> None:
    vector = make_vector()
    for array in (vector.rows, vector.directions[1], vector.layer_ids):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        vector.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x[:2], lambda x: x.T[:2].copy(order="F"), list])
def test_a_vector_does_not_follow_the_array_it_was_made_from(view: Callable[[Any], Any]) -> None:
    source = np.ones((2, 2), dtype=np.float32)
    rows = view(source)
    vector = Vector("joy", (1, 2), rows)
    source[:] = 9
    if isinstance(rows, np.ndarray):
        rows[:] = 9
    assert same_bits(vector.rows, np.ones((2, 2), dtype=np.float32))
    assert source.flags.writeable


def test_the_digest_is_of_layers_and_floats_alone() -> None:
    a = make_vector("a", meta={"kind": "emotion"})
    assert a.digest == make_vector("b", fingerprint=None).digest
    others = [make_vector(seed=1), make_vector(layers=(1, 3)), -a, a * (1 + 2**-23)]
    assert len({a.digest, *(other.digest for other in others)}) == 1 + len(others)
    golden = Vector.from_directions("x", {1: [1.0, -2.0], 3: [0.5, 0.25]})
    assert golden.digest == "885a537907563dc8dc30b1cf3264d6c9ac3eb101d43833df36c064c513a722d3"


def test_a_vector_says_what_it_is() -> None:
    assert repr(make_vector(layers=(1, 2, 5))) == "<Vector joy: 3 layers (1-5) x 5>"
    assert repr(make_vector(layers=(4,))) == "<Vector joy: 1 layers (4) x 5>"
