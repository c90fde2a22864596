from __future__ import annotations

import ast
import math
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from makers import make_vector
from mien import recipe as recipe_module
from mien.errors import RecipeError
from mien.misreading import misread
from mien.recipe import (
    DEFAULT_MARGIN,
    LEVELS,
    MAX_DEPTH,
    MAX_GATES,
    MAX_LENGTH,
    OPERATORS,
    WINDOWS,
    Gate,
    Mix,
    Pure,
    Recipe,
    Term,
    as_recipe,
    parse,
    require_sound,
)


def terms(recipe: Recipe) -> list[tuple[float, Any]]:
    return [(term.coefficient, term.vector) for term in recipe.terms]


# What a recipe means.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("joy", [(1.0, "joy")]),
        ("-joy", [(-1.0, "joy")]),
        ("+joy", [(1.0, "joy")]),
        ("0.8*joy - 0.3*anger", [(0.8, "joy"), (-0.3, "anger")]),
        ("joy*2", [(2.0, "joy")]),
        ("joy/4", [(0.25, "joy")]),
        ("2 * (joy - smollm2_135m_instruct.fear) / 4", [(0.5, "joy"), (-0.5, "smollm2_135m_instruct.fear")]),
        ("(1 + 2*3 - 1)/2 * joy", [(3.0, "joy")]),
        ("joy + joy", [(2.0, "joy")]),
        ("fear + joy + fear", [(2.0, "fear"), (1.0, "joy")]),
        ("joy - joy", []),
        ("0*joy + fear", [(1.0, "fear")]),
        ("--joy", [(1.0, "joy")]),
        ("-(joy - 2*fear)*3", [(-3.0, "joy"), (6.0, "fear")]),
        ("joy('slightly')", [(0.2, "joy")]),
        ("2*joy('extremely') - fear('somewhat')", [(2.0, "joy"), (-0.4, "fear")]),
        ("1e-3*joy", [(0.001, "joy")]),
        ("1_000*joy", [(1000.0, "joy")]),
        ("0x10*joy", [(16.0, "joy")]),
        ("größe + 喜び", [(1.0, "größe"), (1.0, "喜び")]),
        ("  joy\n\t+\r\n  fear\f", [(1.0, "joy"), (1.0, "fear")]),
        ("joy\u2003+\u00a0fear", [(1.0, "joy"), (1.0, "fear")]),
        ("1e200*joy/1e200", [(1.0, "joy")]),
        ("0", []),
        ("1 - 1", []),
        ("", []),
        (" \n\t ", []),
    ],
)
def test_a_text_means_these_terms(text: str, expected: list[tuple[float, str]]) -> None:
    assert parse(text) == Recipe(tuple(Term(c, name) for c, name in expected))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("joy(0.7)", [Term(0.7, "joy")]),
        ("joy()", [Term(1.0, "joy")]),
        ("joy(0.5)(3)", [Term(1.5, "joy")]),
        ("2*joy(0.5) + joy", [Term(2.0, "joy")]),
        ("-pack.joy(1/4)", [Term(-0.25, "pack.joy")]),
        ("joy(0)", []),
        ('joy(when="prompt")', [Term(1.0, "joy", "prompt")]),
        ("joy(when='response')", [Term(1.0, "joy", "response")]),
        ("joy(when='all', keep_norm=False)", [Term(1.0, "joy", "all")]),
        ("joy + joy(when='all')", [Term(1.0, "joy"), Term(1.0, "joy", "all")]),
        ("joy(keep_norm=True)", [Term(1.0, "joy", "", True)]),
        ("joy(keep_norm=False)(keep_norm=True)", [Term(1.0, "joy", "", True)]),
        ("joy(-0.5, keep_norm=True, when='prompt')", [Term(-0.5, "joy", "prompt", True)]),
        ("2*joy(keep_norm=True)(0.5)(when='prompt')/4", [Term(0.25, "joy", "prompt", True)]),
        ("joy (\n0.5 ,\twhen = 'prompt' , )", [Term(0.5, "joy", "prompt")]),
        (
            "(calm - anger)(keep_norm=True)",
            [Term(1.0, "calm", "", True), Term(-1.0, "anger", "", True)],
        ),
        (
            "(calm - 2*anger)(0.5, when='prompt')",
            [Term(0.5, "calm", "prompt"), Term(-1.0, "anger", "prompt")],
        ),
        (
            "(joy(when='prompt') + calm)(keep_norm=True)",
            [Term(1.0, "joy", "prompt", True), Term(1.0, "calm", "", True)],
        ),
        (
            "(joy + joy(keep_norm=True))(2, when='response')",
            [Term(2.0, "joy", "response"), Term(2.0, "joy", "response", True)],
        ),
        (
            "joy + joy(when='prompt') - joy(when='response') + 2*joy(keep_norm=True)",
            [
                Term(1.0, "joy"),
                Term(1.0, "joy", "prompt"),
                Term(-1.0, "joy", "response"),
                Term(2.0, "joy", "", True),
            ],
        ),
        (
            "joy(when='prompt') + fear + joy(0.5, when='prompt')",
            [Term(1.5, "joy", "prompt"), Term(1.0, "fear")],
        ),
        ("joy(when='prompt') - joy(when='prompt')", []),
        ("(joy - joy)(when='prompt')", []),
    ],
)
def test_a_call_says_how_much_where_and_in_what_manner(text: str, expected: list[Term]) -> None:
    assert parse(text) == Recipe(tuple(expected))


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("1.0 * joy", "joy"),
        ("-1*joy", "-joy"),
        ("joy*.5 + -3*fear", "0.5*joy - 3.0*fear"),
        ("-0.5*joy - fear + calm", "-0.5*joy - fear + calm"),
        ("1e22*a.joy - 1e-7*b.joy", "1e+22*a.joy - 1e-07*b.joy"),
        ("joy - joy", ""),
        ("joy(0.5)", "0.5*joy"),
        ("joy(1, keep_norm=False)", "joy"),
        ("joy(1, when='all')", 'joy(when="all")'),
        ("joy(-1, when='prompt')", '-joy(when="prompt")'),
        ("joy(keep_norm=True, when='response')/2", '0.5*joy(when="response", keep_norm=True)'),
        ("(calm - 2*anger)(keep_norm=True)", "calm(keep_norm=True) - 2.0*anger(keep_norm=True)"),
        ("joy(when='response') + joy", 'joy(when="response") + joy'),
    ],
)
def test_the_canonical_text_is_short(text: str, canonical: str) -> None:
    assert str(parse(text)) == canonical


NAMES = ["joy", "fear", "calm", "pack.joy"]
numbers = st.one_of(st.integers(1, 9).map(str), st.floats(0.01, 99).map(repr))
blanks = st.sampled_from(["", " ", "\n", "\t "])


