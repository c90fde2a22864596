"""Sums of the same vectors with other doses, as a recipe that changes before every token is.

After a token the processor's caches are cold, and every step of compiling costs several times what it costs
in a loop. What does not depend on the doses is kept here: which vectors act on what, in which order, and the
terms that the engine reads.
"""

from __future__ import annotations

from .engine import SumOf
from .program import NOTHING, Dose, Part, Program
from .recipe import Recipe
from .vector import Vector

_KEPT = 16  # different sums; a recipe that changes is mostly the same one


class _Side:
    """What one kind of token has of a sum: which of its vectors, in the order in which they act."""

    def __init__(self, part: Part, vectors: tuple[Vector, ...]) -> None:
        self.order = [vectors.index(dose.vector) for dose in part.doses]
        self.vectors = [dose.vector for dose in part.doses]
        self.engine = SumOf(part.compiled.n_layer, self.vectors) if part.compiled else None

    def part(self, doses: list[float]) -> Part:
        if self.engine is None:
            return NOTHING.prompt
        ordered = [doses[i] for i in self.order]
        compiled = self.engine.compiled(ordered)
        return Part(tuple(map(Dose, ordered, self.vectors)), compiled if compiled.acts else None)


class Sums:
    """Compiles sums that differ from one before in their doses alone; for one model and its steering."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Vector, ...], tuple[_Side, _Side | None]] = {}

    def note(self, vectors: tuple[Vector, ...], program: Program) -> None:
        """`program` is what a plain sum of `vectors` compiles to."""
        if len({vector.digest for vector in vectors}) < len(vectors) or program.turns:
            return  # two of the same fold into one
        if len(self._kept) >= _KEPT:
            self._kept.clear()
        prompt = _Side(program.prompt, vectors)
        self._kept[vectors] = prompt, _Side(program.response, vectors) if len(program.parts) > 1 else None

    def compiled(self, recipe: Recipe, vectors: tuple[Vector, ...]) -> Program | None:
        """What it compiles to; None if no sum of these vectors was noted. Raises as `compile_recipe` does."""
        sides = self._kept.get(vectors)
        if sides is None:
            return None
        doses = [term.coefficient for term in recipe.terms]
        prompt = sides[0].part(doses)
        return Program(recipe, prompt, sides[1].part(doses) if sides[1] else prompt)
