"""Every operator at every site, with windows and gates: the engine against the reference in NumPy.

Where they may differ. Adding, scaling and experts: not by a bit. A sum of products is good to a few parts in
a million of sum |x_i v_i| (mien_kernels.h), and with |v| = 1 that is at most the length of the row: what is
projected, edited or read may be off by that share of the lengths in play, SLACK.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from makers import floats, same_bits
from mien import reference
from mien.engine import CompiledProgram, Memory, Probe, Tokens
from mien.errors import VectorError
from mien.program import ALWAYS, OPERATIONS, Dose, OpenWhen, Window
from mien.vector import SITES, Floats, Vector

SLACK = 4e-6
N_LAYER, LAYER, WIDTH = 4, 2, 6
EXACT = ("add", "scale", "forbid", "force")
PLACES = [
    (op, site) for op in OPERATIONS for site in SITES if (op in ("forbid", "force")) == (site == "experts")
]
PLACES += [("add", "experts"), ("scale", "experts")]
each_place = settings(max_examples=30)


def vector(rows: Any, site: str = "residual", name: str = "v", **meta: Any) -> Vector:
    """At LAYER alone. rows: (width,), or (rank, width)."""
    return Vector(name, (LAYER,), np.asarray(rows, dtype=np.float32)[None], meta=meta, site=site)


def engine(
    doses: Sequence[Dose],
    rows: Floats,
    replies: Sequence[int] | None = None,
    memory: Memory | None = None,
    program: CompiledProgram | None = None,
) -> Floats:
    """What the engine makes of `rows` at LAYER."""
    program = program or CompiledProgram(N_LAYER, doses)
    out = rows.copy()
    tokens = None if replies is None else Tokens(replies, memory)
    program.apply(LAYER, out, doses[0].vector.site, tokens)
    return out


def lengths(rows: Any) -> Any:
    return np.linalg.norm(np.asarray(rows, dtype=np.float64), axis=-1)


def assert_alike(found: Floats, expected: Floats, size: Any) -> None:
    """Alike to SLACK of `size`, a number for each row; and to a float's own precision."""
    error = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    allowed = SLACK * np.asarray(size, dtype=np.float64)[:, None] + 1.2e-7 * np.abs(expected) + 1e-44
    assert (error <= allowed).all(), float((error / allowed).max())


# Floats of a row: as they come, and the rare ones. What a product of two of them adds up to fits in float32.
huge = st.sampled_from([0.0, -0.0, 1e30, -1e30, 3e30, 1.0])
tiny = floats(2.0**-130)
some_rows = st.one_of(
    arrays(np.float32, st.tuples(st.integers(0, 5), st.just(WIDTH)), elements=floats(2.0**60)),
    arrays(np.float32, (1, WIDTH), elements=huge),
    arrays(np.float32, (2, WIDTH), elements=tiny),
    st.just(np.zeros((3, WIDTH), dtype=np.float32)),
)
# A direction: zero, or long enough to be divided by.
some_directions = st.one_of(
    arrays(np.float32, WIDTH, elements=st.floats(-1024, 1024, width=32)).filter(lambda v: lengths(v) > 1e-3),
    st.just(np.zeros(WIDTH, dtype=np.float32)),
    arrays(np.float32, WIDTH, elements=st.sampled_from([0.0, 1e6, -1e6])),
)


def made(operation: str, direction: Floats, coefficient: float, site: str, **how: Any) -> Dose:
    """A dose of any operation, with what it needs."""
    meta = {"bias": [0.25]} if operation == "edit" else {"center": [0.5]} if operation == "clamp" else {}
    values = {"clamp": (1.5,), "edit": (2.0,)}.get(operation, ())
    if operation in ("ablate", "clamp", "edit"):
        coefficient = abs(coefficient) / 4
    if operation in ("forbid", "force"):
        direction = (direction > 0).astype(np.float32)
        coefficient = 1.0
    return Dose(coefficient, vector(direction, site, **meta), operation, values, **how)


