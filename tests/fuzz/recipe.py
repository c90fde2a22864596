"""Any text is a recipe or a RecipeError; a recipe's text means the recipe; and it compiles or says why not.

See driver.py for how to run it.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable

import driver
import numpy as np
from mien.errors import MienError, NameNotFound, RecipeError, SiteNotFound
from mien.fingerprint import Fingerprint
from mien.program import compile_recipe
from mien.recipe import MAX_LENGTH, parse
from mien.sites import of_experts, of_heads, of_neurons
from mien.vector import Vector

MODEL = Fingerprint("llama", 4, 8)


def _vectors() -> dict[str, Vector]:
    rows = np.random.default_rng(0).standard_normal((3, 2, 8)).astype(np.float32)
    found = [
        Vector("joy", (1, 2, 3), rows[:, 0], MODEL),
        Vector("fear", (2,), rows[:1, 1], MODEL, meta={"center": [0.5]}),
        Vector("probe", (1, 3), rows[1:, 0], MODEL, meta={"bias": [0.5, -1.0]}),
        Vector("plane", (1, 2, 3), rows, MODEL, meta={"center": [0.1] * 6}),
        Vector("zero", (2,), np.zeros((1, 8), dtype=np.float32), MODEL),
        Vector("thought", (0, 2), rows[:2, 1], MODEL, site="mlp"),
        of_heads("heads", {(1, 0): -1.0}, 2, 4, fingerprint=MODEL),
        of_neurons("neurons", {1: {30: 2.0}}, 40, fingerprint=MODEL),
        of_experts("experts", {1: [0, 1]}, 4, fingerprint=MODEL),
    ]
    return {vector.name: vector for vector in found}


class Places:
    experts_used = 2

    def width(self, site: str, layer: int) -> int:
        if (site, layer) == ("mlp", 3):
            raise SiteNotFound(site, layer, "not there")
        return {"heads": 8, "neurons": 40, "experts": 4}.get(site, 8)


VECTORS, PLACES = _vectors(), Places()


def find(name: str) -> Vector:
    if name not in VECTORS:
        raise NameNotFound(name, VECTORS)
    return VECTORS[name]


# ---- texts after the grammar ----

NAMES = [*VECTORS, "joy", "joy", "fear", "pack.joy", "größe", "nobody", "ablate", "gate", "p.force", "when"]
NUMBERS = [
    "0",
    "1",
    "2",
    "0.5",
    ".25",
    "1e-3",
    "1e308",
    "1e999",
    "5e-324",
    "0x1F",
    "1_0",
    "-1",
    "True",
    "1j",
    "9" * 400,
]
WHEN = ["'prompt'", '"response"', "'all'", "'later'", "joy"]
TURNS = ["1", "2", "(1, 2)", "(2, None)", "(3, 1)", "()", "joy"]
COUNTS = ["0", "1", "5", "2147483647", "2147483648", "-1", "1.5", "None", "joy"]
Grammar = Callable[[random.Random, int], str]


def number(dice: random.Random, depth: int) -> str:
    if depth and dice.random() < 0.2:
        return f"({number(dice, depth - 1)} {dice.choice('+-*/')} {number(dice, depth - 1)})"
    return dice.choice(NUMBERS) if dice.random() < 0.4 else repr(dice.uniform(-2, 2))


def keyword(dice: random.Random, depth: int) -> str:
    return dice.choice(
        [
            f"when={dice.choice(WHEN)}",
            f"keep_norm={dice.choice(['True', 'False', '1'])}",
            f"{dice.choice(['start', 'stop', 'ramp'])}={dice.choice(COUNTS)}",
            f"decay={number(dice, 0)}",
            f"turn={dice.choice(TURNS)}",
            f"{dice.choice(['margin', 'dose', 'on', 'latch'])}={number(dice, 0)}",
            f"**{dice.choice(NAMES)}",
        ]
    )


def keywords(dice: random.Random, depth: int) -> str:
    return "".join(f", {keyword(dice, depth)}" for _ in range(dice.choice([0, 0, 0, 1, 1, 2, 3])))


def call(dice: random.Random, depth: int) -> str:
    dose = [number(dice, 1)] * dice.randrange(2)
    said = [keyword(dice, depth) for _ in range(dice.randrange(3))]
    return f"({expression(dice, depth)})({', '.join(dose + said)})"


def operator(dice: random.Random, depth: int) -> str:
    kind = dice.choice(["ablate", "edit", "force", "forbid", "clamp", "scale", "purify", "gate"])
    inner = expression(dice, depth if dice.random() < 0.3 else 0)
    if kind == "clamp":
        inner += (
            f", ({number(dice, 0)}, {number(dice, 0)})" if dice.random() < 0.3 else f", {number(dice, 1)}"
        )
    elif kind == "scale" and dice.random() < 0.7:
        inner += f", {number(dice, 1)}"
    elif kind == "edit" and dice.random() < 0.5:
        inner += f", margin={number(dice, 1)}"
    elif kind == "purify":
        inner += "".join(f", {dice.choice(NAMES)}" for _ in range(dice.randrange(3)))
    elif kind == "gate":
        inner += f", on={expression(dice, dice.randrange(2))}"
        inner += f", {dice.choice(['above', 'below'])}={number(dice, 0)}" * (dice.random() < 0.9)
        inner += f", hysteresis={number(dice, 0)}" * (dice.random() < 0.3)
        inner += f", latch={dice.choice(['True', 'False', '0'])}" * (dice.random() < 0.3)
    return f"{kind}({inner}{keywords(dice, depth)})"


def linear(dice: random.Random, depth: int) -> str:
    a, b = expression(dice, depth), expression(dice, depth)
    return dice.choice(
        [
            f"{a} + {b}",
            f"{a} - {b}",
            f"{number(dice, 1)}*({a})",
            f"({a})/{number(dice, 0)}",
            f"-({a})",
            f"({a})",
        ]
    )


def expression(dice: random.Random, depth: int) -> str:
    if not depth or dice.random() < 0.2:
        return dice.choice(NAMES)
    grammar: Grammar = dice.choice([linear, linear, operator, operator, call])
    return grammar(dice, depth - 1)


# ---- and beside it ----

TOKEN = re.compile(r"\w+|\s+|.", re.DOTALL)
ODD = [
    *"+-*/()[]{},.:=#'\"\\~|@%&<>!?;`$\0\n\t\r\x0b\u2028é×喜\u00a0\ud800",
    "**",
    "lambda ",
    " if ",
    ":=",
    "...",
    "0x",
]


def mutated(dice: random.Random, text: str) -> str:
    tokens = TOKEN.findall(text) or [""]
    for _ in range(dice.choice([1, 1, 2, 5])):
        at, other = dice.randrange(len(tokens)), dice.randrange(len(tokens))
        kind = dice.randrange(6)
        if kind == 0:
            tokens[at] = ""
        elif kind == 1:
            tokens[at] = tokens[other]
        elif kind == 2:
            tokens[at], tokens[other] = tokens[other], tokens[at]
        elif kind == 3:
            tokens.insert(at, dice.choice(ODD))
        elif kind == 4:
            tokens.insert(at, dice.choice([*NUMBERS, *NAMES, "ablate(", "gate(", ", on=joy", ")", "(", "-"]))
        else:
            tokens[at:at] = tokens[min(at, other) : max(at, other)]
    return "".join(tokens)


def long(dice: random.Random, _: int) -> str:
    """Many of one thing, around the limits."""
    n = dice.choice([30, 99, 100, 101, 300, 1000, 4000])
    inner = dice.choice(["joy", "ablate(joy)", "1"])
    return dice.choice(
        [
            "-" * n + inner,
            "(" * n + inner + ")" * n,
            "+".join(f"v{i}" for i in range(n)),
            "joy" + "(1)" * n,
            "gate(" * (n // 20) + inner + ", on=joy, above=0)" * (n // 20),
            "ablate(" * n + inner + ")" * n,
            f"ablate({'+'.join(f'{i}*joy' for i in range(n // 10))})",
            balanced([f"x{i}" for i in range(min(n, 600))]) + "(when='prompt', start=0, stop=9)",
            balanced([f"{i}*joy(stop={i + 1})" for i in range(min(n, 200))]),
            "é" * n,
            " " * n + inner,
        ]
    )


def balanced(parts: list[str]) -> str:
    middle = len(parts) // 2
    return f"({balanced(parts[:middle])}+{balanced(parts[middle:])})" if middle else parts[0]


def make(dice: random.Random) -> str:
    if dice.random() < 0.03:
        return long(dice, 0)
    text = expression(dice, dice.randrange(1, 6))
    return mutated(dice, text) if dice.random() < 0.4 else text


def check(text: str) -> bool:
    try:
        recipe = parse(text)
    except RecipeError as refusal:
        place = refusal.offset or 0
        assert 0 <= place <= len(text)
        str(refusal)
        return False
    canonical = str(recipe)
    if len(canonical) <= MAX_LENGTH:
        assert parse(canonical) == recipe, canonical
        assert str(parse(canonical)) == canonical
    try:
        program = compile_recipe(recipe, MODEL, find, PLACES)
    except MienError as error:
        str(error)
        return True
    for part in program.parts:
        hash(part.key)
        for site, layers in part.places.items():
            rows = np.ones((2, PLACES.width(site, layers[0])), dtype=np.float32)
            assert part.compiled is not None
            part.compiled.apply(layers[0], rows, site)
    return True


TARGET = driver.Target(make, check)

if __name__ == "__main__":
    sys.exit(driver.main(TARGET))
