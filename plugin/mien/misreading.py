"""What is wrong with a text that is not a recipe, in a recipe's own words.

`recipe.parse` reads a recipe with a parser of a larger language. What that parser says about a mistake is
about the larger language, so the mistake is looked for here: token by token, against what may follow what.
"""

from __future__ import annotations

import ast
import keyword
import re
from typing import NamedTuple

from .errors import RecipeError

# What keyboards, phones and word processors put in place of the plain characters; one for one, so that
# places stay what they are. Full-width forms are 0xFEE0 above their plain ones.
_PLAIN: dict[int, int | str] = {
    **{0xFEE0 + code: code for code in range(0x21, 0x7F)},
    **dict.fromkeys(map(ord, "−–—‐‑"), "-"),
    **dict.fromkeys(map(ord, "×·⋅∗∙✕"), "*"),
    **dict.fromkeys(map(ord, "÷∕⁄"), "/"),
    **dict.fromkeys(map(ord, "‘’‚‛"), "'"),
    **dict.fromkeys(map(ord, "“”„‟"), '"'),
}

_TOKEN = re.compile(
    r"""
      (?P<number> 0[xX][0-9a-fA-F_]+ | 0[bB][01_]+ | 0[oO][0-7_]+
                | (?: [0-9][0-9_]*\.?[0-9_]* | \.[0-9][0-9_]* ) (?: [eE][+-]?[0-9][0-9_]* )? )
    | (?P<name> [^\W\d]\w* )
    | (?P<text> '[^'\\]*' | "[^"\\]*" )
    | (?P<symbol> \*\* | // | << | >> | := | == | != | <= | >= | -> | && | \|\| | \S )
    """,
    re.VERBOSE,
)

_VALUES = ("number", "name", "text")
_TIMES = ("x", "X", "times")
_CONSTANTS = ("True", "False", "None")
_SHORT = 40  # characters of a suggestion
_FILE = re.compile(r"""['"](?P<quoted>[^'"]*\.gguf)['"] | (?P<bare>[^\s'"*+()]*\.gguf\b)""", re.VERBOSE)


class _Token(NamedTuple):
    kind: str  # number, name, text (a quoted one), symbol, or end
    text: str
    start: int

    @property
    def end(self) -> int:
        return self.start + len(self.text)

    @property
    def ends_value(self) -> bool:
        """Whether an operator may follow."""
        return self.kind in _VALUES or self.text == ")"

    @property
    def shown(self) -> str:
        return ascii(self.text) if not self.text.isprintable() else self.text[:40]


class _Bracket:
    """An open parenthesis: of a call, or around a part. Of a call, what is said in it so far."""

    def __init__(self, token: _Token, call: bool) -> None:
        self.token, self.call = token, call
        self.named = False  # whether an argument had a name
        self.first: _Token | None = None  # of the argument at hand
        self.names = False  # whether the argument at hand has a name


class _Mistake(NamedTuple):
    problem: str
    start: int
    suggestion: str = ""


def plain(text: str) -> str:
    """`text` with plain characters for typographic ones: − × ÷ and curly quotes. As long as before."""
    return text.translate(_PLAIN)


def misread(text: str) -> RecipeError | None:
    """The first mistake in `text` that its tokens show, and what may have been meant; None: there is none."""
    scan = _Scan(plain(text))
    mistake = scan.first_mistake()
    if mistake is None:
        return None
    return RecipeError(mistake.problem, text, mistake.start, mistake.suggestion)


def file_in_place_of_a_name(text: str) -> RecipeError | None:
    """The error for a vector file's path in a recipe, which has names alone."""
    found = _FILE.search(text)
    if found is None:
        return None
    path = found["quoted"] or found["bare"]
    stem = re.split(r"[/\\]", path)[-1].removesuffix(".gguf")
    name = stem if stem.isidentifier() else "NAME"
    return RecipeError(
        f"a recipe has vectors' names, not files. Give the file a name: --vector {name}={path} on the "
        f'command line, steering.define("{name}", mien.load("{path}")) in a program; then write {name}',
        text,
        found.start(),
        name if name == stem else "",
    )


