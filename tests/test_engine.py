from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
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
from mien.errors import MienError, RecipeError, RuntimeNotSupported, SteeringNotApplied
from mien.program import Dose
from mien.vector import Floats, Vector

doses = st.lists(st.tuples(st.floats(-1e3, 1e3), vectors()), max_size=4)
rows = arrays(np.float32, st.tuples(st.integers(0, 5), st.just(N_EMBD)), elements=floats())


def both(
    added: Sequence[tuple[float, Vector]], kept: Sequence[tuple[float, Vector]], n_layer: int = N_LAYER
) -> CompiledProgram:
    terms = [Dose(c, vector) for c, vector in added]
    return CompiledProgram(n_layer, terms + [Dose(c, vector, "add_keep_norm") for c, vector in kept])


def compiled(*terms: tuple[float, Vector]) -> CompiledProgram:
    return both(terms, [])


def norm_kept(*terms: tuple[float, Vector]) -> CompiledProgram:
    return both([], terms)


def one(*values: float, layer: int = 1) -> Vector:
    return Vector("v", (layer,), np.array([values], dtype=np.float32))


def row(*values: float) -> Floats:
    return np.array([values], dtype=np.float32)


def squared_shift(before: Floats, after: Floats) -> float:
    shift = after.astype(np.float64) - before
    return float((shift * shift).sum())


def changed(before: Floats, after: Floats) -> int:
    """How many rows are not what they were; the sign of a zero counts for nothing."""
    return int((before != after).any(axis=1).sum())


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
        moved, count = program.apply(layer, after)
        expected = before if direction is None else reference.add(before, direction)
        assert same_bits(after, expected)
        assert count == changed(before, after)
        assert moved == pytest.approx(squared_shift(before, expected), rel=4e-6)


# Rows as they come and the rare ones: nothing in them, the largest of floats, denormals only.
extreme_rows = st.one_of(
    rows,
    arrays(np.float32, (2, N_EMBD), elements=st.sampled_from([0.0, -0.0, 1e30, -1e30, 3e37, 1.0])),
    arrays(np.float32, (2, N_EMBD), elements=floats(2.0**-130)),
    arrays(np.float32, (2, N_EMBD), elements=floats(2.0**124)),
)
extreme_doses = st.one_of(
    doses,
    st.lists(st.tuples(st.floats(-2, 2), vectors(limit=2.0**-130)), max_size=3),
    st.lists(st.tuples(st.just(1.0), vectors(limit=2.0**124)), max_size=2),
)


@given(extreme_doses, extreme_rows)
def test_a_norm_kept_sum_is_the_reference_to_the_last_bit(
    terms: list[tuple[float, Vector]], before: Floats
) -> None:
    """To the last but one in truth: norms are summed up in another order."""
    program = norm_kept(*terms)
    directions = [reference.combine(terms, layer) for layer in range(N_LAYER)]
    assert program.layers == [layer for layer, direction in enumerate(directions) if direction is not None]
    for layer, direction in enumerate(directions):
        after = before.copy()
        moved, _ = program.apply(layer, after)
        if direction is None:
            assert same_bits(after, before)
        else:
            np.testing.assert_array_max_ulp(after, reference.add_keep_norm(before, direction), maxulp=1)
        assert np.isfinite(after).all()
        assert moved == pytest.approx(squared_shift(before, after), rel=4e-6)


@given(doses, rows)
def test_a_norm_kept_sum_keeps_every_norm(terms: list[tuple[float, Vector]], before: Floats) -> None:
    program = norm_kept(*terms)
    for layer in program.layers:
        after = before.copy()
        program.apply(layer, after)
        added = reference.add(before, reference.combine(terms, layer))
        norms = np.linalg.norm(before.astype(np.float64), axis=1)
        left = added.any(axis=1)  # of a row that the vector takes to nothing, nothing is left
        # a denormal result is off by more than a float's precision
        np.testing.assert_allclose(
            np.linalg.norm(after.astype(np.float64), axis=1), np.where(left, norms, 0), rtol=1e-6, atol=1e-44
        )


