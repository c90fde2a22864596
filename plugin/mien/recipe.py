"""Recipes: what the user asks for, an expression over vectors.

    joy
    0.8*joy - 0.3*anger
    2 * (joy - smollm2_135m_instruct.fear) / 3
    joy(0.7, when="response") + (calm - anger)(keep_norm=True)

A recipe is a Python expression, parsed with `ast` and never evaluated as code. This version knows
numbers, names, `pack.name`, `+ - * /`, unary minus and parentheses, as far as the result is linear in
the vectors, and calls on a vector or a sum of them:

    x(0.7)                0.7 * x
    x(when="response")    only on tokens of the reply; "prompt": only on what the model is given
    x(keep_norm=True)     add, and give the row its length back

Operators (`ablate(...)` and the like) are refused with a message that says so.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from .errors import RecipeError

if TYPE_CHECKING:
    from .vector import Vector

MAX_LENGTH = 4096
MAX_DEPTH = 100

WINDOWS = ("all", "prompt", "response")

_BLANK = re.compile(r"\s")


@dataclass(frozen=True)
class Term:
    """`coefficient` (a dose: 1.0 is the strongest fluent one) times a vector or the name of one.

    when: the tokens it acts on, one of WINDOWS. keep_norm: whether the row gets its length back.
    """

    coefficient: float
    vector: str | Vector
    when: str = "all"
    keep_norm: bool = False

    @property
    def name(self) -> str:
        return self.vector if isinstance(self.vector, str) else self.vector.name

    @property
    def call(self) -> str:
        """What follows the name in a recipe's text."""
        said = [f'when="{self.when}"'] * (self.when != "all") + ["keep_norm=True"] * self.keep_norm
        return f"({', '.join(said)})" if said else ""


@dataclass(frozen=True)
class Recipe:
    """A sum of terms, none twice in the same manner, none with coefficient 0. Empty: no steering."""

    terms: tuple[Term, ...] = ()

    def __str__(self) -> str:
        """The text that parses to the same recipe (where every vector has a name)."""
        parts = []
        for term in self.terms:
            sign = "-" if term.coefficient < 0 else "+"
            size = abs(term.coefficient)
            body = f"{term.name}{term.call}"
            if size != 1:
                body = f"{size!r}*{body}"
            parts.append(f"{sign} {body}")
        text = " ".join(parts)
        return text[2:] if text.startswith("+ ") else text.replace("- ", "-", 1)


RecipeLike: TypeAlias = "str | Recipe | Vector | Mapping[str, float] | None"


def as_recipe(recipe: RecipeLike) -> Recipe:
    """A Recipe from text, a Vector, {name: coefficient}, a Recipe, or None for no steering.

    Raises RecipeError.
    """
    if isinstance(recipe, str):
        return parse(recipe)
    if isinstance(recipe, Recipe):
        return recipe
    if recipe is None:
        return Recipe()
    if isinstance(recipe, Mapping):
        return parse(" + ".join(_dose(name, coefficient) for name, coefficient in recipe.items()))
    from .vector import Vector

    if isinstance(recipe, Vector):
        return Recipe((Term(1.0, recipe),))
    raise RecipeError(f"expected text, a Vector or {{name: coefficient}}, got {type(recipe).__name__}")


def _dose(name: str, coefficient: float) -> str:
    """The term as text; a name that is an expression itself would be read as one."""
    if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
        raise RecipeError(f"expected a vector's name, got {name!r}")
    try:
        number = float(coefficient)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise RecipeError(f"{name}: expected a finite number, got {coefficient!r:.40}")
    return f"{number!r}*{name}"


@lru_cache(maxsize=256)
def parse(text: str) -> Recipe:
    """Parse `text`; blank text is the empty recipe.

    Raises RecipeError with the place: bad syntax, a number that is not finite, what is not linear,
    what this version does not know, text over MAX_LENGTH characters or MAX_DEPTH levels.
    """
    if len(text) > MAX_LENGTH:
        raise RecipeError(f"expected at most {MAX_LENGTH} characters, got {len(text)}")
    if not text.strip():
        return Recipe()
    if "#" in text:  # to Python the rest would be a comment, over line ends too once they are blanks
        raise RecipeError("comments have no place in a recipe", text, text.index("#"))
    # Blanks of any kind may stand anywhere; one character each, so that places stay what they are.
    line = _BLANK.sub(" ", text)
    indent = len(line) - len(line.lstrip())
    try:
        tree = ast.parse(line[indent:], mode="eval")
    except SyntaxError as error:
        # Python counts from 1, and says 0 where the text ends too early
        place = min(indent + error.offset - 1, len(text)) if error.offset else len(text)
        raise RecipeError(f"can't be read ({error.msg})", text, place) from None
    except (RecursionError, MemoryError, ValueError) as error:
        raise RecipeError(f"can't be read ({error or 'nested too deeply'})", text) from None
    value = _Reader(text).value(tree.body, 0)
    if isinstance(value, float):
        if value == 0:
            return Recipe()
        raise RecipeError(f"the number {value:g} alone steers nothing; name a vector", text, 0)
    return Recipe(tuple(Term(c, *manner) for manner, c in value.items() if c != 0))


class _Manner(NamedTuple):
    """A vector's name and how it is added: the rest of a Term."""

    name: str
    when: str = "all"
    keep_norm: bool = False


