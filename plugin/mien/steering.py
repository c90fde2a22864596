"""Steering: the handle that a user holds on an attached model, the same for every runtime."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from .errors import RecipeError, RuntimeNotSupported, VectorError, warn
from .fingerprint import Fingerprint
from .program import NOTHING, Program, compile_recipe, excessive_doses, require_fit
from .recipe import Recipe, RecipeLike, as_name, as_recipe
from .registry import Registry
from .sums import Sums
from .vector import Floats, Vector
from .watch import Token, Watch

# Held while a model is attached or detached, so that no two threads do it at once.
ATTACHING = threading.RLock()

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
    """What the last evaluation really did, only where it acted.

    layers: {layer: LayerApplied} at the residual stream; sites: {site: the same} at all others.
    recipe: what was set; where the rows of a batch had recipes of their own, all of them.
    """

    recipe: Recipe | tuple[Recipe, ...]
    layers: dict[int, LayerApplied]
    sites: dict[str, dict[int, LayerApplied]] = field(default_factory=dict)

    def note(self, site: str, layer: int, done: LayerApplied) -> None:
        """Take down what was done at one place."""
        (self.layers if site == "residual" else self.sites.setdefault(site, {}))[layer] = done

    @property
    def places(self) -> dict[str, dict[int, LayerApplied]]:
        """{site: {layer: LayerApplied}}, the residual stream first."""
        return {**({"residual": self.layers} if self.layers else {}), **self.sites}

    def __str__(self) -> str:
        if not self.places:
            return "nothing was steered"
        recipes = self.recipe if isinstance(self.recipe, tuple) else (self.recipe,)
        what = " | ".join(str(recipe) or "nothing" for recipe in recipes)
        lines: list[str] = []
        for site, layers in self.places.items():
            head = what if not lines else "and"
            lines.append(f"{head} at {len(layers)} layers" + ("" if site == "residual" else f", {site}"))
            lines += [f"  {n:3}  {a.rows:5} rows  shift {a.shift:.4g}  {a.path}" for n, a in layers.items()]
        return "\n".join(lines)


class Runtime(Protocol):
    """What a runtime module provides: delivery of a model's activations to programs."""

    steering: Steering | None  # the handle on it
    fingerprint: Fingerprint
    takes_rows: bool  # whether each row, or sequence, of a batch can have a program of its own
    turn: int  # the number of the reply in a chat, from 1, that windows by turn go by

    @property
    def experts_used(self) -> int:
        """How many experts a router chooses for a token; 0 without experts."""

    def width(self, site: str, layer: int) -> int:
        """How many floats a row has there. Raises SiteNotFound where the model has no such place."""

    @property
    def setting(self) -> Programs:
        """What was swapped in last, the one record of what is set."""

    def swap(self, programs: Programs, expected: Programs | None = None) -> bool:
        """Make `programs` those for evaluations from now on. Cheap, atomic, from any thread.

        A tuple, one for each row or sequence of a batch, comes only to a runtime that takes rows. expected:
        only if that very object is what is set. Returns whether it did.
        """

    def watch(self, watch: Watch | None) -> None:
        """Give it the readouts of every token evaluated from now on, in place of any other; None: stop."""

    def applied(self) -> Applied:
        """What the last evaluation did."""

    def capture(self, tokens: Sequence[int], layers: Sequence[int], last: int) -> Floats:
        """Evaluate `tokens` from an empty context; see Steering.capture."""

    def describe(self) -> dict[str, str]:
        """Facts about the attachment, for people."""

    def release(self) -> None:
        """Leave the model as it was before attaching."""


@runtime_checkable
class Sequences(Protocol):
    """What a runtime has whose sequences are numbered: llama.cpp's."""

    n_sequences: int

    def tell_reply(self, position: int | None, sequence: int) -> None:
        """Where the reply of a sequence begins; None: to be worked out."""

    def shift(self, by: int, sequence: int) -> None:
        """The cache's tokens of a sequence were moved by that many positions."""

    def decode(self, batch: Any) -> int:
        """llama_decode, steered."""


@runtime_checkable
class Experts(Protocol):
    """What a runtime has that can count the experts which a router chooses."""

    def count_experts(self, on: bool) -> None:
        """Begin to count from zero, or stop. Raises SiteNotFound."""

    def expert_counts(self) -> dict[int, npt.NDArray[np.int64]]:
        """{layer: how often each expert was chosen for a token}."""


