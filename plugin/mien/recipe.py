"""Recipes: what the user asks for, an expression over vectors.

    joy
    0.8*joy - 0.3*anger
    2 * (joy - 0.5*smollm2_135m_instruct.fear) / 3
    joy(0.7, when="response") + (calm - 0.3*anger)(keep_norm=True)
    ablate(refusal) + clamp(calm, 1.0) + 0.5*purify(openness, conscientiousness)
    gate(calm(decay=40), on=anger, above=0.5)

A recipe is a Python expression, parsed with `ast` and never evaluated as code: numbers, names,
`pack.name`, `+ - * /`, unary minus and parentheses, as far as the result is linear in the vectors, and
calls. Calls on a vector or a sum say how much and when:

    x(0.7)                0.7 * x
    x("slightly")         the same by name: slightly, somewhat, moderately, very, extremely (LEVELS)
    x(keep_norm=True)     add, and give the row its length back
    x(when="response")    only on tokens of the reply; "prompt": only on what the model is given; "all": on
                          both. Where it is not said, the vector says it (Vector.when), mostly "all"
    x(start=5, stop=50)   only on these tokens of the reply, counted from 0, `stop` left out
    x(ramp=10)            over the first 10 of them growing to the full dose
    x(decay=40)           halved every 40 of them
    x(turn=2)             only in the second reply of a chat; turn=(2, 4): in those from 2 to 4

Calls of an operator make a term of vectors:

    ablate(v)             the component along v is removed; 0.5*ablate(v): half of it
    clamp(v, x)           the component along v becomes x; of a subspace x may be a tuple
    edit(v, margin=m)     v is a linear probe: a row short of the margin is moved up to it
    scale(v, x)           each float times 1 + x*v, by default 1 + v: heads and neurons by their gain
    force(v), forbid(v)   the experts that v marks are always, or never, chosen by the router
    gate(term, on=v, above=t, below=u, hysteresis=d, latch=True)
                          the term acts only on tokens whose readout of v passes the threshold
    purify(a, b, ...)     a with the span of the others removed, as a vector
"""

from __future__ import annotations

import ast
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache
from keyword import iskeyword
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from .errors import RecipeError
from .misreading import file_in_place_of_a_name, misread, plain
from .registry import pack_in_place_of_a_namespace

if TYPE_CHECKING:
    from .vector import Vector

MAX_LENGTH = 4096
MAX_DEPTH = 100
MAX_GATES = 4  # around one term
_LONG = 32  # terms of a sum that are written side by side: each is one level deeper than the next

WINDOWS = ("all", "prompt", "response")
# Doses by name: five levels in equal steps, as SAC grades a trait (arXiv 2506.20993), the highest full dose.
LEVELS = {"slightly": 0.2, "somewhat": 0.4, "moderately": 0.6, "very": 0.8, "extremely": 1.0}
# What makes a term of vectors; "add" is what a term is without one.
OPERATORS = ("add", "ablate", "clamp", "edit", "scale", "force", "forbid")
DEFAULT_MARGIN = math.log(0.99 / 0.01)  # the logit of a probability of 0.99, as in arXiv 2504.10227

_BLANK = re.compile(r"\s")
_PLAIN_TERM = re.compile(r" *([+-]?) *(?:((?:0|[1-9][0-9]*)(?:\.[0-9]+)?) *\* *)?([A-Za-z_][A-Za-z0-9_]*) *")
_WARNED_OF = re.compile(r"[0-9]\.?[^\W\d]|\\")  # a number that runs into a word, or a backslash
_NAMED = ("nan", "inf", "infinity")  # numbers elsewhere


class Pure(NamedTuple):
    """`purify(vector, *without)`."""

    vector: str | Vector
    without: tuple[str | Vector, ...]

    def __str__(self) -> str:
        return f"purify({', '.join(map(_name, (self.vector, *self.without)))})"


class Mix(NamedTuple):
    """A sum of vectors inside of an operator: (coefficient, what) in order."""

    parts: tuple[tuple[float, str | Vector | Pure], ...]

    def __str__(self) -> str:
        return _sum((c, _name(source)) for c, source in self.parts)


Source: TypeAlias = "str | Vector | Pure | Mix"


