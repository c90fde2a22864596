from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from makers import make_vector
from mien.errors import RecipeError
from mien.recipe import MAX_DEPTH, MAX_LENGTH, WINDOWS, Recipe, Term, as_recipe, parse


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
        ("joy(when='all', keep_norm=False)", [Term(1.0, "joy")]),
        ("joy(when='all')(when='prompt')", [Term(1.0, "joy", "prompt")]),
        ("joy(keep_norm=True)", [Term(1.0, "joy", "all", True)]),
        ("joy(keep_norm=False)(keep_norm=True)", [Term(1.0, "joy", "all", True)]),
        ("joy(-0.5, keep_norm=True, when='prompt')", [Term(-0.5, "joy", "prompt", True)]),
        ("2*joy(keep_norm=True)(0.5)(when='prompt')/4", [Term(0.25, "joy", "prompt", True)]),
        ("joy (\n0.5 ,\twhen = 'prompt' , )", [Term(0.5, "joy", "prompt")]),
        (
            "(calm - anger)(keep_norm=True)",
            [Term(1.0, "calm", "all", True), Term(-1.0, "anger", "all", True)],
        ),
        (
            "(calm - 2*anger)(0.5, when='prompt')",
            [Term(0.5, "calm", "prompt"), Term(-1.0, "anger", "prompt")],
        ),
        (
            "(joy(when='prompt') + calm)(keep_norm=True)",
            [Term(1.0, "joy", "prompt", True), Term(1.0, "calm", "all", True)],
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
                Term(2.0, "joy", "all", True),
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
        ("joy(1, when='all', keep_norm=False)", "joy"),
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


class Unit(np.ndarray):
    """Coefficients by (name, window, keep_norm). Python does the sums; a call moves them elsewhere."""

    def __call__(self, dose: float = 1, *, when: str = "all", keep_norm: bool = False) -> Any:
        return np.roll(self * dose, (WINDOWS.index(when), int(keep_norm)), axis=(1, 2))


def by_numpy(text: str) -> dict[tuple[str, str, bool], float]:
    """Python's own value of the text, where each name is a unit vector of NumPy."""
    scope: dict[str, Any] = {"__builtins__": {}}
    for i, name in enumerate(NAMES):
        scope[name.replace(".", "_")] = np.zeros((len(NAMES), len(WINDOWS), 2)).view(Unit)
        scope[name.replace(".", "_")][i, 0, 0] = 1
    value = eval(" ".join(text.replace("pack.joy", "pack_joy").split()), scope)
    return {(NAMES[i], WINDOWS[w], bool(k)): float(value[i, w, k]) for i, w, k in np.argwhere(value)}


@given(linear())
def test_a_linear_expression_has_the_value_that_python_gives_it(text: str) -> None:
    found = {(term.name, term.when, term.keep_norm): term.coefficient for term in parse(text).terms}
    assert found == by_numpy(text)


@given(linear())
def test_the_canonical_text_parses_to_the_same_recipe(text: str) -> None:
    recipe = parse(text)
    assert parse(str(recipe)) == recipe
    assert str(parse(str(recipe))) == str(recipe)


# What is refused: the problem, and the place.

CALL = (
    "a call takes one number, the dose, when= and keep_norm=; "
    "operators such as ablate(...) are not in this version yet"
)
NO_CALL = "a number can't be called; write * between a number and a vector"
WINDOW = "when: expected one of 'all', 'prompt', 'response'"
NORM = "keep_norm: expected True or False"
NO_SUM = "a vector and a plain number don't add up; did you mean * ?"
NO_PRODUCT = "the product of two vectors has no meaning; one side must be a number"
ONLY = "has no meaning in a recipe; use numbers, names, + - * /"
ONLY_OPERATORS = "has no meaning in a recipe; use + - * /"


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
        ("joy ** 2", f"Pow {ONLY_OPERATORS}", 0),
        ("joy % 2", f"Mod {ONLY_OPERATORS}", 0),
        ("joy // 2", f"FloorDiv {ONLY_OPERATORS}", 0),
        ("joy @ 2", f"MatMult {ONLY_OPERATORS}", 0),
        ("joy + ablate(fear)", CALL, 6),
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
        ("joy(dose=2)", "no dose here; a call takes a dose, when= and keep_norm=", 9),
        ("joy(_replace=2)", "no _replace here; a call takes a dose, when= and keep_norm=", 13),
        ("joy(name='fear')", "no name here; a call takes a dose, when= and keep_norm=", 9),
        ("fear + joy(**calm)", "no ** here; a call takes a dose, when= and keep_norm=", 13),
        ("joy(*calm)", f"Starred {ONLY}", 4),
        ("joy(x for x in calm)", f"GeneratorExp {ONLY}", 3),
        ("joy('prompt')", f"Constant {ONLY}", 4),
        ("joy(True)", f"Constant {ONLY}", 4),
        ("joy(when='prompt')(when='response')", "when is given twice for joy", 24),
        ("joy(when='prompt')(2, when='prompt')", "when is given twice for joy", 27),
        ("joy(when='prompt')(when='all')", "when is given twice for joy", 24),
        ("fear + (calm - a.b(keep_norm=True))(keep_norm=False)", "keep_norm is given twice for a.b", 46),
        ("joy(when='prompt', when='all')", "a keyword is given twice", 0),
        ("joy(when='prompt', 2)", "can't be read (positional argument follows keyword argument)", 20),
        ("fear + joy(2", "can't be read ('(' was never closed)", 10),
        ("fear + joy(1e999)", "a coefficient is not finite", 11),
        ("fear + 1e308*joy(10)*2", "a coefficient is not finite", 7),
        ("fear + joy(1e308)(10)", "a coefficient is not finite", 7),
        ("joy(1 / 0)", "division by zero", 4),
        ("joy(when='prompt') + 1", NO_SUM, 0),
        ("fear + joy(2)*calm(when='prompt')", NO_PRODUCT, 7),
        ("joy(0.5)(2).b", f"Attribute {ONLY}", 0),
        ("joy(when='#')", "comments have no place in a recipe", 10),
        ("joy + fear[0]", f"Subscript {ONLY}", 6),
        ("'joy'", f"Constant {ONLY}", 0),
        ("True*joy", f"Constant {ONLY}", 0),
        ("None", f"Constant {ONLY}", 0),
        ("2*joy + 1j*joy", f"Constant {ONLY}", 8),
        ("joy + a.b.c", f"Attribute {ONLY}", 6),
        ("f(x).b", f"Attribute {ONLY}", 0),
        ("joy if calm else fear", f"IfExp {ONLY}", 0),
        ("lambda: joy", f"Lambda {ONLY}", 0),
        ("joy == 1", f"Compare {ONLY}", 0),
        ("joy or fear", f"BoolOp {ONLY}", 0),
        ("joy + ~fear", f"UnaryOp {ONLY}", 6),
        ("not joy", f"UnaryOp {ONLY}", 0),
        ("joy, fear", f"Tuple {ONLY}", 0),
        ("(joy := 1)", f"NamedExpr {ONLY}", 1),
        ("f'{joy}'", f"JoinedStr {ONLY}", 0),
        ("joy + 1e999*fear", "a coefficient is not finite", 6),
        ("1e308*10*joy", "a coefficient is not finite", 0),
        ("joy + fear*1e308*10", "a coefficient is not finite", 6),
        ("1e308*joy + 1e308*joy", "a coefficient is not finite", 0),
        ("joy/1e-308/1e-308", "a coefficient is not finite", 0),
        (f"joy*1{'0' * 400}", "a coefficient is not finite", 4),
        ("joy # why", "comments have no place in a recipe", 4),
        ("joy # why\n+ fear", "comments have no place in a recipe", 4),
        ("joy)", "can't be read (unmatched ')')", 3),
        ("fear + (joy", "can't be read ('(' was never closed)", 7),
        ("joy fear", "can't be read (invalid syntax)", 4),
        ("* joy", "can't be read (invalid syntax)", 0),
        ("joy +", "can't be read (invalid syntax)", 5),
        ("joy × 2", "can't be read (invalid character '×' (U+00D7))", 4),
        ("import os", "can't be read (invalid syntax)", 0),
        ("  \n größe + 1", NO_SUM, 4),
        ("größe + 喜び * 喜び", NO_PRODUCT, 8),
        ("joy +\n\t fear * anger", NO_PRODUCT, 8),
        (f"{'-' * (MAX_DEPTH + 1)}joy", f"nested deeper than {MAX_DEPTH} levels", MAX_DEPTH + 1),
        (f"{'+'.join(['joy'] * (MAX_DEPTH + 2))}", f"nested deeper than {MAX_DEPTH} levels", 0),
        (f"fear*2 + joy{'(1)' * MAX_DEPTH}", f"nested deeper than {MAX_DEPTH} levels", 9),
        ("x" * (MAX_LENGTH + 1), f"expected at most {MAX_LENGTH} characters, got {MAX_LENGTH + 1}", None),
    ],
)
def test_a_refusal_says_what_and_where(text: str, problem: str, offset: int | None) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(text)
    error = caught.value
    assert (error.problem, error.offset) == (problem, offset)
    lines = str(error).split("\n")
    assert lines[0] == f"recipe: {problem}"
    if offset is None:
        assert len(lines) == 1
    else:
        _, shown, caret = lines
        assert caret.strip() == "^"
        marked = shown[caret.index("^") :]
        expected = text[offset : offset + 40].translate(dict.fromkeys(map(ord, "\n\t"), " "))
        assert marked.rstrip() == expected.rstrip()


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
    with pytest.raises(RecipeError, match=r"can't be read|has no meaning"):
        parse(text)