@st.composite
def linear(draw: st.DrawFn, depth: int = 4, free: tuple[str, ...] = ("when", "keep_norm")) -> str:
    """The text of an expression that is linear in NAMES. free: what no call around it says already."""
    kind = draw(st.sampled_from("nnsdmfxcc")) if depth else "n"
    space = draw(blanks)
    if kind == "n":
        return draw(st.sampled_from(NAMES))
    if kind == "c":
        said = draw(st.lists(st.sampled_from(free), unique=True)) if free else []
        arguments = [f"when={space}{draw(st.sampled_from(WINDOWS))!r}"] * ("when" in said)
        arguments += [f"keep_norm={draw(st.booleans())}"] * ("keep_norm" in said)
        dose = [draw(st.sampled_from(["", "-"])) + draw(numbers)] * draw(st.booleans())
        inner = draw(linear(depth - 1, tuple(name for name in free if name not in said)))
        return f"({inner}){space}({f',{space}'.join(dose + draw(st.permutations(arguments)))})"
    a = draw(linear(depth - 1, free))
    if kind == "s":
        return f"{a}{space}{draw(st.sampled_from('+-'))}{space}{draw(linear(depth - 1, free))}"
    if kind == "d":
        return f"({a}){space}/{space}{draw(numbers)}"
    if kind == "m":
        return f"{draw(numbers)}{space}*{space}({a})"
    if kind == "f":
        return f"({a})*({draw(numbers)}{space}+{draw(numbers)})"
    return f"{draw(st.sampled_from('+-'))}({space}{a})"


WHENS = ("", *WINDOWS)


class Unit(np.ndarray):
    """Coefficients by (name, window, keep_norm). Python does the sums; a call moves them elsewhere."""

    def __call__(self, dose: float = 1, *, when: str = "", keep_norm: bool = False) -> Any:
        return np.roll(self * dose, (WHENS.index(when), int(keep_norm)), axis=(1, 2))


def by_numpy(text: str) -> dict[tuple[str, str, bool], float]:
    """Python's own value of the text, where each name is a unit vector of NumPy."""
    scope: dict[str, Any] = {"__builtins__": {}}
    for i, name in enumerate(NAMES):
        scope[name.replace(".", "_")] = np.zeros((len(NAMES), len(WHENS), 2)).view(Unit)
        scope[name.replace(".", "_")][i, 0, 0] = 1
    value = eval(" ".join(text.replace("pack.joy", "pack_joy").split()), scope)
    return {(NAMES[i], WHENS[w], bool(k)): float(value[i, w, k]) for i, w, k in np.argwhere(value)}


@given(linear())
def test_a_linear_expression_has_the_value_that_python_gives_it(text: str) -> None:
    found = {(term.name, term.when, term.keep_norm): term.coefficient for term in parse(text).terms}
    assert found == by_numpy(text)


@given(linear())
def test_the_canonical_text_parses_to_the_same_recipe(text: str) -> None:
    recipe = parse(text)
    assert parse(str(recipe)) == recipe
    assert str(parse(str(recipe))) == str(recipe)


# Operators, windows and gates.

SAD = Mix(((1.0, "fear"), (-0.5, "joy")))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ablate(joy)", [Term(1.0, "joy", operator="ablate")]),
        ("0.5*ablate(joy)", [Term(0.5, "joy", operator="ablate")]),
        ("ablate(joy)(0.5)", [Term(0.5, "joy", operator="ablate")]),
        ("ablate(fear - joy/2)", [Term(1.0, SAD, operator="ablate")]),
        ("ablate(-joy)", [Term(1.0, Mix(((-1.0, "joy"),)), operator="ablate")]),
        ("ablate(1*joy + 0*fear)", [Term(1.0, "joy", operator="ablate")]),
        ("ablate(a.joy)", [Term(1.0, "a.joy", operator="ablate")]),
        ("ablate(joy) - ablate(joy)", []),
        ("ablate(joy)/2 + ablate(joy)/4", [Term(0.75, "joy", operator="ablate")]),
        ("clamp(joy, 1)", [Term(1.0, "joy", operator="clamp", value=(1.0,))]),
        ("clamp(joy, -1/4)", [Term(1.0, "joy", operator="clamp", value=(-0.25,))]),
        ("clamp(joy, (1,))", [Term(1.0, "joy", operator="clamp", value=(1.0,))]),
        ("clamp(joy, (1, -2, 0.5))/2", [Term(0.5, "joy", operator="clamp", value=(1.0, -2.0, 0.5))]),
        (
            "clamp(joy, 1)/2 + clamp(joy, 2)/2",
            [Term(0.5, "joy", operator="clamp", value=(v,)) for v in (1.0, 2.0)],
        ),
        ("edit(joy)", [Term(1.0, "joy", operator="edit", value=(DEFAULT_MARGIN,))]),
        ("edit(joy, margin=2)", [Term(1.0, "joy", operator="edit", value=(2.0,))]),
        ("edit(-joy, margin=-1/2)", [Term(1.0, Mix(((-1.0, "joy"),)), operator="edit", value=(-0.5,))]),
        ("scale(joy)", [Term(1.0, "joy", operator="scale")]),
        ("scale(joy, -1)", [Term(-1.0, "joy", operator="scale")]),
        ("2*scale(joy, 0.25)", [Term(0.5, "joy", operator="scale")]),
        ("scale(joy, 0)", []),
        ("force(joy)", [Term(1.0, "joy", operator="force")]),
        ("forbid(joy)", [Term(1.0, "joy", operator="forbid")]),
        ("purify(joy, fear)", [Term(1.0, Pure("joy", ("fear",)))]),
        ("0.5*purify(joy, fear, a.b)", [Term(0.5, Pure("joy", ("fear", "a.b")))]),
        ("ablate(purify(joy, fear))", [Term(1.0, Pure("joy", ("fear",)), operator="ablate")]),
        (
            "ablate(purify(joy, fear) - calm)",
            [Term(1.0, Mix(((1.0, Pure("joy", ("fear",))), (-1.0, "calm"))), operator="ablate")],
        ),
        (
            "ablate(refusal) + clamp(calm, 1.0) + 0.5*purify(openness, conscientiousness)",
            [
                Term(1.0, "refusal", operator="ablate"),
                Term(1.0, "calm", operator="clamp", value=(1.0,)),
                Term(0.5, Pure("openness", ("conscientiousness",))),
            ],
        ),
        # pack.NAME may be called what an operator is
        ("p.ablate(0.5) + ablate(p.gate)", [Term(0.5, "p.ablate"), Term(1.0, "p.gate", operator="ablate")]),
    ],
)
def test_an_operator_makes_a_term_of_vectors(text: str, expected: list[Term]) -> None:
    assert parse(text) == Recipe(tuple(expected))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("joy(start=5)", Term(1.0, "joy", start=5)),
        ("joy(stop=50)", Term(1.0, "joy", stop=50)),
        ("joy(start=5, stop=6)", Term(1.0, "joy", start=5, stop=6)),
        ("joy(stop=6, start=5)", Term(1.0, "joy", start=5, stop=6)),
        ("joy(start=0)(start=3)", Term(1.0, "joy", start=3)),
        ("joy(ramp=10)", Term(1.0, "joy", ramp=10)),
        ("joy(decay=40)", Term(1.0, "joy", decay=40.0)),
        ("joy(decay=1/3)", Term(1.0, "joy", decay=1 / 3)),
        ("joy(start=2)(2, ramp=3)(decay=4)", Term(2.0, "joy", start=2, ramp=3, decay=4.0)),
        ("joy(when='response', start=2)", Term(1.0, "joy", "response", start=2)),
        ("joy(turn=2)", Term(1.0, "joy", turn=(2, 2))),
        ("joy(turn=(2, 4))", Term(1.0, "joy", turn=(2, 4))),
        ("joy(turn=(3, 3))", Term(1.0, "joy", turn=(3, 3))),
        ("joy(turn=(2, None))", Term(1.0, "joy", turn=(2, None))),
        ("joy(turn=1, when='prompt')", Term(1.0, "joy", "prompt", turn=(1, 1))),
        ("joy(keep_norm=True, decay=8)", Term(1.0, "joy", keep_norm=True, decay=8.0)),
        ("ablate(joy, start=3)", Term(1.0, "joy", operator="ablate", start=3)),
        ("ablate(joy)(start=3)", Term(1.0, "joy", operator="ablate", start=3)),
        ("scale(joy, 2, decay=3, turn=2)", Term(2.0, "joy", operator="scale", decay=3.0, turn=(2, 2))),
        (
            "clamp(joy, 1, when='response')",
            Term(1.0, "joy", "response", operator="clamp", value=(1.0,)),
        ),
        ("edit(joy, stop=4, margin=1)", Term(1.0, "joy", operator="edit", value=(1.0,), stop=4)),
        ("gate(joy, on=fear, above=0.5)", Term(1.0, "joy", gates=(Gate("fear", 0.5),))),
        ("gate(joy, on=fear, below=-1/2)", Term(1.0, "joy", gates=(Gate("fear", None, -0.5),))),
        (
            "gate(joy, on=fear - joy/2, above=0, below=1, hysteresis=0.25, latch=True)",
            Term(1.0, "joy", gates=(Gate(SAD, 0.0, 1.0, 0.25, True),)),
        ),
        ("gate(joy, on=fear, above=1, latch=False)", Term(1.0, "joy", gates=(Gate("fear", 1.0),))),
        ("2*gate(joy, on=fear, above=1)(0.5)", Term(1.0, "joy", gates=(Gate("fear", 1.0),))),
        (
            "gate(ablate(joy), on=purify(fear, joy), above=1)",
            Term(1.0, "joy", operator="ablate", gates=(Gate(Pure("fear", ("joy",)), 1.0),)),
        ),
        ("gate(joy, on=fear, above=1, stop=9)", Term(1.0, "joy", stop=9, gates=(Gate("fear", 1.0),))),
        ("gate(joy(stop=9), on=fear, above=1)", Term(1.0, "joy", stop=9, gates=(Gate("fear", 1.0),))),
        (
            "gate(gate(joy, on=fear, above=1), on=calm, below=2)",
            Term(1.0, "joy", gates=(Gate("fear", 1.0), Gate("calm", None, 2.0))),
        ),
    ],
)
def test_a_window_says_when_and_a_gate_on_what(text: str, expected: Term) -> None:
    assert parse(text) == Recipe((expected,))