class Gate(NamedTuple):
    """A condition on the readout of `on`, in calibrated units, of the row that a term would act on.

    It is open where above < readout < below (None is no bound). hysteresis: once open it stays so until
    the readout is that far back over the bound; latch: once open it stays so for the rest of the reply.
    Both remember from one token of a reply to the next; on a prompt every token is decided by itself.
    """

    on: Source
    above: float | None = None
    below: float | None = None
    hysteresis: float = 0.0
    latch: bool = False

    def __str__(self) -> str:
        said = [f"on={_name(self.on)}"]
        said += [
            f"{key}={value!r}"
            for key, value in zip(self._fields[1:], self[1:])
            if value != self._field_defaults[key]
        ]
        return ", ".join(said)


@dataclass(frozen=True)
class Term:
    """`coefficient` (a dose: 1.0 is the strongest fluent one) times what `operator` does with `vector`.

    when: the tokens it acts on, one of WINDOWS, or "" for those that its vector is made for. keep_norm: of
    "add", whether the row gets its length back. operator: one of OPERATORS. value: of "clamp" the readouts
    to reach, of "edit" the margin. start, stop, ramp, decay: counts of tokens of the reply, see the module;
    with one of them the term acts on the reply alone. turn: first and last reply of a chat, counted from 1.
    gates: all must be open.
    """

    coefficient: float
    vector: Source
    when: str = ""
    keep_norm: bool = False
    operator: str = "add"
    value: tuple[float, ...] = ()
    start: int = 0
    stop: int | None = None
    ramp: int = 0
    decay: float | None = None
    turn: tuple[int, int | None] | None = None
    gates: tuple[Gate, ...] = ()

    @property
    def name(self) -> str:
        return _name(self.vector)

    @property
    def text(self) -> str:
        """The term without its coefficient, as in a recipe."""
        said = [f"keep_norm={self.keep_norm}"] if self.keep_norm else []
        if self.turn is not None:
            first, last = self.turn
            said.append(f"turn={first if first == last else self.turn}")
        for key in ("decay", "ramp", "stop", "start"):
            if getattr(self, key) != Term.__dataclass_fields__[key].default:
                said.insert(0, f"{key}={getattr(self, key)!r}")
        if self.when:
            said.insert(0, f'when="{self.when}"')
        if self.operator == "edit":
            said[:0] = [] if self.value in ((), (DEFAULT_MARGIN,)) else [f"margin={self.value[0]!r}"]
        elif self.value:
            said.insert(0, repr(self.value if len(self.value) > 1 else self.value[0]))
        if self.operator != "add":
            body = f"{self.operator}({', '.join([self.name, *said])})"
        else:
            body = f"{self.name}({', '.join(said)})" if said else self.name
        for gate in self.gates:
            body = f"gate({body}, {gate})"
        return body


@dataclass(frozen=True)
class Recipe:
    """A sum of terms, none twice in the same manner, none with coefficient 0. Empty: no steering.

    plain: known to be nothing but names of vectors with numbers before them.
    """

    terms: tuple[Term, ...] = ()
    plain: bool = field(default=False, compare=False, repr=False)

    def __str__(self) -> str:
        """The text that parses to the same recipe: where vectors have names, and up to MAX_LENGTH."""
        return _sum((term.coefficient, term.text) for term in self.terms)


def _name(source: Source) -> str:
    return str(source) if isinstance(source, (str, Pure, Mix)) else source.name


def _sum(terms: Iterable[tuple[float, str]]) -> str:
    terms = list(terms)
    if len(terms) > _LONG:
        middle = len(terms) // 2
        return f"({_sum(terms[:middle])}) + ({_sum(terms[middle:])})"
    parts = []
    for coefficient, body in terms:
        sign, size = "-" if coefficient < 0 else "+", abs(coefficient)
        parts.append(f"{sign} {body if size == 1 else f'{size!r}*{body}'}")
    text = " ".join(parts)
    return text[2:] if text.startswith("+ ") else text.replace("- ", "-", 1)


def names_in(recipe: Recipe, gates: bool = True) -> set[str]:
    """The names of vectors that `recipe` holds; gates: also those that its gates read."""

    def of(source: Source) -> Iterator[str]:
        if isinstance(source, str):
            yield source
        elif isinstance(source, Pure):
            for other in (source.vector, *source.without):
                yield from of(other)
        elif isinstance(source, Mix):
            for _, part in source.parts:
                yield from of(part)

    sources = [term.vector for term in recipe.terms]
    sources += [gate.on for term in recipe.terms for gate in term.gates if gates]
    return {name for source in sources for name in of(source)}


