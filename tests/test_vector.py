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
from mien import reference
from mien.errors import ModelMismatch, VectorError
from mien.fingerprint import Fingerprint
from mien.spans import reading
from mien.vector import SITES, Vector, purified, stacked

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
        ((1,), [[[ROW]]], "expected rows of shape (1, n_embd), got (1, 1, 1, 2)"),
        ((1,), np.zeros((1, 0, 2)), "expected rows of shape (1, n_embd), got (1, 0, 2)"),
        ((1, 2), [[ROW, ROW], [ROW, [math.nan, 1]]], "layer 2 holds NaN or infinity"),
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
        ({1: [ROW, ROW]}, "layer 1 has shape (2, 2), layer 1 (2, 2)"),
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


# Sites, subspaces, biases and centers.


@pytest.mark.parametrize("site", SITES)
def test_block_0_belongs_to_every_site_but_the_residual_stream(site: str) -> None:
    rows = np.ones((1, 3), dtype=np.float32)
    if site == "residual":
        with pytest.raises(VectorError, match="layers must ascend from 1 or more, got \\[0\\]"):
            Vector("joy", (0,), rows, site=site)
    else:
        assert Vector("joy", (0,), rows, site=site).layers == (0,)
        assert Vector.from_directions("joy", {0: [1, 2]}, site=site).site == site


def test_an_unknown_site_is_refused() -> None:
    with pytest.raises(VectorError) as caught:
        make_vector(site="queries")
    assert str(caught.value) == (
        "joy: site: expected one of residual, attention, mlp, heads, neurons, experts, got 'queries'"
    )


@pytest.mark.parametrize("site", SITES)
def test_the_model_bounds_the_width_where_it_is_the_models_own(site: str) -> None:
    if site in ("residual", "attention", "mlp"):
        with pytest.raises(VectorError, match="9 values at layers up to 2 can't belong to tiny"):
            make_vector(n_embd=9, site=site)
    else:
        assert make_vector(n_embd=9, site=site).width == 9


def test_one_direction_in_a_third_dimension_is_one_direction() -> None:
    assert make_vector().rows.shape == (2, N_EMBD)
    assert make_vector().rank == 1
    assert make_vector().spans.shape == (2, 1, N_EMBD)
    subspace = make_vector(rank=3)
    assert (subspace.rank, subspace.width, subspace.spans.shape) == (3, N_EMBD, (2, 3, N_EMBD))
    assert subspace.directions[1].shape == (3, N_EMBD)


def test_a_control_vector_is_one_direction_a_layer_of_the_residual_stream() -> None:
    assert make_vector().is_control_vector
    assert not make_vector(rank=2).is_control_vector
    assert not make_vector(site="mlp").is_control_vector


PROBE: dict[str, Any] = {"bias": [0.5, -2], "center": [1, 3.5]}


def test_biases_and_centers_are_numbers_a_layer() -> None:
    probe = make_vector(meta=PROBE)
    assert probe.bias is not None
    assert probe.bias.tolist() == [0.5, -2.0]
    assert probe.center.tolist() == [[1.0], [3.5]]
    assert probe.meta["bias"] == [0.5, -2.0]
    assert all(type(value) is float for value in probe.meta["bias"])  # type: ignore[union-attr]
    assert make_vector().bias is None
    assert make_vector(rank=3).center.tolist() == [[0.0] * 3] * 2
    assert make_vector(rank=3, meta={"center": [1, 2, 3, 4, 5, 6]}).center.tolist() == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize("key", ["bias", "center"])
@pytest.mark.parametrize(
    "values",
    [[1.0], [1.0] * 3, [], 1.0, "12", [1.0, math.nan], [math.inf, 0], [1, "2"], [True, 0], [1, 10**400]],
)
def test_other_biases_and_centers_are_refused(key: str, values: Any) -> None:
    with pytest.raises(VectorError) as caught:
        make_vector(meta={key: values})
    assert str(caught.value) == f"joy: {key}: expected 2 finite numbers"


def test_a_subspace_has_a_center_a_direction_and_a_bias_a_layer() -> None:
    with pytest.raises(VectorError, match="center: expected 6 finite numbers"):
        make_vector(rank=3, meta={"center": [1.0, 2.0]})
    assert make_vector(rank=3, meta={"bias": [1.0, 2.0]}).bias is not None