def test_a_gate_and_a_window_hold_for_every_term_inside() -> None:
    gate = Gate("calm", 0.5)
    found = parse("gate(joy + ablate(fear)/2, on=calm, above=0.5)(turn=2, start=3)")
    assert found == Recipe(
        (
            Term(1.0, "joy", start=3, turn=(2, 2), gates=(gate,)),
            Term(0.5, "fear", operator="ablate", start=3, turn=(2, 2), gates=(gate,)),
        )
    )


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("ablate( joy )*.5", "0.5*ablate(joy)"),
        ("ablate(joy/1)", "ablate(joy)"),
        ("ablate(-joy - .5*fear)", "ablate(-joy - 0.5*fear)"),
        ("clamp(joy, 1)", "clamp(joy, 1.0)"),
        ("clamp(joy, (1, 2))(stop=4)", "clamp(joy, (1.0, 2.0), stop=4)"),
        ("edit(joy)", "edit(joy)"),
        ("edit(joy, margin=2)(when='prompt')", 'edit(joy, margin=2.0, when="prompt")'),
        ("scale(joy, -2)", "-2.0*scale(joy)"),
        ("purify(joy,fear , calm)*2", "2.0*purify(joy, fear, calm)"),
        (
            "joy(keep_norm=True, turn=(1, None), decay=4, ramp=3, stop=9, start=1, when='response')",
            'joy(when="response", start=1, stop=9, ramp=3, decay=4.0, keep_norm=True, turn=(1, None))',
        ),
        ("joy(turn=(2, 2))", "joy(turn=2)"),
        (
            "gate(2*joy, latch=True, below=3, hysteresis=1, above=-1, on=fear)(start=2)",
            "2.0*gate(joy(start=2), on=fear, above=-1.0, below=3.0, hysteresis=1.0, latch=True)",
        ),
        (
            "gate(gate(force(joy), on=a, above=0), on=-b, below=1)",
            "gate(gate(force(joy), on=a, above=0.0), on=-b, below=1.0)",
        ),
    ],
)
def test_the_canonical_text_of_an_operator_is_short(text: str, canonical: str) -> None:
    assert str(parse(text)) == canonical
    assert parse(canonical) == parse(text)


names = st.sampled_from(["joy", "fear", "calm", "pack.joy", "größe"])
doses = st.floats(-99, 99).filter(bool)
thresholds = st.floats(-9, 9)
pures = st.builds(Pure, names, st.lists(names, min_size=1, max_size=2).map(tuple))
vector_names = st.one_of(names, pures)
mixes = st.builds(
    lambda parts: Mix(tuple((c, name) for name, c in parts.items())),
    st.dictionaries(vector_names, doses, min_size=1, max_size=3),
).filter(lambda mix: len(mix.parts) > 1 or mix.parts[0][0] != 1)
sources = st.one_of(vector_names, mixes)
gates = st.builds(
    lambda on, bounds, low, high, slack, latch: Gate(
        on, bounds[0] if low or not high else None, bounds[1] if high else None, slack, latch
    ),
    sources,
    st.tuples(thresholds, thresholds).map(sorted).filter(lambda bounds: bounds[0] < bounds[1]),
    st.booleans(),
    st.booleans(),
    st.one_of(st.just(0.0), st.floats(0, 9)),
    st.booleans(),
)