def require_sound(term: Term) -> None:
    """Raise RecipeError if a term has no meaning. A parsed one can have none: 3*ablate(x)."""
    if term.when not in ("", *WINDOWS):
        raise RecipeError(f"when: expected one of {', '.join(map(repr, WINDOWS))}, got {term.when!r}")
    if term.operator not in OPERATORS:
        raise RecipeError(f"operator: expected one of {', '.join(OPERATORS)}, got {term.operator!r}")
    if term.operator in ("ablate", "clamp", "edit") and not 0 <= term.coefficient <= 1:
        raise RecipeError(
            f"{term.text}: {term.operator} takes a strength from 0 to 1, got {term.coefficient:g}"
        )
    if term.operator in ("force", "forbid") and term.coefficient != 1:
        raise RecipeError(f"{term.text}: {term.operator} takes no coefficient, got {term.coefficient:g}")
    if term.operator != "add" and term.keep_norm:
        raise RecipeError(f"{term.text}: only what is added can keep the norm")
    stop, decay = (math.inf if of is None else of for of in (term.stop, term.decay))
    if not (0 <= term.start < stop and term.ramp >= 0 and decay > 0):
        raise RecipeError(f"{term.text}: expected 0 <= start < stop, ramp from 0 and decay above 0")
    if term.when == "prompt" and counts_reply(term):
        raise RecipeError(f"{term.text}: start, stop, ramp and decay count tokens of the reply")


def counts_reply(term: Term) -> bool:
    """Whether its window counts tokens of the reply."""
    return (term.start, term.stop, term.ramp, term.decay) != (0, None, 0, None)


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


def as_name(text: str) -> str:
    """`text` as a name that a recipe can give to a vector, in the form in which recipes are read (NFKC).

    Raises RecipeError if it can't be one.
    """
    name = unicodedata.normalize("NFKC", text)
    if not name.isidentifier() or iskeyword(name) or name in _CALLS:
        raise RecipeError(
            f"expected a vector's name, of letters, digits and _, and not an operator's; got {text!r}"
        )
    return name


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
        raise RecipeError(f"expected at most {MAX_LENGTH} characters, got {len(text)}", text, MAX_LENGTH)
    if not text.strip():
        return Recipe()
    if (terms := _plain_sum(text)) is not None:
        return Recipe(terms, plain=True)
    if "#" in text:  # to the parser the rest would be a comment, over line ends too once they are blanks
        raise RecipeError("comments have no place in a recipe", text, text.index("#"))
    if ".gguf" in text and (error := file_in_place_of_a_name(text)):
        raise error
    try:
        value = _Reader(text).value(_tree(text), 0)
    except RecipeError as error:
        raise pack_in_place_of_a_namespace(text) or error from None
    if isinstance(value, float):
        if value == 0:
            return Recipe()
        raise RecipeError(f"the number {value:g} alone steers nothing; name a vector", text, 0)
    terms = tuple(Term(c, *manner) for manner, c in value.items() if c != 0)
    for term in terms:
        if term.operator != "add":
            try:
                require_sound(term)
            except RecipeError as error:
                place = text.find(term.operator)  # of the first of its kind: terms have no places
                raise RecipeError(error.problem, text, place) from None
    return Recipe(terms)


def _plain_sum(text: str) -> tuple[Term, ...] | None:
    """The terms of `text` if it only adds up names with numbers before them, as most recipes do; else None.

    What `_Reader` makes of it, in a sixth of the time: a recipe may be new before every token.
    """
    found: dict[str, float] = {}
    place = 0
    while place < len(text):
        match = _PLAIN_TERM.match(text, place)
        if match is None:
            return None
        sign, number, name = match.groups()
        if (place and not sign) or name in _CALLS or iskeyword(name):
            return None
        coefficient = float(number or 1)
        found[name] = found.get(name, 0.0) + (-coefficient if sign == "-" else coefficient)
        place = match.end()
    if not all(map(math.isfinite, found.values())):
        return None
    return tuple(Term(coefficient, name) for name, coefficient in found.items() if coefficient != 0)


