from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from makers import N_EMBD, N_LAYER, floats, make_vector, same_bits, vectors
from mien import engine, reference
from mien.engine import CompiledProgram
from mien.errors import MienError, RuntimeNotSupported, SteeringNotApplied, VectorError
from mien.vector import Floats, Vector

doses = st.lists(st.tuples(st.floats(-1e3, 1e3), vectors()), max_size=4)
rows = arrays(np.float32, st.tuples(st.integers(0, 5), st.just(N_EMBD)), elements=floats())


def compiled(*terms: tuple[float, Vector]) -> CompiledProgram:
    return CompiledProgram(N_LAYER, N_EMBD, terms)


def one(*values: float, layer: int = 1) -> Vector:
    return Vector("v", (layer,), np.array([values], dtype=np.float32))


def statuses() -> dict[str, int]:
    """{name: number} of every error that the C headers declare."""
    return {name: getattr(engine.lib, name) for name in dir(engine.lib) if name.startswith("MIEN_ERR_")}


# Against the reference.


@given(doses, rows)
def test_a_program_is_the_reference_bit_for_bit(terms: list[tuple[float, Vector]], before: Floats) -> None:
    program = compiled(*terms)
    directions = [reference.combine(terms, layer) for layer in range(N_LAYER)]
    assert program.layers == [layer for layer, direction in enumerate(directions) if direction is not None]
    for layer, direction in enumerate(directions):
        after = before.copy()
        moved = program.apply(layer, after)
        expected = before if direction is None else reference.add(before, direction)
        assert same_bits(after, expected)
        shift = expected.astype(np.float64) - before
        assert moved == pytest.approx(float((shift * shift).sum()), rel=1e-12)


@given(
    st.integers(1, 200),
    st.lists(st.floats(-10, 10), min_size=1, max_size=6),
    st.integers(0, 2**32 - 1),
    st.integers(0, 4),
)
def test_no_width_count_or_order_of_terms_changes_a_bit(
    n_embd: int, coefficients: list[float], seed: int, n_rows: int
) -> None:
    terms = [
        (c, make_vector(layers=(1, 2), seed=seed + i, fingerprint=None, n_embd=n_embd))
        for i, c in enumerate(coefficients)
    ]
    program = CompiledProgram(3, n_embd, terms)
    before = np.random.default_rng(seed).standard_normal((n_rows, n_embd)).astype(np.float32)
    for layer in (1, 2):
        after = before.copy()
        program.apply(layer, after)
        direction = reference.combine(terms, layer)
        assert same_bits(after, before if direction is None else reference.add(before, direction))


def test_terms_add_up_in_their_order() -> None:
    # In float64, (1e16 + 1) - 1e16 loses the 1 that (1e16 - 1e16) + 1 keeps.
    big, small = one(*[1e16] * N_EMBD), one(*[1.0] * N_EMBD)
    assert compiled((1, big), (1, small), (-1, big)).layers == []
    assert compiled((1, big), (-1, big), (1, small)).layers == [1]


def test_the_sum_is_rounded_once() -> None:
    half_ulp = one(*[2.0**-24] * N_EMBD)
    out = np.zeros((1, N_EMBD), dtype=np.float32)
    compiled((1, one(*[1.0] * N_EMBD)), (1, half_ulp), (1, half_ulp)).apply(1, out)
    assert out[0, 0] == np.float32(1 + 2**-23)


def test_denormals_are_kept() -> None:
    tiny = float(np.finfo(np.float32).smallest_subnormal)
    out = np.zeros((1, N_EMBD), dtype=np.float32)
    assert compiled((1, one(*[tiny] * N_EMBD))).apply(1, out) == pytest.approx(N_EMBD * tiny**2, rel=1e-12)
    assert same_bits(out, np.full((1, N_EMBD), tiny, dtype=np.float32))


def test_a_shift_that_rounding_absorbs_is_reported_as_none() -> None:
    out = np.full((2, N_EMBD), 1e30, dtype=np.float32)
    assert compiled((1, one(*[1.0] * N_EMBD))).apply(1, out) == 0.0


def test_nothing_is_done_at_a_layer_without_a_direction() -> None:
    program = compiled((1, make_vector(layers=(1, 3))))
    out = np.zeros((2, N_EMBD), dtype=np.float32)
    for layer in (0, 2, 4, 5, -1, N_LAYER, 2**31 - 1, -(2**31)):
        assert program.apply(layer, out) == 0.0
    assert not out.any()


def test_a_program_keeps_nothing_of_its_vectors() -> None:
    vector = SimpleNamespace(
        layer_ids=np.array([1], dtype=np.int32), rows=make_vector(layers=(1,)).rows.copy()
    )
    direction = vector.rows.copy()
    program = CompiledProgram(N_LAYER, N_EMBD, [(1.0, vector)])
    vector.rows[:] = np.nan
    vector.layer_ids[:] = 0
    out = np.zeros((1, N_EMBD), dtype=np.float32)
    program.apply(1, out)
    assert same_bits(out, direction)


# Refusals.