Linear: TypeAlias = "float | dict[_Manner, float]"  # a number, or coefficients


class _Reader:
    """Walks the tree from the leaves up; every node is linear in the names or an error.

    Recipes may change before every token, so this is kept quick: types are compared, not matched.
    """

    def __init__(self, text: str) -> None:
        self.text = text

    def value(self, node: ast.expr, depth: int) -> Linear:
        if depth > MAX_DEPTH:
            raise self.error(f"nested deeper than {MAX_DEPTH} levels", node)
        kind = type(node)
        if kind is ast.BinOp:
            return self.binary(node, depth)  # type: ignore[arg-type]  # by kind
        if kind is ast.Name:
            return {_Manner(node.id): 1.0}  # type: ignore[attr-defined]
        if kind is ast.Constant and type(node.value) in (int, float):  # type: ignore[attr-defined]
            return self.finite(node.value, node)  # type: ignore[attr-defined]
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            return {_Manner(f"{node.value.id}.{node.attr}"): 1.0}
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
            sign = -1.0 if isinstance(node.op, ast.USub) else 1.0
            return self.scaled(self.value(node.operand, depth + 1), sign, node)
        if isinstance(node, ast.Call):
            return self.call(node, depth)
        raise self.error(f"{kind.__name__} has no meaning in a recipe; use numbers, names, + - * /", node)

    def call(self, node: ast.Call, depth: int) -> Linear:
        value = self.value(node.func, depth + 1)
        if isinstance(value, float):
            raise self.error("a number can't be called; write * between a number and a vector", node)
        doses = [self.value(argument, depth + 1) for argument in node.args]
        if len(doses) > 1 or any(not isinstance(dose, float) for dose in doses):
            raise self.error(
                "a call takes one number, the dose, when= and keep_norm=; operators such as ablate(...) are "
                "not in this version yet",
                node,
            )
        for dose in doses:
            self.scaled(value, dose, node)  # type: ignore[arg-type]  # floats, as checked; in place
        if len({keyword.arg for keyword in node.keywords}) < len(node.keywords):
            raise self.error("a keyword is given twice", node)
        for keyword in node.keywords:
            value = self.changed(value, keyword)
        return value

    def changed(self, value: dict[_Manner, float], keyword: ast.keyword) -> dict[_Manner, float]:
        """`value` with every term added in the manner that the keyword says."""
        name, said = keyword.arg, getattr(keyword.value, "value", None)
        if name == "when":
            if said not in WINDOWS:
                raise self.error(f"when: expected one of {', '.join(map(repr, WINDOWS))}", keyword.value)
        elif name == "keep_norm":
            if not isinstance(said, bool):
                raise self.error("keep_norm: expected True or False", keyword.value)
        else:
            raise self.error(
                f"no {name or '**'} here; a call takes a dose, when= and keep_norm=", keyword.value
            )
        result: dict[_Manner, float] = {}
        for manner, coefficient in value.items():
            if getattr(manner, name) != _Manner._field_defaults[name]:
                raise self.error(f"{name} is given twice for {manner.name}", keyword.value)
            result[manner._replace(**{name: said})] = coefficient  # type: ignore[arg-type]  # checked above
        return result

    def binary(self, node: ast.BinOp, depth: int) -> Linear:
        kind = type(node.op)
        a, b = self.value(node.left, depth + 1), self.value(node.right, depth + 1)
        if kind is ast.Mult:
            if isinstance(a, float):
                return self.scaled(b, a, node)
            if isinstance(b, float):
                return self.scaled(a, b, node)
            raise self.error("the product of two vectors has no meaning; one side must be a number", node)
        if kind is ast.Add:
            return self.added(a, b, 1.0, node)
        if kind is ast.Sub:
            return self.added(a, b, -1.0, node)
        if kind is ast.Div:
            if not isinstance(b, float):
                raise self.error("can't divide by a vector", node)
            if b == 0:
                raise self.error("division by zero", node)
            if isinstance(a, float):
                return self.finite(a / b, node)
            return {manner: self.finite(c / b, node) for manner, c in a.items()}
        raise self.error(f"{kind.__name__} has no meaning in a recipe; use + - * /", node)

    def added(self, a: Linear, b: Linear, sign: float, node: ast.expr) -> Linear:
        if isinstance(a, dict) and isinstance(b, dict):
            for manner, coefficient in b.items():  # `a` is nobody else's
                a[manner] = self.finite(a.get(manner, 0.0) + sign * coefficient, node)
            return a
        if isinstance(a, float) and isinstance(b, float):
            return self.finite(a + sign * b, node)
        raise self.error("a vector and a plain number don't add up; did you mean * ?", node)

    def scaled(self, value: Linear, factor: float, node: ast.expr) -> Linear:
        if isinstance(value, float):
            return self.finite(value * factor, node)
        for manner, coefficient in value.items():
            value[manner] = self.finite(coefficient * factor, node)
        return value

    def finite(self, number: float, node: ast.expr) -> float:
        try:
            number = float(number)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise self.error("a coefficient is not finite", node)
        return number

    def error(self, problem: str, node: ast.expr) -> RecipeError:
        # ast counts bytes of the line without its indent
        indent = len(self.text) - len(self.text.lstrip())
        before = self.text[indent:].encode()[: node.col_offset].decode(errors="ignore")
        return RecipeError(problem, self.text, indent + len(before))