def _tree(text: str) -> ast.expr:
    """The syntax tree of `text`. Raises RecipeError with the place."""
    # Blanks of any kind may stand anywhere; one character each, so that places stay what they are.
    line = _BLANK.sub(" ", plain(text))
    # Of some mistakes the parser warns, on stderr and in its own words.
    if _WARNED_OF.search(line) and (mistake := misread(text)):
        raise mistake
    indent = len(line) - len(line.lstrip())
    try:
        return ast.parse(line[indent:], mode="eval").body
    except SyntaxError as error:
        # the parser counts from 1, and says 0 if the text ends too early
        place = min(indent + error.offset - 1, len(text)) if error.offset else len(text)
    except (RecursionError, MemoryError, ValueError):
        place = indent
    raise misread(text) or RecipeError(
        f"can't be read; it may be nested deeper than {MAX_DEPTH} levels", text, place
    )


class _Manner(NamedTuple):
    """What a term is but for its coefficient, in the order of Term's fields."""

    vector: Source
    when: str = ""
    keep_norm: bool = False
    operator: str = "add"
    value: tuple[float, ...] = ()
    start: int = 0
    stop: int | None = None
    ramp: int = 0
    decay: float | None = None
    turn: tuple[int, int | None] | None = None
    gates: tuple[Gate, ...] = ()

    @property
    def name(self) -> str:
        return _name(self.vector)


Linear: TypeAlias = "float | dict[_Manner, float]"  # a number, or coefficients