class _Scan:
    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = [
            _Token(found.lastgroup or "", found.group(), found.start()) for found in _TOKEN.finditer(text)
        ]
        self.end = _Token("end", "", len(text))
        self.open: list[_Bracket] = []
        self.at = 0

    def first_mistake(self) -> _Mistake | None:
        for at, token in enumerate(self.tokens):
            self.at = at
            if self.open and token.text not in (",", ")"):
                self.open[-1].first = self.open[-1].first or token
            look = getattr(self, f"_{token.kind}")
            mistake: _Mistake | None = look(token, self._near(-1), self._near(1))
            if mistake:
                return mistake
        self.at = len(self.tokens)
        last = self._near(-1)
        if not last.ends_value:
            self.at -= last.text in ("+", "-", "*", "/")
            problem = "the recipe ends where a number or a vector's name is expected"
            return _Mistake(problem, self.end.start, self._so_far())
        if self.open:
            return _Mistake("this ( is never closed; add a )", self.open[-1].token.start, self._so_far())
        return None

    def _near(self, by: int) -> _Token:
        place = self.at + by
        return self.tokens[place] if 0 <= place < len(self.tokens) else self.end

    @property
    def _in_call(self) -> bool:
        return any(bracket.call for bracket in self.open)

    # ---- one kind of token each: the token, that before it, that after it ----

    def _name(self, token: _Token, before: _Token, after: _Token) -> _Mistake | None:
        if not token.text.isidentifier():
            return _Mistake(f"{token.shown} can't be a name, which has letters, digits and _", token.start)
        if keyword.iskeyword(token.text) and token.text not in _CONSTANTS:
            return self._reserved(token, before, after)
        if not before.ends_value:
            return None
        if token.text in _TIMES and after.kind in ("number", "name"):
            return _Mistake("times is written *", token.start, _dose(before, after))
        return self._two_values(before, token)

    def _reserved(self, token: _Token, before: _Token, after: _Token) -> _Mistake:
        if token.text == "not":
            suggestion = f"-{after.shown}" if after.kind == "name" else ""
            return _Mistake("not has no meaning in a recipe; - steers the other way", token.start, suggestion)
        if token.text in ("and", "or"):
            both = before.kind == after.kind == "name"
            suggestion = f"{before.shown} + {after.shown}" if both else ""
            problem = f"{token.text} has no meaning in a recipe; + adds vectors"
            return _Mistake(problem, token.start, suggestion)
        return _Mistake(f"{token.text} has no meaning in a recipe, and can't be a name", token.start)

    def _number(self, token: _Token, before: _Token, after: _Token) -> _Mistake | None:
        if before.ends_value:
            return self._two_values(before, token)
        try:
            ast.literal_eval(token.text)
        except SyntaxError:
            digits = token.text.replace("_", "").lstrip("0") or "0"
            return _Mistake(f"{token.shown} is not a number", token.start, digits)
        return None

    def _text(self, token: _Token, before: _Token, after: _Token) -> _Mistake | None:
        if before.ends_value:
            return self._two_values(before, token)
        if self._in_call:
            return None
        inner = token.text[1:-1]
        problem = "a quoted text has no place here; a vector's name is written without quotes"
        return _Mistake(problem, token.start, inner if inner.isidentifier() else "")

    def _two_values(self, before: _Token, token: _Token) -> _Mistake:
        """Two values side by side: what is missing is between them."""
        if token.kind == "text":
            level = before.kind == "name" and token.text[1:-1].isalpha()
            suggestion = f"{before.shown}({token.shown})" if level else ""
            return _Mistake("a quoted text stands in a vector's parentheses", token.start, suggestion)
        sum_goes_on = token.kind == "number" and self._near(1).text == "*" and self._near(2).kind == "name"
        if sum_goes_on and before.kind in ("name", "symbol"):
            suggestion = (
                f"{before.shown} + {token.shown}*{self._near(2).shown}" if before.kind == "name" else ""
            )
            return _Mistake(f"expected + or - before {token.shown}", token.start, suggestion)
        if {before.kind, token.kind} == {"number", "name"}:
            problem = f"expected * between a number and a vector's name, {before.shown} and {token.shown}"
            return _Mistake(problem, token.start, _dose(before, token))
        both = before.kind == token.kind == "name"
        suggestion = f"{before.shown} + {token.shown}" if both else ""
        return _Mistake(f"expected + - * or / before {token.shown}", token.start, suggestion)

    def _symbol(self, token: _Token, before: _Token, after: _Token) -> _Mistake | None:
        known = {
            "(": self._opening,
            ")": self._closing,
            ",": self._comma,
            "=": self._equals,
            ".": self._dot,
            "*": self._operator,
            "/": self._operator,
        }
        if token.text in ("+", "-"):  # between values, or before one
            return None
        return known.get(token.text, self._foreign)(token, before, after)

    def _opening(self, token: _Token, before: _Token, after: _Token) -> _Mistake | None:
        if before.kind == "text":
            return _Mistake("expected + - * or / before (", token.start)
        self.open.append(_Bracket(token, before.ends_value))
        return None

    def _closing(self, token: _Token, before: _Token, after: _Token) -> _Mistake | None:
        if not self.open:
            suggestion = self._so_far() if after.kind == "end" and before.ends_value else ""
            return _Mistake("this ) closes nothing; leave it out, or add a (", token.start, suggestion)
        if not (before.ends_value or before.text in ("(", ",")):
            return _Mistake(f"expected a number or a vector's name after {before.shown}", token.start)
        bracket = self.open[-1]
        if before.text == "(" and not self._in_call:
            return _Mistake("there is nothing between these parentheses", bracket.token.start)
        self.open.pop()
        return self._argument_ends(bracket)

    def _comma(self, token: _Token, before: _Token, after: _Token) -> _Mistake | None:
        direct = bool(self.open) and self.open[-1].call
        if direct or not self._in_call:
            touching = before.end == token.start and token.end == after.start
            if before.kind == after.kind == "number" and touching:
                number = f"{before.shown}.{after.shown}"
                times, name = self._near(2), self._near(3)
                dosed = times.text == "*" and name.kind == "name"
                suggestion = f"{number}*{name.shown}" if dosed else number
                return _Mistake("a number has a decimal point, not a comma", token.start, suggestion)
        if not self._in_call:
            both = before.kind == after.kind == "name"
            suggestion = f"{before.shown} + {after.shown}" if both else ""
            if after.kind == "end" and before.ends_value:
                suggestion = self._so_far()
            return _Mistake("a comma has no place here; + and - join vectors", token.start, suggestion)
        if not before.ends_value:
            return _Mistake(f"expected a number or a vector's name before {token.shown}", token.start)
        return self._argument_ends(self.open[-1])

    def _argument_ends(self, bracket: _Bracket) -> _Mistake | None:
        first = bracket.first
        if bracket.call and bracket.named and first and not bracket.names:
            return _Mistake("what has no name, such as the dose, comes before what has one", first.start)
        bracket.named |= bracket.names
        bracket.first, bracket.names = None, False
        return None

    def _equals(self, token: _Token, before: _Token, after: _Token) -> _Mistake | None:
        bracket = self.open[-1] if self.open else None
        begins = bracket is not None and bracket.call and not bracket.names and bracket.first is before
        if bracket and begins and before.kind == "name" and before.text not in _CONSTANTS:
            bracket.names = True
            return None
        problem = "= has no place here; a dose is a number times a vector"
        return _Mistake(problem, token.start, _dose(before, after))

    def _dot(self, token: _Token, before: _Token, after: _Token) -> _Mistake | None:
        if before.kind != "name" or after.kind != "name":
            return _Mistake("a dot stands between a pack's name and a vector's: pack.joy", token.start)
        if self._near(-2).text == ".":
            return _Mistake("a vector's name has at most one dot: pack.joy", token.start)
        return None

    def _operator(self, token: _Token, before: _Token, after: _Token) -> _Mistake | None:
        if before.ends_value:
            return None
        return _Mistake(f"expected a number or a vector's name before {token.text}", token.start)

    def _foreign(self, token: _Token, before: _Token, after: _Token) -> _Mistake:
        sign = token.text
        if sign in ("'", '"'):
            return _Mistake(f"the quote {sign} is not closed", token.start)
        if sign == "%" and before.kind == "number":
            name = self._near(2) if after.text == "*" else after
            share = f"{float(ast.literal_eval(before.text)) / 100:g}"
            suggestion = f"{share}*{name.shown}" if name.kind == "name" else share
            return _Mistake("% has no meaning in a recipe; 1 is the full dose", token.start, suggestion)
        if sign in ("[", "]", "{", "}"):
            return _Mistake(f"{sign} has no meaning in a recipe; use ( and )", token.start)
        if sign == "//" and before.kind == "name" and after.kind == "number":
            suggestion = f"{before.shown}/{after.shown}"
        else:
            suggestion = _dose(before, after)
        if sign in ("^", "**"):
            problem = f"a vector has no powers, so {sign} has no meaning in a recipe; * is a dose"
            return _Mistake(problem, token.start, suggestion)
        problem = f"{token.shown} has no meaning in a recipe; it has numbers, vectors' names, + - * / ( )"
        return _Mistake(problem, token.start, suggestion)

    def _so_far(self) -> str:
        """The text before the token at hand with its parentheses closed, if it is short."""
        text = self.text[: self._near(0).start].strip() + ")" * len(self.open)
        return text if len(text) <= _SHORT and text.isprintable() else ""


def _dose(one: _Token, other: _Token) -> str:
    """A number and a name as a dose, in whichever order; two names as a sum; '' for anything else."""
    if one.text in _CONSTANTS or other.text in _CONSTANTS:
        return ""
    if {one.kind, other.kind} == {"number", "name"}:
        number, name = (one, other) if one.kind == "number" else (other, one)
        return f"{number.shown.rstrip('.')}*{name.shown}"
    if one.kind == other.kind == "name":
        return f"{one.shown} + {other.shown}"
    return ""