@given(doses, doses, rows)
def test_at_one_layer_what_is_added_comes_before_what_keeps_the_norm(
    added: list[tuple[float, Vector]], kept: list[tuple[float, Vector]], before: Floats
) -> None:
    program = both(added, kept)
    for layer in range(N_LAYER):
        by_hand, after = before.copy(), before.copy()
        compiled(*added).apply(layer, by_hand)
        norm_kept(*kept).apply(layer, by_hand)
        moved, _ = program.apply(layer, after)
        assert same_bits(after, by_hand)
        assert moved == pytest.approx(squared_shift(before, after), rel=4e-6)
    assert program.layers == sorted({*compiled(*added).layers, *norm_kept(*kept).layers})


@given(doses, doses)
def test_a_direction_is_what_the_reference_adds_up(
    added: list[tuple[float, Vector]], kept: list[tuple[float, Vector]]
) -> None:
    program = both(added, kept)
    for layer in range(N_LAYER):
        for terms, operation in ((added, "add"), (kept, "add_keep_norm")):
            direction, expected = program.direction(layer, operation), reference.combine(terms, layer)
            assert (direction is None) == (expected is None)
            assert expected is None or same_bits(direction, expected)


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
    program = both(terms, [], n_layer=3)
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
    moved, _ = compiled((1, one(*[tiny] * N_EMBD))).apply(1, out)
    assert moved == pytest.approx(N_EMBD * tiny**2, rel=4e-6)
    assert same_bits(out, np.full((1, N_EMBD), tiny, dtype=np.float32))


def test_a_shift_that_rounding_absorbs_is_reported_as_none() -> None:
    out = np.full((2, N_EMBD), 1e30, dtype=np.float32)
    assert compiled((1, one(*[1.0] * N_EMBD))).apply(1, out) == (0.0, 0)


def test_the_length_that_is_kept_is_that_after_what_was_added() -> None:
    east, north = one(4, 0, 0, 0, 0), one(0, 4, 0, 0, 0)
    for added, kept, length in ((east, north, 5), (north, east, 7)):
        after = row(0, 3, 0, 0, 0)
        both([(1, added)], [(1, kept)]).apply(1, after)
        np.testing.assert_allclose(after, row(4, 7, 0, 0, 0) * length / math.sqrt(65), rtol=1e-6)


@pytest.mark.parametrize(
    ("h", "v", "expected"),
    [
        (row(3, 0, 0, 0, 0), one(0, 4, 0, 0, 0), row(1.8, 2.4, 0, 0, 0)),
        (row(0, 0, 0, 0, 0), one(1, -2, 3, 0, 0), row(0, 0, 0, 0, 0)),  # it has no length to keep
        (row(1, -2, 3, 0, 0), one(-1, 2, -3, 0, 0), row(0, 0, 0, 0, 0)),  # it has no direction left
        (row(1, 0, 0, 0, 0), one(-3, 0, 0, 0, 0), row(-1, 0, 0, 0, 0)),
        (row(1e30, 0, 0, 0, 0), one(0, 1e30, 0, 0, 0), row(*[1e30 / math.sqrt(2)] * 2, 0, 0, 0)),
        (row(3e38, 0, 0, 0, 0), one(0, 3e38, 0, 0, 0), row(*[3e38 / math.sqrt(2)] * 2, 0, 0, 0)),
        (row(1e-40, 0, 0, 0, 0), one(0, 1e-40, 0, 0, 0), row(*[1e-40 / math.sqrt(2)] * 2, 0, 0, 0)),
        (row(1e-45, 0, 0, 0, 0), one(0, 1e30, 0, 0, 0), row(0, 1e-45, 0, 0, 0)),
        (row(1e30, 0, 0, 0, 0), one(-1e30, 1e-45, 0, 0, 0), row(0, 1e30, 0, 0, 0)),
        (row(1e30, 0, 0, 0, 0), one(1, 0, 0, 0, 0), row(1e30, 0, 0, 0, 0)),
    ],
)
def test_a_row_whose_norm_is_kept_becomes_this(h: Floats, v: Vector, expected: Floats) -> None:
    for n_rows in (1, 3):
        before = np.repeat(h, n_rows, axis=0)
        after = before.copy()
        moved, count = norm_kept((1, v)).apply(1, after)
        assert count == changed(before, after)
        np.testing.assert_array_max_ulp(after, np.repeat(expected, n_rows, axis=0), maxulp=1)
        np.testing.assert_array_max_ulp(after, reference.add_keep_norm(before, v.rows[0]), maxulp=1)
        assert moved == pytest.approx(squared_shift(before, after), rel=4e-6)


