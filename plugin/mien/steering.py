"""Steering: the handle that a user holds on an attached model, the same for every runtime."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, TypeAlias

from .errors import RecipeError, RuntimeNotSupported
from .fingerprint import Fingerprint
from .program import NOTHING, Program, compile_recipe, require_fit
from .recipe import Recipe, RecipeLike, as_recipe
from .registry import Registry
from .vector import Floats, Vector

# One for everything, or one for each row of a batch: as a user gives it, and compiled.
Setting: TypeAlias = "RecipeLike | Program | Sequence[RecipeLike | Program]"
Programs: TypeAlias = "Program | tuple[Program, ...]"


@dataclass(frozen=True)
class LayerApplied:
    """What was done at one layer: rows steered, and how far they moved.

    shift: root mean square over the rows of the Euclidean length that a row moved by, as measured on
    the floats before and after (of a plain addition by torch: the length of what was added). path: how
    (see `mien doctor`); where that is a compiled graph, nothing is counted and the shift is NaN.
    """

    rows: int
    shift: float
    path: str


@dataclass(frozen=True)
class Applied:
    """What the last evaluation really did. layers: {layer: LayerApplied}, only where it acted.

    recipe: what was set; where the rows of a batch had recipes of their own, all of them.
    """

    recipe: Recipe | tuple[Recipe, ...]
    layers: dict[int, LayerApplied]

    def __str__(self) -> str:
        if not self.layers:
            return "nothing was steered"
        recipes = self.recipe if isinstance(self.recipe, tuple) else (self.recipe,)
        what = " | ".join(str(recipe) or "nothing" for recipe in recipes)
        lines = [f"{what} at {len(self.layers)} layers"]
        lines += [f"  {n:3}  {a.rows:5} rows  shift {a.shift:.4g}  {a.path}" for n, a in self.layers.items()]
        return "\n".join(lines)


class Runtime(Protocol):
    """What a runtime module provides: delivery of a model's activations to programs."""

    fingerprint: Fingerprint
    takes_rows: bool  # whether each row of a batch can have a program of its own

    def swap(self, program: Programs) -> None:
        """Make `program` the one for evaluations from now on. Cheap, atomic, from any thread.

        A tuple, one for each row of a batch, comes only to a runtime that takes rows.
        """

    def applied(self) -> Applied:
        """What the last evaluation did."""

    def capture(self, tokens: Sequence[int], layers: Sequence[int], last: int) -> Floats:
        """Evaluate `tokens` from an empty context; see Steering.capture."""

    def describe(self) -> dict[str, str]:
        """Facts about the attachment, for people."""

    def release(self) -> None:
        """Leave the model as it was before attaching."""