@pytest.mark.parametrize(
    "terms",
    [
        [(math.nan, one(*[1.0] * N_EMBD))],
        [(math.inf, one(*[1.0] * N_EMBD))],
        [(-math.inf, one(*[0.0] * N_EMBD))],
        [(2.0, one(*[3e38] * N_EMBD))],
        [(1e308, one(*[3e38] * N_EMBD))],
        [(1.0, one(*[3e38] * N_EMBD)), (1.0, one(*[3e38] * N_EMBD))],
        [(1.0, one(0, 0, 0, 0, 3e38)), (1.0, one(0, 0, 0, 0, 3e38))],
    ],
)
def test_a_sum_that_is_not_finite_is_a_vector_error(terms: list[tuple[float, Vector]]) -> None:
    with pytest.raises(VectorError, match=r"add up to NaN or infinity; use smaller coefficients$"):
        compiled(*terms)


def test_large_terms_may_cancel() -> None:
    large = one(*[3e38] * N_EMBD)
    assert compiled((2.0, large), (-1.0, large)).layers == [1]


@pytest.mark.parametrize(
    ("n_layer", "n_embd", "terms", "message"),
    [
        (0, N_EMBD, [], "n_layer and n_embd must be positive, and a program's those of its hook"),
        (N_LAYER, 0, [], "n_layer and n_embd must be positive, and a program's those of its hook"),
        (-1, N_EMBD, [], "n_layer and n_embd must be positive, and a program's those of its hook"),
        (
            2,
            N_EMBD,
            [(1, make_vector())],
            "a layer that the model does not have, or layers that do not ascend",
        ),
        (N_LAYER, 4, [(1, make_vector())], "expected rows of 4, got 5"),
        (N_LAYER, N_EMBD, [(1, make_vector()), (1, one(1, 2))], "expected rows of 5, got 2"),
    ],
)
def test_terms_that_do_not_fit_are_refused(n_layer: int, n_embd: int, terms: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        CompiledProgram(n_layer, n_embd, terms)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, N_EMBD)), r"expected float32 rows of 5, got float64 \(2, 5\)"),
        (np.zeros((2, N_EMBD), dtype=np.float16), r"expected float32 rows of 5, got float16 \(2, 5\)"),
        (np.zeros((2, N_EMBD), dtype=np.int32), r"expected float32 rows of 5, got int32 \(2, 5\)"),
        (np.zeros((2, N_EMBD), dtype=">f4"), r"expected float32 rows of 5, got >f4 \(2, 5\)"),
        (np.zeros((2, N_EMBD + 1), dtype=np.float32), r"expected float32 rows of 5, got float32 \(2, 6\)"),
        (np.zeros(N_EMBD, dtype=np.float32), r"expected float32 rows of 5, got float32 \(5,\)"),
        (np.zeros((1, 2, N_EMBD), dtype=np.float32), r"expected float32 rows of 5, got float32 \(1, 2, 5\)"),
        (np.zeros((N_EMBD, 2), dtype=np.float32).T, "contiguous"),
        (np.zeros((2, 2 * N_EMBD), dtype=np.float32)[:, ::2], "contiguous"),
        (make_vector().rows, "read-only|not writable|writable"),
    ],
)
def test_rows_that_c_can_not_steer_in_place_are_refused(array: Any, message: str) -> None:
    before = array.copy()
    with pytest.raises((ValueError, BufferError), match=message):
        compiled((1, make_vector())).apply(1, array)
    np.testing.assert_array_equal(array, before)


# Statuses.


def test_every_status_has_an_exception_of_its_own() -> None:
    numbers = statuses()
    assert len(numbers) == len(set(numbers.values()))
    assert set(numbers.values()) == set(engine._ERRORS)
    engine.check(engine.lib.MIEN_OK)
    messages = set()
    for number in numbers.values():
        raised = []
        for _ in range(2):
            with pytest.raises((MienError, MemoryError, ValueError)) as caught:
                engine.check(number)
            raised.append(caught.value)
        # Two of them: an exception that is raised again would carry the first one's traceback.
        assert raised[0] is not raised[1]
        assert str(raised[0]) == str(raised[1]) != ""
        messages.add(str(raised[0]))
    assert len(messages) == len(numbers)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("MIEN_ERR_MEMORY", MemoryError),
        ("MIEN_ERR_SHAPE", ValueError),
        ("MIEN_ERR_LAYER", ValueError),
        ("MIEN_ERR_SITE", ValueError),
        ("MIEN_ERR_OP", ValueError),
        ("MIEN_ERR_NOT_FINITE", VectorError),
        ("MIEN_ERR_SYMBOL", RuntimeNotSupported),
        ("MIEN_ERR_TENSOR", SteeringNotApplied),
        ("MIEN_ERR_NOT_MET", SteeringNotApplied),
        ("MIEN_ERR_NOT_APPLIED", SteeringNotApplied),
    ],
)
def test_a_status_means_this_exception(name: str, kind: type[Exception]) -> None:
    with pytest.raises(kind) as caught:
        engine.check(statuses()[name])
    assert type(caught.value) is kind


def test_a_library_without_the_functions_is_refused() -> None:
    names = engine.symbols()
    assert "ggml_get_name" in names
    assert len(names) == len(set(names))
    with pytest.raises(RuntimeNotSupported, match="lacks functions that mien needs; update llama-cpp-python"):
        engine.Hook([0] * len(names), N_LAYER, N_EMBD)