def test_each_row_keeps_a_norm_of_its_own() -> None:
    before = np.array([[3, 0, 0, 0, 0], [0] * 5, [0, 300, 0, 0, 0], [0, 0, 1e-3, 0, 0]], dtype=np.float32)
    after = before.copy()
    norm_kept((1, one(1, 1, 1, 1, 1))).apply(1, after)
    np.testing.assert_allclose(np.linalg.norm(after, axis=1), [3, 0, 300, 1e-3], rtol=1e-6)
    alone = before[2:3].copy()
    norm_kept((1, one(1, 1, 1, 1, 1))).apply(1, alone)
    assert same_bits(after[2:3], alone)


def test_where_rounding_absorbs_the_vector_a_kept_norm_changes_no_bit() -> None:
    before = np.full((2, N_EMBD), 1e30, dtype=np.float32)
    after = before.copy()
    assert norm_kept((1, one(*[1.0] * N_EMBD))).apply(1, after) == (0.0, 0)
    assert same_bits(after, before)


def test_a_direction_of_nothing_is_none() -> None:
    v = one(1, 2, 3, 4, 5)
    program = both([(1, v)], [(1, v), (-1, v)])
    assert program.layers == [1]
    assert program.direction(1, "add_keep_norm") is None
    for layer in (0, 2, -1, N_LAYER, 2**31 - 1, -(2**31)):
        assert program.direction(layer, "add") is None
    assert program.direction(1, "add").shape == (N_EMBD,)
    assert program.direction(1, "ablate") is None
    assert program.direction(1, "add", "mlp") is None
    with pytest.raises(KeyError):
        program.direction(1, "boost")
    with pytest.raises(KeyError):
        program.direction(1, "add", "queries")


def test_a_direction_is_a_copy_that_outlives_the_program() -> None:
    program = compiled((2, one(1, 2, 3, 4, 5)))
    direction = program.direction(1, "add")
    direction[:] = 7
    assert same_bits(program.direction(1, "add"), row(2, 4, 6, 8, 10)[0])
    kept = program.direction(1, "add")
    del program
    gc.collect()
    assert same_bits(kept, row(2, 4, 6, 8, 10)[0])


@given(doses, doses, rows, st.integers(0, 3))
def test_memory_of_somebody_elses_is_steered_as_rows_are(
    added: list[tuple[float, Vector]], kept: list[tuple[float, Vector]], before: Floats, skipped: int
) -> None:
    program = both(added, kept)
    first = min(skipped, len(before))
    for layer in (-1, *range(N_LAYER)):
        expected, found = before.copy(), before.copy()
        moved, count = program.apply(layer, expected[first:])
        address = found.ctypes.data + first * 4 * N_EMBD
        assert engine.apply_at(program.handle, layer, address, len(before) - first) == moved
        assert same_bits(found, expected)
        found = before.copy()
        address = found.ctypes.data + first * 4 * N_EMBD
        done = engine.apply_tokens_at(program, "residual", layer, address, len(before) - first, 0)
        assert done == (moved, count)
        assert same_bits(found, expected)
        assert engine.apply_tokens_at(program, "mlp", layer, address, len(before) - first, 0) == (0.0, 0)