@st.composite
def sound_terms(draw: st.DrawFn) -> Term:
    """Any term that a text can say."""
    operator = draw(st.sampled_from(OPERATORS))
    source = draw(vector_names if operator == "add" else sources)
    coefficient = draw(doses)
    if operator in ("ablate", "clamp", "edit"):
        coefficient = draw(st.floats(0.01, 1))
    if operator in ("force", "forbid"):
        coefficient = 1.0
    if operator == "edit" and isinstance(source, Mix):
        source = Mix(source.parts[:1]) if source.parts[0][0] != 1 else source.parts[0][1]
    value: tuple[float, ...] = ()
    if operator == "clamp":
        value = tuple(draw(st.lists(thresholds, min_size=1, max_size=3)))
    if operator == "edit":
        value = (draw(st.one_of(st.just(DEFAULT_MARGIN), thresholds)),)
    first = draw(st.integers(1, 9))
    turn = draw(st.sampled_from([None, (first, first), (first, first + 2), (first, None)]))
    when = draw(st.sampled_from(WINDOWS))
    start, length, ramp = (draw(st.integers(0, 9)) for _ in range(3))
    counted: dict[str, Any] = {"start": start, "stop": start + length if length else None, "ramp": ramp}
    counted["decay"] = draw(st.one_of(st.none(), st.floats(0.01, 1e6)))
    if when == "prompt":
        counted = {}
    keep_norm = operator == "add" and draw(st.booleans())
    around = tuple(draw(st.lists(gates, max_size=MAX_GATES)))
    return Term(coefficient, source, when, keep_norm, operator, value, turn=turn, gates=around, **counted)


@given(st.lists(sound_terms(), max_size=4))
def test_every_term_has_a_text_that_means_it(found: list[Term]) -> None:
    unlike = {(term.text,): term for term in found}
    recipe = Recipe(tuple(unlike.values()))
    for term in recipe.terms:
        require_sound(term)
    assert parse(str(recipe)) == recipe
    assert str(parse(str(recipe))) == str(recipe)


@pytest.mark.parametrize("count", [2, 32, 33, 100, 200])
def test_a_sum_of_many_has_a_text_that_can_be_read_again(count: int) -> None:
    def balanced(parts: list[str]) -> str:
        middle = len(parts) // 2
        return f"({balanced(parts[:middle])}+{balanced(parts[middle:])})" if middle else parts[0]

    text = balanced([f"-v{i}" for i in range(count)])
    for recipe in (parse(text), parse(f"ablate({text})")):
        assert parse(str(recipe)) == recipe
    assert len(parse(text).terms) == count


# What is refused: the problem, and the place.

CALL = (
    "a call takes one number, the dose, and keywords; operators are ablate, clamp, edit, scale, force, "
    "forbid, gate, purify"
)
KEYWORDS = "a call takes a dose, keep_norm=, when=, start=, stop=, ramp=, decay= and turn="
NO_VECTOR = "expected a vector, got a number"
NO_SUM_OF_VECTORS = "expected a vector or a sum of vectors, without windows or operators"
PURIFY = "purify takes the names of two vectors or more: purify(joy, anger)"
GATE_WHAT = "gate: say on= which vector, and above= or below= which readout"
STOP = "stop: expected more than start"
COUNTED = "start, stop, ramp and decay count tokens of the reply"
TURN = "turn: expected a reply's number from 1, or (first, last)"
NO_CALL = "a number can't be called; write * between a number and a vector"
WINDOW = "when: expected one of 'all', 'prompt', 'response'"
NORM = "keep_norm: expected True or False"
NO_SUM = "a vector and a plain number don't add up; did you mean * ?"
NO_PRODUCT = "the product of two vectors has no meaning; one side must be a number"
NO_VALUE = "expected a number or a vector's name, got {}"


