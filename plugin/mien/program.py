"""Programs: a recipe compiled for one model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np

from .engine import CompiledProgram
from .errors import DoseWarning, ModelMismatch, NameNotFound, RecipeError, VectorError
from .fingerprint import Fingerprint
from .models import how_to_make_vectors
from .recipe import DEFAULT_MARGIN, Gate, Mix, Pure, Recipe, Source, Term, counts_reply, require_sound
from .registry import pack_in_place_of_a_namespace
from .vector import Vector, purified, stacked

# Which floats a part changes, and how: (what, coefficient) pairs in order, `what` being a vector's digest
# and what is done with it. Equal keys are equal parts, also in another process, so a KV cache can be told
# by them; () is no steering.
Key: TypeAlias = tuple[tuple[str, float], ...]

# In the order in which they act at one place: what is there is taken out or set, then scaled, then added
# to, so that nothing that is added is taken out again.
OPERATIONS = ("ablate", "clamp", "edit", "scale", "add", "add_keep_norm", "forbid", "force")
_ORDER = {operation: number for number, operation in enumerate(OPERATIONS)}


class Window(NamedTuple):
    """Which tokens of a reply, counted from 0, and how strongly.

    From `start` up to `stop` and without it; growing over the first `ramp` of them to the full dose;
    halved every `decay`. The window that says nothing holds on any token, a prompt's too.
    """

    start: int = 0
    stop: float = math.inf
    ramp: int = 0
    decay: float = math.inf

    def at(self, reply: int) -> float:
        """The share of the dose for token `reply` of the reply; -1 is a token of the prompt."""
        if self == ALWAYS:
            return 1.0
        since = reply - self.start
        if since < 0 or reply < 0 or reply >= self.stop:
            return 0.0
        share = min(1.0, (since + 1) / self.ramp) if self.ramp else 1.0
        return share * math.pow(2.0, -since / self.decay)


ALWAYS = Window()


class OpenWhen(NamedTuple):
    """A gate of a recipe with its vector: open where above < readout < below. See recipe.Gate."""

    vector: Vector
    above: float = -math.inf
    below: float = math.inf
    hysteresis: float = 0.0
    latch: bool = False

    @property
    def remembers(self) -> bool:
        """Whether one token's decision depends on that of the token before."""
        return self.latch or self.hysteresis > 0

    @property
    def key(self) -> str:
        center = "" if not self.vector.center.any() else f" {self.vector.center.ravel().tolist()}"
        return f"{self.vector.digest}{center} {self[1:]}"


@dataclass(frozen=True)
class Dose:
    """What one term does, resolved: `coefficient` times `operation` with `vector`.

    operation: one of OPERATIONS, at the vector's site. values: of "clamp" the readout to reach for each
    direction of a layer, of "edit" the margin. gates: all must be open.
    """

    coefficient: float
    vector: Vector
    operation: str = "add"
    values: tuple[float, ...] = ()
    window: Window = ALWAYS
    gates: tuple[OpenWhen, ...] = ()

    @property
    def manner(self) -> str:
        """How the vector is used, in a text that is equal where that is. Doses of one manner fold."""
        if not (self.values or self.gates) and self.window is ALWAYS:
            return self.operation
        said = [self.operation, *map(str, self.values)]
        said += [str(tuple(self.window))] if self.window != ALWAYS else []
        return " ".join([*said, *(gate.key for gate in self.gates)])

    @property
    def key(self) -> tuple[str, float]:
        said = "" if self.manner == "add" else f" {self.manner}"
        if self.operation == "edit" and self.vector.bias is not None:
            said += f" {self.vector.bias.tolist()}"
        if self.operation == "clamp" and self.vector.center.any():
            said += f" {self.vector.center.ravel().tolist()}"
        return f"{self.vector.digest}{said}", self.coefficient