class Steering:
    """Steers one attached model.

        steering.set("0.8*joy - 0.3*anger")
        with steering("fear"):
            ...
        steering.clear()
        steering.detach()

    A change takes effect with the next token that the model evaluates. Every method raises
    RuntimeNotSupported after detach().
    """

    def __init__(self, runtime: Runtime, registry: Registry | None = None) -> None:
        self._runtime: Runtime | None = runtime
        self._registry = registry or Registry()
        self._found: dict[str, Vector] = {}
        self._programs: Programs = NOTHING

    def set(self, recipe: Setting) -> None:
        """Steer by `recipe` from the next token on: text, a Vector, {name: dose}, or a Program.

        A list of them is one for each row of a batch, None for a row that is not steered; transformers
        only. A batch of another size is then refused with RecipeError when it is evaluated.

        Raises RecipeError, NameNotFound, ModelMismatch, VectorError, and RuntimeNotSupported where the
        runtime takes no list; the steering is then as before.
        """
        runtime = self._attached()
        programs: Programs
        if isinstance(recipe, (list, tuple)):
            if not runtime.takes_rows:
                raise RuntimeNotSupported(
                    "a recipe for each row of a batch can be set on a transformers model only; set one recipe"
                )
            if not recipe:
                raise RecipeError("expected a recipe for each row of a batch, got an empty list")
            programs = tuple(self._fitting(row) for row in recipe)
        else:
            programs = self._fitting(recipe)
        runtime.swap(programs)
        self._programs = programs

    def clear(self) -> None:
        """Stop steering: the output is bit-identical to a model never attached."""
        self.set(NOTHING)

    def compile(self, recipe: RecipeLike) -> Program:
        """Compile without setting it: `set` takes the result in microseconds. Raises as `set` does."""
        model = self._attached().fingerprint
        return compile_recipe(as_recipe(recipe), model, self._find)

    @contextmanager
    def __call__(self, recipe: Setting) -> Iterator[Steering]:
        """Steer by `recipe` inside a `with` block; what was set before comes back after it."""
        before = self._programs
        self.set(recipe)
        try:
            yield self
        finally:
            if self._runtime is not None:
                self._runtime.swap(before)
                self._programs = before

    @property
    def recipe(self) -> Recipe:
        """What is set now; the empty recipe for no steering.

        Raises RecipeError where the rows of a batch have recipes of their own: see `recipes`.
        """
        if isinstance(self._programs, tuple):
            raise RecipeError(f"{len(self._programs)} row recipes are set: ask for `recipes`")
        return self._programs.recipe

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """What is set now: one recipe, or one for each row of a batch."""
        programs = self._programs if isinstance(self._programs, tuple) else (self._programs,)
        return tuple(program.recipe for program in programs)

    @property
    def applied(self) -> Applied:
        """What the last evaluation really did, measured: layers, rows, and the shift at each."""
        return self._attached().applied()

    @property
    def model(self) -> Fingerprint:
        """What is known of the attached model."""
        return self._attached().fingerprint

    def describe(self) -> dict[str, str]:
        """Facts about the attachment, for people: runtime, path and why."""
        return self._attached().describe()

    def capture(self, tokens: Sequence[int], layers: Sequence[int] | None = None, last: int = 1) -> Floats:
        """Block outputs for the last `last` tokens of `tokens`, evaluated from an empty context.

        layers: blocks from 0, all by default. Returns float32 (len(layers), last, n_embd), as they are
        after steering by what is set. What the model held in its context before is gone.
        """
        runtime = self._attached()
        if layers is None:
            layers = range(runtime.fingerprint.n_layer)
        if not 1 <= last <= len(tokens):
            raise ValueError(f"last: expected 1 to {len(tokens)}, got {last}")
        wrong = [layer for layer in layers if not 0 <= layer < runtime.fingerprint.n_layer]
        if wrong:
            raise ValueError(f"layers: the model has 0 to {runtime.fingerprint.n_layer - 1}, got {wrong}")
        return runtime.capture(tokens, layers, last)

    def detach(self) -> None:
        """Leave the model as it was before attaching. Doing it twice does nothing."""
        if self._runtime is not None:
            self._runtime.release()
            self._runtime = None
            self._programs = NOTHING

    def __enter__(self) -> Steering:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.detach()

    def _fitting(self, recipe: Any) -> Program:
        """`recipe` as a program for this model."""
        if not isinstance(recipe, Program):
            return self.compile(recipe)
        for part in recipe.parts:  # compiled for another model, it would write out of bounds
            for dose in part.doses:
                require_fit(dose.vector, self._attached().fingerprint)
        return recipe

    def _attached(self) -> Runtime:
        if self._runtime is None:
            raise RuntimeNotSupported("this steering is detached; call mien.attach(model) again")
        return self._runtime

    def _find(self, name: str) -> Vector:
        if name not in self._found:
            self._found[name] = self._registry.find(name, self._attached().fingerprint)
        return self._found[name]

    def __repr__(self) -> str:
        if self._runtime is None:
            return "<Steering: detached>"
        what = " | ".join(str(recipe) or "nothing set" for recipe in self.recipes)
        return f"<Steering of {self._runtime.fingerprint}: {what}>"