@pytest.mark.parametrize(
    ("text", "problem", "offset"),
    [
        ("joy + 1", NO_SUM, 0),
        ("fear + 2*(1 - joy)", NO_SUM, 10),
        ("joy * anger", NO_PRODUCT, 0),
        ("fear - 2*(joy+anger)*fear", NO_PRODUCT, 7),
        ("calm + joy / anger", "can't divide by a vector", 7),
        ("1 / joy", "can't divide by a vector", 0),
        ("calm + joy / (1 - 1)", "division by zero", 7),
        ("joy * (1 / 0)", "division by zero", 7),
        ("7", "the number 7 alone steers nothing; name a vector", 0),
        ("1 + 0.5", "the number 1.5 alone steers nothing; name a vector", 0),
        ("joy + ablate(0.5)", NO_VECTOR, 13),
        ("fear + joy(1, 2)", CALL, 7),
        ("joy(2)(fear)", CALL, 0),
        ("calm - joy(0.5, fear, when='prompt')", CALL, 7),
        ("fear + 2(joy)", NO_CALL, 7),
        ("(1 + 1)(2)", NO_CALL, 0),
        ("joy(2(3))", NO_CALL, 4),
        ("joy(when='later')", WINDOW, 9),
        ("fear + joy(0.5, when='Prompt')", WINDOW, 21),
        ("größe(when='später')", WINDOW, 11),
        ("\n joy(\n  when=prompt)", WINDOW, 14),
        ("joy(when=a.prompt)", WINDOW, 9),
        ("joy(when=b'prompt')", WINDOW, 9),
        ("joy(when=None)", WINDOW, 9),
        ("joy(when='prompt' + 'response')", WINDOW, 9),
        ("joy(when=('prompt',))", WINDOW, 9),
        ("joy(keep_norm=1)", NORM, 14),
        ("joy(keep_norm='True')", NORM, 14),
        ("joy(when='prompt', keep_norm=None)", NORM, 29),
        ("joy(keep_norm=yes)", NORM, 14),
        ("joy(keep_norm=not False)", NORM, 14),
        ("joy(dose=2)", f"no dose here; {KEYWORDS}", 9),
        ("joy(_replace=2)", f"no _replace here; {KEYWORDS}", 13),
        ("joy(name='fear')", f"no name here; {KEYWORDS}", 9),
        ("fear + joy(**calm)", f"no ** here; {KEYWORDS}", 13),
        # operators
        ("joy + ablate", "ablate is an operator; a vector of that name is pack.ablate", 6),
        ("2*gate - joy", "gate is an operator; a vector of that name is pack.gate", 2),
        ("joy + ablate()", "ablate takes one vector: ablate(joy)", 6),
        ("joy - edit(calm, 1)", "edit takes one vector: edit(joy)", 6),
        ("force(calm, fear)", "force takes one vector: force(joy)", 0),
        ("forbid(2*3)", NO_VECTOR, 7),
        ("ablate(joy - joy)", "expected a vector, and these cancel", 7),
        ("ablate(0*joy)", "expected a vector, and these cancel", 7),
        ("ablate(joy(when='prompt'))", NO_SUM_OF_VECTORS, 7),
        ("ablate(joy(keep_norm=True) + fear)", NO_SUM_OF_VECTORS, 7),
        ("ablate(ablate(joy))", NO_SUM_OF_VECTORS, 7),
        ("fear + ablate(gate(joy, on=calm, above=1))", NO_SUM_OF_VECTORS, 14),
        ("ablate(joy, keep_norm=1)", NORM, 22),
        ("ablate(joy, margin=1)", f"no margin here; {KEYWORDS}", 19),
        ("ablate(joy, on=fear)", f"no on here; {KEYWORDS}", 15),
        ("ablate(joy, start=1, start=2)", "a keyword is given twice", 0),
        ("clamp(joy)", "clamp takes a vector and the target readout: clamp(calm, 1.0)", 0),
        ("joy + clamp(joy, 1, 2)", "clamp takes a vector and the target readout: clamp(calm, 1.0)", 6),
        ("clamp(joy, fear)", "clamp: expected a number", 11),
        ("clamp(joy, ())", "clamp: expected a number, or one for each direction", 11),
        ("clamp(joy, (1, fear))", "clamp: expected a number", 15),
        ("clamp(joy, 1e999)", "a coefficient is not finite", 11),
        ("clamp(2, 1)", NO_VECTOR, 6),
        ("edit(joy + fear)", "edit takes one probe, not a sum; name one, or -name for its other side", 0),
        ("edit(joy, margin=fear)", "margin: expected a number", 17),
        ("edit(joy, margin=1/0)", "division by zero", 17),
        ("scale()", "scale takes a vector and a number: scale(heads, -1)", 0),
        ("scale(joy, 1, 2)", "scale takes a vector and a number: scale(heads, -1)", 0),
        ("scale(joy, fear)", "scale: expected a number", 11),
        ("scale(joy, 1e308)*1e10", "a coefficient is not finite", 0),
        ("purify(joy)", PURIFY, 0),
        ("fear - purify(joy, 2*fear)", PURIFY, 7),
        ("purify(joy, fear + calm)", PURIFY, 0),
        ("purify(joy, purify(fear, calm))", PURIFY, 0),
        ("purify(joy, fear, when='prompt')", PURIFY, 0),
        ("purify(joy, 2)", NO_VECTOR, 12),
        ("purify(joy, ablate(fear))", NO_SUM_OF_VECTORS, 12),
        # operators whose strength has no meaning
        ("2*ablate(joy)", "ablate(joy): ablate takes a strength from 0 to 1, got 2", 2),
        ("joy - ablate(fear)", "ablate(fear): ablate takes a strength from 0 to 1, got -1", 6),
        ("ablate(joy) + ablate(joy)/10", "ablate(joy): ablate takes a strength from 0 to 1, got 1.1", 0),
        ("-clamp(joy, 1)", "clamp(joy, 1.0): clamp takes a strength from 0 to 1, got -1", 1),
        ("3*edit(joy)", "edit(joy): edit takes a strength from 0 to 1, got 3", 2),
        ("force(joy)/2", "force(joy): force takes no coefficient, got 0.5", 0),
        ("-forbid(joy)", "forbid(joy): forbid takes no coefficient, got -1", 1),
        (
            "ablate(joy, keep_norm=True)",
            "ablate(joy, keep_norm=True): only what is added can keep the norm",
            0,
        ),
        (
            "(joy + scale(fear))(keep_norm=True)",
            "scale(fear, keep_norm=True): only what is added can keep the norm",
            7,
        ),
        # windows
        ("joy(start=-1)", "start: expected a count of tokens", 10),
        ("joy(start=1.0)", "start: expected a count of tokens", 10),
        ("joy(stop=True)", "stop: expected a count of tokens", 9),
        ("joy(ramp=fear)", "ramp: expected a count of tokens", 9),
        ("joy(stop=None)", "stop: expected a count of tokens", 9),
        (f"joy(start={1 << 31})", "start: expected a count of tokens", 10),
        ("joy(stop=0)", STOP, 9),
        ("joy(start=5, stop=5)", STOP, 18),
        ("joy(stop=5)(start=7)", STOP, 18),
        ("joy(decay=0)", "decay: expected a half-life in tokens, more than 0", 10),
        ("joy(decay=-1)", "decay: expected a half-life in tokens, more than 0", 10),
        ("joy(decay=fear)", "decay: expected a number", 10),
        ("joy(decay=1e999)", "a coefficient is not finite", 10),
        ("joy(when='prompt', start=1)", COUNTED, 25),
        ("joy(decay=4, when='prompt')", COUNTED, 18),
        ("joy(start=1)(start=2)", "start is given twice for joy", 19),
        ("joy(decay=1)(decay=2)", "decay is given twice for joy", 19),
        ("joy(turn=0)", TURN, 9),
        ("joy(turn=-1)", TURN, 9),
        ("joy(turn=1.0)", TURN, 9),
        ("joy(turn=True)", TURN, 9),
        ("joy(turn=None)", TURN, 9),
        ("joy(turn=())", TURN, 9),
        ("joy(turn=(1,))", TURN, 9),
        ("joy(turn=(1, 2, 3))", TURN, 9),
        ("joy(turn=(3, 2))", TURN, 9),
        ("joy(turn=(None, 2))", TURN, 9),
        ("joy(turn=(1, 2.0))", TURN, 9),
        ("joy(turn=fear)", TURN, 9),
        ("joy(turn=1)(turn=2)", "turn is given twice for joy", 17),
        # gates
        ("gate()", "gate takes one term: gate(calm, on=anger, above=0.5)", 0),
        ("joy + gate(joy, fear)", "gate takes one term: gate(calm, on=anger, above=0.5)", 6),
        ("gate(2, on=fear, above=1)", "gate: expected a term, got a number", 5),
        ("gate(joy, above=1)", GATE_WHAT, 0),
        ("gate(joy, on=fear)", GATE_WHAT, 0),
        ("gate(joy, on=fear, latch=True, hysteresis=1)", GATE_WHAT, 0),
        ("gate(joy, on=2, above=1)", NO_VECTOR, 13),
        ("gate(joy, on=ablate(fear), above=1)", NO_SUM_OF_VECTORS, 13),
        ("gate(joy, on=fear(when='prompt'), above=1)", NO_SUM_OF_VECTORS, 13),
        ("gate(joy, on=fear, above=calm)", "above: expected a number", 25),
        ("gate(joy, on=fear, below=1, latch=1)", "latch: expected True or False", 34),
        ("gate(joy, on=fear, above=1, hysteresis=-1)", "hysteresis: expected 0 or more", 0),
        (
            "gate(joy, on=fear, above=1, below=1)",
            "gate: above must be less than below",
            0,
        ),
        ("gate(joy, on=fear, above=1, dose=2)", f"no dose here; {KEYWORDS}", 33),
        ("gate(joy, on=fear, on=calm, above=1)", "a keyword is given twice", 0),
        (
            "gate(" * 5 + "joy" + ", on=fear, above=1)" * 5,
            f"expected at most {MAX_GATES} gates around a term",
            0,
        ),
        ("joy('prompt')", f"expected a level ({', '.join(LEVELS)}) or a number, got 'prompt'", 4),
        ("joy(when='prompt')(when='response')", "when is given twice for joy", 24),
        ("joy(when='prompt')(2, when='prompt')", "when is given twice for joy", 27),
        ("joy(when='prompt')(when='all')", "when is given twice for joy", 24),
        ("joy(when='all')(when='prompt')", "when is given twice for joy", 21),
        ("fear + (calm - a.b(keep_norm=True))(keep_norm=False)", "keep_norm is given twice for a.b", 46),
        ("joy(when='prompt', when='all')", "a keyword is given twice", 0),
        ("fear + joy(1e999)", "a coefficient is not finite", 11),
        ("fear + 1e308*joy(10)*2", "a coefficient is not finite", 7),
        ("fear + joy(1e308)(10)", "a coefficient is not finite", 7),
        ("joy(1 / 0)", "division by zero", 4),
        ("joy(when='prompt') + 1", NO_SUM, 0),
        ("fear + joy(2)*calm(when='prompt')", NO_PRODUCT, 7),
        ("joy(when='#')", "comments have no place in a recipe", 10),
        ("joy + 1e999*fear", "a coefficient is not finite", 6),
        ("1e308*10*joy", "a coefficient is not finite", 0),
        ("joy + fear*1e308*10", "a coefficient is not finite", 6),
        ("1e308*joy + 1e308*joy", "a coefficient is not finite", 0),
        ("joy/1e-308/1e-308", "a coefficient is not finite", 0),
        (f"joy*1{'0' * 400}", "a coefficient is not finite", 4),
        ("joy # why", "comments have no place in a recipe", 4),
        ("joy # why\n+ fear", "comments have no place in a recipe", 4),
        ("  \n größe + 1", NO_SUM, 4),
        ("größe + 喜び * 喜び", NO_PRODUCT, 8),
        ("joy +\n\t fear * anger", NO_PRODUCT, 8),
        (
            f"{'-' * (MAX_DEPTH + 1)}joy",
            f"nested deeper than {MAX_DEPTH} levels; put parts of it in parentheses",
            MAX_DEPTH + 1,
        ),
        (
            f"{'+'.join(['joy(1)'] * (MAX_DEPTH + 2))}",
            f"nested deeper than {MAX_DEPTH} levels; put parts of it in parentheses",
            0,
        ),
        (
            f"fear*2 + joy{'(1)' * MAX_DEPTH}",
            f"nested deeper than {MAX_DEPTH} levels; put parts of it in parentheses",
            9,
        ),
        (
            "x" * (MAX_LENGTH + 1),
            f"expected at most {MAX_LENGTH} characters, got {MAX_LENGTH + 1}",
            MAX_LENGTH,
        ),
    ],
)
def test_a_refusal_says_what_and_where(text: str, problem: str, offset: int) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(text)
    error = caught.value
    assert (error.problem, error.offset) == (problem, offset)
    said, shown, caret = str(error).split("\n")
    assert said == f"recipe: {problem}"
    assert caret.strip() == "^"
    marked = shown[caret.index("^") :]
    expected = text[offset : offset + 40].translate(dict.fromkeys(map(ord, "\n\t"), " "))
    assert marked.rstrip() == expected.rstrip()