@dataclass(frozen=True)
class Part:
    """What a program does to one kind of token; immutable.

    doses: in the order in which they act. compiled: the engine's side, None for nothing. remembers: it is a
    reply's, and has gates that remember: on the same tokens as a prompt it may do something else.
    """

    doses: tuple[Dose, ...]
    compiled: CompiledProgram | None
    remembers: bool = False

    @cached_property
    def key(self) -> Key:
        key = tuple(dose.key for dose in self.doses)
        return (*key, ("remembers", 1.0)) if self.remembers else key

    @cached_property
    def places(self) -> dict[str, tuple[int, ...]]:
        """{site: the layers where it acts, ascending}, only sites where it does."""
        return self.compiled.places if self.compiled else {}

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Where it acts at any site, ascending."""
        return tuple(sorted({layer for layers in self.places.values() for layer in layers}))

    @cached_property
    def counts(self) -> bool:
        """Whether what it does depends on a token's place in the reply: a window, or a gate's memory."""
        return any(dose.window != ALWAYS or any(gate.remembers for gate in dose.gates) for dose in self.doses)


@dataclass(frozen=True)
class Program:
    """A recipe compiled for one model; immutable, and cheap to swap in.

    recipe: what it was compiled from. prompt: what is done to the tokens that a model is given;
    response: to those that it made itself. One object where no term has a window. turns: where terms
    have windows by turn, (first reply from which it holds, the program then), ascending.
    """

    recipe: Recipe
    prompt: Part
    response: Part
    turns: tuple[tuple[int, Program], ...] = ()

    @property
    def parts(self) -> tuple[Part, ...]:
        """The different ones, of all turns."""
        programs = [program for _, program in self.turns] or [self]
        every = [part for program in programs for part in (program.prompt, program.response)]
        return tuple({id(part): part for part in every}.values())

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Where it acts on any token, ascending."""
        return tuple(sorted({layer for part in self.parts for layer in part.layers}))

    def at_turn(self, turn: int) -> Program:
        """The program for the reply of that number in a chat, counted from 1."""
        found = self
        for first, program in self.turns:
            if first <= turn:
                found = program
        return found


_NO_PART = Part((), None)
NOTHING = Program(Recipe(), _NO_PART, _NO_PART)


class Sites(Protocol):
    """What a runtime knows of its model's sites."""

    @property
    def experts_used(self) -> int:
        """How many experts a router chooses for a token; 0 without experts."""

    def width(self, site: str, layer: int) -> int:
        """How many floats a row has there. Raises SiteNotFound where the model has no such place."""


def compile_recipe(
    recipe: Recipe, model: Fingerprint, find: Callable[[str], Vector], sites: Sites | None = None
) -> Program:
    """Compile `recipe` for `model`; `find` resolves names. Without `sites` only the residual stream is known.

    Doses are put in the order of their operations, manners and digests, so that the same recipe written in
    another way gives the same bits. Raises what `find` and `sites` raise, ModelMismatch where a vector is
    for another model, VectorError where a vector can't be used so, RecipeError for what a term can't say and
    where a sum is not finite.
    """
    terms = []
    turns = []
    try:
        for term in recipe.terms:
            require_sound(term)
            terms.append((term, _resolved(term, model, find)))
        edges = {1, *(edge for term, _ in terms if term.turn for edge in _edges(term.turn))}
        for start in sorted(edges):
            active = [(term, dose) for term, dose in terms if _holds(term.turn, start)]
            turns.append((start, _program(recipe, active, model, sites)))
    except NameNotFound as error:  # my-pack.joy is read as my - pack.joy
        raise pack_in_place_of_a_namespace(str(recipe).replace(" ", "")) or error from None
    except VectorError as error:
        error.exit_code = RecipeError.exit_code  # the vectors are sound: it is what the recipe asks of them
        raise
    first = turns[0][1]
    return first if len(turns) == 1 else replace(first, turns=tuple(turns))


def _edges(turn: tuple[int, int | None] | None) -> list[int]:
    if turn is None:
        return []
    return [turn[0]] if turn[1] is None else [turn[0], turn[1] + 1]


def _holds(turn: tuple[int, int | None] | None, at: int) -> bool:
    return turn is None or (turn[0] <= at and (turn[1] is None or at <= turn[1]))


def _program(
    recipe: Recipe, terms: list[tuple[Term, Dose]], model: Fingerprint, sites: Sites | None
) -> Program:
    whens = [
        ("response" if counts_reply(term) else term.when or dose.vector.when, dose) for term, dose in terms
    ]
    prompt = _part([dose for when, dose in whens if when != "response"], model, sites)
    remembers = any(gate.remembers for _, dose in whens for gate in dose.gates)
    if all(when == "all" for when, _ in whens):
        return Program(recipe, prompt, replace(prompt, remembers=True) if remembers else prompt)
    return Program(recipe, prompt, _part([dose for when, dose in whens if when != "prompt"], model, sites))


# ---- from a term to a dose ----