@pytest.mark.parametrize(("operation", "site"), PLACES)
@each_place
@given(before=some_rows, direction=some_directions, coefficient=st.sampled_from([1.0, -1.0, 0.5, 4.0, -3.7]))
def test_an_operator_is_its_formula(
    operation: str, site: str, before: Floats, direction: Floats, coefficient: float
) -> None:
    dose = made(operation, direction, coefficient, site)
    found = engine([dose], before)
    expected = reference.apply([dose], site, LAYER, before)
    if not dose.vector.rows.any():
        assert same_bits(found, before)
    elif operation == "add" and site != "residual":  # x + 0 has another sign of zero than x
        np.testing.assert_array_equal(found, expected)
    elif operation in EXACT:
        assert same_bits(found, expected)
    elif operation == "add_keep_norm":
        np.testing.assert_array_max_ulp(found, expected, maxulp=1)
    else:
        put = reference.target(dose, 0) if operation != "edit" else expected.astype(np.float64) - before
        assert_alike(found, expected, lengths(before) + lengths(put))


@pytest.mark.parametrize("operation", ["ablate", "clamp"])
@given(
    before=some_rows,
    seed=st.integers(0, 2**32 - 1),
    rank=st.integers(2, WIDTH + 2),
    strength=st.sampled_from([1.0, 0.3]),
)
def test_a_subspace_is_its_formula(
    operation: str, before: Floats, seed: int, rank: int, strength: float
) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((rank, WIDTH)) * 10.0 ** rng.integers(-2, 3, (rank, 1))
    rows[rng.integers(rank)] = rows[0] * rng.integers(0, 2)  # a zero row, or one twice
    center = rng.standard_normal(rank).tolist()
    values = tuple(rng.standard_normal(rank).tolist()) if operation == "clamp" else ()
    dose = Dose(strength, vector(rows, center=center), operation, values)
    found, expected = engine([dose], before), reference.apply([dose], "residual", LAYER, before)
    put = lengths(rows) @ (np.abs(center) + np.abs(values or 0.0))
    assert_alike(found, expected, rank * lengths(before) + put)
    if operation == "ablate" and strength == 1:
        left = lengths(found.astype(np.float64) @ dose.vector.basis[0].T.astype(np.float64))
        assert (left <= rank * SLACK * lengths(before) + 1e-44).all()


@pytest.mark.parametrize(("operation", "site"), PLACES)
@pytest.mark.parametrize("width", [1, 2, 7, 8, 31, 32, 33, 64, 100, 1025, 2600])
def test_no_width_is_special(operation: str, site: str, width: int) -> None:
    rng = np.random.default_rng(width)
    for density in (0.05, 1.0):  # the former is sparse
        direction = rng.standard_normal(width).astype(np.float32)
        direction[rng.random(width) > density] = 0
        direction[rng.integers(width)] = 1
        before = rng.standard_normal((7, width)).astype(np.float32)
        dose = made(operation, direction, 1.3, site)
        found, expected = engine([dose], before), reference.apply([dose], site, LAYER, before)
        if operation in EXACT:
            assert same_bits(found, expected)
        else:
            assert_alike(found, expected, lengths(before) + lengths(expected))
        for i in range(len(before)):  # row by row it is the same
            assert same_bits(engine([dose], before[i : i + 1]), found[i : i + 1])


# Several at one place.


@given(
    operations=st.sets(st.sampled_from(OPERATIONS[:6]), min_size=2),
    site=st.sampled_from(SITES[:5]),
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 4),
    twice=st.booleans(),
)
def test_operators_at_one_place_act_one_after_another(
    operations: set[str], site: str, seed: int, count: int, twice: bool
) -> None:
    rng = np.random.default_rng(seed)
    doses = [
        made(operation, rng.standard_normal(WIDTH).astype(np.float32), rng.uniform(0.2, 3.9), site)
        for operation in sorted(operations, key=OPERATIONS.index)
        for _ in range(1 + (twice and operation in ("scale", "add", "add_keep_norm")))
    ]
    before = rng.standard_normal((count, WIDTH)).astype(np.float32) * np.float32(10.0 ** rng.integers(-1, 3))
    steps = [reference.apply(doses[:n], site, LAYER, before) for n in range(1, len(doses) + 1)]
    expected = steps[-1]
    sizes = np.array([lengths(rows) for rows in (before, *steps)])
    # A norm that is kept makes what rounding left of a short row as long as the row was.
    assume((sizes[:-1] < 30 * sizes[1:]).all())
    found = engine(doses, before)
    assert_alike(
        found, expected, 200 * sizes.max(axis=0)
    )  # nine of them at most, and 30 of the first's error
    moved, rows = CompiledProgram(N_LAYER, doses).apply(LAYER, before.copy(), site)
    shift = expected.astype(np.float64) - before
    assert moved == pytest.approx(float((shift**2).sum()), rel=1e-3, abs=1e-8 * float((sizes.max()) ** 2))
    assert rows == count