# Of the syntax tree and the parser: what a user who never saw either can't understand. Soup has no capitals.
FOREIGN = sorted(name for name in vars(ast) if name[0].isupper())
FOREIGN += ["Python", "syntax", "literal", "token", "forget", "argument", "expression", "tuple", "statement"]
_FOREIGN = re.compile(rf"\b({'|'.join(FOREIGN)})\b")


def read(text: str) -> Recipe | RecipeError:
    try:
        return parse(text)
    except RecipeError as refusal:
        return refusal


def in_own_words(error: RecipeError) -> bool:
    """Whether it says what is wrong without words of the parser, and where, under the text."""
    lines = str(error).split("\n")
    return not _FOREIGN.search(error.problem) and len(lines) == 3 and lines[2].strip() == "^"


@pytest.mark.parametrize(
    ("text", "offset", "suggestion"),
    [
        # a dose
        ("0.8joy", 3, "0.8*joy"),
        ("joy - 0.3anger + calm", 9, "0.3*anger"),
        ("joy 0.5", 4, "0.5*joy"),
        ("0.5 joy", 4, "0.5*joy"),
        ("0.5 x joy", 4, "0.5*joy"),
        ("joy X 0.5", 4, "0.5*joy"),
        ("0.5x joy", 3, "0.5*joy"),
        ("joy.5", 3, ".5*joy"),
        ("2.joy", 2, "2*joy"),
        ("joy=0.5", 3, "0.5*joy"),
        ("joy: 0.5", 3, "0.5*joy"),
        ("0,8*joy", 1, "0.8*joy"),
        ("joy - 0,3*anger", 7, "0.3*anger"),
        ("joy(0,5)", 5, "0.5"),
        ("gate(joy, on=fear, above=0,5)", 26, "0.5"),
        ("50% joy", 2, "0.5*joy"),
        ("50%*joy", 2, "0.5*joy"),
        ("nan*joy", 0, ""),
        ("joy * inf", 6, ""),
        ("-Infinity*joy", 1, ""),
        ("joy ** 2", 4, "2*joy"),
        ("joy ^ 2", 4, "2*joy"),
        ("joy % 2", 4, "2*joy"),
        ("joy // 2", 4, "joy/2"),
        ("joy @ 2", 4, "2*joy"),
        ("joy == 1", 4, "1*joy"),
        ("(joy := 1)", 5, "1*joy"),
        ("2*joy + 1j*joy", 9, "1*j"),
        ("07*joy", 0, "7"),
        ("1__0*joy", 0, "10"),
        # a sum
        ("joy fear", 4, "joy + fear"),
        ("joy, fear", 3, "joy + fear"),
        ("joy; fear", 3, "joy + fear"),
        ("joy & fear", 4, "joy + fear"),
        ("joy and anger", 4, "joy + anger"),
        ("joy or fear", 4, "joy + fear"),
        ("0.8*joy 0.3*anger", 8, "joy + 0.3*anger"),
        ("not joy", 0, "-joy"),
        ("joy + ~fear", 6, ""),
        ("joy - anger,", 11, "joy - anger"),
        ("+joy*", 5, "+joy"),
        ("joy +", 5, "joy"),
        ("* joy", 0, ""),
        ("joy * / 2", 6, ""),
        # parentheses and quotes
        ("(joy", 0, "(joy)"),
        ("fear + (joy", 7, "fear + (joy)"),
        ("fear + joy(2", 10, "fear + joy(2)"),
        ("joy)", 3, "joy"),
        ("joy) + fear", 3, ""),
        ("joy + ()", 6, ""),
        ("joy + (fear -)", 13, ""),
        ("joy[0]", 3, ""),
        ("{joy}", 0, ""),
        ("'joy'", 0, "joy"),
        ("'joy", 0, ""),
        ("joy(when='prompt)", 9, ""),
        ("joy 'slightly'", 4, "joy('slightly')"),
        ("f'{joy}'", 1, ""),
        ("joy(when='\\d')", 9, ""),
        # calls
        ("joy(when='prompt', 2)", 19, ""),
        ("joy(2, when='prompt', (3))", 22, ""),
        ("joy(start=)", 10, ""),
        ("joy(=2)", 4, ""),
        ("joy(True=2)", 8, ""),
        ("joy(,)", 4, ""),
        ("joy(*calm)", 4, ""),
        ("joy(x for x in calm)", 6, ""),
        ("joy(True)", 4, ""),
        ("clamp(joy, (1, (2, 3)))", 15, ""),
        ("gate(joy, on=fear, above=None)", 25, ""),
        # names
        ("joy + a.b.c", 9, ""),
        ("f(x).b", 4, ""),
        ("joy(0.5)(2).b", 11, ""),
        ("True*joy", 0, ""),
        ("None", 0, ""),
        ("joy²", 0, ""),
        ("joy\u200b + fear", 3, ""),
        ("joy if calm else fear", 4, ""),
        ("1if joy else 2", 1, ""),
        ("lambda: joy", 0, ""),
        ("import os", 0, ""),
        ("(yield)", 1, ""),
        ("pack.class", 5, ""),
        # files
        ("./warm.gguf", 0, "warm"),
        ("warm.gguf", 0, "warm"),
        ("0.5*'../my vectors/warm.gguf'", 4, "warm"),
        ("joy - my-warm.gguf", 6, ""),
    ],
)
def test_a_mistake_is_found_and_what_was_meant(text: str, offset: int, suggestion: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(text)
    assert (caught.value.offset, caught.value.suggestion) == (offset, suggestion)
    assert suggestion in str(caught.value)
    if suggestion and not suggestion.replace(".", "").isdigit():
        assert parse(suggestion).terms


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("0.8×joy − 0.3·anger", "0.8*joy - 0.3*anger"),
        ("joy ÷ 4 – fear", "joy/4 - fear"),
        ("joy(“slightly”) + fear(when=‘prompt’)", "joy('slightly') + fear(when='prompt')"),
        ("０．５＊joy（when＝'prompt'）", "0.5*joy(when='prompt')"),
    ],
)
def test_typographic_characters_are_read_as_plain_ones(text: str, same: str) -> None:
    assert parse(text) == parse(same)