fragments = st.one_of(
    st.sampled_from(
        ["joy", "fear", "a.b", "1", "0", "2.5", "1e308", "1e999", "1j", "lambda ", " if ", " or "]
    ),
    st.sampled_from("+-*/() \n#.,=:[]{}'\"\\~|_\0é"),
    st.sampled_from(["(0.5)", "when=", "'prompt'", '"response"', "(keep_norm=True)", "(when='all')"]),
)
soup = st.one_of(st.text(max_size=40), st.lists(fragments, max_size=30).map("".join))


@given(soup)
@example("1if joy else 2")
def test_any_text_is_a_recipe_or_a_recipe_error(text: str) -> None:
    try:
        recipe = parse(text)
    except RecipeError as refusal:
        recipe, place = Recipe(), refusal.offset or 0
    else:
        place = 0
    assert 0 <= place <= len(text)
    assert all(math.isfinite(c) and c != 0 for c, _ in terms(recipe))
    assert len({(term.name, term.when, term.keep_norm) for term in recipe.terms}) == len(recipe.terms)
    assert parse(str(recipe)) == recipe


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
        ({"None": 1}, f"Constant {ONLY}"),
        ({"a.b.c": 1}, f"Attribute {ONLY}"),
    ],
)
def test_other_forms_are_refused(recipe: Any, problem: str) -> None:
    with pytest.raises(RecipeError) as caught:
        as_recipe(recipe)
    assert caught.value.problem == problem