def test_the_order_is_that_of_the_operations() -> None:
    v = np.zeros(WIDTH, dtype=np.float32)
    v[0] = 1.0
    before = np.full((1, WIDTH), 2.0, dtype=np.float32)
    doses = [
        Dose(1.0, vector(v), "ablate"),
        Dose(1.0, vector(v), "clamp", (3.0,)),
        Dose(1.0, vector(v, bias=[-1.0]), "edit", (4.0,)),
        Dose(1.0, vector(v), "scale"),
        Dose(1.0, vector(v), "add"),
    ]
    # 2 -> 0 -> 3 -> 5, where the logit is 4 -> doubled -> one more
    for order in itertools.permutations(range(5), 2):
        pair = [doses[i] for i in sorted(order)]
        assert same_bits(engine(pair, before), reference.apply(pair, "residual", LAYER, before))
    assert engine(doses, before)[0].tolist() == [11.0] + [2.0] * (WIDTH - 1)


def test_what_is_forced_wins_over_what_is_forbidden_elsewhere() -> None:
    logits = np.array([[1, 9, 3, 4, 5, 6], [-1, -2, -3, -4, -5, -6]], dtype=np.float32)
    forbidden, forced = np.eye(WIDTH)[1], np.eye(WIDTH)[2] + np.eye(WIDTH)[4]
    doses = [Dose(1.0, vector(forbidden, "experts"), "forbid"), Dose(1.0, vector(forced, "experts"), "force")]
    found = engine(doses, logits)
    assert same_bits(found, reference.apply(doses, "experts", LAYER, logits))
    assert found[0].tolist() == [
        1,
        -np.inf,
        6 + 2**-10,
        4,
        6 + 2**-10,
        6,
    ]
    assert set(np.argsort(found[1])[-2:]) == {2, 4}
    program = CompiledProgram(N_LAYER, doses)
    assert program.apply(LAYER, logits.copy(), "experts") == (6.0, 2)  # logits that were set


@pytest.mark.parametrize("operation", ["add", "scale"])
@pytest.mark.parametrize("site", ["attention", "mlp", "heads", "neurons", "experts"])
@each_place
@given(
    seed=st.integers(0, 2**32 - 1),
    width=st.sampled_from([4, 5, 40, 333, 5000]),
    filled=st.floats(0, 0.25),
    share=st.sampled_from([1.0, 0.5, 1 / 3]),
)
def test_few_values_are_steered_as_all_are(
    operation: str, site: str, seed: int, width: int, filled: float, share: float
) -> None:
    """At the residual stream nothing is kept sparse."""
    rng = np.random.default_rng(seed)
    direction = np.zeros(width, dtype=np.float32)
    at = rng.choice(width, max(int(width * filled), 1), replace=False)
    direction[at] = rng.standard_normal(len(at)) * 10.0 ** rng.integers(-44, 30, len(at))
    before = (rng.standard_normal((2, width)) * 10.0 ** rng.integers(-44, 7, (2, width))).astype(np.float32)
    before += np.float32(0.0)  # -0.0 + 0.0 is 0.0, in a sum over all alone
    window = ALWAYS if share == 1 else Window(ramp=round(1 / share))
    replies = None if share == 1 else [0, 0]
    sparse = engine([Dose(1.5, vector(direction, site), operation, (), window)], before, replies)
    dense = engine([Dose(1.5, vector(direction), operation, (), window)], before, replies)
    assert same_bits(sparse, dense)


