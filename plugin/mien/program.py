"""Programs: a recipe compiled for one model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from .engine import CompiledProgram
from .errors import ModelMismatch, RecipeError
from .fingerprint import Fingerprint
from .recipe import WINDOWS, Recipe
from .vector import Vector

# Which floats a part adds: (what, coefficient) pairs in order, `what` being a vector's digest and how it
# is added. Equal keys are equal parts, also in another process, so a KV cache can be told by them; () is
# no steering.
Key: TypeAlias = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Dose:
    """`coefficient` times `vector`, added plainly or, where `keep_norm`, so that the row keeps its length."""

    coefficient: float
    vector: Vector
    keep_norm: bool = False


@dataclass(frozen=True)
class Part:
    """What a program does to one kind of token; immutable.

    doses: in the order in which they are added up. compiled: the engine's side, None for nothing.
    """

    doses: tuple[Dose, ...]
    compiled: CompiledProgram | None

    @cached_property
    def key(self) -> Key:
        return tuple(
            (f"{dose.vector.digest}{' keep_norm' if dose.keep_norm else ''}", dose.coefficient)
            for dose in self.doses
        )

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Where it acts, ascending."""
        return tuple(self.compiled.layers) if self.compiled else ()


@dataclass(frozen=True)
class Program:
    """A recipe compiled for one model; immutable, and cheap to swap in.

    recipe: what it was compiled from. prompt: what is done to the tokens that a model is given;
    response: to those that it made itself. One object where no term has a window.
    """

    recipe: Recipe
    prompt: Part
    response: Part

    @property
    def parts(self) -> tuple[Part, ...]:
        """The different ones."""
        return (self.prompt,) if self.prompt is self.response else (self.prompt, self.response)

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Where it acts on any token, ascending."""
        return tuple(sorted({layer for part in self.parts for layer in part.layers}))


_NO_PART = Part((), None)
NOTHING = Program(Recipe(), _NO_PART, _NO_PART)


def compile_recipe(recipe: Recipe, model: Fingerprint, find: Callable[[str], Vector]) -> Program:
    """Compile `recipe` for `model`; `find` resolves names.

    Terms are put in the order of their vectors' digests, so that the same dose written in another way
    gives the same bits. Raises what `find` raises, ModelMismatch where a vector is for another model,
    VectorError where the sum is not finite, RecipeError for a window that there is not.
    """
    terms = []
    for term in recipe.terms:
        if term.when not in WINDOWS:
            raise RecipeError(f"when: expected one of {', '.join(map(repr, WINDOWS))}, got {term.when!r}")
        vector = find(term.vector) if isinstance(term.vector, str) else term.vector
        require_fit(vector, model)
        terms.append((term.when, Dose(term.coefficient, vector, term.keep_norm)))
    prompt = _part([dose for when, dose in terms if when != "response"], model)
    if all(when == "all" for when, _ in terms):
        return Program(recipe, prompt, prompt)
    return Program(recipe, prompt, _part([dose for when, dose in terms if when != "prompt"], model))


def _part(doses: list[Dose], model: Fingerprint) -> Part:
    merged: dict[tuple[str, bool], Dose] = {}
    for dose in doses:
        place = dose.vector.digest, dose.keep_norm
        if place in merged:
            dose = Dose(dose.coefficient + merged[place].coefficient, dose.vector, dose.keep_norm)
        merged[place] = dose
    kept = tuple(merged[place] for place in sorted(merged) if merged[place].coefficient != 0)
    if not kept:
        return _NO_PART
    compiled = CompiledProgram(
        model.n_layer,
        model.n_embd,
        [(dose.coefficient, dose.vector) for dose in kept if not dose.keep_norm],
        [(dose.coefficient, dose.vector) for dose in kept if dose.keep_norm],
    )
    return Part(kept, compiled)


def require_fit(vector: Vector, model: Fingerprint) -> None:
    """Raise ModelMismatch, saying what differs, where `vector` would be garbage in `model`."""
    if vector.fingerprint is not None:
        differences = vector.fingerprint.differences(model)
    else:
        differences = []
        if vector.n_embd != model.n_embd:
            differences.append(f"it has {vector.n_embd} values a layer, the model {model.n_embd}")
        if vector.layers[-1] >= model.n_layer:
            differences.append(f"it goes up to layer {vector.layers[-1]}, the model to {model.n_layer - 1}")
        if vector.model_hint and vector.model_hint != model.architecture:
            differences.append(f"it is for {vector.model_hint}, the model is {model.architecture}")
    if differences:
        raise ModelMismatch(
            f"{vector.name} does not fit {model}",
            differences,
            "`mien list` shows the packs and their models.",
        )