def _resolved(term: Term, model: Fingerprint, find: Callable[[str], Vector]) -> Dose:
    vector = _vector(term.vector, model, find)
    operation = "add_keep_norm" if term.keep_norm else term.operator
    values = term.value
    if operation == "clamp" and len(values) not in (1, vector.rank):
        raise RecipeError(f"{term.text}: expected a number, or {vector.rank}, got {len(values)}")
    if operation == "clamp":
        values = values * (vector.rank if len(values) == 1 else 1)
    elif operation != "ablate" and vector.rank > 1:
        raise VectorError(
            f"{term.text}: {vector.name} has {vector.rank} directions a layer, a subspace; it can be "
            "ablated or clamped"
        )
    if operation == "edit":
        values = values or (DEFAULT_MARGIN,)
    if operation == "edit" and vector.bias is None:
        raise VectorError(
            f"{term.text}: {vector.name} is no probe: it has no bias (mien.bias), which edit needs"
        )
    if (operation in ("force", "forbid")) != (vector.site == "experts") and operation not in ("add", "scale"):
        raise VectorError(f"{term.text}: {operation} can't act at the site of {vector.name}, {vector.site}")
    if not (counts_reply(term) or term.gates):
        return Dose(term.coefficient, vector, operation, values)
    window = Window(
        term.start,
        math.inf if term.stop is None else term.stop,
        term.ramp,
        math.inf if term.decay is None else term.decay,
    )
    gates = tuple(_open_when(term, gate, vector, model, find) for gate in term.gates)
    return Dose(term.coefficient, vector, operation, values, window, gates)


def _open_when(
    term: Term, gate: Gate, vector: Vector, model: Fingerprint, find: Callable[[str], Vector]
) -> OpenWhen:
    on = _vector(gate.on, model, find)
    if on.rank != 1 or on.site != vector.site:
        raise VectorError(
            f"{term.text}: a gate reads one direction where its term acts, {vector.site}; {on.name} has "
            f"{on.rank} at {on.site}"
        )
    above = -math.inf if gate.above is None else gate.above
    below = math.inf if gate.below is None else gate.below
    return OpenWhen(on, above, below, gate.hysteresis, gate.latch)


def _vector(source: Source, model: Fingerprint, find: Callable[[str], Vector]) -> Vector:
    """The vector that a term names, with its sums and purifications carried out."""

    def one(what: str | Vector | Pure) -> Vector:
        if isinstance(what, Pure):
            return purified(one(what.vector), [one(other) for other in what.without])
        vector = find(what) if isinstance(what, str) else what
        require_fit(vector, model)
        return vector

    if not isinstance(source, Mix):
        return one(source)
    total: Vector | None = None
    for coefficient, what in source.parts:
        vector = one(what) * coefficient
        total = vector if total is None else total + vector
    if total is None:
        raise RecipeError("a sum of no vectors")
    return total


# ---- from doses to a part ----


def _part(doses: list[Dose], model: Fingerprint, sites: Sites | None) -> Part:
    merged: dict[tuple[str, str, str], Dose] = {}
    for dose in doses:
        place = dose.vector.site, dose.manner, dose.key[0]
        merged[place] = _more(merged[place], dose) if place in merged else dose
    kept = [merged[place] for place in sorted(merged) if merged[place].coefficient != 0]
    kept = _together(sorted(kept, key=lambda dose: _ORDER[dose.operation]))
    if not kept:
        return _NO_PART
    for dose in kept:
        _require_sites(dose, model, sites)
    _require_experts(kept, sites)
    compiled = CompiledProgram(model.n_layer, kept)
    return Part(tuple(kept), compiled if compiled.acts else None)


def _more(dose: Dose, other: Dose) -> Dose:
    """Two doses of the same as one. Raises RecipeError if the total strength exceeds 1."""
    total = dose.coefficient + other.coefficient
    if dose.operation in ("force", "forbid"):
        return dose
    if dose.operation in ("ablate", "clamp", "edit") and total > 1:
        raise RecipeError(
            f"{dose.operation} of {dose.vector.name} is applied twice to the same tokens, with a total "
            f"strength of {total:g}; the maximum is 1"
        )
    return replace(dose, coefficient=total)