extreme_rows = st.one_of(
    arrays(np.float32, (2, WIDTH), elements=st.sampled_from([0.0, 1e38, -1e38, 3e37, 1.0, -1e-38])),
    arrays(np.float32, (2, WIDTH), elements=st.sampled_from([0.0, 1e-38, -1e-38, 1e-45, -3e-40])),
)


@pytest.mark.parametrize("operation", ["ablate", "clamp", "edit"])
@given(before=extreme_rows, seed=st.integers(0, 2**32 - 1), rank=st.integers(1, 4))
def test_the_largest_and_the_smallest_of_rows_are_projected(
    operation: str, before: Floats, seed: int, rank: int
) -> None:
    rng = np.random.default_rng(seed)
    if operation == "edit":
        dose = Dose(1.0, vector(rng.standard_normal(WIDTH), bias=[0.0]), operation, (1.0,))
    else:
        values = tuple(rng.standard_normal(rank).tolist()) if operation == "clamp" else ()
        dose = Dose(1.0, vector(rng.standard_normal((rank, WIDTH))), operation, values)
    found, expected = engine([dose], before), reference.apply([dose], "residual", LAYER, before)
    assert np.isfinite(found).all()
    put = 0 if operation == "ablate" else lengths(expected)
    assert_alike(found, expected, rank * (lengths(before) + put))


def test_a_row_of_nothing_but_zeros_is_moved_by_what_is_put_there() -> None:
    zero = np.zeros((2, WIDTH), dtype=np.float32)
    v = np.arange(1, WIDTH + 1, dtype=np.float32)
    assert same_bits(engine([Dose(1.0, vector(v), "ablate")], zero), zero)
    clamped = engine([Dose(1.0, vector(v), "clamp", (2.0,))], zero)
    np.testing.assert_allclose(clamped, np.stack([2 * v] * 2), rtol=1e-6)
    edited = engine([Dose(1.0, vector(v, bias=[0.0]), "edit", (2.0,))], zero)
    np.testing.assert_allclose(edited @ v, 2.0, rtol=1e-6)


@given(before=some_rows, direction=some_directions, bias=st.floats(-3, 3), margin=st.floats(-3, 3))
def test_an_edit_leaves_rows_on_the_right_side_alone(
    before: Floats, direction: Floats, bias: float, margin: float
) -> None:
    dose = Dose(1.0, vector(direction, bias=[bias]), "edit", (margin,))
    found = engine([dose], before)
    logits = before.astype(np.float64) @ direction.astype(np.float64) + bias
    slack = SLACK * lengths(before) * lengths(direction)
    right = logits > margin + slack
    assert same_bits(found[right], before[right])
    if direction.any():
        after = found.astype(np.float64) @ direction.astype(np.float64) + bias
        reached = (
            margin
            - SLACK * (lengths(before) + lengths(found)) * lengths(direction)
            - 1e-5 * (abs(margin) + abs(bias))
        )
        assert (after >= reached - 1e-30).all()


# Windows.

WINDOWS = [
    ALWAYS,
    Window(start=3),
    Window(stop=4),
    Window(start=2, stop=3),
    Window(ramp=1),
    Window(ramp=3),
    Window(start=2, ramp=5),
    Window(decay=1),
    Window(start=1, decay=2),
    Window(decay=1e-3),
    Window(start=1, stop=9, ramp=3, decay=4),
    Window(start=(1 << 31) - 2),
]


@pytest.mark.parametrize("window", WINDOWS)
def test_a_window_has_its_share_of_the_dose_at_each_token(window: Window) -> None:
    ones = np.ones(WIDTH, dtype=np.float32)
    replies = [*range(-1, 30), (1 << 31) - 2]
    before = np.zeros((len(replies), WIDTH), dtype=np.float32)
    found = engine([Dose(1.0, vector(ones), "add", (), window)], before, replies)
    shares = np.array([window.at(reply) for reply in replies], dtype=np.float32)
    assert same_bits(found, np.repeat(shares[:, None], WIDTH, axis=1))