def test_nothing_is_done_at_a_layer_without_a_direction() -> None:
    program = compiled((1, make_vector(layers=(1, 3))))
    out = np.zeros((2, N_EMBD), dtype=np.float32)
    for layer in (0, 2, 4, 5, -1, N_LAYER, 2**31 - 1, -(2**31)):
        assert program.apply(layer, out) == (0.0, 0)
    assert not out.any()


def test_a_program_keeps_nothing_of_its_vectors() -> None:
    rows = make_vector(layers=(1,)).rows.copy()
    ids = np.array([1], dtype=np.int32)
    vector = SimpleNamespace(
        layer_ids=ids, layers=(1,), rows=rows, site="residual", width=N_EMBD, rank=1, kept={}
    )
    direction = vector.rows.copy()
    program = CompiledProgram(N_LAYER, [Dose(1.0, vector)])  # type: ignore[arg-type]
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
@pytest.mark.parametrize("compile_terms", [compiled, norm_kept])
def test_a_sum_that_is_not_finite_is_a_vector_error(
    compile_terms: Callable[..., CompiledProgram], terms: list[tuple[float, Vector]]
) -> None:
    with pytest.raises(RecipeError, match=r"add up to NaN or infinity; use smaller coefficients$"):
        compile_terms(*terms)


def test_large_terms_may_cancel() -> None:
    large = one(*[3e38] * N_EMBD)
    assert compiled((2.0, large), (-1.0, large)).layers == [1]
    assert norm_kept((2.0, large), (-1.0, large)).layers == [1]
    with pytest.raises(RecipeError, match="add up to NaN or infinity"):  # two sums, each on its own
        both([(2.0, large)], [(-1.0, large)])


SIZES = "sizes must be positive, the same at one place, and those of the hook"
LAYERS = "a layer that the model does not have, or layers that do not ascend"


@pytest.mark.parametrize(
    ("n_layer", "terms", "message"),
    [
        (0, [], SIZES),
        (-1, [], SIZES),
        (2, [(1, make_vector())], LAYERS),
        (N_LAYER, [(1, make_vector()), (1, one(1, 2))], SIZES),
        (N_LAYER, [(1, one(1, 2, layer=1)), (1, one(1, 2, 3, layer=1))], SIZES),
    ],
)
def test_terms_that_do_not_fit_are_refused(n_layer: int, terms: list[Any], message: str) -> None:
    for added, kept in ((terms, []), ([], terms)):
        with pytest.raises(ValueError, match=f"^{message}$"):
            both(added, kept, n_layer)


def test_the_same_width_is_only_needed_at_one_place() -> None:
    program = both([(1, one(1, 2, layer=1)), (1, one(1, 2, 3, layer=2))], [])
    assert [program.width("residual", layer) for layer in range(4)] == [0, 2, 3, 0]


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
        ("MIEN_ERR_NOT_FINITE", RecipeError),
        ("MIEN_ERR_SYMBOL", RuntimeNotSupported),
        ("MIEN_ERR_TENSOR", SteeringNotApplied),
        ("MIEN_ERR_NOT_MET", SteeringNotApplied),
        ("MIEN_ERR_NOT_APPLIED", SteeringNotApplied),
        ("MIEN_ERR_GATE", RecipeError),
        ("MIEN_ERR_ROWS", SteeringNotApplied),
    ],
)
def test_a_status_means_this_exception(name: str, kind: type[Exception]) -> None:
    with pytest.raises(kind) as caught:
        engine.check(statuses()[name])
    assert type(caught.value) is kind


def test_every_status_has_a_row_above() -> None:
    table = next(mark for mark in test_a_status_means_this_exception.pytestmark)  # type: ignore[attr-defined]
    assert {name for name, _ in table.args[1]} == set(statuses())


def test_a_library_without_the_functions_is_refused() -> None:
    names = engine.symbols()
    assert "ggml_get_name" in names
    assert len(names) == len(set(names))
    with pytest.raises(RuntimeNotSupported, match="lacks functions that mien needs; update llama-cpp-python"):
        engine.Hook([0] * len(names), N_LAYER, N_EMBD)