@given(vectors(limit=2.0**60), st.integers(1, 4))
def test_a_basis_is_orthonormal_and_spans_the_directions(a: Vector, rank: int) -> None:
    rng = np.random.default_rng(rank)
    lengths = 10.0 ** rng.integers(-20, 20, (len(a.layers), rank, 1))
    rows = np.concatenate([a.spans, rng.standard_normal((len(a.layers), rank, N_EMBD)) * lengths], axis=1)
    for vector in (a, Vector("s", a.layers, rows)):
        for span, basis in zip(vector.spans.astype(np.float64), vector.basis.astype(np.float64)):
            kept = basis[basis.any(axis=1)]
            np.testing.assert_allclose(kept @ kept.T, np.eye(len(kept)), atol=1e-6)
            sizes = np.linalg.norm(span, axis=1, keepdims=True)
            np.testing.assert_allclose(
                span - span @ kept.T @ kept, 0, atol=float(3e-6 * max(sizes.max(), 1e-300))
            )
            assert len(kept) == np.linalg.matrix_rank(span / np.where(sizes > 0, sizes, 1), tol=1e-6)


def test_directions_that_depend_on_each_other_leave_zeros_in_the_basis() -> None:
    row = np.array([3.0, 4.0, 0.0])
    vector = Vector("s", (1, 2), np.array([[row, 2 * row, 0 * row], [row, row[::-1], -row]]))
    basis = vector.basis
    assert [int(rows.any(axis=1).sum()) for rows in basis] == [1, 2]
    np.testing.assert_allclose(np.abs(basis[0, 0]), [0.6, 0.8, 0], atol=1e-7)
    wide = Vector("wide", (1,), np.eye(2)[None].repeat(3, axis=1))  # rank above width
    assert wide.basis.shape == (1, 6, 2)
    assert wide.basis.any(axis=2).sum() == 2


@given(vectors(limit=2.0**60).filter(lambda v: all(not r.any() or np.abs(r).max() > 1e-37 for r in v.rows)))
def test_a_readout_of_the_direction_itself_is_one(a: Vector) -> None:
    for row, reads in zip(a.rows.astype(np.float64), a.readouts[:, 0].astype(np.float64)):
        assert float(row @ reads) == pytest.approx(float(row.any()), abs=1e-6)


def test_readouts_of_a_subspace_are_coordinates() -> None:
    vector = make_vector(rank=3)
    for span, reads in zip(vector.spans, vector.readouts):
        np.testing.assert_allclose(span @ reads.T, np.eye(3), atol=1e-5)
        coordinates = np.array([1.0, -2.0, 0.5])
        np.testing.assert_allclose((coordinates @ span) @ reads.T, coordinates, atol=1e-5)


def test_a_direction_too_short_to_be_read_is_an_error() -> None:
    short = Vector("short", (1,), np.full((1, 2), 1e-45))
    with pytest.raises(VectorError, match=r"^short: a direction is too short to be read$"):
        _ = short.readouts


# What counts as zero follows the arithmetic: a mean of activations is read as 0 by what is made of vectors
# that read it as 0.

MEAN = np.random.default_rng(99).standard_normal(N_EMBD) * 5


def centred(
    name: str, seed: int, layers: tuple[int, ...] = (1, 2), rank: int = 1, size: float = 1.0
) -> Vector:
    """A vector that reads MEAN as zero."""
    vector = make_vector(name, layers, seed, rank=rank)
    rows = vector.rows * np.float32(size)
    center = (reading(rows.reshape(len(layers), rank, -1)) @ MEAN).ravel().tolist()
    return Vector(name, layers, rows, MODEL, meta={"center": center})


@pytest.mark.parametrize(
    "make",
    [
        lambda a, b, s: a,
        lambda a, b, s: 2.5 * a,
        lambda a, b, s: -a,
        lambda a, b, s: a / -3,
        lambda a, b, s: a + b,
        lambda a, b, s: 0.5 * a - 3 * b,
        lambda a, b, s: purified(a, [b]),
        lambda a, b, s: purified(a, [b, s]),
        lambda a, b, s: purified(a - b, [s, b]),
    ],
)
def test_the_center_follows_the_arithmetic(make: Callable[..., Vector]) -> None:
    a, b, s = centred("a", 1), centred("b", 2, (2, 3), size=100), centred("s", 3, (1,), rank=2)
    made = make(a, b, s)
    assert "center" in made.meta
    row = MEAN[None].astype(np.float32)
    for layer in made.layers:
        assert abs(reference.readout(row, made, layer)[0]) < 2e-4  # float32 of what nearly cancels