class _Reader:
    """Walks the tree from the leaves up; every node is linear in the terms or an error.

    Recipes may change before every token, so this is kept quick: types are compared, not matched.
    """

    def __init__(self, text: str) -> None:
        self.text = text

    def value(self, node: ast.expr, depth: int) -> Linear:
        if depth > MAX_DEPTH:
            raise self.error(f"nested deeper than {MAX_DEPTH} levels; put parts of it in parentheses", node)
        kind = type(node)
        if kind is ast.BinOp:
            return self.binary(node, depth)  # type: ignore[arg-type]  # by kind
        if kind is ast.Name and node.id not in _CALLS:  # type: ignore[attr-defined]
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
        if isinstance(node, ast.Name):
            raise self.error(f"{node.id} is an operator; a vector of that name is pack.{node.id}", node)
        raise self.unknown(node)

    def unknown(self, node: ast.expr) -> RecipeError:
        """The error for what has no meaning: the mistake that its tokens show, or else what it is."""
        if mistake := misread(self.text):
            return mistake
        if isinstance(node, ast.Constant):
            said = node.value if isinstance(node.value, str) else repr(node.value)
            return self.error(f"expected a number or a vector's name, got {said:.40}", node)
        if isinstance(node, ast.Tuple):
            return self.error("expected one number or vector, got several in parentheses", node)
        return self.error("expected numbers, vectors' names, + - * / and parentheses", node)

    # ---- calls ----

    def call(self, node: ast.Call, depth: int) -> Linear:
        if len({keyword.arg for keyword in node.keywords}) < len(node.keywords):
            raise self.error("a keyword is given twice", node)
        if isinstance(node.func, ast.Name) and node.func.id in _CALLS:
            return _CALLS[node.func.id](self, node, depth)
        value = self.value(node.func, depth + 1)
        if isinstance(value, float):
            raise self.error("a number can't be called; write * between a number and a vector", node)
        doses = [self.dose(argument, depth + 1) for argument in node.args]
        if len(doses) > 1 or any(not isinstance(dose, float) for dose in doses):
            known = f"; operators are {', '.join(_CALLS)}" if node.args else ""
            problem = f"a call takes one number, the dose, and keywords{known}"
            name = node.func.id if isinstance(node.func, ast.Name) else ""
            meant = get_close_matches(name, _CALLS, n=1, cutoff=0.75) or [""]
            raise misread(self.text) or self.error(problem, node, meant[0])
        for dose in doses:
            self.scaled(value, dose, node)  # type: ignore[arg-type]  # floats, as checked; in place
        return self.windowed(value, node.keywords, depth)

    def dose(self, node: ast.expr, depth: int) -> Linear:
        """What stands in the parentheses of a vector: a number, or the name of a level."""
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
            return self.value(node, depth)
        if node.value not in LEVELS:
            raise self.error(f"expected a level ({', '.join(LEVELS)}) or a number, got {node.value!r}", node)
        return LEVELS[node.value]

    def operator(self, node: ast.Call, depth: int) -> Linear:
        """ablate, edit, force, forbid: of one vector, or of a sum of vectors."""
        return self.operated(node, depth, self.one_vector(node, depth), ())

    def clamp(self, node: ast.Call, depth: int) -> Linear:
        if len(node.args) != 2:
            raise self.error("clamp takes a vector and the target readout: clamp(calm, 1.0)", node)
        aim = node.args[1]
        items = aim.elts if isinstance(aim, ast.Tuple) else [aim]
        value = tuple(self.number(item, depth, "clamp") for item in items)
        if not value:
            raise self.error("clamp: expected a number, or one for each direction", aim)
        return self.operated(node, depth, self.source(node.args[0], depth), value)

    def scale(self, node: ast.Call, depth: int) -> Linear:
        if len(node.args) not in (1, 2):
            raise self.error("scale takes a vector and a number: scale(heads, -1)", node)
        factor = self.number(node.args[1], depth, "scale") if len(node.args) == 2 else 1.0
        made = self.operated(node, depth, self.source(node.args[0], depth), ())
        return self.scaled(made, factor, node)

    def purify(self, node: ast.Call, depth: int) -> Linear:
        names = [self.source(argument, depth) for argument in node.args]
        if len(names) < 2 or not all(isinstance(name, str) for name in names) or node.keywords:
            raise self.error("purify takes the names of two vectors or more: purify(joy, anger)", node)
        first, *others = names
        return {_Manner(Pure(first, tuple(others))): 1.0}  # type: ignore[arg-type]  # names, as checked

    def gate(self, node: ast.Call, depth: int) -> Linear:
        if len(node.args) != 1:
            raise self.error("gate takes one term: gate(calm, on=anger, above=0.5)", node)
        value = self.value(node.args[0], depth + 1)
        if isinstance(value, float):
            raise self.error("gate: expected a term, got a number", node.args[0])
        given: dict[str, Any] = {}
        windows = []
        for keyword in node.keywords:
            if keyword.arg == "on":
                given["on"] = self.source(keyword.value, depth)
            elif keyword.arg in ("above", "below", "hysteresis"):
                given[keyword.arg] = self.number(keyword.value, depth, keyword.arg)
            elif keyword.arg == "latch":
                given["latch"] = self.flag(keyword)
            else:
                windows.append(keyword)
        if "on" not in given or not {"above", "below"} & set(given):
            raise self.error("gate: say on= which vector, and above= or below= which readout", node)
        if given.get("hysteresis", 0.0) < 0:
            raise self.error("hysteresis: expected 0 or more", node)
        if given.get("above", -math.inf) >= given.get("below", math.inf):
            raise self.error("gate: above must be less than below", node)
        made: dict[_Manner, float] = {}
        for manner, coefficient in value.items():
            if len(manner.gates) == MAX_GATES:
                raise self.error(f"expected at most {MAX_GATES} gates around a term", node)
            made[manner._replace(gates=(*manner.gates, Gate(**given)))] = coefficient
        return self.windowed(made, windows, depth)

    def one_vector(self, node: ast.Call, depth: int) -> Source:
        name = node.func.id  # type: ignore[attr-defined]  # a name, see call
        if len(node.args) != 1:
            raise self.error(f"{name} takes one vector: {name}(joy)", node)
        return self.source(node.args[0], depth)

    def source(self, node: ast.expr, depth: int) -> Source:
        """What is a vector, or a sum of vectors without windows and operators."""
        value = self.value(node, depth + 1)
        if isinstance(value, float):
            raise self.error("expected a vector, got a number", node)
        for manner in value:
            if manner != _Manner(manner.vector) or isinstance(manner.vector, Mix):
                raise self.error("expected a vector or a sum of vectors, without windows or operators", node)
        parts = tuple((c, manner.vector) for manner, c in value.items() if c != 0)
        if not parts:
            raise self.error("expected a vector, and these cancel", node)
        return parts[0][1] if len(parts) == 1 and parts[0][0] == 1 else Mix(parts)  # type: ignore[arg-type]

    def operated(
        self, node: ast.Call, depth: int, source: Source, value: tuple[float, ...]
    ) -> dict[_Manner, float]:
        name = node.func.id  # type: ignore[attr-defined]  # a name, see call
        keywords = list(node.keywords)
        if name == "edit":
            if isinstance(source, Mix) and len(source.parts) > 1:
                raise self.error(
                    "edit takes one probe, not a sum; name one, or -name for its other side", node
                )
            margins = [keyword for keyword in keywords if keyword.arg == "margin"]
            keywords = [keyword for keyword in keywords if keyword.arg != "margin"]
            value = (self.number(margins[0].value, depth, "margin") if margins else DEFAULT_MARGIN,)
        return self.windowed({_Manner(source, operator=name, value=value): 1.0}, keywords, depth)

    # ---- keywords that any call takes ----

    def windowed(
        self, value: dict[_Manner, float], keywords: list[ast.keyword], depth: int
    ) -> dict[_Manner, float]:
        for keyword in keywords:
            value = self.changed(value, keyword, depth)
        return value

    def changed(self, value: dict[_Manner, float], keyword: ast.keyword, depth: int) -> dict[_Manner, float]:
        """`value` with every term in the manner that the keyword says."""
        name, node = keyword.arg, keyword.value
        said: Any = getattr(node, "value", None)
        if name == "when":
            if said not in WINDOWS:
                raise self.error(f"when: expected one of {', '.join(map(repr, WINDOWS))}", node)
        elif name == "keep_norm":
            said = self.flag(keyword)
        elif name in ("start", "stop", "ramp"):
            if type(said) is not int or not 0 <= said < 1 << 31:
                raise self.error(f"{name}: expected a count of tokens", node)
        elif name == "decay":
            said = self.number(node, depth, name)
            if not said > 0:
                raise self.error("decay: expected a half-life in tokens, more than 0", node)
        elif name == "turn":
            said = self.turns(node)
        else:
            known = "keep_norm=, when=, start=, stop=, ramp=, decay= and turn="
            raise self.error(f"no {name or '**'} here; a call takes a dose, {known}", node)
        result: dict[_Manner, float] = {}
        for manner, coefficient in value.items():
            if getattr(manner, name) != _Manner._field_defaults[name]:
                raise self.error(f"{name} is given twice for {manner.name}", node)
            changed = manner._replace(**{name: said})
            if changed.stop is not None and changed.stop <= changed.start:
                raise self.error("stop: expected more than start", node)
            if changed.when == "prompt" and counts_reply(changed):  # type: ignore[arg-type]  # the same fields
                raise self.error("start, stop, ramp and decay count tokens of the reply", node)
            result[changed] = coefficient + result.get(changed, 0.0)
        return result

    def turns(self, node: ast.expr) -> tuple[int, int | None]:
        items = node.elts if isinstance(node, ast.Tuple) else [node, node]
        said: list[Any] = [getattr(item, "value", "") for item in items]
        if len(said) == 2 and type(said[0]) is int and said[0] >= 1:
            first, last = said
            if last is None or (type(last) is int and last >= first):
                return first, last
        raise self.error("turn: expected a reply's number from 1, or (first, last)", node)

    def flag(self, keyword: ast.keyword) -> bool:
        said = getattr(keyword.value, "value", None)
        if not isinstance(said, bool):
            raise self.error(f"{keyword.arg}: expected True or False", keyword.value)
        return said

    def number(self, node: ast.expr, depth: int, what: str) -> float:
        value = self.value(node, depth + 1)
        if not isinstance(value, float):
            raise self.error(f"{what}: expected a number", node)
        return value

    # ---- arithmetic ----

    def binary(self, node: ast.BinOp, depth: int) -> Linear:
        kind = type(node.op)
        a, b = self.value(node.left, depth + 1), self.value(node.right, depth + 1)
        if kind is ast.Mult:
            if isinstance(a, float):
                return self.scaled(b, a, node)
            if isinstance(b, float):
                return self.scaled(a, b, node)
            for side in (node.left, node.right):
                while isinstance(side, ast.UnaryOp):
                    side = side.operand
                if isinstance(side, ast.Name) and side.id.lower() in _NAMED:
                    raise self.error(f"a dose is a finite number, and {side.id} is not", side)
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
        raise self.unknown(node)

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

    def error(self, problem: str, node: ast.expr, suggestion: str = "") -> RecipeError:
        # ast counts bytes of the line without its indent
        indent = len(self.text) - len(self.text.lstrip())
        line = plain(self.text[indent:])
        before = line.encode(errors="replace")[: node.col_offset].decode(errors="ignore")
        return RecipeError(problem, self.text, indent + len(before), suggestion)


_CALLS = {
    "ablate": _Reader.operator,
    "clamp": _Reader.clamp,
    "edit": _Reader.operator,
    "scale": _Reader.scale,
    "force": _Reader.operator,
    "forbid": _Reader.operator,
    "gate": _Reader.gate,
    "purify": _Reader.purify,
}
