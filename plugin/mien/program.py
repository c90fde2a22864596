"""Programs: a recipe compiled for one model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from .engine import CompiledProgram
from .errors import ModelMismatch
from .fingerprint import Fingerprint
from .recipe import Recipe
from .vector import Vector

# Which floats a program adds: (vector digest, coefficient) pairs in order. Equal keys are equal
# programs, also in another process, so a KV cache can be told by them; () is no steering.
Key: TypeAlias = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Program:
    """A recipe compiled for one model; immutable, and cheap to swap in.

    recipe: what it was compiled from. doses: (coefficient, vector) pairs in the order in which they
    are added up. compiled: the engine's side, None when it does nothing.
    """

    recipe: Recipe
    doses: tuple[tuple[float, Vector], ...]
    compiled: CompiledProgram | None

    @cached_property
    def key(self) -> Key:
        return tuple((vector.digest, coefficient) for coefficient, vector in self.doses)

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Where it acts, ascending."""
        return tuple(self.compiled.layers) if self.compiled else ()


NOTHING = Program(Recipe(), (), None)


def compile_recipe(recipe: Recipe, model: Fingerprint, find: Callable[[str], Vector]) -> Program:
    """Compile `recipe` for `model`; `find` resolves names.

    Terms are put in the order of their vectors' digests, so that the same dose written in another way
    gives the same bits. Raises what `find` raises, ModelMismatch where a vector is for another model,
    VectorError where the sum is not finite.
    """
    doses: dict[str, tuple[float, Vector]] = {}
    for term in recipe.terms:
        vector = find(term.vector) if isinstance(term.vector, str) else term.vector
        require_fit(vector, model)
        coefficient = term.coefficient + doses.get(vector.digest, (0.0, vector))[0]
        doses[vector.digest] = (coefficient, vector)
    kept = tuple(dose for _, dose in sorted(doses.items()) if dose[0] != 0)
    compiled = CompiledProgram(model.n_layer, model.n_embd, kept) if kept else None
    return Program(recipe, kept, compiled)


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