def test_a_center_that_was_never_measured_is_not_invented() -> None:
    a, plain = centred("a", 1), make_vector("plain", seed=4)
    for made in (a + plain, plain - a, purified(a, [plain]), purified(plain, [a]), 2 * plain, a * 0):
        assert "center" not in made.meta


def test_the_bias_of_a_probe_follows_its_length_and_its_sign() -> None:
    probe = make_vector(meta={"bias": [0.5, -2.0]})
    assert (-probe).meta["bias"] == [-0.5, 2.0]
    assert (probe * 4).meta["bias"] == [2.0, -8.0]
    assert "bias" not in (probe + probe).meta


# Purified and stacked.


REPLY = {"when": "response"}


@pytest.mark.parametrize(
    ("make", "when"),
    [
        (lambda a, _b, _c: a, "response"),
        (lambda a, _b, _c: -2 * a / 3, "response"),
        (lambda a, b, _c: a - b, "response"),
        (lambda a, _b, c: a + c, "all"),
        (lambda a, _b, c: purified(a, [c]), "response"),
        (lambda a, _b, c: purified(c, [a]), "all"),
        (lambda a, b, _c: stacked([a, b]), "response"),
        (lambda a, b, c: stacked([a, b, c], apart=True), "all"),
    ],
)
def test_what_is_made_of_vectors_for_the_same_tokens_is_for_those(
    make: Callable[..., Vector], when: str
) -> None:
    a, b, c = make_vector("a", meta=REPLY), make_vector("b", seed=1, meta=REPLY), make_vector("c", seed=2)
    assert make(a, b, c).when == when


@pytest.mark.parametrize("when", ["later", "", 1, ["response"]])
def test_a_vector_is_for_tokens_that_there_are(when: Any) -> None:
    with pytest.raises(VectorError, match=r"^joy: when: expected one of all, prompt, response, got "):
        make_vector("joy", meta={"when": when})


@given(vectors(limit=2.0**40), vectors(limit=2.0**40), vectors(limit=2.0**40))
def test_of_a_purified_vector_the_others_are_gone(a: Vector, b: Vector, c: Vector) -> None:
    pure = purified(a, [b, c])
    assert pure.layers == a.layers
    for layer, row in a.directions.items():
        left = pure.directions[layer].astype(np.float64)
        size = float(np.abs(row.astype(np.float64)).max())
        for other in (b, c):
            if layer in other.layers:
                q = other.directions[layer].astype(np.float64)
                q /= np.abs(q).max() or 1.0
                # What is left is rounded to float32, whose smallest number may be as large as the row.
                rounding = float(np.finfo(np.float32).smallest_subnormal) * np.abs(q).sum()
                assert abs(left @ q) <= 2e-5 * size * np.linalg.norm(q) + rounding
        if layer not in {*b.layers, *c.layers}:
            assert same_bits(pure.directions[layer], row)


def test_what_is_orthogonal_to_the_others_stays() -> None:
    east = Vector.from_directions("east", {1: [2, 0, 0], 2: [1, 1, 0]})
    north = Vector.from_directions("north", {1: [0, 3, 0], 3: [1, 0, 0]})
    pure = purified(east, [north])
    assert pure.rows.tolist() == [[2, 0, 0], [1, 1, 0]]
    assert pure.name == "purify(east, north)"
    assert purified(Vector.from_directions("v", {1: [2, 5, 1]}), [east, north]).rows.tolist() == [[0, 0, 1]]


def test_a_subspace_can_be_purified_and_purify() -> None:
    plane = Vector("plane", (1,), np.array([[[1.0, 0, 0], [1, 1, 0]]]))
    up = Vector.from_directions("up", {1: [0, 1, 1]})
    np.testing.assert_allclose(purified(up, [plane]).rows, [[0, 0, 1]], atol=1e-15)
    assert purified(plane, [up]).rank == 2
    np.testing.assert_allclose(purified(plane, [up]).rows[0] @ [0, 1, 1], 0, atol=1e-7)


def test_rounding_is_no_direction() -> None:
    a, b = make_vector("a"), make_vector("b", seed=1)
    for left in (purified(a, [a]), purified(a + b, [a, b]), purified(a * 3, [b, a * 1e-9])):
        assert not left.rows.any()