@dataclass(eq=False)
class _Scope:
    """A `with` block that is open.

    before: what acts once neither it nor a later one is open. nested: it was entered in the middle of
    another's entering or leaving, in the same thread: by a signal handler.
    """

    before: Programs
    nested: bool = False


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
        self._sums = Sums()
        self._scopes: list[_Scope] = []  # those that are open, in the order in which they were entered
        self._left: list[_Scope] = []  # that ended while others were entered or left
        # A signal handler, or a generator that the garbage collector closes, may come in again in this
        # thread.
        self._scoping = threading.RLock()
        self._busy = False
        self._watch: Watch | None = None  # the newest
        self.warns = True  # of doses; what measures doses does not
        self._warned: set[str] = set()  # vectors whose dose a warning was given for
        self.options: dict[str, Any] = {}  # those of `attach`
        runtime.steering = self

    def set(self, recipe: Setting, *, sequence: int | None = None) -> None:
        """Steer by `recipe` from the next token on: text, a Vector, {name: dose}, or a Program.

        A list of them is one for each row of a batch in transformers, where a batch of another size is then
        refused with RecipeError when it is evaluated, and one for each sequence from 0 on in llama.cpp,
        where sequences beyond it are not steered. None is a row that is not steered. sequence: change what
        acts on that one of llama.cpp's sequences alone.

        A reply that is under way goes on under the new recipe; its gates begin anew. Raises RecipeError,
        NameNotFound, ModelMismatch, SiteNotFound, VectorError, and RuntimeNotSupported where the runtime
        takes no list; the steering is then as before.
        """
        runtime = self._attached()
        if sequence is not None:
            program, before = self._fitting(recipe), runtime.setting
            while not runtime.swap(self._with_sequence(before, program, sequence), before):
                before = runtime.setting
        else:
            runtime.swap(self._fitting_all(recipe))

    def _fitting_all(self, recipe: Setting) -> Programs:
        """One program, or one for each row or sequence."""
        if not isinstance(recipe, (list, tuple)):
            return self._fitting(recipe)
        if not self._attached().takes_rows:
            raise RuntimeNotSupported(
                "recipes for several rows or sequences take a transformers model, or a llama.cpp context "
                "that was made with n_seq_max above 1; set one recipe"
            )
        if not recipe:
            raise RecipeError("expected a recipe for each row of a batch, got an empty list")
        return tuple(self._fitting(row) for row in recipe)

    def _with_sequence(self, before: Programs, program: Program, sequence: int) -> Programs:
        """What was set, but for one sequence."""
        count = self._sequences().n_sequences
        if not 0 <= sequence < count:
            raise RecipeError(f"sequence: expected 0 to {count - 1}, got {sequence}")
        now = before if isinstance(before, tuple) else (before,) * count
        every = [*now, *(NOTHING,) * (count - len(now))]
        every[sequence] = program
        return tuple(every) if count > 1 else program

    def define(self, name: str, vector: Vector) -> None:
        """Have `name` mean `vector` in the recipes of this steering, before any pack's.

        Raises RecipeError where it can't be a name, ModelMismatch where the vector is for another model.
        """
        name = as_name(name)
        require_fit(vector, self._attached().fingerprint)
        self._found[name] = replace(vector, name=name)

    def clear(self) -> None:
        """Stop steering: the output is bit-identical to a model never attached."""
        self.set(NOTHING)

    def compile(self, recipe: RecipeLike) -> Program:
        """Compile without setting it: `set` takes the result in microseconds. Raises as `set` does.

        Issues a DoseWarning, once for each vector, for a dose beyond what the vector was calibrated for.
        """
        program = self._compiled(as_recipe(recipe))
        for warning in excessive_doses(program) if self.warns else ():
            if warning.name not in self._warned:
                self._warned.add(warning.name)
                warn(warning)
        return program

    def _compiled(self, recipe: Recipe) -> Program:
        runtime = self._attached()
        if not recipe.plain:
            return compile_recipe(recipe, runtime.fingerprint, self._find, runtime)
        vectors = tuple([self._find(str(term.vector)) for term in recipe.terms])
        program = self._sums.compiled(recipe, vectors)
        if program is None:
            program = compile_recipe(recipe, runtime.fingerprint, self._find, runtime)
            self._sums.note(vectors, program)
        return program

    @contextmanager
    def __call__(self, recipe: Setting) -> Iterator[Steering]:
        """Steer by `recipe` inside a `with` block; what was set before comes back after it.

        Blocks may overlap, as those of tasks and threads do: the recipe of the one that was entered last
        acts, and a block that ends takes away only its own. `set` inside a block lasts until the block ends.
        """
        programs, runtime = self._fitting_all(recipe), self._attached()
        with self._scoping:
            nested, self._busy = self._busy, True
            try:
                before = runtime.setting
                while not runtime.swap(programs, before):
                    before = runtime.setting
                scope = _Scope(before, nested)
                self._scopes.append(scope)
            finally:
                self._busy = nested
            self._leave_all()
        try:
            yield self
        finally:
            self._leave(scope)

    def _leave(self, scope: _Scope) -> None:
        with self._scoping:
            if self._busy and scope.nested:
                self._take_away(scope)  # a signal handler's block is whole within what it interrupted
            else:
                self._left.append(scope)
                self._leave_all()

    def _leave_all(self) -> None:
        """Take away what was left; more may be left meanwhile, by the garbage collector."""
        while self._left and not self._busy:
            self._busy = True
            try:
                self._take_away(self._left.pop(0))
            finally:
                self._busy = False

    def _take_away(self, scope: _Scope) -> None:
        if self._runtime is None:
            return
        place = self._scopes.index(scope)
        del self._scopes[place]
        if place < len(self._scopes):  # one that was entered later acts, and goes back to what this one would
            self._scopes[place].before = scope.before
            return
        with suppress(RuntimeNotSupported):  # the model was closed inside of the block
            self._runtime.swap(scope.before)

    @property
    def recipe(self) -> Recipe:
        """What is set now; the empty recipe for no steering.

        Raises RecipeError where the rows of a batch have recipes of their own: see `recipes`.
        """
        setting = self._setting
        if isinstance(setting, tuple):
            raise RecipeError(f"{len(setting)} row recipes are set: ask for `recipes`")
        return setting.recipe

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """What is set now: one recipe, or one for each row of a batch."""
        setting = self._setting
        return tuple(program.recipe for program in (setting if isinstance(setting, tuple) else (setting,)))

    @property
    def _setting(self) -> Programs:
        return NOTHING if self._runtime is None else self._runtime.setting

    def watch(self, *vectors: str | Vector, on_token: Callable[[Token], None] | None = None) -> Watch:
        """Read from now on how much of each vector every token's activations hold; see Watch.

        vectors: names, or Vectors of the residual stream. on_token: called with each token once it was
        evaluated. One watch at a time: it takes the place of another. Raises NameNotFound, ModelMismatch,
        VectorError.
        """
        runtime = self._attached()
        found = [self._find(vector) if isinstance(vector, str) else vector for vector in vectors]
        if not found:
            raise VectorError("watch: name at least one vector")
        for vector in found:
            require_fit(vector, runtime.fingerprint)
        names = [vector if isinstance(vector, str) else vector.name for vector in vectors]
        watch = Watch(names, found, runtime.fingerprint.n_layer, on_token)
        runtime.watch(watch)
        watch.when_stopped(lambda: runtime.watch(None))
        self._forget_watch()
        self._watch = watch
        return watch

    def _forget_watch(self) -> None:
        """It reads no further: that it is stopped later must not stop another."""
        if self._watch is not None:
            self._watch.when_stopped(lambda: None)
        self._watch = None

    @property
    def turn(self) -> int:
        """The number of the reply in a chat, counted from 1, that windows by turn go by.

        `create_chat_completion` of an attached Llama sets it by the messages; elsewhere it is set here.
        """
        return self._attached().turn

    @turn.setter
    def turn(self, turn: int) -> None:
        if turn < 1:
            raise ValueError(f"turn: expected 1 or more, got {turn}")
        self._attached().turn = turn

    def reply_from(self, position: int | None, sequence: int = 0) -> None:
        """Tokens of llama.cpp's `sequence` from `position` on are its reply, those before what it was given.

        None: have it worked out again from the batches, where several tokens of a sequence, or its first,
        are given, and one more is the reply's. `generate` of a Llama says it by itself. Say it, too, after
        llama_memory_seq_cp into a sequence that held a reply before.
        """
        self._sequences().tell_reply(position, sequence)

    def shift(self, by: int, sequence: int = 0) -> None:
        """llama_memory_seq_add has moved the later tokens of llama.cpp's `sequence` by `by` positions.

        So that windows and gates go on counting the reply from where it began. A LlamaContext's
        kv_cache_seq_shift says it by itself.
        """
        self._sequences().shift(by, sequence)

    def decode(self, batch: Any) -> int:
        """llama_decode of a llama_batch, or LlamaBatch, on an attached llama.cpp context; returns its status.

        In place of a direct call, which knows nothing of sequences, windows and watching. Raises
        SteeringNotApplied.
        """
        return self._sequences().decode(batch)

    def count_experts(self, on: bool = True) -> None:
        """Count from now on, from zero, how often a router chooses each expert; False: stop.

        Raises SiteNotFound where the model is no mixture of experts.
        """
        self._experts().count_experts(on)

    @property
    def expert_counts(self) -> dict[int, npt.NDArray[np.int64]]:
        """{layer: int64 (n_expert,)}: for how many tokens each expert was chosen since `count_experts`."""
        return self._experts().expert_counts()

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
        with ATTACHING, self._scoping:
            if self._runtime is not None:
                self._runtime.release()
                self._runtime = None
                self._scopes.clear()
                self._left.clear()
                self._forget_watch()

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

    def _sequences(self) -> Sequences:
        runtime = self._attached()
        if not isinstance(runtime, Sequences):
            raise RuntimeNotSupported("only llama.cpp's contexts have numbered sequences")
        return runtime

    def _experts(self) -> Experts:
        runtime = self._attached()
        if not isinstance(runtime, Experts):
            raise RuntimeNotSupported("experts are counted in llama.cpp and transformers models")
        return runtime

    def _find(self, name: str) -> Vector:
        if name not in self._found:
            self._found[name] = self._registry.find(name, self._attached().fingerprint)
        return self._found[name]

    def __repr__(self) -> str:
        if self._runtime is None:
            return "<Steering: detached>"
        what = " | ".join(str(recipe) or "nothing set" for recipe in self.recipes)
        return f"<Steering of {self._runtime.fingerprint}: {what}>"