def test_shares_are_these() -> None:
    ones, zero = np.ones(WIDTH, dtype=np.float32), np.zeros((7, WIDTH), dtype=np.float32)
    replies = list(range(-1, 6))

    def shares(**window: Any) -> list[float]:
        found: list[float] = engine([Dose(1.0, vector(ones), "add", (), Window(**window))], zero, replies)[
            :, 0
        ].tolist()
        return found

    assert shares(start=2, stop=4) == [0, 0, 0, 1, 1, 0, 0]
    assert shares(ramp=4) == [0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert shares(decay=2)[1::2] == [1, 0.5, 0.25]
    assert shares(start=1, stop=5, ramp=2, decay=1) == [0, 0, 0.5, 0.5, 0.25, 0.125, 0]


@pytest.mark.parametrize(("operation", "site"), PLACES)
@each_place
@given(seed=st.integers(0, 2**32 - 1), window=st.sampled_from(WINDOWS[1:]))
def test_an_operator_in_a_window_is_its_formula(operation: str, site: str, seed: int, window: Window) -> None:
    rng = np.random.default_rng(seed)
    dose = made(operation, rng.standard_normal(WIDTH).astype(np.float32), 1.7, site, window=window)
    replies = sorted(rng.integers(-1, 20, 6).tolist())
    before = rng.standard_normal((6, WIDTH)).astype(np.float32)
    found = engine([dose], before, replies)
    expected = reference.apply([dose], site, LAYER, before, replies)
    if operation in EXACT:
        assert same_bits(found, expected)
    else:
        assert_alike(found, expected, lengths(before) + lengths(expected))
    still = np.array([window.at(reply) == 0 for reply in replies])
    assert same_bits(found[still], before[still])


def test_without_tokens_every_row_is_of_a_prompt() -> None:
    dose = Dose(1.0, vector(np.ones(WIDTH)), "add", (), Window(stop=9))
    before = np.zeros((2, WIDTH), dtype=np.float32)
    program = CompiledProgram(N_LAYER, [dose])
    assert program.apply(LAYER, before) == (0.0, 0)
    assert not before.any()


# Gates. `on` reads the first float of a row as it is, `v` moves the last; so that a gate reads what it did.

ON = np.eye(WIDTH)[0]
MOVE = np.eye(WIDTH)[-1]


def gate(
    above: float = -math.inf, below: float = math.inf, hysteresis: float = 0.0, latch: bool = False
) -> OpenWhen:
    return OpenWhen(vector(ON, name="on"), above, below, hysteresis, latch)


def read_as(*readouts: float) -> Floats:
    rows = np.zeros((len(readouts), WIDTH), dtype=np.float32)
    rows[:, 0] = readouts
    return rows


def opened(found: Floats) -> list[int]:
    return [int(x) for x in found[:, -1]]


def gated(*gates: OpenWhen, operation: str = "add", window: Window = ALWAYS) -> Dose:
    return Dose(1.0, vector(MOVE), operation, (), window, gates)


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        (gate(above=0.5), [0, 0, 0, 1, 1, 0, 1]),
        (gate(below=0.5), [1, 1, 0, 0, 0, 1, 0]),
        (gate(above=-0.5, below=0.75), [0, 1, 1, 0, 0, 0, 0]),
        (gate(above=0.5, hysteresis=0.25), [0, 0, 0, 1, 1, 0, 1]),
        (gate(above=0.5, hysteresis=1.1), [0, 0, 0, 1, 1, 0, 1]),
        (gate(above=0.5, latch=True), [0, 0, 0, 1, 1, 1, 1]),
        (gate(below=-0.5, latch=True), [1, 1, 1, 1, 1, 1, 1]),
        (gate(above=0.7, below=0.8, hysteresis=0.3), [0, 0, 0, 1, 1, 0, 0]),
    ],
)
def test_a_gate_is_open_on_these_tokens(when: OpenWhen, expected: list[int]) -> None:
    rows = read_as(-1.0, 0.0, 0.5, 0.75, 1.0, -0.75, 2.0)
    replies = list(range(7))
    program = CompiledProgram(N_LAYER, [gated(when)])
    assert opened(engine([gated(when)], rows, replies, Memory(program), program)) == expected
    assert opened(reference.apply([gated(when)], "residual", LAYER, rows, replies, {})) == expected