def test_the_place_is_right_after_typographic_characters() -> None:
    with pytest.raises(RecipeError) as caught:
        parse("− joy + fear × anger")
    assert caught.value.offset == 8
    assert "− joy + fear × anger" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        f"{'-' * MAX_DEPTH}joy",
        "+".join(["joy"] * (MAX_DEPTH + 1)),
        f"joy{'(1)' * MAX_DEPTH}",
        "x" * MAX_LENGTH,
    ],
)
def test_the_limits_themselves_are_allowed(text: str) -> None:
    assert len(terms(parse(text))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "-" * 4000 + "joy",
        "(" * 150 + "joy" + ")" * 150 + ")",
        "joy\0",
        "\ud800joy",
        "joy\\\n+ fear",
        "1or joy",
        "0x",
    ],
)
def test_what_upsets_the_parser_itself_is_refused(text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(text)
    assert in_own_words(caught.value)


fragments = st.one_of(
    st.sampled_from(
        ["joy", "fear", "a.b", "1", "0", "2.5", "1e308", "1e999", "1j", "lambda ", " if ", " or "]
    ),
    st.sampled_from(["ablate(", "clamp(", "edit(", "scale(", "gate(", "purify(", ", on=joy", ", above=1"]),
    st.sampled_from(["(start=2)", "(stop=9)", "decay=", "turn=(1, 2)", "latch=True", ", 1)", ", ", "ablate"]),
    st.sampled_from("+-*/() \n#.,=:[]{}'\"\\~|_\0é"),
    st.sampled_from(["(0.5)", "when=", "'prompt'", '"response"', "(keep_norm=True)", "(when='all')"]),
)
soup = st.one_of(st.text(max_size=40), st.lists(fragments, max_size=30).map("".join))


@given(soup)
@example("1if joy else 2")
def test_any_text_is_a_recipe_or_a_recipe_error(text: str) -> None:
    recipe = read(text)
    if isinstance(recipe, RecipeError):
        assert in_own_words(recipe)
        assert recipe.offset is not None
        assert 0 <= recipe.offset <= len(text)
        return
    assert all(math.isfinite(c) and c != 0 for c, _ in terms(recipe))
    assert len({term.text for term in recipe.terms}) == len(recipe.terms)
    assert parse(str(recipe)) == recipe


@st.composite
def python(draw: st.DrawFn, depth: int = 3) -> str:
    """A Python expression of any kind: every node of the syntax tree has a turn."""
    leaves = ["joy", "fear", "2", "0.5", "1j", "'joy'", "b'x'", "True", "None", "...", "f'{joy}'"]
    shapes = [
        "{a} + {b}", "{a} ** {b}", "{a} % {b}", "{a} // {b}", "{a} @ {b}", "{a} << {b}", "{a} >> {b}",
        "{a} | {b}", "{a} ^ {b}", "{a} & {b}", "({a}) * ({b})", "({a}) / ({b})", "-{a}", "~{a}", "not {a}",
        "{a} and {b}", "{a} or {b}", "{a} < {b}", "{a} is {b}", "{a} not in {b}", "{a} if {b} else {a}",
        "lambda x: {a}", "(x := {a})", "{a}, {b}", "({a}, {b})", "[{a}, {b}]", "{{{a}, {b}}}",
        "{{{a}: {b}}}", "[x for x in {a}]", "{{x for x in {a}}}", "{{x: {b} for x in {a}}}",
        "(x for x in {a})", "({a})[{b}]", "({a})[{a}:{b}]", "({a}).real", "({a})({b})", "({a})(*{b})",
        "({a})(**{b})", "({a})(dose={b})", "({a})(when={b})", "({a})(turn={b})", "(yield {a})",
        "(yield from {a})", "(await {a})", "ablate({a})", "clamp({a}, {b})", "purify({a}, {b})",
        "gate({a}, on={b}, above={a})", "scale({a}, {b})", "edit({a}, margin={b})", "*{a}, {b}",
    ]  # fmt: skip
    if not depth:
        return draw(st.sampled_from(leaves))
    a, b = draw(python(depth - 1)), draw(python(draw(st.integers(0, depth - 1))))
    return draw(st.sampled_from([*leaves, *shapes])).format(a=a, b=b, joy="joy")


@given(python())
def test_any_expression_is_refused_in_the_words_of_recipes(text: str) -> None:
    found = read(text)
    assert isinstance(found, Recipe) or in_own_words(found)


@given(linear())
def test_a_recipe_has_no_mistake_in_it(text: str) -> None:
    parse(text)
    assert misread(text) is None


@pytest.mark.parametrize(
    ("term", "problem"),
    [
        (Term(1.0, "joy", "later"), "when: expected one of 'all', 'prompt', 'response', got 'later'"),
        (
            Term(1.0, "joy", operator="boost"),
            "operator: expected one of add, ablate, clamp, edit, scale, force, ",
        ),
        (Term(2.0, "joy", operator="ablate"), "ablate(joy): ablate takes a strength from 0 to 1, got 2"),
        (Term(math.nan, "joy", operator="edit", value=(1.0,)), "edit takes a strength from 0 to 1, got nan"),
        (Term(2.0, "joy", operator="force"), "force(joy): force takes no coefficient, got 2"),
        (Term(1.0, "joy", "all", True, "scale"), "only what is added can keep the norm"),
        (Term(1.0, "joy", "prompt", start=1), "start, stop, ramp and decay count tokens of the reply"),
        (Term(1.0, "joy", start=-1), "expected 0 <= start < stop, ramp from 0 and decay above 0"),
        (Term(1.0, "joy", start=3, stop=3), "expected 0 <= start < stop, ramp from 0 and decay above 0"),
        (Term(1.0, "joy", ramp=-1), "expected 0 <= start < stop, ramp from 0 and decay above 0"),
        (Term(1.0, "joy", decay=0.0), "expected 0 <= start < stop, ramp from 0 and decay above 0"),
        (Term(1.0, "joy", decay=math.nan), "expected 0 <= start < stop, ramp from 0 and decay above 0"),
    ],
)
def test_a_term_made_by_hand_must_have_a_meaning(term: Term, problem: str) -> None:
    with pytest.raises(RecipeError) as caught:
        require_sound(term)
    assert problem in str(caught.value)


# The other forms.


def test_every_form_becomes_a_recipe() -> None:
    vector, recipe = make_vector("joy"), parse("2*joy")
    assert as_recipe("2*joy") == recipe
    assert as_recipe(recipe) is recipe
    assert as_recipe(None) == Recipe()
    assert as_recipe({"joy": 2, "pack.fear": -0.5, "calm": 0}) == parse("2*joy - 0.5*pack.fear")
    assert as_recipe({}) == Recipe()
    assert as_recipe({"joy": np.float32(0.5)}) == parse("0.5*joy")
    assert as_recipe(vector) == Recipe((Term(1.0, vector),))
    assert str(as_recipe(vector)) == "joy"
    assert str(Recipe((Term(-0.5, vector, "prompt", True),))) == '-0.5*joy(when="prompt", keep_norm=True)'


@pytest.mark.parametrize(
    ("recipe", "problem"),
    [
        (3, "expected text, a Vector or {name: coefficient}, got int"),
        (["joy"], "expected text, a Vector or {name: coefficient}, got list"),
        (b"joy", "expected text, a Vector or {name: coefficient}, got bytes"),
        ({"joy": math.nan}, "joy: expected a finite number, got nan"),
        ({"joy": -math.inf}, "joy: expected a finite number, got -inf"),
        ({"joy": "much"}, "joy: expected a finite number, got 'much'"),
        ({"joy": None}, "joy: expected a finite number, got None"),
        ({"joy": 10**400}, f"joy: expected a finite number, got 1{'0' * 39}"),
        ({"joy + fear": 2}, "expected a vector's name, got 'joy + fear'"),
        ({"joy(0.5)": 2}, "expected a vector's name, got 'joy(0.5)'"),
        ({"": 1}, "expected a vector's name, got ''"),
        ({"joy.": 1}, "expected a vector's name, got 'joy.'"),
        ({1: 1}, "expected a vector's name, got 1"),
        ({"None": 1}, NO_VALUE.format("None")),
        ({"a.b.c": 1}, "a vector's name has at most one dot: pack.joy"),
    ],
)
def test_other_forms_are_refused(recipe: Any, problem: str) -> None:
    with pytest.raises(RecipeError) as caught:
        as_recipe(recipe)
    assert caught.value.problem == problem


def test_levels_are_doses_that_grow_to_the_full_one() -> None:
    doses = list(LEVELS.values())
    assert doses == sorted(doses)
    assert doses[-1] == 1.0
    for name, dose in LEVELS.items():
        assert parse(f'joy("{name}")') == parse(f"{dose}*joy")


def test_an_unknown_level_lists_the_known_ones() -> None:
    with pytest.raises(RecipeError, match=r"expected a level \(slightly, somewhat.*got 'much'"):
        parse('joy("much")')


# ---- the quick way ----

_NUMBERS = st.one_of(
    st.integers(0, 10**20).map(str),
    st.floats(0, 1e6).map("{:.5f}".format),
    st.sampled_from(["0", "0.0", "00", "007", "1.", ".5", "1e3", "1_0", "9" * 400]),
)
_NAMES = st.one_of(st.sampled_from(["joy", "fear", "clamp", "and", "True", "größe", "_", "a.b", "x1"]))
_BLANKS = st.sampled_from(["", " ", "  ", "\t", "\n"])


@st.composite
def sums(draw: st.DrawFn) -> str:
    parts = []
    for i in range(draw(st.integers(1, 5))):
        sign = draw(st.sampled_from(["+", "-", "", "--", "+ -"] if i == 0 else ["+", "-", "- -", ""]))
        factor = draw(st.sampled_from(["", "{}*", "{} * ", "{}", "{}/"])).format(draw(_NUMBERS))
        parts += [sign, draw(_BLANKS), factor, draw(_NAMES), draw(_BLANKS)]
    return "".join(parts)


@given(text=sums())
def test_a_sum_is_read_quickly_as_it_is_read_slowly(text: str) -> None:
    quick = recipe_module._plain_sum(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe_module, "_plain_sum", lambda text: None)
        try:
            slow = parse.__wrapped__(text)
        except RecipeError:
            assert quick is None
            return
    assert quick is None or Recipe(quick) == slow


@pytest.mark.parametrize(
    "text",
    ["joy", "0.8*joy - 0.3*anger", " - joy+2 * fear ", "joy + joy", "0*joy", "-0.5*joy", "1*_x - 0.1*_x"],
)
def test_most_recipes_are_read_quickly(text: str) -> None:
    assert recipe_module._plain_sum(text) is not None