def _together(doses: list[Dose]) -> list[Dose]:
    """`doses` with ablations (and clamps) that act on the same tokens made one.

    One after another the second would bring back some of what the first took out; together all
    components are gone, or what they shall be.
    """
    found: list[Dose] = []
    groups: dict[tuple[object, ...], list[Dose]] = {}
    for dose in doses:
        if dose.operation in ("ablate", "clamp"):
            when = str(tuple(dose.window)), *(gate.key for gate in dose.gates)
            group = dose.operation, dose.vector.site, dose.coefficient, when
            if group not in groups:
                groups[group] = []
                found.append(dose)
            groups[group].append(dose)
        else:
            found.append(dose)
    joint = []
    for dose in found:
        members = next((group for group in groups.values() if group[0] is dose), [dose])
        if len(members) > 1:
            values = tuple(value for member in members for value in member.values)
            vectors = [member.vector for member in members]
            vector = stacked(vectors, apart=dose.operation == "clamp")
            dose = replace(dose, vector=vector, values=values)
        joint.append(dose)
    return joint


def _require_sites(dose: Dose, model: Fingerprint, sites: Sites | None) -> None:
    for vector in (dose.vector, *(gate.vector for gate in dose.gates)):
        if vector.site == "residual":  # require_fit has looked at widths, and all layers have it or none
            if sites is not None:
                sites.width(vector.site, vector.layers[-1])
            continue
        if sites is None:
            raise VectorError(f"{vector.name}: the site {vector.site} is not known without a model")
        for layer in vector.layers:
            width = sites.width(vector.site, layer)
            if width != vector.width:
                raise ModelMismatch(
                    f"{vector.name} does not fit {model}",
                    [f"it has {vector.width} values for {vector.site} of layer {layer}, the model {width}"],
                )


def _require_experts(doses: Iterable[Dose], sites: Sites | None) -> None:
    """No more experts may be forced than are chosen, and as many must be left as are chosen."""
    marked: dict[int, dict[str, set[int]]] = {}
    for dose in doses:
        if dose.operation in ("force", "forbid"):
            for layer, row in zip(dose.vector.layers, dose.vector.rows):
                found = marked.setdefault(layer, {"force": set(), "forbid": set()})
                found[dose.operation].update(np.flatnonzero(row).tolist())
                used, count = sites.experts_used if sites else 0, len(row)
                if both := sorted(found["force"] & found["forbid"]):
                    raise RecipeError(f"layer {layer}: experts {both} are forced and forbidden")
                if len(found["force"]) > used or len(found["forbid"]) > count - used:
                    raise RecipeError(
                        f"layer {layer}: {used} of {count} experts are chosen for a token; "
                        f"{len(found['force'])} can't be forced and {len(found['forbid'])} forbidden"
                    )


def require_fit(vector: Vector, model: Fingerprint) -> None:
    """Raise ModelMismatch, saying what differs, where `vector` would be garbage in `model`.

    The widths of sites other than the residual stream are a runtime's to know.
    """
    if vector.fingerprint is not None:
        differences = vector.fingerprint.differences(model)
    else:
        differences = []
        if vector.site in ("residual", "attention", "mlp") and vector.width != model.n_embd:
            differences.append(f"it has {vector.width} values a layer, the model {model.n_embd}")
        if vector.layers[-1] >= model.n_layer:
            differences.append(f"it goes up to layer {vector.layers[-1]}, the model to {model.n_layer - 1}")
        if vector.model_hint and vector.model_hint != model.architecture:
            differences.append(f"it is for {vector.model_hint}, the model is {model.architecture}")
    if differences:
        raise ModelMismatch(
            f"{vector.name} does not fit {model}",
            differences,
            f"{how_to_make_vectors(model)} `mien list` shows the packs and their models.",
        )


def excessive_doses(program: Program) -> list[DoseWarning]:
    """A warning for each vector that `program` adds with a dose outside of the vector's limits.

    What is compared is the sum of the terms that act on the same tokens. A vector that was not calibrated
    has no limits, nor has the result of arithmetic.
    """
    found = {}
    for part in program.parts:
        for dose in part.doses:
            limits = dose.vector.limits if dose.operation in ("add", "add_keep_norm") else None
            if limits and not limits[0] <= dose.coefficient <= limits[1]:
                found[dose.vector.name] = DoseWarning(dose.vector.name, dose.coefficient, limits)
    return list(found.values())


def doses_at(doses: Sequence[Dose], site: str, layer: int) -> list[Dose]:
    """Those that act there, in their order: a gate that has no direction there is closed."""
    return [
        dose
        for dose in doses
        if dose.vector.site == site
        and layer in dose.vector.layers
        and all(_reads(gate.vector, layer) for gate in dose.gates)
    ]


def _reads(vector: Vector, layer: int) -> bool:
    return layer in vector.layers and bool(vector.directions[layer].any())