def test_hysteresis_holds_a_gate_open_and_opens_none() -> None:
    rows = read_as(0.4, 0.6, 0.4, 0.26, 0.24, 0.4, 0.6, 0.3)
    program = CompiledProgram(N_LAYER, [gated(gate(above=0.5, hysteresis=0.25))])
    found = engine([gated(gate())], rows, range(8), Memory(program), program)
    assert opened(found) == [0, 1, 1, 1, 0, 0, 1, 1]


def test_on_a_prompt_every_token_is_decided_by_itself() -> None:
    rows = read_as(1.0, 0.0, 1.0, 0.0)
    for when in (gate(above=0.5, latch=True), gate(above=0.5, hysteresis=0.9)):
        program = CompiledProgram(N_LAYER, [gated(when)])
        memory = Memory(program)
        assert opened(engine([gated(when)], rows, [-1] * 4, memory, program)) == [1, 0, 1, 0]
        assert opened(engine([gated(when)], rows[::-1].copy(), [-1, -1, 0, 1], memory, program)) == [
            0,
            1,
            0,
            1,
        ]
        assert opened(engine([gated(when)], rows, None, None, program)) == [1, 0, 1, 0]


def test_a_new_reply_begins_anew() -> None:
    program = CompiledProgram(N_LAYER, [gated(gate(above=0.5, latch=True))])
    memory = Memory(program)
    assert opened(engine([gated(gate())], read_as(1, 0, 0), [0, 1, 2], memory, program)) == [1, 1, 1]
    assert opened(engine([gated(gate())], read_as(0, 0, 1, 0), [0, 1, 2, 3], memory, program)) == [0, 0, 1, 1]


def test_without_a_memory_nothing_is_remembered() -> None:
    program = CompiledProgram(N_LAYER, [gated(gate(above=0.5, latch=True))])
    assert opened(engine([gated(gate())], read_as(1, 0, 1), [0, 1, 2], None, program)) == [1, 0, 1]


def test_a_gate_reads_the_row_before_anything_acts() -> None:
    doses = [Dose(1.0, vector(ON), "ablate"), gated(gate(above=0.5))]
    rows = read_as(1.0, 0.25)
    found = engine(doses, rows)
    assert found[:, 0].tolist() == [0, 0]
    assert opened(found) == [1, 0]
    assert same_bits(found, reference.apply(doses, "residual", LAYER, rows))


def test_all_gates_must_be_open() -> None:
    second = OpenWhen(vector(np.eye(WIDTH)[1], name="second"), 0.0)
    rows = np.array([[1, 1], [1, -1], [0, 1], [0, -1]], dtype=np.float32)
    rows = np.pad(rows, ((0, 0), (0, WIDTH - 2)))
    dose = gated(gate(above=0.5), second)
    assert opened(engine([dose], rows)) == [1, 0, 0, 0]
    assert opened(engine([dose, gated(second)], rows)) == [2, 0, 1, 0]


def test_a_gate_reads_from_the_center() -> None:
    on = OpenWhen(vector(2 * ON, center=[3.0]), -0.25, 0.25)
    assert opened(engine([gated(on)], read_as(0, 5.4, 5.6, 6, 6.4, 6.6))) == [0, 0, 1, 1, 1, 0]


def test_a_zero_gate_is_closed() -> None:
    dose = gated(OpenWhen(vector(np.zeros(WIDTH)), -1.0, 1.0))
    assert CompiledProgram(N_LAYER, [dose]).places == {}
    assert same_bits(reference.apply([dose], "residual", LAYER, read_as(1)), read_as(1))


