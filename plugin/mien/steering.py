"""Steering: the handle that a user holds on an attached model, the same for every runtime."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from .errors import RuntimeNotSupported
from .fingerprint import Fingerprint
from .program import NOTHING, Program, compile_recipe, require_fit
from .recipe import Recipe, RecipeLike, as_recipe
from .registry import Registry
from .vector import Floats, Vector


@dataclass(frozen=True)
class LayerApplied:
    """What was done at one layer: rows steered, and how far they moved.

    shift: root mean square over the rows of the Euclidean length that a row moved by, as measured on
    the floats before and after. path: how (see `mien doctor`).
    """

    rows: int
    shift: float
    path: str


@dataclass(frozen=True)
class Applied:
    """What the last evaluation really did. layers: {layer: LayerApplied}, only where it acted."""

    recipe: Recipe
    layers: dict[int, LayerApplied]

    def __str__(self) -> str:
        if not self.layers:
            return "nothing was steered"
        lines = [f"{self.recipe} at {len(self.layers)} layers"]
        lines += [f"  {n:3}  {a.rows:5} rows  shift {a.shift:.4g}  {a.path}" for n, a in self.layers.items()]
        return "\n".join(lines)


class Runtime(Protocol):
    """What a runtime module provides: delivery of a model's activations to programs."""

    fingerprint: Fingerprint

    def swap(self, program: Program) -> None:
        """Make `program` the one for evaluations from now on. Cheap, atomic, from any thread."""

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
        self._program = NOTHING

    def set(self, recipe: RecipeLike | Program) -> None:
        """Steer by `recipe` from the next token on: text, a Vector, {name: dose}, or a Program.

        Raises RecipeError, NameNotFound, ModelMismatch or VectorError; the steering is then as before.
        """
        runtime = self._attached()
        if isinstance(recipe, Program):
            program = recipe
            for _, vector in program.doses:  # compiled for another model, it would write out of bounds
                require_fit(vector, runtime.fingerprint)
        else:
            program = self.compile(recipe)
        runtime.swap(program)
        self._program = program

    def clear(self) -> None:
        """Stop steering: the output is bit-identical to a model never attached."""
        self.set(NOTHING)

    def compile(self, recipe: RecipeLike) -> Program:
        """Compile without setting it: `set` takes the result in microseconds. Raises as `set` does."""
        model = self._attached().fingerprint
        return compile_recipe(as_recipe(recipe), model, self._find)

    @contextmanager
    def __call__(self, recipe: RecipeLike | Program) -> Iterator[Steering]:
        """Steer by `recipe` inside a `with` block; what was set before comes back after it."""
        before = self._program
        self.set(recipe)
        try:
            yield self
        finally:
            if self._runtime is not None:
                self.set(before)

    @property
    def recipe(self) -> Recipe:
        """What is set now; the empty recipe for no steering."""
        return self._program.recipe

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
            self._program = NOTHING

    def __enter__(self) -> Steering:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.detach()

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
        return f"<Steering of {self._runtime.fingerprint}: {str(self.recipe) or 'nothing set'}>"