def test_stacked_vectors_span_together_what_each_does() -> None:
    a, b, s = centred("a", 1), centred("b", 2, (2, 3)), centred("s", 3, (1,), rank=2)
    whole = stacked([a, b, s])
    assert (whole.name, whole.layers, whole.rank) == ("a, b, s", (1, 2, 3), 4)
    assert same_bits(whole.spans[0], np.concatenate([a.spans[0], np.zeros((1, 5), np.float32), s.spans[0]]))
    assert same_bits(whole.spans[1, :2], np.stack([a.rows[1], b.rows[0]]))
    assert whole.center[0].tolist() == [a.center[0, 0], 0, *s.center[0].tolist()]
    assert stacked([a]) is a


def test_stacked_apart_each_keeps_its_own_readout() -> None:
    a, b, s = centred("a", 1), centred("b", 2, (2, 3), size=1000), centred("s", 3, (1,), rank=2)
    whole = stacked([a, b, s], apart=True)
    np.testing.assert_allclose(
        whole.readouts[0], np.concatenate([a.readouts[0], 0 * b.readouts[0], s.readouts[0]]), atol=1e-6
    )
    np.testing.assert_allclose(whole.readouts[1, 1], b.readouts[0, 0], rtol=1e-4, atol=1e-9)
    assert not whole.spans[2, 0].any()


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (lambda a, s, m: a + s, "joy and s: subspaces don't add up"),
        (lambda a, s, m: s - a, "s and -joy: subspaces don't add up"),
        (lambda a, s, m: a.dot(s), "joy and s: subspaces have no inner product"),
        (lambda a, s, m: s.cosine(s), "s and s: subspaces have no inner product"),
        (lambda a, s, m: a + m, "joy and m are of different sites: residual, mlp"),
        (lambda a, s, m: m.dot(a), "m and joy are of different sites: mlp, residual"),
        (lambda a, s, m: purified(a, [m]), "joy and m are of different sites: residual, mlp"),
        (lambda a, s, m: stacked([m, s]), "m and s are of different sites: mlp, residual"),
    ],
)
def test_what_does_not_belong_together_is_refused(operation: Callable[..., Any], message: str) -> None:
    a, s, m = make_vector(), make_vector("s", rank=2), make_vector("m", site="mlp")
    with pytest.raises(VectorError) as caught:
        operation(a, s, m)
    assert str(caught.value) == message


def test_the_same_model_with_another_width_is_another_place() -> None:
    a, b = (make_vector(name, n_embd=n, site="neurons") for name, n in (("a", 12), ("b", 16)))
    for operation in (lambda: a + b, lambda: a.dot(b), lambda: purified(a, [b]), lambda: stacked([a, b])):
        with pytest.raises(ModelMismatch, match=r"a and b are for different models: width 12 and 16\.$"):
            operation()


def test_results_stay_at_their_site() -> None:
    a = make_vector("a", site="mlp", rank=2)
    assert (a * 2).site == (-a).site == purified(a, [a]).site == "mlp"
    assert same_bits((a * 2).rows, a.rows * 2)
    b = make_vector("b", site="heads", n_embd=12)
    assert (b + b).site == stacked([b, b]).site == "heads"


# Immutability and identity.


def test_no_array_of_a_vector_can_be_written() -> None:
    vector = make_vector()
    for array in (vector.rows, vector.directions[1], vector.layer_ids, vector.basis, vector.readouts):
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
    flat = make_vector(n_embd=10, fingerprint=None)
    folded = Vector("x", flat.layers, flat.rows.reshape(2, 2, 5))
    elsewhere = [Vector("x", flat.layers, flat.rows, site=site) for site in SITES]
    assert len({folded.digest, *(other.digest for other in elsewhere)}) == 1 + len(SITES)
    golden = Vector.from_directions("x", {1: [1.0, -2.0], 3: [0.5, 0.25]})
    assert golden.digest == "885a537907563dc8dc30b1cf3264d6c9ac3eb101d43833df36c064c513a722d3"


def test_a_vector_says_what_it_is() -> None:
    assert repr(make_vector(layers=(1, 2, 5))) == "<Vector joy: 3 layers (1-5) x 5>"
    assert repr(make_vector(layers=(4,))) == "<Vector joy: 1 layers (4) x 5>"
    assert repr(make_vector(rank=3, site="mlp")) == "<Vector joy: 2 layers (1-2) x 3 x 5 of mlp>"