@st.composite
def gate_programs(draw: st.DrawFn) -> list[Dose]:
    """Doses of several operations behind gates on random vectors, some of which remember."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    gates = []
    for i in range(draw(st.integers(1, 3))):
        low, high = sorted(rng.normal(size=2))
        on = vector(rng.standard_normal(WIDTH), name=f"on{i}", center=[rng.normal()])
        kind = draw(st.sampled_from(["above", "below", "between"]))
        bounds = {"above": (low, math.inf), "below": (-math.inf, high), "between": (low - 1, high + 1)}[kind]
        gates.append(OpenWhen(on, *bounds, draw(st.sampled_from([0.0, 0.3])), draw(st.booleans())))
    doses = []
    for operation in sorted(
        draw(st.sets(st.sampled_from(OPERATIONS[:6]), min_size=1, max_size=3)), key=OPERATIONS.index
    ):
        chosen = draw(st.lists(st.sampled_from(gates), max_size=2, unique_by=lambda g: g.key))
        window = draw(st.sampled_from(WINDOWS[:6]))
        direction = rng.standard_normal(WIDTH).astype(np.float32)
        doses.append(made(operation, direction, 1.5, "residual", window=window, gates=tuple(chosen)))
    doses.append(gated(gates[0]))
    return sorted(doses, key=lambda dose: (OPERATIONS.index(dose.operation), dose.manner))


def sure(doses: Sequence[Dose], rows: Floats) -> bool:
    """Whether no readout is so near to a bound that rounding could decide."""
    for when in {g.key: g for dose in doses for g in dose.gates}.values():
        read = reference.readout(rows, when.vector, LAYER)
        for bound in (when.above, when.below):
            for slack in (0.0, when.hysteresis, -when.hysteresis):
                if (np.abs(read - bound - slack) < 1e-4).any():
                    return False
    return True


@given(
    doses=gate_programs(), seed=st.integers(0, 2**32 - 1), count=st.integers(1, 12), prompt=st.integers(0, 3)
)
def test_gates_and_windows_are_their_formula(doses: list[Dose], seed: int, count: int, prompt: int) -> None:
    rows = np.random.default_rng(seed).standard_normal((count, WIDTH)).astype(np.float32)
    replies = [i - prompt if i >= prompt else -1 for i in range(count)]
    assume(sure(doses, rows))
    program = CompiledProgram(N_LAYER, doses)
    found = engine(doses, rows, replies, Memory(program), program)
    expected = reference.apply(doses, "residual", LAYER, rows, replies, {})
    assume((lengths(expected) > 0.05 * lengths(rows)).all())  # see above: a norm that is kept
    assert_alike(found, expected, 50 * (lengths(rows) + lengths(expected)))


@given(doses=gate_programs(), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_tokens_one_by_one_or_at_once_give_the_same_bits(
    doses: list[Dose], seed: int, data: st.DataObject
) -> None:
    count = 12
    rows = np.random.default_rng(seed).standard_normal((count, WIDTH)).astype(np.float32)
    replies = [-1, -1, *range(count - 2)]
    program = CompiledProgram(N_LAYER, doses)
    whole = engine(doses, rows, replies, Memory(program), program)
    cuts = (
        sorted(data.draw(st.sets(st.integers(1, count - 1)))) if data.draw(st.booleans()) else range(1, count)
    )
    memory = Memory(program)
    parts = [
        engine(doses, rows[a:b], replies[a:b], memory, program)
        for a, b in itertools.pairwise([0, *cuts, count])
    ]
    assert same_bits(np.concatenate(parts), whole)


@given(
    doses=gate_programs(), seed=st.integers(0, 2**32 - 1), back=st.integers(0, 9), length=st.integers(1, 80)
)
def test_a_reply_taken_back_goes_on_as_if_it_had_never_gone_further(
    doses: list[Dose], seed: int, back: int, length: int
) -> None:
    rng = np.random.default_rng(seed)
    first, other = rng.standard_normal((2, 90, WIDTH)).astype(np.float32)
    program = CompiledProgram(N_LAYER, doses)
    memory, fresh = Memory(program), Memory(program)
    engine(doses, first[: back + length], range(back + length), memory, program)
    again = engine(doses, other[back:], range(back, 90), memory, program)
    engine(doses, first[:back], range(back), fresh, program)
    expected = engine(doses, other[back:], range(back, 90), fresh, program)
    assert same_bits(again, expected)


def test_sequences_side_by_side_have_memories_of_their_own() -> None:
    dose = gated(gate(above=0.5, latch=True))
    program = CompiledProgram(N_LAYER, [dose])
    one, two = Memory(program), Memory(program)
    rows = read_as(1, 0, 0, 0, 0, 1)
    tokens = Tokens([0, 0, 1, 1, 2, 2], [one, two, one, two, one, two])
    program.apply(LAYER, rows, tokens=tokens)
    assert opened(rows) == [1, 0, 1, 0, 1, 1]
    assert opened(engine([dose], read_as(0), [3], two, program)) == [1]
    assert opened(engine([dose], read_as(0), [3], Memory(program), program)) == [0]


def test_a_memory_of_another_program_is_not_written_beyond_its_end() -> None:
    small = CompiledProgram(N_LAYER, [gated(gate(above=0.5, latch=True))])
    large = CompiledProgram(N_LAYER, [gated(gate(above=i / 10, latch=True)) for i in range(9)])
    plain = CompiledProgram(N_LAYER, [gated(gate(above=0.5))])
    for program, memory in itertools.product((small, large, plain), repeat=2):
        found = engine([gated(gate())], read_as(1, 0), [0, 1], Memory(memory), program)
        assert found[0, -1] > 0


def test_tokens_are_as_many_as_the_rows() -> None:
    program = CompiledProgram(N_LAYER, [gated(gate(above=0.5))])
    with pytest.raises(ValueError, match="expected 2 tokens, got 1"):
        program.apply(LAYER, read_as(1, 2), tokens=Tokens([0]))


# Probes.


@given(before=some_rows, seed=st.integers(0, 2**32 - 1), count=st.integers(1, 40))
def test_a_probe_reads_what_the_reference_reads(before: Floats, seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = []
    for i in range(count):
        layers = tuple(
            sorted(rng.choice(np.arange(1, N_LAYER), rng.integers(1, N_LAYER), replace=False).tolist())
        )
        rows = rng.standard_normal((len(layers), WIDTH)) * 10.0 ** rng.integers(-3, 4)
        center = rng.standard_normal(len(layers)).tolist() if i % 2 else None
        vectors.append(Vector(f"v{i}", layers, rows, meta={"center": center} if center else {}))
    probe = Probe(N_LAYER, vectors)
    for layer in range(-1, N_LAYER + 1):
        found = probe.read(layer, before)
        assert found.shape == (len(before), count)
        assert found.dtype == np.float32
        for i, v in enumerate(vectors):
            if layer not in v.layers:
                assert np.isnan(found[:, i]).all()
                continue
            expected = reference.readout(before, v, layer)
            reads = lengths(v.readouts[v.layers.index(layer), 0])
            allowed = SLACK * (lengths(before) * reads + np.abs(v.center).max()) + 1e-44
            assert (np.abs(found[:, i] - expected) <= allowed + 1e-7 * np.abs(expected)).all()


def test_a_probe_reads_memory_of_somebody_elses() -> None:
    rng = np.random.default_rng(0)
    probe = Probe(N_LAYER, [vector(rng.standard_normal(WIDTH)) for _ in range(3)])
    rows = rng.standard_normal((5, WIDTH)).astype(np.float32)
    out = np.zeros((5, 3), dtype=np.float32)
    probe.read_at(LAYER, rows.ctypes.data, 5, out.ctypes.data)
    assert same_bits(out, probe.read(LAYER, rows))


def test_a_zero_direction_is_not_read() -> None:
    probe = Probe(N_LAYER, [vector(np.zeros(WIDTH)), vector(ON)])
    assert np.isnan(probe.read(LAYER, read_as(2.0))[0, 0])
    assert probe.read(LAYER, read_as(2.0))[0, 1] == 2


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Probe(N_LAYER, []), ValueError, "sizes must be positive"),
        (lambda: Probe(0, [vector(ON)]), ValueError, "sizes must be positive"),
        (lambda: Probe(LAYER, [vector(ON)]), ValueError, "a layer that the model does not have"),
        (lambda: Probe(N_LAYER, [vector(ON), vector([1, 2])]), ValueError, "the same at one place"),
        (
            lambda: Probe(N_LAYER, [vector([1e-45] * 2)]),
            VectorError,
            "v: a direction is too short to be read",
        ),
        (
            lambda: Probe(N_LAYER, [vector(ON)]).read(1, np.zeros((1, WIDTH))),
            ValueError,
            "rows of 6, got float64",
        ),
        (
            lambda: Probe(N_LAYER, [vector(ON)]).read(1, np.zeros((1, 3), dtype=np.float32)),
            ValueError,
            r"rows of 6, got float32 \(1, 3\)",
        ),
    ],
)
def test_what_can_not_be_read_is_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
